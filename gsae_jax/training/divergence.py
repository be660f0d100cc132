"""SAEs that diverge: which, since when, and what is written about them."""

import json
from typing import Any

import jax
import numpy as np

from gsae_jax import processes
from gsae_jax.config import Experiment
from gsae_jax.storage import reading, run_directory, writing
from gsae_jax.training.progress import Progress

FAR = 10  # an SAE has diverged whose squared error is more than this many times that of a zero reconstruction


class Divergence:
    """Watches for SAEs that diverge: whose numbers are not finite, or whose error is far above that of zeros."""

    def __init__(
        self, config: Experiment, widths: dict[str, int], progress: Progress, skips: dict[str, dict[str, Any]]
    ):
        """`widths`: of the sites; `skips`: the attribute as the checkpoint recorded it."""
        self._config, self._widths, self._progress = config, widths, progress
        self._far: set[str] = set()
        # SAE that skips updates -> the step of the call in which that began, and the tokens of that call.
        self.skips = dict(skips)
        self.lost: list[str] = []

    def look(self, step: int, statistics: dict[str, dict[str, jax.Array]], tokens_RxT: np.ndarray | None) -> None:
        """Say which SAEs begin to diverge in the call that ended at this step; may be called twice for a step."""
        fields = ("skipped_in_row", "mse", "x_hat_sq", "x_hat_dot_x")
        values = jax.device_get({name: {field: of[field] for field in fields} for name, of in statistics.items()})
        self.count(step, {name: of["skipped_in_row"] for name, of in values.items()}, tokens_RxT)
        # A wide random dictionary begins with large reconstructions.
        if step <= max(self._config.train.warmup_steps, self._config.train.steps // 10):
            return
        for name, of in values.items():
            # The squared error of a zero reconstruction, divided by D. The scale makes it 1 in the mean, and some
            # batches have more.
            D = sum(self._widths[site] for site in self._config.stacks[name].targets)
            zero_N = np.maximum(1, of["mse"] + (2 * of["x_hat_dot_x"] - of["x_hat_sq"]) / D)
            for index, far in enumerate(of["mse"] > FAR * zero_N):
                sae = f"{name}_{index}"
                if not far:
                    self._far.discard(sae)
                elif sae not in self._far:
                    self._far.add(sae)
                    self._progress.say(
                        f"step {step:,}: {sae} has diverged: its squared error is more than {FAR} times that of a zero "
                        "reconstruction; lower its learning rate in a new run"
                    )

    def count(self, step: int, in_row: dict[str, Any], tokens_RxT: np.ndarray | None = None) -> None:
        """Record since when SAEs skip updates, and which are `lost`, by how many each skipped in a row."""
        per_call = self._config.updates_per_call
        counts = {f"{name}_{i}": int(n) for name, of in jax.device_get(in_row).items() for i, n in enumerate(of)}
        for sae, skipped in counts.items():
            began = -(-(step - skipped + 1) // per_call) * per_call
            if skipped == 0:
                self.skips.pop(sae, None)
            elif self.skips.get(sae, {}).get("step") != began:
                # Checkpoints of earlier versions do not have the tokens of the calls before them.
                tokens = None if tokens_RxT is None or began != step else tokens_RxT.tolist()
                self.skips[sae] = {"step": began, "tokens": tokens}
                self._progress.say(f"step {began:,}: {sae} skips updates: its loss or gradients are not finite")
        self.lost = [sae for sae, skipped in counts.items() if skipped >= self._config.train.max_skipped]

    def write(self, workdir: run_directory.Workdir, step: int) -> str:
        """Add the SAEs that are lost to `diverged.json` in the run's directory; returns the message."""
        path = workdir.path / "diverged.json"
        if processes.first():
            try:
                records = reading.load_json(path)
            except (OSError, ValueError):
                records = {}
            for sae in self.lost:
                earlier, record = records.get(sae), self.skips[sae]
                same = isinstance(earlier, dict) and earlier.get("step") == record["step"]
                if earlier is None or not (same or record["tokens"] is None):
                    records[sae] = record
            writing.write_text(path, json.dumps(records) + "\n")
        since = ", ".join(f"{sae} since step {self.skips[sae]['step']:,}" for sae in self.lost)
        return (
            f"not finite in {self._config.train.max_skipped} updates in a row: {since}; step {step:,} is saved and "
            f"{path} has the tokens that were read when it began; lower the learning rate of these SAEs in a new run"
        )
