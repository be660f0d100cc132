"""Measure the SAEs of a run on held-out text and write its report.

python -m gsae_jax.evaluate --workdir runs/quickstart [--tokens 1000000]
"""

from pathlib import Path

import jax
import tqdm
from absl import flags

from gsae_jax import cli, runs
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax import workdir as workdir_lib
from gsae_jax.config import ConfigError, Experiment
from gsae_jax.data import rows as rows_lib
from gsae_jax.evaluation import measure, report
from gsae_jax.lms import loading


def evaluate(path: Path, tokens: int | None = None) -> str:
    """Measure a run on held-out tokens (its config's number by default) and write its report; returns the table."""
    workdir = workdir_lib.Workdir(path)
    config = config_lib.from_dict(Experiment, workdir.config())
    tokens = config.evaluation.tokens if tokens is None else tokens
    saes = runs.load(path)
    lm = loading.load_lm(config.lm.path, dtype=config.lm.dtype)
    rows = rows_lib.open_rows(config.data, "test", lm.tokenizer, limit=tokens)
    per_batch = config.evaluation.rows_per_forward
    batches = max(1, tokens // (per_batch * config.data.context_length))
    if len(rows) < per_batch:
        raise ConfigError(
            "evaluation.rows_per_forward",
            f"is {per_batch}, but the held-out text has {len(rows)} rows; write less, or add text",
        )
    batches = min(batches, len(rows) // per_batch)
    # Nothing here is split along `latent`: every device takes rows, where they divide.
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=0, latent=1) if per_batch % jax.device_count() == 0 else config.mesh)
    with tqdm.tqdm(total=batches, unit="batch", desc="evaluate") as bar:
        sums = measure.measure(
            lm, list(saes.values()), rows_lib.in_order(rows, per_batch, batches * per_batch), mesh, bar.update
        )
    model = config.lm.path or "gelu-1l-stdlib (embedded)"
    records = report.rows(Path(model).name, saes, sums)
    report.write(workdir.report, records, sums, workdir_lib.read_metrics(workdir))
    return report.table(records)


def main() -> None:
    """The command."""
    if TOKENS.value is not None and TOKENS.value < 1:
        raise ConfigError("--tokens", f"is {TOKENS.value}; write 1 or more")
    print(evaluate(Path(WORKDIR.value), TOKENS.value))
    print(f"\nreport: {workdir_lib.Workdir(Path(WORKDIR.value)).report / 'report.md'}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.", required=True)
    TOKENS = flags.DEFINE_integer("tokens", None, "Held-out tokens; the config's evaluation.tokens by default.")
    cli.run(main)
