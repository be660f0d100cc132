"""The gated SAE's step here, in SAELens and in dictionary_learning: one shape, one machine, one run.

    python benchmarks/peers.py [--out benchmarks/results/peers-NAME.json]

The peers are PyTorch libraries, installed on first use in an environment of their own (`build/peers`). Each trains in
its own process by its own trainer (`peers_worker.py`), on as many threads as PyTorch takes by itself: one SAE, float32
(TF32 products on GPUs), one batch of normal activations. A step of each and three plain products in JAX take turns. One
line for each: seconds of a step (the median), how many times ours, the share of it that a gated SAE's seven products
(see step.py) would take at the plain ones' rate, and bytes of parameters and optimizer state for each parameter.

Before that, dictionary_learning, which has the paper's loss as we have, takes five steps from our parameters on our
batches. It differs in form only: its loss is ours times D, so it gets D times the l1 coefficient and D times Adam's
eps. SAELens' loss is another: its auxiliary term trains the decoder, its L1 term weighs features by decoder norms.
(By torch's FlopCounterMode a step of SAELens takes thirteen such products, one of dictionary_learning eight.)

With `--active 49` biases open about as many features of a token, as in a trained SAE, and our sparse step takes part.
The peers' steps take as long with few active features as with many.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers use the same GPU

import common
import jax
import numpy as np
from peers_environment import environment
from sparse import UPDATES, opened
from step import PRODUCTS, build, products, program, stepper

WARMUP = 3  # rounds
OURS = "gsae_jax", "gsae_jax, sparse step"


class Peer:
    """A peer's process, asked line by line."""

    def __init__(self, library, **options):
        self.library = library
        worker = [environment(), Path(__file__).with_name("peers_worker.py"), library]
        worker += [f"--{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line):
        """Its answer."""
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.library} ended; why is above")
        return json.loads(answer)


def apart(peer, compiled, state, x):
    """How far the same training in dictionary_learning and here comes apart, relatively: (loss, {parameter: norm}).

    A loss by itself, a parameter by how far it has moved; the largest, and at the end.
    """
    start = {name: np.asarray(value[0]) for name, value in state.params.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parameters.npz"
        np.savez(path, **start)
        peer.ask(f"check {path}")
        theirs = dict(np.load(path))
    losses = []
    for number in range(len(theirs["losses"])):
        batch = np.random.default_rng(number).standard_normal(x.shape, np.float32)
        state, statistics = compiled(state, jax.device_put(batch, x.sharding))
        losses.append(float(statistics["loss"][0, 0]) * x.shape[1])
    return float(np.max(np.abs(losses / theirs["losses"] - 1))), {
        name: float(np.linalg.norm(value[0] - theirs[name]) / np.linalg.norm(theirs[name] - start[name]))
        for name, value in state.params.items()
    }


def size(tree):
    """Bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def timed(function, steps=1):
    """The function, which makes so many steps, answering how long one took."""

    def call():
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) / steps

    return call


def main():
    """Print a line for each library, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--compiled", action="store_true", help="SAELens with its compile_sae too; wants a C++ compiler"
    )
    parser.add_argument("--active", type=int, default=0, help="active features of a token, for the sparse step")
    for name, default in (("D", 512), ("F", 8192), ("B", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if jax.device_count() > 1:
        parser.error("the peers train on one device; show JAX one only (CUDA_VISIBLE_DEVICES=0)")
    D, F, B = arguments.D, arguments.F, arguments.B
    stack, mesh, x = build("gated", D, F, B, 1, "float32")
    ((l1_coefficient, learning_rate, _),) = stack.config.numbers()
    options = {"D": D, "F": F, "B": B, "l1_coefficient": l1_coefficient, "learning_rate": learning_rate}
    options["device"] = "cuda" if jax.default_backend() == "gpu" else "cpu"
    peers = {"SAELens": Peer("sae_lens", **options), "dictionary_learning": Peer("dictionary_learning", **options)}
    if arguments.compiled:
        peers["compiled SAELens"] = Peer("sae_lens", compiled=1, **options)

    compiled, state = program(stack, mesh, x)
    bytes_per_parameter = 4 * size((state.params, state.second_moments)) / size(state.params)
    loss, norms = apart(peers["dictionary_learning"], compiled, state, x)
    farthest = max(norms, key=norms.get)
    note = (
        f"Trained alike, dictionary_learning's loss and ours come {loss:.1g} apart, relatively; parameters, relatively "
        f"to how far they moved, at most {norms[farthest]:.1g} ({farthest})."
    )
    print(note)

    # With a learning rate of 0 as many features stay active.
    prepare = partial(opened, x=x, active=arguments.active) if arguments.active else lambda state: state
    rate = 0.0 if arguments.active else 1.0
    ours = {OURS[0]: timed(stepper(stack, mesh, x, rate, prepare=prepare)[0])}
    if arguments.active:
        sparse_stack, *_ = build("gated", D, F, B, 1, "float32", "sparse")
        step, _ = stepper(sparse_stack, mesh, x, rate, UPDATES, prepare)
        ours[OURS[1]] = timed(step, UPDATES)
    makers = ours | {"products": timed(products(D, F, B, 1, "float32"))}
    makers |= {name: partial(peer.ask, "step") for name, peer in peers.items()}
    taken: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(WARMUP + arguments.rounds):
        for name, make in makers.items():
            taken[name].append(make())
    seconds = {name: median(times[WARMUP:]) for name, times in taken.items()}
    needed = PRODUCTS["gated"] * seconds.pop("products") / 3

    accounts = {name: peer.ask("account") for name, peer in peers.items()}
    our_seconds = seconds[list(ours)[-1]]
    results = []
    for name, step_seconds in seconds.items():
        account = accounts.get(name, {"version": "", "bytes_per_parameter": bytes_per_parameter})
        result = {
            "library": f"{name} {account['version']}".strip(),
            "D": D,
            "F": F,
            "B": B,
            **({"active": arguments.active} if arguments.active else {}),
            "step_seconds": step_seconds,
            "times_ours": step_seconds / our_seconds,
            "activations_per_second": B / step_seconds,
            "of_product_rate": needed / step_seconds,
            "bytes_per_parameter": account["bytes_per_parameter"],
        }
        results.append(result)
        print(
            f"{result['library']:>26}: {1e3 * step_seconds:,.1f} ms, {result['times_ours']:.2f} times ours, "
            f"{B / step_seconds:,.0f} activations/s, {result['of_product_rate']:.0%} of the products' own rate, "
            f"{result['bytes_per_parameter']:.2f} bytes a parameter"
        )
    torch = {name: accounts["SAELens"][name] for name in ("torch", "torch_threads")}
    print(f"torch {torch['torch']} with {torch['torch_threads']} threads")
    common.write(arguments.out, results, (note,), **torch)


if __name__ == "__main__":
    main()
