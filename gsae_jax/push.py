"""Publish the SAEs of a finished run on the Hugging Face hub, with a model card made of its report.

python -m gsae_jax.push --workdir runs/quickstart --repo user/name [--format saelens,dictionary_learning] [--dry-run]

A new repository is private, unless --public; into one that exists nothing goes if that says otherwise. What an earlier
push put there makes room for this one's; the repository's history keeps it. `hf auth login` comes first.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from absl import flags
from huggingface_hub import errors

from gsae_jax import cards, cli, plugins
from gsae_jax.buckets import line
from gsae_jax.config import ConfigError


def push(workdir: str, repo: str, formats: list[str], public: bool = False) -> str:
    """Upload; returns the address.

    Raises:
        ConfigError: what `cards.write` refuses, or the hub does; or `repo` is there, and public or private otherwise.
    """
    check(repo)
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        folder = Path(scratch) / "repo"
        cards.write(workdir, repo, formats, folder)
        with _asking(repo):
            private = _private(repo)
        if private is not None and private == public:
            there, say = ("private", "leave --public out") if private else ("public", "add --public")
            raise ConfigError("--repo", f"{repo} exists and is {there}; {say}, or write another name")
        ours = [f"{name}/*" for name in ("report", *plugins.known("exchange", having="write"))]
        with _asking(repo):
            if private is None:
                huggingface_hub.create_repo(repo, private=not public)
            huggingface_hub.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="SAEs of gsae_jax", delete_patterns=ours
            )
    return f"{huggingface_hub.constants.ENDPOINT}/{repo}"


def _private(repo: str) -> bool | None:
    """None where there is no such repository, or none that the token may see."""
    try:
        return bool(huggingface_hub.repo_info(repo).private)
    except errors.RepositoryNotFoundError:
        return None


@contextlib.contextmanager
def _asking(repo: str) -> Iterator[None]:
    """One sentence for what fails; the hub, its transfers and the network have errors of many kinds."""
    try:
        yield
    except Exception as error:
        why = f"{repo} cannot be written ({line(error)})"
        raise ConfigError(
            "--repo", f"{why}; run `hf auth login` with a token that may write there, or try again"
        ) from error


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
