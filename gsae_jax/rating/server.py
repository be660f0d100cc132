"""The server of a study: each person has a link of their own, and answers by forms."""

import sqlite3
from typing import Any

import flask
from werkzeug import exceptions

from gsae_jax.rating import pages
from gsae_jax.rating.study import SCORES, Answer, Changed, Draft, Rater, Study
from gsae_jax.web import server as web

NO_LINK = "To rate features you need a link of your own. Ask the person who runs the study for it."
WRONG_LINK = "This link belongs to nobody in this study. Copy it again, from beginning to end."
LEADS = {"back": -1, "next": 1}  # what the buttons of the form do, next to "overview"


def application(study: Study, host: str = "127.0.0.1") -> flask.Flask:
    """The pages of a study as a WSGI application.

    Addresses have a person's secret token and the place of a feature in that person's order, and nothing else.

    Args:
        study: which is shown, and in which answers are saved.
        host: as of `web.server.guard`.
    """
    app = web.application("gsae_jax.rating")
    web.guard(app, host, lambda sentence, status: (pages.said(sentence), status))

    def person(token: str) -> Rater:
        found = study.person(token)
        if found is None:
            raise exceptions.NotFound(WRONG_LINK)
        return found

    def at(rater: Rater, place: int) -> tuple[int, int, int]:
        """The item at a place, how many items the person has, and how many of them are answered."""
        order = study.order(rater.rater)
        if not 1 <= place <= len(order):
            raise exceptions.NotFound(f"There are features 1 to {len(order)}.")
        return order[place - 1], len(order), len(study.answered(rater.rater))

    def missing(rater: Rater) -> list[int]:
        answered = study.answered(rater.rater)
        return [place for place, item in enumerate(study.order(rater.rater), 1) if item not in answered]

    @app.get("/")
    def root() -> str:
        return pages.said(NO_LINK)

    @app.get("/r/<token>/")
    def start(token: str) -> str:
        rater = person(token)
        count, left = len(study.order(rater.rater)), missing(rater)
        return pages.start(count, count - len(left), left[0] if left else 1)

    @app.get("/r/<token>/overview")
    def overview(token: str) -> str:
        rater = person(token)
        said = [study.said(rater.rater, item) for item in study.order(rater.rater)]
        return pages.overview([(isinstance(each, Answer), each is not None) for each in said])

    @app.get("/r/<token>/end")
    def end(token: str) -> str:
        rater = person(token)
        return pages.end(len(study.order(rater.rater)), missing(rater))

    @app.get("/r/<token>/<int:place>")
    def item(token: str, place: int) -> str:
        rater = person(token)
        number, count, done = at(rater, place)
        return pages.item(study.page(number), place, count, done, _typed(study.said(rater.rater, number)))

    @app.post("/r/<token>/<int:place>")
    def save(token: str, place: int) -> Any:
        rater = person(token)
        number, count, done = at(rater, place)
        form = flask.request.form
        lead = form.get("go", "next")
        typed = {
            # Browsers send line ends in this way, however they were typed.
            "explanation": form.get("explanation", "").replace("\r\n", "\n"),
            "choice": form.get("choice", ""),
            "version": form.get("version", 0, int),
            "is_saved": False,
        }
        problem, other, status = _save(study, rater.rater, number, typed, may_wait=lead != "next")
        if problem:
            # What was typed is on the page, and a second attempt counts as made with knowledge of what is saved.
            typed["version"] = _typed(study.said(rater.rater, number))["version"] if status == 409 else typed["version"]
            shown = pages.item(study.page(number), place, count, done, typed, problem, other)
            return shown, status
        following = max(1, place + LEADS.get(lead, 1))
        page = "overview" if lead == "overview" else f"{following}" if following <= count else "end"
        return flask.redirect(f"{page}#main", 303)  # else the browser goes to that page's question

    return app


def _typed(said: Answer | Draft | None) -> dict[str, Any]:
    """What the form of an item has at first."""
    if said is None:
        return {"explanation": "", "choice": "", "version": 0, "is_saved": False}
    choice = said.choice if isinstance(said, Draft) else {score: choice for choice, score in SCORES.items()}[said.score]
    return {
        "explanation": said.explanation,
        "choice": choice,
        "version": said.version,
        "is_saved": isinstance(said, Answer),
    }


def _save(study: Study, rater: int, item: int, typed: dict[str, Any], may_wait: bool) -> tuple[str, str, int]:
    """Save what a person sent.

    Args:
        study: in which.
        rater: number of the person.
        item: number of the item.
        typed: as of `pages.item`.
        may_wait: what is not complete is kept as a draft.

    Returns:
        A sentence that says why it was not saved, or ""; what was saved elsewhere meanwhile; the status.
    """
    said = study.said(rater, item)
    before = _typed(said)
    if all(typed[name] == before[name] for name in ("explanation", "choice")) and (may_wait or before["is_saved"]):
        return "", "", 303  # a form that was sent twice, or was not touched
    problem = _problem(typed)
    try:
        if not problem:
            score = SCORES[typed["choice"]]
            study.answer(rater, item, score, typed["explanation"], seen=typed["version"])
        elif may_wait and not before["is_saved"] and len(typed["explanation"]) <= pages.LONGEST:
            choice = typed["choice"] if typed["choice"] in SCORES else ""
            study.draft(rater, item, choice, typed["explanation"], typed["version"])
        else:
            return problem, "", 400
    except Changed:
        saved = _typed(study.said(rater, item))
        other = f"{pages.CHOICES.get(saved['choice'], 'No answer')}: {saved['explanation'] or 'no explanation'}"
        return "This feature was answered in another window meanwhile, so nothing was saved.", other, 409
    except sqlite3.Error as error:
        return f"Your answer could not be saved ({error}). Keep this page open and try again.", "", 503
    return "", "", 303


def _problem(typed: dict[str, Any]) -> str:
    """What is missing before an answer can be saved, in a sentence."""
    if len(typed["explanation"]) > pages.LONGEST:
        more = len(typed["explanation"]) - pages.LONGEST
        return f"The explanation is {more:,} characters too long. Make it shorter."
    if typed["choice"] not in SCORES:
        return "Choose yes, maybe or no."
    if typed["choice"] != "no" and not typed["explanation"].strip():
        return "Write an explanation, or choose no."
    return ""
