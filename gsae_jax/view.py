"""Look at collected features in a browser: lists, a page for each, comparing, trying a text, steering.

python -m gsae_jax.view --workdir runs/quickstart [--open]
python -m gsae_jax.view --workdir runs/quickstart --export pages
python -m gsae_jax.view --features FOLDER
"""

import logging

from absl import flags

from gsae_jax import cli, viewing
from gsae_jax.errors import UserError

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def main() -> None:
    """The command."""
    wanted = viewing.Wanted(WORKDIR.value, FEATURES.value, MODEL.value)
    if MODEL.value and not WORKDIR.value:
        raise UserError("goes with --workdir only, as SAEs are needed as well; leave it out", "--model")
    if not EXPORT.value:
        viewing.serve(wanted, HOST.value, PORT.value, OPEN.value)
        return
    for name, flag in (("--open", OPEN), ("--model", MODEL), ("--host", HOST), ("--port", PORT)):
        if flag.present:
            raise UserError("does not go with --export; leave it out", name)
    logger.info(f"pages: {viewing.export(wanted, EXPORT.value)}/index.html")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a training run, local or gs://bucket/folder.")
    FEATURES = flags.DEFINE_string(
        "features", "", "Folder that `collect` wrote; default: `features` in the run's directory."
    )
    MODEL = flags.DEFINE_string("model", "", "Checkpoint directory or hub name of the run's language model, if moved.")
    HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on. Others than this machine need a token then.")
    PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.")
    OPEN = flags.DEFINE_bool("open", False, "Open the browser.")
    EXPORT = flags.DEFINE_string("export", "", "Write the pages as files into this new folder, and serve nothing.")
    cli.run(main)
