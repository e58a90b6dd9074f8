"""Llama 3's text tokenizer: read from Meta's `tokenizer.model`, a table of words and their ranks.

Special tokens are no part of the file: 256 follow the words, named or reserved, and transformers' `<|image|>` behind
them, which Meta's own list has among the 256 and its model is given at the place behind.

Source: meta-llama/llama-models `models/llama3/tokenizer.py`; transformers `convert_mllama_weights_to_hf.py`.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from unimm.errors import UserError
from unimm.files import read_text

RANKS_FILE = "tokenizer.model"
IMAGE, BEGIN = "<|image|>", "<|begin_of_text|>"
_MOST = 2**26  # bytes of the file
_NAMED = (
    BEGIN, "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>",
)  # fmt: skip
_RESERVED = 256 - len(_NAMED)
SPECIAL = (*_NAMED, *(f"<|reserved_special_token_{number + 2}|>" for number in range(_RESERVED)), IMAGE)
"""The special tokens in the order of their ids, which follow those of the words."""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the words of a `tokenizer.model` as bytes, with their ranks.

    Raises:
        UserError: a line that names the file, and the line of it that is wrong.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path, _MOST).splitlines(), start=1):
        if not line.strip():
            continue
        word, _, rank = line.partition(" ")
        try:
            data = base64.b64decode(word, validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if not data or rank.strip() != str(len(ranks)):
            raise UserError(f"{path}: line {number}: expected a word in base64 and the rank {len(ranks)}")
        if data in ranks:
            raise UserError(f"{path}: line {number}: the word is that of rank {ranks[data]} too")
        ranks[data] = len(ranks)
    if lacking := [number for number in range(256) if bytes([number]) not in ranks]:
        raise UserError(
            f"{path}: has no word of the byte {lacking[0]} alone, so some texts could not be written"
        )
    return ranks


def read_llama_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the text tokenizer of a `tokenizer.model`; before a text it writes `<|begin_of_text|>`.

    Raises:
        UserError: as `read_ranks`.
    """
    ranks = read_ranks(path)
    tokenizer = _Converter(ranks).converted()
    for number, token in enumerate(SPECIAL, start=len(ranks)):
        found = tokenizer.token_to_id(token)
        assert found is not None  # all were added
        if found != number:
            raise UserError(f"{path}: line {found + 1}: a word is written as {token} is")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, len(ranks))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        bos_token=BEGIN,
        eos_token=_NAMED[1],
        pad_token="<|finetune_right_pad_id|>",
    )


def written_ranks(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the `tokenizer.model` of a text tokenizer; None: its words or special tokens are others."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if tuple(word for word, _ in words[-len(SPECIAL) :]) != SPECIAL:
        return None
    byte = {character: number for number, character in bytes_to_unicode().items()}
    try:
        plain = [bytes(byte[character] for character in word) for word, _ in words[: -len(SPECIAL)]]
    except KeyError:
        return None
    return "".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(plain))


class _Converter(TikTokenConverter):
    """transformers' converter of ranks, which recovers the pairs that make each word."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        super().__init__(ranks, extra_special_tokens=list(SPECIAL))  # type: ignore[no-untyped-call]

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: Any) -> dict[bytes, int]:
        """The ranks themselves stand in the file's place."""
        ranks: dict[bytes, int] = tiktoken_url
        return ranks
