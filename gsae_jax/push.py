"""Publish the SAEs of a finished run on the Hugging Face hub, with a model card that has its report.

python -m gsae_jax.push --workdir runs/quickstart --repo user/name [--format saelens,dictionary_learning] [--dry-run]
python -m gsae_jax.push --workdir runs/quickstart --repo user/name --space user/name

A new repository is private, unless you add --public. If the repository exists, --public must agree with its visibility.
Files of an earlier push are replaced, and stay in the repository's history. Log in first: `hf auth login`.
"""

import tempfile
from pathlib import Path

from absl import flags

from gsae_jax import cli, errors, features
from gsae_jax.publishing import model_card
from gsae_jax.publishing.upload import check, push, push_pages, tell_missing


def main() -> None:
    """The command."""
    with errors.about("", base_model="--base-model", dataset="--dataset", license="--license"):
        labels = model_card.Labels(BASE_MODEL.value, DATASET.value, LICENSE.value)
    check(REPO.value)
    if SPACE.value:
        check(SPACE.value, "--space")
        features.load(WORKDIR.value)  # before anything is sent
    if not DRY_RUN.value:
        print(push(WORKDIR.value, REPO.value, FORMAT.value, PUBLIC.value, labels))
        if SPACE.value:
            print(push_pages(WORKDIR.value, SPACE.value, REPO.value, PUBLIC.value))
        return
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        folder = Path(scratch) / "repo"
        missing = model_card.write(WORKDIR.value, REPO.value, FORMAT.value, folder, labels)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:12,}  {file.relative_to(folder)}")
        card = (folder / "README.md").read_text("utf-8")
        print(f"\nDry run: nothing was sent. The repository would be {REPO.value}. Its README.md:\n\n{card}")
    tell_missing(missing)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run, local or gs://bucket.", required=True)
    REPO = flags.DEFINE_string("repo", None, "The repository on the hub, user/name.", required=True)
    FORMAT = cli.define_list(
        "format",
        ["saelens"],
        "saelens, dictionary_learning, gemma_scope, jumprelu, llamascopium or sparsify.",
    )
    BASE_MODEL = flags.DEFINE_string(
        "base-model", "", "The language model on the hub, user/name, if the run has a path."
    )
    DATASET = flags.DEFINE_string("dataset", "", "The training text on the hub, user/name.")
    LICENSE = flags.DEFINE_string("license", "", "Licence of the SAEs, such as mit, apache-2.0 or cc-by-4.0.")
    SPACE = flags.DEFINE_string(
        "space", "", "Also publish the pages of collected features, as a static Space of this name, user/name."
    )
    PUBLIC = flags.DEFINE_bool("public", False, "Make a new repository or Space public.")
    DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the files and print the model card; nothing is sent.")
    cli.run(main)
