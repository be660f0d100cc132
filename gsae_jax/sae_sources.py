"""The SAEs that a command is given, of runs or from elsewhere, with the language model and the text for them."""

import dataclasses
import json
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import config_trees, errors, sae_loading
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import store as store_lib
from gsae_jax.config import NO_MODEL, HeldOut
from gsae_jax.data import rows
from gsae_jax.errors import UserError
from gsae_jax.evaluation import measure, provenance
from gsae_jax.lms import loading, sites
from gsae_jax.lms.checkpoints import Checkpoint, about_other, open_others
from gsae_jax.saes import contract, trained
from gsae_jax.storage import paths, run_directory
from gsae_jax.storage.facts import Facts

logger = logging.getLogger(__name__)

GROUPS = ("lm", "lms", "data", "activations", "evaluation")  # of an experiment, that say what SAEs are looked at with
TEXT = {"corpus", "path", "name"}  # of `data`: which text, without how it is read and divided
# Of a stack: what training depends on beside the options, learning rates, seeds and sparsity.
RECIPE = ("start_from", "b1", "b2", "clip_norm", "coefficient_warmup_fraction", "kl_fraction", "kl_weight")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """SAEs, what is known of their training, and what they are looked at with.

    Attributes:
        saes: by the names that reports have for them.
        settings: the language model, and the held-out text.
        mesh: over which the SAEs are spread.
        targets: the L0 that they were trained for, by name, where there is one.
        recipes: how training differed between stacks of one architecture that may be a frontier together, by name.
        runs: of `provenance.of_run` and `of_imported`, by what reports call them.
        step: the checkpoint's, of SAEs of one run.
        text: what reports call the text; "" for the name that files of SAEs have for it.
    """

    saes: dict[str, trained.SAE]
    settings: HeldOut
    mesh: jax.sharding.Mesh
    targets: dict[str, float]
    recipes: dict[str, str]
    runs: dict[str, dict[str, Any]]
    step: int | None = None
    text: str = ""


def of_run(
    path: epath.PathLike, step: int | None = None, model: str = "", config: Mapping[str, Any] | None = None
) -> Chosen:
    """The SAEs of a run, on its own language model and text.

    Args:
        path: the run's directory.
        step: the checkpoint's step; by default the newest undamaged checkpoint.
        model: the new path of the run's language model, if it has moved.
        config: fields of an experiment. `lm` and `data` give the new paths of the run's language model and text.
            `evaluation` is taken as it is. Missing fields are taken from the run's config.

    Raises:
        UserError: `path` is not a run with a checkpoint, or the language model or the text of `config` is not that of
            training.
    """
    workdir = run_directory.Workdir(path)
    run = workdir.experiment()
    # On whichever machine this is; features along `latent` as in training, where it has as many devices.
    settings = HeldOut(run.lm, run.data, run.evaluation, run.activations.drop_special_tokens, run.lms)
    if config is not None:
        _tell_unread(run, config)
        recorded_groups = config_trees.to_dict(run)
        own = {group: recorded_groups[group] for group in GROUPS}
        elsewhere = config_trees.held_out(config_trees.merged(own, config_trees.plain(config)))
        recorded = workdir.config()["data"]
        # Fields that did not exist when the run began keep the values of then.
        absent = {name: value for name, value in vars(run.data).items() if name not in recorded}
        settings = _moved(settings, dataclasses.replace(elsewhere, data=dataclasses.replace(elsewhere.data, **absent)))
    if model:
        settings = dataclasses.replace(settings, lm=dataclasses.replace(run.lm, path=model, revision=""))
    latent = run.mesh.latent if jax.device_count() % run.mesh.latent == 0 else 1
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=0, latent=latent))
    with errors.about(workdir.field, step="--step"):
        step = workdir.sound_step(("params", "facts"), step)
        saes = sae_loading.load(path, mesh=mesh, step=step)
    assert step is not None  # or there would be nothing to load
    facts = workdir.facts(step)
    with errors.about("--model" if model else "lm.path", revision="lm.revision"):
        _check_inputs(workdir, facts, run, settings, saes)
    runs = {workdir.path.name: _of_run(run, facts, step)}
    return Chosen(saes, settings, mesh, _targets(run, saes), _recipes(run, saes), runs, step)


