"""A language model as judge: it explains a feature, and is then asked what the explanation predicts.

The scores are those of EleutherAI's delphi (Paulo et al. 2024, arXiv 2410.13928). Detection: in which texts is the
feature active? Fuzzing: are the marked tokens those on which it is active? The explanation comes from one half of the
feature's contexts, and the questions from the other half. The prompts are files in `prompts/`.
"""

import collections
import hashlib
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from gsae_jax.errors import TrainingError
from gsae_jax.features import Features
from gsae_jax.rating import chat
from gsae_jax.rating.ratings import Rating

logger = logging.getLogger(__name__)

WINDOW, BEFORE = 32, 20  # tokens of a text that is shown, and how many of them are before the context's token
BATCH = 10  # texts in a question
LEAST = 4  # windows of each half, and of text where the feature is not active
MAX_TOKENS = 400  # of an answer
LONGEST = 300  # characters of an explanation
LEVELS = 10  # of activation, in the prompt
UNREADABLE = "unreadable"  # the problem of an answer that is none to the question
OPEN, CLOSE = "\ue000", "\ue001"  # stand for << and >> until a text's own ones are replaced
Z = 1.959964  # 95% of a normal distribution


class Window(NamedTuple):
    """A part of a row: texts of its tokens, and activations [tokens] of the feature."""

    tokens: tuple[str, ...]
    activations: np.ndarray


class _Sample(NamedTuple):
    """The sample of rows.

    Attributes:
        tokens: [rows, T].
        active: of each feature its places in the flattened array, and activations there.
        first: the first token to show: 1 where all rows begin with the same one, which is BOS. No feature is active
            on it, so that it would give wrong marks away.
    """

    tokens: np.ndarray
    active: dict[int, tuple[np.ndarray, np.ndarray]]
    first: int


class Examples(NamedTuple):
    """What a feature is explained and scored by.

    Attributes:
        explaining: windows of one half of the rows.
        active: windows of the other half.
        others: windows of random text, on which the feature is not active.
    """

    explaining: list[Window]
    active: list[Window]
    others: list[Window]


class Cost(NamedTuple):
    """What is still to be sent.

    Attributes:
        requests: number of requests.
        input_tokens: an estimate: a token has four characters.
        output_tokens: the most that the answers may have.
    """

    requests: int
    input_tokens: int
    output_tokens: int


class _Question(NamedTuple):
    """A prompt and how its answer is read; `read` returns None if it is not an answer."""

    template: str
    values: Mapping[str, Any]
    read: Callable[[str], Any]

    def prompt(self, again: bool) -> str:
        return PROMPTS.get_template(self.template).render(self.values, again=again).strip()


class _Batch(NamedTuple):
    """Texts of a question, and the right answer for each."""

    kind: str
    texts: tuple[str, ...]
    right: tuple[bool, ...]

    def question(self, explanation: str) -> _Question:
        values = {"explanation": explanation, "texts": self.texts}
        return _Question(f"{self.kind}.txt", values, lambda text: numbers_in(text, len(self.texts)))


