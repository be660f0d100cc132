"""SAEs from elsewhere in use: their names, measuring them, and training from them."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import exporting as export_lib
from gsae_jax import sae_loading, sae_sources
from gsae_jax.lms import checkpoints
from gsae_jax.measuring import evaluate, evaluate_saes
from gsae_jax.saes import gated, gated_transcoder, jumprelu_transcoder, relu
from gsae_jax.training import loop
from tests.fixtures.lms import make as fixtures
from tests.refusals import refused
from tests.sae_files import make
from tests.small_saes import away_from_init

FIXTURES = Path(fixtures.__file__).parent


def test_an_sae_that_is_not_ours_has_the_name_of_its_folder(tmp_path):
    for name in ("layer_12", "width 16k", "(é) \x1b[1m_3"):
        make(gated).save(tmp_path / "saes" / name, "gemma_scope")
        (tmp_path / "saes" / name / "gsae_jax.json").unlink()
    saes = gsae_jax.load(tmp_path / "saes")
    assert list(saes) == ["_é_ __1m_3", "layer_12", "width 16k_0"]
    sae = saes["layer_12"]
    assert (sae.site, sae.seed, sae.norm_limit, sae.metadata) == ("", None, math.inf, {})
    assert math.isnan(sae.l1_coefficient)
    (same,) = gsae_jax.load(tmp_path / "saes" / "layer_12" / "params.npz").values()
    assert same.name == "layer_12"
    make(gated).save(tmp_path / "saes" / "x_1")
    make(relu).save(tmp_path / "saes" / "x_2")
    with refused(str(tmp_path / "saes" / "x_2"), "second SAE called 'stack_2'", "one by one"):
        gsae_jax.load(tmp_path / "saes")


def test_what_is_no_sae_among_several_is_named(tmp_path, capsys):
    for name, folder in (("a", "a"), ("b", "b"), ("c", ".export-x")):
        dataclasses.replace(make(gated), name=name).save(tmp_path / folder)
    (tmp_path / ".export-x" / "sae_weights.safetensors").unlink()  # an export that was killed
    assert list(gsae_jax.load(tmp_path)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
    (tmp_path / "b" / "cfg.json").unlink()
    assert list(gsae_jax.load(tmp_path)) == ["a"]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path} also has entries that are not SAEs in a known format; they are left out: b\n"
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("EleutherAI/pythia-14m", "--model EleutherAI/pythia-14m"),
        ("pythia-14m", "--model with its directory or hub name"),
        ("gelu-1l-stdlib", None),
        (None, None),
    ],
)
def test_an_sae_of_another_model_is_not_measured_on_the_embedded_one(tmp_path, monkeypatch, name, wanted):
    """It is refused before the language model is loaded and the text is read."""

    def too_late(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("gsae_jax.data.rows.open_rows", too_late)
    monkeypatch.setattr("gsae_jax.lms.loading.load_lm", too_late)
    sae = dataclasses.replace(make(relu), site="blocks.0.hook_mlp_out", metadata={"model_name": name})
    sae.save(tmp_path / "a")
    expected = ("--model", "stack_2", f"'{name}'", wanted) if wanted else ("stack_2", "width 12", "width 256")
    with refused(*expected):
        evaluate_saes([str(tmp_path / "a")], str(tmp_path / "report"), tokens=128)
    with refused("--site", "'blocks.1.hook_mlp_out'"):
        given = {"lm": {"path": ""}}
        evaluate_saes([str(tmp_path / "a")], str(tmp_path / "report"), given, site="blocks.1.hook_mlp_out")
    assert not (tmp_path / "report").exists()


def test_what_metadata_calls_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = config_lib.Data("text", "some/texts", "text", "", "", "train", "test", "", 16, True)
    for path, revision, name in (
        ("", "", "gelu-1l-stdlib"),
        (str(checkpoints.EMBEDDED), "", "gelu-1l-stdlib"),
        ("EleutherAI/pythia-14m", "f" * 40, "EleutherAI/pythia-14m"),
        ("/models/small/", "", "small"),
        ("models/small", "", "small"),
        ("~/small", "", "small"),
        (".", "", tmp_path.name),
    ):
        lm = config_lib.LM(path, "float32", revision)
        assert sae_loading.names(lm, data) == {"model_name": name, "dataset_path": "texts"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/tinystories/*.txt", "tinystories/*.txt"),
        ("/home/me/tinystories/**/*.jsonl", "tinystories/**/*.jsonl"),
        ("tinystories/part?/a.txt", "tinystories/part?/a.txt"),
        ("gs://bucket/stories/*.txt", "stories/*.txt"),
        ("/*.txt", "*.txt"),
        ("*.txt", "*.txt"),
        ("/home/me/tinystories/", "tinystories"),
        ("/home/me/tinystories/a.txt", "a.txt"),
        ("gs://bucket/stories", "stories"),
        ("", "stdlib"),
    ],
)
def test_what_metadata_calls_a_text(path, name):
    data = config_lib.Data(corpus="text" if path else "stdlib", path=path)
    assert sae_loading.names(config_lib.LM(), data)["dataset_path"] == name


@pytest.mark.parametrize(
    ("corpus", "name"), [("stdlib", "stdlib"), ("text", "texts"), ("tfds", "c4/en"), ("my_package.corpus", "c4/en")]
)
def test_metadata_names_the_text_that_the_corpus_reads(corpus, name):
    data = config_lib.Data(corpus=corpus, path="/home/me/texts", name="c4/en")
    assert sae_loading.names(config_lib.LM(), data)["dataset_path"] == name


@pytest.mark.parametrize(
    ("theirs", "warns"),
    [("NeelNanda/pile-10k", False), ("pile-10k", False), ("/data/NeelNanda/pile-10k/", False), ("me/pile-10k", True)],
)
def test_a_text_of_the_same_name_and_another_owner_is_another_text(experiment, capsys, theirs, warns):
    data = dataclasses.replace(experiment.data, corpus="tfds", name="NeelNanda/pile-10k")
    settings = config_lib.HeldOut(experiment.lm, data, experiment.evaluation, True)
    sae_sources._check_told({"a": dataclasses.replace(make(relu), metadata={"dataset_path": theirs})}, settings, False)
    assert (f"'{theirs}' was the text of training" in capsys.readouterr().err) == warns


def test_a_stack_starts_from_an_sae_that_was_trained_elsewhere(experiment, tmp_path):
    """Its decoder rows made unit; a JumpReLU one as the gated SAE that it is."""
    stack, site = experiment.stacks["baseline"], experiment.stacks["baseline"].site
    config = relu.Config(64, 128)
    sae = dataclasses.replace(make(relu), site=site, config=config, params=away_from_init(relu, config))
    sae.save(tmp_path / "a" / "plain")
    dataclasses.replace(sae, name="other_0").save(tmp_path / "a" / "jump", "gemma_scope")
    (tmp_path / "a" / "jump" / "gsae_jax.json").unlink()

    def starts(path, **changes):
        changed = dataclasses.replace(stack, start_from=str(path), **changes)
        return sae_loading.starts(dataclasses.replace(experiment, stacks={"second": changed}))["second"]

    x = jax.random.normal(jax.random.key(2), (50, 64))
    for module, name, options in ((relu, "plain", {}), (gated, "plain", {}), (gated, "jump", {})):
        params = starts(tmp_path / "a" / name, architecture=module.__name__.rpartition(".")[2], options=options)
        params = {name: value[0] for name, value in params.items()}
        np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=-1), 1, rtol=1e-5)
        f = module.encode(params, x, module.Config(64, 128))
        assert np.asarray(f > 0).mean() > 0.1
        np.testing.assert_allclose(module.decode(params, f), sae(x), rtol=1e-4, atol=1e-4)

    field = "stacks.second.start_from"
    with refused(field, "differs in architecture (jumprelu there, relu here)"):
        starts(tmp_path / "a" / "jump")
    with refused(field, "differs in site", "blocks.0.hook_mlp_out here"):
        starts(tmp_path / "a" / "plain", site="blocks.0.hook_mlp_out")
    fixed = gated.Config(64, 128)
    whole = dataclasses.replace(make(gated), site=site, config=fixed, params=away_from_init(gated, fixed))
    whole.save(tmp_path / "gated")
    with refused("stacks.second.options", "use_r_mag=False", "changes r_mag of"):
        starts(tmp_path / "gated", architecture="gated", options={"use_r_mag": False})
    assert starts(tmp_path / "gated", architecture="gated")["r_mag"].any()
    with refused(field, f"{tmp_path / 'a'} has 2 kinds of SAEs"):
        starts(tmp_path / "a")
    with refused(field, "google/x is not here"):
        starts("google/x:gated")
    dead = dataclasses.replace(sae, params=sae.params | {"W_dec": sae.params["W_dec"].at[3:5].set(0)})
    dead.save(tmp_path / "dead")
    with refused(field, "2 features", "decoder row is zero"):
        starts(tmp_path / "dead")


READS, WRITES = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


@pytest.fixture
def transcoders(tmp_path):
    """A transcoder in a file of Gemma Scope, which says nothing of it, and in SAELens', which names its sites."""
    config = jumprelu_transcoder.Config(d_in=32, d_out=32, width=64)
    sae = dataclasses.replace(
        make(jumprelu_transcoder),
        config=config,
        params=away_from_init(jumprelu_transcoder, config),
        site=READS,
        target=WRITES,
        norm_limit=math.inf,
        metadata={},
    )
    sae.save(tmp_path / "scope", "gemma_scope")
    (tmp_path / "scope" / "gsae_jax.json").unlink()
    sae.save(tmp_path / "lens", "saelens")
    return sae


