"""Rating features by raters that run by themselves."""

import contextlib
import dataclasses
import functools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import filelock
import numpy as np
import tqdm

from gsae_jax import collecting, errors, processes
from gsae_jax import features as features_lib
from gsae_jax.errors import TrainingError, UserError, known_names
from gsae_jax.features import Features, Rating
from gsae_jax.features import ratings as ratings_lib
from gsae_jax.rating import association, chat
from gsae_jax.rating import judge as judge_lib
from gsae_jax.rating.ratings import Rater
from gsae_jax.rating.study import AUTOMATIC, Item, Study

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
        study: the folder of a study, whose features are rated; nothing else is given then.
    """

    workdir: str = ""
    features: str = ""
    saes: Sequence[str] = ()
    numbers: Sequence[int] = ()
    study: str = ""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A language model that rates, on a server.

    Attributes:
        url: of the server.
        model: its name there.
        parallel: requests at once.
        max_tokens: of an answer.
        send: whether requests are sent; else only their number is shown.
    """

    url: str
    model: str
    parallel: int = 4
    max_tokens: int = 400
    send: bool = False


def command(wanted: Wanted, judge: Judge | None = None) -> None:
    """Rate features, and print the mean scores.

    Args:
        wanted: what to rate.
        judge: the language model that rates; by default, rules about tokens do.

    Raises:
        UserError: as `rate` and `rate_study`, or the server cannot be used.
        TrainingError: as `rate` and `rate_study`.
    """
    for name, given in (("workdir", wanted.workdir), ("features", wanted.features), ("sae", wanted.saes)):
        if wanted.study and given:
            raise UserError("does not go with --study, which has its own features; leave it out", f"--{name}")
    if wanted.study and wanted.numbers:
        raise UserError("does not go with --study, which has its own features; leave it out", "--feature")
    if judge is None:
        _rate_and_tell(wanted, association.Association())
        return
    if judge.max_tokens < 1:
        raise UserError(f"is {judge.max_tokens}; write at least 1", "--judge_tokens")
    names = {name: f"--judge_{name}" for name in ("url", "model", "parallel")}
    with errors.about("--judge_url", **names):
        client = chat.Client(judge.url, judge.model, _replies(wanted), judge.parallel)
    with contextlib.closing(client):
        rater = judge_lib.Judge(client, max_tokens=judge.max_tokens)
        costs = [rater.cost(features, numbers) for features, numbers in _left(wanted, rater.name)]
        requests, asked, answered = (sum(cost[part] for cost in costs) for part in range(3))
        tokens = f"about {asked:,} tokens to {judge.model}, at most {answered:,} from it"
        logger.info(f"{requests:,} requests to {judge.url}: {tokens}")
        if requests and not judge.send:
            logger.info("nothing was sent; --yes sends them")
            return
        try:
            _rate_and_tell(wanted, rater)
        finally:
            spent = client.spent
            logger.info(
                f"{spent.requests:,} requests: {spent.input_tokens:,} tokens, {spent.output_tokens:,} in answers"
            )


def _rate_and_tell(wanted: Wanted, rater: Rater) -> None:
    if wanted.study:
        logger.info(f"{wanted.study}: {rate_study(wanted.study, rater):,} features are rated")
        return
    for name, ratings in rate(wanted, rater).items():
        scores = [rating.score for rating in ratings.values()]
        mean = f", mean score {np.mean(scores):.3f}" if scores else ""
        logger.info(f"{name}: {len(scores):,} features are rated{mean}")


def _replies(wanted: Wanted) -> Path:
    """The file with the replies of servers, beside what is rated."""
    if not wanted.study:
        return files(wanted)[0] / "replies.cache"
    with contextlib.closing(Study(wanted.study)) as study:
        return study.path.parent / "replies.cache"


def _left(wanted: Wanted, rater: str) -> Iterator[tuple[Features, list[int]]]:
    """The features that are still to be rated, by file."""
    if not wanted.study:
        yield from ((features, to_rate(wanted, features, rater)) for features in files(wanted)[1].values())
        return
    with contextlib.closing(Study(wanted.study)) as study:
        for features, items in _of_study(study, _unrated(study, rater)):
            known = features.scores().get(rater, {})
            yield features, [item.feature for item in items if item.feature not in known]


def _unrated(study: Study, rater: str) -> list[Item]:
    """The items that an automatic rater has not rated."""
    answered = {item for each in study.raters(AUTOMATIC) if each.name == rater for item in study.answered(each.rater)}
    return [item for item in study.items() if item.item not in answered]


