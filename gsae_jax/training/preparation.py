"""Everything that a run needs before its first step, checked before anything is written."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import config as config_lib
from gsae_jax import config_trees, errors, loggers, plugins, processes
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import store as store_lib
from gsae_jax.config import NO_MODEL, Experiment
from gsae_jax.data import rows as rows_lib
from gsae_jax.errors import UserError
from gsae_jax.evaluation import provenance
from gsae_jax.lms import loading
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.lms.checkpoints import Checkpoint, about_other, open_others
from gsae_jax.saes import contract, parameters
from gsae_jax.storage import run_directory
from gsae_jax.storage.facts import Facts, Text
from gsae_jax.training.step import Program

logger = logging.getLogger(__name__)

OF_STORES = ("source", "context_length")  # what a run without text reads of `config.Data`


@dataclasses.dataclass
class Prepared:
    """What a run trains with.

    Attributes:
        config: the experiment.
        workdir: the run's directory.
        program: the train program.
        source_params: what the source of activations computes with.
        stream: batches of rows of tokens.
        parts: rows of text that are read in one pass, for each `train.steps` that the run has had; the last is now.
        about: a sentence about what it reads.
        facts: what checkpoints will say, but for the units of the sites and what training moves.
        latest: the step of the checkpoint that the run continues from, if there is one.
        before: what that checkpoint says.
        steps_before: `train.steps` of that checkpoint, if the run has another one now.
        starts: parameters [N, ...] that stacks of a new run start from, in the language model's units.
    """

    config: Experiment
    workdir: run_directory.Workdir
    program: Program
    source_params: Any
    stream: Any
    parts: list[int]
    about: str
    facts: Facts
    latest: int | None
    before: Facts | None
    steps_before: int | None
    starts: Mapping[str, dict[str, Any]]


def _without_auxk(config: Experiment) -> str:
    """What it means for stacks with AuxK that no feature counts as dead."""
    names = []
    for name, stack in config.stacks.items():
        fields = {each.name: each.default for each in dataclasses.fields(contract.module_of(stack.architecture).Config)}
        if stack.options.get("auxk_coefficient", fields.get("auxk_coefficient", 0)):
            names.append(name)
    return f", and auxk_coefficient will do nothing in {', '.join(names)}" if names else ""


def warnings(config: Experiment) -> list[str]:
    """Sentences about settings that work, but hardly as they are meant."""
    train, sentences = config.train, []
    if train.dead_after > train.steps:
        sentences.append(
            f"train.dead_after is {train.dead_after:,}, more than the {train.steps:,} steps of this run: "
            f"no feature will count as dead in the metrics{_without_auxk(config)}; lower it to count them"
        )
    trained_on, buffer_size = train.steps * train.batch_size, config.activations.buffer_size
    if buffer_size > trained_on:
        sentences.append(
            f"activations.buffer_size is {buffer_size:,}, more than the {trained_on:,} activations that this run "
            "trains on (train.steps x train.batch_size), and the buffer is filled first; lower activations.buffer_size"
        )
    return sentences


def prepare(config: Experiment, workdir: run_directory.Workdir, starts: Mapping[str, dict[str, Any]]) -> Prepared:
    """Check the config and the directory, and open the language model and the text.

    Args:
        config: the experiment.
        workdir: the run's directory.
        starts: parameters [N, ...] that stacks of a new run start from, in the language model's units.

    Raises:
        UserError: the config or the directory cannot be used, or another run, model or text is there.
    """
    config = contract.with_recipes(config)
    as_json = config_trees.to_dict(config)
    processes.agree("--config", as_json, "start every process with the same command and the same files")
    workdir.check(as_json)
    is_new = workdir.latest_step() is None
    if is_new:
        config.check_new()
        _check_data(config)
    if processes.first():  # which alone logs
        loggers.check(config.loggers)
    mesh = mesh_lib.make_mesh(config.mesh)
    origin = _of_store(config, mesh) if config.data.source else _of_text(config, mesh)
    program, of_lms = origin.program, dict(origin.fingerprints)
    if is_new:
        program.check_new()
    _check_starts(program, starts)
    for name, fingerprint in of_lms.items():
        field = f"lms.{name}.path" if name else "lm.path"
        processes.agree(field, fingerprint, "give every process the same language model")
    latest = _sound_step(workdir)
    before = None if latest is None else workdir.facts(latest)
    if before is not None and config.lm.path != NO_MODEL:
        for name, fingerprint in of_lms.items():
            with _about_model(name):
                workdir.check_model(before, config.lms[name] if name else config.lm, fingerprint, name)
    known = [] if latest is None or before is None else _known_lengths(config, workdir, latest, before)
    limit = max([tokens_needed(config), *(lengths[-1]["tokens"] for lengths in known)])
    rows = origin.rows(limit)
    processes.agree("data", rows.fingerprint, "give every process the same text")
    lengths = _lengths(config, latest or 0, before, known, rows)
    rows = rows.limited(lengths[-1]["tokens"])
    parts = [len(rows.limited(length["tokens"])) for length in lengths]
    local = mesh_lib.local_rows(mesh, config.rows_per_call)
    stream = origin.batches(rows, config.rows_per_call, config.seed, local, parts)
    # The report's text must be there too.
    held_out = origin.held_out()
    text = None if config.data.source else _text(config, rows.extent, held_out.extent)
    if is_new and text is not None:
        rows_lib.check_apart(rows, held_out)
    fingerprints = {name: parameters.fingerprint(params) for name, params in starts.items()}
    facts = Facts(
        rows=rows.fingerprint,
        widths=program.widths,
        held_out=held_out.fingerprint,
        lm=of_lms.pop(""),
        lms=of_lms,
        starts=before.starts if before and before.starts else fingerprints,
        buffer=config.checkpoint.buffer,
        machine=_machine(mesh),
        skips=before.skips if before else {},
        text=text,
        lengths=lengths,
        held_out_tokens=rows_lib.held_out_tokens(config, config.evaluation.tokens),
        code={
            stack.name: plugins.fingerprint(stack.architecture)
            for stack in program.stacks
            if plugins.is_own(stack.config.architecture)
        },
    )
    has_new_length = len(lengths) > 1 and lengths not in known
    return Prepared(
        config=config,
        workdir=workdir,
        program=program,
        source_params=origin.params,
        stream=stream,
        parts=parts,
        about=_about(config, rows) if text is None else f"text: {text}",
        facts=facts,
        latest=latest,
        before=before,
        steps_before=lengths[-2]["steps"] if has_new_length else None,
        starts=starts,
    )


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where activations come from, and what they are measured on.

    Attributes:
        program: the train program.
        params: what its source computes with.
        fingerprints: of the language models, by name; that of "" is empty where there is none.
        rows: opens the rows to train on, of about so many tokens.
        batches: makes the stream of their batches; the arguments are those of `data.rows.batches`.
        held_out: opens the rows to measure on.
    """

    program: Program
    params: Any
    fingerprints: dict[str, dict[str, str]]
    rows: Callable[[int], Any]
    batches: Callable[..., Any]
    held_out: Callable[[], Any]


