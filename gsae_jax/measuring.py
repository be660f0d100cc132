"""Measuring SAEs on held-out text, those of a run or from elsewhere, and writing their report."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import errors, processes, sae_loading
from gsae_jax import mesh as mesh_lib
from gsae_jax.config import HeldOut
from gsae_jax.data import rows
from gsae_jax.errors import TrainingError, UserError
from gsae_jax.evaluation import measure, report
from gsae_jax.lms import loading, sites
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.saes import trained
from gsae_jax.storage import metrics_log, paths, run_directory, writing
from gsae_jax.storage.facts import Facts, Text

logger = logging.getLogger(__name__)


def evaluate(
    path: epath.PathLike,
    tokens: int | None = None,
    ito: Sequence[int] = (),
    published: str = "",
    step: int | None = None,
    model: str = "",
    config: Mapping[str, Any] | None = None,
) -> str:
    """Measure a run on held-out tokens (its config's number by default) and write its report; returns the table.

    Args:
        path: the run's directory.
        tokens: how many.
        ito: numbers of features for inference-time optimisation (`measure.measure`).
        published: a CSV file of points to draw beside ours (`report.read_published`).
        step: of which checkpoint; by default the newest that is whole.
        model: where the run's language model lies now, if not where it lay in training.
        config: an experiment's. Its `lm` and `data` say where the run's language model and text lie now, and its
            `evaluation` how much is measured. By default the run's own config says both.

    Raises:
        UserError: not a run with a checkpoint, another language model than the one it was trained with, other text
            where `config` says where it lies, or too little held-out text.
        TrainingError: the report cannot be written.
    """
    workdir = run_directory.Workdir(path)
    points = report.read_published(published) if published else []
    run = workdir.experiment()
    # On whichever machine this is; features along `latent` as in training, where it has as many devices.
    settings = HeldOut(run.lm, run.data, run.evaluation, run.activations.drop_special_tokens)
    if config is not None:
        elsewhere, recorded = config_lib.held_out(config), workdir.config()["data"]
        # Fields that did not exist when the run began keep the values of then.
        absent = {name: value for name, value in vars(run.data).items() if name not in recorded}
        settings = _moved(settings, dataclasses.replace(elsewhere, data=dataclasses.replace(elsewhere.data, **absent)))
    if model:
        settings = dataclasses.replace(settings, lm=dataclasses.replace(run.lm, path=model, revision=""))
    latent = run.mesh.latent if jax.device_count() % run.mesh.latent == 0 else 1
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=0, latent=latent))
    with errors.about(workdir.field, step="--step"):
        step = workdir.sound_step(("params", "facts"), step)
        saes = sae_loading.load(path, mesh, step)
    training = metrics_log.read_metrics(workdir)
    text = None
    if step is not None:
        text = workdir.facts(step).text
        with errors.about("--model" if model else "lm.path", revision="lm.revision"):
            _check_inputs(workdir, workdir.facts(step), run, settings)
    targets = {}
    for sae in saes.values():
        stack = run.stacks[sae.stack]
        if stack.target_l0:
            targets[sae.name] = stack.target_l0[sae.index if len(stack.target_l0) > 1 else 0]
    about_run = _Run(training, step, targets, text)
    return _write(workdir.report, saes, settings, mesh, _Wanted(tokens, ito, points, model), about_run)


def _moved(settings: HeldOut, elsewhere: HeldOut) -> HeldOut:
    """A run's settings, with the paths of the language model and the text, and `evaluation`, of another config.

    Raises:
        UserError: the other config is of another run.
    """
    moved = {
        group: dataclasses.replace(
            getattr(settings, group), **{name: getattr(getattr(elsewhere, group), name) for name in fields}
        )
        for group, fields in run_directory.LOCATIONS.items()
    }
    if moved["lm"] == dataclasses.replace(settings.lm, revision=""):  # the same hub name; the run recorded its commit
        moved["lm"] = settings.lm
    for group, value in moved.items():
        there, here = (
            {
                name: item
                for name, item in dataclasses.asdict(each).items()
                if name not in run_directory.LOCATIONS[group]
            }
            for each in (value, getattr(elsewhere, group))
        )
        if differing := config_lib.differences(there, here, f"{group}."):
            why = f"is not the config of this run; undo (there != here): {'; '.join(differing)}"
            raise UserError(f"{why}, or measure SAEs on another model or text with --sae RUN --out OUT", "--config")
    return dataclasses.replace(settings, evaluation=elsewhere.evaluation, **moved)


def _check_inputs(workdir: run_directory.Workdir, facts: Facts, run: config_lib.Experiment, settings: HeldOut) -> None:
    """Compare the language model and the held-out text with those of training, by a checkpoint's fingerprints.

    Other text at the recorded path is only a warning: the corpus `stdlib`, for one, changes with the version of Python.

    Args:
        workdir: the run's.
        facts: of the checkpoint.
        run: the run's own config.
        settings: what is measured on.

    Raises:
        UserError: they are not the same.
    """
    try:
        checkpoint = Checkpoint.open(settings.lm.path, settings.lm.revision)
    except UserError as error:
        if settings.lm == run.lm:
            error.problem += "; if the run's model lies elsewhere now, write --model DIRECTORY"
        raise
    moved = paths.absolute(settings.lm.path) != paths.absolute(run.lm.path)
    if facts.lm or not moved:
        workdir.check_model(facts, settings.lm, checkpoint.fingerprint())
    else:
        logger.warning(
            f"the run in {workdir.path} recorded no fingerprint of its language model; measured on {settings.lm.path}"
        )
    if not facts.held_out:  # of an earlier version
        return
    limit = facts.held_out_tokens or rows.held_out_tokens(run, run.evaluation.tokens)
    held_out = rows.open_rows(settings.data, "test", checkpoint.tokenizer(), limit, checkpoint.config.d_vocab)
    if held_out.fingerprint != facts.held_out:
        if settings.data != run.data:
            raise UserError(
                f"{settings.data.path} does not hold the text of the run in {workdir.path}; write a path that does",
                "data.path",
            )
        logger.warning("the held-out text has changed since training; the report is on the new text")


def evaluate_saes(
    paths: Sequence[str],
    out: str,
    config: Mapping[str, Any] | None = None,
    model: str = "",
    site: str = "",
    tokens: int | None = None,
    ito: Sequence[int] = (),
    published: str = "",
) -> str:
    """Measure SAEs that `sae_loading.load` reads, and write their report as a new folder; returns the table.

    Args:
        paths: of the SAEs.
        out: the folder.
        config: an experiment's, for its language model and text; by default the embedded model, and this Python's
            library in rows as those that the SAEs were trained on.
        model: another language model.
        site: where the SAEs read; by default the site that each one's file names.
        tokens: as in `evaluate`; so are `ito` and `published`.

    Raises:
        UserError: SAEs that cannot be read, are not of this model or name another one where none was given, too
            little text, or an `out` that exists.
    """
    with errors.about("--out"):
        writing.check_new(out)
    points = report.read_published(published) if published else []
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=0, latent=1))
    saes: dict[str, trained.SAE] = {}
    for path in paths:
        with errors.about("--sae"):
            loaded = sae_loading.load(path, mesh)
        for name, sae in loaded.items():
            if name in saes:
                raise UserError(f"{path} has the second SAE called {name!r}; measure them one by one", "--sae")
            if not (site or sae.sites[0]):
                raise UserError(f"is missing, and {path} does not say; write one like blocks.0.hook_mlp_out", "--site")
            saes[name] = sae
    settings = _as_trained(saes) if config is None else config_lib.held_out(config)
    if model:
        settings = dataclasses.replace(settings, lm=dataclasses.replace(settings.lm, path=model, revision=""))
    _check_told(saes, settings, given=bool(model) or config is not None)
    with errors.about("--model" if model else "lm.path", revision="lm.revision"):
        saes = _at_sites(saes, settings.lm, site)
    return _write(epath.Path(out), saes, settings, mesh, _Wanted(tokens, ito, points, model))


def _as_trained(saes: Mapping[str, trained.SAE]) -> HeldOut:
    """The embedded model, and the standard library's text in the rows that all SAEs say they were trained on."""
    tree: dict[str, dict[str, Any]] = {"data": {}, "activations": {}}
    for group, field, name, kind in (
        ("data", "context_length", "context_size", int),
        ("data", "prepend_bos", "prepend_bos", bool),
        ("activations", "drop_special_tokens", "exclude_special_tokens", bool),
    ):
        values = [sae.metadata.get(name) for sae in saes.values()]
        if type(values[0]) is kind and all(value == values[0] for value in values):
            tree[group][field] = values[0]
    return config_lib.held_out(tree)


def _at_sites(saes: Mapping[str, trained.SAE], lm: config_lib.LM, site: str) -> dict[str, trained.SAE]:
    """SAEs with the language model's name for the site that each reads.

    Args:
        saes: by name.
        lm: where the language model lies.
        site: the site of all of them; "" where each one's file says its own.

    Raises:
        UserError: the language model has no such site.
    """
    checkpoint = Checkpoint.open(lm.path, lm.revision)
    widths = loading.site_widths(checkpoint.module())

    def ours(name: str) -> str:
        return sites.hook_name(name, checkpoint.config.norm_after) or name

    placed = {}
    for name, sae in saes.items():
        if site and len(sae.sites) == len(sae.targets) == 1:
            if ours(sae.sites[0]) not in ("", ours(site)):
                logger.warning(f"{name} says that it reads {sae.site!r}; it is measured at {site!r}, as --site says")
            sae = dataclasses.replace(sae, site=site)
        for its_site in (*sae.sites, *sae.targets):
            if not site and ours(its_site) not in widths:
                why = f"is missing, and {name} says that it reads {its_site!r}, which this language model does not have"
                raise UserError(f"{why}; write one of {', '.join(widths)}", "--site")
            sites.check(ours(its_site), widths, "--site")
        reads, writes = tuple(map(ours, sae.sites)), tuple(map(ours, sae.targets)) if sae.target else ""
        placed[name] = dataclasses.replace(sae, site=reads[0] if len(reads) == 1 else reads, target=writes)
    return placed


def _check_told(saes: Mapping[str, trained.SAE], settings: HeldOut, given: bool) -> None:
    """Warns of SAEs that are not measured on the model and the text that their files name.

    Raises:
        UserError: a file names another model, and none was `given`.
    """
    for field, used in sae_loading.names(settings.lm, settings.data).items():
        named: dict[str, list[str]] = {}
        for name, sae in saes.items():
            # Libraries write the owner, or the directory's path, or leave it out.
            other = (sae.metadata.get(field) or "").rstrip("/")
            if other and other.rpartition("/")[2].lower() != used.rpartition("/")[2].lower():
                named.setdefault(other, []).append(name)
        for other, names in named.items():
            whose = f"{names[0]} and {len(names) - 1} more say" if len(names) > 1 else f"{names[0]} says"
            if field == "model_name" and not given:
                how = f"write --model {other}" if "/" in other else "write --model with its directory or hub name"
                raise UserError(
                    f"is missing, and {whose} that {other!r} was the language model of training; {how}", "--model"
                )
            what = {"model_name": "language model", "dataset_path": "text"}[field]
            logger.warning(f"{whose} that {other!r} was the {what} of training; measured on {used!r}")


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What is asked for beside the SAEs, as `evaluate` takes it."""

    tokens: int | None
    ito: Sequence[int]
    points: Sequence[dict[str, Any]]
    model: str


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is known of the run whose SAEs are measured, if they are a run's.

    Attributes:
        training: the lines of its metrics.
        step: of the checkpoint.
        targets: `target_l0` of SAEs that have one, by name.
        text: what it was trained on.
    """

    training: Sequence[dict[str, Any]] = ()
    step: int | None = None
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    text: Text | None = None


def _write(
    folder: epath.Path,
    saes: dict[str, trained.SAE],
    settings: HeldOut,
    mesh: jax.sharding.Mesh,
    wanted: "_Wanted",
    run: _Run = _Run(),
) -> str:
    """Measure SAEs and write their report, with warnings of what is wrong with them; returns the table."""
    ito, points = wanted.ito, wanted.points
    narrowest = min(sae.config.width for sae in saes.values())
    if ito and max(ito) > narrowest:
        raise UserError(f"is {max(ito)} at most; there are SAEs of {narrowest} features, write no more", "--ito")
    where = "--model" if wanted.model else "lm.path"
    with errors.about(where, path=where, revision="lm.revision"):
        lm = loading.load_lm(settings.lm.path, revision=settings.lm.revision, dtype=settings.lm.dtype, mesh=mesh)
    loading.check_context(lm.module, settings.data.context_length)
    tokens = settings.evaluation.tokens if wanted.tokens is None else wanted.tokens
    batches = list(rows.held_out(settings, lm.tokenizer, tokens, lm.config.d_vocab))
    special_tokens = lm.special_tokens if settings.drop_special_tokens else ()
    logger.info(f"measuring {len(saes)} SAEs on {sum(batch.size for batch in batches):,} held-out tokens")
    hidden = None if processes.first() else True  # None: where there is no terminal
    with tqdm.tqdm(total=2 * len(batches), unit="batch", desc="evaluate", disable=hidden) as bar:
        sums = measure.measure(lm, list(saes.values()), batches, special_tokens, bar.update, ito)
    model = settings.lm.path or f"{sae_loading.EMBEDDED} (embedded)"
    records = report.rows(Path(model).name, saes, sums, run.targets, ito)
    gates = report.gates(saes)
    if processes.first():
        try:
            report.write(folder, run.step, records, sums, list(run.training), gates, points, run.text)
        except OSError as error:
            raise TrainingError(
                f"the report cannot be written to {folder} ({error}); make room, and run the command again"
            ) from error
    for note in report.notes(records):
        logger.warning(note)
    return report.table(records)
