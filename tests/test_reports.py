"""Reports: what is in them, what they compare, and where they are written."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gsae_jax
from gsae_jax import measuring, sae_sources
from gsae_jax.evaluation import frontiers, measure, metrics, plots, provenance, report, tables
from gsae_jax.saes import gated, jumprelu, relu, trained
from gsae_jax.storage import paths
from gsae_jax.training import loop
from tests.measuring import SITE, UNUSED, as_sae, batches, identity, on_mesh, reported, zero
from tests.refusals import refused
from tests.test_moved_runs import retrained


def test_l0_at_equal_loss_recovered():
    """Each variant at its best learning rate against the baseline's, over two seeds."""
    records, sums = [], {}

    def add(variant, rate, seed, factor, reached=(0.7, 0.85, 0.97)):
        for index, recovered in enumerate(reached):
            name = f"{variant}_{rate}{seed}{index}"
            rows = np.full(50, 1.0)
            ce = {"ce_clean": 0 * rows, "ce_zero": rows, "ce_mean": rows, "ce_sae": (1 - recovered) * rows}
            l0 = factor * np.exp(5 * recovered) * rows
            sums[name] = dict.fromkeys(UNUSED, rows) | ce | {"tokens": rows, "l0": l0, "fired": np.ones(3)}
            combined = {"loss_recovered": recovered, "l0": l0[0]}
            shared = {
                "site": SITE,
                "variant": variant,
                "width": 8,
                "learning_rate": rate,
                "seed": seed,
                "ito": 0,
                "name": name,
            }
            records.append(shared | combined)

    for seed, factor in ((0, 1.0), (1, 2.0)):
        add("relu", 1e-3, seed, 3 * factor)
        add("relu", 3e-3, seed, 2 * factor)
        add("gated", 1e-3, seed, factor)
    found = frontiers.ratios(records, sums)
    assert [ratio["level"] for ratio in found] == [0.8, 0.85, 0.9, 0.95]
    for ratio in found:
        assert (ratio["learning_rate"], ratio["baseline_learning_rate"], ratio["seeds"]) == (1e-3, 3e-3, [2, 2])
        assert ratio["l0"] == pytest.approx(2**0.5 * np.exp(5 * ratio["level"]))
        assert ratio["ratio"] == pytest.approx(ratio["low"]) == pytest.approx(ratio["high"]) == pytest.approx(0.5)

    # A learning rate that would be better still ends before some levels: what is best there is not known.
    add("gated", 3e-3, 0, 0.5, (0.83, 0.92))
    found = frontiers.ratios(records, sums)
    known = [ratio for ratio in found if not any(ratio["unknown"])]
    assert [ratio["level"] for ratio in known] == [0.85, 0.9]
    assert {ratio["learning_rate"] for ratio in known} == {3e-3}
    assert {ratio["level"]: ratio["unknown"] for ratio in found if any(ratio["unknown"])} == {
        level: [frontiers.UNCERTAIN, ""] for level in (0.8, 0.95)
    }
    assert all(math.isnan(ratio["ratio"]) == any(ratio["unknown"]) for ratio in found)
    # One that fell apart says nothing of the others.
    add("relu", 1e-2, 0, 0.1, (0.1, 0.2))
    assert str(frontiers.ratios(records, sums)) == str(found)  # with NaN
    assert np.isnan(frontiers.log_l0_at(0.99, np.array([0.7, 0.9]), np.array([1.0, 2.0])))