def _of_text(config: Experiment, mesh: jax.sharding.Mesh) -> _Origin:
    """The language models run over the text."""
    with errors.about("lm.path", revision="lm.revision"):
        checkpoint, others = Checkpoint.open(config.lm.path, config.lm.revision), open_others(config.lms)
        program, tokenizer = build(config, mesh, checkpoint, others)
    checkpoints, fingerprints, d_vocab = {"": checkpoint, **others}, {}, checkpoint.config.d_vocab

    def params_of(name: str, module: Any) -> Any:
        with _about_model(name):
            return checkpoints[name].params(module, program.dtype_of(name))

    params = program.source_params(params_of)
    for name, each in checkpoints.items():
        with _about_model(name):
            fingerprints[name] = each.fingerprint()
    return _Origin(
        program,
        params,
        fingerprints,
        lambda tokens: rows_lib.open_rows(config.data, "train", tokenizer, tokens, d_vocab),
        rows_lib.batches,
        lambda: rows_lib.held_out_rows(config, tokenizer, config.evaluation.tokens, d_vocab),
    )


def _of_store(config: Experiment, mesh: jax.sharding.Mesh) -> _Origin:
    """Activations are read from a store. The language model, if there is one, is only measured with."""
    with errors.about("data.source"):
        store = store_lib.Store.open(store_lib.location(config.data.source))
    manifest = store.manifest
    program = Program.build(config, mesh, None, manifest.special_tokens, store)
    _check_memory(program)
    rows = functools.partial(store.rows, sites=config.sites)
    batches = store_lib.StoredRows.batches
    if config.lm.path == NO_MODEL:
        if not manifest.rows["test"]:
            raise UserError(
                f"is {NO_MODEL!r}, but the store {store.path} has no held-out rows to measure on; write it again with "
                "--held_out=0.05",
                "lm.path",
            )
        return _Origin(
            program, {}, {"": {}}, lambda tokens: rows("train").limited(tokens), batches, lambda: rows("test")
        )
    with errors.about("lm.path", revision="lm.revision"):
        checkpoint = Checkpoint.open(config.lm.path, config.lm.revision)
        tokenizer, fingerprint = checkpoint.tokenizer(), checkpoint.fingerprint()
        _check_model(config, store, checkpoint, fingerprint, tokenizer)
        _check_text(config, store, tokenizer, checkpoint.config.d_vocab)
    return _Origin(
        program,
        {},
        {"": fingerprint},
        lambda tokens: rows("train").limited(tokens),
        batches,
        lambda: rows_lib.held_out_rows(config, tokenizer, config.evaluation.tokens, checkpoint.config.d_vocab),
    )


