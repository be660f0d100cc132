import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from configs import base
from gsae_jax import config as config_lib
from gsae_jax.config import ConfigError
from gsae_jax.data import rows as rows_lib
from gsae_jax.data.corpora import text as text_corpus
from gsae_jax.lms import loading

ALL = 2**40


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_lm().tokenizer


def data_config(tmp_path, **changes):
    config = base.data()
    config.corpus, config.data_dir, config.context_length = "text", str(tmp_path / "tfds"), 8
    config.update(changes)
    return config_lib.from_dict(config_lib.Data, config)


def texts_of(config, split):
    builder, feature = text_corpus.open_corpus(config)
    builder.download_and_prepare()
    return sorted(example[feature].decode() for example in builder.as_data_source(split=split))


@pytest.fixture
def documents():
    return [f"document {number}: {'é ' * number}end" for number in range(45)]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_format_gives_the_documents(tmp_path, documents, kind):
    folder = tmp_path / "text" / "deeper"
    folder.mkdir(parents=True)
    file = folder / f"a.{kind}"
    if kind == "txt":
        file.write_text("<sep>".join(documents))
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps({"id": 1, "body": text}) for text in documents))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"body": documents, "id": range(45)}), file)
    config = data_config(tmp_path, path=str(tmp_path / "text"), field="body", separator="<sep>")
    train, test = texts_of(config, "train"), texts_of(config, "test")
    assert sorted(train + test) == sorted(documents)
    assert test == [documents[19], documents[39]]
    as_glob = data_config(tmp_path, path=f"{tmp_path}/te*/**/*.{kind}", field="body", separator="<sep>")
    assert texts_of(as_glob, "train") == train


def test_a_long_document_is_cut_so_that_some_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("x" * 99_000)
    config = data_config(tmp_path, path=str(tmp_path / "book.txt"))
    train, test = texts_of(config, "train"), texts_of(config, "test")
    assert len("".join(train + test)) == 99_000
    assert 0.02 < len("".join(test)) / 99_000 < 0.1


def test_changed_files_are_another_data_set(tmp_path):
    file = tmp_path / "a.txt"
    config = data_config(tmp_path, path=str(file), separator="\n")
    file.write_text("\n".join("abcd" * 10))
    before = texts_of(config, "train")
    file.write_text("\n".join("efgh" * 10))
    assert texts_of(config, "train") != before


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("a.csv", b"x", {}, "no .txt, .md, .jsonl, .parquet file matches"),
        ("a.txt", b"x", {"path": ""}, "data.path: is empty; write a text file"),
        ("a.txt", b"x y z", {"separator": " "}, "data.path: gives 3 pieces of text; add text: 20 are needed"),
        ("a.jsonl", b'{"body": "x"}', {}, "a.jsonl line 1 has no text under 'text'; its fields: body"),
        ("a.jsonl", b'{"text": "x"}\n[1]', {}, "a.jsonl line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "x"', {}, "a.jsonl cannot be read as .jsonl"),
        ("a.txt", b"\xff\xfe\x00", {}, "a.txt cannot be read as .txt"),
        ("a.parquet", b"PAR1", {}, "a.parquet cannot be read as .parquet"),
    ],
)
def test_unusable_text_is_refused(tmp_path, tokenizer, name, content, changes, message):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    config = data_config(tmp_path, **{"path": str(tmp_path / "text")} | changes)
    with pytest.raises(ConfigError, match=message):
        rows_lib.open_rows(config, "train", tokenizer, ALL)


def test_a_missing_column_is_refused(tmp_path, tokenizer):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="has no column 'text'; its columns: body"):
        rows_lib.open_rows(data_config(tmp_path, path=str(tmp_path)), "train", tokenizer, ALL)


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
    for changes, message in (
        ({"name": "storis"}, "data.name: 'storis' is not a data set prepared in"),
        ({"field": "text"}, "data.field: 'text' is not a feature of stories; known: story, length"),
        ({"field": "length"}, "data.field: 'length' of stories is .*; write a text feature"),
        ({"test_split": "test"}, "data.test_split: 'test': .*the corpus has: train, validation"),
    ):
        with pytest.raises(ConfigError, match=message):
            rows_lib.open_rows(data_config(tmp_path, **found | changes), "test", tokenizer, ALL)


def test_a_data_set_that_cannot_be_read_at_random_is_refused(tmp_path, tokenizer, monkeypatch):
    Stories(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    info = tmp_path / "tfds" / "stories" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    config = data_config(tmp_path, corpus="tfds", name="stories", field="story")
    with pytest.raises(
        ConfigError, match="is stored as tfrecord, which cannot be read at random; convert it with `python"
    ):
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


def test_tokens_are_prepared_once(tmp_path, tokenizer, text_dir, monkeypatch):
    config = data_config(tmp_path, path=str(text_dir))
    few = rows_lib.open_rows(config, "train", tokenizer, limit=50)
    more = rows_lib.open_rows(config, "train", tokenizer, limit=ALL)
    assert len(few) == 7
    assert len(more) > 10_000

    def never(*args):
        raise AssertionError

    monkeypatch.setattr(rows_lib, "_tokenize", never)
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
    one = rows_lib.batches(rows, 8, seed=3, local=[5])
    read.clear()
    next(one)
    assert len(read) <= 16  # one for the batch, and those read ahead; not eight for each


def test_fewer_tokens_than_a_batch(tmp_path, tokenizer, text_dir):
    rows = rows_lib.open_rows(data_config(tmp_path, path=str(text_dir)), "train", tokenizer, limit=7 * 5)
    with pytest.raises(ConfigError, match="the corpus gives 5 rows of tokens, fewer than one batch of 8"):
        rows_lib.batches(rows, 8, seed=0)


def test_a_data_dir_that_cannot_be_written(tmp_path, tokenizer, text_dir):
    (tmp_path / "file").write_text("")
    config = data_config(tmp_path, path=str(text_dir), data_dir=str(tmp_path / "file" / "tfds"))
    with pytest.raises(ConfigError, match=r"data\.data_dir: .*/file/tfds cannot hold prepared data"):
        rows_lib.open_rows(config, "train", tokenizer, ALL)


def test_unknown_corpus(tmp_path, tokenizer):
    with pytest.raises(
        ConfigError, match=r"data.corpus: 'stdlb' is not known; did you mean 'stdlib'\? known: stdlib, text, tfds"
    ):
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
