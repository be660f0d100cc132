"""Conversations: the tokens that transformers makes of them, which are whose, and templates that must not run."""

import copy
import json
import shutil
from datetime import datetime

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from gsae_jax import config as config_lib
from gsae_jax import config_trees, storing
from gsae_jax.activations import masking
from gsae_jax.activations import store as store_lib
from gsae_jax.data import chat as chat_lib
from gsae_jax.data import rows as rows_lib
from gsae_jax.lms import tokenizer as tokenizer_lib
from tests.fixtures.chat import make
from tests.refusals import refused
from tests.texts import ALL, data_config
from tests.training import begin

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}"""
# A system message becomes part of the first question; roles must take turns.
LLAMA_2 = """{%- if messages[0].role == 'system' %}
{%- set rest, system = messages[1:], '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{%- else %}{% set rest, system = messages, '' %}{% endif %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 is even) %}{{ raise_exception('take turns') }}{% endif %}
{%- set content = system + message.content if loop.first else message.content %}
{%- if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
LLAMA_3 = """{{- bos_token }}{% set ns = namespace(date='') %}
{%- if strftime_now is defined %}{% set ns.date = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + ns.date + '\\n\\n' }}
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}{% endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}"""
# The system message goes to the last question, and each answer ends with EOS.
MISTRAL = """{%- set loop_messages = messages %}{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- endif %}{%- for message in loop_messages %}
{%- if message['role'] == 'tool' %}{% continue %}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' }}
{%- if loop.index >= loop.length - 1 and system is defined %}{{ system + '\\n\\n' }}{% endif %}
{{- message['content'] + '[/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{%- endfor %}"""
# Thoughts of earlier turns are left out.
THINKING = """{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- if loop.last %}{% set content = '<think>\\n' + thoughts + '\\n</think>\\n\\n' + content %}{% endif %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}"""
PARTS = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}"""
GENERATION = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{% else %}{{ message.content }}<|im_end|>{% endif %}

{% endfor %}"""
STYLES = {"chatml": CHATML, "llama_2": LLAMA_2, "llama_3": LLAMA_3, "gemma": GEMMA, "mistral": MISTRAL}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]

SHORT = [
    {"role": "user", "content": "  What is a cat?\n"},
    {"role": "assistant", "content": "An animal – 🐈, with  two spaces.\n\n"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "assistant"},
]
SYSTEM = [{"role": "system", "content": "Answer. <|im_end|>"}, *SHORT]


def wrapped(backend, template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL)


def metaspace():
    """As of Llama 2: "▁" before the text and between words, bytes where the vocabulary has no character."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    return backend, trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *of_bytes, *SPECIAL])


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=lambda kind: kind.__name__)
def backend(request):
    backend, trainer = request.param()
    backend.train_from_iterator([make.FILE.read_text()], trainer)
    if request.param is metaspace:  # bytes are no special tokens
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    return backend


@pytest.fixture(scope="module")
def plain_backend():
    backend, trainer = byte_level()
    backend.train_from_iterator([make.FILE.read_text()], trainer)
    return backend


def seen_of(tokenizer, messages, *roles, **changes):
    """(tokens, which are seen) of one conversation."""
    config = config_lib.Data(corpus="text", path="x", chat="messages", roles=roles, **{"prepend_bos": False} | changes)
    chat = chat_lib.Chat(config, tokenizer, tokenizer.eos_token_id)
    with chat.open():
        (ids,) = chat.tokens([json.dumps(messages)], ["FILE line 3"])
    ids = np.array(ids, np.int32)
    return masking.tokens_of(ids), ids >= 0


@pytest.fixture
def today(monkeypatch):
    class Fixed(datetime):
        @classmethod
        def now(cls):
            return cls.fromisoformat(chat_lib.DATE)

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)


@pytest.mark.parametrize("style", STYLES)
def test_tokens_are_those_of_transformers(backend, style, today):
    tokenizer = wrapped(backend, STYLES[style])
    for messages in (SHORT, SYSTEM):
        if style == "gemma" and messages is SYSTEM:
            with refused("data.chat", "FILE line 3", "System role not supported"):
                seen_of(tokenizer, messages)
            continue
        expected = tokenizer.apply_chat_template(messages, return_dict=False)
        tokens, _ = seen_of(tokenizer, messages, "assistant")
        ends = tokenizer.eos_token_id in expected[-2:]
        assert tokens.tolist() == expected + [tokenizer.eos_token_id] * (not ends)
        assert seen_of(tokenizer, messages)[1].all()
        without = seen_of(tokenizer, messages, prepend_bos=True)[0].tolist()  # each row begins with BOS
        assert without == tokens.tolist()[expected[0] == tokenizer.bos_token_id :]


def characters_seen(tokenizer, messages, *roles, **changes):
    """The parts of the text that the seen tokens stand for, by the tokenizer's offsets."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    _, seen = seen_of(tokenizer, messages, *roles, **changes)
    on = np.zeros(len(text) + 1, bool)
    for (start, end), is_seen in zip(encoded["offset_mapping"], seen, strict=False):
        on[start:end] |= is_seen
    return [
        text[part] for part in map(lambda run: slice(*run), np.flatnonzero(np.diff(np.r_[False, on])).reshape(-1, 2))
    ]