def of_names(
    names: Sequence[str],
    config: Mapping[str, Any] | None = None,
    model: str = "",
    site: str | tuple[str, str] = "",
) -> Chosen:
    """SAEs of several runs and of other libraries, on one language model and text.

    Args:
        names: directories of runs, RUN:STACK for one stack of a run, or folders that `gsae_jax.load` reads.
        config: fields of an experiment's `lm`, `data` and `evaluation`. By default they are those of the first run.
            Without a run, they are the embedded model and Python's library, in rows of the length on which the SAEs
            were trained.
        model: another language model.
        site: the site that the SAEs read; by default the site that each SAE's file names. A pair (site, target) is for
            transcoders only: the sites that they read and predict. With it, Gemma Scope's files are read as those of
            transcoders. A site that their files name may be "".

    Raises:
        UserError: an SAE cannot be read or does not fit the model, or an SAE names another model and none was given.
    """
    site, target = (site, "") if isinstance(site, str) else site
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=0, latent=1))
    with errors.about("--sae", target="--target"):
        sources = _told_apart([_source(name, mesh, bool(target)) for name in names])
    saes = {name: sae for source in sources for name, sae in source.saes.items()}
    for source in sources:
        if not site and not all(sae.sites[0] for sae in source.saes.values()):
            why = f"is missing, and the files of {source.name} name no site; write one like blocks.0.hook_mlp_out"
            raise UserError(why, "--site")
        if not target and not all(
            sae.targets[0] for sae in source.saes.values() if contract.writes_others(sae.functions)
        ):
            why = f"is missing, and the files of {source.name} name no target; write one like blocks.0.hook_mlp_out"
            raise UserError(why, "--target")
    if target and not any(contract.writes_others(sae.functions) for sae in saes.values()):
        raise UserError(f"is {target!r}, but none of the SAEs is a transcoder; leave it out", "--target")
    settings = _settings(sources, config)
    if model:
        settings = dataclasses.replace(settings, lm=dataclasses.replace(settings.lm, path=model, revision=""))
    given = bool(model) or "lm" in (config or {})
    with errors.about("--model" if model else "lm.path", revision="lm.revision"):
        for source in sources:
            if source.run is not None:
                _check_run(source, settings, given)
        _check_told({name: sae for s in sources if s.run is None for name, sae in s.saes.items()}, settings, given)
        if (
            all(source.run is None for source in sources)
            and {*config_trees.plain(config or {}).get("data", {})} == TEXT
        ):
            _warn_of_split(saes, settings)
        saes = _at_sites(saes, settings, site, target)
    texts = _text_names({settings.data, *(source.run.data for source in sources if source.run is not None)})
    chosen = Chosen(saes, settings, mesh, {}, {}, {}, text=texts[settings.data])
    for source in sources:
        described = source.described()
        if source.run is not None:
            chosen.targets.update(_targets(source.run, source.saes))
            chosen.recipes.update(_recipes(source.run, source.saes))
            described["text"] = texts[source.run.data]
        if described and chosen.runs.setdefault(source.label, described) != described:
            chosen.runs[next(iter(source.saes))] = described
    return chosen


def _targets(run: config_lib.Experiment, saes: Mapping[str, trained.SAE]) -> dict[str, float]:
    """The L0 that SAEs of a run were trained for, by name, where there is one."""
    targets = {}
    for name, sae in saes.items():
        values = run.stacks[sae.stack.rpartition("/")[2]].target_l0  # without a label of `_told_apart`
        if values:
            targets[name] = values[sae.index if len(values) > 1 else 0]
    return targets


def _recipes(run: config_lib.Experiment, saes: Mapping[str, trained.SAE]) -> dict[str, str]:
    """By SAE, the settings of its stack in which stacks of its architecture differ, such as "kl_fraction=0.1".

    Only of architectures without a sparsity coefficient, whose stacks are a frontier together if they differ in nothing
    else than how many features are active.
    """
    stacks = {name: run.stacks[sae.stack.rpartition("/")[2]] for name, sae in saes.items()}
    recipes = {}
    for name, stack in stacks.items():
        if contract.sparsity(saes[name].functions):
            alike = [other for other in stacks.values() if other.architecture == stack.architecture]
            differing = [field for field in RECIPE if len({getattr(other, field) for other in alike}) > 1]
            recipes[name] = " ".join(f"{field}={_short(getattr(stack, field))}" for field in differing)
    return recipes


