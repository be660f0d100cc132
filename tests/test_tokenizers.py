"""The tokens of a checkpoint are those of its tokenizer.json, whatever the other files say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import gsae_jax
from gsae_jax.data import rows
from gsae_jax.lms import conversion, loading
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.lms.checkpoints import Checkpoint
from tests.fixtures.lms import make
from tests.refusals import refused

FIXTURES = Path(make.__file__).parent
TEXTS = ["the cat sat on a mat", "The  CAT!", "dog\n\tran <eos> é 漢 🙂", "", " ", "e\u0301 ﬁ <unk> ran", "a" * 300]
WORDS = ["<unk>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran"]


def characters():
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<eos>", " ", *"abcdefghijklmnopqrst"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return tokenizer


def words():
    """Lower case, with a beginning that `add_special_tokens` puts there."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.add_tokens([tokenizers.AddedToken("cat sat", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    return tokenizer


def metaspace():
    """Llama's way, with merges and a fallback to bytes."""
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<eos>", *(f"<0x{b:02X}>" for b in range(32)), *"▁theca", "th"])}
    merges = [("t", "h")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


KINDS = [characters, words, metaspace]


def folder_with(tmp_path, tokenizer=None, case="gpt2", **files):
    """A checkpoint with another tokenizer (or none), and other files beside it."""
    folder = tmp_path / "lm"
    shutil.copytree(FIXTURES / case, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def open_tokenizer(folder):
    return Checkpoint.open(folder).tokenizer()


def plain(folder):
    """What the `tokenizers` library makes of tokenizer.json."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def folders(root):
    """One checkpoint directory of each kind of tokenizer; without weights."""
    config = {"eos_token": "<eos>", "unk_token": "<unk>"}
    settings = json.loads((FIXTURES / "gpt2" / "config.json").read_text()) | {"vocab_size": 300}
    files = {"tokenizer_config": config, "special_tokens_map": config, "config": settings}
    made = [folder_with(root / kind.__name__, kind(), **files) for kind in KINDS]
    return [*made, older(root / "older", "gpt2", "vocab.json", "merges.txt", config=settings)[0]]


@pytest.mark.parametrize("case", ["gpt2", "llama_2", "gemma2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_files(tmp_path, kind, case):
    config = {"eos_token": "<eos>", "unk_token": "<unk>", "add_bos_token": True, "add_prefix_space": True}
    folder = folder_with(tmp_path, kind(), case, tokenizer_config=config | {"tokenizer_class": "LlamaTokenizer"})
    ours, theirs = open_tokenizer(folder), plain(folder)
    for special in (False, True):
        expected = [encoding.ids for encoding in theirs.encode_batch(TEXTS, add_special_tokens=special)]
        assert ours(TEXTS, add_special_tokens=special)["input_ids"] == expected
    assert ours.get_vocab() == theirs.get_vocab()
    ids = theirs.encode(TEXTS[0], add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert (ours.eos_token_id, ours.unk_token_id, ours.bos_token_id) == (1, 0, None)
    assert loading.special_tokens(ours) == (0, 1)


def test_a_conversion_writes_it_as_it_was_read(tmp_path):
    folder = folder_with(tmp_path, words(), tokenizer_config={"eos_token": "<eos>"})
    conversion._copy_tokenizer(str(folder), tmp_path / "out", folder)
    shutil.copy(FIXTURES / "gpt2" / "config.json", tmp_path / "out")
    again = open_tokenizer(tmp_path / "out")
    assert again(TEXTS)["input_ids"] == [encoding.ids for encoding in plain(folder).encode_batch(TEXTS)]
    assert again.eos_token_id == 1


def test_tokens_are_the_same_every_time(tmp_path):
    """Merges that are left out at random are for training."""
    tokenizer = metaspace()
    tokenizer.model.dropout = 0.5
    ours, plain = open_tokenizer(folder_with(tmp_path, tokenizer)), metaspace()
    for _ in range(5):
        assert ours("the the the")["input_ids"] == plain.encode("the the the").ids


def with_special():
    tokenizer = characters()
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    return tokenizer


@pytest.mark.parametrize(
    ("files", "eos", "bos"),
    [
        ({"tokenizer_config": {"eos_token": "<eos>"}}, "<eos>", None),
        ({"special_tokens_map": {"eos_token": {"content": "<eos>", "lstrip": False}}}, "<eos>", None),
        ({"special_tokens_map": {"eos_token": "<eos>"}, "tokenizer_config": {"eos_token": "a"}}, "<eos>", None),
        (
            {
                "special_tokens_map": {"eos_token": "<eos>"},
                "tokenizer_config": {"eos_token": "a", "added_tokens_decoder": {}},
            },
            "a",
            None,
        ),
        # As the published GPT-2, which says so in config.json alone.
        ({"config": {"eos_token_id": [1, 0], "bos_token_id": 1}}, "<eos>", "<eos>"),
        # The ids that config.json has may be those of another vocabulary: a letter is no EOS.
        ({"config": {"eos_token_id": 3, "bos_token_id": 50256}}, None, None),
        # As Qwen 2: no BOS, although config.json has an id; nor where other tokens are named.
        ({"tokenizer_config": {"eos_token": "<eos>"}, "config": {"bos_token_id": 0}}, "<eos>", None),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 1}}, None, None),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "<eos>", "pad_token": "<pad>"}}, "<eos>", None),
    ],
)
def test_where_special_tokens_come_from(tmp_path, files, eos, bos):
    settings = json.loads((FIXTURES / "gpt2" / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):
        settings.pop(name, None)
    folder = folder_with(tmp_path, with_special(), **files | {"config": settings | files.get("config", {})})
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token) == (eos, bos)
    assert tokenizer.get_vocab() == with_special().get_vocab()


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, ("EOS", "'</s>'", "tokenizer.json does not have")),
        ({"tokenizer_config": {"eos_token": "<far>"}}, ("EOS", "'<far>'", "id 23", "embeddings for 22")),
        ({"tokenizer_config": {"eos_token": 3}}, ("eos_token is 3", "string")),
    ],
)
def test_an_eos_without_an_embedding_is_refused(tmp_path, files, facts):
    """Rows have it between documents."""
    tokenizer = characters()
    tokenizer.add_special_tokens(["<far>"])
    settings = json.loads((FIXTURES / "gpt2" / "config.json").read_text())
    size = {"vocab_size": 22 if "<far>" in str(files) else 24}
    if "<far>" in str(files):
        tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.add_special_tokens([f"<{i}>" for i in range(12)] + ["<far>"])
    folder = folder_with(tmp_path, tokenizer, config=settings | size, **files)
    with refused("path", *facts):
        gsae_jax.load_lm(folder)


def test_a_bos_without_an_embedding_is_refused_where_rows_begin_with_it(tmp_path, experiment):
    tokenizer = characters()
    tokenizer.add_special_tokens(["<s>", "<eos>"])
    settings = json.loads((FIXTURES / "gpt2" / "config.json").read_text()) | {"vocab_size": 23}
    names = {"bos_token": "<s>", "eos_token": "<eos>"}
    ours = open_tokenizer(folder_with(tmp_path, tokenizer, config=settings, tokenizer_config=names))
    assert tokenizer.token_to_id("<s>") == 23
    assert (ours.bos_token_id, ours.eos_token_id) == (None, 1)
    assert experiment.data.prepend_bos
    with refused("data.prepend_bos"):
        rows.open_rows(experiment.data, "train", ours, 1000)


@pytest.mark.parametrize("case", ["gpt2", "llama_2", "gemma2", "qwen2", "gpt_neox"])
def test_a_folder_without_tokenizer_files_is_called_that(tmp_path, case):
    folder = folder_with(tmp_path, case=case, tokenizer_config={"eos_token": "a"})
    with refused("path", str(folder), "no tokenizer files", "tokenizer.json"):
        gsae_jax.load_lm(folder)


def older(tmp_path, case, *names, **files):
    """GPT-2's own files: vocab.json and merges.txt."""
    folder = folder_with(tmp_path, case=case, **files)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran"] * 5, trainer)
    tokenizer.model.save(str(tmp_path))
    for name in names:
        shutil.copy(tmp_path / name, folder)
    return folder, tokenizer


def test_vocabulary_and_merges_without_a_tokenizer_json(tmp_path):
    folder, expected = older(tmp_path, "gpt2", "vocab.json", "merges.txt")
    ours = tokenizer_lib.load(folder)
    assert ours(TEXTS)["input_ids"] == [encoding.ids for encoding in expected.encode_batch(TEXTS)]
    assert (ours.eos_token, ours.eos_token_id) == ("<|endoftext|>", 0)


@pytest.mark.parametrize(
    ("case", "names", "facts"),
    [
        ("gpt2", ["vocab.json"], ("has vocab.json", "no tokenizer")),
        ("gpt2", ["merges.txt"], ("has merges.txt", "no tokenizer")),
        ("gemma2", ["vocab.json", "merges.txt"], ("merges.txt, vocab.json", "none", "GemmaTokenizer")),
        ("llama_2", ["vocab.json", "merges.txt"], ("merges.txt, vocab.json", "no tokenizer", "tokenizer_class")),
    ],
)
def test_no_vocabulary_is_invented(tmp_path, case, names, facts):
    folder, _ = older(tmp_path, case, *names)
    with refused("", *facts):
        tokenizer_lib.load(folder)


@pytest.mark.parametrize("id", [5, "5", None, -1])
def test_no_entry_of_a_vocabulary_is_dropped(tmp_path, id):
    """Two tokens of one id, or an id that is no number."""
    folder, _ = older(tmp_path, "gpt2", "vocab.json", "merges.txt")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"t": id}))
    with refused("", str(folder), "no tokenizer", "vocab.json"):
        tokenizer_lib.load(folder)
    other = folder_with(tmp_path / "other", characters())
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["t"] = id
    (other / "tokenizer.json").write_text(json.dumps(content))
    with refused("", str(other), "no tokenizer that can be read"):
        tokenizer_lib.load(other)