@pytest.mark.parametrize("style", STYLES)
def test_tokens_of_a_role_are_those_of_its_content(plain_backend, style, today):
    """Contents that say "user" and "assistant" are told from headers; what the template trims is not looked at."""
    tokenizer = wrapped(plain_backend, STYLES[style])
    trims = style not in ("chatml", "mistral")
    for messages in (SHORT,) if style == "gemma" else (SHORT, SYSTEM):
        for role in {message["role"] for message in messages}:
            contents = [message["content"] for message in messages if message["role"] == role]
            found = characters_seen(tokenizer, messages, role)
            if role == "system" and style == "mistral":
                contents = contents * 2 if len([m for m in messages if m["role"] == "user"]) > 2 else contents
            assert [text.strip() for text in found] == [text.strip() for text in contents], role
            if not trims and style == "chatml":
                assert found == contents
        both = characters_seen(tokenizer, messages, "user", "assistant")
        assert [text.strip() for text in both] == [message["content"].strip() for message in messages[-4:]]


def test_a_token_with_a_character_of_the_content_belongs_to_it(backend):
    """Where the template's space and the content's first letters are one token, as most tokenizers have it."""
    tokenizer = wrapped(backend, "{% for m in messages %}{{ ' ' + m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "What is"}, {"role": "assistant", "content": "the sum"}]
    tokens, seen = seen_of(tokenizer, messages, "assistant")
    assert tokenizer.decode(tokens[seen]).strip() == "the sum"
    assert tokenizer.decode(tokens[~seen][:-1]).strip() == "What is"


def test_thoughts(plain_backend):
    tokenizer = wrapped(plain_backend, THINKING)
    said = "<think>\nIt is small.\n</think>\n\nA cat."
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    assert characters_seen(tokenizer, messages, "assistant") == [said]
    assert characters_seen(tokenizer, [*messages, *messages], "assistant") == ["A cat.", said]
    with_spaces = [messages[0], {"role": "assistant", "content": "<think> It is small.</think>A cat. "}]
    assert characters_seen(tokenizer, with_spaces, "assistant") == ["It is small.", "A cat."]
    assert characters_seen(tokenizer, messages, "user") == ["?"]
    named = wrapped(plain_backend, "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}\n{% endfor %}")
    messages = [{"role": "assistant", "reasoning": "Hm", "content": "A cat"}]
    assert characters_seen(named, messages, "assistant") == ["Hm", "A cat"]


def test_content_that_the_template_changes_is_refused_where_roles_are_asked_for(plain_backend):
    tokenizer = wrapped(plain_backend, "{% for m in messages %}{{ m.role }}: {{ m.content | length }}\n{% endfor %}")
    assert tokenizer.decode(seen_of(tokenizer, SHORT)[0]).startswith("user: 17")
    with refused("data.chat", "FILE line 3", "cannot be told"):
        seen_of(tokenizer, SHORT, "assistant")


def test_a_template_that_says_what_is_generated(plain_backend):
    tokenizer = wrapped(plain_backend, GENERATION)
    expected = tokenizer.apply_chat_template(SHORT, return_dict=True, return_assistant_tokens_mask=True)
    tokens, seen = seen_of(tokenizer, SHORT, "assistant")
    assert tokens.tolist() == [*expected["input_ids"], tokenizer.eos_token_id]
    assert seen.tolist() == [*map(bool, expected["assistant_masks"]), False]
    of_users = seen_of(tokenizer, SHORT, "user")[1]
    assert seen_of(tokenizer, SHORT, "user", "assistant")[1].tolist() == (seen | of_users).tolist()
    assert not (seen & of_users).any()
    assert of_users.any()


def test_content_in_parts(plain_backend):
    """Both kinds of template take both kinds of content."""
    parts = [{**m, "content": [{"type": "text", "text": part} for part in m["content"].split(" ", 1)]} for m in SHORT]
    joined = [{**m, "content": m["content"].replace(" ", "", 1)} for m in SHORT]
    for template in (CHATML, PARTS):
        tokenizer = wrapped(plain_backend, template)
        tokens, seen = seen_of(tokenizer, parts, "user")
        as_text = seen_of(tokenizer, joined, "user")
        np.testing.assert_array_equal(tokens, as_text[0])
        np.testing.assert_array_equal(seen, as_text[1])
        own = parts if template is PARTS else joined
        assert tokens.tolist()[:-1] == tokenizer.apply_chat_template(own, return_dict=False)


HOSTILE = {
    "{% for i in range(10**12) %}a{% endfor %}": "Range too big",
    "{{ ''.__class__.__mro__ }}": "'__class__'",
    "{{ lipsum.__globals__.os.system('id') }}": "'__globals__'",
    "{% set ns = namespace() %}{% set ns.__x = 1 %}": "'__x'",
    "{{ messages.append(1) }}": "'append'",
    "{{ 'a' * 10**12 }}": "memory",
    "{{ 'x' | center(10**10) }}": "memory",
    "{% set ns = namespace(x='a' * 9) %}{% for i in range(999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "memory",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than 0.5 seconds",
    "{{ lipsum(n=10**9) }}": "more than 0.5 seconds",
    "{% for i in range(99999) %}{% for j in range(999) %}abcdefghi{% endfor %}{% endfor %}": "10,000,000 characters",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "recursion",
    f"{{{{ {'(' * 10**5}1{')' * 10**5} }}}}": "recursion",
    "{% for": "end of template",
}


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_is_refused_in_bounded_time_and_memory(plain_backend, template, monkeypatch):
    # Where the time is not what is tested, a slow machine may take longer.
    monkeypatch.setattr(chat_lib, "SECONDS", 0.5 if "seconds" in HOSTILE[template] else 60)
    monkeypatch.setattr(chat_lib, "MEMORY", 2**28)
    tokenizer = wrapped(plain_backend, template)
    with refused("lm.path", "chat template", HOSTILE[template]):
        seen_of(tokenizer, SHORT)
    # On one conversation only, after others; and then also where bad rows are skipped.
    later = f"{{% if messages | length > 2 %}}{template}{{% endif %}}{{{{ messages[0].content }}}}"
    if template not in ("{% for",) and "(((" not in template:
        with refused("lm.path", "chat template", "FILE line 3", HOSTILE[template]):
            seen_of(wrapped(plain_backend, later), SHORT, on_bad_row="skip")


def test_a_process_that_ends_is_an_error(plain_backend):
    config = config_lib.Data(corpus="text", path="x", chat="messages")
    tokenizer = wrapped(plain_backend, CHATML)
    chat = chat_lib.Chat(config, tokenizer, tokenizer.eos_token_id)
    with chat.open():
        chat.tokens([json.dumps(SHORT)], ["a"])
        chat._process.kill()
        chat._process.wait()
        with refused("lm.path", "status -9"):
            chat.tokens([json.dumps(SHORT)], ["a"])
        assert chat.tokens([json.dumps(SHORT)], ["a"])  # of another process


def test_which_template_a_model_has(tmp_path, lm_dir):
    for name, content, expected in (
        ("chat_template.jinja", "one", "one"),
        ("chat_template.json", json.dumps({"chat_template": "two"}), "two"),
        ("tokenizer_config.json", json.dumps({"chat_template": "three"}), "three"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": n, "template": n} for n in ("tool_use", "default")]}),
            "default",
        ),
    ):
        folder = shutil.copytree(lm_dir, tmp_path / expected)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) if name == "tokenizer_config.json" else {}
        own = json.loads(content) if settings else None
        (folder / name).write_text(json.dumps(settings | own) if settings else content)
        assert chat_lib.template_of(tokenizer_lib.load(folder)) == expected
    tokenizer = tokenizer_lib.load(lm_dir)
    with refused("lm.path", "no chat template"):
        chat_lib.template_of(tokenizer)
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with refused("lm.path", "tool_use, rag"):
        chat_lib.template_of(tokenizer)


