"""Trained SAEs from a run directory, or from a folder of another library's format; and a run's held-out text."""

import dataclasses
import glob
import logging
import numbers
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import config_trees, errors, plugins
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import masking
from gsae_jax.config import NO_MODEL, Experiment
from gsae_jax.errors import UserError, known_names
from gsae_jax.evaluation import measure
from gsae_jax.formats import imports
from gsae_jax.lms import checkpoints
from gsae_jax.lms import sites as sites_lib
from gsae_jax.saes import contract, parameters, trained
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import paths, run_directory
from gsae_jax.storage.facts import Facts

logger = logging.getLogger(__name__)

EMBEDDED = "gelu-1l-stdlib"  # the embedded model's name


def load(
    path: epath.PathLike,
    *,
    mesh: jax.sharding.Mesh | None = None,
    step: int | None = None,
    site: str = "",
    target: str = "",
) -> dict[str, trained.SAE]:
    """The SAEs of a run, by name (`{stack}_{index}`), or the SAEs of a folder in another library's format.

    Args:
        path: the run's directory, local or gs://bucket/folder; RUN:STACK for one stack of a run; or the folder of an
            SAE in a format of `gsae_jax/formats/`; or a folder of such folders. An SAE of another library has the name
            of its folder, followed by `_0` if this does not end in `_` and a number.
        mesh: features are sharded over its devices. By default they are on this process's first device.
        step: the checkpoint's step; by default the newest undamaged checkpoint.
        site: the site that the SAE of another library reads, if its file names none or another one.
        target: the site that a transcoder of another library predicts, in the same way. A Gemma Scope file does not say
            whether it is of an SAE or of a transcoder: with `target`, it is read as a transcoder.

    Raises:
        UserError: `path` is not a run, the checkpoint is missing or damaged, the run has no such stack, or gs:// cannot
            be read. For another format, the error lists everything that is wrong.
    """
    errors.check_kind(path, str | os.PathLike, "", "a path")
    folder, stack = divided(os.fspath(path))
    workdir = run_directory.Workdir(folder, field="")
    if imported := _imported(folder, mesh, bool(target)):
        if step is not None:
            raise UserError(f"is {step}, and {folder} is not a run; leave it out", "step")
        return _of_stack({name: _placed(sae, site, target) for name, sae in imported.items()}, folder, stack)
    if workdir.path.local and not workdir.holds_run():
        raise UserError(_nothing(folder))
    for field, value in (("site", site), ("target", target)):
        if value:
            raise UserError(f"is {value!r}, and {folder} is a run, which knows its own; leave it out", field)
    return _of_stack(_of_run(workdir, mesh, step), folder, stack)


def _of_run(workdir: run_directory.Workdir, mesh: jax.sharding.Mesh | None, step: int | None) -> dict[str, trained.SAE]:
    """The SAEs of a run's checkpoint, by name; `mesh` and `step` as in `load`."""
    config = workdir.experiment()
    step = workdir.sound_step(("params", "facts"), step)
    if step is None:
        raise UserError(f"{workdir.path} has no checkpoint yet; run training for longer")
    facts = workdir.facts(step)
    try:
        facts.check(config)
    except ValueError as error:
        why = f"the facts of checkpoint {step} in {workdir.path} do not fit its config ({error})"
        raise UserError(f"{why}; restore the original file") from error
    built = {name: _built(name, config, facts.widths, workdir) for name in config.stacks}
    like = {
        name: jax.eval_shape(
            jax.vmap(lambda key, m=module, c=sae: m.init(key, c)),
            jax.random.split(jax.random.key(0), len(config.stacks[name])),
        )
        for name, (module, sae) in built.items()
    }
    placed = checkpoints_lib.single_device(like) if mesh is None else _spread(mesh, like, built)
    params, run = workdir.params(step, placed), workdir.path.name
    return {
        sae.name: sae
        for name in config.stacks
        for sae in _members(name, config, *built[name], params[name], facts, run)
    }


def _imported(
    path: epath.PathLike, mesh: jax.sharding.Mesh | None = None, transcoders: bool = False
) -> dict[str, trained.SAE]:
    """The SAEs of a path in another library's format; none if it is something else."""
    local = run_directory.Workdir(path, field="").path.local
    saes = imports.read(local, transcoders) if local else {}
    return {name: dataclasses.replace(sae, params=measure.spread(mesh, sae)) for name, sae in saes.items()}


