"""SAELens' own trainer on activations in a file, in the peers' environment: for from_scratch.py.

Prints a line of JSON for each checkpoint: seconds of training so far, without those of saving, and the file with the
parameters for the activations as they are.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


def main():
    """Train, and save."""
    options = json.loads(sys.argv[1])
    activations, folder = np.load(options["activations"], mmap_mode="r"), Path(options["folder"])
    (N, D), B, steps, warmup = activations.shape, options["batch"], options["steps"], options["warmup"]
    torch.manual_seed(0)

    def batches():
        while True:
            for start in range(0, N - B + 1, B):
                yield torch.from_numpy(np.array(activations[start : start + B]))

    began, saving, number = time.perf_counter(), 0.0, 0

    def save(checkpoint_path=None):
        nonlocal saving, number
        now = time.perf_counter()
        factor = trainer.activation_scaler.scaling_factor or 1.0  # folded into the parameters at the end
        arrays = {name: value.detach().numpy() for name, value in sae.state_dict().items()}
        path = folder / f"{number}.npz"
        np.savez(path, factor=factor, **arrays)
        print(json.dumps({"seconds": now - began - saving, "file": str(path)}), flush=True)
        number, saving = number + 1, saving + time.perf_counter() - now

    sae = GatedTrainingSAE(
        GatedTrainingSAEConfig(
            d_in=D,
            d_sae=options["width"],
            l1_coefficient=options["l1_coefficient"],
            normalize_activations="expected_average_only_in",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=steps * B,
        train_batch_size_samples=B,
        lr=options["learning_rate"],
        lr_end=0.0,
        lr_warm_up_steps=warmup,
        lr_decay_steps=steps - warmup,
        n_checkpoints=options["checkpoints"],
        n_batches_for_norm_estimate=20,
    )
    trainer = SAETrainer(config, sae, batches(), save_checkpoint_fn=save)
    began = time.perf_counter()
    trainer.fit()
    save()


if __name__ == "__main__":
    main()
