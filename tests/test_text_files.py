"""Documents from files of all kinds: what is read, what is held out, and what is refused."""

import glob
import gzip
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gsae_jax import config as config_lib
from gsae_jax.data import files as files_lib
from gsae_jax.data import rows as rows_lib
from tests.refusals import refused
from tests.texts import ALL, NAMES, data_config, texts_of, write


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_documents(tmp_path, documents, name, monkeypatch):
    monkeypatch.setattr(files_lib, "CHUNK", 50)  # so that documents go on from one to the next
    write(tmp_path / "text" / "deeper" / name, documents)
    config = data_config(tmp_path, path=str(tmp_path / "text"), field="body", separator="<sep>")
    train, test = texts_of(config, "train"), texts_of(config, "test")
    assert sorted(train + test) == sorted(documents)
    assert 1 <= len(test) <= 6
    as_glob = data_config(tmp_path, path=f"{tmp_path}/te*/**/{name}", field="body", separator="<sep>")
    assert texts_of(as_glob, "train") == train


def held_out_of(tmp_path, documents, name="a.jsonl", **changes):
    config = data_config(tmp_path, path=str(write(tmp_path / name, documents)), field="body", **changes)
    return texts_of(config, "train"), texts_of(config, "test")


def test_text_is_held_out_by_what_it_says(tmp_path):
    """Not by its place: speakers in turn are both held out, copies are on one side, added text moves nothing."""
    turns = [f"{'USER' if number % 2 else 'ASSISTANT'} says {number}" for number in range(2000)]
    train, test = held_out_of(tmp_path, turns)
    assert 70 <= len(test) <= 130
    assert 0.3 < np.mean([text.startswith("USER") for text in test]) < 0.7
    more_train, more_test = held_out_of(tmp_path, ["first", *turns[:700], "between", *turns[700:], *turns[:300]])
    assert set(test) <= set(more_test)
    assert set(train) <= set(more_train)
    assert not {*more_train} & {*more_test}
    assert len(more_train) + len(more_test) == 2302


def test_a_long_document_that_grows_keeps_what_is_held_out(tmp_path):
    words = " ".join(map(str, range(40_000)))
    train, test = held_out_of(tmp_path, [words], "a.txt")
    assert len("".join(train + test)) == len(words)
    assert 0.02 < len("".join(test)) / len(words) < 0.1
    assert all(part in words for part in train + test)
    assert len(train) <= len(test) + 1  # what follows on is not cut
    grown_train, grown_test = held_out_of(tmp_path, [words + " and more" * 2000], "a.txt")
    assert {*test} <= {*grown_test}
    assert {*train[:-1]} - {*grown_train} <= {train[-1]} | {words[-len(train[-1]) :]}


def test_what_was_read_is_said(tmp_path, tokenizer, capsys):
    texts = [f"text {number % 90}" for number in range(100)]
    write(tmp_path / "text" / "a.jsonl", [*texts, "", " \u00a0\u200b\n", 3])
    for name in ("a.csv", "b.CSV", "c.tar.gz", "README"):
        (tmp_path / "text" / name).write_text("x")
    config = data_config(tmp_path, path=str(tmp_path / "text"), field="body", on_bad_row="skip")
    for _ in range(2):  # also where it was prepared before
        rows_lib.open_texts(config, "train")
        rows_lib.open_texts(config, "train")
        files, counts = capsys.readouterr().out.splitlines()[-2:]
        assert files == "text: 1 of 5 files are read; left out: 2 .csv, 1 .tar.gz, 1 without an ending"
        assert "100 documents (10 copies). Left out: 2 blank documents, 1 bad row (the first: " in counts
        assert "line 103 has the number 3 under 'body'" in counts
    rows_lib.open_texts(config, "test")
    assert not capsys.readouterr().out


def test_a_long_document_is_cut_so_that_some_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("x" * 99_000)
    config = data_config(tmp_path, path=str(tmp_path / "book.txt"))
    train, test = texts_of(config, "train"), texts_of(config, "test")
    assert len("".join(train + test)) == 99_000
    assert 0.02 < len("".join(test)) / 99_000 < 0.11


