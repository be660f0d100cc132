"""Write the SAEs of a run for other libraries, each as a folder.

python -m gsae_jax.export --workdir runs/quickstart --format saelens --out OUT [--sae gated_1] [--step N]

Without --sae, OUT gets one folder for each SAE. With --sae, OUT is the folder of that SAE. --workdir may also be
an exported folder, or any SAE that gsae_jax.load reads.
"""

import logging
import os

from absl import flags

from gsae_jax import cli, errors, plugins, sae_loading
from gsae_jax.errors import UserError, known_names
from gsae_jax.formats import records
from gsae_jax.saes import trained
from gsae_jax.storage import writing

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def export(path: str, format: str, out: str, name: str = "", step: int | None = None) -> list[str]:
    """Write one SAE or all SAEs of a run to a new folder, and return their names. If there is an error, write nothing.

    Raises:
        UserError: the SAE, step or format does not exist, the format cannot store one of the SAEs, `out` exists, or all
            SAEs have diverged. If only some have diverged, they are left out with a warning.
    """
    with errors.about("--format"):
        module = plugins.load("formats", format, having="write")
    with errors.about("--workdir", step="--step"):
        saes = sae_loading.load(path, step=step)
    if name:
        if name not in saes:
            raise UserError(f"{name!r} is not in {path}; {known_names(name, saes)}", "--sae")
        with errors.about("--out"):
            module.write(saes[name], out)
        return [name]
    with errors.about("--out"):
        return write(saes, format, out)


def write(saes: dict[str, trained.SAE], format: str, out: str | os.PathLike[str]) -> list[str]:
    """Write a new folder with a folder for each SAE, or nothing; returns and raises what `export` does."""
    with errors.about("--format"):
        module = plugins.load("formats", format, having="write")
    failed: dict[str, UserError] = {}
    with writing.new_folder(out) as folder:
        for sae in saes.values():
            try:
                module.write(sae, folder / sae.name)
            except UserError as error:
                failed[sae.name] = error
        written = [name for name in saes if name not in failed]
        records.raise_for(failed, written)
    for why in failed.values():
        logger.warning(f"{why}. This SAE is not exported")
    return written


def main() -> None:
    """The command."""
    written = export(WORKDIR.value, FORMAT.value, OUT.value, SAE.value, STEP.value)
    print(f"{OUT.value} has {', '.join(written)}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string(
        "workdir", None, "Directory of a training run, local or gs://bucket/folder.", required=True
    )
    FORMAT = flags.DEFINE_string(
        "format", None, "saelens, dictionary_learning, gemma_scope, jumprelu, llamascopium or sparsify.", required=True
    )
    OUT = flags.DEFINE_string("out", None, "The new folder.", required=True)
    SAE = flags.DEFINE_string("sae", "", "The name of one SAE; all of them by default.")
    STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
    cli.run(main)