def _short(value: Any) -> str:
    """Of a setting; of a path, its end."""
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else str(value)


def _moved(settings: HeldOut, elsewhere: HeldOut) -> HeldOut:
    """A run's settings, with the paths of the language model and the text, and `evaluation`, of another config.

    Raises:
        UserError: the other config is of another run.
    """
    lms = {name: _at_location("lm", lm, elsewhere.lms.get(name, lm)) for name, lm in settings.lms.items()}
    moved = {
        group: _at_location(group, getattr(settings, group), getattr(elsewhere, group))
        for group in run_directory.LOCATIONS
    }
    compared = [(group, group, value, getattr(elsewhere, group)) for group, value in moved.items()]
    compared += [(f"lms.{name}", "lm", lm, elsewhere.lms.get(name, lm)) for name, lm in lms.items()]
    for path, group, *each in compared:
        there, here = (
            {name: item for name, item in dataclasses.asdict(one).items() if name not in run_directory.LOCATIONS[group]}
            for one in each
        )
        if differing := config_trees.differences(there, here, f"{path}."):
            why = f"is not the config of this run; change these back (the run's value != yours): {'; '.join(differing)}"
            raise UserError(f"{why}, or measure SAEs on another model or text with --sae RUN --out OUT", "--config")
    return dataclasses.replace(settings, evaluation=elsewhere.evaluation, lms=lms, **moved)


def _tell_unread(run: config_lib.Experiment, config: Mapping[str, Any]) -> None:
    """Warn of fields of a config that say something else than the run's, and that only training reads."""
    tree, given = config_trees.to_dict(run), config_trees.plain(config)
    theirs = {group: tree[group] for group in ("activations", "train")}
    ours = json.loads(json.dumps(config_trees.merged(theirs, {name: given[name] for name in theirs if name in given})))
    if unread := config_trees.differences(theirs, ours):
        logger.warning(f"--config: only training reads these; the run's values hold (the run's != yours): {unread}")


def _at_location(group: str, ours: Any, theirs: Any) -> Any:
    """Our group of the config, with their paths."""
    moved = dataclasses.replace(ours, **{name: getattr(theirs, name) for name in run_directory.LOCATIONS[group]})
    if group == "lm" and moved == dataclasses.replace(ours, revision=""):
        return ours  # the same hub name; the run recorded its commit
    return moved


def _check_inputs(
    workdir: run_directory.Workdir,
    facts: Facts,
    run: config_lib.Experiment,
    settings: HeldOut,
    saes: Mapping[str, trained.SAE],
) -> None:
    """Compare the language model and the held-out text with those of training, by a checkpoint's fingerprints.

    Other text at the recorded path is only a warning: the corpus `stdlib`, for one, changes with the version of Python.

    Args:
        workdir: the run's.
        facts: of the checkpoint.
        run: the run's own config.
        settings: the language model and the text.
        saes: of the checkpoint.

    Raises:
        UserError: they are not the same, or the language model lacks a site of the SAEs.
    """
    if run.lm.path == NO_MODEL:
        if settings.lm.path != NO_MODEL:
            why = "is given, but the run was trained from a store without a language model; measure it on one with"
            raise UserError(f"{why} --sae {workdir.path} --model DIR --out OUT", "--model")
        with errors.about("data.source"):
            store = store_lib.Store.open(store_lib.location(settings.data.source))
        if store.rows("test").fingerprint != facts.held_out:
            raise UserError(
                f"{store.path} is not the store of the run in {workdir.path}; write its path", "data.source"
            )
        return
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
            f"the run in {workdir.path} recorded no fingerprint of its language model; it is used with "
            f"{settings.lm.path}"
        )
    widths = loading.site_widths(checkpoint.module())
    for name, other in open_others(settings.lms).items():
        with about_other(name):
            workdir.check_model(facts, settings.lms[name], other.fingerprint(), name)
        widths |= {sites.at(hook, name): width for hook, width in loading.site_widths(other.module()).items()}
    for sae in saes.values():
        measure.check_sites(sae, widths)
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
        logger.warning("the held-out text has changed since training; the new text is used")


