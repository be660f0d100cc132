"""The blinded study of features: made from collected files, and served to the people who rate."""

import contextlib
import dataclasses
import datetime
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsae_jax import errors
from gsae_jax import features as features_lib
from gsae_jax.errors import UserError
from gsae_jax.evaluation import provenance
from gsae_jax.rating import analysis, pages, pairs, server
from gsae_jax.rating import study as study_lib
from gsae_jax.rating.study import AUTOMATIC, FIRST, PERSON, SECOND, Item, Study
from gsae_jax.storage import paths, writing
from gsae_jax.web import server as web

logger = logging.getLogger(__name__)

MOST_PEOPLE = 1000
NEAR = 1.1  # ratio of L0s from which on there is a warning
PEOPLE = "people"  # what their ratings are called together


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A study to make.

    Attributes:
        runs: directories of runs with collected features, or folders of such files.
        first: the side that is expected to be better: the name of a stack or of an SAE, or RUN:NAME.
        second: the other side.
        pairs: of features, from each language model and site, for each person; None for as many as there are.
        raters: how many people rate; 0 for programs alone, with pairs that are nobody's.
        seed: of the draw of features.
        is_shared: all people rate the same pairs. By default each has pairs of their own.
    """

    runs: Sequence[str]
    first: str
    second: str
    pairs: int | None
    raters: int = 1
    seed: int = 0
    is_shared: bool = False


def count(pairs: str) -> int | None:
    """A number of pairs as the command line has it; None for `all`.

    Raises:
        UserError: it is neither.
    """
    if pairs == "all":
        return None
    if not pairs.isdecimal():
        raise UserError(f"is {pairs!r}; write a number of pairs, or all", "--pairs")
    return int(pairs)


def new(wanted: Wanted, out: str) -> Path:
    """Make a study in a new folder.

    Args:
        wanted: what it compares.
        out: the folder.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists, features were not collected, or as of `pairs.choose`.
    """
    for value, least, most, field in (
        (wanted.raters, 0, MOST_PEOPLE, "--raters"),
        (wanted.seed, 0, 2**63 - 1, "--seed"),
        (1 if wanted.pairs is None else wanted.pairs, 1, 2**31 - 1, "--pairs"),
    ):
        if not least <= value <= most:
            raise UserError(
                f"is {value}; write a number from {least} to {most:,}{', or all' * (field == '--pairs')}", field
            )
    if wanted.is_shared and not wanted.raters:
        raise UserError("is about people, and --raters is 0; leave it out", "--shared")
    with errors.about("--out"):
        writing.check_new(paths.require_local(out))
    groups = _groups(wanted)
    for group in groups:
        both = " and ".join(
            f"{source.about['sae']} (L0 {l0:.3g}, {alive:,} features to draw from)"
            for source, l0, alive in zip(group.sources, group.l0, group.alive, strict=True)
        )
        logger.info(f"{group.model} {group.target}: {len(group.pairs):,} pairs of {both}")
        if max(group.l0) > NEAR * min(group.l0):
            logger.warning("their L0s differ; sparser SAEs often have more interpretable features (see target_l0)")
    tokens = [web.new_token() for _ in range(wanted.raters)]
    orders = _orders(groups, wanted, tokens)
    items = _items(groups, {item for order in orders for item in order})
    with errors.about("--out"), writing.new_folder(out) as scratch:
        study_lib.create(scratch, _about(groups, wanted), items, tokens, orders)
    return Path(paths.require_local(out))


def _groups(wanted: Wanted) -> list[pairs.Group]:
    """The groups of the study, with the pairs of all raters."""
    runs: dict[str, Mapping[str, features_lib.Features]] = {}
    for run in wanted.runs:
        if run in runs:
            raise UserError(f"has {run} twice; leave one out", "--runs")
        with errors.about("--runs", path="--runs"):
            runs[run] = features_lib.load(run)
    apart = 1 if wanted.is_shared else max(1, wanted.raters)  # people whose pairs differ
    count = None if wanted.pairs is None else wanted.pairs * apart
    groups = pairs.choose(runs, wanted.first, wanted.second, count, wanted.seed)
    if wanted.pairs is not None:
        return groups
    for group in groups:
        if len(group.pairs) < apart:
            why = f"are {wanted.raters}, and {group.target} of {group.model} has {len(group.pairs)} pairs"
            raise UserError(f"{why}; write fewer, or --shared", "--raters")
    return [dataclasses.replace(group, pairs=group.pairs[: len(group.pairs) // apart * apart]) for group in groups]


def _numbered(groups: Sequence[pairs.Group]) -> list[tuple[pairs.Group, int, int, int]]:
    """(group, place of a pair in it, number of the pair, side) of all items, in order of their numbers.

    Which side comes first in a pair says nothing: the two are sorted by their SAEs.
    """
    numbered, number = [], 0
    for group in groups:
        digests = [source.about["parameters"] for source in group.sources]
        sides = sorted((0, 1), key=digests.__getitem__)
        for place in range(len(group.pairs)):
            numbered += [(group, place, number, side) for side in sides]
            number += 1
    return numbered


def _items(groups: Sequence[pairs.Group], shown: set[int]) -> list[Item]:
    """All items; those that are `shown` to people have what they show."""
    items = []
    for item, (group, place, pair, side) in enumerate(_numbered(groups)):
        features, number = group.sources[side].features, int(group.pairs[place, side])
        items.append(
            Item(
                item=item,
                pair=pair,
                side=(FIRST, SECOND)[side],
                path=str(features.path.absolute()),
                sae=features.sae,
                feature=number,
                model=group.model,
                site=group.site,
                layer=group.layer,
                page=pages.page(features[number]) if item in shown else None,
            )
        )
    return items


def _orders(groups: Sequence[pairs.Group], wanted: Wanted, tokens: Sequence[str]) -> list[list[int]]:
    """The items of each person, in random order. It depends on a secret, so that the seed does not tell it."""
    numbered = _numbered(groups)
    orders = []
    for rater, token in enumerate(tokens):
        mine = []
        for item, (group, place, _, _) in enumerate(numbered):
            each = len(group.pairs) // wanted.raters
            if wanted.is_shared or place // each == rater:
                mine.append(item)
        secret = int.from_bytes(hashlib.sha256(token.encode()).digest(), "big")
        orders.append(np.random.default_rng(secret).permutation(mine).tolist())
    return orders


def _about(groups: Sequence[pairs.Group], wanted: Wanted) -> dict[str, Any]:
    """Facts of the study."""
    described = []
    for group in groups:
        saes = {
            side: {
                **source.about,
                "run": source.run,
                "path": str(source.features.path.absolute()),
                "l0": l0,
                "alive": alive,
            }
            for side, source, l0, alive in zip((FIRST, SECOND), group.sources, group.l0, group.alive, strict=True)
        }
        described.append({"model": group.model, "target": group.target, "pairs": len(group.pairs), "saes": saes})
    return {
        "first": wanted.first,
        "second": wanted.second,
        "seed": wanted.seed,
        "pairs_per_rater": wanted.pairs,
        "people": wanted.raters,
        "shared": wanted.is_shared,
        "groups": described,
        "made_with": provenance.versions(),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def serve(folder: str, host: str, port: int) -> None:
    """Serve the pages of a study until the process is interrupted, and print each person's link.

    Raises:
        UserError: there is no such study, nobody is to rate in it, or the address cannot be used.
    """
    web.check_port(port)
    study = Study(folder)
    people = study.raters(PERSON)
    if not people:
        raise UserError(f"{folder} was made with --raters 0, so that no person rates; make another one", "STUDY")
    listening = web.listening(server.application(study, host), host, port)
    address = web.address(host, listening.effective_port)
    for person in people:
        done, count = len(study.answered(person.rater)), len(study.order(person.rater))
        logger.info(f"rater {person.rater}, {done} of {count} answered: {address}r/{person.token}/")
    logger.info("Ctrl-C ends it; answers are kept")
    listening.run()


def analyse(folder: str, out: str = "") -> list[analysis.Analysis]:
    """Analyse the ratings of a study: those of all people together, and those of each automatic rater.

    Writes `analysis.json`, `answers.csv` and `report.html`, in place of earlier ones.

    Args:
        folder: of the study.
        out: where to write; by default `analysis` in the folder of the study.

    Raises:
        UserError: there is no such study, or nobody has rated both features of a pair.
    """
    with errors.about("--out"):
        place = Path(paths.require_local(out)) if out else Path(folder).expanduser() / "analysis"
    with contextlib.closing(Study(folder)) as study:
        analyses, facts, answers = _analysed(study)
    if not analyses:
        how = "serve it to people, or run `python -m gsae_jax.rate --study`"
        raise UserError(f"{folder} has no pair of which one rater has rated both features; {how}", "STUDY")
    try:
        analysis.write(analyses, facts, answers, place)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error}); write another folder", "--out") from error
    return analyses


def _analysed(study: Study) -> tuple[list[analysis.Analysis], dict[str, Any], list[dict[str, Any]]]:
    """The analyses of a study, facts for its report, and all answers without names."""
    ratings, sides = study.ratings(), (study.about["first"], study.about["second"])
    items = {item.item: item for item in study.items()}
    people = [person.rater for person in study.raters(PERSON)]
    shown = {items[item].pair for person in people for item in study.order(person)}
    analyses = []
    if ratings[PERSON]:
        analyses.append(analysis.analyse(PEOPLE, sides, ratings[PERSON], people=True, of_pairs=len(shown)))
    names = {rater.rater: rater.name or "" for rater in study.raters(AUTOMATIC)}
    every = len({item.pair for item in items.values()})
    for rater, name in names.items():
        if paired := [each for each in ratings[AUTOMATIC] if each.rater == rater]:
            analyses.append(analysis.analyse(name, sides, paired, people=False, of_pairs=every))
    kept = ("run", "sae", "architecture", "l0", "alive")
    saes = [
        {"model": group["model"], "site": group["target"], "side": study.about[side]}
        | {name: group["saes"][side][name] for name in kept}
        for group in study.about["groups"]
        for side in (FIRST, SECOND)
    ]
    answers = [
        {
            "rater": names.get(answer.rater, PEOPLE),
            "person": answer.rater if answer.rater in people else "",
            "pair": item.pair,
            "side": study.about[item.side],
            "model": item.model,
            "layer": item.layer,
            "site": item.site,
            "sae": item.sae,
            "feature": item.feature,
            "rating": f"{answer.score:g}",
            "explanation": answer.explanation,
        }
        for answer in study.answers()
        for item in [items[answer.item]]
    ]
    return analyses, {"sides": list(sides), "saes": saes}, answers
