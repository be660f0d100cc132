"""One peer's gated SAE, in a process of its own in the peers' environment: does what peers.py asks for, line by line.

A step is what the library's own loop does with a batch, less logging, evaluation and the source of activations.
"""

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

STEPS = 5  # of the check
NAMES = {  # ours -> dictionary_learning's, transposed
    "W_gate": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
}


def sae_lens(options):
    """(its trainer, a function that makes a step): the body of `SAETrainer.fit`."""
    from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=options.D, d_sae=options.F, device=options.device))
    if options.compiled:  # what its runner does with `compile_sae`
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    config = SAETrainerConfig(10**12, options.B, lr_end=3e-5, device=options.device)  # lr_end as its runner sets it
    trainer = SAETrainer(config, sae, iter(()))

    def step(x):
        trainer.step(x)
        trainer.n_training_steps += 1

    return trainer, step


def dictionary_learning(options):
    """(its trainer, a function that makes a step): the body of `trainSAE`, with constant schedules."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    trainer = GatedSAETrainer(
        steps=10**9,
        activation_dim=options.D,
        dict_size=options.F,
        layer=0,
        lm_name="",
        lr=options.learning_rate,
        l1_penalty=options.l1_coefficient * options.D,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device=options.device,
    )
    trainer.optimizer.param_groups[0]["eps"] *= options.D
    return trainer, lambda x: trainer.update(0, x)


def check(trainer, step, batch, path):
    """Train dictionary_learning's SAE from the parameters in a file; leaves there the trained ones and the losses."""
    parameters = dict(trainer.ae.named_parameters())
    with np.load(path) as start, torch.no_grad():
        for name, theirs in NAMES.items():
            parameters[theirs].copy_(torch.from_numpy(start[name].T))
    losses = []
    for x in map(batch, range(STEPS)):
        with torch.no_grad():
            losses.append(trainer.loss(x, 0).item())
        step(x)
    trained = {name: parameters[theirs].detach().cpu().numpy().T for name, theirs in NAMES.items()}
    np.savez(path, losses=losses, **trained)


def account(trainer, library):
    """Versions, threads, and the bytes of parameters and optimizer state for each parameter."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    held = sum(tensor.numel() * tensor.itemsize for tensor in (*parameters, *moments))
    return {
        "version": metadata.version(library.replace("_", "-")),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "bytes_per_parameter": held / sum(p.numel() for p in parameters),
    }


def main():
    """Answer each line of the input with one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=("sae_lens", "dictionary_learning"))
    for name, kind in (("D", int), ("F", int), ("B", int), ("l1_coefficient", float), ("learning_rate", float)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--device")
    parser.add_argument("--compiled", type=int)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # the libraries may print
    torch.backends.cuda.matmul.allow_tf32 = True  # as in JAX
    torch.manual_seed(0)

    def batch(number):
        x = np.random.default_rng(number).standard_normal((options.B, options.D), np.float32)
        return torch.from_numpy(x).to(options.device)

    def timed_step(x):
        start = time.perf_counter()
        step(x)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    trainer, step = globals()[options.library](options)
    x = batch(0)
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        if order == "check":
            answer = check(trainer, step, batch, Path(argument))
        else:
            answer = timed_step(x) if order == "step" else account(trainer, options.library)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