def conversations(number=60):
    return [
        [
            {"role": "user", "content": f"Question {n}" + " and more" * (n % 7)},
            {"role": "assistant", "content": f"Answer {n}" + " and so on" * (n % 5)},
        ]
        for n in range(number)
    ]


def written(file, each, field="messages"):
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(each)), field: each}), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps([{field: messages} for messages in each]))
    else:
        file.write_text("\n".join(json.dumps({"id": 1, field: messages}) for messages in each))
    return file


def chats(tmp_path, file, **changes):
    return data_config(tmp_path, **{"path": str(file), "chat": "messages", "context_length": 16} | changes)


def all_rows(config, tokenizer, split="train"):
    rows = rows_lib.open_rows(config, split, tokenizer, ALL)
    return np.stack([rows[row] for row in range(len(rows))])


@pytest.fixture
def tokenizer(plain_backend):
    return wrapped(plain_backend, LLAMA_3.replace("Today Date: ' + ns.date + '", ""))


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_files_of_conversations_become_rows(tmp_path, tokenizer, kind):
    each = conversations()
    file = written(tmp_path / f"chats{kind}", each)
    (tmp_path / "README.md").write_text("no messages here")
    stream = all_rows(chats(tmp_path, file.parent), tokenizer)[:, 1:].ravel()
    *found, _ = np.split(stream, np.flatnonzero(stream == tokenizer.eos_token_id) + 1)
    expected = {tuple(tokenizer.apply_chat_template(messages, return_dict=False)[1:]) for messages in each}
    assert len(found) > 40
    assert {tuple(tokens[:-1].tolist()) for tokens in found} <= expected
    assert tokenizer.bos_token_id not in stream