def _check_data(config: Experiment) -> None:
    """Raises `UserError` for settings of the text or the language model that a new run does not read."""
    if config.lm.path != NO_MODEL:
        rows_lib.check_new(config.data)
        return
    with errors.about("data.source"):
        store = store_lib.Store.open(store_lib.location(config.data.source))
    if store.manifest.model:  # the settings say what was stored
        return
    unread = {f"data.{name}": value for name, value in config_lib.changed(config.data).items() if name not in OF_STORES}
    for field, value in (unread | ({"lm.revision": config.lm.revision} if config.lm.revision else {})).items():
        raise UserError(
            f"is {value!r}, but the store {store.path} was made of files, and lm.path={NO_MODEL!r}: no text is read; "
            "leave it out",
            field,
        )


def _check_model(
    config: Experiment, store: store_lib.Store, checkpoint: Checkpoint, fingerprint: dict[str, str], tokenizer: Any
) -> None:
    """Raises `UserError` for a language model or a tokenizer that is not that of the store."""
    manifest, name = store.manifest, config.lm.path or "the embedded model"
    without = f"or {NO_MODEL!r} to measure reconstructions alone"
    widths = loading.site_widths(checkpoint.module())
    for site in config.sites:
        if widths.get(site) != manifest.widths[site]:
            there = f"width {widths[site]}" if site in widths else "no such site"
            raise UserError(
                f"is {name}, which has {there} where the store has {site} of width {manifest.widths[site]}; write the "
                f"language model of the store, {without}"
            )
    if not manifest.model:
        logger.warning(
            f"the store {store.path} does not say which language model its activations are from; loss recovered is "
            f"measured with {name}"
        )
        return
    if fingerprint != manifest.model:
        raise UserError(
            f"is {name}, but the store {store.path} is of {manifest.source['model']}, which has another config.json or "
            f"other weights; write that model, {without}"
        )
    if config_lib.fingerprint(tokenizer.backend_tokenizer.to_str()) != manifest.tokenizer:
        raise UserError(f"{name} has another tokenizer than the store {store.path}; put its tokenizer back, {without}")