class Judge:
    """Rates features by a language model on a server. Fulfils `ratings.Rater`.

    Attributes:
        name: the model, and a hash of what ratings depend on besides: prompts, seed, `max_tokens`.
    """

    def __init__(self, client: chat.Client, seed: int = 0, max_tokens: int = MAX_TOKENS):
        """A judge that asks nothing yet.

        Args:
            client: of the server.
            seed: of the random texts, the wrongly marked tokens and the order.
            max_tokens: of each answer. A model that thinks before it answers needs more than the default.
        """
        self._client, self._seed, self._max_tokens = client, seed, max_tokens
        sources = [LOADER.get_source(PROMPTS, name)[0] for name in sorted(LOADER.list_templates())]
        constants = [WINDOW, BEFORE, BATCH, LEAST, LONGEST, LEVELS]
        facts = json.dumps([sources, constants, seed, max_tokens])
        self.name = f"{client.model} {hashlib.sha256(facts.encode()).hexdigest()[:8]}"
        self._sampled: tuple[Features, _Sample] | None = None

    def rate(self, features: Features, number: int) -> Rating | None:
        """The rating of a feature.

        The score is the mean of two balanced accuracies, that of detection and that of fuzzing, so it is the mean of
        four fractions: right answers for texts with and without the feature, and for tokens marked right and wrong.
        Its 95% interval combines the Wilson intervals of the four (Zou and Donner 2008): a bootstrap would have no
        width where all answers are right, which is common, and Wilson's has. It is about the texts that were asked
        about, for this explanation; a second explanation may have another score.

        An answer that cannot be used is asked for once more, in other words; then its batch does not count.

        Returns:
            The rating; its details have `detection` and `fuzzing` (balanced accuracies), `texts` (that were judged in
            both), `answers` (questions that were asked), `unusable` (how many of them have no answer), and `problems`
            (their number by kind). None if the feature has too few contexts, or active ones almost everywhere; and,
            with a warning, if the model does not explain it or more than half of the answers are unusable.

        Raises:
            UserError: there is no such feature, or the server refuses the requests.
            TrainingError: the server cannot be reached, or its replies are not those of the protocol.
        """
        examples = self._examples(features, number)
        if examples is None:
            return None
        feature = f"feature {number} of {features.sae}"
        [(explanation, problem)] = self._answers([_explaining(examples.explaining)])
        if problem:
            self._require_protocol([problem])
            logger.warning(f"{feature} gets no score: its explanation is {problem}")
            return None
        batches = self._batches(features, number, examples)
        answers = self._answers([batch.question(explanation) for batch in batches])
        problems = collections.Counter(problem for _, problem in answers if problem)
        unusable = sum(problems.values())
        if 2 * unusable > len(batches):
            self._require_protocol(problems)
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(problems.items()))
            logger.warning(f"{feature} gets no score: {unusable} of {len(batches)} answers cannot be used ({kinds})")
            return None
        counts = collections.Counter[tuple[str, bool]]()
        rights = collections.Counter[tuple[str, bool]]()
        for batch, (answer, problem) in zip(batches, answers, strict=True):
            if not problem:
                for expected, given in zip(batch.right, answer, strict=True):
                    counts[batch.kind, expected] += 1
                    rights[batch.kind, expected] += expected == given
        parts = [(kind, expected) for kind in ("detection", "fuzzing") for expected in (True, False)]
        if not all(counts[part] for part in parts):
            logger.warning(f"{feature} gets no score: no answer about a kind of text can be used")
            return None
        score, low, high = mean_of_fractions([(rights[part], counts[part]) for part in parts])
        fractions = [rights[part] / counts[part] for part in parts]
        details = {
            "detection": sum(fractions[:2]) / 2,
            "fuzzing": sum(fractions[2:]) / 2,
            "texts": counts.total(),
            "answers": len(batches),
            "unusable": unusable,
            "problems": dict(problems),
        }
        return Rating(score, low, high, explanation, details)

    def cost(self, features: Features, numbers: Iterable[int]) -> Cost:
        """What the rating of features will send, without what is known; sends nothing.

        The number of requests is exact if every answer can be used. One that cannot costs a second request.

        Args:
            features: of an SAE.
            numbers: of features.

        Raises:
            UserError: there is no such feature.
        """
        seen: set[bytes] = set()  # hashes, as all prompts of an SAE are large
        asked = 0

        def add(prompt: str) -> None:
            nonlocal asked
            name = hashlib.sha256(prompt.encode()).digest()[:16]
            if prompt and name not in seen:
                seen.add(name)
                asked += math.ceil(len(prompt) / 4)

        for number in numbers:
            examples = self._examples(features, number)
            if examples is None:
                continue
            missing, explanation = self._missing(_explaining(examples.explaining))
            if missing:
                add(missing)
                explanation = "x" * LONGEST
            if explanation is None:  # the model does not explain it
                continue
            for batch in self._batches(features, number, examples):
                question = batch.question(explanation)
                add(question.prompt(False) if missing else self._missing(question)[0])
        return Cost(len(seen), asked, len(seen) * self._max_tokens)

    def _answers(self, questions: Sequence[_Question]) -> list[tuple[Any, str]]:
        """To each question its answer and "", or None and the problem."""
        found: list[tuple[Any, str]] = [(None, "")] * len(questions)
        asked = list(range(len(questions)))
        for again in (False, True):
            replies = self._client.ask([questions[place].prompt(again) for place in asked], self._max_tokens)
            for place, reply in zip(asked, replies, strict=True):
                found[place] = _read(reply, questions[place])
            asked = [place for place in asked if found[place][1]]
        return found

    def _missing(self, question: _Question) -> tuple[str, Any]:
        """The prompt to send for a question, or "" and its answer (None if none can be used) if that is known."""
        for again in (False, True):
            prompt = question.prompt(again)
            reply = self._client.known(prompt, self._max_tokens)
            if reply is None:
                return prompt, None
            answer, problem = _read(reply, question)
            if not problem:
                break
        return "", answer

    def _require_protocol(self, problems: Iterable[str]) -> None:
        """Raises `TrainingError` for replies that the model did not make, of which the next run asks again."""
        for problem in (chat.NO_JSON, chat.NO_CHOICES):
            if problem in problems:
                what = f"the replies of {self._client.url} are none of the chat protocol ({problem})"
                raise TrainingError(f"{what}; all answers so far are kept, and the same command continues from there")

    def _random(self, features: Features, number: int, use: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(features.sae.encode()), number, use])

    def _examples(self, features: Features, number: int) -> Examples | None:
        """What a feature is explained and scored by; None if there is too little."""
        halves = _halves(features, number, self._sample(features).first)
        if min(map(len, halves)) < LEAST:
            return None
        others = self._others(features, number, len(halves[1]))
        return Examples(*halves, others) if len(others) >= LEAST else None

    def _sample(self, features: Features) -> "_Sample":
        """The sample of rows, which is read once for each SAE."""
        if self._sampled is None or self._sampled[0] is not features:
            tokens, active = features.sample()
            self._sampled = features, _Sample(tokens, active, int(len(np.unique(tokens[:, 0])) == 1))
        return self._sampled[1]

    def _others(self, features: Features, number: int, most: int) -> list[Window]:
        """Windows without the feature, from random rows of the sample, at most one of each."""
        tokens, active, first = self._sample(features)
        on = np.zeros(tokens.size, bool)
        if number in active:
            on[active[number][0]] = True
        on, tokens = on.reshape(tokens.shape)[:, first:], tokens[:, first:]
        length = tokens.shape[1]
        before = np.pad(np.cumsum(on, 1), ((0, 0), (1, 0)))
        size = min(WINDOW, length)
        is_free = before[:, size:] == before[:, : length - size + 1]  # [rows, starts]
        random = self._random(features, number, 0)
        windows = []
        for row in random.permutation(np.flatnonzero(is_free.any(1)))[:most]:
            start = random.choice(np.flatnonzero(is_free[row]))
            texts = features.pieces(features.about["sample_rows"][row])[first + start : first + start + size]
            windows.append(Window(tuple(texts), np.zeros(size, np.float32)))
        return windows

    def _batches(self, features: Features, number: int, examples: Examples) -> list[_Batch]:
        """The questions about an explanation."""
        random = self._random(features, number, 1)
        active = [examples.active[place] for place in random.permutation(len(examples.active))]
        detection = [("".join(window.tokens), True) for window in active[: len(examples.others)]]
        detection += [("".join(window.tokens), False) for window in examples.others]
        # A window is in one half of the questions as it is and in the other half with wrong marks, so that nobody sees
        # both at once.
        fuzzing: tuple[list[tuple[str, bool]], ...] = ([], [])
        for place, window in enumerate(active):
            on = shown(window)
            off = [at for at, text in enumerate(window.tokens) if text and at not in on]
            if on and off:
                wrong = random.choice(off, min(len(on), len(off)), replace=False)
                fuzzing[place % 2].append((marked(window, on), True))
                fuzzing[1 - place % 2].append((marked(window, wrong.tolist()), False))
        batches = []
        for kind, texts in (("detection", detection), *(("fuzzing", each) for each in fuzzing)):
            order = random.permutation(len(texts))
            for part in np.array_split(order, math.ceil(len(texts) / BATCH)) if len(texts) else ():
                batches.append(_Batch(kind, *zip(*(texts[place] for place in part), strict=True)))
        return batches