def test_a_stack_of_transcoders_starts_from_a_file_that_does_not_say_what_it_is(experiment, tmp_path, transcoders):
    """Its decoder rows made unit; a JumpReLU one also as the gated transcoder that it is."""
    stack, x = experiment.stacks["gated"], jax.random.normal(jax.random.key(2), (50, 32))

    def starts(path, **changes):
        own = {"architecture": "gated_transcoder", "site": READS, "target": WRITES, "l1_coefficients": (0.01,)}
        own |= {"learning_rates": (1e-3,), "seeds": (0,), "start_from": str(tmp_path / path)}
        changed = dataclasses.replace(stack, **own | changes)
        return sae_loading.starts(dataclasses.replace(experiment, stacks={"second": changed}))["second"]

    for path in ("scope", "lens"):
        for module in (gated_transcoder, jumprelu_transcoder):
            params = starts(path, architecture=module.__name__.rpartition(".")[2])
            params = {name: value[0] for name, value in params.items()}
            np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=-1), 1, rtol=1e-5)
            f = module.encode(params, x, module.Config(d_in=32, d_out=32, width=64))
            assert np.asarray(f > 0).mean() > 0.1
            np.testing.assert_allclose(module.decode(params, f), transcoders(x), rtol=1e-4, atol=1e-4)
    with refused("stacks.second.start_from", "differs in target", f"{WRITES} there"):
        starts("lens", target="blocks.0.hook_resid_post")
    with refused("stacks.second.start_from", "architecture (jumprelu there, relu_april here)"):
        starts("scope", architecture="relu_april", target="")


