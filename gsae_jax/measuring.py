"""Measuring SAEs on held-out text, those of a run or from elsewhere, and writing their report."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tqdm
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import errors, processes, sae_loading, sae_sources
from gsae_jax.activations import masking, store
from gsae_jax.config import NO_MODEL, HeldOut
from gsae_jax.data import rows
from gsae_jax.errors import TrainingError, UserError
from gsae_jax.evaluation import measure, provenance, report
from gsae_jax.lms import loading
from gsae_jax.storage import metrics_log, paths, run_directory, writing

logger = logging.getLogger(__name__)


Earlier = Literal["beside", "replace", "aside"]


def evaluate(
    path: epath.PathLike,
    tokens: int | None = None,
    ito: Sequence[int] = (),
    published: str = "",
    step: int | None = None,
    model: str = "",
    config: Mapping[str, Any] | None = None,
    earlier: Earlier = "beside",
) -> str:
    """Measure a run on held-out tokens and write its report.

    The report is written to `report/` in the run's directory. If this folder has a report with other settings, the new
    report is written to a folder beside it.

    Args:
        path: the run's directory.
        tokens: the number of tokens; by default the config's `evaluation.tokens`.
        ito: numbers of features for inference-time optimisation (`measure.measure`).
        published: a CSV file of published results to draw in the figures (`report.read_published`).
        step: the checkpoint's step; by default the newest undamaged checkpoint.
        model: the new path of the run's language model, if it has moved.
        config: fields of an experiment. `lm` and `data` give the new paths of the run's language model and text, and
            `evaluation` how much to measure. Missing fields are taken from the run's config.
        earlier: what happens to a report with other settings in `report/`. "beside": it is kept, and the new report is
            written beside it. "replace": it is replaced. "aside": any earlier report moves to `earlier_reports/`.

    Returns:
        The report's table in Markdown. The last line is the path of the report.

    Raises:
        UserError: `path` is not a run with a checkpoint, the language model or the text of `config` is not that of
            training, or there is too little held-out text.
        TrainingError: the report cannot be written.
    """
    workdir = run_directory.Workdir(path)
    points = report.read_published(published) if published else []
    chosen = sae_sources.of_run(path, step, model, config)
    training = metrics_log.read_metrics(workdir)
    set_aside = workdir.set_report_aside if earlier == "aside" else None
    wanted = _Wanted(tokens, ito, published, points, model, earlier == "beside", set_aside)
    return _write(workdir.report, chosen, training, wanted)


def evaluate_saes(
    names: Sequence[str],
    out: str,
    config: Mapping[str, Any] | None = None,
    model: str = "",
    site: str | tuple[str, str] = "",
    tokens: int | None = None,
    ito: Sequence[int] = (),
    published: str = "",
) -> str:
    """Measure SAEs of several runs and of other libraries on one model and text, and write one report to a new folder.

    Args:
        names: directories of runs, RUN:STACK for one stack of a run, or folders that `gsae_jax.load` reads.
        out: the new folder.
        config: fields of an experiment's `lm`, `data` and `evaluation`. By default they are those of the first run.
            Without a run, they are the embedded model and Python's library, in rows of the length on which the SAEs
            were trained.
        model: another language model.
        site: the site that the SAEs read; by default the site that each SAE's file names. A pair (site, target) is for
            transcoders only: the sites that they read and predict. With it, Gemma Scope's files are read as those of
            transcoders. A site that their files name may be "".
        tokens: as in `evaluate`; so are `ito` and `published`.

    Returns:
        As `evaluate`.

    Raises:
        UserError: an SAE cannot be read or does not fit the model, an SAE names another model and none was given, there
            is too little text, or `out` exists.
    """
    with errors.about("--out"):
        writing.check_new(out)
    points = report.read_published(published) if published else []
    chosen = sae_sources.of_names(names, config, model, site)
    return _write(paths.of_user(out), chosen, (), _Wanted(tokens, ito, published, points, model))


def _named(lm: config_lib.LM) -> str:
    """What a report calls a language model."""
    return Path(lm.path or f"{sae_loading.EMBEDDED} (embedded)").name


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What is asked for beside the SAEs, as `evaluate` takes it; `points` are those of the file `published`.

    `beside`: a report of other settings in the same folder stays, and this one goes beside it. `set_aside` is called
    before the report is written; it moves an earlier one, and returns where to.
    """

    tokens: int | None
    ito: Sequence[int]
    published: str
    points: Sequence[dict[str, Any]]
    model: str
    beside: bool = False
    set_aside: Callable[[], paths.Path | None] | None = None


class _HeldOut(NamedTuple):
    """What SAEs are measured on.

    Attributes:
        lm: the language model, if there is one.
        batches: of tokens, or of rows of a store.
        counts: tokens in each.
        special_tokens: ids that are not measured.
        fingerprint: of the rows.
        others: the other language models of which SAEs have sites, by name.
        documents: the number of the document in which each row begins, where it is known.
    """

    lm: loading.LM | None
    batches: Sequence[Any]
    counts: list[int]
    special_tokens: tuple[int, ...]
    fingerprint: str
    others: Mapping[str, loading.LM]
    documents: np.ndarray | None = None


