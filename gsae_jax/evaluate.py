"""Measure the SAEs of a run on held-out text and write its report.

python -m gsae_jax.evaluate --workdir runs/quickstart [--tokens 1000000] [--ito 5,10,20,40]
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import tqdm
from absl import flags
from etils import epath

from gsae_jax import cli, processes, runs
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax import workdir as workdir_lib
from gsae_jax.config import ConfigError, TrainingError
from gsae_jax.data.rows import held_out
from gsae_jax.evaluation import measure, report
from gsae_jax.lms import loading


def evaluate(
    path: epath.PathLike,
    tokens: int | None = None,
    ito: Sequence[int] = (),
    published: str = "",
    step: int | None = None,
) -> str:
    """Measure a run on held-out tokens (its config's number by default) and write its report; returns the table.

    Args:
        path: the run's directory.
        tokens: how many.
        ito: numbers of features for inference-time optimisation (`measure.measure`).
        published: a CSV file of points to draw beside ours (`report.read_published`).
        step: of which checkpoint; by default the newest that is whole.

    Raises:
        ConfigError: not a run with a checkpoint, or too little held-out text.
        TrainingError: the report cannot be written.
    """
    workdir = workdir_lib.Workdir(path)
    points = report.read_published(published) if published else []
    config = workdir.experiment()
    # On whichever machine this is; features along `latent` as in training, where it has as many devices.
    latent = config.mesh.latent if jax.device_count() % config.mesh.latent == 0 else 1
    spread = config.evaluation.rows_per_forward % (jax.device_count() // latent) == 0
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=0, latent=latent) if spread else config.mesh)
    step = workdir.sound_step(("params", "facts"), step)
    saes = runs.load(path, mesh, step)
    narrowest = min(sae.config.width for sae in saes.values())
    if ito and max(ito) > narrowest:
        raise ConfigError("--ito", f"is {max(ito)} at most; the run has SAEs of {narrowest} features, write no more")
    lm = loading.load_lm(config.lm.path, revision=config.lm.revision, dtype=config.lm.dtype, mesh=mesh)
    batches = list(held_out(config, lm.tokenizer, config.evaluation.tokens if tokens is None else tokens))
    special_tokens = lm.special_tokens if config.activations.drop_special_tokens else ()
    with tqdm.tqdm(total=2 * len(batches), unit="batch", desc="evaluate", disable=not processes.first()) as bar:
        sums = measure.measure(lm, list(saes.values()), batches, special_tokens, bar.update, ito)
    model = config.lm.path or "gelu-1l-stdlib (embedded)"
    records = report.rows(Path(model).name, saes, sums)
    gates = report.gates(saes)
    if processes.first():
        try:
            report.write(workdir.report, step, records, sums, workdir_lib.read_metrics(workdir), gates, points)
        except OSError as error:
            raise TrainingError(
                f"the report cannot be written to {workdir.report} ({error}); make room, and run the command again"
            ) from error
    return report.table(records)


def main() -> None:
    """The command."""
    if TOKENS.value is not None and TOKENS.value < 1:
        raise ConfigError("--tokens", f"is {TOKENS.value}; write 1 or more")
    if not all(number.isdigit() and int(number) for number in ITO.value) or len({*ITO.value}) < len(ITO.value):
        raise ConfigError(
            "--ito", f"is {','.join(ITO.value)!r}; write different numbers of features such as 5,10,20,40"
        )
    table = evaluate(WORKDIR.value, TOKENS.value, [int(number) for number in ITO.value], PUBLISHED.value, STEP.value)
    processes.say(f"{table}\n\nreport: {workdir_lib.Workdir(WORKDIR.value).report / 'report.md'}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string(
        "workdir", None, "Directory of a training run, local or gs://bucket/folder.", required=True
    )
    TOKENS = flags.DEFINE_integer("tokens", None, "Held-out tokens; the config's evaluation.tokens by default.")
    ITO = flags.DEFINE_list(
        "ito", [], "Also measure the dictionaries by gradient pursuit: 5,10,20,40 features a token."
    )
    STEP = flags.DEFINE_integer("step", None, "Of which checkpoint; by default the newest that is whole.")
    PUBLISHED = flags.DEFINE_string("published", "", "A CSV file of points to draw beside ours.")
    cli.run(main, several=True)
