"""Comparing kinds of SAEs: the numbers, and the command on a tiny run."""

import importlib
import json
import keyword
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import gsae_jax
from gsae_jax import comparing
from gsae_jax.data import labels
from gsae_jax.data import rows as rows_lib
from gsae_jax.data.corpora import stdlib
from gsae_jax.evaluation import comparison, frontiers, synthetic
from gsae_jax.rating import association, pairs
from tests.refusals import refused

SITE = "blocks.0.hook_mlp_out"
NAN = math.nan


def record(kind, seed, l0, recovered, **others):
    known = {"loss_recovered": recovered, "kl": 1 - recovered, "fvu": NAN, "score": NAN, "probe_1": NAN, "probe_5": NAN}
    about = {"site": SITE, "kind": kind, "replicate": f"0/{seed}", "sparsity": f"{recovered}", "width": 8}
    return about | known | {"l0": l0} | others


@pytest.fixture
def records():
    """Two kinds. The second needs 1.5 times the features of the first, and in the second seed twice as many."""
    levels = (0.75, 0.85, 0.97)
    made = [record("first", seed, np.exp(5 * level), level) for seed in (0, 1) for level in levels]
    for seed, factor in ((0, 1.5), (1, 2.0)):
        made += [record("second", seed, factor * np.exp(5 * level), level) for level in levels]
    return made


def test_means_over_seeds_have_t_intervals():
    values = [1.0, 2.0, 4.0]
    found = frontiers.over_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(found, (np.mean(values), low, high))
    found = frontiers.ratio_over_seeds(np.exp(values))
    np.testing.assert_allclose(found, np.exp((np.mean(values), low, high)))
    assert frontiers.over_seeds([1.0, NAN]).text(".2f") == "–"
    assert frontiers.over_seeds([1.0]).text(".2f") == "1.00"
    assert frontiers.over_seeds([1.0, 1.0]).text(".2f") == "1.00 [1.00, 1.00]"


def test_metrics_at_an_l0_are_interpolated_along_its_logarithm():
    frontier = [{"l0": 10.0, "kl": 3.0}, {"l0": 1000.0, "kl": 1.0}]
    assert frontiers.at_l0(frontier, "kl", 100) == pytest.approx(2)
    assert math.isnan(frontiers.at_l0(frontier, "kl", 9.9))
    assert frontiers.at_l0(frontier, "kl", 9.9, beyond=1.05) == 3
    assert math.isnan(frontiers.at_l0([{"l0": 0.0, "kl": 1.0}], "kl", 1))
    assert math.isnan(frontiers.at_l0([], "kl", 1))


def test_kinds_are_compared_by_seed(records):
    of_site = comparison.kinds(records, SITE)
    (*rows,) = comparison.l0_ratios(of_site, "first")
    assert [row["level"] for row in rows] == list(frontiers.LEVELS)
    expected = frontiers.ratio_over_seeds([1.5, 2])
    for row in rows:
        assert (row["kind"], row["seeds"]) == ("second", 2)
        np.testing.assert_allclose(row["ratio"], expected)
    # A seed that the reference does not have is no pair.
    alone = [each for each in records if (each["kind"], each["replicate"]) != ("first", "0/1")]
    row, *_ = comparison.l0_ratios(comparison.kinds(alone, SITE), "first")
    assert (row["seeds"], row["ratio"].middle) == (1, pytest.approx(1.5))
    assert comparison.ratios_table(rows).rows[0][:3] == ["second", "2", "1.73 (0.28 to 10.77)"]


def test_differences_at_equal_l0(records):
    of_site = comparison.kinds(records, SITE)
    rows = {(row["l0"], row["kind"]): row for row in comparison.at_equal_l0(of_site, "first", (100, 10**6))}
    assert rows.keys() == {(100, "first"), (100, "second")}  # no frontier reaches a million
    values = [(np.log(100) - np.log(factor)) / 5 for factor in (1.5, 2)]
    row = rows[100, "second"]
    np.testing.assert_allclose(row["values"]["loss_recovered"], frontiers.over_seeds(values))
    differences = [value - np.log(100) / 5 for value in values]
    np.testing.assert_allclose(row["differences"]["loss_recovered"], frontiers.over_seeds(differences))
    assert math.isnan(row["values"]["score"].middle)
    table = comparison.equal_l0_table([*rows.values()], comparison.known(of_site), "first")
    assert table.columns == ["L0", "Kind", "Seeds", "Loss recovered", "KL"]
    assert [line[2] for line in table.rows] == ["2", "2"]
    assert [line[3].count("(") for line in table.rows] == [0, 1]