def _placed(sae: trained.SAE, site: str, target: str) -> trained.SAE:
    """The SAE with the sites that the user names; warns if its file names others.

    Raises:
        UserError: a target of an SAE that writes what it reads, or one site of an SAE that reads several.
    """
    if target and not contract.writes_others(sae.functions):
        raise UserError(
            f"is {target!r}, but the file of {sae.name} says that it is no transcoder; leave it out", "target"
        )
    for field, value in (("site", site), ("target", target)):
        named = getattr(sae, field)
        if value and isinstance(named, tuple):
            raise UserError(f"is {value!r}, but {sae.name} has {len(named)} sites, which its file names", field)
        if value and named not in ("", value):
            logger.warning(f"the file of {sae.name} names the {field} {named!r}; it is taken for {value!r}")
    named = {name: value for name, value in (("site", site), ("target", target)) if value}
    return dataclasses.replace(sae, **named)


def held_out(run: epath.PathLike, tokens: int | None = None) -> np.ndarray:
    """Held-out tokens of a run [rows, context length], int32: text that no SAE was trained on.

    The run's report is measured on these rows. If they are not on this machine yet, they are prepared first.

    Args:
        run: the run's directory.
        tokens: the number of tokens, by default the run's `evaluation.tokens`. The result has whole batches of
            `evaluation.rows_per_forward` rows, and at least one.

    Raises:
        UserError: `run` is not a run, its model or text is missing, or there is less text than one batch.
    """
    from gsae_jax.data import rows  # TensorFlow Datasets takes seconds to import, and nothing else here needs it

    if tokens is not None:
        errors.check_kind(tokens, numbers.Integral, "tokens", "a whole number")
    if tokens is not None and tokens < 1:
        raise UserError(f"is {tokens}; write a whole number from 1 on", "tokens")
    workdir = run_directory.Workdir(run, field="run")
    if not workdir.holds_run():
        raise UserError(f"{workdir.path} holds no run; write the directory of one", "run")
    config = workdir.experiment()
    with errors.about("lm.path", revision="lm.revision"):
        checkpoint = checkpoints.Checkpoint.open(config.lm.path, config.lm.revision)
        tokenizer = checkpoint.tokenizer()
    step = workdir.sound_step(("facts",))
    facts = None if step is None else workdir.facts(step)
    if facts is not None and facts.held_out and facts.held_out_tokens:
        known = rows.open_rows(config.data, "test", tokenizer, facts.held_out_tokens, checkpoint.config.d_vocab)
        if known.fingerprint != facts.held_out:
            logger.warning(f"the held-out text of {run} has changed since training; these rows are of the new text")
    count = config.evaluation.tokens if tokens is None else tokens
    return masking.tokens_of(np.concatenate(list(rows.held_out(config, tokenizer, count, checkpoint.config.d_vocab))))


def _built(name: str, config: Experiment, widths: dict[str, int], workdir: run_directory.Workdir) -> tuple[Any, Any]:
    """The architecture of a run's stack, and its Config."""
    stack = config.stacks[name]
    try:
        with errors.within(f"stacks.{name}"):
            return contract.build(stack, widths, config.train.compute_dtype)
    except UserError as error:
        if plugins.is_own(stack.architecture):
            error.problem += f"; put it back, or write its new name into {workdir.path / 'config.json'}"
        raise


def load_named(name: str, mesh: jax.sharding.Mesh | None = None, transcoders: bool = False) -> dict[str, trained.SAE]:
    """What `load` reads, with files that do not say so read as those of transcoders if these are wanted.

    Args:
        name: the path, or RUN:STACK.
        mesh: as in `load`.
        transcoders: as in `imports.read`.

    Raises:
        UserError: as `load`.
    """
    path, stack = divided(name)
    saes = _imported(path, mesh, transcoders)
    return _of_stack(saes, path, stack) if saes else load(name, mesh=mesh)


def _of_stack(saes: dict[str, trained.SAE], path: str, stack: str) -> dict[str, trained.SAE]:
    """Those SAEs of `path` that are of a stack; all of them if it is ""."""
    if not stack:
        return saes
    stacks = {sae.stack for sae in saes.values()}
    if stack not in stacks:
        raise UserError(f"{path} has no stack {stack!r}; {known_names(stack, sorted(stacks))}")
    return {name: sae for name, sae in saes.items() if sae.stack == stack}


