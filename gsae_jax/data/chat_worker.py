"""A process that renders chat templates for `data.chat`. It is run as a file, and imports jinja2 but not this package.

A template is code from whoever made the model. Jinja's sandbox keeps it from Python's internals. It does not keep it
from loops without an end or from strings as large as the memory. The operating system does that here: it ends this
process when a conversation takes longer than the limit, and refuses it more memory.

Each line of the input and of the output is one JSON value. The first line of the input is the setup. Every other line
is one conversation, which has one line of output.
"""

import contextlib
import datetime
import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

Message = dict[str, Any]

FIRST = 0x100000  # the characters from here on, which Unicode leaves to private use, mark content
MARKERS = re.compile("[\U00100000-\U0010fffd]")
GENERATION = (chr(0x10FFFC), chr(0x10FFFD))
MOST_MESSAGES = 30_000
THINK = re.compile(r"(</?think>)")
BEFORE = re.compile(r"</?think>\s*\Z")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # where messages have thoughts; templates know the first two


def _limit_memory(size: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # macOS cannot limit it
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, resource.getrlimit(limit)[1]))


class Renderer:
    """A template in the environment that `transformers` gives it."""

    def __init__(self, template: str, variables: dict[str, Any], date: str, longest: int):
        """`template` and the special tokens that it may name; the date that it is told; characters of a result."""
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox

        renderer = self
        self.marks_generation = False
        self._longest, self._variables, self._errors = longest, variables, jinja2.exceptions

        class Generation(jinja2.ext.Extension):
            """`{% generation %}`, which stands around what the assistant says."""

            tags = {"generation"}  # noqa: RUF012 (the base class has it without ClassVar)

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

            def _render(self, caller: Any) -> str:
                text = caller()
                return f"{GENERATION[0]}{text}{GENERATION[1]}" if renderer.marks_generation else text

        class Namespace(jinja2.utils.Namespace):
            def __setitem__(self, name: str, value: Any) -> None:
                if isinstance(name, str) and name.startswith("_"):
                    raise jinja2.exceptions.SecurityError(f"a namespace has the name {name!r}")
                super().__setitem__(name, value)

        def namespace(*args: Any, **values: Any) -> Namespace:
            made = Namespace()
            for name, value in dict(*args, **values).items():
                made[name] = value
            return made

        def raise_exception(message: str) -> None:
            raise jinja2.exceptions.TemplateError(message)

        def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(x, ensure_ascii=ensure_ascii, **options)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        now = datetime.datetime.fromisoformat(date)
        environment.filters["tojson"] = tojson
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: now.strftime(form),
            "namespace": namespace,
        }
        self._template = environment.from_string(template)
        parts = [{"type": "text", "text": chr(FIRST)}]
        # Whether content that is a string, or a list of parts, comes through as it is.
        self._takes_text, self._takes_parts = self._shows(chr(FIRST)), self._shows(parts)

    def _shows(self, content: Any) -> bool:
        try:
            text = self._rendered([{"role": "user", "content": content}])
        except self._errors.SecurityError:
            raise
        except (self._errors.TemplateError, TypeError, AttributeError, KeyError, IndexError, ValueError):
            return False
        return chr(FIRST) in text and "'text'" not in text and '"text"' not in text

    def _rendered(self, messages: list[Message]) -> str:
        variables = self._variables | {"messages": messages, "tools": None, "documents": None}
        pieces, size = [], 0
        for piece in self._template.generate(**variables, add_generation_prompt=False):
            size += len(piece)
            if size > self._longest:
                raise MemoryError(f"it makes more than {self._longest:,} characters of one conversation")
            pieces.append(piece)
        return "".join(pieces)

    def _adapted(self, message: Message) -> Message:
        """A message in the form that the template takes, with its thoughts under both names."""
        content, thoughts = message.get("content"), [message[name] for name in THOUGHTS if name in message]
        if isinstance(content, str) and self._takes_parts and not self._takes_text:
            message = message | {"content": [{"type": "text", "text": content}]}
        elif isinstance(content, list) and not self._takes_parts:
            message = message | {"content": "".join(part["text"] for part in content)}
        return {"thinking": thoughts[0]} | message | {"reasoning_content": thoughts[0]} if thoughts else message

    def __call__(self, messages: list[Message], marked: set[int], generation: bool) -> tuple[str, list[list[int]]]:
        """(The text, [message, start, end] of what is content of the messages numbered `marked`).

        With `generation`, what stands in `{% generation %}` is marked as well, as of message -1.

        Raises:
            ValueError: the template changes content such that it cannot be found in the text.
        """
        messages = [self._adapted(message) for message in messages]
        self.marks_generation = False
        text = self._rendered(messages)
        if not marked and not generation:
            return text, []
        if (
            len(messages) > MOST_MESSAGES
            or MARKERS.search(text)
            or MARKERS.search(json.dumps(messages, ensure_ascii=False))
        ):
            raise ValueError("it has too many messages, or private characters from U+100000 on")
        self.marks_generation = generation
        for mark in (_whole, _inside, _around_thoughts):
            of_content = [
                _marked(message, number, mark) if number in marked else message
                for number, message in enumerate(messages)
            ]
            with contextlib.suppress(self._errors.TemplateError, ValueError):
                found, spans = _spans(self._rendered(of_content))
                if found == text:
                    return text, _joined(text, spans, messages) if mark is _around_thoughts else spans
        raise ValueError("the template changes the content of a message, which then cannot be told from the rest")