def test_a_ratio_has_the_variation_of_rows_and_of_seeds():
    """The squares of both half intervals of the log ratio are added."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(-0.5, 0.1, 1000)
    low, high = np.percentile(drawn, [2.5, 97.5])
    of_seeds = np.array([-0.6, -0.5, -0.4])
    half = 4.302653 * of_seeds.std(ddof=1) / 3**0.5  # t of two degrees of freedom
    expected = np.exp([-0.5 - np.hypot(-0.5 - low, half), -0.5 + np.hypot(high + 0.5, half)])
    np.testing.assert_allclose(frontiers.interval_of_ratio(-0.5, drawn, of_seeds), expected, rtol=1e-6)
    np.testing.assert_allclose(frontiers.interval_of_ratio(-0.5, drawn, of_seeds[:1]), np.exp([low, high]), rtol=1e-6)
    assert np.isnan(frontiers.interval_of_ratio(-0.5, [*drawn, math.nan], of_seeds)).all()


@pytest.mark.variants
def test_a_runs_intervals_are_over_its_documents(config_dict, tmp_path, monkeypatch):
    config_dict.data.separator = "\n"  # each line is a document
    config_dict.train.steps = config_dict.checkpoint.every = 8
    measured, rows = [], report.rows
    monkeypatch.setattr(
        report, "rows", lambda models, saes, sums, *rest: measured.append(sums) or rows(models, saes, sums, *rest)
    )
    gsae_jax.fit(config_dict, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    numbers = {len(np.unique(of_sae["document"])) for of_sae in measured[0].values()}
    assert numbers == {written["measured"]["documents"]}
    assert min(numbers) > metrics.FEWEST_DOCUMENTS


def test_a_frontier_that_does_not_reach_a_level_is_named():
    records, sums = compared("a", "a", recovered={"relu": (0.79, 0.86)})
    unknown = {ratio["level"]: ratio["unknown"] for ratio in frontiers.ratios(records, sums)}
    known, not_reached = ["", ""], ["", frontiers.NOT_REACHED]
    assert unknown == {0.8: known, 0.85: known, 0.9: not_reached, 0.95: not_reached}
    *_, row = tables.ratios(frontiers.ratios(records, sums)).rows
    assert row[-4:] == [frontiers.NOT_REACHED, "–", "–", "–"]
    # Even the sparsest SAE recovers more, which is no loss.
    records, sums = compared("a", "a", recovered={"relu": (0.86, 0.97)})
    more = ["", frontiers.ABOVE]
    assert [ratio["unknown"] for ratio in frontiers.ratios(records, sums)] == [more, more, known, known]
    records, sums = compared("a", "a", recovered={"gated": (0.86, 0.97), "relu": (0.86, 0.97)})
    assert [ratio["level"] for ratio in frontiers.ratios(records, sums)] == [0.9, 0.95]  # omitted where both are above
    # Neither reaches it, or there is no frontier.
    records, sums = compared("a", "a", recovered={"gated": (0.79, 0.86), "relu": (0.79, 0.86)})
    assert [ratio["level"] for ratio in frontiers.ratios(records, sums)] == [0.8, 0.85]
    records, sums = compared("a", "a", recovered={"relu": (0.86,)})
    assert frontiers.ratios(records, sums) == []


def test_architectures_are_compared_with_each_other_at_a_site():
    """All with baselines, gated ones with the others; variants of one architecture only with baselines."""
    records, sums, ones = [], {}, np.full(50, 1.0)
    variants = (
        *("gated", "gated tie_encoder=False", "batch_topk", "relu", "relu_transcoder", "jumprelu"),
        *("relu initial_l0=0", "topk"),
    )
    for variant in variants:
        for index, recovered in enumerate((0.7, 0.97)):
            site, name = "elsewhere" if variant == "jumprelu" else SITE, f"{variant.replace(' ', '-')}_{index}"
            ce = {"ce_clean": 0 * ones, "ce_zero": ones, "ce_mean": ones, "ce_sae": (1 - recovered) * ones}
            l0 = np.exp(5 * recovered) * ones
            sums[name] = dict.fromkeys(UNUSED, ones) | ce | {"tokens": ones, "l0": l0, "fired": np.ones(3)}
            about = {"site": site, "variant": variant, "width": 8, "learning_rate": 1e-3, "seed": 0, "ito": 0}
            records.append(about | {"name": name, "loss_recovered": recovered, "l0": l0[0]})
    pairs = {(ratio["stack"], ratio["baseline"]) for ratio in frontiers.ratios(records, sums)}
    baselines = ("relu", "relu-initial_l0=0", "relu_transcoder")
    untied = "gated-tie_encoder=False"
    assert pairs == {
        *((name, other) for name in ("gated", untied) for other in ("batch_topk", "topk", *baselines)),
        *((name, other) for name in ("batch_topk", "topk") for other in baselines),
        *((name, "relu_transcoder") for name in ("relu", "relu-initial_l0=0")),
        ("batch_topk", "topk"),
    }


def test_one_without_active_features_is_not_part_of_a_frontier():
    """If λ is too large."""
    recovered, l0 = np.array([0.2, 0.85, 0.95]), np.array([0.0, 10, 30])
    assert frontiers.log_l0_at(0.9, recovered, l0) == pytest.approx(np.log([10, 30]).mean())
    assert np.isnan(frontiers.log_l0_at(0.5, recovered, l0))
    assert np.isnan(frontiers.log_l0_at(0.2, recovered[:1], l0[:1]))


def test_stacks_without_a_coefficient_are_a_frontier_of_one_run():
    """Those of another run may be of another recipe."""

    def sae(run, stack, l0):
        about = {"site": SITE, "variant": f"topk k={l0}", "frontier": "topk", "width": 8, "index": 0}
        return about | {"run": run, "stack": stack, "l0": l0, "name": f"{stack}_0"}

    saes = [sae(run, f"{stack}_{k}", k) for run, stack in (("a", "plain"), ("b", "kl")) for k in (64, 16)]
    frontier = {stack: [record["name"] for record in members] for (_, stack), members in frontiers.stacks(saes).items()}
    assert frontier == {"a/topk": ["plain_16_0", "plain_64_0"], "b/topk": ["kl_16_0", "kl_64_0"]}
    assert [stack for _, stack in frontiers.stacks(saes[:2])] == ["topk"]


def compared(first, second, rows=None, recovered=MappingProxyType({})):
    """Records and sums of a gated SAE's frontier of one run, and of a baseline's of another."""
    records, sums = [], {}
    ones = np.full(50, 1.0) if rows is None else rows
    for run, variant in ((first, "gated"), (second, "relu")):
        for index, reached in enumerate(recovered.get(variant, (0.79, 0.96))):
            name = f"{run}/{variant}_{index}"
            ce = {
                "ce_clean": 0 * ones,
                "ce_zero": 1 + 0 * ones,
                "ce_mean": 1 + 0 * ones,
                "ce_sae": (1 - reached) * ones,
            }
            sums[name] = dict.fromkeys(UNUSED, 1 + 0 * ones) | ce
            sums[name] |= {"tokens": 1 + 0 * ones, "l0": np.exp(5 * reached) * (1 + 0 * ones), "fired": np.ones(3)}
            config = {"gated": gated, "relu": relu}[variant].Config(8, 64)
            stack = f"{run}/{variant}"
            sae = trained.SAE(name, variant, config, SITE, {}, 0.1, 1e-3, 0, run=run, stack=stack, index=index)
            records.extend(report.rows("small", {name: sae}, {name: sums[name]}))
    return records, sums


def test_a_comparison_of_runs_with_different_training_is_noted(tmp_path):
    records, sums = compared("long", "short")

    def notes(folder, **steps):
        runs = {run: {"steps": n, "activations_trained_on": 10 * n} for run, n in steps.items()}
        said = report.write(tmp_path / folder, None, records, sums, [], {}, about=report.About(runs=runs))
        assert json.loads((tmp_path / folder / "report.json").read_text())["notes"] == said
        assert all(note in (tmp_path / folder / "report.md").read_text() for note in said)
        return said

    (note,) = notes("different", long=2400, short=800, unused=1)
    for fact in ("long: 2,400 steps", "short: 800 steps", "Compare runs of equal training"):
        assert fact in note
    assert "unused" not in note
    assert notes("equal", long=800, short=800, unused=1) == []
    assert notes("unknown", long=800) == []
    records, sums = compared("long", "long")
    assert notes("one", long=800, short=80) == []


def test_a_loss_recovered_above_1_is_noted():
    records, _ = compared("first", "second")
    assert report.notes(records) == []
    records[0] |= {"loss_recovered": 1.01}
    (note,) = report.notes(records)
    assert records[0]["name"] in note
    assert records[1]["name"] not in note


def test_an_interval_that_is_unknown_is_explained(tmp_path):
    """Rows differ so much that in some of the bootstrap's samples a frontier does not reach the level."""
    records, sums = compared("a", "a", np.linspace(0, 2, 50))
    assert all(np.isnan(ratio["low"]) for ratio in frontiers.ratios(records, sums) if ratio["level"] == 0.8)
    (tmp_path / "report" / "mine").mkdir(parents=True)
    (tmp_path / "report" / "mine" / "notes.md").write_text("of the user")
    report.write(tmp_path / "report", None, records, sums, [], {})
    assert (tmp_path / "report" / "mine" / "notes.md").read_text() == "of the user"
    found = {r["level"]: r["low"] for r in json.loads((tmp_path / "report" / "report.json").read_text())["l0_ratios"]}
    assert found[0.8] is None
    assert found[0.9] is not None
    table, below = (
        (tmp_path / "report" / "report.md")
        .read_text()
        .split("## L0 at equal loss recovered")[1]
        .split("L0 is the number")
    )
    assert "| unknown |" in table
    assert "unknown" in below


