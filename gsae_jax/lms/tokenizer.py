"""The tokenizer of a checkpoint directory.

If there is a `tokenizer.json`, it alone decides how a text is split. transformers 5 would choose a class by
`model_type` or `tokenizer_class`, which may put another normaliser and pre-tokenizer around the same vocabulary.
"""

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epy

from gsae_jax.errors import UserError
from gsae_jax.lms import hugging_face
from gsae_jax.storage import reading

with epy.lazy_imports():  # slow to import
    import transformers

FILE, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
OLDER = ("vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")  # what transformers makes a tokenizer from
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
KEPT = ("chat_template", "model_max_length", "padding_side")  # settings that do not change how a text is split
PART = "�"  # what part of a character is decoded to
PROBES = ("The cat sat on the mat, and it's 3 o'clock.", "def main(): return x", "(a) déjà-vu")


class Tokens(NamedTuple):
    """Texts as tokens.

    Attributes:
        tokens_BxT: token ids, int32; 0 at padding.
        mask_BxT: False at padding.
    """

    tokens_BxT: np.ndarray
    mask_BxT: np.ndarray


def as_texts(value: Any) -> list[str] | None:
    """The texts that a value is, one or many; None if it is something else, such as an array of numbers."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or getattr(getattr(value, "dtype", None), "kind", "O") not in "OUT":
        return None
    texts = list(value)
    return texts if texts and all(isinstance(text, str) for text in texts) else None


def tokenize(tokenizer: Any, texts: Sequence[str], prepend_bos: bool = True) -> list[list[int]]:
    """The token ids of each text.

    Args:
        tokenizer: of the language model.
        texts: the texts.
        prepend_bos: whether BOS is put before a text that has none, if the tokenizer has a BOS.

    Raises:
        UserError: a text without any token.
    """
    bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = [own if own[:1] == bos else bos + own for own in ids]
    if [] in ids:
        raise UserError(f"are empty in text {ids.index([])}; leave it out, as no BOS is put before it", "tokens")
    return ids


def padded(ids: Sequence[Sequence[int]], length: int | None = None, left: bool = False) -> Tokens:
    """Rows of token ids as arrays, padded on the right or the left to a length; by default to that of the longest."""
    lengths = np.array([len(own) for own in ids])
    mask_BxT = np.arange(length or lengths.max())[None] < lengths[:, None]
    mask_BxT = mask_BxT[:, ::-1] if left else mask_BxT
    tokens_BxT = np.zeros(mask_BxT.shape, np.int32)
    tokens_BxT[mask_BxT] = np.concatenate(ids)
    return Tokens(tokens_BxT, mask_BxT)


def load(folder: Path) -> Any:
    """A `transformers` tokenizer that gives the tokens of `tokenizer.json`, neither truncated nor padded.

    A folder without that file may have older vocabulary files, of which transformers makes a tokenizer.

    Raises:
        UserError: no tokenizer files, files that cannot be read, or an EOS that they lack.
    """
    settings = {
        name: reading.read_json(folder / name)
        for name in ("config.json", FILE, CONFIG, MAP)
        if (folder / name).exists()
    }
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of every model_type it has no class for
    try:
        tokenizer = (_from_file if FILE in settings else _from_older_files)(folder, settings)
        if not tokenizer.chat_template and (folder / OLDER_TEMPLATE).exists():
            tokenizer.chat_template = reading.read_json(folder / OLDER_TEMPLATE)["chat_template"]
        tokenizer("a b", add_special_tokens=False)
        if not all(isinstance(number, int) for number in tokenizer.all_special_ids):
            raise ValueError(f"not all of its special tokens have ids: {tokenizer.special_tokens_map}")
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a wrong value leads to; a panic of tokenizers is no Exception
        why = f"{str(error).strip().partition(chr(10))[0] or type(error).__name__}; copy its files again"
        raise UserError(f"{folder} has no tokenizer that can be read: {why}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return tokenizer


def _from_file(folder: Path, settings: Mapping[str, Any]) -> Any:
    backend = tokenizers.Tokenizer.from_file(str(folder / FILE))
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # it is for training: the same text would have other tokens every time
    own = settings.get(CONFIG, {})
    kept = {name: own[name] for name in KEPT if name in own}
    if (folder / TEMPLATE).is_file():
        kept["chat_template"] = (folder / TEMPLATE).read_text("utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **kept)
    _check_vocabulary(tokenizer, backend.get_vocab(), folder / FILE)
    # Set afterwards: the constructor would add them to the vocabulary, and text that contains them would change.
    for role, token in _roles(settings, backend).items():
        if backend.token_to_id(token) is not None:
            setattr(tokenizer, role, token)
        elif role == "eos_token":
            raise UserError(
                f"{folder} names the EOS token {token!r}, which {FILE} does not have; write one that it has as "
                f"eos_token in {CONFIG}"
            )
    return tokenizer


def _roles(settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The token of each special role. If the tokenizer's files name none, `config.json` gives BOS and EOS."""
    own = settings.get(CONFIG, {})
    sources = [own, settings.get(MAP, {})]
    if "added_tokens_decoder" in own:  # transformers does not read the other file then
        sources.reverse()
    values = {role: source[role] for source in sources for role in ROLES if source.get(role) is not None}
    if not values and not any(role in source for source in sources for role in ROLES):
        ids = {role: settings.get("config.json", {}).get(f"{role}_id") for role in ("bos_token", "eos_token")}
        values = {role: token for role, number in ids.items() if (token := _from_id(number, backend)) is not None}
    tokens = {role: value.get("content") if isinstance(value, dict) else value for role, value in values.items()}
    for role, token in tokens.items():
        if not isinstance(token, str):
            raise ValueError(f"{role} is {token!r}, not a string")
    return tokens