@pytest.mark.variants
def test_the_sites_of_transcoders_are_given_to_the_command(config_dict, tmp_path, transcoders, capsys):
    config = relu.Config(32, 64)
    sae = dataclasses.replace(make(relu), config=config, params=away_from_init(relu, config), site=WRITES, metadata={})
    dataclasses.replace(sae, name="sae_0").save(tmp_path / "sae")
    config_dict = config_dict.to_dict() | {"stacks": {}}

    def measured(out, *names, **options):
        folders = [str(tmp_path / name) for name in names]
        evaluate_saes(folders, str(tmp_path / out), config_dict, tokens=256, **options)
        saes = json.loads((tmp_path / out / "report.json").read_text())["saes"]
        return {sae["name"]: [sae[field] for field in ("site", "l0", "fvu", "loss_recovered")] for sae in saes}

    theirs = measured("one", "lens", "sae")
    found = measured("two", "scope", "sae", site=(READS, WRITES))
    assert "is used, as --" not in capsys.readouterr().err
    assert found == {"scope_0": theirs["stack_2"], "sae_0": theirs["sae_0"]}
    assert found["scope_0"][0] == found["sae_0"][0] == WRITES
    with refused("--site", "is missing", "scope"):
        measured("three", "scope")
    with refused("--target", "none of the SAEs is a transcoder"):
        measured("three", "sae", site=("", WRITES))
    with refused("--target", "'blocks.0.hook'"):
        measured("three", "scope", site=(READS, "blocks.0.hook"))
    tree = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    del tree["metadata"]["hook_name_out"], tree["metadata"]["gsae_jax"]
    (tmp_path / "lens" / "cfg.json").write_text(json.dumps(tree))
    with refused("--target", "is missing", "lens"):
        measured("three", "lens")
    assert measured("three", "lens", site=("", WRITES)) == {"lens_0": theirs["stack_2"]}
    other = "blocks.0.hook_resid_post"
    assert measured("four", "lens", site=("", other))["lens_0"][0] == other
    assert "is used, as --" not in capsys.readouterr().err
    assert measured("five", "lens", site=(WRITES, other))["lens_0"][0] == other
    assert f"{WRITES!r} is used, as --site says" in capsys.readouterr().err