def test_rows_have_the_order_of_the_grid(lm, tmp_path):
    """Twelve SAEs of one stack, whatever their L0 and the order in which they were loaded."""
    D = lm.sites[SITE]
    config = relu.Config(D, 2 * D)
    saes = {name: as_sae(name, relu, identity(D), config) for name in (f"grid_{n}" for n in (10, 0, 2, 11, 1, 3))}
    sums = measure.measure(lm, list(saes.values())[:1], batches(lm, 1), lm.special_tokens)
    records = report.rows("small", saes, dict.fromkeys(saes, sums["grid_10"]))
    for record in records:
        record["l0"] = {2: math.nan}.get(record["index"], 5.0 * (record["index"] % 3))
    (site,) = tables.measured(records)
    assert [row[0] for row in site.table.rows] == [f"grid_{n}" for n in (0, 1, 2, 3, 10, 11)]
    for record in records:  # as reports of early versions are
        del record["stack"], record["index"]
    (site,) = tables.measured(records)
    assert [row[0] for row in site.table.rows] == [f"grid_{n}" for n in (0, 1, 2, 3, 10, 11)]


def test_fractions_are_shown_in_per_cent():
    known = {"held_out": 0.0576, "too_short_for_a_row": 0.0006, "decay_fraction": 0.2}
    assert [row[1] for row in tables.facts({"run": known}).rows] == ["5.8%", "0.1%", "0.2"]


