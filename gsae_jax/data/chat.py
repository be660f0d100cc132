"""Conversations: lists of messages, the text that a chat template makes of them, and which tokens are whose.

A template is a program that came with a language model, so another process renders it (`chat_worker`). A conversation
that would take more time or memory than the limits below is refused.

Tokens of the roles `data.roles` are those of what such a message says (`content`, and thoughts, where it has them):
every token that has at least one of its characters. Tokens of headers, such as `<|im_start|>assistant`, and of ends of
turns belong to no role. If a template says itself what the assistant generates (`{% generation %}`), that is what the
role "assistant" has.
"""

import contextlib
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gsae_jax import config as config_lib
from gsae_jax.data import chat_worker
from gsae_jax.errors import UserError

logger = logging.getLogger(__name__)

DATE = "2024-07-26"  # today, to a template that asks: the same text every day, and the default of Llama 3's templates
SECONDS = 5.0  # of computing on one conversation
MEMORY = 2**30  # bytes of the process that renders
LONGEST = 10_000_000  # characters of one conversation
FORMAT = 2  # part of the key of stored tokens: raise it when these change, or what is stored beside them
SHAREGPT = {"human": "user", "gpt": "assistant"}  # names of roles there; others are as they are
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def messages_of(value: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, [{"role": ..., "content": ...}, ...], without fields that are null.

    In the form of ShareGPT, messages have `from` and `value` instead.

    Raises:
        ValueError: it is something else; the message continues "it has ...".
    """
    if not isinstance(value, list) or not value:
        raise ValueError("no list of messages")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"a message {number} that is no object")
    message = {name: field for name, field in message.items() if field is not None}
    if "from" in message and "value" in message and not {"role", "content"} & {*message}:
        message = {"role": SHAREGPT.get(message["from"], message["from"])} | {"content": message["value"]}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"a message {number} without a role; its fields: {', '.join(map(str, message))}")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"a part of message {number} that is no text: {str(kind)[:40]!r}")
    elif not isinstance(content, str) and (content is not None or "tool_calls" not in message):
        raise ValueError(f"a message {number} whose content is neither text nor a list of parts with text")
    return message


def says_nothing(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether no message has content."""
    return not any(
        part.strip()
        for message in messages
        for content in [message.get("content", "")]
        for part in ([content] if isinstance(content, str) else [each["text"] for each in content])
    )


def template_of(tokenizer: Any) -> str:
    """The chat template of a tokenizer; of several that have names, the one named default.

    Raises:
        UserError: it has none.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(f"has chat templates named {', '.join(template)}, and none named default", "lm.path")
        template = template["default"]
    if not isinstance(template, str) or not template:
        raise UserError(
            "its tokenizer has no chat template, which data.chat needs; write an instruct model, or put a "
            "chat_template.jinja into its directory",
            "lm.path",
        )
    return template


class Chat:
    """What makes tokens of conversations.

    Attributes:
        key: what the tokens depend on beside the tokenizer and the layout of rows.
        refused: how many conversations the template refused, where they are left out.
        first_refused: what was wrong with the first of them.
    """

    def __init__(self, config: config_lib.Data, tokenizer: Any, separator: int):
        """`separator`: the token that follows a conversation unless its end has it already.

        Raises:
            UserError: the tokenizer has no chat template, or one that cannot be used.
        """
        self._tokenizer, self._separator = tokenizer, separator
        self._template, self._roles = template_of(tokenizer), config.roles
        self._bos = tokenizer.bos_token_id if config.prepend_bos else None
        self._skips = config.on_bad_row == "skip"
        self._variables = dict(tokenizer.special_tokens_map)
        self._process: subprocess.Popen[str] | None = None
        self.refused, self.first_refused = 0, ""
        self.key = ["chat", FORMAT, self._template, self._variables, DATE, sorted({*config.roles}), config.on_bad_row]
        if config.roles and not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "needs a tokenizer.json, as this tokenizer does not say which characters a token stands for; leave "
                "data.roles empty",
                "data.roles",
            )

    def tokens(self, conversations: Sequence[str], where: Sequence[str]) -> list[list[int]]:
        """The tokens of conversations, each with its separator; a token that SAEs are not to see is `~token`.

        None has BOS at its beginning if rows get one. Those that the template refuses are empty if they are to be left
        out.

        Args:
            conversations: the messages of each, as JSON.
            where: what to call each in an error.

        Raises:
            UserError: the template refuses a conversation, or does what it must not do.
        """
        rendered = [self._render(json.loads(each), place) for each, place in zip(conversations, where, strict=True)]
        texts = [text for text, _ in rendered]
        try:
            encoded = self._tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=bool(self._roles),
                verbose=False,
            )
        except Exception as error:  # tokenizers has no errors of its own kind
            raise UserError(f"the tokenizer cannot read the text: {error}", "lm.path") from error
        result = []
        for number, (text, spans) in enumerate(rendered):
            ids = encoded["input_ids"][number]
            seen = _inside(encoded["offset_mapping"][number], spans) if self._roles else [True] * len(ids)
            if text and self._separator not in ids[-2:]:  # some templates end with it, or with it and a line break
                ids, seen = [*ids, self._separator], [*seen, not self._roles]
            if self._bos is not None and ids[:1] == [self._bos]:
                ids, seen = ids[1:], seen[1:]
            result.append([token if is_seen else ~token for token, is_seen in zip(ids, seen, strict=True)])
        return result

    def _render(self, messages: list[dict[str, Any]], where: str) -> tuple[str, list[list[int]]]:
        """The text of a conversation, and the [message, start, end] of what is seen."""
        tagged = "assistant" in self._roles and GENERATION.search(self._template) is not None
        of_roles = {*self._roles} - ({"assistant"} if tagged else set())
        marked = [number for number, message in enumerate(messages) if message["role"] in of_roles]
        answer = self._ask({"messages": messages, "marked": marked, "generation": tagged}, where)
        if "error" not in answer:
            return answer["text"], answer["spans"]
        problem = f"the chat template refuses {where}: {answer['error']}"
        if not self._skips:
            raise UserError(f'{problem}; change it, or write data.on_bad_row="skip" to leave such out', "data.chat")
        self.refused += 1
        self.first_refused = self.first_refused or problem
        return "", []

    def _ask(self, question: dict[str, Any], where: str) -> dict[str, Any]:
        """The answer of the process, which is started if there is none; raises `UserError` for a hostile template."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(chat_worker.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            setup = {"path": sys.path, "template": self._template, "variables": self._variables, "date": DATE}
            limits = {"seconds": SECONDS, "memory": MEMORY, "longest": LONGEST}
            answer = self._exchange(setup | limits, "its chat template")
            if "error" in answer:
                self.close()
                raise UserError(f"its chat template cannot be used: {answer['error']}", "lm.path")
        answer = self._exchange(question, f"its chat template, on {where},")
        if answer.get("hostile"):
            self.close()
            raise UserError(f"its chat template cannot be used on {where}: {answer['error']}", "lm.path")
        return answer

    def _exchange(self, question: dict[str, Any], what: str) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=process.stdin, flush=True)
            line = process.stdout.readline()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = process.wait()
        self.close()
        why = f"takes more than {SECONDS:g} seconds" if code == -signal.SIGPROF else f"ends its process (status {code})"
        raise UserError(f"{what} {why}; write a model with another one, or correct it", "lm.path")

    def close(self) -> None:
        """End the process; it starts again when it is needed."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """The process ends with this; a warning says what was left out."""
        try:
            yield
        finally:
            self.close()
        if self.refused:
            logger.warning(f"{self.refused:,} conversations are left out. The first: {self.first_refused}")


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[Sequence[int]]) -> list[bool]:
    """Which tokens have a character inside a span. Both are in the order of the text."""
    inside, at = [], 0
    spans = sorted((start, end) for _, start, end in spans)
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside.append(at < len(spans) and max(end, start + 1) > spans[at][0])
    return inside