def divided(name: str) -> tuple[str, str]:
    """(RUN, STACK) of RUN:STACK; (path, "") of anything else."""
    path, _, stack = name.rpartition(":")
    if path and re.fullmatch(r"[\w-]+", stack) and not os.path.lexists(os.path.expanduser(name)):
        return path, stack
    return name, ""


def _nothing(path: str) -> str:
    """Why no SAEs can be loaded from a path."""
    if not os.path.lexists(os.path.expanduser(path)):
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(/.*)?", path) and not os.path.lexists(path.partition("/")[0]):
            fetched = f"huggingface_hub.snapshot_download({'/'.join(path.split('/')[:2])!r})"
            return (
                f"{path} is not here; write the path of a folder. Names on the Hugging Face hub are not taken: fetch "
                f"the SAE with {fetched}, and write the folder that this returns"
            )
        return f"{path} is not here; write the directory of a run, or a folder of SAEs"
    formats = ", ".join(plugins.known("formats", having="recognises"))
    has_config = os.path.exists(os.path.join(os.path.expanduser(path), "config.json"))
    other = "its config.json is not one of a run" if has_config else "it has no config.json"
    return f"{path} holds no run ({other}), and no SAE in a format that is known ({formats})"


def names(lm: config_lib.LM, data: config_lib.Data) -> dict[str, str]:
    """What an SAE's metadata calls its language model and its text: names in full, paths by `without_folders`."""
    if data.source:
        text = without_folders(data.source.partition(":")[2])
        if lm.path == NO_MODEL:
            return {"model_name": lm.path, "dataset_path": text}
    folder = os.path.abspath(os.path.expanduser(lm.path)) if lm.path else str(checkpoints.EMBEDDED)
    name = EMBEDDED if folder == str(checkpoints.EMBEDDED) else os.path.basename(folder)
    return {
        "model_name": lm.path if lm.revision else name,  # a run of a hub's model has its commit
        "dataset_path": _text_name(data),
    }


def _text_name(data: config_lib.Data) -> str:
    """The name or path that the corpus reads; of a user's own corpus, whichever is given."""
    path = without_folders(data.path)
    by_corpus = {"stdlib": "", "text": path, "tfds": data.name}
    return by_corpus.get(data.corpus, data.name or path) or data.corpus


def without_folders(path: str) -> str:
    """A path as other people may see it: its last part; of a glob, the pattern and the folder that it is in."""
    parts = Path(path).parts
    first = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    shown = parts[max(0, first - 1) :]
    return "/".join(part for part in shown if part != Path(path).anchor)


def starts(config: Experiment) -> dict[str, dict[str, np.ndarray]]:
    """The parameters [N, ...] that stacks start from, in the language model's units, by stack.

    Raises:
        UserError: `start_from` names no stack, or one of other SAEs.
    """
    params = {}
    for name, stack in config.stacks.items():
        if stack.start_from:
            with errors.within(f"stacks.{name}"):
                params[name] = _start(name, stack)
    return params


