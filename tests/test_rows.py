"""Rows of tokens: how they are cut, kept, shuffled and counted; prepared data sets."""

import copy
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging

import gsae_jax
from gsae_jax import config_trees
from gsae_jax.data import files as files_lib
from gsae_jax.data import progress
from gsae_jax.data import rows as rows_lib
from gsae_jax.data import tokens as tokens_lib
from gsae_jax.data.corpora import text as text_corpus
from gsae_jax.lms import loading
from gsae_jax.storage import run_directory
from tests.refusals import refused
from tests.texts import ALL, NAMES, data_config, texts_of, write

NAMES += [
    f"a{kind}{packing}" for kind, packing in zip((".txt", ".jsonl", ".json", ".ndjson"), files_lib.PACKED, strict=True)
]


NAMES += [f"a.parquet{packing}" for packing in files_lib.PACKED]


class Stories(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"story": tfds.features.Text(), "length": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "validation": self._generate_examples(5)}

    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"story": f"story {index}", "length": index}


def test_a_prepared_tfds_data_set_by_name(tmp_path, tokenizer):
    builder = Stories(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    found = {"corpus": "tfds", "name": "stories", "field": "story", "test_split": "validation"}
    rows = rows_lib.open_rows(data_config(tmp_path, **found, prepend_bos=False), "train", tokenizer, ALL)
    decoded = tokenizer.decode(np.concatenate([rows[i] for i in range(len(rows))]))
    assert decoded.count("story") > 20
    for changes, field, *facts in (
        ({"name": "storis"}, "data.name", "'storis' is not a data set", str(tmp_path / "tfds")),
        ({"field": "text"}, "data.field", "'text' is not a feature of stories", "story, length"),
        ({"field": "length"}, "data.field", "'length' of stories", "int64", "text feature"),
        ({"test_split": "test"}, "data.test_split", "'test'", "train, validation"),
    ):
        with refused(field, *facts):
            rows_lib.open_rows(data_config(tmp_path, **found | changes), "test", tokenizer, ALL)


def test_a_data_set_that_cannot_be_read_at_random_is_refused(tmp_path, tokenizer, monkeypatch):
    Stories(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    info = tmp_path / "tfds" / "stories" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    config = data_config(tmp_path, corpus="tfds", name="stories", field="story")
    with refused("data.name", "'stories'", "tfrecord", "tensorflow_datasets.scripts.convert_format", str(info.parent)):
        rows_lib.open_rows(config, "train", tokenizer, ALL)


def test_rows_are_the_documents_tokens_behind_bos(tmp_path, tokenizer, documents):
    (tmp_path / "a.txt").write_text("\n".join(documents))
    config = data_config(tmp_path, path=str(tmp_path / "a.txt"), separator="\n")
    rows = rows_lib.open_rows(config, "test", tokenizer, ALL)
    expected = []
    builder, _ = text_corpus.open_corpus(config)
    for example in builder.as_data_source(split="test"):
        expected += tokenizer(example["text"].decode())["input_ids"] + [tokenizer.eos_token_id]
    assert len(rows) == len(expected) // 7
    for index in range(len(rows)):
        assert rows[index].tolist() == [tokenizer.bos_token_id, *expected[7 * index : 7 * index + 7]]
    assert len(rows_lib.open_rows(config, "test", tokenizer, limit=21)) == 3
    ordered = list(rows_lib.in_order(rows, 2))
    np.testing.assert_array_equal(np.concatenate(ordered), [rows[i] for i in range(len(rows) // 2 * 2)])


@pytest.mark.parametrize("options", [{}, {"prepend_bos": False}, {"pack": "documents", "context_length": 4}])
def test_the_document_in_which_a_row_begins(tmp_path, tokenizer, documents, options):
    (tmp_path / "a.txt").write_text("\n".join(documents))
    config = data_config(tmp_path, path=str(tmp_path / "a.txt"), separator="\n", **options)
    rows = rows_lib.open_rows(config, "train", tokenizer, ALL)
    builder, _ = text_corpus.open_corpus(config)
    texts = [example["text"].decode() for example in builder.as_data_source(split="train")]
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]  # with EOS
    of_token = np.repeat(np.arange(len(texts)), lengths)
    stream = of_token[:: config.context_length - config.prepend_bos][: len(rows)]
    expected = np.arange(len(rows)) if config.pack == "documents" else stream
    found = rows_lib.documents(config, tokenizer, rows, np.stack([rows[row] for row in range(len(rows))]))
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 10


def test_tokens_are_prepared_once(tmp_path, tokenizer, text_dir, monkeypatch):
    config = data_config(tmp_path, path=str(text_dir))
    few = rows_lib.open_rows(config, "train", tokenizer, limit=50)
    more = rows_lib.open_rows(config, "train", tokenizer, limit=ALL)
    assert len(few) == 7
    assert len(more) > 10_000

    def never(*args):
        raise AssertionError

    monkeypatch.setattr(tokens_lib, "_tokenize", never)
    again = rows_lib.open_rows(config, "train", tokenizer, limit=50)
    np.testing.assert_array_equal([again[i] for i in range(7)], [few[i] for i in range(7)])


def test_batches_shuffle_resume_and_split_by_process(tmp_path, tokenizer, text_dir, monkeypatch):
    rows = rows_lib.open_rows(data_config(tmp_path, path=str(text_dir)), "train", tokenizer, limit=7 * 40)
    assert len(rows) == 40
    stream = rows_lib.batches(rows, 8, seed=3)
    epochs = [np.concatenate([next(stream) for _ in range(5)]) for _ in range(2)]
    every_row = sorted(rows[i].tolist() for i in range(40))
    for epoch in epochs:  # each a whole pass in an order of its own
        assert sorted(epoch.tolist()) == every_row
    assert not np.array_equal(epochs[0], epochs[1])
    assert epochs[0].tolist() != [rows[i].tolist() for i in range(40)]

    position = stream.get_state()
    ahead = [next(stream) for _ in range(7)]
    resumed = rows_lib.batches(rows, 8, seed=3)
    resumed.set_state(json.loads(json.dumps(position)))
    np.testing.assert_array_equal([next(resumed) for _ in range(7)], ahead)

    read = []
    whole = rows_lib.TokenRows.__getitem__
    monkeypatch.setattr(rows_lib.TokenRows, "__getitem__", lambda self, row: read.append(row) or whole(self, row))
    for parts in ([range(8)], [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2], [1, 3, 4, 5, 6, 7]]):
        together = np.zeros((5, 8, 8), np.int32)
        for part in parts:
            stream = rows_lib.batches(rows, 8, seed=3, local=part)
            together[:, part] = [next(stream) for _ in range(5)]
            stream.set_state(position)
            np.testing.assert_array_equal(next(stream), ahead[0][part])
        np.testing.assert_array_equal(together.reshape(40, 8), epochs[0])
    alone = rows_lib.batches(rows, 1, seed=3)  # one row a batch
    np.testing.assert_array_equal(np.concatenate([next(alone) for _ in range(80)]), np.concatenate(epochs))
    one = rows_lib.batches(rows, 8, seed=3, local=[5])
    read.clear()
    next(one)
    assert len(read) <= 16  # one for the batch, and those read ahead; not eight for each


def with_token(tokenizer):
    """The tokenizer with one more token, and the ids that the language model has embeddings for."""
    tokenizer = copy.deepcopy(tokenizer)
    d_vocab = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    return tokenizer, d_vocab


def test_a_token_without_an_embedding_is_refused(tmp_path, tokenizer, documents):
    """While the text is prepared, and also where its tokens were kept for another language model."""
    tokenizer, d_vocab = with_token(tokenizer)
    # Text may have separators, so that these do not number the documents.
    separated = (f"{text} {tokenizer.eos_token * 500}" for text in documents)
    texts = [*separated, *(f"with <extra> {number}" for number in range(40))]
    config = data_config(tmp_path, path=str(write(tmp_path / "a.jsonl", texts)), field="body")
    for prepare in (False, True):
        if prepare:
            rows_lib.open_rows(config, "train", tokenizer, ALL)
        facts = (f"'<extra>' with id {d_vocab},", f"{tmp_path / 'a.jsonl'} that ", "begins 'with <extra> ")
        with refused("lm.path", *facts, f"0 to {d_vocab - 1}"):
            rows_lib.open_rows(config, "train", tokenizer, ALL, d_vocab)
        assert bool(list((tmp_path / "tfds").glob("**/tokens.bin"))) == prepare
    rows_lib.open_rows(config, "train", tokenizer, ALL, d_vocab + 1)
    for meta in (tmp_path / "tfds").glob("**/meta.json"):  # as earlier versions wrote it
        meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "largest"}))
    rows_lib.open_rows(config, "train", tokenizer, ALL, d_vocab + 1)
    with refused("lm.path", "'<extra>'", f"0 to {d_vocab - 1}"):
        rows_lib.open_rows(config, "train", tokenizer, ALL, d_vocab)


