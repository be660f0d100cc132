"""Rating features by raters that run by themselves."""

import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import filelock
import numpy as np
import tqdm

from gsae_jax import collecting, errors, processes
from gsae_jax import features as features_lib
from gsae_jax.errors import TrainingError, UserError, known_names
from gsae_jax.features import Features, Rating
from gsae_jax.features import ratings as ratings_lib
from gsae_jax.rating.ratings import Rater
from gsae_jax.rating.study import Item, Study

logger = logging.getLogger(__name__)

KEEP_EVERY = 2.0  # seconds, between writes of ratings


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to rate.

    Attributes:
        workdir: the directory of a run; "" for a folder of files alone.
        features: the folder of the features' files; by default `features` in the run's directory.
        saes: names of SAEs, by default all.
        numbers: of features, by default all that are active on some token.
        overwrite: rate again what the rater has rated.
    """

    workdir: str = ""
    features: str = ""
    saes: Sequence[str] = ()
    numbers: Sequence[int] = ()
    overwrite: bool = False


def files(wanted: Wanted) -> tuple[Path, dict[str, Features]]:
    """The folder, and the chosen files of features by the names of their SAEs.

    Raises:
        UserError: there are no such features.
    """
    folder = collecting.folder_of(wanted.workdir, wanted.features, "--features")
    where = "--features" if wanted.features else "--workdir"
    with errors.about(where, path=where):
        every = features_lib.load(folder)
    for name in wanted.saes:
        if name not in every:
            raise UserError(f"{name!r} has no collected features; {known_names(name, list(every))}", "--sae")
    return folder, {name: each for name, each in every.items() if not wanted.saes or name in wanted.saes}


def numbers(given: Sequence[str]) -> list[int]:
    """Numbers of features, as the command line has them.

    Raises:
        UserError: one is no number.
    """
    for each in given:
        if not (each.strip().isascii() and each.strip().isdigit()):
            raise UserError(f"is {each!r}; write numbers of features, such as 3,17", "--feature")
    return list(dict.fromkeys(map(int, given)))


def to_rate(wanted: Wanted, features: Features, rater: str) -> list[int]:
    """Numbers of the features that are still to be rated.

    Raises:
        UserError: there is no feature of a number.
    """
    for number in wanted.numbers:
        if not 0 <= number < len(features):
            raise UserError(f"is {number}; {features.sae} has features 0 to {len(features) - 1}", "--feature")
    alive = np.nonzero(features.columns()["fired"])[0].tolist()
    rated: Mapping[int, Rating] = {} if wanted.overwrite else features.ratings.get(rater, {})
    return [number for number in wanted.numbers or alive if number not in rated]


def rate(wanted: Wanted, rater: Rater) -> dict[str, dict[int, Rating]]:
    """Rate features, and keep the ratings in a file beside that of the features.

    What an earlier call has rated stays, so that a call that was interrupted is continued by the next one.

    Args:
        wanted: what to rate.
        rater: who rates.

    Returns:
        All ratings of the rater, by SAE and feature.

    Raises:
        UserError: there are no such features.
        TrainingError: the rater cannot go on, or the ratings cannot be written. Those that were made are kept.
    """
    folder, chosen = files(wanted)
    with _held(folder):
        left = {name: to_rate(wanted, features, rater.name) for name, features in chosen.items()}
        hidden = None if processes.first() else True  # None: where there is no terminal
        with tqdm.tqdm(total=sum(map(len, left.values())), desc="ratings", unit="feature", disable=hidden) as bar:
            for name, features in chosen.items():
                _rate(features, left[name], rater, bar)
    return {name: ratings_lib.read(f.path, f.about["collection"]).get(rater.name, {}) for name, f in chosen.items()}


def rate_study(folder: str, rater: Rater) -> int:
    """Rate the features of a study, and keep the ratings as answers of the study.

    What an earlier call has rated stays. A rating that is in a file beside that of the features is taken from there.

    Args:
        folder: of the study.
        rater: who rates.

    Returns:
        How many features of the study have a rating of the rater.

    Raises:
        UserError: there is no such study, or files of its features are not there any more, or are others.
        TrainingError: the rater cannot go on, or the ratings cannot be written. Those that were made are kept.
    """
    study = Study(folder)
    try:
        number = study.add_rater(rater.name)
        answered = study.answered(number)
        items = [item for item in study.items() if item.item not in answered]
        rated = len(answered)
        hidden = None if processes.first() else True
        with tqdm.tqdm(total=len(items), desc="ratings", unit="feature", disable=hidden) as bar:
            for item, features in _of_study(study, items):
                bar.update()
                known = features.ratings.get(rater.name, {})
                rating = known.get(item.feature) or rater.rate(features, item.feature)
                if rating is not None:
                    about = {"low": rating.low, "high": rating.high, **rating.details}
                    study.answer(number, item.item, rating.score, rating.explanation, about)
                    rated += 1
    except sqlite3.Error as error:
        raise TrainingError(f"{study.path} cannot be written ({error}); make room, and run it again") from error
    return rated


def _of_study(study: Study, items: Iterable[Item]) -> Iterator[tuple[Item, Features]]:
    """Items with the files of their features, those of one file after the other."""
    by_path: dict[str, list[Item]] = {}
    for item in items:
        by_path.setdefault(item.path, []).append(item)
    for path, mine in by_path.items():
        with errors.about("--study", path="--study"):
            (features,) = features_lib.load(path).values()
        theirs = {sae["path"]: sae["parameters"] for group in study.about["groups"] for sae in group["saes"].values()}
        if features.about["collection"]["parameters"] != theirs[path]:
            raise UserError(f"{path} has features of another SAE than when the study was made", "--study")
        yield from ((item, features) for item in mine)


def _rate(features: Features, numbers: Sequence[int], rater: Rater, bar: tqdm.tqdm) -> None:
    made: list[tuple[int, Rating]] = []
    written = time.monotonic()
    try:
        for number in numbers:
            rating = rater.rate(features, number)
            if rating is not None:
                made.append((number, rating))
            bar.update()
            if time.monotonic() - written > KEEP_EVERY:
                _keep(features, rater.name, made)
                written = time.monotonic()
    finally:
        _keep(features, rater.name, made)


def _keep(features: Features, rater: str, made: list[tuple[int, Rating]]) -> None:
    """Write ratings, and forget them."""
    try:
        if made:
            ratings_lib.write(features.path, features.about["collection"], rater, made)
    except sqlite3.Error as error:
        path = ratings_lib.place(features.path)
        raise TrainingError(f"{path} cannot be written ({error}); make room, and run the command again") from error
    made.clear()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Nobody else collects or rates in the folder."""
    try:
        with filelock.FileLock(folder / ".lock").acquire(blocking=False):
            yield
    except filelock.Timeout as error:
        raise UserError(f"{folder} is in use by another command; wait for it to end", "--features") from error