def files(wanted: Wanted) -> tuple[Path, dict[str, Features]]:
    """The folder, and the chosen files of features by the names of their SAEs.

    Raises:
        UserError: there are no such features.
    """
    if wanted.workdir and wanted.features:
        raise UserError("does not go with --features, which says where the files are; leave it out", "--workdir")
    folder = collecting.folder_of(wanted.workdir, wanted.features, "--features")
    where = "--features" if wanted.features else "--workdir"
    with errors.about(where, path=where):
        every = features_lib.load(folder)
    for name in wanted.saes:
        if name not in every:
            raise UserError(f"{name!r} has no collected features; {known_names(name, list(every))}", "--sae")
    folder = folder if folder.is_dir() else folder.parent
    return folder, {name: each for name, each in every.items() if not wanted.saes or name in wanted.saes}


def numbers(given: Sequence[str]) -> list[int]:
    """Numbers of features, as the command line has them.

    Raises:
        UserError: one is no number.
    """
    for each in given:
        if not (each.strip().isascii() and each.strip().isdecimal()):
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
    rated = features.scores().get(rater, {})
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
    with _held(folder, "--features" if wanted.features else "--workdir"):
        left = {name: to_rate(wanted, features, rater.name) for name, features in chosen.items()}
        hidden = None if processes.first() else True  # None: where there is no terminal
        with tqdm.tqdm(total=sum(map(len, left.values())), desc="ratings", unit="feature", disable=hidden) as bar:
            for name, features in chosen.items():
                places = [(number, number) for number in left[name]]
                _rate(features, places, rater, {}, functools.partial(_keep, features, rater.name), bar)
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
    hidden = None if processes.first() else True  # None: where there is no terminal
    with contextlib.closing(Study(folder)) as study, _held(study.path.parent, "--study"):
        try:
            number, items = study.add_rater(rater.name), _unrated(study, rater.name)
            with tqdm.tqdm(total=len(items), desc="ratings", unit="feature", disable=hidden) as bar:
                for features, mine in _of_study(study, items):
                    _rate_items(study, number, features, mine, rater, bar)
            return len(study.answered(number))
        except sqlite3.Error as error:
            raise TrainingError(f"{study.path} cannot be written ({error}); make room, and run it again") from error


def _rate_items(
    study: Study, number: int, features: Features, items: Sequence[Item], rater: Rater, bar: tqdm.tqdm
) -> None:
    """Rate items of a study, which are of one file."""

    def keep(made: Sequence[tuple[int, Rating]]) -> None:
        answers = [(key, r.score, r.explanation, {"low": r.low, "high": r.high, **r.details}) for key, r in made]
        study.answer_all(number, answers)

    known = ratings_lib.read(features.path, features.about["collection"]).get(rater.name, {})
    _rate(features, [(item.item, item.feature) for item in items], rater, known, keep, bar)


def _of_study(study: Study, items: Iterable[Item]) -> Iterator[tuple[Features, list[Item]]]:
    """The files of features that items are from, with their items."""
    by_path: dict[str, list[Item]] = {}
    for item in items:
        by_path.setdefault(item.path, []).append(item)
    saes = [sae for group in study.about["groups"] for sae in group["saes"].values()]
    parameters = {sae["path"]: sae["parameters"] for sae in saes}
    for path, mine in by_path.items():
        with errors.about("--study", path="--study"):
            (features,) = features_lib.load(path).values()
        with contextlib.closing(features):
            if features.about["collection"]["parameters"] != parameters[path]:
                raise UserError(f"{path} has features of another SAE than when the study was made", "--study")
            yield features, mine


def _rate(
    features: Features,
    places: Sequence[tuple[int, int]],
    rater: Rater,
    known: Mapping[int, Rating],
    keep: Callable[[Sequence[tuple[int, Rating]]], None],
    bar: tqdm.tqdm,
) -> None:
    """Rate features of one file, and keep the ratings every few seconds and at the end, also of an error.

    Args:
        features: the file.
        places: (what to call the rating, number of the feature).
        rater: who rates.
        known: ratings that were made before, by feature.
        keep: keeps ratings, by what they are called.
        bar: shows progress.
    """
    made: list[tuple[int, Rating]] = []
    written = time.monotonic()
    try:
        for key, number in places:
            rating = known.get(number) or rater.rate(features, number)
            if rating is not None:
                made.append((key, rating))
            bar.update()
            if time.monotonic() - written > KEEP_EVERY:
                keep(made)
                made.clear()
                written = time.monotonic()
    finally:
        keep(made)


def _keep(features: Features, rater: str, made: Sequence[tuple[int, Rating]]) -> None:
    """Write ratings."""
    try:
        if made:
            ratings_lib.write(features.path, features.about["collection"], rater, made)
    except sqlite3.Error as error:
        path = ratings_lib.place(features.path)
        raise TrainingError(f"{path} cannot be written ({error}); make room, and run the command again") from error


@contextlib.contextmanager
def _held(folder: Path, field: str) -> Iterator[None]:
    """Nobody else collects or rates in the folder."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise UserError(f"{folder} is in use by another command; wait for it to end", field) from error
    except OSError as error:
        raise UserError(f"ratings cannot be written to {folder} ({error})", field) from error
    try:
        yield
    finally:
        lock.release()