def _from_id(number: Any, backend: tokenizers.Tokenizer) -> str | None:
    """The special token of an id in `config.json`. The id may be for another vocabulary, so words are not taken."""
    number = number[0] if isinstance(number, list) and number else number
    token = backend.get_added_tokens_decoder().get(number) if isinstance(number, int) else None
    return token.content if token is not None and token.special else None


def _from_older_files(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The tokenizer that transformers makes from older files, if it reads them; some classes invent a vocabulary."""
    if "auto_map" in settings.get(CONFIG, {}):
        raise UserError(
            f"{folder} has a tokenizer that is code (auto_map in {CONFIG}), which is not run; save it as {FILE}"
        )
    files = sorted({file.name for pattern in OLDER for file in folder.glob(pattern)})
    if not files:
        raise UserError(f"{folder} has no tokenizer files; copy the model's {FILE} there")
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is not a file; write one that can be read to its end")
        reading.check_fetched(folder / name)
    if "vocab.json" not in files and files[-1].endswith(".model") and not importlib.util.find_spec("sentencepiece"):
        raise UserError(f"{folder / files[-1]} can only be read with sentencepiece: pip install sentencepiece")
    advice = f"copy the model's {FILE} there, or name its tokenizer_class in {CONFIG}"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder,
            config=hugging_face.transformers_config(settings.get("config.json", {})),
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:
        why = str(error).strip().partition("\n")[0].rstrip(": ")
        raise UserError(f"{folder} has {', '.join(files)}, but no tokenizer: {why}; {advice}") from error
    kind, read = type(tokenizer).__name__, tokenizer.init_kwargs.get("vocab_file")
    if not read:
        raise UserError(f"{folder} has {', '.join(files)}, none of which {kind} reads; {advice}")
    if "vocab.json" in files and str(read).endswith("vocab.json"):
        _check_vocabulary(tokenizer, reading.read_json(folder / "vocab.json"), folder / "vocab.json")
    if str(read).endswith(".model"):
        _compare_with_sentencepiece(tokenizer, read, f"{kind} reads {read} as other tokens", advice)
    return tokenizer


def _check_vocabulary(tokenizer: Any, expected: Mapping[str, int], file: Path) -> None:
    """Raises `ValueError` for an id that is not a number, whose token would be dropped, or that two tokens have."""
    vocabulary = tokenizer.get_vocab()
    owners: dict[int, str] = {}
    for token, number in expected.items():
        if vocabulary.get(token) != number or owners.setdefault(number, token) != token:
            raise ValueError(f"{file.name} gives {token!r} the id {number!r}, which is no number or another token's")


def _compare_with_sentencepiece(tokenizer: Any, file: str, what: str, advice: str) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=file)
    for text in PROBES:
        ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], pieces.encode(text)
        if ours != theirs:
            raise UserError(f"{what}: {text!r} is {ours}, and {theirs} in sentencepiece; {advice}")


def check_same(first: Any, second: Any, names: tuple[str, str]) -> None:
    """Raises `UserError` where the second of two language models has another tokenizer than the first.

    Both models get the tokens of the first tokenizer. So the second must split text in the same way, and give each of
    these tokens the same id. It may have more tokens, and other roles for them, as tokenizers of finetunes often have.

    Args:
        first: a tokenizer.
        second: a tokenizer.
        names: of their language models.
    """
    ours, theirs = first.get_vocab(), second.get_vocab()
    other = min((id for token, id in ours.items() if theirs.get(token) != id), default=None)
    why = ""
    if other is not None:
        token = first.convert_ids_to_tokens(other)
        why = f"the token {token!r} has the id {other} in the first, and {theirs.get(token, 'none')} in the second"
    elif differing := [part for part, way in _splitting(first).items() if _splitting(second).get(part, way) != way]:
        why = f"they split text differently ({', '.join(differing)})"
    if why:
        raise UserError(
            f"{names[0]} and {names[1]} have different tokenizers: {why}; write two models with one tokenizer, such as "
            "a model and its finetune"
        )


def _splitting(tokenizer: Any) -> dict[str, Any]:
    """What decides how text is split, but for the vocabulary; nothing for tokenizers that are Python code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    whole = json.loads(backend.to_str())
    parts = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "model")}
    if isinstance(parts["model"], dict):
        parts["model"] = {name: value for name, value in parts["model"].items() if name != "vocab"}
    return parts


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """What each token adds to a text in which it is not the first, such as " the"; part of a character is "�"."""
    return [_added(tokenizer, [int(token)]) for token in ids]


def _added(tokenizer: Any, ids: list[int]) -> str:
    """What tokens add to a text in which they are not the first."""
    before = tokenizer.convert_tokens_to_ids("a")
    start = [] if before in (None, tokenizer.unk_token_id) else [before]

    def text(tokens: list[int]) -> str:
        decoded: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return decoded

    # Some tokenizers drop the space before the first token.
    return text([*start, *ids])[len(text(start)) :]


def pieces(tokenizer: Any, ids: Sequence[int], texts: Sequence[str]) -> list[str]:
    """The part of a text that each of its tokens adds; a character of several tokens is of the last of them.

    `texts`: the `token_texts` of the tokens.
    """
    result, begun = [*texts], list[int]()
    for place, text in enumerate(texts):
        if PART not in text:
            continue
        begun.append(place)
        added = _added(tokenizer, [ids[each] for each in begun])
        if PART not in added or place + 1 == len(texts) or PART not in texts[place + 1]:
            for each in begun[:-1]:
                result[each] = ""
            result[place], begun = added, []
    return result