def test_text_is_measured_in_characters(tmp_path):
    """However it is written, and whatever stands beside it."""
    text = "".join(chr(0x4E00 + 7919 * number % 20_000) for number in range(140_000))
    files = [tmp_path / name for name in ("utf8.jsonl", "escapes.jsonl", "images.parquet")]
    files[0].write_text(json.dumps({"text": text}, ensure_ascii=False))
    files[1].write_text(json.dumps({"text": text}))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text], "image": [os.urandom(2**22)]}), files[2])
    splits = [[texts_of(data_config(tmp_path, path=str(f)), split) for split in ("train", "test")] for f in files]
    assert splits[0] == splits[1] == splits[2]
    assert all(splits[0])


def test_a_run_of_an_earlier_version_keeps_its_text(tmp_path):
    """Every twentieth piece, from the files that were read then, byte order mark and all."""
    folder = tmp_path / "text"
    write(folder / "a.jsonl", [f"{number}" for number in range(60)] + [" "])
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    os.symlink(folder / "b.txt", folder / "c.txt")
    for later in ("d.JSONL", "e.jsonl.gz", "f.json"):
        write(folder / later, ["not read then"] * 30)
    config = data_config(tmp_path, path=str(folder), field="body", held_out="position")
    assert texts_of(config, "test") == ["19", "39", "59"]
    stamps = [
        (str(folder / f), (folder / f).stat().st_size, (folder / f).stat().st_mtime_ns)
        for f in ("a.jsonl", "b.txt", "c.txt")
    ]
    (prepared,) = (tmp_path / "tfds" / "text_files").iterdir()
    assert prepared.name == config_lib.fingerprint(stamps, "body", "")
    train = texts_of(config, "train")
    assert len(train) == 60
    assert train.count("\ufeffwith a mark") == 2
    assert train.count(" ") == 1


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "[x", "a\\b"])
def test_a_path_that_exists_is_no_pattern(tmp_path, name):
    for path in (tmp_path / name, tmp_path / "in" / f"{name}.txt"):
        file = write(path / "x.txt" if path.suffix == "" else path, ["a", "b"])
        assert list(files_lib.find(str(path)).stamps) == [str(file)]


