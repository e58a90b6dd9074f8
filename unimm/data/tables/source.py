"""Tables as a source of training samples: tables to understand, and what is said of them as text.

A sample to understand shows a table once and asks for it as Markdown or LaTeX, and questions about it; each is a branch
that sees the table and itself, as in EmojiScenes. Everything about a sample follows from the seed, its kind and its
position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from unimm.data.tables.content import TRANSCRIPTION_REQUESTS
from unimm.data.tables.settings import TABLE_KINDS, TABLE_SOURCE, TableSettings
from unimm.data.tables.tables import ENDLESS_TABLES, SyntheticTable, SyntheticTables
from unimm.processing.messages import SHOWN, Message
from unimm.processing.processor import UniMMProcessor, grids_of
from unimm.processing.rows import branch

if TYPE_CHECKING:
    from unimm.data.samples import Sample


def exchanges_of(
    table: SyntheticTable, rng: np.random.Generator, settings: TableSettings
) -> list[tuple[str, str]]:
    """Return what is asked of a table and the right answers: the whole of it in one format, then questions."""
    limits = settings.limits()
    found = []
    if limits.formats:
        markup = limits.formats[rng.integers(len(limits.formats))]
        requests = TRANSCRIPTION_REQUESTS[markup]
        found.append((requests[rng.integers(len(requests))], table.text(markup)))
    by_kind = {kind: [one for one in table.questions() if one.kind == kind] for kind in limits.asked}
    for _ in range(limits.questions):
        kinds = [kind for kind, listed in by_kind.items() if listed]
        if not kinds:
            break
        listed = by_kind[kinds[rng.integers(len(kinds))]]
        question = listed.pop(int(rng.integers(len(listed))))
        found.append((question.question, question.answer))
    return found


class TableSamples:
    """Random access to training samples of one kind.

    Args:
        processor: of the model.
        kind: one of `TABLE_KINDS`.
        seed: of the samples.
        settings: which tables, and what is asked of them.
    """

    def __init__(self, processor: UniMMProcessor, kind: str, seed: int, settings: TableSettings) -> None:
        self.processor, self.seed, self.settings = processor, seed, settings
        self.tables = SyntheticTables("train", seed, settings)
        self.salt = TABLE_KINDS.index(kind)
        self.make = {"understanding": self.understanding, "text": self.text}[kind]

    def __len__(self) -> int:
        return ENDLESS_TABLES

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, which depends on that and the seed alone."""
        rng = np.random.default_rng([self.seed, int(index), self.salt])
        return self.make(rng, self.tables[int(rng.integers(ENDLESS_TABLES))])

    def understanding(self, rng: np.random.Generator, table: SyntheticTable) -> Sample:
        """A table, then all that is asked of it, each in a branch of its own."""
        asked = exchanges_of(table, rng, self.settings)
        exchanges = [
            (Message("user", (SHOWN, one)), Message("assistant", (answer,))) for one, answer in asked
        ]
        images = self.processor.look([table.image()])
        grids = grids_of(images)
        row = branch([self.processor.conversation.write(exchange, grids) for exchange in exchanges]).arrays()
        return {**row, "images": images}

    def text(self, rng: np.random.Generator, table: SyntheticTable) -> Sample:
        """One answer as plain text, every token labelled."""
        asked = exchanges_of(table, rng, self.settings)
        answer = asked[rng.integers(len(asked))][1]
        return dict(self.processor.conversation.write([Message("assistant", (answer,))]).arrays())


def table_samples(
    processor: UniMMProcessor, mixture: Mapping[str, float], seed: int, settings: TableSettings
) -> dict[str, TableSamples]:
    """Return endless samples of each kind that a mixture names; `tables/KIND` is a kind there."""
    return {
        f"{TABLE_SOURCE}/{kind}": TableSamples(processor, kind, seed, settings)
        for kind in TABLE_KINDS
        if f"{TABLE_SOURCE}/{kind}" in mixture
    }
