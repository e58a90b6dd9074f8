"""The text tokenizer: a byte-level BPE learned from a corpus, which still encodes any string exactly.

Frequent words of the corpus become single tokens; everything else falls back to smaller pieces and in the end
to the 256 bytes, so nothing is unknown and ``decode(encode(text)) == text`` for every string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unimm.errors import UserError

SPECIAL_TOKENS: tuple[str, ...] = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<user>",
    "<assistant>",
    "<image>",
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
)
BYTES = 256  # every byte is in the vocabulary before the first merge


def train_text_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 1024,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    digits: bool = False,
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer.

    Args:
        texts: the corpus; the result depends on word counts only, not on their order.
        vocab_size: most tokens to have, special tokens and 256 bytes included; a small corpus gives fewer.
        special_tokens: get the first ids, in this order; must hold ``<pad>``, ``<bos>`` and ``<eos>``.
        digits: whether each digit is a token, so that a number is read figure by figure.

    Returns:
        A fast tokenizer that adds no tokens of its own: the caller decides where ``<bos>`` and ``<eos>`` go.

    Raises:
        UserError: `vocab_size` has no room for the bytes and the special tokens.

    Source: Radford et al. 2019 (GPT-2), section 2.2, for byte-level BPE.
    """
    smallest = BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size: {vocab_size} is too small, bytes and special tokens alone need {smallest}"
        )
    bpe = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
        if digits
        else by_bytes
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    named = {"<pad>", "<bos>", "<eos>"}
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=[token for token in special_tokens if token not in named],
        clean_up_tokenization_spaces=False,  # it would eat the space before a full stop
        padding_side="left",
    )
    return tokenizer
