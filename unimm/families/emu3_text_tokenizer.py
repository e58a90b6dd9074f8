"""Emu3's text tokenizer: read from the original's tiktoken file, and written as one.

The original is code of its own around tiktoken: words in `emu3.tiktoken`, then a fixed list of special tokens, then
those of images in `emu3_vision_tokens.txt`. transformers has the same ids in a `tokenizer.json`, in which the unused
`<|extra_0|>` is called `<image>` and stands where an image's codes go.

Source: baaivision/Emu3 `emu3/mllm/tokenization_emu3.py`; transformers `TikTokenConverter`.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from unimm.errors import UserError
from unimm.files import open_regular, read_text
from unimm.processing.processor import read_tokenizer

RANKS_FILE, IMAGES_FILE = "emu3.tiktoken", "emu3_vision_tokens.txt"
# the original's tokens between those of texts and of images
FIRST_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
)
UNUSED, PLACEHOLDER = "<|extra_0|>", "<image>"
NAMES = {"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"}
IMAGE_NAMES = {
    "image_token": PLACEHOLDER,
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}


def read_text_tokenizer(folder: Path, config: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load a checkpoint's text tokenizer, from `tokenizer.json` or the original's two files.

    Args:
        folder: the checkpoint.
        config: its `config.json`, where that has been read.

    Raises:
        UserError: the original's files are there, but not whole, or the package that reads them is missing.
    """
    ranks, listed = folder / RANKS_FILE, folder / IMAGES_FILE
    if not ranks.exists() or (folder / "tokenizer.json").exists():
        return read_tokenizer(folder, config)
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError(f"{ranks}: needs the package tiktoken; install it (pip install tiktoken)")
    if not listed.exists():
        raise UserError(f"{listed}: not found; {RANKS_FILE} needs it for the tokens of images")
    images = read_text(listed).split("\n")
    open_regular(ranks).close()
    special = [*FIRST_TOKENS, *(token.strip() for token in images if token.strip())]
    try:
        converter = TikTokenConverter(str(ranks), extra_special_tokens=special)
        converter.pattern = converter.pattern.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
        tokenizer = converter.converted()
        if tokenizer.get_vocab_size(with_added_tokens=False) < 256:
            raise ValueError("fewer than the 256 bytes")
    except Exception as error:  # tiktoken and tokenizers raise anything on what is no table of ranks
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{ranks}: not readable as ranks of tiktoken ({reason})") from None
    tokenizer.normalizer = NFC()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def with_placeholder(text_tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer as transformers' `Emu3Processor` needs it: `<image>` for `<|extra_0|>`, same ids.

    Raises:
        UserError: it has neither of the two.
    """
    known = text_tokenizer.get_vocab()
    if PLACEHOLDER not in known and UNUSED not in known:
        raise UserError(f"{where}: the tokenizer has no {UNUSED} to make the placeholder {PLACEHOLDER} of")
    written = _document(text_tokenizer)
    if PLACEHOLDER not in known:
        for token in written["added_tokens"]:
            token["content"] = PLACEHOLDER if token["content"] == UNUSED else token["content"]
        table = written["model"]["vocab"]
        if UNUSED in table:  # some list their special tokens among the words too
            table[PLACEHOLDER] = table.pop(UNUSED)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)),
        padding_side="left",
        extra_special_tokens=IMAGE_NAMES,
        **{name: str(getattr(text_tokenizer, name)) for name in NAMES},
    )


@dataclasses.dataclass(frozen=True)
class TiktokenFiles:
    """What the original's two files hold.

    Attributes:
        ranks: each word's bytes, in the order of their ids.
        images: the tokens of images, which follow `FIRST_TOKENS`.
    """

    ranks: list[bytes]
    images: list[str]

    @classmethod
    def of(cls, text_tokenizer: PreTrainedTokenizerBase, where: str) -> TiktokenFiles:
        """Read them off a tokenizer.

        Raises:
            UserError: it is not of the form that these files can say, so ids would differ.
        """
        document = _document(text_tokenizer)
        by_id = {number: token for token, number in text_tokenizer.get_vocab().items()}
        ordered = [by_id.get(number) for number in range(len(by_id))]
        if document["model"].get("type") != "BPE" or FIRST_TOKENS[0] not in ordered or None in ordered:
            raise UserError(
                f"{where}: {_CANNOT} (its vocabulary is not byte pairs followed by {FIRST_TOKENS[0]})"
            )
        count = ordered.index(FIRST_TOKENS[0])
        names = [str(token) for token in ordered[count:]]
        after = len(FIRST_TOKENS)
        first = [UNUSED if token == PLACEHOLDER else token for token in names[:after]]
        if first != list(FIRST_TOKENS):
            raise UserError(f"{where}: {_CANNOT} (its first special tokens are not the original's)")
        return cls(_ranks([str(token) for token in ordered[:count]], document, where), names[after:])

    def write(self, folder: Path) -> None:
        """Write both files, and a note of the tokens' names."""
        lines = (f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(self.ranks))
        (folder / RANKS_FILE).write_text("".join(lines), encoding="ascii")
        (folder / IMAGES_FILE).write_text("".join(f"{token}\n" for token in self.images), encoding="utf-8")
        named = {"tokenizer_class": "Emu3Tokenizer", "padding_side": "left", **NAMES}
        (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


_CANNOT = f"this tokenizer cannot be written as {RANKS_FILE}, which the original layout needs"


def _document(text_tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as `tokenizer.json` has it."""
    document: dict[str, Any] = json.loads(text_tokenizer.backend_tokenizer.to_str())
    return document


def _ranks(tokens: list[str], document: dict[str, Any], where: str) -> list[bytes]:
    """The bytes of each word; pairs must be joined in the order of the ids, which is the only one tiktoken knows."""
    byte = {character: number for number, character in bytes_to_unicode().items()}
    try:
        ranks = [bytes(byte[character] for character in token) for token in tokens]
    except KeyError as error:
        raise UserError(f"{where}: {_CANNOT} ({error.args[0]!r} in its vocabulary is no byte)") from None
    number = {token: rank for rank, token in enumerate(tokens)}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in document["model"]["merges"])
    joined = [number.get("".join(pair), -1) for pair in pairs]
    single = sum(len(word) == 1 for word in ranks)
    if (
        single < 256
        or joined != sorted(joined)
        or set(joined) != {r for r, w in enumerate(ranks) if len(w) > 1}
    ):
        raise UserError(f"{where}: {_CANNOT} (its pairs are not joined in the order of their ids)")
    return ranks