@dataclasses.dataclass(frozen=True)
class _Source:
    """The SAEs that the user named with one name.

    Attributes:
        name: as the user wrote it.
        path: of the run; of SAEs from elsewhere, the folder that they lie in.
        label: what the report calls that path.
        saes: by name.
        run, facts, step: of a run's checkpoint; None for SAEs from elsewhere.
    """

    name: str
    path: str
    label: str
    saes: dict[str, trained.SAE]
    run: config_lib.Experiment | None = None
    facts: Facts | None = None
    step: int | None = None

    def described(self) -> dict[str, Any]:
        """What is known of the training."""
        if self.run is None or self.facts is None or self.step is None:
            return provenance.of_imported(next(iter(self.saes.values())))
        return _of_run(self.run, self.facts, self.step)


def _of_run(run: config_lib.Experiment, facts: Facts, step: int) -> dict[str, Any]:
    """`provenance.of_run`."""
    models = {name: sae_loading.names(lm, run.data)["model_name"] for name, lm in {"": run.lm, **run.lms}.items()}
    return provenance.of_run(run, facts, step, models, sae_loading.names(run.lm, run.data)["dataset_path"])


def _source(name: str, mesh: jax.sharding.Mesh, transcoders: bool) -> _Source:
    """What one of the names of `of_names` stands for; its label is still to be given."""
    path = sae_loading.divided(name)[0]
    saes = sae_loading.load_named(name, mesh, transcoders)
    workdir = run_directory.Workdir(path, field="")
    place = Path(paths.absolute(path))
    if not workdir.holds_run():
        if len(saes) == 1 and next(iter(saes)).startswith(place.name):  # it has the name of its folder
            place = place.parent
        return _Source(name, str(place), "", saes)
    step = workdir.sound_step(("params", "facts"))
    facts = None if step is None else workdir.facts(step)
    return _Source(name, str(place), "", saes, workdir.experiment(), facts, step)


def _told_apart(sources: Sequence[_Source]) -> list[_Source]:
    """The sources with labels. If SAEs or stacks of two sources are called alike, labels precede the names of all SAEs.

    Raises:
        UserError: two SAEs of one path are called alike.
    """
    labels = short_names({source.path for source in sources})
    by_name, by_stack, places = defaultdict(set), defaultdict(set), defaultdict(set)
    for number, source in enumerate(sources):
        for name, sae in source.saes.items():
            by_name[name].add(number)
            # SAEs from elsewhere that do not name their run are a stack if their names say so, wherever they lie.
            by_stack[sae.stack].add(sae.run if source.run is None else source.path)
            places[sae.stack].add(source.path)
    alike = {
        (source.path, sae.stack)
        for source in sources
        for name, sae in source.saes.items()
        if len(by_name[name]) > 1 or len(by_stack[sae.stack]) > 1
    }
    seen: set[str] = set()
    renamed = []
    for source in sources:
        label, saes = labels[source.path], {}
        for name, sae in source.saes.items():
            if alike:
                # A stack that lies in several places and is one all the same would fall apart.
                is_apart = (source.path, sae.stack) in alike or len(places[sae.stack]) == 1
                stack = f"{label}/{sae.stack or name}" if is_apart else sae.stack
                sae = dataclasses.replace(sae, name=f"{label}/{name}", stack=stack)
            if source.run is not None:
                sae = dataclasses.replace(sae, run=label)
            if sae.name in seen:
                raise UserError(f"{source.name} has the second SAE called {name!r}; name each SAE once")
            seen.add(sae.name)
            saes[sae.name] = sae
        renamed.append(dataclasses.replace(source, label=label, saes=saes))
    return renamed


def short_names(places: Collection[str]) -> dict[str, str]:
    """The shortest end of each path that no other path has."""
    labels = {}
    for place in places:
        parts = Path(place).parts
        for length in range(1, len(parts) + 1):
            labels[place] = "/".join(parts[-length:])
            if not any(Path(other).parts[-length:] == parts[-length:] for other in places if other != place):
                break
    return labels


def _text_names(texts: Collection[config_lib.Data]) -> dict[config_lib.Data, str]:
    """What the report calls each text; files of one name get as much of their paths as they need."""
    by_name = defaultdict(set)
    usual = {text: sae_loading.names(config_lib.LM("", "float32", ""), text)["dataset_path"] for text in texts}
    for text, name in usual.items():
        by_name[name].add(paths.absolute(text.path) if text.path else "")
    return {
        text: name
        if len(by_name[name]) == 1 or not text.path
        else short_names(by_name[name])[paths.absolute(text.path)]
        for text, name in usual.items()
    }


