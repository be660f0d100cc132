"""What a run would take elsewhere: against what it takes here, against hand arithmetic, and compiled for TPUs."""

import dataclasses
import importlib
import importlib.util
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gsae_jax import storing
from gsae_jax.activations import store
from gsae_jax.config import Experiment, Mesh
from gsae_jax.config_trees import from_dict
from gsae_jax.evaluation import measure
from gsae_jax.lms.checkpoints import Checkpoint, abstract_params
from gsae_jax.planning import collectives, hardware, planner
from gsae_jax.planning.hardware import CHIPS, Topology
from tests.refusals import refused
from tests.test_scale import first_state, program_on
from tests.variants import variants

ROOT = Path(__file__).parent.parent
GEMMA = ["configs/gemma_2_2b.py", "--config.lm.path=tests/fixtures/configs/gemma_2_2b"]
MILLION = ["configs/gemma_7b.py:resid20", "--config.lm.path=tests/fixtures/configs/gemma_7b", "--config.mesh.latent=8"]
MILLION += ["--config.stacks.gated.width=1048576", "--config.stacks.baseline.width=1572864"]
MILLION += ["--config.activations.rows_per_forward=64", "--config.evaluation.rows_per_forward=64"]


@pytest.fixture
def no_libtpu(monkeypatch):
    """For this process, not for those it starts."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "libtpu" else real(name, *args)
    )


def configured(path, *flags):
    """The experiment of `--config path --config.field=value ...`."""
    file, _, which = path.partition(":")
    config = importlib.import_module(f"configs.{Path(file).stem}").get_config(*filter(None, [which]))
    for name, value in (flag.removeprefix("--config.").split("=") for flag in flags):
        config.update_from_flattened_dict({name: int(value) if value.isdigit() else value})
    return from_dict(Experiment, config)


def on(experiment, data, latent):
    """The tiny experiment with stacks that eight devices divide."""
    return dataclasses.replace(program_on(experiment, 1, 1).config, mesh=Mesh(data, latent))


def test_a_plan_has_the_bytes_that_a_run_allocates(experiment):
    program = program_on(experiment, 4, 2)
    report = planner.plan(dataclasses.replace(program.config, mesh=Mesh(data=4, latent=2)), "cpu:8")
    checkpoint = Checkpoint.open(experiment.lm.path)
    lm_params = checkpoint.params(checkpoint.module(1, program.mesh), experiment.lm.dtype)
    state = first_state(program)
    planned = report["bytes_per_device"]

    def here(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert report["method"] == {"bytes": "compiled", "exchanges": "compiled"}
    assert planned["language model"] == here(lm_params)
    assert planned["SAEs"] == here([stack.params for stack in state.stacks.values()])
    assert planned["optimiser"] == here([stack.second_moments for stack in state.stacks.values()])
    assert planned["buffer"] == here(state.store)
    arguments = sum(planned[name] for name in ("language model", "SAEs", "optimiser", "buffer", "rest"))
    tokens = experiment.rows_per_call // 4 * experiment.data.context_length * 4
    assert arguments == pytest.approx(here(lm_params) + here(state) + tokens, rel=0.02)


def test_what_measuring_takes_against_the_compiler():
    """Of the programs that measure SAEs, with all arrays that are there beside them."""
    case = planner.Case.build(configured("configs/quickstart.py"), Topology.parse("cpu:1"))
    config, widths = case.program.config, case.program.widths
    module = Checkpoint.open(config.lm.path).module()
    lm_params = abstract_params(module, config.lm.dtype)
    (site,), (D,) = widths, widths.values()
    R, T = config.evaluation.rows_per_forward, config.data.context_length
    stream, mean = jax.ShapeDtypeStruct((R, T, D), config.lm.dtype), jax.ShapeDtypeStruct((D,), "float32")
    last = jax.ShapeDtypeStruct((R, T, module.config.d_model), config.lm.dtype)
    tokens, mask = jax.ShapeDtypeStruct((R, T), "int32"), jax.ShapeDtypeStruct((R, T), bool)
    limit = jax.ShapeDtypeStruct((), "float32")

    def account(step, *args):
        return step.lower(*args).compile().memory_analysis()

    clean = account(
        measure._clean, (("", module),), ((site, ((site, 1e9),), ()),), {"": lm_params}, [mean], [limit], tokens, mask
    )
    waiting = [stream] * measure.AT_ONCE
    losses = account(measure._losses, module, site, lm_params, last, last, tokens, waiting).temp_size_in_bytes
    place = {"valid": mask, "typical": mask, "mean": mean, "typical_mean": mean}
    encoding = []
    for stack in case.program.stacks:
        params = jax.eval_shape(lambda stack=stack: stack.architecture.init(jax.random.key(0), stack.sae))
        settings = None, stack.config.architecture, stack.sae
        encoding.append(account(measure._reconstruct, *settings, 0, params, (stream, stream), place).temp_size_in_bytes)
    beside = clean.output_size_in_bytes + len(waiting) * stream.size * stream.dtype.itemsize
    compiled = max(clean.temp_size_in_bytes, beside + max(losses, *encoding))
    parts = case.measuring("cpu")
    assert parts["language model"] == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(lm_params))
    assert compiled < parts["temporaries"] < 2 * compiled


def test_a_run_that_cannot_be_measured_does_not_fit(experiment, monkeypatch):
    """Though it could be trained; fewer rows in a forward pass of the evaluation are the advice."""
    config = on(experiment, 4, 2)
    large = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, rows_per_forward=2**13))
    before, after = (planner.plan(each, "gpu:h100x8") for each in (config, large))
    assert before["bytes_per_device"] == after["bytes_per_device"]
    needed = after["bytes_per_device_measuring"]["total"]
    assert before["bytes_per_device_measuring"]["total"] < 0.8 * needed
    assert f"{needed / 2**30:.3f} GiB" in planner.describe(after)
    assert after["bytes_per_device"]["total"] < 0.8 * needed
    monkeypatch.setitem(CHIPS, "gpu:h100", dataclasses.replace(CHIPS["gpu:h100"], memory=int(0.8 * needed)))
    assert planner.plan(config, "gpu:h100x8")["fits"]
    report = planner.plan(large, "gpu:h100x8")
    assert not report["fits"]
    assert any("--config.evaluation.rows_per_forward=" in change["change"] for change in report["advice"])


@pytest.mark.parametrize("topology", ["cpu:8", "gpu:h100x8"])
def test_the_parts_add_up(experiment, topology):
    parts = planner.plan(on(experiment, 4, 2), topology)["bytes_per_device"]
    assert sum(parts.values()) == 2 * parts["total"]
    assert min(parts.values()) >= 0


@pytest.mark.parametrize(("shape", "rows"), [((8, 1), 16), ((4, 2), 16), ((1, 8), 2)])
def test_an_estimate_against_the_compiler(experiment, shape, rows):
    """Arguments are equal and exchanges near, with four updates of one forward pass and one update of two."""
    config = on(experiment, *shape)
    config = dataclasses.replace(config, activations=dataclasses.replace(config.activations, rows_per_forward=rows))
    case = planner.Case.build(config, Topology.parse("cpu:8"))
    parts, found, _ = case.measure()
    estimate = case.estimate()
    for name in ("language model", "SAEs", "optimiser", "buffer"):
        assert estimate[name] == parts[name]
    expected = collectives.expected(case.program, *case.arguments)

    def sent(found):
        return sum(size for _, size in found.values())

    assert sent(expected) == pytest.approx(sent(found), rel=0.15)


def test_a_plans_operations_are_the_products_of_the_method(experiment):
    """Seven products for a gated SAE and five for a baseline, of 2 B D F operations each, and little else."""
    program = program_on(experiment, 1, 1)
    alone = planner.operations(dataclasses.replace(program, stacks=()))
    B, updates = experiment.train.batch_size, experiment.updates_per_call
    for stack in program.stacks:
        products = {"gated": 7, "relu": 5}[stack.config.architecture]
        found = planner.operations(dataclasses.replace(program, stacks=(stack,))) - alone
        expected = updates * len(stack.config) * products * 2 * B * stack.sae.d_in * stack.sae.width
        assert expected < found < 1.25 * expected


def test_of_experts_those_that_a_token_uses_count(experiment, tmp_path):
    """All are held."""
    settings = json.loads((ROOT / "tests/fixtures/lms/qwen3_moe/config.json").read_text())
    settings |= {"hidden_size": 512, "moe_intermediate_size": 256, "intermediate_size": 512, "num_experts_per_tok": 4}
    settings |= {"vocab_size": 512, "max_position_embeddings": 4096}
    reports = []
    for number in (8, 64):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings | {"num_local_experts": number}))
        stacks = {
            name: dataclasses.replace(stack, site="blocks.2.hook_resid_post")
            for name, stack in on(experiment, 4, 2).stacks.items()
        }
        lm = dataclasses.replace(experiment.lm, path=str(folder))
        config = dataclasses.replace(on(experiment, 4, 2), lm=lm, stacks=stacks)
        reports.append(planner.plan(config, "gpu:h100x8"))
    few, many = reports
    assert few["flops_per_step"] == many["flops_per_step"]
    tokens = config.rows_per_call * config.data.context_length / config.updates_per_call
    attention = 2 * 512 * 4 * 8 + 2 * 512 * 2 * 8
    lm = 2 * tokens * (3 * attention + (2 * 4 * 256 + 512) * 3 * 512)
    program = planner.Case.build(config, Topology.parse("gpu:h100x8")).program
    products = planner.operations(dataclasses.replace(program, stacks=())) / config.updates_per_call
    assert lm < products < 1.05 * lm
    more = many["bytes_per_device"]["language model"] - few["bytes_per_device"]["language model"]
    assert more == pytest.approx(2 * 56 * 3 * 512 * 256 * 4 / 8, rel=0.01)


def test_a_plan_by_hand():
    """Gemma-2-2B on eight GPUs: operations, bytes, the exchange of SAEs and the time of all that."""
    report = planner.plan(configured(*GEMMA), "gpu:h100x8")
    B, D, F, N = 4096, 2304, 2**15, 3
    saes = 2 * N * (7 * 2 * B * D * F + 5 * 2 * B * D * F * 3 // 2)  # two sites
    block = 2 * D * 2048 + 2 * D * 1024 + 3 * D * 9216
    lm = 2 * 13 * block * B  # blocks 0 to 12; attention's scores are another 5%
    assert saes + lm < report["flops_per_step"] < 1.03 * saes + 1.1 * lm

    parts, parameters = report["bytes_per_device"], 2 * N * (2 * D * F + 2 * D * F * 3 // 2)
    assert parts["SAEs"] == pytest.approx(4 * parameters / 8, rel=0.01)
    assert parts["optimiser"] == pytest.approx(4 * parameters / 8, rel=0.01)
    assert parts["buffer"] == 2 * 2**20 * D * 2 / 8
    assert parts["language model"] == pytest.approx(2 * (13 * block + 256_000 * D) / 8, rel=0.01)

    sent = {exchange["kind"]: exchange["bytes_sent_per_device"] for exchange in report["exchanges_per_step"]}
    assert sent["all-gather"] == pytest.approx(7 / 8 * (2 * parameters + 2 * 13 * block / 4), rel=0.01)
    assert sent["reduce-scatter"] == pytest.approx(7 / 8 * 4 * parameters, rel=0.01)

    seconds = report["seconds_per_step"]
    assert seconds["computation"] == pytest.approx(report["flops_per_step"] / 8 / (0.4 * 989e12))
    assert seconds["exchanges"] == pytest.approx(sum(sent.values()) / 450e9)
    assert report["hours"]["in_turn"] == pytest.approx(seconds["in_turn"] * 100_000 / 3600)
    assert report["chip_hours"]["in_turn"] == pytest.approx(8 * report["hours"]["in_turn"])
    assert report["tokens_per_second"]["overlapped"] == pytest.approx(
        B / max(seconds["computation"], seconds["exchanges"])
    )
    text = planner.describe(report)
    assert text.count("ESTIMATED, not compiled") == 2
    assert "it fits" in text


@pytest.mark.usefixtures("no_libtpu")
def test_an_estimate_where_libtpu_is_not_installed():
    report = planner.plan(configured(*GEMMA), "v5e:4x4")
    assert report["method"] == {"bytes": "estimated", "exchanges": "estimated"}
    assert report["fits"]


@pytest.mark.parametrize("data", [0, *variants(8)])
def test_advice_is_checked(experiment, monkeypatch, data):
    """What does not fit comes with changes after each of which it would."""
    config = on(experiment, data, 1)
    total = planner.plan(config, "gpu:h100x8")["bytes_per_device"]["total"]
    monkeypatch.setitem(CHIPS, "gpu:h100", dataclasses.replace(CHIPS["gpu:h100"], memory=int(0.8 * total)))
    report = planner.plan(config, "gpu:h100x8")
    assert not report["fits"]
    assert "it does not fit" in planner.describe(report)
    changes = [change["change"].split() for change in report["advice"]]
    assert changes[0][-1].startswith("--config.mesh.latent=")
    assert any("--topology=" in flag for flag in changes[-1])
    for flags in changes:
        other_mesh = any("latent" in flag or "topology" in flag for flag in flags)
        assert ("--config.mesh.data=0" in flags) == (data == 8 and other_mesh)
        changed, topology = config, "gpu:h100x8"
        for flag in flags:
            name, _, value = flag.removeprefix("--").removeprefix("config.").partition("=")
            if name == "topology":
                topology = value
            else:
                changed = planner.changed(changed, {name: int(value) if value.isdigit() else value})
        assert planner.plan(changed, topology)["fits"]


def test_what_no_setting_helps(experiment, monkeypatch):
    monkeypatch.setitem(CHIPS, "gpu:h100", dataclasses.replace(CHIPS["gpu:h100"], memory=1000))
    report = planner.plan(on(experiment, 0, 1), "gpu:h100x8")
    assert report["advice"] == []
    assert planner.NO_ADVICE in planner.describe(report)


@pytest.mark.parametrize(
    ("chip", "data", "latent", "axes", "expected"),
    [
        ("v5p", 64, 8, ["data"], 400e9),  # two of the three sides of 8x8x8
        ("v5p", 64, 8, ["latent"], 200e9),
        ("v5e", 16, 1, ["data"], 200e9),
        ("gpu:h100", 8, 8, ["latent"], 450e9),  # within a node
        ("gpu:h100", 8, 8, ["data"], 50e9),  # one GPU of each node
        ("gpu:h100", 64, 1, ["data"], 400e9),  # all eight of each
        ("gpu:h100", 4, 16, ["latent"], 400e9),
        ("gpu:h100", 4, 2, ["data"], 450e9),
    ],
)
def test_how_fast_devices_exchange(chip, data, latent, axes, expected):
    assert hardware.bandwidth(CHIPS[chip], {"data": data, "latent": latent}, axes) == pytest.approx(expected)


PROGRAM = """HloModule train_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%start (p: bf16[10]) -> (bf16[10], bf16[40]) {
  %g = bf16[40]{0} all-gather(%p), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%carry (p: bf16[10]) -> bf16[40] {
  %g = bf16[40]{0} all-gather(%p), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %async-collective-start.1 = (bf16[10], bf16[40]) fusion(%x), kind=kCustom, calls=%start
  %f = f32[8] fusion(%x), kind=kCustom, calls=%carry
  %async-collective-done.1 = bf16[40] fusion(%x), kind=kCustom, calls=%carry
  %both = (f32[100]{0}, f32[100]{0}) all-reduce(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum
}

%all-reduce-scatter.2 (p: f32[40]) -> f32[10] {
  %r = f32[40] all-reduce(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  ROOT %part = f32[10] dynamic-slice(%r, %i), dynamic_slice_sizes={10}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %k = f32[10]{0:T(8)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %v = (s32[], f32[8]) while(%t), condition=%condition, body=%carry, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[10], f32[20]) all-gather-start(%x), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %d = f32[20] all-gather-done(%s)
  %p = f32[50] collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %a = f32[100] reduce-scatter(%x), replica_groups={}
}
"""


def test_exchanges_of_a_program():
    """Once if asynchronous, as often as a loop runs, and along the axes that its groups say in one of four ways."""
    found = collectives.compiled(PROGRAM, {"data": 4, "latent": 2})
    assert found == {
        ("all-gather", ("data",)): (5 + 3, (5 + 3) * 3 / 4 * 80),
        ("all-reduce", ("data",)): (5, 5 * 2 * 3 / 4 * 800),
        ("all-gather", ("latent",)): (1, 40),
        ("collective-permute", ("latent",)): (1, 200),
        ("reduce-scatter", ("data",)): (1, 3 * 40),
        ("reduce-scatter", ("data", "latent")): (1, 7 * 400),
    }


@pytest.mark.parametrize(
    ("topology", "facts"),
    [
        ("v9:4x4", ("v5e:4x4, ", "known: v4, v5e, v5p, v6e, gpu:a100, ", ", cpu")),
        ("v5e", ("how many devices", "such as v5e:4x4")),
        ("v5p:0x4", ("how many devices", "such as v5p:2x2x2")),
        ("gpu:h100", ("how many devices", "such as gpu:h100x8")),
        ("gpu:h100x0", ("how many devices", "such as gpu:h100x8")),
        ("gpu:h1000x8", ("v5e:4x4, ", "did you mean 'gpu:h100'")),
        ("cpu", ("how many devices", "such as cpu:8")),
        ("cpu:2x2", ("how many devices", "such as cpu:8")),
        ("gpu:v100x8", ("v5e:4x4, ", "did you mean 'gpu:h100'")),
        ("cpu:0", ("how many devices", "such as cpu:8")),
        ("cpu:16", ("8 CPU devices",)),
    ],
)
def test_topologies_that_there_are_not(experiment, topology, facts):
    with refused("--topology", repr(topology), *facts):
        planner.plan(experiment, topology)


@pytest.mark.parametrize(
    ("data", "latent", "field", "facts"),
    [
        (0, 3, "mesh.latent", ("is 3;", "divisor", "8")),
        (0, 16, "mesh.latent", ("is 16;", "divisor", "8")),
        (3, 1, "mesh.data", ("is 3,", "mesh.latent 1", "8 devices", "write 8, or 0")),
        (8, 2, "mesh.data", ("is 8,", "mesh.latent 2", "8 devices", "write 4, or 0")),
    ],
)
def test_a_mesh_that_a_topology_has_not(experiment, data, latent, field, facts):
    with refused(field, *facts):
        planner.plan(dataclasses.replace(experiment, mesh=Mesh(data, latent)), "gpu:h100x8")


@pytest.mark.tpu
@pytest.mark.parametrize("latent", [1, 2, 4, 8, 16])
def test_a_mesh_of_any_shape_on_a_torus(experiment, latent):
    """Also where no side, and no product of sides, has the size of an axis."""
    mesh = planner.mesh_of(on(experiment, 0, latent), Topology.parse("v6e:4x4"))
    assert dict(mesh.shape) == {"data": 16 // latent, "latent": latent}


@pytest.mark.tpu
def test_what_a_compiler_refuses():
    """It says how much it would take, arguments and all."""
    report = planner.plan(configured("configs/quickstart.py", f"--config.activations.buffer_size={2**26}"), "v5e:2x2")
    parts = report["bytes_per_device"]
    assert not report["fits"]
    assert parts["buffer"] == 2**26 * 256 * 4 / 4  # all that a chip has
    assert parts["buffer"] < parts["total"] < 1.1 * parts["buffer"]


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "arguments", "gigabytes"),
    [("v5e:4x4", GEMMA, (4, 16)), ("v5p:8x8x8", MILLION, (8, 24))],
)
@pytest.mark.usefixtures("no_libtpu")
def test_a_plan_for_tpus(topology, arguments, gigabytes):
    began = time.monotonic()
    command = [sys.executable, "-m", "gsae_jax.plan", "--topology", topology, "--json", "--config", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest child so far
    print(f"{topology}: {time.monotonic() - began:.0f} s, {host:.2f} GiB of host memory")
    assert host < 12
    report = json.loads(done.stdout)
    parts, low_high = report["bytes_per_device"], [size * 2**30 for size in gigabytes]
    assert report["method"] == {"bytes": "compiled", "exchanges": "compiled"}
    assert report["devices"] == math.prod(Topology.parse(topology).sides)
    assert report["fits"]
    assert low_high[0] < parts["total"] < low_high[1]
    assert sum(parts.values()) == 2 * parts["total"]
    estimate = planner.plan(configured(*arguments), topology)
    assert estimate["method"] == {"bytes": "estimated", "exchanges": "estimated"}
    assert estimate["bytes_per_device"]["SAEs"] == parts["SAEs"]
    assert estimate["bytes_per_device"]["temporaries"] == pytest.approx(parts["temporaries"], rel=0.45)


def test_what_a_store_takes_and_saves(config_dict, tmp_path):
    report = planner.plan(from_dict(Experiment, config_dict), "cpu:8", bandwidth_of_store=0.5)
    storing.of_model(config_dict, storing.Wanted(str(tmp_path / "store")))
    manifest = store.Store.open(tmp_path / "store").manifest
    stored = report["store"]
    assert stored["bytes"] == stored["tokens"] * manifest.row_bytes // manifest.context_length
    assert manifest.rows["train"] == stored["tokens"] // manifest.stride
    np.testing.assert_allclose(stored["seconds_to_read_per_step"], 64 * stored["bytes"] / stored["tokens"] / 0.5e9)
    # The model's first block: attention's four products and scores, and W_in. Two sites end at the MLP.
    T, D, F = 16, 32, 64
    forward = 64 * (2 * (4 * D * D + 2 * T * D) + 2 * 2 * D * F)
    share = stored["forward_share"]
    np.testing.assert_allclose(share * report["flops_per_step"], forward, rtol=0.35)  # norms and softmax are small here
    np.testing.assert_allclose(stored["operations_of_runs"]["5"], 1 - share + share / 5)
    with refused("data.source"):
        config_dict.data.source = f"store:{tmp_path / 'store'}"
        planner.plan(from_dict(Experiment, config_dict), "cpu:8")
