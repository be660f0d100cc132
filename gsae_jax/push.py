"""Publish the SAEs of a finished run on the Hugging Face hub, with a model card made of its report.

python -m gsae_jax.push --workdir runs/quickstart --repo user/name [--format saelens,dictionary_learning] [--dry-run]

A new repository is private, unless --public; into one that exists nothing goes if that says otherwise. What an earlier
push put there makes room for this one's; the repository's history keeps it. `hf auth login` comes first.
"""

import tempfile
from pathlib import Path

from absl import flags

from gsae_jax import cli
from gsae_jax.publishing import model_card
from gsae_jax.publishing.upload import check, push


def main() -> None:
    """The command."""
    if not DRY_RUN.value:
        print(push(WORKDIR.value, REPO.value, FORMAT.value, PUBLIC.value))
        return
    check(REPO.value)
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        folder = Path(scratch) / "repo"
        model_card.write(WORKDIR.value, REPO.value, FORMAT.value, folder)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:12,}  {file.relative_to(folder)}")
        print(f"\nwould be {REPO.value}; nothing was sent. Its README.md:\n\n{(folder / 'README.md').read_text()}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run, local or gs://bucket.", required=True)
    REPO = flags.DEFINE_string("repo", None, "The repository on the hub, user/name.", required=True)
    FORMAT = flags.DEFINE_list(
        "format", ["saelens"], "saelens, dictionary_learning, gemma_scope, jumprelu: one or more."
    )
    PUBLIC = flags.DEFINE_bool("public", False, "Make a new repository public.")
    DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the files and print the model card; nothing is sent.")
    cli.run(main)