def _settings(sources: Sequence[_Source], config: Any) -> HeldOut:
    """The settings of the first run, or those that all SAEs say they were trained with, changed by a config."""
    runs = [source.run for source in sources if source.run is not None]
    if runs:
        recorded = config_trees.to_dict(runs[0])
        base = {group: recorded[group] for group in GROUPS}
        for run in runs[1:]:  # `_check_run` compares models of one name
            base["lms"] = config_trees.to_dict(run)["lms"] | base["lms"]
    else:
        base = _as_trained({name: sae for source in sources for name, sae in source.saes.items()})
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return config_trees.held_out(config_trees.merged(base, config or {}))


def _check_run(source: _Source, settings: HeldOut, given: bool) -> None:
    """Warns of a run that is used with other text than its own, or with another model if one was `given`.

    Raises:
        UserError: the run was trained on another language model, and none was given.
    """
    assert source.run is not None
    try:
        fingerprint = Checkpoint.open(settings.lm.path, settings.lm.revision).fingerprint()
    except UserError as error:
        if not given:
            error.problem += "; if the model lies elsewhere now, write --model DIRECTORY"
        raise
    recorded = source.facts.lm if source.facts else {}
    if not recorded:  # of an earlier version: its name is all that is known
        _check_told(source.saes, settings, given)
    elif recorded != fingerprint:
        differing = " and ".join(part for part in fingerprint if recorded.get(part) != fingerprint[part])
        theirs, ours = (lm.path or "the embedded model" for lm in (source.run.lm, settings.lm))
        why = f"{source.name} was trained on another language model than {ours}: {theirs} differs in {differing}"
        if not given:
            raise UserError(
                f"{why}; leave this SAE out, or write --model with the model to measure all SAEs on", "--sae"
            )
        logger.warning(f"{why}; it is used with {ours}")
    for name, other in open_others({name: settings.lms[name] for name in source.run.lms}).items():
        its_own = source.facts.lms.get(name) if source.facts else None
        if its_own is not None and its_own != other.fingerprint():
            raise UserError(
                f"is {settings.lms[name].path}, but {source.name} was trained with another language model of this "
                "name; leave this SAE out",
                f"lms.{name}.path",
            )
    text = {"drop_special_tokens": source.run.activations.drop_special_tokens} | vars(source.run.data)
    here = {"drop_special_tokens": settings.drop_special_tokens} | vars(settings.data)
    ignored = ("data_dir", "train_split")
    others = [name for name in text if text[name] != here[name] and name not in ignored]
    if others:
        listed = ", ".join(f"{name} ({text[name]} there, {here[name]} here)" for name in others)
        logger.warning(f"{source.name} was trained with other settings of its text than are used now: {listed}")


def _as_trained(saes: Mapping[str, trained.SAE]) -> dict[str, dict[str, Any]]:
    """The config of the embedded model, and of the standard library in rows that all SAEs say they were trained on."""
    tree: dict[str, dict[str, Any]] = {"data": {}, "activations": {}}
    for group, field, name, kind in (
        ("data", "context_length", "context_size", int),
        ("data", "prepend_bos", "prepend_bos", bool),
        ("activations", "drop_special_tokens", "exclude_special_tokens", bool),
    ):
        values = [sae.metadata.get(name) for sae in saes.values()]
        if type(values[0]) is kind and all(value == values[0] for value in values):
            tree[group][field] = values[0]
    return tree


