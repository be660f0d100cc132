"""Uploads of what `gsae_jax.publishing.model_card` makes to the Hugging Face hub."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from gsae_jax import plugins
from gsae_jax.errors import UserError
from gsae_jax.publishing import model_card
from gsae_jax.storage.paths import error_line

logger = logging.getLogger(__name__)


def push(
    workdir: str,
    repo: str,
    formats: list[str],
    public: bool = False,
    labels: model_card.Labels = model_card.UNLABELLED,
) -> str:
    """Upload; returns the address.

    Raises:
        UserError: what `model_card.write` or the hub refuses; or `repo` is there, and public or private otherwise.
    """
    check(repo)
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        folder = Path(scratch) / "repo"
        missing = model_card.write(workdir, repo, formats, folder, labels)
        with _asking(repo):
            private = _private(repo)
        if private is not None and private == public:
            visibility, say = ("private", "leave --public out") if private else ("public", "add --public")
            raise UserError(f"{repo} exists and is {visibility}; {say}, or write another name", "--repo")
        ours = [f"{name}/*" for name in ("report", *plugins.known("formats", having="write"))]
        with _asking(repo):
            if private is None:
                huggingface_hub.create_repo(repo, private=not public)
            huggingface_hub.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="SAEs of gsae_jax", delete_patterns=ours
            )
    tell_missing(missing)
    return f"{huggingface_hub.constants.ENDPOINT}/{repo}"


def tell_missing(fields: list[str]) -> None:
    """Warn of metadata that a model card lacks."""
    if fields:
        flags = ", ".join(f"--{field.replace('_', '-')}" for field in fields)
        logger.warning(f"the model card lacks metadata that other people search by; add {flags}")


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
        why = f"{repo} cannot be written ({error_line(error)})"
        raise UserError(
            f"{why}; run `hf auth login` with a token that may write there, or try again", "--repo"
        ) from error


def check(repo: str) -> None:
    """Raises `UserError` for what cannot be a repository's name."""
    try:
        huggingface_hub.utils.validate_repo_id(repo)
        if not model_card.is_repository(repo):
            raise errors.HFValidationError("it has no user or organisation")
    except errors.HFValidationError as error:
        raise UserError(f"is {repo!r} ({error}); write user/name", "--repo") from error
