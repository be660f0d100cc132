"""Print the sites of a language model with their widths, from its config.json only.

python -m gsae_jax.sites --model DIR_OR_HUB_NAME
"""

from absl import flags

from gsae_jax import cli, errors
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.loading import site_widths


def main() -> None:
    """The command."""
    with errors.about("--model", revision="--revision"):
        checkpoint = Checkpoint.open(MODEL.value, REVISION.value)
    for site, width in site_widths(checkpoint.module()).items():
        print(f"{width:>7}  {site}")


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "", "Checkpoint directory or hub name; the embedded model by default.")
    REVISION = flags.DEFINE_string("revision", "", "Branch, tag or commit of a hub name.")
    cli.run(main)