def test_the_weights_of_a_norm_are_divided_out_of_an_encoder(tmp_path, capsys):
    """Of a transcoder that was trained in TransformerLens, as in docs/exchange.md: its hook lacks RMSNorm's weights."""
    lm = gsae_jax.load_lm(FIXTURES / "gemma2")
    D = lm.sites[READS]
    config = jumprelu_transcoder.Config(d_in=D, d_out=D, width=64, skip=True)
    params = away_from_init(jumprelu_transcoder, config)
    sae = dataclasses.replace(make(jumprelu_transcoder), config=config, params=params, site=READS, target=WRITES)
    weights = 1 + np.asarray(lm.params["blocks.0"]["ln2"]["w"])
    x = np.asarray(lm.activations([list(range(10))], [READS])[READS])
    folded = {name: sae.params[name] / weights[:, None] for name in ("W_enc", "W_skip")}
    folded = dataclasses.replace(sae, params=sae.params | folded)
    np.testing.assert_allclose(folded.encode(x), sae.encode(x / weights), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(folded(x), sae(x / weights), rtol=1e-4, atol=1e-4)
    for run, is_warned in (("", True), ("mine", False)):
        for path, reads in (("gemma2", READS), ("gemma2", WRITES), ("gpt2", READS)):
            widths = gsae_jax.load_lm(FIXTURES / path).sites
            config = jumprelu_transcoder.Config(d_in=widths[reads], d_out=widths[WRITES], width=64)
            params = jumprelu_transcoder.init(jax.random.key(0), config)
            placed = dataclasses.replace(sae, config=config, params=params, site=reads, run=run)
            lm_config = config_lib.LM(str(FIXTURES / path))
            settings = config_lib.HeldOut(lm_config, config_lib.Data(), config_lib.Evaluation(), True)
            sae_sources._at_sites({"a": placed}, settings, "", "")
            warned = "divided by these weights" in capsys.readouterr().err
            assert warned == (is_warned and (path, reads) == ("gemma2", READS))


HOOKS = ("transformer.h.0.mlp.output", "blocks.0.mlp.hook_out", "x.y")


@pytest.mark.parametrize(
    "hook", ["model.layers.0.mlp", *(pytest.param(hook, marks=pytest.mark.variants) for hook in HOOKS)]
)
def test_others_names_of_sites(experiment, config_dict, tmp_path, capsys, hook):
    """They are understood, and `--site` wins."""
    config = relu.Config(32, 64)
    sae = dataclasses.replace(make(relu), config=config, params=away_from_init(relu, config), site=hook)
    sae.save(tmp_path / "a")
    tree = json.loads((tmp_path / "a" / "cfg.json").read_text())
    del tree["metadata"]["gsae_jax"], tree["metadata"]["model_name"], tree["metadata"]["dataset_path"]
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(tree))
    config_dict, site = config_dict.to_dict() | {"stacks": {}}, "blocks.0.hook_mlp_out"

    def sites(out, **flags):
        evaluate_saes([str(tmp_path / "a")], str(tmp_path / out), config_dict, tokens=256, **flags)
        return {record["site"] for record in json.loads((tmp_path / out / "report.json").read_text())["saes"]}

    if hook == "x.y":
        with refused("--site", "missing", "a_0", "'x.y'"):
            sites("one")
    else:
        assert sites("one") == {site}
    assert sites("two", site=site) == {site}
    warned = "'blocks.0.hook_mlp_out' is used, as --site says"
    assert (warned in capsys.readouterr().err) == (hook == "x.y")
    assert sites("three", site="model.layers.1") == {"blocks.1.hook_resid_post"}
    assert "'model.layers.1' is used, as --site says" in capsys.readouterr().err