def test_a_score_of_a_part_of_the_seeds_has_a_difference_only(records):
    """The second kind has a seed without a score, which the first kind does not have."""
    for each in records:
        each["score"] = NAN if (each["kind"], each["replicate"]) == ("second", "0/1") else 0.5
    records = [each for each in records if (each["kind"], each["replicate"]) != ("first", "0/1")]
    of_site = comparison.kinds(records, SITE)
    table = comparison.equal_l0_table(comparison.at_equal_l0(of_site, "first", (100,)), ["score"], "first")
    assert [line[2:] for line in table.rows] == [["1", "0.500"], ["2 (1 shared)", "– (+0.000)"]]


def test_what_was_measured_is_by_sparsity(records):
    rows = comparison.measured(comparison.kinds(records, SITE))
    assert [(row["kind"], row["sparsity"], row["seeds"]) for row in rows] == [
        (kind, level, 2) for kind in ("first", "second") for level in ("0.75", "0.85", "0.97")
    ]
    assert rows[0]["l0"].middle == pytest.approx(np.exp(5 * 0.75))


def test_saes_that_have_diverged_are_left_out(records):
    records.append(record("third", 0, NAN, NAN))
    assert [*comparison.kinds(records, SITE)] == ["first", "second"]


@pytest.fixture(scope="module")
def labelled(text_dir, tmp_path_factory):
    """Labelled text of the tiny runs: the words of each line that are keywords."""
    file = tmp_path_factory.mktemp("labels") / "labelled.jsonl"
    lines = []
    for text in (text_dir / "a.txt").read_text().splitlines()[:200]:
        spans = [[m.start(), m.end(), "word"] for m in re.finditer(r"\b(def|return|import)\b", text)]
        lines.append(json.dumps({"text": text, "labels": {"keyword": spans, "line": [[0, len(text), "all"]]}}))
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
def compared(collected_run, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    wanted = comparing.Wanted([str(collected_run)], features=20, probe_tokens=4096, labels=labelled, l0=(29, 60))
    return comparing.compare(wanted, str(out))


def test_a_run_is_compared(compared, collected_run):
    tree = json.loads((compared / "compare.json").read_text())
    report = json.loads((collected_run / "report" / "report.json").read_text())["saes"]
    assert tree["references"] == {SITE: "gated"}
    assert [sae["name"] for sae in tree["saes"]] == [sae["name"] for sae in report]
    for ours, theirs in zip(tree["saes"], report, strict=True):
        for name in ("l0", "loss_recovered", "kl", "fvu"):
            assert ours[name] == theirs[name]
        assert 0 < ours["score"] <= 1
        assert 0 < ours["rated"] <= 20
        assert 0.4 < ours["probe_1"] <= 1
        assert ours["probe_1"] == pytest.approx(ours["probe_1_keyword"])  # `line` has one value, so it is no task
    (task,) = tree["probes"]["tasks"]
    assert (task["kind"], task["value"]) == ("keyword", "word")
    ((reads, (ceiling,)),) = tree["probes"]["dense"].items()
    assert reads == SITE
    assert ceiling > 0.6
    assert {sae["kind"] for sae in tree["saes"]} == {"gated", "baseline"}


def test_the_docs_tables_are_of_its_file(compared, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    recipe = importlib.import_module("recipe")
    rows = json.loads((compared / "compare.json").read_text())["sites"][SITE]["at_equal_l0"]
    made = [*recipe.compared_rows({"at_equal_l0": [row | {"seeds": 3} for row in rows]})]
    assert [line[:2] for line in made] == [(f"{row['l0']:g}", recipe.name_of(row["kind"])) for row in rows]
    middle = rows[0]["values"]["kl"]["middle"]
    assert made[0][2 + recipe.COMPARED.index("kl")].startswith(f"{middle:.4f} [")


def test_the_page_names_what_it_shows(compared):
    page = (compared / "compare.md").read_text()
    assert f"`{SITE}`" in page
    for figure in re.findall(r"\((\w+\.png)\)", page):
        assert (compared / figure).stat().st_size > 1000
    for table in ("At equal L0", "Probes by label", "As measured"):
        assert table in page
    assert "A known dictionary" not in page


def test_scores_are_of_a_random_sample_that_stays_the_same(compared, collected_run):
    tree = json.loads((compared / "compare.json").read_text())
    features = gsae_jax.features.load(collected_run)["gated_0"]
    drawn = pairs.Source(str(collected_run), features).draw(comparing.SEED)[:20]
    scores = [rating.score for n in drawn if (rating := association.Association().rate(features, int(n)))]
    sae = next(each for each in tree["saes"] if each["name"] == "gated_0")
    assert (sae["score"], sae["rated"]) == (pytest.approx(np.mean(scores)), len(scores))


@pytest.fixture(scope="module")
def copied(collected_run, tmp_path_factory):
    """A copy of the run without collected features."""
    folder = tmp_path_factory.mktemp("copied") / "copy"
    shutil.copytree(collected_run, folder, ignore=shutil.ignore_patterns("features", ".lock"))
    return folder


def test_what_was_not_collected_has_no_score(copied, tmp_path):
    folder = comparing.compare(comparing.Wanted([str(copied)], probe_tokens=0), str(tmp_path / "out"))
    tree = json.loads((folder / "compare.json").read_text())
    (note,) = tree["notes"]
    assert note.startswith("All SAEs")
    assert note.endswith(f"python -m gsae_jax.collect --workdir {copied}")  # nothing to overwrite
    assert note.partition(":")[0] in (folder / "compare.md").read_text()
    assert {sae["score"] for sae in tree["saes"]} == {None}
    assert "probes" not in tree


def test_the_command_that_a_note_has_keeps_what_was_collected(collected_run, tmp_path):
    run = shutil.copytree(collected_run, tmp_path / "run")
    kept, *others = sorted((run / "features").glob("*.sqlite"))
    others[0].unlink()
    (note,) = compare_notes(run, tmp_path / "out")
    name, tokens = others[0].stem, features_of(run)[kept.stem]
    command = f"python -m gsae_jax.collect --workdir {run} --sae {name} --tokens {tokens}"
    assert (note.partition(" ")[0], note.partition("Collect: ")[2]) == (name, command)


def features_of(run):
    """How many tokens the features of each SAE were collected on."""
    every = gsae_jax.features.load(run)
    about = {name: features.about["collection"] for name, features in every.items()}
    return {name: each["rows"] * each["context_length"] for name, each in about.items()}


def compare_notes(run, out):
    wanted = comparing.Wanted([str(run)], features=5, probe_tokens=0)
    return json.loads((Path(comparing.compare(wanted, str(out))) / "compare.json").read_text())["notes"]


def kinds_of(*runs):
    made = comparing._runs([str(run) for run in runs])
    return {record["kind"] for record in comparing._records(made)}


def changed(run, folder, **changes):
    """A copy of a run whose config has other values, by group and field."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        (config[group] if group else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_runs_that_differ_in_seeds_are_replicates(copied, tmp_path):
    assert kinds_of(copied) == {"gated", "baseline"}
    again = changed(copied, tmp_path / "again", seed=7)
    assert kinds_of(copied, again) == {"gated", "baseline"}
    other = changed(copied, tmp_path / "other", seed=7, train__warmup_steps=5)
    assert kinds_of(copied, other) == {f"{run}/{kind}" for run in ("copy", "other") for kind in ("gated", "baseline")}
    stacks = json.loads((copied / "config.json").read_text())["stacks"]
    more = {  # as a grid has them
        name: stack
        | {field: 2 * stack[field] for field in ("l1_coefficients", "learning_rates") if len(stack[field]) > 1}
        | {"seeds": [5] * len(stack["seeds"]) + [6] * len(stack["seeds"])}
        for name, stack in stacks.items()
    }
    assert kinds_of(copied, changed(again, tmp_path / "more", stacks=more)) == {"gated", "baseline"}
    same = changed(copied, tmp_path / "same")  # of the same seed: it is the same run
    assert kinds_of(copied, same) == {f"{run}/{kind}" for run in ("copy", "same") for kind in ("gated", "baseline")}


def test_kinds_without_a_coefficient_are_replicates_at_every_site(copied, tmp_path):
    """Their name does not depend on the site. The number of features at the start may depend on k."""
    sites = ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    stacks, saes = {}, []
    report = json.loads((copied / "report" / "report.json").read_text())
    for number, site in enumerate(sites):
        for k in (16, 128):
            name = f"best_{number}_{k}"
            stacks[name] = gsae_jax.stack_config(
                "gated", site, 512, k=k, learning_rates=(1e-3,), recipe="2026"
            ).to_dict()
            about = {"stack": name, "index": 0, "site": site, "seed": 0, "frontier": "gated_batch_topk initial_k"}
            saes.append(report["saes"][0] | about | {"variant": f"gated_batch_topk k={k}", "learning_rate": 1e-3})
    runs = [changed(copied, tmp_path / f"run_{seed}", stacks=stacks, seed=seed) for seed in (0, 1)]
    for run in runs:
        (run / "report" / "report.json").write_text(json.dumps(report | {"saes": saes}))
    assert kinds_of(*runs) == {"gated_batch_topk initial_k"}


def with_stacks(run, folder, stacks):
    """A copy of a run with an SAE of each stack in its config and its report.

    `stacks`: by name, the config and the frontier.
    """
    report = json.loads((run / "report" / "report.json").read_text())
    saes = [
        report["saes"][0]
        | {"stack": name, "index": 0, "seed": 0, "site": stack.site, "frontier": frontier, "variant": "topk"}
        | {"learning_rate": 1e-3, "width": stack.width}
        for name, (stack, frontier) in stacks.items()
    ]
    changed(run, folder, stacks={name: stack.to_dict() for name, (stack, _) in stacks.items()})
    (folder / "report" / "report.json").write_text(json.dumps(report | {"saes": saes}))
    return folder


def topk(width, site=SITE, **options):
    return gsae_jax.stack_config("topk", site, width, k=8, learning_rates=(1e-3,), **options), "topk"


def test_different_recipes_are_never_one_kind(copied, tmp_path):
    """Here they differ in width, and their stacks in a number only."""
    run = with_stacks(copied, tmp_path / "run", {"topk_64": topk(64), "topk_128": topk(128)})
    assert kinds_of(run) == {"topk_64", "topk_128"}


def test_a_kind_has_one_name_at_all_sites(copied, tmp_path):
    other = "blocks.1.hook_mlp_out"
    first = with_stacks(copied, tmp_path / "first", {"a": topk(64), "b": topk(64, other)})
    second = with_stacks(copied, tmp_path / "second", {"a": topk(64, b1=0.5)})
    runs = comparing._runs([str(first), str(second)])
    found = {(record["kind"], record["site"]) for record in comparing._records(runs)}
    assert found == {("first/topk", SITE), ("first/topk", other), ("second/topk", SITE)}


def test_the_reference_has_the_most_seeds(copied):
    """If a stack has several rates, each is a kind, and the first may have one seed only."""
    made = comparing._records(comparing._runs([str(copied)]))
    few, many = [[r | {"kind": kind} for r in made if r["kind"] == "gated"] for kind in ("few", "many")]
    few = [r for r in few if r["seed"] == 0]
    assert comparing._references([*few, *many], "") == {SITE: "many"}
    assert comparing._references([*few, *many], "few") == {SITE: "few"}


def compare(runs, out, **others):
    return comparing.compare(comparing.Wanted([str(run) for run in runs], **others), str(out))


def test_what_cannot_be_compared(copied, labelled, tmp_path):
    out = tmp_path / "out"
    with refused("--runs", "nowhere"):
        compare([tmp_path / "nowhere"], out)
    with refused("--runs", "twice"):
        compare([copied, copied], out)
    with refused("--reference", "'gate'", "gated"):
        compare([copied], out, reference="gate", probe_tokens=0)
    with refused("--l0", "above 0"):
        compare([copied], out, l0=[math.nan], probe_tokens=0)
    with refused("--labels", "--probe_tokens=0"):
        compare([copied], out, labels=str(labelled), probe_tokens=0)
    with refused("--labels", "--probe_tokens=0"):
        compare([copied], out)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "a", "labels": {}}\n')
    with refused("--labels", "no value"):
        compare([copied], out, labels=str(empty))
    with refused("--labels", "nowhere.jsonl"):
        compare([copied], out, labels=str(tmp_path / "nowhere.jsonl"))
    with refused("--l0"):
        compare([copied], out, l0=(0,))
    with refused("--features"):
        compare([copied], out, features=-1)
    unfinished = changed(copied, tmp_path / "unfinished", train__steps=32)
    with refused("--runs", "not finished", "unfinished"):
        compare([copied, unfinished], out)
    shutil.rmtree(shutil.copytree(copied, tmp_path / "unreported") / "report")
    with refused("--runs", "not finished"):
        compare([tmp_path / "unreported"], out)
    elsewhere = shutil.copytree(copied, tmp_path / "elsewhere")
    report = json.loads((elsewhere / "report" / "report.json").read_text())
    for sae in report["saes"]:
        sae["site"] = "blocks.1.hook_mlp_out"
    (elsewhere / "report" / "report.json").write_text(json.dumps(report))
    with refused("--runs", "blocks.1.hook_mlp_out", SITE):
        compare([copied, elsewhere], out)
    other = shutil.copytree(copied, tmp_path / "other")
    for manifest in other.glob("checkpoints/*/manifest.json"):  # which have hashes of what is changed now
        manifest.unlink()
    facts = other / "checkpoints" / "16" / "facts" / "metadata"
    fingerprint = next(iter(json.loads(facts.read_text())["lm"].values()))
    facts.write_text(facts.read_text().replace(fingerprint, fingerprint[::-1]))
    with refused("--runs", "another language model"):
        comparing._runs([str(copied), str(other)])
    for run, content in ((other, "1"), (elsewhere, "2")):  # the same model, but others of one name
        tree = json.loads((copied / "checkpoints" / "16" / "facts" / "metadata").read_text())
        (run / "checkpoints" / "16" / "facts" / "metadata").write_text(
            json.dumps(tree | {"lms": {"chat": {"a": content}}})
        )
        for manifest in run.glob("checkpoints/*/manifest.json"):
            manifest.unlink()
    shutil.copy(copied / "report" / "report.json", elsewhere / "report" / "report.json")
    with refused("--runs", "of the name chat"):
        comparing._runs([str(copied), str(elsewhere), str(other)])
    assert not out.exists()
    out.mkdir()
    with refused("--out"):
        compare([copied], out, probe_tokens=0)


def test_the_command(copied, tmp_path):
    command = [sys.executable, "-m", "gsae_jax.compare", f"--runs={copied}", "--probe_tokens=0", "--features=0"]
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'out'}/compare.md" in done.stdout
    wrong = subprocess.run([*command, "--out=x", "--l0=many"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr.partition(":")[2].split(":")[0].strip()) == (2, "--l0")


def test_kinds_are_trained_on_a_known_dictionary(copied, tmp_path):
    """Without the KL divergence, as there is no language model."""
    stacks = json.loads((copied / "config.json").read_text())["stacks"]
    stacks = {name: stack | {"kl_fraction": 0.5} for name, stack in stacks.items()}
    run = changed(copied, tmp_path / "run", stacks=stacks)
    wanted = comparing.Wanted([str(run)], features=0, probe_tokens=0, synthetic_steps=8)
    folder = comparing.compare(wanted, str(tmp_path / "out"))
    found = json.loads((folder / "compare.json").read_text())["synthetic"]
    settings = synthetic.Settings()
    assert [(sae["kind"], sae["seed"], sae["width"], sae["learning_rate"]) for sae in found] == [
        ("baseline", 0, 2 * settings.atoms, 3e-3),
        *(("gated", seed, 2 * settings.atoms, 1e-2) for seed in (0, 1)),
    ]
    table = next(t for t in (folder / "compare.md").read_text().split("## ") if t.startswith("A known dictionary"))
    assert f"| gated | 2 | {np.mean([sae['l0'] for sae in found[1:]]):.2f}" in table
    with refused("--synthetic_steps"):
        compare([copied], tmp_path / "other", probe_tokens=0, synthetic_steps=7)


def test_pythons_library_is_labelled(tokenizer):
    """Its held-out files, as tokens of the language model; labels are those of the decoded tokens."""
    settings = gsae_jax.experiment("quickstart")
    source, _ = rows_lib.open_texts(settings.data, "test")
    documents = (stdlib.labelled(each) for each in source if each["path"].decode().startswith("test/"))
    document = next(each for each in documents if each and len(each.spans.get("keyword", ())) > 50)
    made = labels.rows([document], tokenizer, 128, tokenizer.bos_token_id, 1)
    assert made.values["module"] == ["test"]
    assert (made.labels["module"] == 0).sum() == made.mask_RxT.sum()
    words = [tokenizer.decode([token]).strip() for token in made.tokens_RxT[made.labels["keyword"] >= 0]]
    assert len(words) > 10
    assert sum(word in keyword.kwlist for word in words) > 0.9 * len(words)  # tokens may be parts of words, and more
