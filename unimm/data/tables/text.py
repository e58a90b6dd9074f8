"""The text tokenizer of models that read synthetic tables alone: their words, single digits and what stands between.

It follows from the settings, so no file of it has to be there.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from unimm.data.tables.content import TRANSCRIPTION_REQUESTS
from unimm.data.tables.markup import to_latex, to_markdown
from unimm.data.tables.settings import TableSettings
from unimm.data.tables.vocabulary import column_heads, words_by_topic
from unimm.data.text_tokenizer import train_text_tokenizer

TABLE_TOKENS = 2048  # at most; merges end where every word is one token


def table_tokenizer(settings: TableSettings) -> PreTrainedTokenizerFast:
    """Return a tokenizer in which each word of the tables is a token, and each digit."""
    return train_text_tokenizer(_corpus(settings), TABLE_TOKENS, digits=True)


def _corpus(settings: TableSettings) -> Iterator[str]:
    """Every word and head, as they stand in cells and in questions, and the frames of both formats."""
    limits = settings.limits()
    words = {word for topic in words_by_topic(limits.word_length, limits.words).values() for word in topic}
    heads = {*column_heads(limits.word_length, False), *column_heads(limits.word_length, True)}
    for word in sorted(words | heads):
        yield from (
            f"what is the {word} of {word}?",
            f"read the row of {word}",
            f"what is the sum of {word}?",
        )
        yield from (f"| {word} | {word.capitalize()} |", f"what is the sum of {word.capitalize()}?")
    yield from (request for requests in TRANSCRIPTION_REQUESTS.values() for request in requests)
    cells = [("0", "1.5", "12.5%", "$3")] * 2
    for columns in range(1, max(limits.columns[1], limits.larger[0]) + 1):
        head = [("1",) * columns]
        yield from (to_markdown(head), to_latex(head, "l" * columns), to_latex(head, "r" * columns))
    yield from (to_markdown(cells), to_latex(cells, "lcrr"))