def test_tokens_are_kept_elsewhere_if_the_text_can_only_be_read(tmp_path, tokenizer, text_dir, monkeypatch, capsys):
    config = data_config(tmp_path, path=str(text_dir))
    builder, _ = text_corpus.open_corpus(config)
    builder.download_and_prepare()
    before = sorted((tmp_path / "tfds").rglob("*"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "mine"))
    access = os.access  # root may write everywhere but on a disk that can only be read
    monkeypatch.setattr(os, "access", lambda path, mode: "tfds" not in str(path) and access(path, mode))
    rows = rows_lib.open_rows(config, "train", tokenizer, ALL)
    assert f"the tokens of this text are kept in {tmp_path / 'mine'}" in capsys.readouterr().out
    assert sorted((tmp_path / "tfds").rglob("*")) == before
    monkeypatch.setattr(tokens_lib, "_tokenize", None)
    again = rows_lib.open_rows(config, "train", tokenizer, ALL)
    assert "are kept" not in capsys.readouterr().out
    assert again.fingerprint == rows.fingerprint


HOLDER = """
import sys, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_another_process_holds_is_named(tmp_path, capsys):
    lock = tmp_path / ".folder.lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        told = []

        def tell(message):
            told.append((time.monotonic() - began, message))
            holder.stdin.close()  # it ends

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokens_lib.logger, "warning", tell)
            began = time.monotonic()
            with tokens_lib.alone(tmp_path / "folder"):
                pass
    ((seconds, message),) = told
    assert seconds < 1
    assert str(lock) in message


def test_preparing_text_logs_nothing(tmp_path, tokenizer, text_dir, caplog):
    """But what it says itself; and what absl logs otherwise stays as it was."""
    before = logging.get_verbosity()
    rows_lib.open_rows(data_config(tmp_path, path=str(text_dir)), "train", tokenizer, limit=7 * 5)
    assert {record.name for record in caplog.records} <= {"gsae_jax.data.rows", "gsae_jax.data.tokens"}
    assert logging.get_verbosity() == before


def test_fewer_tokens_than_a_batch(tmp_path, tokenizer, text_dir):
    rows = rows_lib.open_rows(data_config(tmp_path, path=str(text_dir)), "train", tokenizer, limit=7 * 5)
    with refused("data", "5 rows", "one batch of 8"):
        rows_lib.batches(rows, 8, seed=0)


def test_a_data_dir_that_cannot_be_written(tmp_path, tokenizer, text_dir):
    (tmp_path / "file").write_text("")
    config = data_config(tmp_path, path=str(text_dir), data_dir=str(tmp_path / "file" / "tfds"))
    with refused("data.data_dir", config.data_dir, "prepared data", "TFDS_DATA_DIR"):
        rows_lib.open_rows(config, "train", tokenizer, ALL)


def test_unknown_corpus(tmp_path, tokenizer):
    with refused("data.corpus", "'stdlb'", "did you mean 'stdlib'", "stdlib, text, tfds"):
        rows_lib.open_rows(data_config(tmp_path, corpus="stdlb"), "train", tokenizer, ALL)


def test_the_standard_library_is_held_out_by_file(tmp_path):
    from gsae_jax.data.corpora import stdlib

    builder, feature = stdlib.open_corpus(data_config(tmp_path, corpus="stdlib"))
    builder.download_and_prepare()
    train, test = (
        {example["path"].decode(): example[feature] for example in builder.as_data_source(split=split)}
        for split in ("train", "test")
    )
    assert b"class JSONDecoder" in (train | test)["json/decoder.py"]
    assert not train.keys() & test.keys()
    assert 0.01 < len(test) / len(train) < 0.1


def test_the_held_out_tokens_of_a_run(experiment, tmp_path):
    workdir = run_directory.Workdir(tmp_path / "run")
    workdir.create(config_trees.to_dict(experiment), None)
    workdir.release()
    tokenizer = loading.load_lm(experiment.lm.path).tokenizer
    for tokens, rows in ((None, experiment.evaluation.tokens // 16), (512, 32)):
        ours = gsae_jax.held_out(tmp_path / "run", tokens)
        assert (ours.shape, ours.dtype) == ((rows, 16), np.int32)
        expected = rows_lib.held_out(experiment, tokenizer, tokens or experiment.evaluation.tokens)
        np.testing.assert_array_equal(ours, np.concatenate(list(expected)))
    with refused("tokens", "is 0"):
        gsae_jax.held_out(tmp_path / "run", 0)
    with refused("run", "holds no run"):
        gsae_jax.held_out(tmp_path)


def test_rows_that_begin_with_documents(tmp_path, tokenizer):
    """As a plain loop over the documents gives them; whole documents are held out, on the same side as in a stream."""
    documents = [f"document {number}: {'word ' * (number % 19)}end" for number in range(200)]
    documents.append("".join(f"long {number} " for number in range(1000)) + "end")  # of several pieces
    lines = [f"\n{text}\n" for text in documents]
    file = write(tmp_path / "a.txt", lines)
    config = data_config(tmp_path, path=str(file), separator="<sep>", pack="documents", context_length=16)
    assert sorted(texts_of(config, "train") + texts_of(config, "test")) == sorted(documents)
    as_stream = data_config(tmp_path, path=str(file), separator="<sep>")
    short = set(documents[:-1])
    for split in ("train", "test"):
        assert short & {*texts_of(config, split)} == short & {text.strip() for text in texts_of(as_stream, split)}
    builder, _ = text_corpus.open_corpus(config)
    texts = [example["text"].decode() for example in builder.as_data_source(split="train")]
    tokens = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    expected = [row[:16] for row in tokens if len(row) >= 16]
    assert 20 < len(expected) < len(texts) - 20
    rows = rows_lib.open_rows(config, "train", tokenizer, ALL)
    assert [row.tolist() for row in rows] == expected
    few = rows_lib.open_rows(config, "train", tokenizer, 45)
    assert [row.tolist() for row in few] == expected[:3]
    longer = rows_lib.open_rows(data_config(tmp_path, **vars(config) | {"context_length": 64}), "train", tokenizer, ALL)
    assert [row.tolist() for row in longer] == [row[:64] for row in tokens if len(row) >= 64]
    without_bos = data_config(tmp_path, **vars(config) | {"prepend_bos": False, "context_length": 15})
    assert rows_lib.open_rows(without_bos, "train", tokenizer, ALL)[0].tolist() == expected[0][1:]
    too_long = data_config(tmp_path, **vars(config) | {"context_length": 20_000})
    with refused("data.context_length", "20000"):
        rows_lib.open_rows(too_long, "train", tokenizer, ALL)


def test_documents_that_are_too_short_for_rows_are_counted(tmp_path, tokenizer):
    documents = [f"document {number}: {'word ' * 40 * (number % 10 == 0)}end" for number in range(100)]
    file = write(tmp_path / "a.jsonl", documents)
    config = data_config(tmp_path, path=str(file), field="body", pack="documents", context_length=32)
    rows = rows_lib.open_rows(config, "train", tokenizer, ALL)
    texts = len(texts_of(config, "train"))
    facts = (f"{texts - len(rows)} of {texts} documents", "context_length=32", "lower data.context_length")
    with refused("data", f"{len(rows)} rows", "one batch of 32", *facts):
        rows_lib.batches(rows, 32, seed=0)
    stream = data_config(tmp_path, path=str(file), field="body", context_length=1024)
    with refused("data", "one batch of 32", "add text"):
        rows_lib.batches(rows_lib.open_rows(stream, "train", tokenizer, ALL), 32, seed=0)


def test_a_token_without_an_embedding_in_rows_of_documents(tmp_path, tokenizer, documents):
    """It is refused if a row has it, also in tokens that were kept for another model, but not in what is left out."""
    tokenizer, d_vocab = with_token(tokenizer)
    cut = [f"{text} {'word ' * 30} <extra>" for text in documents]
    config = data_config(tmp_path, path=str(write(tmp_path / "a.jsonl", cut)), field="body", pack="documents")
    rows_lib.open_rows(config, "train", tokenizer, ALL, d_vocab)
    kept = [*cut, *(f"<extra> {number} {'word ' * 9}" for number in range(40))]
    config = data_config(tmp_path, path=str(write(tmp_path / "b.jsonl", kept)), field="body", pack="documents")
    for prepare in (False, True):
        if prepare:
            rows_lib.open_rows(config, "train", tokenizer, ALL)
        with refused("lm.path", f"'<extra>' with id {d_vocab}", "in a document of "):
            rows_lib.open_rows(config, "train", tokenizer, ALL, d_vocab)


def test_rows_of_documents_cannot_be_held_out_by_position(tmp_path):
    with refused("pack", "data.held_out"):
        data_config(tmp_path, pack="documents", held_out="position")


def test_how_much_text_there_is(tmp_path, tokenizer, monkeypatch):
    """Counted where all of it was tokenized, estimated where a run needs a part, unknown where it was not counted."""
    documents = [f"document {number}: {'word ' * (number % 19)}end" for number in range(2000)]
    config = data_config(tmp_path, path=str(write(tmp_path / "a.jsonl", documents)), field="body")
    part = rows_lib.open_rows(config, "train", tokenizer, 1000).extent
    for meta in (tmp_path / "tfds").glob("**/meta.json"):  # as earlier versions wrote it
        kept = json.loads(meta.read_text())
        assert not kept.pop("complete")
        meta.write_text(json.dumps({name: kept[name] for name in ("tokens", "dtype", "largest")} | {"complete": False}))
    unknown = rows_lib.open_rows(config, "train", tokenizer, 1000).extent
    rows = rows_lib.open_rows(config, "train", tokenizer, ALL)
    texts = texts_of(config, "train")
    tokens = sum(1 + len(tokenizer(text)["input_ids"]) for text in texts)
    assert (rows.extent.texts, rows.extent.documents) == (len(texts), 2000)
    assert (rows.extent.tokens, rows.extent.rows, rows.extent.is_estimate) == (tokens, tokens // 7, False)
    assert (unknown.tokens, unknown.rows, unknown.is_estimate) == (None, None, True)
    assert part.is_estimate
    assert part.tokens == pytest.approx(tokens, rel=0.1)
    assert part.rows == pytest.approx(tokens // 7, rel=0.1)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_long_preparation_shows_a_bar_on_a_terminal(tmp_path, tokenizer, documents, name, monkeypatch, capsys):
    """Once, up to its end; a log file gets lines only."""
    config = data_config(tmp_path, path=str(write(tmp_path / name, documents)), field="body", separator="<sep>")
    assert progress.DELAY > 0
    monkeypatch.setattr(progress, "DELAY", 0)
    rows_lib.open_rows(config, "train", tokenizer, 100)
    output = capsys.readouterr()
    assert not output.err
    assert f"preparing the text ({os.path.getsize(config.path) / 1e6:,.1f} MB of files) in {tmp_path}" in output.out
    assert "tokenizing " in output.out
    rows_lib.open_rows(config, "train", tokenizer, 100)
    assert not capsys.readouterr().out
    bars = []
    make = progress.bar
    monkeypatch.setattr(progress, "bar", lambda *args: bars.append(make(*args)) or bars[-1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    elsewhere = data_config(tmp_path, **vars(config) | {"data_dir": str(tmp_path / "other")})
    rows_lib.open_rows(elsewhere, "train", tokenizer, ALL)
    assert "preparing the text: " in (shown := capsys.readouterr().err)
    assert "tokenizing the text: " in shown
    assert [bar.n == bar.total for bar in bars] == [True, True]


def test_a_longer_run_reads_its_first_rows_in_the_same_order():
    """Then the new ones, each once; the next epoch has all of them."""
    rows = rows_lib.TokenRows(np.arange(100 * 4, dtype=np.int32), 4, None, None, None, "train")
    first = rows.limited(40 * 4)
    before = rows_lib.batches(first, 4, seed=3)
    after = rows_lib.batches(rows, 4, seed=3, parts=(40, 100))
    for _ in range(7):
        np.testing.assert_array_equal(next(before), next(after))
    position = before.get_state()
    rest = [next(before) for _ in range(3)]
    after = rows_lib.batches(rows, 4, seed=3, parts=(40,))
    after.set_state(position)
    np.testing.assert_array_equal(np.stack(rest), np.stack([next(after) for _ in range(3)]))
    new = np.concatenate([next(after) for _ in range(15)])[:, 0] // 4
    assert sorted(new) == list(range(40, 100))
    assert list(new) != sorted(new)
    epoch = np.concatenate([next(after) for _ in range(25)])[:, 0] // 4
    assert sorted(epoch) == list(range(100))
