"""Mistral's text tokenizer: read from `tekken.json`, which stands beside `consolidated.safetensors`.

It holds byte pairs by rank, as tiktoken has them, and names special tokens, which take the first ids. Older files
(version 7 and before) leave out those names, which are then a fixed list; ids without a name are `<SPECIAL_n>`. A
file may hold more words than are in use.

Source: mistralai/mistral-common `tokens/tokenizers/tekken.py`; transformers `TikTokenConverter`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from tokenizers import Regex, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from unimm.errors import UserError
from unimm.files import read_json
from unimm.models.configs import Text
from unimm.sections import Foreign, NotNegative, Positive, show, validate

TEKKEN_FILE = "tekken.json"
_BYTES = 256  # the first words, one of each
_FILLER = "<SPECIAL_{}>"
_LAST_UNNAMED = 7  # the last version whose files may leave out the special tokens
_DEFAULT_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


# --- the file -----------------------------------------------------------------------------------------------


def _version(name: str) -> str:
    if not re.fullmatch(r"v\d{1,4}(m\d{1,4})?", name):
        raise ValueError(f'expected a version such as "v3", got {show(name)}')
    return name


def _pattern(pattern: str) -> str:
    try:
        Regex(pattern)
    except Exception as error:  # the library has no kind of its own
        raise ValueError(f"no regular expression ({' '.join(str(error).split())[:100]})") from None
    return pattern


class TekkenConfig(Foreign):
    """How the words are cut, and how many ids there are.

    Attributes:
        pattern: the regular expression of what pairs are joined within.
        default_vocab_size: ids in use, those of special tokens among them.
        default_num_special_tokens: ids of special tokens, named or not.
        version: of the file's format.
    """

    pattern: Annotated[Text, Field(min_length=1), AfterValidator(_pattern)]
    default_vocab_size: Annotated[Positive, Field(le=2**22)]
    default_num_special_tokens: Annotated[Positive, Field(le=2**16)]
    version: Annotated[Text, AfterValidator(_version)]


class TekkenWord(Foreign):
    """A word: its place among the words, and its bytes in base64."""

    rank: NotNegative
    token_bytes: Text


class TekkenSpecial(Foreign):
    """A special token: its id and name."""

    rank: NotNegative
    token_str: Annotated[Text, Field(min_length=1)]


class TekkenDocument(Foreign):
    """`tekken.json`."""

    config: TekkenConfig
    vocab: list[TekkenWord]
    special_tokens: list[TekkenSpecial] | None = None


# --- the tokenizer ------------------------------------------------------------------------------------------


def read_tekken(path: Path) -> PreTrainedTokenizerFast:
    """Return the text tokenizer of a `tekken.json`; before a text it writes `<s>`, as the published ones do.

    Raises:
        UserError: a line that names the file, and the key where it is known.
    """
    document = validate(TekkenDocument, read_json(path), str(path))
    special = _special(document, path)
    ranks = _ranks(document, path)
    _check_names(special, ranks, path)
    tokenizer = _Converter(ranks, special, document.config.pattern).converted()
    _check_apart(tokenizer, special, path)
    begin = _ROLES["bos_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, special.index(begin))],
    )
    roles = {role: token for role, token in _ROLES.items() if token in special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="left", **roles
    )


class _Converter(TikTokenConverter):
    """transformers' converter of ranks, which recovers the pairs that make each word; special tokens come first."""

    def __init__(self, ranks: dict[bytes, int], special: list[str], pattern: str) -> None:
        super().__init__(ranks, pattern, extra_special_tokens=special)  # type: ignore[no-untyped-call]

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: Any) -> dict[bytes, int]:
        """The ranks themselves stand in the file's place."""
        ranks: dict[bytes, int] = tiktoken_url
        return ranks

    def extract_vocab_merges_from_model(self, tiktoken_url: Any) -> tuple[dict[str, int], list[Any]]:
        """Return the ids of all tokens, and the pairs in the order in which they are joined."""
        words, merges = super().extract_vocab_merges_from_model(tiktoken_url)
        ids = {token: number for number, token in enumerate(self.extra_special_tokens)}
        return {**{word: rank + len(ids) for word, rank in words.items()}, **ids}, merges


def _special(document: TekkenDocument, path: Path) -> list[str]:
    """The special tokens in the order of their ids."""
    count = document.config.default_num_special_tokens
    if document.special_tokens is None:
        version = document.config.version
        if int(re.split("[vm]", version)[1]) > _LAST_UNNAMED:
            raise UserError(f"{path}: special_tokens: missing, which version {version} does not leave out")
        names = list(_DEFAULT_SPECIAL)
    else:
        names = [token.token_str for token in sorted(document.special_tokens, key=lambda token: token.rank)]
        found = sorted(token.rank for token in document.special_tokens)
        if found != list(range(len(found))):
            gap = next(rank for rank, given in enumerate(found) if rank != given)
            raise UserError(f"{path}: special_tokens: expected the ranks 0 to {len(found) - 1}, got no {gap}")
    if len(names) > count:
        raise UserError(
            f"{path}: config.default_num_special_tokens: expected at least {len(names)}, which are named, got {count}"
        )
    names += [_FILLER.format(number) for number in range(len(names), count)]
    if len(set(names)) < count:
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: special_tokens: {show(twice)} is there twice")
    for role in ("bos_token", "eos_token"):
        if _ROLES[role] not in names:
            raise UserError(f"{path}: special_tokens: has no {_ROLES[role]}")
    return names