def shown(window: Window) -> dict[int, float]:
    """The activations of a window, by the places that have the text: of a character, that of its last token."""
    active: dict[int, float] = {}
    for place in np.flatnonzero(window.activations).tolist():
        value = float(window.activations[place])
        at = next((later for later in range(place, len(window.tokens)) if window.tokens[later]), None)
        if at is not None and abs(value) > abs(active.get(at, 0.0)):
            active[at] = value
    return active


def marked(window: Window, places: Iterable[int]) -> str:
    """The text of a window, with << and >> around the tokens at some places.

    Brackets of the text that could be taken for such marks become ‹ and ›.
    """
    chosen, text = set(places), ""
    for place, token in enumerate(window.tokens):
        token = token.replace(OPEN, "�").replace(CLOSE, "�")
        first, last = place - 1 not in chosen, place + 1 not in chosen
        text += f"{OPEN * first}{token}{CLOSE * last}" if place in chosen else token
    text = re.sub(f"[<{OPEN}]{{2,}}", lambda run: run[0].replace("<", "‹"), text)
    text = re.sub(f"[>{CLOSE}]{{2,}}", lambda run: run[0].replace(">", "›"), text)
    return text.replace(OPEN, "<<").replace(CLOSE, ">>")


def quoted(text: str) -> str:
    """A JSON string in one line; whatever cannot be seen is escaped, so that a text cannot leave its quotes."""
    whole = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in whole)


