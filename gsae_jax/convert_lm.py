"""Convert a language model from a PyTorch pickle to safetensors; needs torch (pip install 'gsae_jax[torch]').

python -m gsae_jax.convert_lm SRC OUT [--tokenizer DIR_OR_HUB_NAME] [--revision COMMIT]

SRC is a directory or a hub name: a Hugging Face checkpoint with pytorch_model.bin, or a TransformerLens one such as
NeelNanda/GELU_1L512W_C4_Code (config.json and model_final.pth).
"""

from pathlib import Path

from absl import flags

from gsae_jax import cli, errors
from gsae_jax.lms.conversion import convert


def main(source: str, out: str) -> None:
    """The command."""
    with errors.about("SRC", source="SRC", out="OUT", tokenizer="--tokenizer", revision="--revision"):
        convert(source, Path(out), TOKENIZER.value, REVISION.value)
    print(f"{out} is written; use it as --config.lm.path={out}, or in gsae_jax.load_lm({out!r})")


if __name__ == "__main__":
    TOKENIZER = flags.DEFINE_string("tokenizer", "", "Directory or hub name of a tokenizer, if SRC has none.")
    REVISION = flags.DEFINE_string("revision", "", "Branch, tag or commit of a hub name.")
    cli.run(main, "SRC", "OUT")
