"""Publish the SAEs of a finished run on the Hugging Face hub, with a model card made of its report.

python -m gsae_jax.push --workdir runs/quickstart --repo user/name [--format saelens,dictionary_learning] [--dry-run]

A new repository is private, unless --public; one that exists keeps its visibility. `hf auth login` comes first.
"""

import tempfile
from pathlib import Path

import huggingface_hub
from absl import flags
from huggingface_hub import errors

from gsae_jax import cards, cli
from gsae_jax.config import ConfigError


def push(workdir: str, repo: str, formats: list[str], public: bool = False) -> str:
    """Upload; returns the address.

    Raises:
        ConfigError: what `cards.write` refuses, or the hub does.
    """
    check(repo)
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        folder = Path(scratch) / "repo"
        cards.write(workdir, repo, formats, folder)
        try:
            url = huggingface_hub.create_repo(repo, private=not public, exist_ok=True)
            huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="SAEs of gsae_jax")
        except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, errors.HTTPError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(
                "--repo", f"{repo} cannot be written ({why}); run `hf auth login` with a token that may write there"
            ) from error
    return str(url)


def check(repo: str) -> None:
    """Raises `ConfigError` for what cannot be a repository's name."""
    try:
        huggingface_hub.utils.validate_repo_id(repo)
        if repo.count("/") != 1:
            raise errors.HFValidationError("it has no user or organisation")
    except errors.HFValidationError as error:
        raise ConfigError("--repo", f"is {repo!r} ({error}); write user/name") from error


def main() -> None:
    """The command."""
    if not DRY_RUN.value:
        print(push(WORKDIR.value, REPO.value, FORMAT.value, PUBLIC.value))
        return
    check(REPO.value)
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        folder = Path(scratch) / "repo"
        cards.write(WORKDIR.value, REPO.value, FORMAT.value, folder)
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