def test_a_sentencepiece_model_that_is_none_is_refused(tmp_path):
    folder = folder_with(tmp_path, case="llama_2")
    (folder / "tokenizer.model").write_bytes(b"\0" * 50)
    with refused("", "tokenizer.model"):
        tokenizer_lib.load(folder)


@pytest.mark.parametrize("text", ["Привет, мир", "naïve café", "a 🙂🙂 b", "é—é", "я🙂", "plain", "漢字\ufffd!", "é"])
def test_a_character_of_several_tokens_is_of_the_last_of_them(text):
    tokenizer = gsae_jax.load_lm().tokenizer
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    texts = tokenizer_lib.token_texts(tokenizer, ids)
    pieces = tokenizer_lib.pieces(tokenizer, ids, texts)
    assert "".join(pieces) == text
    done = np.cumsum([len(piece) for piece in pieces])
    for place, (start, end) in enumerate(encoded["offset_mapping"]):
        goes_on = place + 1 < len(ids) and encoded["offset_mapping"][place + 1][0] < end
        assert done[place] == (start if goes_on else end)


def test_a_real_models_tokens(real):
    """A character that TinyStories-656K lacks is its <unk>, which transformers' Llama class left out."""
    stories = json.loads((real / "tinystories" / "tinystories_1000.json").read_text())
    plain = tokenizers.Tokenizer.from_file(str(real / "TinyStories-656K" / "tokenizer.json"))
    ours = open_tokenizer(real / "TinyStories-656K")
    expected = [encoding.ids for encoding in plain.encode_batch(stories, add_special_tokens=False)]
    assert any(0 in ids for ids in expected)
    assert ours(stories, add_special_tokens=False)["input_ids"] == expected
    assert (ours.bos_token_id, ours.eos_token_id, loading.special_tokens(ours)) == (1, 2, (0, 1, 2))