@pytest.mark.variants
def test_exported_saes_measure_as_in_their_run(experiment, config_dict, text_dir, lm_dir, tmp_path, capsys):
    stack = experiment.stacks["gated"]
    assert loop.train(dataclasses.replace(experiment, stacks={"gated": stack}), tmp_path / "run")
    evaluate(tmp_path / "run")
    assert export_lib.export(str(tmp_path / "run"), "saelens", str(tmp_path / "out")) == ["gated_0", "gated_1"]
    assert export_lib.export(str(tmp_path / "run"), "gemma_scope", str(tmp_path / "one"), "gated_1") == ["gated_1"]
    (tmp_path / "one" / "gsae_jax.json").unlink()  # it says nothing of itself then
    tree = config_dict.to_dict() | {"stacks": {}}
    capsys.readouterr()
    evaluate_saes([str(tmp_path / "out"), str(tmp_path / "one")], str(tmp_path / "report"), tree, site=stack.site)
    assert "--site" not in capsys.readouterr().err
    folders = (tmp_path / "run" / "report", tmp_path / "report")
    there, here = ({r["name"]: r for r in json.loads((f / "report.json").read_text())["saes"]} for f in folders)
    assert list(here) == ["gated_0", "gated_1", "one_0"]
    for name, record in there.items():
        for field in ("l0", "loss_recovered", "gamma", "fvu", "kl", "alive", "l1_coefficient"):
            assert here[name][field] == pytest.approx(record[field], rel=1e-5), (name, field)
        assert [here[name][field] for field in ("seed", "variant")] == [record["seed"], record["variant"]]
    for field in ("l0", "loss_recovered", "fvu"):
        assert here["one_0"][field] == pytest.approx(there["gated_1"][field], rel=1e-5)
    assert here["one_0"]["l1_coefficient"] is None
    assert "nan" not in (tmp_path / "report" / "report.md").read_text()
    assert not (tmp_path / "report" / "training.png").exists()

    def measure(*paths, **options):
        evaluate_saes([str(tmp_path / path) for path in paths], str(tmp_path / "third"), tree, **options)

    with refused("--site", str(tmp_path / "one"), "blocks.0.hook_mlp_out"):
        measure("one")
    capsys.readouterr()
    with refused("--sae", "second SAE called 'gated_0'"):
        measure("out", "out/gated_0")
    with refused("--site", "'blocks.9.hook_mlp_out'"):
        measure("one", site="blocks.9.hook_mlp_out")
    assert capsys.readouterr().err == ""
    # Another model, which has another width here; and another text.
    tree["data"]["path"] = ""
    tree["data"]["corpus"] = "stdlib"
    with refused("gated_0", "width 32", "width 256"):
        measure("out", model=str(checkpoints.EMBEDDED))
    assert re.findall("warning: .*", capsys.readouterr().err) == [
        "warning: gated_0 and 1 more say that 'small' was the language model of training; 'gelu-1l-stdlib' is used now",
        f"warning: gated_0 and 1 more say that '{text_dir.name}' was the text of training; 'stdlib' is used now",
    ]
    shutil.copytree(lm_dir, tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").write_bytes(b"")
    with refused("--model", f"{tmp_path / 'lm' / 'model.safetensors'} cannot be read"):
        measure("out", model=str(tmp_path / "lm"))
    assert not (tmp_path / "third").exists()
    with refused("--out", f"{tmp_path / 'report'} exists"):
        evaluate_saes([str(tmp_path / "one")], str(tmp_path / "report"), tree, site=stack.site)
    for name in ("", "gated_1"):
        with refused("--out", f"{tmp_path / 'out'} exists"):
            export_lib.export(str(tmp_path / "run"), "saelens", str(tmp_path / "out"), name)
    with refused("--step", "3", "16"):
        export_lib.export(str(tmp_path / "run"), "saelens", str(tmp_path / "new"), step=3)
    with refused("--step", "3", "16"):
        evaluate(tmp_path / "run", step=3)


@pytest.mark.variants
def test_a_published_jumprelu_sae_is_measured_and_trained_further_as_a_gated_one(tmp_path, real):
    """SAELens trained it on activations that its file does not name, so that it is bad on these before training."""
    published, site = real / "saelens_jumprelu", "blocks.1.hook_resid_post"
    (sae,) = gsae_jax.load(published).values()
    assert (sae.architecture, sae.d_in, sae.width, sae.site) == ("jumprelu", 128, 512, "")
    stack = gsae_jax.stack_config("gated", site, 512, l1_coefficients=(0.01,), start_from=str(published))
    start = sae_loading.starts(gsae_jax.experiment(stacks={"further": stack}))["further"]
    x = 100 * np.random.default_rng(0).standard_normal((64, 128), np.float32)
    f = gated.encode({name: value[0] for name, value in start.items()}, x, gated.Config(128, 512))
    np.testing.assert_allclose(f, sae.encode(x), rtol=1e-4, atol=1e-3)
    text = {"corpus": "text", "path": str(real / "tinystories"), "data_dir": str(tmp_path / "data")}
    config = gsae_jax.experiment(
        stacks={"further": stack},
        lm={"path": str(real / "TinyStories-656K")},
        data=text | {"context_length": 64},
        train={"steps": 64, "batch_size": 256, "warmup_steps": 10},
        activations={"buffer_size": 2**13},
        evaluation={"tokens": 2**12},
        loggers=(),
    )
    gsae_jax.fit(config, tmp_path / "run")
    saes = [str(published), f"{tmp_path / 'run'}:further"]
    evaluate_saes(saes, str(tmp_path / "compared"), site=site)
    records = json.loads((tmp_path / "compared" / "report.json").read_text())["saes"]
    before, after = ({r["name"]: r for r in records}[name] for name in ("saelens_jumprelu_0", "further_0"))
    assert before["site"] == after["site"] == site
    assert after["fvu"] < 0.5 * before["fvu"]
    assert after["l0"] < before["l0"]