def _texts(message: Message) -> dict[str, Any]:
    """What a message says, its thoughts included: {field: text or list of parts}."""
    return {name: message[name] for name in ("content", *THOUGHTS) if isinstance(message.get(name), str | list)}


def _marked(message: Message, number: int, mark: Callable[[str, str, str], str]) -> Message:
    """The message with marks in what it says."""
    start, end = chr(FIRST + 2 * number), chr(FIRST + 2 * number + 1)
    new = {
        name: mark(text, start, end)
        if isinstance(text, str)
        else [part | {"text": mark(part["text"], start, end)} for part in text]
        for name, text in _texts(message).items()
    }
    return message | new


def _whole(text: str, start: str, end: str) -> str:
    return f"{start}{text}{end}" if text else text


def _inside(text: str, start: str, end: str) -> str:
    """Marks inside the space around a text, which many templates take away."""
    core = text.strip()
    before = len(text) - len(text.lstrip())
    return f"{text[:before]}{start}{core}{end}{text[before + len(core) :]}" if core else text


def _around_thoughts(text: str, start: str, end: str) -> str:
    """Marks of what stands between the tags of thoughts, at which templates cut."""
    return "".join(part if THINK.fullmatch(part) else _inside(part, start, end) for part in THINK.split(text))


def _spans(marked: str) -> tuple[str, list[list[int]]]:
    """(The text without marks, [message, start, end] between them); raises `ValueError` if one has no partner."""
    pieces: list[str] = []
    spans: list[list[int]] = []
    opened: dict[int, int] = {}
    at = last = 0
    for match in MARKERS.finditer(marked):
        pieces.append(marked[last : match.start()])
        at, last = at + match.start() - last, match.end()
        of, is_end = divmod(ord(match.group()) - FIRST, 2)
        number = -1 if match.group() in GENERATION else of
        if is_end:
            if number not in opened:
                raise ValueError
            spans.append([number, opened.pop(number), at])
        elif number in opened:
            raise ValueError
        else:
            opened[number] = at
    if opened:
        raise ValueError
    return "".join([*pieces, marked[last:]]), spans


def _joined(text: str, spans: list[list[int]], messages: list[Message]) -> list[list[int]]:
    """The spans; those of one message are one where what stands between them is what stands there in its content."""
    joined: list[list[int]] = []
    for number, start, end in spans:
        tag = BEFORE.search(text, 0, start)
        if tag and _says(messages[number], text[tag.start() : end]):
            start = tag.start()
        before = joined[-1] if joined else None
        if before and before[0] == number and _says(messages[number], text[before[1] : end]):
            before[2] = end
        else:
            joined.append([number, start, end])
    return joined


def _says(message: Message, words: str) -> bool:
    """Whether these words stand in a message as they are."""
    texts = [text if isinstance(text, list) else [{"text": text}] for text in _texts(message).values()]
    return any(words in part["text"] for parts in texts for part in parts)


def main() -> None:
    """Answer every line of the input."""
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]  # where the parent finds jinja2
    import jinja2.sandbox  # before memory is limited

    seconds = setup["seconds"]
    _limit_memory(setup["memory"])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever it does

    def answer(work: Callable[[], tuple[str, list[list[int]]]]) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            text, spans = work()
            result: dict[str, Any] = {"text": text, "spans": spans}
        except jinja2.exceptions.SecurityError as error:
            result = {"error": f"it is not allowed that {error}"[:500], "hostile": True}
        except (MemoryError, RecursionError, OverflowError) as error:
            why = str(error) or f"it needs more than {setup['memory']:,} bytes of memory"
            result = {"error": why[:500], "hostile": True}
        except Exception as error:  # whatever a template can do wrong
            result = {"error": (str(error) or type(error).__name__)[:500], "hostile": False}
        line = json.dumps(result)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(line, flush=True)

    made: list[Renderer] = []

    def make() -> tuple[str, list[list[int]]]:
        made.append(Renderer(setup["template"], setup["variables"], setup["date"], setup["longest"]))
        return "", []

    answer(make)
    for line in sys.stdin:
        asked = json.loads(line)
        answer(partial(made[0], asked["messages"], {*asked["marked"]}, asked["generation"]))


if __name__ == "__main__":
    main()
