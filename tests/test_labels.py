"""Labels of text, and of its tokens."""

import json
import textwrap

import numpy as np
import pytest

from gsae_jax.data import labels
from gsae_jax.data.corpora import stdlib
from tests.refusals import refused


def parts(source, kind):
    """[(text, value)] of the labels of a kind, without spaces around the text."""
    document = labels.of_python(textwrap.dedent(source), "module")
    return [(document.text[start:end].strip(), value) for start, end, value in document.spans.get(kind, [])]


def test_strings_of_all_kinds():
    source = '''
    a = 'one' + "two" f"{a + 1!r} three" rb'\\x00'
    """four
    # no comment
    five"""  # comment
    b = f\'\'\'{"six"} def\'\'\'
    '''
    strings = [text for text, _ in parts(source, "string")]
    assert strings == [
        "'one'",
        '"two"',
        'f"{a + 1!r} three"',
        "rb'\\x00'",
        '"""four\n# no comment\nfive"""',
        "f'''{\"six\"} def'''",
    ]
    assert parts(source, "comment") == [("# comment", "comment")]
    assert parts(source, "identifier") == [("a", "other name"), ("b", "other name")]  # none inside of strings
    assert parts(source, "keyword") == []


def test_indentation_is_that_of_the_statement():
    source = """
    def f(
    x):  # f
        if x:
            # deep

            y = [
        1]
            for _ in y: pass
            while x:
                if y:
                    if x:
                        y
    z
    """
    document = labels.of_python(textwrap.dedent(source), "module")
    level = [value for start, end, value in document.spans["indentation"] for _ in range(start, end)]
    words = ("def", "x):", "if x:", "# deep", "y =", "1]", "for", "while", "if y", "if x:\n                    y", "z")
    assert [level[document.text.index(word)] for word in words] == [*"00112222", "3", "4 or more", "0"]
    whole = "".join(document.text[start:end] for start, end, _ in document.spans["indentation"])
    assert whole == document.text  # every character has a level


def test_keywords_and_roles_of_names():
    source = """
    from os import path as p
    @decorated
    class A(B, metaclass=C):
        async def f(self, x: int = 1) -> None:
            return await self.g(x).h[p.y] or not call(key=x)
    x = lambda: (yield)
    match = 1
    """
    assert parts(source, "keyword") == [
        ("from", "import"),
        ("import", "import"),
        ("as", "import"),
        ("class", "definition"),
        ("async", "other"),
        ("def", "definition"),
        ("None", "constant"),
        ("return", "result"),
        ("await", "other"),
        ("or", "operator"),
        ("not", "operator"),
        ("lambda", "definition"),
        ("yield", "result"),
    ]
    roles = parts(source, "identifier")
    for pair in [
        ("A", "class definition"),
        ("metaclass", "argument name"),
        ("f", "function definition"),
        ("g", "method call"),
        ("h", "attribute"),
        ("y", "attribute"),
        ("call", "call"),
        ("key", "argument name"),
        ("decorated", "other name"),
        ("match", "other name"),
    ]:
        assert pair in roles
    assert ("x", "argument name") not in roles  # x = lambda, outside of brackets


def test_letters_that_are_not_ascii_keep_their_places():
    assert parts("é = 'ß😀' + ä  # ü\nλ = None", "string") == [("'ß😀'", "string")]
    assert parts("é = 'ß😀' + ä  # ü\nλ = None", "comment") == [("# ü", "comment")]
    assert parts("é = 'ß😀' + ä  # ü\nλ = None", "keyword") == [("None", "constant")]


@pytest.mark.parametrize("source", ["x = (1,\n", '"""open', "if x:\n    y\n  z\n", "x = $\n", "x = 'open\n"])
def test_a_file_that_python_refuses_has_no_labels(source):
    assert labels.of_python(source, "module") is None


@pytest.mark.parametrize("source", ["", "\n", "# only", "x"])
def test_short_files(source):
    assert labels.of_python(source, "module").text == source