def test_a_document_is_a_conversation_also_if_turns_end_with_eos(tmp_path, tokenizer):
    tokenizer.eos_token = "<|eot_id|>"
    config = chats(tmp_path, written(tmp_path / "a.jsonl", conversations()))
    rows = rows_lib.open_rows(config, "train", tokenizer, ALL)
    tokens = np.stack([rows[row] for row in range(len(rows))])
    stream = tokens[:, 1:].ravel()
    begin = np.array(tokenizer.apply_chat_template(conversations(1)[0], return_dict=False)[1:6])  # without BOS
    begins = (np.lib.stride_tricks.sliding_window_view(stream, len(begin)) == begin).all(1)
    assert (stream == tokenizer.eos_token_id).sum() > 1.9 * begins.sum() > 80
    of_token = np.cumsum(np.pad(begins, (0, len(begin) - 1))) - 1
    found = rows_lib.documents(config, tokenizer, rows, tokens)
    np.testing.assert_array_equal(found, of_token[:: config.context_length - 1])
    again = rows_lib.open_rows(config, "train", tokenizer, ALL)  # from the stored tokens
    np.testing.assert_array_equal(rows_lib.documents(config, tokenizer, again, tokens), found)


def test_rows_of_documents_begin_with_one_bos(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", conversations())
    for length in (16, 24):
        rows = all_rows(chats(tmp_path, file, pack="documents", context_length=length), tokenizer)
        assert (rows[:, 0] == tokenizer.bos_token_id).all()
        assert (rows[:, 1:] != tokenizer.bos_token_id).all()
    without = all_rows(chats(tmp_path, file, pack="documents", prepend_bos=False, context_length=length), tokenizer)
    np.testing.assert_array_equal(without, rows)


def test_roles_hide_the_other_tokens_and_nothing_else(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", conversations())
    everything = all_rows(chats(tmp_path, file), tokenizer)
    rows = all_rows(chats(tmp_path, file, roles="assistant"), tokenizer)
    np.testing.assert_array_equal(masking.tokens_of(rows), everything)
    seen = masking.allowed(rows, ())
    text = tokenizer.decode(everything[seen])
    assert "Answer 7" in text
    assert "Question" not in text
    assert not seen[:, 0].any()
    assert not seen[np.isin(everything, tokenizer.all_special_ids)].any()
    users = masking.allowed(all_rows(chats(tmp_path, file, roles="user"), tokenizer), ())
    assert not (users & seen).any()
    both = masking.allowed(all_rows(chats(tmp_path, file, roles=("user", "assistant")), tokenizer), ())
    np.testing.assert_array_equal(both, users | seen)
    special = tuple(np.unique(everything[seen])[:2].tolist())
    np.testing.assert_array_equal(masking.allowed(rows, special), seen & ~np.isin(everything, special))
    np.testing.assert_array_equal(masking.allowed(jax.numpy.array(rows), special), masking.allowed(rows, special))
    np.testing.assert_array_equal(masking.tokens_of(jax.numpy.array(rows)), everything)


def test_stored_tokens_depend_on_roles_template_and_special_tokens(tmp_path, tokenizer, monkeypatch):
    file = written(tmp_path / "a.jsonl", conversations())

    def fingerprint(tokenizer=tokenizer, **changes):
        return rows_lib.open_rows(chats(tmp_path, file, **changes), "train", tokenizer, ALL).fingerprint

    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML
    another = copy.deepcopy(tokenizer)
    another.bos_token = "<|im_start|>"
    names = {fingerprint(), fingerprint(roles="user"), fingerprint(other), fingerprint(another, prepend_bos=False)}
    names.add(fingerprint(prepend_bos=False))
    assert len(names) == 5
    monkeypatch.setattr(chat_lib.Chat, "tokens", None)  # what is stored is not made again
    assert fingerprint() in names


def test_conversations_in_the_form_of_sharegpt(tmp_path, tokenizer):
    names = {"user": "human", "assistant": "gpt"}
    each = [[{"from": names[m["role"]], "value": m["content"]} for m in messages] for messages in conversations()]
    file = written(tmp_path / "a.jsonl", each, "conversations")
    ours = all_rows(chats(tmp_path, file, chat="conversations", roles="assistant"), tokenizer)
    same = all_rows(chats(tmp_path, written(tmp_path / "b.jsonl", conversations()), roles="assistant"), tokenizer)
    np.testing.assert_array_equal(ours, same)


def test_conversations_are_held_out_by_all_they_say(tmp_path, tokenizer):
    """Although they begin alike; copies are on one side."""
    long = {"role": "system", "content": "Be kind. " * 300}
    each = [[long, *messages] for messages in conversations(200)]
    config = chats(tmp_path, written(tmp_path / "a.jsonl", each * 2))
    source, _ = rows_lib.open_texts(config, "test")
    texts = [example["text"].decode() for example in map(source.__getitem__, range(len(source)))]
    assert 8 < len(texts) < 60
    assert len(texts) == 2 * len(set(texts))
    assert [json.loads(text)[0] for text in texts] == [long] * len(texts)


BAD = {
    "no list": "hello",
    "no list of messages": [],
    "no object": ["hello"],
    "without a role": [{"text": "hello"}],
    "neither text nor": [{"role": "user", "content": 3}],
    "no text: 'image'": [{"role": "user", "content": [{"type": "image"}]}],
    "message 2": [{"role": "user", "content": "a"}, {"role": "user"}],
}


@pytest.mark.parametrize("fact", BAD)
def test_rows_without_messages(tmp_path, tokenizer, fact):
    good = [{"messages": messages} for messages in conversations()]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, [good[0], {"messages": BAD[fact]}, *good[1:]])))
    with refused("data.chat", "line 2", fact, "'messages'"):
        rows_lib.open_texts(chats(tmp_path, file), "train")
    rows_lib.open_texts(chats(tmp_path, file, on_bad_row="skip"), "train")