def _ranks(document: TekkenDocument, path: Path) -> dict[bytes, int]:
    """The words in use: bytes, with their ranks."""
    config = document.config
    count = config.default_vocab_size - config.default_num_special_tokens
    given = len(document.vocab)
    if not _BYTES <= count <= given:
        raise UserError(
            f"{path}: config.default_vocab_size: expected {config.default_num_special_tokens} special tokens and "
            f"{_BYTES} to {given} words, got {config.default_vocab_size}"
        )
    ranks: dict[bytes, int] = {}
    for index, word in enumerate(document.vocab[:count]):
        where = f"{path}: vocab[{index}]"
        if word.rank != index:
            raise UserError(f"{where}.rank: expected {index}, got {word.rank}")
        try:
            data = base64.b64decode(word.token_bytes, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{where}.token_bytes: expected base64, got {show(word.token_bytes)}") from None
        if index < _BYTES and data != bytes([index]):
            raise UserError(
                f"{where}.token_bytes: expected the byte {index} alone, got {show(word.token_bytes)}"
            )
        if not data or data in ranks:
            kind = "the same as an earlier word" if data else "empty"
            raise UserError(f"{where}.token_bytes: is {kind}")
        ranks[data] = index
    return ranks


def _check_names(special: list[str], ranks: dict[bytes, int], path: Path) -> None:
    """Check that no special token is written as a word is: a tokenizer has one table for both."""
    byte = {character: number for number, character in bytes_to_unicode().items()}
    for name in special:
        word = bytes(byte[character] for character in name) if byte.keys() >= set(name) else b""
        if word in ranks:
            raise UserError(f"{path}: vocab[{ranks[word]}]: is written as the special token {show(name)} is")


def _check_apart(tokenizer: Tokenizer, special: list[str], path: Path) -> None:
    """Check that a text which only spells a special token does not hold it.

    What the pattern leaves whole is looked up in the table, in which special tokens stand too.
    """
    tokenizer.encode_special_tokens = True  # that is, as any other text
    for name, spelled in zip(special, tokenizer.encode_batch(special, add_special_tokens=False), strict=True):
        if min(spelled.ids, default=len(special)) < len(special):
            raise UserError(f"{path}: config.pattern: leaves {show(name)} whole, so that texts could hold it")
    tokenizer.encode_special_tokens = False


# --- written ------------------------------------------------------------------------------------------------


def tekken_document(tokenizer: Any) -> dict[str, Any] | None:
    """Return a text tokenizer as `tekken.json` has it; None where that has no place for all of it.

    It must join byte pairs by rank, within one pattern, behind special tokens that have the first ids.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"].get("vocab")
    added = {token["content"]: token["id"] for token in state["added_tokens"] if token["special"]}
    special = sorted(added, key=added.__getitem__)
    pattern = _one_pattern(state.get("pre_tokenizer"))
    if state["model"].get("type") != "BPE" or pattern is None or [*added.values()] != sorted(added.values()):
        return None
    if sorted(added.values()) != list(range(len(special))):
        return None
    byte = {character: number for number, character in bytes_to_unicode().items()}
    ranked = sorted((number, word) for word, number in words.items() if word not in added)
    if [number for number, _ in ranked] != list(range(len(special), len(special) + len(ranked))):
        return None
    try:
        data = [bytes(byte[character] for character in word) for _, word in ranked]
    except KeyError:
        return None
    document = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(data),
            "default_vocab_size": len(data) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(data)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(special)
        ],
    }
    return document if _reads_as(document, state) else None


def _one_pattern(cut: Any) -> str | None:
    """The regular expression within which a byte-level tokenizer joins pairs, if it is one."""
    steps = (cut or {}).get("pretokenizers", [])
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    pattern: str | None = steps[0]["pattern"].get("Regex")
    return pattern


def _reads_as(document: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether a document gives the tokens of a tokenizer, and joins them as it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TEKKEN_FILE
        path.write_text(json.dumps(document))
        try:
            again: Any = read_tekken(path)
        except UserError:
            return False
    read = json.loads(again.backend_tokenizer.to_str())["model"]
    tokens = {**state["model"]["vocab"], **{token["content"]: token["id"] for token in state["added_tokens"]}}
    return bool(read["vocab"] == tokens and read["merges"] == state["model"]["merges"])