def _start(name: str, stack: config_lib.Stack) -> dict[str, np.ndarray]:
    """The parameters [N, ...] that one stack starts from."""
    with errors.caused_by("start_from"):
        members = _members_of(stack.start_from, bool(stack.target))
    with errors.about("architecture"):
        convert = contract.converter(members[0].architecture, stack.architecture)
    reads, writes = members[0].sites, members[0].targets
    for verb, named, taken in (("reads", reads, stack.sites), ("writes", members[0].target and writes, stack.targets)):
        if named and named[0] and not named[0].startswith("blocks."):
            logger.warning(
                f"{stack.start_from} says that it {verb} {named[0]!r}; taken for {_shown(taken)}, as {name} does"
            )
    # Other names are another library's, or none.
    reads = reads if reads[0].startswith("blocks.") else stack.sites
    writes = writes if writes[0].startswith("blocks.") else stack.targets
    our_reads, our_writes = stack.sites, stack.targets
    if len({*map(config_lib.model_of, (*reads, *writes))}) == len(stack.models) == 1:
        # An SAE of a model may start one of its finetune.
        reads, writes, our_reads, our_writes = (
            tuple(sites_lib.parts(site)[0] for site in each) for each in (reads, writes, our_reads, our_writes)
        )
    theirs = {"site": reads, "target": writes, "width": members[0].config.width, "as many SAEs": len(members)}
    ours = {"site": our_reads, "target": our_writes, "width": stack.width, "as many SAEs": len(stack)}
    differing = [
        f"{what} ({_shown(theirs[what])} there, {_shown(ours[what])} here)"
        for what in ours
        if ours[what] != theirs[what]
    ]
    if convert is None:
        differing.append(f"architecture ({members[0].architecture} there, {stack.architecture} here)")
    if convert is None or differing:
        raise UserError(f"{stack.start_from} differs in {', '.join(differing)}; write the same here", "start_from")
    sae = members[0].config
    widths = dict(zip(stack.sites, sae.d_in if isinstance(sae.d_in, tuple) else (sae.d_in,), strict=True))
    if stack.target:
        widths |= dict(zip(stack.targets, sae.d_out if isinstance(sae.d_out, tuple) else (sae.d_out,), strict=True))
    module, like = contract.build(stack, widths, "float32")
    with errors.about("start_from"):
        each = [parameters.with_unit_rows(module, convert(member.params, member.config)) for member in members]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    names = set(jax.eval_shape(lambda: module.init(jax.random.key(0), like)))
    if names != set(params):
        raise UserError(f"need parameters {sorted(names)}, but {stack.start_from} has {sorted(params)}", "options")
    for start in each:
        normal = contract.normal_form(module, start, like)
        if changed := [key for key in sorted(names) if np.any(normal[key] != start[key])]:
            kind = contract.variant(stack.architecture, like)
            why = f"are those of {kind!r}, which changes {', '.join(changed)} of {stack.start_from}"
            raise UserError(f"{why}; write the options that these were trained with", "options")
    return params


def _members_of(start: str, transcoders: bool = False) -> list[trained.SAE]:
    """The SAEs that `start_from` names: a stack of a run, or whatever SAEs lie in a path (as `imports.read` does)."""
    if divided(start)[1]:
        return list(load_named(start).values())
    local = paths.of_user(start).local
    elsewhere = imports.read(local, transcoders) if local else {}
    if not elsewhere:
        raise UserError(f"is {start!r}; write RUN_DIRECTORY:STACK, or the folder of an exported SAE")
    if len(kinds := {(sae.architecture, sae.config, sae.sites, sae.targets) for sae in elsewhere.values()}) > 1:
        raise UserError(f"{start} has {len(kinds)} kinds of SAEs; write the folder of one")
    return list(elsewhere.values())


def pinned(config: Experiment, path: epath.PathLike) -> Experiment:
    """The experiment as the run in `path` has it, or will have it.

    The revision of a hub model becomes its commit: that of the run, or the newest. A stack that lacks settings
    of the optimiser gets its architecture's. If the SAEs that a stack started from have moved since, the experiment
    gets the path that the run recorded.

    Raises:
        UserError: no such model or architecture, or a path that cannot be a run directory.
    """
    workdir = run_directory.Workdir(path)
    config = _with_known_starts(_as_begun(contract.with_recipes(config), workdir), workdir)
    recorded = None if workdir.latest_step() is None else workdir.experiment()
    with errors.about("lm.path", revision="lm.revision"):
        lm = _pinned(config.lm, None if recorded is None else recorded.lm)
    lms = {}
    for name, other in config.lms.items():
        with checkpoints.about_other(name):
            lms[name] = _pinned(other, None if recorded is None else recorded.lms.get(name))
    return dataclasses.replace(config, lm=lm, lms=lms)


def _pinned(lm: config_lib.LM, recorded: config_lib.LM | None) -> config_lib.LM:
    """The language model; of the hub's, with its commit."""
    if not lm.path or lm.path == NO_MODEL or Path(lm.path).is_dir():
        return lm
    revision = lm.revision
    if recorded is not None and not revision:
        revision = recorded.revision if recorded.path == lm.path else ""
    return dataclasses.replace(lm, revision=checkpoints.find(lm.path, revision)[1])