def test_saes_that_came_together_are_told_apart(tmp_path):
    """dictionary_learning's trainer_0 to trainer_7, of three kinds; layer_3 and layer_12, of two sites."""
    records, sums = [], {}

    def add(name, variant, width, site, l0, recovered):
        rows = np.full(50, 1.0)
        ce = {"ce_clean": 0 * rows, "ce_zero": rows, "ce_mean": rows, "ce_sae": (1 - recovered) * rows}
        sums[name] = dict.fromkeys(UNUSED, rows) | ce | {"tokens": rows, "l0": l0 * rows, "fired": np.ones(3)}
        config = {"gated": gated, "relu": relu}[variant].Config(8, width)
        stack, _, index = name.partition("_")
        sae = trained.SAE(
            name, variant, config, site, {}, stack=stack, index=int(index)
        )  # which says no more of itself
        records.extend(report.rows("small", {name: sae}, {name: sums[name]}))

    other = "blocks.1.hook_mlp_out"
    for index in range(2):
        add(f"trainer_{index}", "gated", 64, SITE, 10 + 20 * index, 0.7 + 0.25 * index)
        add(f"trainer_{2 + index}", "relu", 64, SITE, 20 + 40 * index, 0.7 + 0.25 * index)
        add(f"trainer_{4 + index}", "gated", 128, SITE, 5 + 10 * index, 0.7 + 0.25 * index)
    add("layer_3", "relu", 64, SITE, 15, 0.6)
    add("layer_12", "gated", 64, other, 25, 0.7)
    records += [record | {"name": f"{record['name']}_ito_5", "ito": 5, "l0": 5.0} for record in records]
    groups = frontiers.stacks([record for record in records if not record["ito"]])
    assert {place: [record["name"] for record in members] for place, members in groups.items()} == {
        (SITE, "layer"): ["layer_3"],
        (other, "layer"): ["layer_12"],
        (SITE, "trainer/gated/64"): ["trainer_0", "trainer_1"],
        (SITE, "trainer/gated/128"): ["trainer_4", "trainer_5"],
        (SITE, "trainer/relu"): ["trainer_2", "trainer_3"],
    }
    ratios = frontiers.ratios(records, sums)
    found = {(r["site"], r["stack"], r["variant"], r["width"], r["baseline"]) for r in ratios}
    assert found == {(SITE, f"trainer/gated/{F}", "gated", F, "trainer/relu") for F in (64, 128)}
    assert {r["level"] for r in ratios} == set(frontiers.LEVELS)
    assert all(r["ratio"] == pytest.approx(32 / r["width"]) for r in ratios)  # half, and a quarter
    panels = {axis.get_title(): axis for axis in plots.frontier(records).axes}
    shown = {site: {text.get_text() for text in axis.get_legend().get_texts()} for site, axis in panels.items()}
    assert shown == {
        SITE: {f"trainer/gated/{F} (gated, {F} features)" for F in (64, 128)}
        | {"trainer/relu (relu, 64 features)", "layer (relu, 64 features)", "by gradient pursuit"},
        other: {"layer (gated, 64 features)", "by gradient pursuit"},
    }
    drawn = {
        line.get_label().partition(" ")[0]: list(line.get_xdata())
        for line in panels[SITE].get_lines()
        if line.get_linestyle() == "-"
    }
    assert drawn["trainer/gated/64"] == [10, 30]
    assert drawn["trainer/relu"] == [20, 60]
    report.write(tmp_path / "report", None, records, sums, [], {})
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| trainer/gated/128 (gated, 128 features) | trainer/relu | " in text
    assert "nan" not in text


def test_published_points(tmp_path):
    path = tmp_path / "frontier.csv"
    path.write_text("model,architecture,site,layer,l0,loss_recovered,gamma\nm,relu,mlp,0,10.5,0.9,0.8\n")
    assert report.read_published(str(path)) == [
        {"model": "m", "architecture": "relu", "site": SITE, "layer": "0"}
        | {"l0": 10.5, "loss_recovered": 0.9, "gamma": 0.8}
    ]
    path.write_text("architecture,l0\nrelu,1\n")
    with refused("--published", str(path), "no column gamma, layer, loss_recovered, model, site"):
        report.read_published(str(path))
    with refused("--published", "nothing.csv cannot be read"):
        report.read_published(str(tmp_path / "nothing.csv"))


