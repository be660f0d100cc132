"""Uploads to the Hugging Face hub: SAEs with their model card, and pages of their features."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from gsae_jax import errors, plugins, rendering, viewing
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
        ours = [f"{name}/*" for name in ("report", *plugins.known("formats", having="write"))]
        address = _upload(_Repository(repo), folder, public, ours)
    tell_missing(missing)
    return address


def push_pages(workdir: str, space: str, repo: str, public: bool = False) -> str:
    """Upload the pages of a run's collected features as a static Space; returns the address.

    They show parts of the held-out text.

    Args:
        workdir: the run's directory.
        space: name of the Space.
        repo: name of the repository of the SAEs, to which the Space refers.
        public: make a new Space public.

    Raises:
        UserError: as `push`; or the run has no collected features.
    """
    check(space, "--space")
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        with errors.about("--workdir"):
            folder = viewing.export(viewing.Wanted(workdir), str(Path(scratch) / "pages"))
        (folder / "README.md").write_text(rendering.render("space_card.md", repo=repo), "utf-8")
        return _upload(_Repository(space, "space", "--space"), folder, public, ["*"])


class _Repository(NamedTuple):
    """A repository on the hub.

    Attributes:
        name: user/name.
        kind: "model" or "space".
        field: by which the user named it.
    """

    name: str
    kind: str = "model"
    field: str = "--repo"

    @property
    def is_private(self) -> bool | None:
        """None where there is no such repository, or none that the token may see."""
        try:
            return bool(huggingface_hub.repo_info(self.name, repo_type=self.kind).private)
        except hub_errors.RepositoryNotFoundError:
            return None


def _upload(repository: _Repository, folder: Path, public: bool, deleted: list[str]) -> str:
    """Upload a folder to a repository, which is made if it is not there; returns its address.

    `deleted`: patterns of files of an earlier upload that are deleted.
    """
    name, kind = repository.name, repository.kind
    with _asking(repository):
        private = repository.is_private
    if private is not None and private == public:
        visibility, say = ("private", "leave --public out") if private else ("public", "add --public")
        raise UserError(f"{name} exists and is {visibility}; {say}, or write another name", repository.field)
    with _asking(repository):
        if private is None:
            sdk = "static" if kind == "space" else None
            huggingface_hub.create_repo(name, private=not public, repo_type=kind, space_sdk=sdk)
        huggingface_hub.upload_folder(
            repo_id=name,
            repo_type=kind,
            folder_path=folder,
            commit_message="SAEs of gsae_jax",
            delete_patterns=deleted,
        )
    return f"{constants.ENDPOINT}/{'spaces/' if kind == 'space' else ''}{name}"


def tell_missing(fields: list[str]) -> None:
    """Warn of metadata that a model card lacks."""
    if fields:
        flags = ", ".join(f"--{field.replace('_', '-')}" for field in fields)
        logger.warning(f"the model card lacks metadata that other people search by; add {flags}")


@contextlib.contextmanager
def _asking(repository: _Repository) -> Iterator[None]:
    """One sentence for what fails; the hub, its transfers and the network have errors of many kinds."""
    try:
        yield
    except Exception as error:
        why = f"{repository.name} cannot be written ({error_line(error)})"
        raise UserError(
            f"{why}; run `hf auth login` with a token that may write there, or try again", repository.field
        ) from error


def check(repo: str, field: str = "--repo") -> None:
    """Raises `UserError` for what cannot be a repository's name."""
    try:
        validate_repo_id(repo)
        if not model_card.is_repository(repo):
            raise hub_errors.HFValidationError("it has no user or organisation")
    except hub_errors.HFValidationError as error:
        raise UserError(f"is {repo!r} ({error}); write user/name", field) from error
