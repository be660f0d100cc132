"""Comparing kinds of SAEs of finished runs: frontiers, scores of an automatic rater, and sparse probes."""

import contextlib
import dataclasses
import json
import logging
import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from gsae_jax import collecting, config_trees, errors, processes, rendering, sae_loading, sae_sources, synthesis
from gsae_jax import config as config_lib
from gsae_jax import features as features_lib
from gsae_jax.activations import masking
from gsae_jax.data import labels, rows
from gsae_jax.errors import UserError, known_names
from gsae_jax.evaluation import comparison, frontiers, plots, probing, provenance, report, synthetic
from gsae_jax.lms import loading, sites
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.rating import association, pairs
from gsae_jax.saes import contract, trained
from gsae_jax.storage import paths, reading, run_directory, writing
from gsae_jax.storage.facts import Facts

logger = logging.getLogger(__name__)

SEED = 0  # of the draws of features, documents and tokens
ROWS = 64  # of a forward pass
SHOWN = ("run", "name", "kind", "site", "seed", "replicate", "sparsity", "variant", "width", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to compare.

    Attributes:
        runs: directories of finished runs.
        reference: the kind that the others are compared with; by default, the gated one with most seeds.
        l0: values of L0 at which metrics are compared.
        features: of each SAE, that the automatic rater scores; 0 for none.
        probe_tokens: of labelled text, for probes; 0 for none.
        labels: a file of labelled text; by default, the runs' own held-out text, if it is Python's library.
        synthetic_steps: for which each kind is trained on a known dictionary, a multiple of 8; 0 for no such study.
    """

    runs: Sequence[str]
    reference: str = ""
    l0: Sequence[float] = (20, 50, 100)
    features: int = 200
    probe_tokens: int = 2**16
    labels: str = ""
    synthetic_steps: int = 0


class Run(NamedTuple):
    """A finished run.

    Attributes:
        path: as the user wrote it.
        label: what pages call it.
        config: its settings.
        facts: of its last checkpoint.
        step: of its last checkpoint.
        report: its report.
    """

    path: str
    label: str
    config: config_lib.Experiment
    facts: Facts
    step: int
    report: Mapping[str, Any]


def compare(wanted: Wanted, out: str) -> Path:
    """Compare the SAEs of runs, and write `compare.json`, `compare.md` and figures to a new folder.

    Args:
        wanted: what to compare.
        out: the folder.

    Returns:
        The folder.

    Raises:
        UserError: a run is not finished, the runs have different language models or no common site, there is no kind
            of the reference's name, the text has no labels, or `out` exists.
    """
    with errors.about("--out"):
        writing.check_new(paths.require_local(out))
    for value, field in (
        (wanted.features, "--features"),
        (wanted.probe_tokens, "--probe_tokens"),
        (wanted.synthetic_steps, "--synthetic_steps"),
    ):
        if value < 0:
            raise UserError(f"is {value}; write 0 to leave this part out, or more", field)
    if wanted.labels and not wanted.probe_tokens:
        raise UserError("is given, but --probe_tokens=0 leaves probes out; leave out one of them", "--labels")
    if not wanted.l0 or not all(0 < l0 < math.inf for l0 in wanted.l0):
        raise UserError("has no values above 0; write numbers of active features such as 20,50,100", "--l0")
    runs = _runs(wanted.runs)
    records = _records(runs)
    references = _references(records, wanted.reference)
    text = _labelled(runs[0], wanted) if wanted.probe_tokens else None
    recovery = _recovery(runs, records, wanted.synthetic_steps) if wanted.synthetic_steps else []
    notes = _differences(runs)
    if left_out := sorted({record["site"] for record in records} - {*references}):
        why = f"Sites without SAEs of the kind {wanted.reference}" if wanted.reference else "Sites whose SAEs diverged"
        notes.append(f"{why} are left out: {', '.join(left_out)}.")
    if wanted.features:
        notes += _score(runs, records, wanted.features)
    probes = None if text is None else _probe(runs, records, text)
    for note in notes:
        logger.warning(note)
    with errors.about("--out"), writing.new_folder(out) as scratch:
        _write(scratch, wanted, records, references, _Extras(probes, recovery, notes))
    return Path(paths.require_local(out))


def _differences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each way in which the training or the reports of runs are not alike."""
    notes = report.unequal_training({run.label: next(iter(run.report.get("runs", {}).values()), {}) for run in runs})
    measured = {json.dumps([run.report.get("settings", {}).get(name) for name in ("tokens", "text")]) for run in runs}
    if len(measured) > 1:
        notes.append("The reports of the runs were made on different text.")
    return notes


def _runs(names: Sequence[str]) -> list[Run]:
    """The runs, which are finished and have one language model and a common site."""
    with errors.about("--runs"):
        absolute = [paths.absolute(name) for name in names]
        if not names or len({*absolute}) < len(names):
            raise UserError("is missing, or names a run twice; write different directories of runs")
        called = sae_sources.short_names(absolute)
        runs = [_run(name, called[path]) for name, path in zip(names, absolute, strict=True)]
        of_name: dict[str, tuple[Mapping[str, str], str]] = {}
        for run in runs:
            if run.config.lm.path == config_lib.NO_MODEL:
                raise UserError(f"has {run.path}, which was trained without a language model; leave it out")
            for name, lm in {"": run.facts.lm, **run.facts.lms}.items():
                known, other = of_name.setdefault(name, (lm, run.path))
                if lm != known:
                    why = f"{run.path} was trained on another language model{f' of the name {name}' * bool(name)}"
                    raise UserError(f"{why} than {other}; compare runs of one language model")
        common = set.intersection(*({record["site"] for record in run.report["saes"]} for run in runs))
        if not common:
            each = "; ".join(
                f"{run.path} has {', '.join(sorted({record['site'] for record in run.report['saes']}))}" for run in runs
            )
            raise UserError(f"have no site in common ({each}); compare runs that share a site")
    return runs


def _run(name: str, label: str) -> Run:
    workdir = run_directory.Workdir(name, field="")
    if not workdir.holds_run():
        raise UserError(f"{name} holds no run; write the directory of one")
    config, step = workdir.experiment(), workdir.sound_step(("params", "facts"))
    if step is None or not step == config.train.steps == run_directory.reported_step(workdir):
        how = f"`python -m gsae_jax.train` with its config and --workdir {name} finishes it"
        raise UserError(f"{name} is not finished; {how}")
    return Run(name, label, config, workdir.facts(step), step, reading.load_json(workdir.report / "report.json"))


def _records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A record for each SAE of the runs, and site that it writes, with its kind and without scores so far.

    A kind is a stack; stacks that differ in the option that says how many features are active are one, with the name
    of their variant, or of the stacks without their numbers if several recipes have this variant. If runs have kinds of
    one name, they are one kind if they differ in nothing but seeds. Otherwise the name of each begins with its run's,
    at all sites.
    """
    records = [_record(run, record) for run in runs for record in run.report["saes"] if not record["ito"]]
    for shorter in (lambda stack: re.sub(r"_\d+$", "", stack), lambda stack: stack):
        recipes = defaultdict(set)
        for r in records:
            recipes[r["run"], r["site"], r["kind"]].add(r["recipe"])
        for r in records:
            if len(recipes[r["run"], r["site"], r["kind"]]) > 1:
                r["kind"] = shorter(r["stack"])
    rates = defaultdict(set)
    for r in records:
        rates[r["run"], r["site"], r["kind"]].add(f"{r['learning_rate']:g}")
    by_kind: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        if len(rates[r["run"], r["site"], r["kind"]]) > 1:
            r["kind"] = f"{r['kind']}, rate {r['learning_rate']:g}"
        by_kind[r["kind"]][r["run"]].append(r)
    for kind, by_run in by_kind.items():
        for site in dict.fromkeys(r["site"] for members in by_run.values() for r in members):
            here = {run: [r for r in members if r["site"] == site] for run, members in by_run.items()}
            seeds = [seed for members in here.values() for seed in {member["replicate"] for member in members}]
            recipes_here = {r["recipe"] for members in here.values() for r in members}
            if sum(map(bool, here.values())) > 1 and (len(recipes_here) > 1 or len({*seeds}) < len(seeds)):
                for run, members in by_run.items():
                    for r in members:
                        r["kind"] = f"{run}/{kind}"
                break
    return records


def _record(run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ("l0", "loss_recovered", "kl", "fvu", "learning_rate", "l1_coefficient")
    known = {name: math.nan if record.get(name) is None else record[name] for name in numbers}
    _, stack, index = frontiers.identity(dict(record))
    settings = run.config.stacks[stack]
    l1_coefficient = settings.numbers()[int(index)][0]
    target = settings.target_l0[int(index) if len(settings.target_l0) > 1 else 0] if settings.target_l0 else None
    said = f"target {target:g}" if target else "" if math.isnan(l1_coefficient) else f"{l1_coefficient:g}"
    return {
        **record,
        **known,
        "run": run.label,
        "stack": stack,
        "sae": f"{stack}_{index}",
        "kind": record.get("frontier") or stack,
        "recipe": _recipe(run, stack),
        "replicate": f"{run.config.seed}/{record['seed']}",
        "sparsity": ", ".join(filter(None, (record["variant"], said))),
        "rated": 0,
        **{name: math.nan for name in comparison.METRICS if name not in known},
    }


def _recipe(run: Run, name: str) -> str:
    """All settings of a stack's training but its seeds, and how many features are active where that is an option.

    Of more active features at the start of training it has only whether there are any, as the number may depend on the
    final one.
    """
    tree, settings = config_trees.to_dict(run.config), run.config.stacks[name]
    columns = ("seeds", "l1_coefficients", "learning_rates", "target_l0")  # with values for each SAE
    stack = {field: value for field, value in tree["stacks"][name].items() if field not in columns}
    targets = settings.target_l0 if len(settings.target_l0) == len(settings) else settings.target_l0 * len(settings)
    numbers = [(str(l1), rate) for l1, rate, _ in settings.numbers()]  # NaN is not equal to itself
    stack["numbers"] = sorted({*zip(numbers, targets or [0.0] * len(settings), strict=True)})
    sparsity = contract.sparsity(contract.module_of(settings.architecture))
    first = f"initial_{sparsity}"
    stack["options"] = {
        option: bool(value) if option == first else value
        for option, value in stack["options"].items()
        if option != sparsity
    }
    return json.dumps([stack, tree["train"], tree["activations"], run.facts.rows], sort_keys=True)


def _references(records: Sequence[Mapping[str, Any]], wanted: str) -> dict[str, str]:
    """By site, the kind that the others are compared with. Sites without one are left out.

    Raises:
        UserError: no site has the kind that is asked for.
    """
    found: dict[str, str] = {}
    for site in dict.fromkeys(record["site"] for record in records):
        kinds = comparison.kinds(records, site)
        gated = [
            kind
            for kind, seeds in kinds.items()
            if any(contract.is_gated(r["variant"]) for members in seeds.values() for r in members)
        ]
        for kind in [wanted] if wanted else sorted(gated or kinds, key=lambda kind: -len(kinds[kind])):
            if kind in kinds:
                found.setdefault(site, kind)
    if not found and wanted:
        known = dict.fromkeys(record["kind"] for record in records)
        raise UserError(f"is {wanted!r}; {known_names(wanted, known)}", "--reference")
    if not found:
        raise UserError("have no SAE whose L0 is a number: training diverged", "--runs")
    return found


def _labelled(run: Run, wanted: Wanted) -> labels.Rows:
    """Rows of labelled text, for the language model of the runs."""
    data = run.config.data
    with errors.about("lm.path", revision="lm.revision"):
        tokenizer = Checkpoint.open(run.config.lm.path, run.config.lm.revision).tokenizer()
    of_example = getattr(rows.corpus(data), "labelled", None)
    if wanted.labels:
        documents: Iterable[labels.Document] = labels.read(wanted.labels)
    elif of_example is None:
        why = f"is missing, and the text of {run.path} ({data.corpus}) has no labels of its own"
        raise UserError(f"{why}; write a file of labelled text, or --probe_tokens=0 to leave probes out", "--labels")
    else:
        source, _ = rows.open_texts(data, "test")
        documents = (document for example in source if (document := of_example(example)) is not None)
    bos = tokenizer.bos_token_id if data.prepend_bos else None
    with errors.about("--labels" if wanted.labels else "lm.path"):
        found = labels.rows(documents, tokenizer, data.context_length, bos, wanted.probe_tokens)
    special = loading.special_tokens(tokenizer) if run.config.activations.drop_special_tokens else ()
    found = found._replace(mask_RxT=found.mask_RxT & masking.allowed(found.tokens_RxT, special))
    if not probing.tasks(found, SEED).each:
        why = f"gives no value that {probing.LEAST} tokens of the training and of the test documents have"
        raise UserError(f"{why}; write more text or more documents, or a larger --probe_tokens", "--labels")
    return found


def _score(runs: Sequence[Run], records: Sequence[dict[str, Any]], count: int) -> list[str]:
    """Adds the mean scores of the rater by rules to the records; returns a sentence for each run that lacks some."""
    notes, texts = [], set()
    rater = association.Association()
    mine = [record for record in records if math.isfinite(record["l0"])]
    names = {run.label: list(dict.fromkeys(r["sae"] for r in mine if r["run"] == run.label)) for run in runs}
    with _bar(sum(map(len, names.values())), "scores") as bar:
        for run in runs:
            every = _collected(run)
            saes = sae_loading.load(run.path, step=run.step) if every else {}
            lacking: list[str] = []
            collected: dict[str, Any] = {}  # what is there says of its text
            for name in names[run.label]:
                bar.update()
                features = every.get(name)
                about = features.about["collection"] if features else {}
                if features is None or about["parameters"] != collecting.about_sae(saes[name])["parameters"]:
                    lacking.append(name)
                    continue
                collected = about
                texts.add(json.dumps([about.get(fact) for fact in pairs.TEXT]))
                known = features.ratings().get(rater.name, {})
                drawn = pairs.Source(run.path, features).draw(SEED)[:count].tolist()
                ratings = [known.get(number) or rater.rate(features, number) for number in drawn]
                scores = [rating.score for rating in ratings if rating is not None]
                for record in mine:
                    if scores and (record["run"], record["sae"]) == (run.label, name):
                        record |= {"score": float(np.mean(scores)), "rated": len(scores)}
            for features in every.values():
                features.close()
            if lacking:
                how = [f"python -m gsae_jax.collect --workdir {run.path}"]
                if collected:  # the others are kept, and these are of the same text
                    how += [f"--sae {name}" for name in lacking]
                    how.append(f"--tokens {collected['rows'] * collected['context_length']}")
                how += ["--overwrite"] * bool({*lacking} & {*every})
                which = ", ".join(lacking) if collected else "All SAEs"
                why = f"{which} of {run.label} have no score: their features were not collected"
                notes.append(f"{why}. Collect: {' '.join(how)}")
    if len(texts) > 1:
        notes.append("Features were collected on different text, so that scores of different runs do not compare.")
    return notes


def _collected(run: Run) -> dict[str, features_lib.Features]:
    """The collected features of a run, if there are any."""
    if paths.local_of_user(run.path) is None:
        return {}
    folder = collecting.folder_of(run.path, "", "--runs")
    if not folder.is_dir() or not any(folder.glob("*.sqlite")):
        return {}
    with errors.about("--runs", path="--runs"):
        return features_lib.load(folder)


class _Probes(NamedTuple):
    """What was probed.

    Attributes:
        documents: how many there were.
        tasks: the tasks.
        groups: the numbers of the tasks of each kind of labels.
        dense: by what SAEs read, the scores [tasks] of dense probes.
        scores: by run and SAE, those of sparse probes.
    """

    documents: int
    tasks: list[probing.Task]
    groups: dict[str, list[int]]
    dense: dict[str, np.ndarray]
    scores: dict[str, probing.Scores]


def _probe(runs: Sequence[Run], records: Sequence[dict[str, Any]], text: labels.Rows) -> _Probes:
    """Adds the scores of probes to the records: means over values of labels, and of these over kinds of labels."""
    tasks = probing.tasks(text, SEED)
    lm_config = runs[0].config.lm
    with errors.about("lm.path", path="lm.path", revision="lm.revision"):
        lm = loading.load_lm(lm_config.path, revision=lm_config.revision, dtype=lm_config.dtype)
    loading.check_context(lm.module, text.tokens_RxT.shape[1])
    groups: dict[str, list[int]] = defaultdict(list)
    for number, task in enumerate(tasks.each):
        groups[task.kind].append(number)
    probes = _Probes(len({*text.document_R.tolist()}), tasks.each, dict(groups), {}, {})
    inputs: dict[str, contract.Activations] = {}
    with _bar(len({(r["run"], r["sae"]) for r in records}), "probes") as bar:
        for run in runs:
            used = sorted({name for stack in run.config.stacks.values() for name in stack.models} - {""})
            lms = {"": lm, **loading.load_others({name: run.config.lms[name] for name in used}, lm)}
            for sae in sae_loading.load(run.path, step=run.step).values():
                bar.update()
                mine = [r for r in records if (r["run"], r["sae"]) == (run.label, sae.name)]
                if not all(math.isfinite(record["l0"]) for record in mine):
                    continue  # it has diverged
                # The same name of a model may mean others in other runs.
                reads = " ".join([*sae.sites, *([run.label] if any(sae.models) else [])])
                if reads not in inputs:
                    inputs[reads] = _inputs(lms, text, tasks.places, sae)
                    probes.dense[reads] = probing.dense(inputs[reads], tasks.each)
                found = probes.scores[f"{run.label}/{sae.name}"] = probing.probe(sae, inputs[reads], tasks.each)
                numbers: dict[str, Any] = {"reads": reads}
                for k, scores in zip(probing.KS, found.scores.T, strict=True):
                    means = {kind: float(scores[places].mean()) for kind, places in groups.items()}
                    numbers |= {f"probe_{k}_{kind}": mean for kind, mean in means.items()}
                    numbers[f"probe_{k}"] = float(np.mean([*means.values()]))
                for record in mine:
                    record |= numbers
    return probes


def _inputs(
    lms: Mapping[str, loading.LM], text: labels.Rows, places: np.ndarray, sae: trained.SAE
) -> contract.Activations:
    """[P, D]: what an SAE reads at some tokens; a tuple of such arrays if it reads several sites."""
    R, T = text.tokens_RxT.shape
    parts: dict[str, list[np.ndarray]] = {site: [] for site in sae.sites}
    for start in range(0, R, ROWS):
        tokens = text.tokens_RxT[start : start + ROWS]
        here = places[(places >= start * T) & (places < (start + len(tokens)) * T)] - start * T
        for site in sae.sites:
            hook, model = sites.parts(site)
            x_RxTxD = lms[model].activations(tokens, [hook])[hook]
            parts[site].append(np.asarray(x_RxTxD.reshape(-1, x_RxTxD.shape[-1])[here], np.float32))
    whole = [np.concatenate(each) for each in parts.values()]
    return tuple(whole) if isinstance(sae.config.d_in, tuple) else whole[0]


def _recovery(runs: Sequence[Run], records: Sequence[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """What SAEs of each kind recover of a known dictionary: the records of `synthesis.study`, with their kinds.

    All kinds have two features for each atom, as many active features as there are active atoms, and their own options,
    learning rates and seeds. They are trained without the KL divergence of predictions. Kinds of several sites are left
    out.

    Raises:
        UserError: no kind is left, or a number of steps that cannot be trained.
    """
    settings, kind_of = synthetic.Settings(), {}
    stacks: dict[str, dict[str, Any]] = {}
    of_label = {run.label: run.config for run in runs}
    for kind in dict.fromkeys(record["kind"] for record in records):
        members = [record for record in records if record["kind"] == kind]
        config = of_label[members[0]["run"]].stacks[members[0]["stack"]]
        architecture = contract.module_of(config.architecture)
        if contract.reads_several(architecture) or contract.writes_others(architecture):
            continue
        name = f"kind_{len(stacks)}"
        kind_of[name] = kind
        sparsity = contract.sparsity(architecture)
        numbers = sorted(set(config.l1_coefficients))
        options = dict(config.options)
        if sparsity:
            options[sparsity] = round(settings.active)
            if options.get(first := f"initial_{sparsity}"):
                options[first] = min(max(options[first], options[sparsity]), 2 * settings.atoms)
        stacks[name] = config_trees.to_dict(config) | {
            "width": settings.atoms * (1 if contract.is_signed(architecture) else 2),
            "learning_rates": [] if math.isnan(rate := members[0]["learning_rate"]) else [rate],
            "seeds": sorted({record["seed"] for record in members}),
            "l1_coefficients": [] if sparsity else [numbers[len(numbers) // 2]],  # where the search for a target begins
            "target_l0": [] if sparsity else [settings.active],
            "options": options,
            "start_from": "",
            "kl_fraction": 0.0,
        }
    if not stacks:
        raise UserError("is given, but no kind of the runs is of SAEs of one site; leave it out", "--synthetic_steps")
    where = errors.about("--synthetic_steps", **{"train.steps": "--synthetic_steps"})
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch, where:
        found = synthesis.study(stacks, settings, Path(scratch) / "synthetic", steps, SEED)
    return [record | {"kind": kind_of[record["stack"]]} for record in found]


class _Extras(NamedTuple):
    """What a comparison has beside the records of SAEs.

    Attributes:
        probes: what was probed.
        recovery: the records of `_recovery`.
        notes: what readers should know.
    """

    probes: _Probes | None
    recovery: list[dict[str, Any]]
    notes: list[str]


@contextlib.contextmanager
def _bar(total: int, description: str) -> Iterator[tqdm.tqdm]:
    hidden = None if processes.first() else True  # None: where there is no terminal
    with tqdm.tqdm(total=total, desc=description, unit="SAE", disable=hidden) as bar:
        yield bar


def _write(
    folder: Path,
    wanted: Wanted,
    records: Sequence[dict[str, Any]],
    references: Mapping[str, str],
    extras: _Extras,
) -> None:
    """The files of a comparison."""
    probes, recovery, notes = extras
    settings = dataclasses.asdict(wanted) | {"runs": [*dict.fromkeys(record["run"] for record in records)]}
    settings["labels"] = sae_loading.without_folders(wanted.labels)  # as others may see it
    tree: dict[str, Any] = {"made_with": provenance.versions(), "settings": settings, "notes": notes}
    tree |= {"references": references, "sites": {}, "saes": [_shown(record) for record in records]}
    pages = []
    for site in references:
        of_site, reference = comparison.kinds(records, site), references[site]
        names = comparison.known(of_site)
        found = {
            "measured": comparison.measured(of_site),
            "l0_ratios": comparison.l0_ratios(of_site, reference),
            "at_equal_l0": comparison.at_equal_l0(of_site, reference, wanted.l0),
        }
        tree["sites"][site] = found
        dense = _dense_at(records, site, probes)
        # That of most kinds.
        l0 = Counter(row["l0"] for row in found["at_equal_l0"]).most_common(1)
        pages.append(
            {
                "name": site,
                "reference": reference,
                "ratios": comparison.ratios_table(found["l0_ratios"]),
                "equal_l0": comparison.equal_l0_table(found["at_equal_l0"], names, reference),
                "measured": comparison.measured_table(found["measured"], names),
                "labels": comparison.labels_table(of_site, l0[0][0], dense) if dense and l0 else None,
                "l0": l0[0][0] if l0 else None,
            }
        )
    if probes is not None:
        tree["probes"] = {
            "documents": probes.documents,
            "tasks": [
                {"kind": t.kind, "value": t.value, "train": len(t.train.places), "test": len(t.test.places)}
                for t in probes.tasks
            ],
            "dense": probes.dense,
            "saes": {name: found._asdict() for name, found in probes.scores.items()},
        }
    if recovery:
        tree["synthetic"] = recovery
    text = json.dumps(report.finite(tree), indent=1, allow_nan=False)
    (folder / "compare.json").write_text(text + "\n", "utf-8")
    drawn = [
        record
        # `stacks` puts the beginning of a stack's name before that of its frontier, which has it already.
        | {"run": "", "stack": record["kind"].rpartition("/")[2], "frontier": record["kind"]}
        | {"seed": record["replicate"]}
        for record in records
        if record["site"] in references
    ]
    shown = [name for name in comparison.METRICS if name != "l0" and any(math.isfinite(r[name]) for r in records)]
    for name in shown:
        lines = {}
        if name.startswith("probe"):
            ceilings = {site: _dense_at(records, site, probes) for site in references}
            lines = {site: float(np.mean([*each.values()])) for site, each in ceilings.items() if each}
        figure = plots.metric(drawn, name, comparison.METRICS[name].title, lines)
        figure.savefig(folder / f"{name}.png", dpi=120)
    values: dict[str, Any] = {"sites": pages, "notes": notes, "figures": shown, "runs": settings["runs"]}
    values |= {"ks": probing.KS, "features": wanted.features, "most": probing.MOST, "probes": probes}
    values |= {"recovery": comparison.recovery_table(recovery), "atoms": synthetic.Settings()}
    (folder / "compare.md").write_text(rendering.render("compare.md", **values), "utf-8")


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `compare.json` has of an SAE."""
    names = [*SHOWN, *comparison.METRICS, "alive", "rated", *sorted(name for name in record if "probe_" in name)]
    return {name: record[name] for name in dict.fromkeys(names)}


def _dense_at(records: Sequence[Mapping[str, Any]], site: str, probes: _Probes | None) -> dict[str, float]:
    """By the kind of labels, the mean score of dense probes of what SAEs at a site read."""
    reads = [record["reads"] for record in records if record["site"] == site and "reads" in record]
    if probes is None or not reads:
        return {}
    return {kind: float(probes.dense[reads[0]][places].mean()) for kind, places in probes.groups.items()}
