"""Write the SAEs of a run for other libraries, each as a folder.

python -m gsae_jax.export --workdir runs/quickstart --format saelens --out OUT [--sae gated_1]

Without --sae OUT has a folder for each SAE, with it OUT is that SAE's. --workdir may also be what an export wrote, or
any SAE that gsae_jax.load reads.
"""

from absl import flags

from gsae_jax import cli, plugins, runs
from gsae_jax.config import ConfigError, known_names
from gsae_jax.exchange import files


def export(path: str, format: str, out: str, name: str = "") -> list[str]:
    """Write one SAE, or all of them, or nothing; returns the names of those written.

    Raises:
        ConfigError: no such SAE or format, a format that cannot hold one of them, or an `out` that exists.
    """
    module = plugins.load("exchange", format, having="write", field="--format")
    saes = runs.load(path)
    if name:
        if name not in saes:
            raise ConfigError("--sae", f"{name!r} is not in {path}; {known_names(name, saes)}")
        module.write(saes[name], out)
        return [name]
    with files.new_folder(out) as folder:
        for sae in saes.values():
            module.write(sae, folder / sae.name)
    return list(saes)


def main() -> None:
    """The command."""
    written = export(WORKDIR.value, FORMAT.value, OUT.value, SAE.value)
    print(f"{OUT.value} has {', '.join(written)}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string(
        "workdir", None, "Directory of a training run, local or gs://bucket/folder.", required=True
    )
    FORMAT = flags.DEFINE_string(
        "format", None, "saelens, dictionary_learning, gemma_scope or jumprelu.", required=True
    )
    OUT = flags.DEFINE_string("out", None, "The new folder.", required=True)
    SAE = flags.DEFINE_string("sae", "", "The name of one SAE; all of them by default.")
    cli.run(main)
