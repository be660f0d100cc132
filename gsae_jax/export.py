"""Write the SAEs of a run, or their collected features, for other libraries, each as a folder.

python -m gsae_jax.export --workdir runs/quickstart --format saelens --out OUT [--sae gated_1] [--step N]
python -m gsae_jax.export --workdir runs/quickstart --format neuronpedia --out OUT [--sae gated_1]

Without --sae, OUT gets one folder for each SAE. With --sae, OUT is the folder of that SAE. --workdir may also be
an exported folder, or any SAE that gsae_jax.load reads. For neuronpedia and delphi it may be a folder of features.
"""

from absl import flags

from gsae_jax import cli
from gsae_jax.exporting import export


def main() -> None:
    """The command."""
    written = export(WORKDIR.value, FORMAT.value, OUT.value, SAE.value, STEP.value)
    print(f"{OUT.value} has {', '.join(written)}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string(
        "workdir", None, "Directory of a training run, local or gs://bucket/folder.", required=True
    )
    FORMAT = flags.DEFINE_string(
        "format",
        None,
        "saelens, dictionary_learning, gemma_scope, jumprelu, llamascopium or sparsify. Of collected features: "
        "neuronpedia or delphi.",
        required=True,
    )
    OUT = flags.DEFINE_string("out", None, "The new folder.", required=True)
    SAE = flags.DEFINE_string("sae", "", "The name of one SAE; all of them by default.")
    STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
    cli.run(main)