def test_the_report_is_whole(tmp_path, lm):
    D = lm.sites[SITE]
    configs = {"gated": (gated, gated.Config(D, 48)), "baseline": (relu, relu.Config(D, 72))}
    configs["jumprelu"] = jumprelu, jumprelu.Config(D, 72)
    saes = {
        f"{stack}_{seed}": as_sae(f"{stack}_{seed}", module, module.init(jax.random.key(seed), config), config)
        for stack, (module, config) in configs.items()
        for seed in range(2)
    }
    sums = measure.measure(lm.on(on_mesh(8, 1)), list(saes.values()), batches(lm), lm.special_tokens)
    records = report.rows("small", saes, sums)
    training = [
        {"step": step, "gated/l0": [3.0, 2.0], "gated/loss": [1.0, 1.0], "gated/gamma": [1.0, 1.0]} for step in (1, 2)
    ]
    gates = report.gates(saes)
    assert set(gates) == {"gated_0", "gated_1"}
    report.write(tmp_path / "report", 16, records, sums, training, gates)
    report.write(tmp_path / "report", 16, records, sums, training, gates)  # over an earlier one
    files = {file.name for file in (tmp_path / "report").iterdir()}
    assert files == {
        "report.json",
        "report.md",
        "report.html",
        "frontier.csv",
        "frontier.png",
        "gamma.png",
        "densities.png",
        "gates.png",
        "training.png",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["report"]
    keys = "name architecture site width l1_coefficient learning_rate seed "
    keys += (
        "l0 loss_recovered ce_clean ce_sae ce_zero gamma fvu variant ito ce_mean loss_recovered_from_mean kl cosine "
    )
    keys += "l1 gate_only dense intervals fvu_all gamma_all gamma_centered mean_share extreme target_l0 "
    keys += "not_finite run stack index frontier"
    for record in json.loads((tmp_path / "report" / "report.json").read_text())["saes"]:
        assert set(keys.split()) | {"alive", "tokens", "model", "layer"} == record.keys()
    header, *lines = (tmp_path / "report" / "frontier.csv").read_text().splitlines()
    assert header.startswith("model,architecture,site,layer,sparsity,learning_rate,l0,loss_recovered,width,alive,gamma")
    assert len(lines) == 6
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(
        name in text for name in [*saes, "frontier.png", "gamma.png", "densities.png", "gates.png", "training.png"]
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 8  # gates have two panels, training three
    assert not re.findall(r"(?:src|href)=.(?!data:)", page)  # nothing to fetch


def test_what_is_wrong_with_saes_is_said(lm, tmp_path):
    D = lm.sites[SITE]
    config = relu.Config(D, 2 * D)
    worse = identity(D) | {"W_dec": -identity(D)["W_dec"]}
    broken = identity(D) | {"b_enc": jnp.full(2 * D, jnp.inf)}
    params = {"sound": identity(D), "worse": worse, "none": zero(D), "broken": broken}
    saes = {f"{name}_0": as_sae(f"{name}_0", relu, of, config) for name, of in params.items()}
    found, text = reported(tmp_path, lm, saes, batches(lm), sound_0=D / 2, worse_0=float(D))
    said = {name: [note for note in found["notes"] if f"{name}_0" in note] for name in params}
    assert [len(notes) for notes in said.values()] == [1, 1, 2, 1]
    for name, of in (("sound", "target"), ("worse", "FVU"), ("none", "FVU"), ("broken", "not finite")):
        assert of in said[name][0]
    by_name = {record["name"]: record for record in found["saes"]}
    assert by_name["sound_0"]["target_l0"] == D / 2
    assert by_name["none_0"]["target_l0"] is None
    assert [name for name, value in by_name["broken_0"].items() if value is None] != []
    assert by_name["sound_0"]["loss_recovered"] == 1
    assert "Target L0" in text
    assert "nan" not in text
    # One that diverged says nothing of its site, also where it is alone there.
    alone, _ = reported(tmp_path / "alone", lm, {"broken_0": saes["broken_0"]}, batches(lm))
    assert alone["notes"] == said["broken"]


@pytest.mark.parametrize(
    "l0", [(41.2, 44, 48.7), (11, 11.02, 11.05), (80,), (2, 150), (0.01, 1000), (1e-5, 1e4), (95, 105)]
)
def test_the_axis_of_l0_has_numbers(l0):
    record = {"ito": 0, "site": SITE, "learning_rate": 0.1, "seed": 0, "variant": "gated", "width": 64}
    records = [record | {"name": f"a_{i}", "l0": value, "loss_recovered": 0.9} for i, value in enumerate(l0)]
    figure = plots.frontier(records)
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = {tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()}
    assert 2 <= len(shown) <= 15


def test_a_report_of_other_settings_stays(tmp_path):
    """The new one goes beside it, under a name that says what differs; an earlier version's is never replaced."""

    def place(**changes):
        made_with = {"step": 8, "tokens": 512, "ito": (), "published": "", "text": "0123456789"} | changes
        settings = provenance.Settings(**made_with)
        folder = provenance.place(paths.of(tmp_path / "report"), settings)
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(json.dumps({"settings": dataclasses.asdict(settings)}))
        return folder.name

    assert place() == place() == "report"
    assert place(tokens=1024, text="x") == place(tokens=1024, text="x") == "report-tokens_1024"
    assert place(ito=(5, 10), step=4) == "report-step_4-ito_5_10"
    assert place(text="abcdefghijk") == "report-text_abcdefgh"
    assert place(published="the paper.csv") == "report-published_the_paper.csv"
    # The same difference to another report in `report/` does not make it the same report.
    (tmp_path / "report" / "report.json").write_text((tmp_path / "report-step_4-ito_5_10" / "report.json").read_text())
    assert place(ito=(5, 10), step=4) == "report"
    assert place(tokens=1024, step=4, ito=(5, 10), text="x") == "report-tokens_1024-step_4-ito_5_10"
    for earlier in ("{", '{"step": 8, "saes": []}'):
        (tmp_path / "report" / "report.json").write_text(earlier)
        assert place() == "report-step_8-tokens_512"


def test_saes_of_several_places_are_told_apart(lm):
    D = lm.sites[SITE]
    config = relu.Config(D, 2 * D)

    def source(path, *names, run=None, of=""):
        saes = {name: dataclasses.replace(as_sae(name, relu, identity(D), config), run=of) for name in names}
        return sae_sources._Source(path, path, "", saes, run)

    def names(*sources):
        named = sae_sources._told_apart(sources)
        assert all(name == sae.name for each in named for name, sae in each.saes.items())
        return [{name: sae.stack for name, sae in each.saes.items()} for each in named]

    run = object()
    found = names(source("/a/x", "gated_0", run=run), source("/a/y", "mine_0", run=run))
    assert found == [{"gated_0": "gated"}, {"mine_0": "mine"}]
    # All names say their run or folder as soon as two stacks are called alike.
    found = names(
        source("/a/x", "gated_0", "relu_0", run=run), source("/a/y", "gated_1", "mine_0", run=run), source("/b", "z_0")
    )
    assert found == [
        {"x/gated_0": "x/gated", "x/relu_0": "x/relu"},
        {"y/gated_1": "y/gated", "y/mine_0": "y/mine"},
        {"b/z_0": "b/z"},
    ]
    # Runs of one name get as much of their paths as they need.
    found = names(source("/a/x", "gated_0", run=run), source("/b/x", "gated_0", run=run))
    assert found == [{"a/x/gated_0": "a/x/gated"}, {"b/x/gated_0": "b/x/gated"}]
    # SAEs from elsewhere that lie apart are one stack where their names say so.
    found = names(source("/a", "trainer_0"), source("/b", "trainer_1"))
    assert found == [{"trainer_0": "trainer"}, {"trainer_1": "trainer"}]
    found = names(source("/a", "trainer_0", "z_0"), source("/b", "trainer_1", "z_0"))
    assert found == [{"a/trainer_0": "trainer", "a/z_0": "a/z"}, {"b/trainer_1": "trainer", "b/z_0": "b/z"}]
    with refused("", "/a", "'gated_0'"):
        names(source("/a", "gated_0"), source("/b", "gated_0"), source("/a", "gated_0"))


def test_texts_of_one_name_are_told_apart(experiment):
    def text(path, **changes):
        return dataclasses.replace(experiment.data, path=path, **changes)

    a, b, c = text("/a/stories"), text("/b/stories/"), text("/a/code")
    stdlib = text("", corpus="stdlib")
    assert sae_sources._text_names({a, c, stdlib}) == {a: "stories", c: "code", stdlib: "stdlib"}
    assert sae_sources._text_names({a, b, c}) == {a: "a/stories", b: "b/stories", c: "code"}
    rows = text("/a/stories", context_length=8)
    assert sae_sources._text_names({a, rows}) == {a: "stories", rows: "stories"}
    a, b = text("gs://a/text/*.txt"), text("gs://b/text/*.txt")
    assert sae_sources._text_names({a, b}) == {a: "a/text/*.txt", b: "b/text/*.txt"}


@pytest.mark.variants
def test_runs_and_exports_in_one_report(experiment, lm_dir, tmp_path, capsys):
    """They are measured as in their run, and one that was trained on another model is refused."""
    stack = dataclasses.replace(experiment.stacks["gated"], width=16)
    assert loop.train(dataclasses.replace(experiment, stacks={"gated": stack}), tmp_path / "a" / "run")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    gsae_jax.load(tmp_path / "a" / "run")["gated_0"].save(tmp_path / "exported")
    measuring.evaluate(tmp_path / "a" / "run", tokens=256)
    alone = json.loads((tmp_path / "a" / "run" / "report" / "report.json").read_text())
    names = [str(tmp_path / "a" / "run"), f"{tmp_path / 'b' / 'run'}:gated", str(tmp_path / "exported")]
    capsys.readouterr()
    text = measuring.evaluate_saes(names, str(tmp_path / "out"), tokens=256)
    assert text.endswith(f"report: {tmp_path / 'out' / 'report.md'}")
    assert "warning" not in capsys.readouterr().err
    together = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {record["name"]: record for record in together["saes"]}
    gated = {"a/run/gated_0", "a/run/gated_1", "b/run/gated_0", "b/run/gated_1"}
    assert found.keys() == gated | {"exported/gated_0"}
    for record in alone["saes"]:
        name = f"a/run/{record['name']}"
        assert found[name]["run"] == "a/run"
        for field in ("l0", "fvu", "ce_sae", "kl"):
            assert found[name][field] == pytest.approx(record[field], rel=1e-5)
            assert found[f"b/run/gated_{record['index']}"][field] == found[f"a/run/gated_{record['index']}"][field]
    facts = together["runs"]["b/run"]
    assert (facts["steps"], facts["batch_size"]) == (experiment.train.steps, experiment.train.batch_size)
    assert facts["activations_trained_on"] == experiment.train.steps * experiment.train.batch_size
    assert f"jax {jax.__version__}" in facts["trained_with"]
    assert alone["settings"]["step"] == experiment.train.steps
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How the SAEs were trained" in page
    # The other run's text has the same name and lies elsewhere.
    moved = tmp_path / "b" / Path(experiment.data.path).name
    shutil.copytree(experiment.data.path, moved)
    config = json.loads((tmp_path / "b" / "run" / "config.json").read_text())
    config["data"]["path"] = str(moved)
    (tmp_path / "b" / "run" / "config.json").write_text(json.dumps(config))
    measuring.evaluate_saes(names, str(tmp_path / "named"), tokens=256)
    assert f"path ({moved} there" in capsys.readouterr().err
    named = json.loads((tmp_path / "named" / "report.json").read_text())
    theirs, ours = named["runs"]["b/run"]["text"], named["measured"]["text"]
    assert theirs == f"b/{moved.name}" != ours == named["runs"]["a/run"]["text"]
    with refused("--sae", "no stack 'gatde'", "gated"):
        measuring.evaluate_saes([f"{tmp_path / 'a' / 'run'}:gatde"], str(tmp_path / "third"))
    before = (tmp_path / "a" / "run" / "report" / "report.json").read_bytes()
    measuring.evaluate(tmp_path / "a" / "run", tokens=512)
    assert (tmp_path / "a" / "run" / "report-tokens_512" / "report.json").exists()
    assert (tmp_path / "a" / "run" / "report" / "report.json").read_bytes() == before
    shutil.copytree(lm_dir, tmp_path / "lm")
    retrained(tmp_path / "lm")
    config = json.loads((tmp_path / "a" / "run" / "config.json").read_text())
    config["lm"]["path"] = str(tmp_path / "lm")
    (tmp_path / "a" / "run" / "config.json").write_text(json.dumps(config))
    with refused("--sae", "another language model", "weights"):
        measuring.evaluate_saes(names, str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_panels_are_pictures_of_their_own_on_one_scale():
    record = {"ito": 0, "learning_rate": 0.1, "seed": 0, "variant": "gated", "width": 64}
    points = {SITE: ((10, 0.8), (100, 0.9)), "blocks.1.hook_mlp_out": ((1, 0.5), (20, 0.7))}
    records = [
        record | {"site": site, "stack": "a", "name": f"a_{site}{l0}", "l0": l0, "loss_recovered": recovered}
        for site, of_site in points.items()
        for l0, recovered in of_site
    ]
    figure = plots.frontier(records)
    assert len({(*axis.get_xlim(), *axis.get_ylim()) for axis in figure.axes}) == 1
    pictures = plots.panels(figure)
    assert [panel.title for panel in pictures] == sorted(points)
    assert all(panel.svg.startswith(b"<?xml") and panel.svg.count(b'id="axes_') == 1 for panel in pictures)
    assert pictures == plots.panels(plots.frontier(records))


def test_legends_are_legible_on_a_phone():
    """Text of 10 points is at least 11 pixels high where a panel is 358 pixels wide, whatever SAEs are called."""
    run = "runs/of_several/of_a_long_name/gated"
    record = {"ito": 0, "seed": 0, "variant": "gated (tie_encoder=False)", "width": 65536, "fvu": 0.5, "site": SITE}
    records = [
        record | {"stack": stack, "name": f"{stack}_{n}", "learning_rate": rate, "l0": 10.0**n, "loss_recovered": 0.9}
        for n, (stack, rate) in enumerate([(run, 3e-4), (run, 1e-3), ("baseline", 1e-3)])
    ]
    values = {r["name"]: np.linspace(0.01, 0.5, 50) for r in records}
    for figure in (plots.frontier(records), plots.densities(records, values)):
        (axis,) = figure.axes
        assert {text.get_fontsize() for text in axis.get_legend().get_texts()} == {10}
        ((_, svg),) = plots.panels(figure)
        points = float(re.search(rb'<svg [^>]*?width="([\d.]+)pt"', svg).group(1))
        assert 10 * 358 / points >= 11
        assert axis.get_window_extent().height > 2 * figure.dpi  # legends make the figure higher, not the axes smaller


def test_a_config_changes_only_what_it_names(experiment):
    """The rest is of the first run, or as SAEs from elsewhere say that they were trained."""
    sae = dataclasses.replace(as_sae("a_0", relu, {}, relu.Config(8, 16)), metadata={"context_size": 16})
    imported = sae_sources._Source("a", "/a", "a", {"a_0": sae})
    run = sae_sources._Source("b", "/b", "b", {"a_0": sae}, experiment)
    config = {"data": {"corpus": "text", "path": "x"}}
    settings = sae_sources._settings([imported], config)
    assert (settings.data.path, settings.data.context_length, settings.lm.path) == ("x", 16, "")
    settings = sae_sources._settings([imported, run], config)
    assert settings.data == dataclasses.replace(experiment.data, corpus="text", path="x")
    assert (settings.lm, settings.evaluation) == (experiment.lm, experiment.evaluation)
    with refused("data.pathh", "path"):
        sae_sources._settings([run], {"data": {"pathh": "x"}})


def test_saes_measured_from_python_have_the_numbers_of_the_report(collected_run, lm_dir):
    """All but intervals, which are over rows there; and a changed SAE has its own."""
    lm, saes = gsae_jax.load_lm(lm_dir), gsae_jax.load(collected_run)
    tokens = gsae_jax.held_out(collected_run)
    records = json.loads((collected_run / "report" / "report.json").read_text())["saes"]
    measured = gsae_jax.measure(saes, lm, tokens, rows_per_forward=16)
    assert [*measured] == [record["name"] for record in records]
    for record in records:
        ours = measured[record["name"]]
        numbers = {name: math.nan if record[name] is None else record[name] for name in ours if name != "intervals"}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, nan_ok=True)
        assert ours["intervals"].keys() == record["intervals"].keys()
    sae = saes["gated_0"]
    silent = dataclasses.replace(sae, name="silent", params=sae.params | {"b_gate": sae.b_gate - 1e6})
    both = gsae_jax.measure([sae, silent], lm, tokens)
    assert both["silent"]["l0"] == 0
    alone = gsae_jax.measure(sae, lm, tokens)["gated_0"]
    assert both["gated_0"]["intervals"].keys() == alone.pop("intervals").keys()
    assert {name: both["gated_0"][name] for name in alone} == pytest.approx(alone, nan_ok=True)
    for field, arguments in (
        ("saes", ([sae, sae], lm, tokens)),
        ("saes", ([], lm, tokens)),
        ("tokens", (sae, lm, tokens[0])),
        ("tokens", (sae, lm, tokens + lm.config.d_vocab)),
        ("tokens", (sae, lm, tokens[:, :1])),
    ):
        with refused(field):
            gsae_jax.measure(*arguments)
    with refused("rows_per_forward", "is 0"):
        gsae_jax.measure(sae, lm, tokens, rows_per_forward=0)


@pytest.mark.parametrize(
    ("name", "changes", "warned"),
    [("text", {}, True), ("elsewhere", {}, False), ("text", {"held_out": "position"}, False)],
)
def test_text_of_which_saes_may_have_seen_another_part_is_named(lm_dir, tmp_path, capsys, name, changes, warned):
    """Not if it is other text, or if a config says how it is divided."""
    lm = gsae_jax.load_lm(lm_dir)
    told = {"dataset_path": name, "model_name": lm_dir.name}
    sae = as_sae("a_0", relu, identity(lm.sites[SITE]), relu.Config(lm.sites[SITE], 2 * lm.sites[SITE]))
    dataclasses.replace(sae, metadata=told).save(tmp_path / "a_0")
    data = {"corpus": "text", "path": str(tmp_path / "text"), "name": ""}
    sae_sources.of_names([str(tmp_path / "a_0")], {"data": data | changes}, str(lm_dir))
    assert ("--config" in capsys.readouterr().err) == warned