def _check_text(config: Experiment, store: store_lib.Store, tokenizer: Any, d_vocab: int) -> None:
    """Raises `UserError` for text that is not that of a store, or is divided into rows in another way."""
    manifest = store.manifest
    if not manifest.model:
        return
    if (bos := manifest.stride < manifest.context_length) != config.data.prepend_bos:
        why = f"but the rows of the store {store.path} {'begin' if bos else 'do not begin'} with BOS"
        raise UserError(f"is {config.data.prepend_bos}, {why}; write {bos}", "data.prepend_bos")
    recorded = manifest.source.get("held_out")
    tokens = int(manifest.source.get("held_out_tokens", 0))
    if recorded and rows_lib.open_rows(config.data, "test", tokenizer, tokens, d_vocab).fingerprint != recorded:
        raise UserError(
            f"is {config.data.source!r}, which was written from other text ({manifest.source['text']}) or from other "
            "rows than the config's data.* describes. The report might then measure text that was trained on. Write "
            f"the data.* settings of the command that wrote the store, or lm.path={NO_MODEL!r}",
            "data.source",
        )


def _about(config: Experiment, rows: store_lib.StoredRows) -> str:
    """A sentence about a store and how much of it the run reads."""
    manifest, T = rows.store.manifest, config.data.context_length
    read = tokens_needed(config) - config.activations.buffer_size
    of_store = manifest.rows["train"] * T
    return (
        f"activations: {of_store:,} tokens in {rows.store.path}; this run reads {read:,}, about "
        f"{read / max(1, of_store):.2g} passes"
    )


def _known_lengths(
    config: Experiment, workdir: run_directory.Workdir, latest: int, before: Facts
) -> list[list[dict[str, int]]]:
    """What `Facts.lengths` of a checkpoint is, or may be: earlier versions did not record it."""
    if before.lengths:
        return [before.lengths]
    may_be = (workdir.experiment().train.steps, config.train.steps, latest)
    return [[{"since": 0, "steps": steps, "tokens": tokens_needed(config, steps)}] for steps in may_be]


def _lengths(
    config: Experiment, step: int, before: Facts | None, known: list[list[dict[str, int]]], rows: Any
) -> list[dict[str, int]]:
    """`Facts.lengths` of a run that continues from this step.

    Raises:
        UserError: none of the `known` ones gives the rows that the checkpoint was trained on.
    """
    now = {"since": step, "steps": config.train.steps, "tokens": tokens_needed(config)}
    if before is None:
        return [now]
    lengths = next((each for each in known if rows.limited(each[-1]["tokens"]).fingerprint == before.rows), None)
    if lengths is None:
        what = "store" if config.data.source else "text"
        raise UserError(f"the {what} has changed since this run began; put it back, or start a new --workdir", "data")
    if lengths[-1]["steps"] == config.train.steps:
        return lengths
    # A run of an earlier version that is killed before its next checkpoint must be able to tell its length again.
    now_or_here = (tokens_needed(config), tokens_needed(config, step))
    if not before.lengths and all(rows.limited(tokens).fingerprint != before.rows for tokens in now_or_here):
        raise UserError(
            f"is {config.train.steps}, but the run is of an earlier version and is at step {step} of "
            f"{lengths[-1]['steps']}; finish it with that number first, and then write more",
            "train.steps",
        )
    return [*lengths, now | {"tokens": max(now["tokens"], lengths[-1]["tokens"])}]


def _check_starts(program: Program, starts: Mapping[str, dict[str, Any]]) -> None:
    for stack in program.stacks:
        table = stack.architecture.PARAMETERS
        for key, value in starts.get(stack.name, {}).items():
            if value.shape[1:] != table[key].sizes(stack.sae):
                field = f"stacks.{stack.name}.start_from"
                raise UserError("is of another language model; write a run of this one", field)


