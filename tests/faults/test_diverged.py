"""An SAE that has diverged spoils nothing of the others: loading, reports and exports answer sensibly.

Many mutants: python -m pytest -n 0 -m faults tests/faults/test_diverged.py
"""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import config_trees, export, measuring
from gsae_jax.config import Experiment
from gsae_jax.formats import records
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.saes import parameters
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import run_directory
from gsae_jax.training import loop, preparation, starting
from tests.conftest import tiny
from tests.faults import mutants
from tests.training import single_device_mesh

FEW, MANY = 2, 200
FORMATS = ("saelens", "jumprelu", "gemma_scope")


@dataclasses.dataclass
class Run:
    """A sound run, its report, and what another checkpoint is made of."""

    folder: object
    config: Experiment
    report: dict
    params: dict
    state: object
    position: dict


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_dir, lm_dir):
    root = tmp_path_factory.mktemp("diverged")
    config = tiny(text_dir, lm_dir, root / "tfds")
    config.stacks.gated.seeds, config.stacks.baseline.site = (0,), config.stacks.gated.site
    config.train.steps, config.evaluation.tokens, config.loggers = 8, 512, ()
    config = config_trees.from_dict(Experiment, config)
    folder = root / "run"
    loop.train(config, folder)
    measuring.evaluate(folder, ito=(2,))
    report = json.loads((folder / "report" / "report.json").read_text())
    program, _ = preparation.build(config, single_device_mesh(), Checkpoint.open(config.lm.path, config.lm.revision))
    checkpoints = checkpoints_lib.Checkpoints(run_directory.Workdir(folder), config.checkpoint)
    params, state, position = checkpoints.restore(8, *starting.saved_parts(program.abstract_state(), True))
    checkpoints.close()
    return Run(folder, config, report, jax.device_get(params), jax.device_get(state), position)


def diverged(draw, run, folder):
    """A copy of the run in which one SAE has other parameters; returns that SAE's name."""
    stack = draw.choice(sorted(run.params))
    index = draw.randrange(len(run.params[stack]["b_dec"]))
    own = mutants.parameters(draw, {name: value[index] for name, value in run.params[stack].items()})
    params = {name: {key: np.array(value) for key, value in of.items()} for name, of in run.params.items()}
    for name, value in own.items():
        params[stack][name][index] = value
    facts = run_directory.Workdir(run.folder).facts(8)
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "report"))
    checkpoints = checkpoints_lib.Checkpoints(run_directory.Workdir(folder), run.config.checkpoint)
    checkpoints.save(8, params, run.state, run.position, facts, None)
    checkpoints.close()
    return f"{stack}_{index}"


def check(draw, run, folder):
    """Whether the mutant could be exported in every format."""
    name = diverged(draw, run, folder / "run")
    saes = gsae_jax.load(folder / "run")
    assert list(saes) == ["baseline_0", "gated_0", "gated_1"]
    measuring.evaluate(folder / "run", ito=(2,))
    text = (folder / "run" / "report" / "report.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    for ours, sound in zip(found["saes"], run.report["saes"], strict=True):
        if ours["name"].partition("_ito_")[0] == name:
            assert ours.keys() == sound.keys()
        else:
            assert ours == sound
    assert "nan" not in (folder / "run" / "report" / "report.md").read_text()
    written = {}
    for format in FORMATS:
        written[format] = export.export(folder / "run", format, folder / format)
        assert set(saes) - set(written[format]) <= {name}
        assert set(gsae_jax.load(folder / format)) == set(written[format])
        if name not in written[format]:
            with pytest.raises(records.DivergedError) as caught:
                export.export(folder / "run", format, folder / "one", name)
            assert caught.value.field == name
            assert not (folder / "one").exists()
    broken = parameters.not_finite(saes[name].functions, saes[name].params)
    assert bool(broken) <= (name not in written["saelens"])
    if broken:
        assert any(name in note for note in found["notes"]), broken
    shutil.rmtree(folder)
    return all(name in names for names in written.values())


@pytest.mark.variants
def test_mutants(run, tmp_path):
    for seed in range(FEW):
        check(random.Random(seed), run, tmp_path / str(seed))


@pytest.mark.faults
def test_many_mutants(run, tmp_path):
    exported = 0
    for seed in range(FEW, FEW + MANY):
        try:
            exported += check(random.Random(seed), run, tmp_path / str(seed))
        except BaseException as error:
            raise AssertionError(f"mutant {seed}") from error
    assert MANY // 50 < exported < MANY - MANY // 50