def test_the_module_is_a_package_or_a_file():
    for path, module in (("asyncio/events.py", "asyncio"), ("argparse.py", "argparse")):
        document = stdlib.labelled({"text": b"x = 1", "path": path.encode()})
        assert document.spans["module"] == [(0, 5, module)]


def test_a_token_has_the_label_of_its_first_character_that_is_no_space(tokenizer):
    text = "import os  # why\nclass A:\n    def run(self):\n        return 'a b'\n"
    made = labels.rows([labels.of_python(text, "m")], tokenizer, 64, tokenizer.bos_token_id, 1)
    (ids,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    assert made.tokens_RxT.shape == (1, 64)
    assert made.tokens_RxT[0, : len(ids) + 1].tolist() == [tokenizer.bos_token_id, *ids]
    assert np.flatnonzero(made.mask_RxT[0]).tolist() == list(range(1, len(ids) + 1))
    texts = ["", *(tokenizer.decode([token]) for token in ids)]

    def of(kind, value):
        places = np.flatnonzero(made.labels[kind][0] == made.values[kind].index(value))
        return "".join(texts[place] for place in places)

    assert of("keyword", "definition").split() == ["class", "def"]
    assert of("keyword", "import").split() == ["import"]
    assert of("keyword", "result").split() == ["return"]
    assert of("string", "string").strip() == "'a b'"
    assert of("comment", "comment").strip() == "# why"
    assert of("identifier", "function definition").strip().startswith("run")
    assert made.labels["indentation"][0, 0] == -1  # BOS
    assert (made.labels["indentation"][0, len(ids) + 1 :] == -1).all()  # padding


def test_rows_are_of_one_document_each(tokenizer):
    documents = [
        labels.Document(f"{word} " * count, {"word": [(0, 3, word)]}) for word, count in (("one", 5000), ("two", 3))
    ]
    made = labels.rows(documents, tokenizer, 32, None, 10**6)
    per_document = labels.PER_DOCUMENT // 32
    assert made.document_R.tolist() == [0] * per_document + [1]
    assert made.mask_RxT[: per_document - 1].all()  # a document ends in a row of its own
    assert 0 < made.mask_RxT[-1].sum() < 32
    assert made.values == {"word": ["one", "two"]}
    assert (made.labels["word"][-1] == 1).sum() >= 1
    assert len(labels.rows(documents, tokenizer, 32, None, 64).tokens_RxT) == per_document  # the limit is in documents


def test_labelled_text_of_the_users_own(tmp_path):
    file = tmp_path / "labelled.jsonl"
    file.write_text(json.dumps({"text": "a cat", "labels": {"pos": [[0, 1, "article"], [2, 5, "noun"]]}}) + "\n\n")
    (document,) = labels.read(str(file))
    assert document == labels.Document("a cat", {"pos": [(0, 1, "article"), (2, 5, "noun")]})


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("{", "line 1"),
        ("[]", "line 1"),
        ('{"text": "a"}', "labels"),
        ('{"text": 1, "labels": {}}', "no string"),
        ('{"text": "a", "labels": {"pos": [[0, 2, "noun"]]}}', "[0, 2,"),
        ('{"text": "a", "labels": {"pos": [[0, 1, 7]]}}', "'pos'"),
        ('{"text": "a", "labels": {"pos": [[1, 1, "noun"]]}}', "1 characters"),
        ('{"text": "a", "labels": {"pos": [[0.0, 1, "noun"]]}}', "[0.0, 1"),
    ],
)
def test_labelled_text_that_cannot_be_used(tmp_path, line, fact):
    file = tmp_path / "labelled.jsonl"
    file.write_text(line)
    with refused("", fact):
        list(labels.read(str(file)))


def test_a_file_that_is_not_there(tmp_path):
    with refused("", "nowhere.jsonl"):
        list(labels.read(str(tmp_path / "nowhere.jsonl")))