def _sound_step(workdir: run_directory.Workdir) -> int | None:
    """The newest checkpoint that is whole, for all processes; damaged ones are set aside."""
    latest = workdir.latest_step()
    if latest is not None:
        if processes.first():
            workdir.hold()
            workdir.set_aside(newer_than=workdir.sound_step())
        processes.wait("a sound checkpoint")
        latest = workdir.latest_step()
    processes.agree("--workdir", latest, "their checkpoints are not the same; write a directory that they share")
    return latest


def _about_model(name: str) -> contextlib.AbstractContextManager[None]:
    return about_other(name) if name else errors.about("lm.path", revision="lm.revision")


def build(
    config: Experiment,
    mesh: jax.sharding.Mesh,
    checkpoint: Checkpoint,
    others: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> tuple[Program, Any]:
    """The train program and the tokenizer, from the settings of `config.lm` and `config.lms` alone.

    Raises:
        UserError: as `Program.build`, a corpus that does not exist, models with different tokenizers, or sizes that the
            devices have no room for.
    """
    rows_lib.corpus(config.data)
    tokenizer = checkpoint.tokenizer()
    special_tokens = {*loading.special_tokens(tokenizer)}
    for name, other in others.items():
        with about_other(name):
            theirs = other.tokenizer()
            tokenizer_lib.check_same(tokenizer, theirs, (str(checkpoint.folder), str(other.folder)))
        special_tokens |= {*loading.special_tokens(theirs)}
    program = Program.build(config, mesh, checkpoint, tuple(sorted(special_tokens)), others=others)
    _check_memory(program)
    return program, tokenizer


def _check_memory(program: Program) -> None:
    """Raises `UserError` for sizes that the devices have no room for."""
    config, mesh, state = program.config, program.mesh, program.abstract_state()
    fresh = sum(D * jnp.dtype(config.lm_of(site).dtype).itemsize for site, D in program.widths.items())
    fresh *= config.rows_per_call * config.data.context_length
    needed = {f"stacks.{name}": mesh_lib.device_bytes(stack) for name, stack in state.stacks.items()}
    needed["activations.buffer_size"] = mesh_lib.device_bytes(state.store)
    needed["activations.rows_per_forward"] = fresh // mesh.shape["data"]
    mesh_lib.check_memory(mesh, needed)


def tokens_needed(config: Experiment, steps: int | None = None) -> int:
    """Tokens that a run reads at most once: training, measuring and filling (twice the buffer, for dropped tokens).

    `steps`: by default those of the config.
    """
    return (
        (config.train.steps if steps is None else steps) * config.train.batch_size
        + config.activations.scale_tokens
        + 2 * config.activations.buffer_size
    )


def _text(config: Experiment, train: rows_lib.Extent, test: rows_lib.Extent) -> Text:
    """What the run reads of these splits."""
    known = train.bytes and test.bytes
    trained_on, held_out = (train.bytes, test.bytes) if known else (train.texts, test.texts)
    # As in `tokens_needed`, but the buffer is filled once: few tokens are dropped.
    read = tokens_needed(config) - config.activations.buffer_size
    rows, by_document = train.rows, config.data.pack == "documents"
    return Text(
        documents=train.documents or train.texts + test.texts,
        held_out=held_out / max(1, trained_on + held_out),
        tokens=rows * (config.data.context_length - config.data.prepend_bos) if by_document and rows else train.tokens,
        is_estimate=train.is_estimate,
        tokens_read=read,
        passes=None if rows is None else read / max(1, rows * config.data.context_length),
        too_short=max(0.0, 1 - rows / max(1, train.texts)) if by_document and rows is not None else 0.0,
    )


def _machine(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What must be the same for a run to continue bit for bit."""
    return {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": f"data {mesh.shape['data']} x latent {mesh.shape['latent']}",
        "processes": jax.process_count(),
        "numpy": np.__version__,
        **provenance.versions(),
    }