def cleaned(text: str) -> str | None:
    """An explanation in one line of bounded length; None if nothing is left."""
    line = "".join(char for char in " ".join(_answered(text).split()) if char.isprintable()).strip()
    return (line if len(line) <= LONGEST else f"{line[: LONGEST - 1].rstrip()}…") or None


def numbers_in(text: str, count: int) -> list[int] | None:
    """The last list of this many zeros and ones in an answer; None if there is none."""
    for found in reversed(re.findall(r"\[[\s01,]*\]", _answered(text))):
        try:
            numbers = json.loads(found)
        except ValueError:
            continue
        if len(numbers) == count and set(numbers) <= {0, 1}:
            return numbers
    return None


def mean_of_fractions(parts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """The mean of independent fractions, each (right, of how many), and the ends of its 95% interval.

    Each fraction has its Wilson interval; the squares of their distances to the fractions add up.
    """
    below = above = mean = 0.0
    for right, count in parts:
        fraction = right / count
        spread = 1 + Z**2 / count
        centre = (fraction + Z**2 / (2 * count)) / spread
        half = Z / spread * math.sqrt(fraction * (1 - fraction) / count + (Z / (2 * count)) ** 2)
        mean += fraction / len(parts)
        below += ((fraction - (centre - half)) / len(parts)) ** 2
        above += ((centre + half - fraction) / len(parts)) ** 2
    return mean, max(0.0, mean - math.sqrt(below)), min(1.0, mean + math.sqrt(above))


def _halves(features: Features, number: int, first: int) -> tuple[list[Window], list[Window]]:
    """A window of every row that has a context: of every second one, and of the others.

    The strongest contexts and those of quantiles alternate, each by themselves, so that both halves have both.
    `first`: the first token of a row that is shown.
    """
    halves: tuple[list[Window], list[Window]] = ([], [])
    seen: set[int] = set()
    turn = collections.Counter[bool]()
    for context in features[number].contexts:
        if context.row in seen:
            continue
        seen.add(context.row)
        is_strongest = context.quantile is None
        start = max(first, min(context.position - BEFORE, len(context.tokens) - WINDOW))
        some = slice(start, start + WINDOW)
        halves[turn[is_strongest] % 2].append(
            Window(tuple(features.pieces(context.row)[some]), context.activations[some])
        )
        turn[is_strongest] += 1
    return halves


def _explaining(windows: Sequence[Window]) -> _Question:
    """The question for an explanation."""
    strongest = max(float(np.abs(window.activations).max()) for window in windows)
    examples = []
    for window in windows:
        on = shown(window)
        levels = [(window.tokens[place], _level(value, strongest)) for place, value in on.items()]
        examples.append({"text": marked(window, on), "active": levels})
    is_signed = any((window.activations < 0).any() for window in windows)
    return _Question("explain.txt", {"examples": examples, "is_signed": is_signed}, cleaned)


def _level(value: float, strongest: float) -> int:
    """An activation from 1 to LEVELS, with its sign."""
    return int(math.copysign(max(1, round(LEVELS * abs(value) / strongest)), value))


def _read(reply: chat.Reply, question: _Question) -> tuple[Any, str]:
    if reply.problem:
        return None, reply.problem
    answer = question.read(reply.content)
    return answer, "" if answer is not None else UNREADABLE


def _answered(text: str) -> str:
    """What follows the thoughts of a model that writes them into its answer."""
    return text.rpartition("</think>")[2]


LOADER = jinja2.PackageLoader("gsae_jax.rating", "prompts")
# The texts in prompts are JSON strings, so nothing is escaped for HTML.
PROMPTS = jinja2.Environment(
    loader=LOADER,
    autoescape=False,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PROMPTS.filters["quoted"] = quoted