def _as_begun(config: Experiment, workdir: run_directory.Workdir) -> Experiment:
    """The experiment with the earlier behaviour for settings that did not exist when its run began; warns of them."""
    if workdir.latest_step() is None:
        return config
    recorded, earlier, now = workdir.config(), config_trees.to_dict(workdir.experiment()), config_trees.to_dict(config)
    left_out = []

    def keep_earlier(path: str, now: dict[str, Any], earlier: dict[str, Any], recorded: dict[str, Any]) -> None:
        for name in sorted(now.keys() & earlier.keys()):
            if f"{path}{name}" in run_directory.FREE:
                continue
            if name not in recorded:
                if now[name] != earlier[name]:
                    left_out.append(f"{path}{name}={earlier[name]}")
                now[name] = earlier[name]
            elif isinstance(now[name], dict):
                keep_earlier(f"{path}{name}.", now[name], earlier[name], recorded[name])

    keep_earlier("", now, earlier, recorded)
    if left_out:
        logger.warning(
            f"{workdir.path} is older than some settings; it keeps their earlier behaviour: {', '.join(left_out)}"
        )
    return config_trees.from_dict(Experiment, now)


def _with_known_starts(config: Experiment, workdir: run_directory.Workdir) -> Experiment:
    if workdir.latest_step() is None:
        return config
    recorded, stacks = workdir.experiment().stacks, dict(config.stacks)
    for name, stack in config.stacks.items():
        before = recorded[name].start_from if name in recorded else ""
        if not before or not stack.start_from or before == stack.start_from:
            continue
        step = workdir.sound_step(("facts",))
        known = {} if step is None else workdir.facts(step).starts
        moved = starts(dataclasses.replace(config, stacks={name: stack}))
        if known.get(name) == parameters.fingerprint(moved[name]):
            stacks[name] = dataclasses.replace(stack, start_from=before)
    return dataclasses.replace(config, stacks=stacks)


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _spread(mesh: jax.sharding.Mesh, like: dict[str, Any], built: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    def placed(name: str, key: str, leaf: Any) -> jax.ShapeDtypeStruct:
        axis = built[name][0].PARAMETERS[key].axis
        spread = mesh_lib.spread(mesh, leaf.shape, None if axis is None else 1 + axis)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread)

    return {name: {key: placed(name, key, leaf) for key, leaf in params.items()} for name, params in like.items()}


def _members(
    name: str,
    config: Experiment,
    architecture: contract.Architecture,
    sae: Any,
    params: dict[str, jax.Array],
    facts: Facts,
    run: str,
) -> list[trained.SAE]:
    stack = config.stacks[name]
    inputs, targets = (
        [parameters.Units(facts.scales[site], np.asarray(facts.means.get(site, 0.0), np.float32)) for site in sites]
        for sites in (stack.sites, stack.targets)
    )
    limits = tuple(facts.norm_limits[site] for site in stack.targets)
    scales = tuple(units.scale for units in targets)
    l1_coefficients = [l1 for l1, _, _ in stack.numbers()]
    if stack.target_l0:  # elsewhere, the facts have the same numbers, rounded to float32
        l1_coefficients = facts.l1_coefficients.get(name, l1_coefficients)
    # Of several models, the one whose predictions an SAE changes, which is the last that it writes.
    metadata = names(config.lm_of(stack.targets[-1]), config.data) | {
        "context_size": config.data.context_length,
        "prepend_bos": config.data.prepend_bos,
        "exclude_special_tokens": config.activations.drop_special_tokens,
    }

    if facts.means and parameters.input_bias(architecture) is None:
        # `fold` gives the mean to the encoder's bias. In bfloat16, inputs with a large mean keep few digits.
        sae = dataclasses.replace(sae, dtype="float32")

    def normal(index: int) -> dict[str, jax.Array]:
        # What a user finds in an SAE is what it computes with.
        return contract.normal_form(architecture, {key: value[index] for key, value in params.items()}, sae)

    return [
        trained.SAE(
            name=f"{name}_{index}",
            architecture=stack.architecture,
            config=sae,
            site=stack.site,
            params=parameters.fold(architecture, normal(index), inputs, targets),
            target=stack.target,
            l1_coefficient=l1_coefficients[index],
            learning_rate=learning_rate,
            seed=seed,
            scale=scales if len(scales) > 1 else scales[0],
            norm_limit=limits if len(limits) > 1 else limits[0],
            input_norm_limit=min(facts.norm_limits[site] for site in stack.sites) if stack.target else np.inf,
            metadata=metadata,
            run=run,
            stack=name,
            index=index,
        )
        for index, (_, learning_rate, seed) in enumerate(stack.numbers())
    ]