def test_what_else_is_refused(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", conversations())
    with refused("data.roles", "'asistant'", "assistant, user"):
        all_rows(chats(tmp_path, file, roles=("user", "asistant")), tokenizer)
    with refused("data.chat", "line 1", "'chat'", "messages"):
        all_rows(chats(tmp_path, file, chat="chat"), tokenizer)
    with refused("roles", "data.chat"):
        data_config(tmp_path, roles="user")
    with refused("chat", "data.corpus"):
        data_config(tmp_path, corpus="stdlib", chat="messages")
    with refused("chat", "data.held_out"):
        chats(tmp_path, file, held_out="position")
    (tmp_path / "b.txt").write_text("text")
    with refused("data.path", "1 .txt"):
        all_rows(chats(tmp_path, tmp_path / "b.txt"), tokenizer)
    silent = wrapped(
        tokenizer.backend_tokenizer, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with refused("data.roles", "assistant"):
        all_rows(chats(tmp_path, file, roles="assistant"), silent)
    assert all_rows(chats(tmp_path, file, roles="user"), silent).size
    tokenizer.chat_template = None
    with refused("lm.path", "no chat template"):
        all_rows(chats(tmp_path, file), tokenizer)


def test_conversations_that_the_template_refuses_can_be_left_out(tmp_path, plain_backend, capsys):
    tokenizer = wrapped(plain_backend, GEMMA)
    each = [[SYSTEM[0], *messages] if n == 30 else messages for n, messages in enumerate(conversations())]
    file = written(tmp_path / "a.jsonl", each)
    with refused("data.chat", "line 31", "System role not supported", "data.on_bad_row"):
        [all_rows(chats(tmp_path, file), tokenizer, split) for split in ("train", "test")]
    whole = [all_rows(chats(tmp_path, file, on_bad_row="skip"), tokenizer, split) for split in ("train", "test")]
    assert "1 conversations are left out" in capsys.readouterr().err
    text = tokenizer.decode(np.concatenate([part.ravel() for part in whole]))
    assert "Question 29" in text
    assert "Question 30" not in text


def test_a_token_without_an_embedding_in_a_conversation(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", [[{"role": "user", "content": f"{n} <extra>"}] for n in range(60)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    number = tokenizer.convert_tokens_to_ids("<extra>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    for roles in ((), "user"):
        for prepare in (False, True):
            config = chats(tmp_path, file, roles=roles)
            if prepare:
                rows_lib.open_rows(config, "train", tokenizer, ALL)
            with refused("lm.path", "'<extra>'"):
                rows_lib.open_rows(config, "train", tokenizer, ALL, number)


@pytest.fixture
def chat_config(config_dict, lm_dir, tmp_path):
    """The tiny experiment on the committed conversations; SAEs see what the assistant says."""
    folder = shutil.copytree(lm_dir, tmp_path / "lm")
    shutil.copy(make.FILE.parent / "chat_template.jinja", folder)
    config_dict.lm.path, config_dict.data.path = str(folder), str(make.FILE)
    config_dict.data.chat, config_dict.data.roles = "messages", ("assistant",)
    config_dict.data.data_dir = str(tmp_path / "tfds")
    config_dict.evaluation.tokens = 512
    return config_dict


def test_sources_hide_what_rows_hide(chat_config):
    """The language model reads every token; the mask is that of the roles."""
    program, _, lm_params, stream = begin(config_trees.from_dict(config_lib.Experiment, chat_config))
    rows = next(stream)
    assert (rows < 0).mean() > 0.3
    activations, allowed = program.source(lm_params, program.source.place(rows))
    plain, everything = program.source(lm_params, program.source.place(masking.tokens_of(rows)))
    np.testing.assert_array_equal(allowed, rows >= 0)
    assert everything[:, 1:].mean() > allowed.mean() + 0.3
    for site in activations:
        np.testing.assert_array_equal(activations[site], plain[site])


def test_a_store_has_the_tokens_and_beside_them_which_are_hidden(chat_config, tmp_path):
    storing.of_model(chat_config, storing.Wanted(str(tmp_path / "store"), tokens=2000))
    experiment = config_trees.from_dict(config_lib.Experiment, chat_config)
    tokenizer = tokenizer_lib.load(tmp_path / "lm")
    rows = rows_lib.open_rows(experiment.data, "train", tokenizer, 2000)
    shuffled = rows_lib.shuffled(rows, experiment.seed)  # without an end
    rows = np.stack([shuffled[number] for number in range(len(rows))])
    stored = store_lib.Store.open(tmp_path / "store").rows("train").arrays.read(range(len(rows)))
    np.testing.assert_array_equal(stored.tokens, masking.tokens_of(rows))
    np.testing.assert_array_equal(stored.mask, rows >= 0)
    assert 0.1 < stored.mask.mean() < 0.7


def test_the_committed_conversations_are_those_of_the_script(tmp_path, monkeypatch):
    import random

    draw = random.Random(0)
    lines = make.FILE.read_text().splitlines()
    assert [json.loads(line)["messages"] for line in lines] == [make.conversation(draw) for _ in lines]