def _opened(settings: HeldOut, chosen: sae_sources.Chosen, wanted: "_Wanted", tokens: int, limit: int) -> _HeldOut:
    """The held-out rows and the language model. `limit`: `tokens` in whole batches."""
    if settings.lm.path == NO_MODEL:
        if any(not sae.run for sae in chosen.saes.values()) or not settings.data.source:
            raise UserError(f"is {NO_MODEL!r}; write the language model to measure with", "lm.path")
        stored = store.Store.open(store.location(settings.data.source))
        sites = sorted({site for sae in chosen.saes.values() for site in (*sae.sites, *sae.targets)})
        test = stored.rows("test", sites).limited(limit)
        special = stored.manifest.special_tokens if settings.drop_special_tokens else ()
        batches = store.Batches(test, settings.evaluation.rows_per_forward)
        counts = [len(rows) * stored.manifest.context_length for rows in batches.parts]
        return _HeldOut(None, batches, counts, special, test.fingerprint, {})
    where = "--model" if wanted.model else "lm.path"
    with errors.about(where, path=where, revision="lm.revision"):
        lm = loading.load_lm(settings.lm.path, revision=settings.lm.revision, dtype=settings.lm.dtype, mesh=chosen.mesh)
    used = {name for sae in chosen.saes.values() for name in sae.models} - {""}
    others = loading.load_others({name: settings.lms[name] for name in sorted(used)}, lm, chosen.mesh)
    for name, each in {"": lm, **others}.items():
        loading.check_context(each.module, settings.data.context_length, name)
    of_text = list(rows.held_out(settings, lm.tokenizer, tokens, lm.config.d_vocab))
    opened = rows.open_rows(settings.data, "test", lm.tokenizer, limit, lm.config.d_vocab)
    special_tokens = loading.special_tokens_of(lm, others) if settings.drop_special_tokens else ()
    documents = rows.documents(settings.data, lm.tokenizer, opened, masking.tokens_of(np.concatenate(of_text)))
    sizes = [batch.size for batch in of_text]
    return _HeldOut(lm, of_text, sizes, special_tokens, opened.fingerprint, others, documents)


def _write(
    folder: paths.Path, chosen: sae_sources.Chosen, training: Sequence[dict[str, Any]], wanted: "_Wanted"
) -> str:
    """Measure SAEs and write their report, with warnings of what is wrong with them; returns what `evaluate` does.

    `training`: the lines of metrics of the run.
    """
    ito, saes, settings = wanted.ito, chosen.saes, chosen.settings
    narrowest = min(sae.config.width for sae in saes.values())
    if ito and max(ito) > narrowest:
        raise UserError(
            f"goes up to {max(ito)} features, but the narrowest SAE has {narrowest}; write at most {narrowest}", "--ito"
        )
    tokens = settings.evaluation.tokens if wanted.tokens is None else wanted.tokens
    limit = rows.held_out_tokens(settings, tokens)
    held_out = _opened(settings, chosen, wanted, tokens, limit)
    lm, batches, text = held_out.lm, held_out.batches, held_out.fingerprint
    made_with = provenance.Settings(chosen.step, limit, tuple(ito), Path(wanted.published).name, text)
    if wanted.beside and (place := provenance.place(folder, made_with)) != folder:
        logger.info(
            f"{folder} has a report that was made with other settings and is kept; the new one goes to {place} "
            "(--overwrite replaces the other)"
        )
        folder = place
    per_batch = f" ({tokens:,} asked for; a batch has {held_out.counts[0]:,})" if limit != tokens else ""
    logger.info(f"measuring {len(saes)} SAEs on {sum(held_out.counts):,} held-out tokens{per_batch}")
    hidden = None if processes.first() else True  # None: where there is no terminal
    with tqdm.tqdm(total=2 * len(batches), unit="batch", desc="evaluate", disable=hidden) as bar:
        sums = measure.measure(
            lm, list(saes.values()), batches, held_out.special_tokens, bar.update, ito, chosen.mesh, held_out.others
        )
    documents = None
    if held_out.documents is not None:
        documents = len(np.unique(held_out.documents))
        sums = {name: of_one | {"document": held_out.documents} for name, of_one in sums.items()}
    models = {name: _named(settings.lms[name] if name else settings.lm) for name in ("", *held_out.others)}
    records = report.rows(models, saes, sums, chosen.targets, ito, chosen.recipes)
    gates, compared = report.gates(saes), report.differences(saes, sums, models)
    name_of_text = chosen.text or sae_loading.names(settings.lm, settings.data)["dataset_path"]
    measured = provenance.of_report(made_with, models, name_of_text, settings, documents)
    about = report.About(dataclasses.asdict(made_with), measured, chosen.runs, compared)
    if processes.first():
        if wanted.set_aside and (kept := wanted.set_aside()):
            logger.info(f"the earlier report is kept in {kept}")
        try:
            sentences = report.write(folder, chosen.step, records, sums, list(training), gates, wanted.points, about)
        except OSError as error:
            raise TrainingError(
                f"the report cannot be written to {folder} ({error}); make room, and run the command again"
            ) from error
        for note in sentences:
            logger.warning(note)
    return f"{report.table(records)}\n\nreport: {folder / 'report.md'}"
