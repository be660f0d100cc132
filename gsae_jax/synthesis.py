"""SAEs trained on activations of a known dictionary, and how well each recovers it."""

import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gsae_jax import config_trees, errors, experiments, sae_loading, storing
from gsae_jax.activations import imports
from gsae_jax.config import NO_MODEL, Experiment
from gsae_jax.errors import UserError
from gsae_jax.evaluation import synthetic
from gsae_jax.saes import contract
from gsae_jax.storage import paths, writing
from gsae_jax.training import loop

logger = logging.getLogger(__name__)

SITE = "synthetic"
STORE, RUN, RECORDS = "store", "run", "recovery.json"
STORED = 2**18  # tokens in the store, which longer runs read several times
MEASURED = 2**15  # tokens, which are not in the store
PART = 2**13  # tokens that are drawn at once
ROW, ROWS, BATCH = 128, 16, 256  # tokens in a row of the store, rows that are read at once, tokens of an update
HELD_OUT = 0.02  # of the rows, on which `python -m gsae_jax.evaluate` measures the run
TO_TRAIN, TO_MEASURE = 1, 2  # the seeds of the two draws begin with these


def experiment(stacks: Mapping[str, Any], store: epath.PathLike, steps: int) -> dict[str, Any]:
    """An experiment on a store of synthetic activations: all fields that differ from the defaults.

    Args:
        stacks: by name, as a config has them. Their site is replaced.
        store: where the store is or will be.
        steps: of training, a multiple of `ROW` * `ROWS` / `BATCH`.
    """
    return {
        "lm": {"path": NO_MODEL},
        "data": {"source": f"store:{store}", "context_length": ROW},
        "activations": {"rows_per_forward": ROWS, "buffer_size": 2**15, "scale_tokens": 2**14},
        "stacks": {name: config_trees.plain(stack) | {"site": SITE} for name, stack in stacks.items()},
        "train": {
            "steps": steps,
            "batch_size": BATCH,
            "warmup_steps": steps // 20,
            "decay_fraction": 0.5,
            "dead_after": max(1, steps // 10),
        },
        "checkpoint": {"every": steps},
        "evaluation": {"tokens": 2**12, "rows_per_forward": ROWS},
        "loggers": (),
    }


def study(
    stacks: Mapping[str, Any], settings: synthetic.Settings, directory: epath.PathLike, steps: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Train SAEs on activations of a known dictionary, and measure how well they recover it.

    A study that was interrupted continues, and one that is finished is measured again. The directory gets the `store`
    of activations, the `run`, and `recovery.json` with the settings and the records.

    Args:
        stacks: by name, as a config has them, of SAEs that read and write one site. Their site is replaced.
        settings: of the dictionary.
        directory: of the study, local or gs://bucket/folder. It is created if it does not exist.
        steps: of training; a multiple of 8.
        seed: of the dictionary and its activations. SAEs have their own seeds.

    Returns:
        For each SAE its name, stack, architecture, width, l1_coefficient (None if it has none), learning_rate and seed,
        and the fields of `evaluation.synthetic.Recovery` (None where a measure has no meaning).

    Raises:
        UserError: a stack or a setting that cannot be used, or a directory that has something else.
        TrainingError: as `gsae_jax.fit`.
        KeyboardInterrupt: training was interrupted. The run is saved, and the same call continues it.
    """
    if seed < 0:
        raise UserError(f"is {seed}; write 0 or more", "seed")
    with errors.about("directory", **{"--out": "directory", "--workdir": "directory"}):
        folder = paths.of_user(directory)
        config = experiments.experiment(experiment(stacks, folder / STORE, steps))
        _check(config)
        if not folder.is_empty(ignored="") and not (folder / STORE).exists():
            raise UserError(f"{folder} has other files; write the name of a new folder")
        truth = synthetic.Truth.make(settings, seed)
        _store(truth, seed, folder / STORE)
        if not loop.train(config, folder / RUN, sae_loading.starts(config)):
            raise KeyboardInterrupt(f"the run in {folder / RUN} is saved; the same call continues it")
    drawn = synthetic.sample(truth, (TO_MEASURE, seed), MEASURED)
    records = [
        {
            "name": sae.name,
            "stack": sae.stack,
            "architecture": sae.architecture,
            "width": sae.width,
            "l1_coefficient": sae.l1_coefficient,
            "learning_rate": sae.learning_rate,
            "seed": sae.seed,
            **dataclasses.asdict(synthetic.recovery(sae, truth, *drawn)),
        }
        for sae in sae_loading.load(folder / RUN).values()
    ]
    records = [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()}
        for record in records
    ]
    written = {"settings": dataclasses.asdict(settings), "seed": seed, "steps": steps, "saes": records}
    writing.write_text(folder / RECORDS, json.dumps(written, indent=1) + "\n")
    return records


def _check(config: Experiment) -> None:
    """Raises `UserError` for stacks that do not read and write one site."""
    for name, stack in config.stacks.items():
        with errors.within(f"stacks.{name}"):
            with errors.about("architecture"):
                module = contract.trainable(stack.architecture)
            if contract.reads_several(module) or contract.writes_others(module):
                raise UserError(
                    f"is {stack.architecture!r}, and synthetic activations have one site; write an SAE such as gated",
                    "architecture",
                )
            if stack.target:
                raise UserError(f"is {stack.target!r}, and synthetic activations have one site; write ''", "target")


def _store(truth: synthetic.Truth, seed: int, out: paths.Path) -> None:
    """Write the store, or continue writing; raises as `storing.of_files`."""
    settings = imports.Settings((SITE,), ROW, HELD_OUT, seed, model=SITE)
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        file = Path(scratch) / f"{SITE}.npy"
        shape = (STORED, truth.settings.dimension)
        array = np.lib.format.open_memmap(file, "w+", np.float32, shape)
        for part in range(STORED // PART):
            array[part * PART : (part + 1) * PART] = synthetic.sample(truth, (TO_TRAIN, seed, part), PART)[0]
        array.flush()
        logger.info(storing.of_files([str(file)], storing.Wanted(str(out)), settings))