def test_links_lead_to_one_file(tmp_path):
    file = write(tmp_path / "text" / "b.txt", ["a"])
    for number in range(4):  # of which two would keep Python's glob busy for hours
        (tmp_path / "text" / f"loop{number}").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "c.txt").symlink_to(file)
    os.link(file, tmp_path / "text" / "d.txt")
    (tmp_path / "text" / "e.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "text" / ".hidden").mkdir()
    for path in ("", "/**/*.txt"):
        listing = files_lib.find(str(tmp_path / "text") + path)
        assert list(listing.stamps) == [str(file)]
    assert files_lib.find(str(tmp_path / "text")).left_out == {
        "links to a file that is read already": 2,
        "broken links": 1,
        "hidden": 1,
    }


def test_globs(tmp_path, monkeypatch):
    for name in ("a.txt", "b/c.txt", "b/d/e.md", "b/d/[x].txt", ".h/i.txt", "b/.j.txt", "k1/l.txt", "k2/l.txt"):
        write(tmp_path / name, ["a"])
    monkeypatch.chdir(tmp_path)
    for pattern in (
        "**/*.txt",
        "*/*.txt",
        "**/d/*",
        "b/**/*",
        "b/**/[[]x].txt",
        "**/.h/*.txt",
        "**/.j.txt",
        "k?/**/*",
        "**",
    ):
        expected = [name for name in glob.glob(str(tmp_path / pattern), recursive=True) if os.path.isfile(name)]
        assert list(files_lib.find(pattern).stamps) == sorted(expected), pattern
        assert list(files_lib.find(str(tmp_path / pattern)).stamps) == sorted(expected), pattern
    for wrong in ("**/a**/x", "b/**/**a/*.txt"):
        with refused("data.path", repr(wrong), "not a valid glob"):
            files_lib.find(wrong)


def test_a_name_that_is_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("x")
    with refused("data.path", "\\udcff.txt", "UTF-8", "rename"):
        files_lib.find(str(tmp_path))


@pytest.mark.parametrize("packing", files_lib.PACKED)
def test_what_unpacks_to_far_more_is_refused(tmp_path, packing, monkeypatch):
    monkeypatch.setattr(files_lib, "SMALL", 2**16)
    file = write(tmp_path / f"a.txt{packing}", ["a b " * 2**18])
    with refused("data.path", str(file), f"{files_lib.RATIO} times its size"):
        list(files_lib.Reader("text", "").documents(str(file)))


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_order_mark_and_blank_documents_are_dropped(tmp_path, name):
    kind, packing = files_lib.kind_of(name)
    file = write(tmp_path / name, ["one", "", "  ", "\u00a0", "\u200b \u00a0", "two"])
    if not packing and kind != ".parquet":
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    reader = files_lib.Reader("body", "<sep>")
    assert list(reader.documents(str(file))) == ["one", "two"]
    assert reader.blank == 4


ROWS = [  # what a row has, the field that is asked for, the field that the error names and facts in it
    ({"text": None}, "text", "data.field", ("null under 'text'",)),
    ({"text": 3.5}, "text", "data.field", ("the number 3.5 under 'text'",)),
    ({"text": True}, "text", "data.field", ("true under 'text'",)),
    ({"text": ["a", "b"]}, "text", "data.field", ("a list of 2 under 'text'", "data.field='text.0'")),
    ({"text": {"en": "a"}}, "text", "data.field", ("an object under 'text'", "data.field='text.en'")),
    ({"body": {"en": "a"}}, "text", "data.field", ("no text under 'text'", "body, body.en")),
    ({"text": {"en": "a"}}, "text.de", "data.field", ("no text under 'text.de'", "text, text.en")),
    ({"text": "\ud800"}, "text", "data.path", ("UTF-8", "take it out")),
    ([1], "text", "data.path", ("not a JSON object", "a list of 1", "'text'")),
    (7, "text", "data.path", ("not a JSON object", "the number 7", "'text'")),
]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize(("row", "field", "about", "facts"), ROWS)
def test_a_row_without_text(tmp_path, kind, row, field, about, facts):
    *above, last = field.split(".")
    good = {last: "good"}
    for name in above:
        good = {name: good}
    rows = [good, row, good]
    file = tmp_path / f"a.{kind}"
    file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    with refused(about, f"{file} {'item' if kind == 'json' else 'line'} 2 ", *facts, 'data.on_bad_row="skip"'):
        list(files_lib.Reader(field, "").documents(str(file)))
    reader = files_lib.Reader(field, "", skip_bad_rows=True)
    assert list(reader.documents(str(file))) == ["good", "good"]
    assert reader.bad_rows == 1


def test_rows_of_tables_are_named(tmp_path):
    nested = [{"en": "one", "image": b"x"}, {"en": None, "image": b"x"}, None]
    table = pyarrow.table({"flat": ["a", None, "c"], "nested": nested, "turns": [[{"text": "hi"}], [], None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for field, texts, *facts in (
        ("flat", ["a", "c"], "row 2 ", "null under 'flat'"),
        ("nested.en", ["one"], "row 2 ", "null under 'nested.en'"),
        ("turns.0.text", ["hi"], "row 2 ", "no text under 'turns.0.text'"),
        ("other", [], "column 'other'", "flat, nested, turns"),
    ):
        reader = files_lib.Reader(field, "", skip_bad_rows=True)
        assert list(reader.documents(str(tmp_path / "a.parquet"))) == texts
        assert reader.bad_rows == 3 - len(texts)
        with refused("data.field", str(tmp_path / "a.parquet"), *facts):
            list(files_lib.Reader(field, "").documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('{"text": "a"}', ["a"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (' [\n {"text": "a"} ,\n {"text": "b"}\n]\n ', ["a", "b"]),
        ("[]", []),
        ("", []),
        ('["a", 123456, "b"]', ("item 2", "JSON object", "the number 123456")),
        ('["a" "b"]', ("comma after item 1",)),
        ('["a", "b"', ("array does not end",)),
        ('["a", {"text": "b]', ("item 2 is not JSON",)),
        ('["a"] ["b"]', ("more after its array",)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 4, 2**20])
def test_json_is_read_item_by_item(tmp_path, content, texts, chunk, monkeypatch):
    monkeypatch.setattr(files_lib, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(content)
    documents = files_lib.Reader("text", "").documents(str(tmp_path / "a.json"))
    if isinstance(texts, list):
        assert list(documents) == texts
    else:
        with refused("data.path", str(tmp_path / "a.json"), *texts):
            list(documents)


def test_changed_files_are_another_data_set(tmp_path):
    file = tmp_path / "a.txt"
    config = data_config(tmp_path, path=str(file), separator="\n")
    file.write_text("\n".join("abcd" * 10))
    before = texts_of(config, "train")
    file.write_text("\n".join("efgh" * 10))
    assert texts_of(config, "train") != before


@pytest.mark.parametrize(
    ("name", "content", "changes", "field", "facts"),
    [
        ("a.csv", b"x", {}, "data.path", (".txt, .md, ", "parquet", "{folder}", "1 .csv")),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], {}, "data.path", ("{file}", "cannot be read as .txt.gz")),
        ("a.txt.bz2", b"x", {}, "data.path", ("{file}", "cannot be read as .txt.bz2")),
        ("a.txt.xz", b"x", {}, "data.path", ("{file}", "cannot be read as .txt.xz")),
        ("a.txt.zst", b"x", {}, "data.path", ("{file}", "cannot be read as .txt.zst")),
        ("a.jsonl", b'{"text": "x"}\n' * 40, {}, "data.path", ("40 pieces", "all the same", "add text")),
        ("a.txt", b"x", {"path": ""}, "data.path", ("empty", "text file")),
        ("a.txt", b"x y z", {"separator": " "}, "data.path", ("3 pieces of text;", "add text", "20 are needed")),
        ("a.jsonl", b'{"body": "x"}', {}, "data.field", ("{file} line 1", "no text under 'text'", "fields: body")),
        ("a.jsonl", b'{"text": "x"}\n[1]', {}, "data.path", ("{file} line 2", "not a JSON object")),
        ("a.jsonl", b'{"text": "x"', {}, "data.path", ("{file}", "line 1", "column 13", "data.on_bad_row=")),
        ("a.jsonl", b"[1" * 20_000, {}, "data.path", ("{file}", "line 1 is not JSON", "data.on_bad_row=")),
        ("a.txt", "a\n".encode("utf-16"), {}, "data.path", ("{file}", "iconv -f UTF-16 -t UTF-8 {file}")),
        ("a.txt", "caf\u00e9 \u00e0".encode("latin-1"), {}, "data.path", ("{file}", "iconv -f LATIN1 -t UTF-8 {file}")),
        (
            "a.md",
            b"\x89PNG\r\n\x1a\n\x00\x00",
            {},
            "data.path",
            ("{file}", "not seem to be a text file", "leave it out"),
        ),
        ("a.parquet", b"PAR1", {}, "data.path", ("{file}", "cannot be read as .parquet:")),
    ],
)
def test_unusable_text_is_refused(tmp_path, tokenizer, name, content, changes, field, facts):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / name).write_bytes(content)
    config = data_config(tmp_path, **{"path": str(folder)} | changes)
    with refused(field, *(fact.format(folder=folder, file=folder / name) for fact in facts)):
        rows_lib.open_rows(config, "train", tokenizer, ALL)


def test_a_missing_column_is_refused(tmp_path, tokenizer):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with refused("data.field", str(tmp_path / "a.parquet"), "column 'text'", "columns: body"):
        rows_lib.open_rows(data_config(tmp_path, path=str(tmp_path)), "train", tokenizer, ALL)
