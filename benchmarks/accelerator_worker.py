"""One measurement of `accelerator.py`, in a process of its own: prints its lines as JSON, the last of its output.

What fails is a line too: a device that has too little memory, or an error, whose traceback goes to stderr.
"""

import dataclasses
import itertools
import json
import re
import sys
import traceback
from functools import partial
from pathlib import Path

try:
    import common
    import jax
    import jax.numpy as jnp
    import numpy as np
    import pipeline
    from sparse import UPDATES, opened
    from step import SHAPES, build, products, seconds, stepper

    import gsae_jax
    from gsae_jax import mesh as mesh_lib
    from gsae_jax.lms import gpt2
    from gsae_jax.lms.checkpoints import Checkpoint, abstract_params
    from gsae_jax.planning.planner import Case
    from gsae_jax.training import starting
    from gsae_jax.training.step import Program
except ImportError as error:
    raise SystemExit(f"The package {error.name} is missing here, and nothing runs without it.") from error

ACTIVE = 48  # features of a token, in the mean
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured on a platform.

    Attributes:
        steps: architecture, D, F, B, N.
        dtypes: of the products.
        peers: D, F, B.
        lm: of the pipeline, as in GPT-2's `config.json`.
        site: of its SAE.
        width: of its SAE.
        rows: of tokens in a forward pass.
        context: tokens of a row.
        batch: activations in an update.
        rounds: of which the median is taken.
    """

    steps: list
    dtypes: tuple
    peers: list
    lm: dict
    site: str
    width: int
    rows: int
    context: int
    batch: int
    rounds: int


SIZES = {
    "gpu": Sizes(
        steps=SHAPES["gpu"],
        dtypes=("float32", "bfloat16"),
        peers=[(512, 8192, 2048), (768, 24576, 4096)],
        lm=GPT2,
        site="blocks.8.hook_resid_pre",
        width=24576,
        rows=32,
        context=512,
        batch=4096,
        rounds=9,
    ),
    "cpu": Sizes(
        steps=[("gated", 64, 512, 128, 1)],
        dtypes=("float32",),
        peers=[(64, 512, 128)],
        lm=GPT2 | {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2},
        site="blocks.1.hook_resid_pre",
        width=512,
        rows=4,
        context=64,
        batch=128,
        rounds=3,
    ),
}


def machine():
    """What the measurements are made on, and what they are: (part, key) of each, those that matter most first."""
    platform = jax.default_backend()
    sizes, names = SIZES[platform], ("architecture", "D", "F", "B", "N", "dtype", "step")
    values = [(*shape, dtype, how) for shape in sizes.steps for dtype in sizes.dtypes for how in ("dense", "sparse")]
    steps = [("step", dict(zip(names, each, strict=True))) for each in values]
    pipelines = [("pipeline", {"dtype": dtype}) for dtype in reversed(sizes.dtypes)]
    peers = [("peers", dict(zip("DFB", shape, strict=True))) for shape in sizes.peers]
    functions = re.findall(r"^def (test_\w+)", (common.ROOT / "tests" / "test_gpu.py").read_text(), re.MULTILINE)
    tests = [("tests", {"function": name}) for name in functions]
    order = [*tests, *steps[:8], *pipelines[:1], *steps[8:], *pipelines[1:], *peers]
    return [{"platform": platform, "facts": common.facts(), "order": order}]


def peak():
    """The most bytes that the device had allocated so far; None where it does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def step(architecture, D, F, B, N, dtype, step):
    """The line of a step."""
    stack, mesh, x = build(architecture, D, F, B, N, dtype, step)
    prepare = partial(opened, x=x, active=min(ACTIVE, F // 8))
    run, memory = stepper(stack, mesh, x, rate=0.0, updates=UPDATES, prepare=prepare)
    run()
    peak_bytes = peak()
    rounds = SIZES[mesh_lib.platform(mesh)].rounds
    call, three = seconds((run, products(D, F, B, N, dtype)), rounds)
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return [
        {
            "step_seconds": call / UPDATES,
            "activations_per_second": B * UPDATES / call,
            "products": call / UPDATES / (three / 3),
            "planned_bytes": planned + memory.temp_size_in_bytes,
            "peak_bytes": peak_bytes,
        }
    ]


def random_language_model(program, dtype):
    """Parameters of an untrained language model."""
    like, bare = abstract_params(program.module, dtype), dataclasses.replace(program.module, mesh=None)

    def init():
        params = bare.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method="hidden")["params"]
        return jax.tree.map(lambda value, like: value.astype(like.dtype), params, like)

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))()


def whole(dtype):
    """The lines of the pipeline."""
    sizes = SIZES[jax.default_backend()]
    fresh = sizes.rows * sizes.context
    lm = gpt2.config({"model_type": "gpt2", **sizes.lm})
    checkpoint = Checkpoint("random", Path(), "", "gpt2", gpt2, lm)
    config = gsae_jax.experiment(
        lm={"dtype": dtype},
        data={"context_length": sizes.context},
        activations={"rows_per_forward": sizes.rows, "buffer_size": 32 * fresh, "scale_tokens": fresh},
        stacks={
            "gated": {
                "architecture": "gated",
                "site": sizes.site,
                "width": sizes.width,
                "l1_coefficients": (1e-2,),
                "learning_rates": (1e-3,),
            }
        },
        train={"steps": 400, "batch_size": sizes.batch, "warmup_steps": 40, "compute_dtype": dtype},
        loggers=(),
    )
    program = Program.build(config, mesh_lib.make_mesh(config.mesh), checkpoint, special_tokens=())
    lm_params, random = random_language_model(program, dtype), np.random.default_rng(0)
    shape = (config.rows_per_call, sizes.context)
    stream = (random.integers(0, sizes.lm["vocab_size"], shape, np.int32) for _ in itertools.count())
    state = starting.start(program, lm_params, stream)
    state, *_ = jax.block_until_ready(program.train_step(state, lm_params, program.source.place(next(stream))))
    memory = {"peak_bytes": peak()}
    memory["estimated_bytes"] = Case.of(program, checkpoint).estimate()["total"]
    rows, _ = pipeline.measure(program, lm_params, stream, state, sizes.rounds, calls=3)
    rate = config.updates_per_call * sizes.batch / rows[0]["call_seconds"]
    rows[0] |= {"activations_per_second": rate} | memory
    return rows


PARTS = {"machine": machine, "step": step, "pipeline": whole}


def main():
    """Measure what the argument says: `{"part": NAME, ...}`, with the arguments of the part's function."""
    order = json.loads(sys.argv[1])
    try:
        lines = PARTS[order.pop("part")](**order)
    except Exception as error:
        traceback.print_exc()
        exhausted = re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE)
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        lines = [{"outcome": "out of memory"} if exhausted else {"outcome": "failed", "why": why}]
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