def _at_sites(saes: Mapping[str, trained.SAE], settings: HeldOut, site: str, target: str) -> dict[str, trained.SAE]:
    """SAEs with the language models' names for the sites of each.

    Args:
        saes: by name.
        settings: where the language models lie.
        site: the site that all of them read; "" where each one's file says its own.
        target: the site that transcoders write, in the same way; with it, `site` is theirs alone.

    Raises:
        UserError: the language model has no such site, or the site has another width than the SAE.
    """
    checkpoint = Checkpoint.open(settings.lm.path, settings.lm.revision)
    widths = loading.site_widths(checkpoint.module())
    for other, opened in open_others(settings.lms).items():
        widths |= {sites.at(hook, other): width for hook, width in loading.site_widths(opened.module()).items()}
    for name, sae in saes.items():
        for model in {*sae.models} - {"", *settings.lms}:
            raise UserError(
                f"has no language model {model!r}, of which {name} has a site; write its path as lms.{model}.path in "
                "--config",
                "lms",
            )

    def ours(name: str) -> str:
        return sites.hook_name(name, checkpoint.config.norm_after) or name

    placed = {}
    for name, sae in saes.items():
        transcodes, given = contract.writes_others(sae.functions), {"site": site, "target": target}
        if not transcodes:
            given = {"site": "" if target else site, "target": ""}
        for field, verb, named in (("site", "reads", sae.sites), ("target", "writes", sae.targets)):
            if given[field] and len(named) == 1:
                if ours(named[0]) not in ("", ours(given[field])):
                    used = f"{given[field]!r} is used, as --{field} says"
                    logger.warning(f"{name} says that it {verb} {named[0]!r}; {used}")
                chosen: dict[str, Any] = {field: given[field]}
                sae = dataclasses.replace(sae, **chosen)
        for field, verb, names in (("site", "reads", sae.sites), ("target", "writes", sae.targets)):
            for its_site in names:
                if not given[field] and ours(its_site) not in widths:
                    lacks = f"{its_site!r}, which this language model does not have"
                    why = f"is missing, and {name} says that it {verb} {lacks}"
                    raise UserError(f"{why}; write one of {', '.join(widths)}", f"--{field}")
                sites.check(ours(its_site), widths, f"--{field}")
        reads, writes = tuple(map(ours, sae.sites)), tuple(map(ours, sae.targets)) if sae.target else ""
        placed[name] = dataclasses.replace(sae, site=reads[0] if len(reads) == 1 else reads, target=writes)
        measure.check_sites(placed[name], widths)  # now, as `measure` would only find it when the text is prepared
        after_norm = [its_site for its_site in reads if its_site.endswith(sites.MLP_INPUT)]
        if after_norm and not sae.run and checkpoint.config.normalization == "RMS":
            logger.warning(
                f"{name} reads {after_norm[0]}, which has the weights of RMSNorm here, and lacks them in "
                "TransformerLens. If this transcoder was trained there or is of Gemma Scope, its encoder must be "
                "divided by these weights (docs/exchange.md)"
            )
    return placed


def _check_told(saes: Mapping[str, trained.SAE], settings: HeldOut, given: bool) -> None:
    """Warns of SAEs that are not used with the model and the text that their files name.

    Raises:
        UserError: a file names another model, and none was `given`.
    """
    for field, used in sae_loading.names(settings.lm, settings.data).items():
        named: dict[str, list[str]] = {}
        for name, sae in saes.items():
            other = (sae.metadata.get(field) or "").rstrip("/")
            # Libraries write the owner or the path, or leave it out. A mirror of a model has another owner.
            theirs, ours = (whole.lower().split("/") for whole in (other, used))
            compared = 1 if field == "model_name" else min(len(theirs), len(ours))
            if other and theirs[-compared:] != ours[-compared:]:
                named.setdefault(other, []).append(name)
        for other, names in named.items():
            whose = f"{names[0]} and {len(names) - 1} more say" if len(names) > 1 else f"{names[0]} says"
            if field == "model_name" and not given:
                how = f"write --model {other}" if "/" in other else "write --model with its directory or hub name"
                raise UserError(
                    f"is missing, and {whose} that {other!r} was the language model of training; {how}", "--model"
                )
            what = {"model_name": "language model", "dataset_path": "text"}[field]
            logger.warning(f"{whose} that {other!r} was the {what} of training; {used!r} is used now")


def _warn_of_split(saes: Mapping[str, trained.SAE], settings: HeldOut) -> None:
    """Warns of SAEs that were trained on the text in use, as training may have held out another part of it."""
    text = sae_loading.names(settings.lm, settings.data)["dataset_path"]
    trained_on = [name for name, sae in saes.items() if (sae.metadata.get("dataset_path") or "").rstrip("/") == text]
    if trained_on:
        logger.warning(
            f"{text!r} was the text of training of {', '.join(trained_on)}, and the part that training held out may "
            "differ from the part that is measured; to measure the same part, write --config with the config file of "
            "the run in place of --text"
        )
