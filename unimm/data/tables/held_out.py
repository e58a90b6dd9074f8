"""What a run on tables shows on the way: how much it reads of held-out ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unimm.data.tables.content import TRANSCRIPTION_REQUESTS
from unimm.data.tables.markup import cells_right, read_cells
from unimm.data.tables.settings import TableSettings, TableSplit
from unimm.data.tables.tables import SyntheticTables
from unimm.files import append
from unimm.models.modeling import UniMMModel
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.text import generate_text

PREVIEW_TABLES = 32
PREVIEW_SEED = 7
SPARE_TOKENS = 8  # that an answer may be longer than the longest right one
SPLITS_SHOWN: tuple[TableSplit, ...] = ("seen", "font")


def read_held_out(
    model: UniMMModel, processor: UniMMProcessor, settings: TableSettings, folder: Path, step: int
) -> None:
    """Ask for held-out tables, and write the share of cells that are right as a line of `tables.jsonl` in `folder`."""
    line: dict[str, Any] = {"step": step}
    for split in SPLITS_SHOWN:
        line |= _read(model, processor, settings, split)
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / "tables.jsonl", json.dumps(line) + "\n")


def _read(
    model: UniMMModel, processor: UniMMProcessor, settings: TableSettings, split: TableSplit
) -> dict[str, Any]:
    """Cells and questions of a split that are right, and some of the answers."""
    tables = list(SyntheticTables(split, PREVIEW_SEED, settings, PREVIEW_TABLES))
    images = [[table.image()] for table in tables]
    asked = [table.questions()[0] for table in tables if table.questions()]
    line: dict[str, Any] = {}
    if formats := settings.limits().formats:
        inputs = processor([TRANSCRIPTION_REQUESTS[formats[0]][0]] * len(images), images)
        longest = max(len(processor.text_ids(table.text(formats[0]))) for table in tables)
        texts = generate_text(model, processor, inputs, max_new_tokens=longest + SPARE_TOKENS)
        right = total = 0
        for table, text in zip(tables, texts, strict=True):
            cells = table.content.cells
            total += sum(map(len, cells))
            right += cells_right(cells, read_cells(text, formats[0]))
        line |= {split: right / total, f"{split}_texts": texts[:2]}
    if asked:
        shown = [image for image, table in zip(images, tables, strict=True) if table.questions()]
        answers = generate_text(
            model, processor, processor([one.question for one in asked], shown), max_new_tokens=24
        )
        line[f"{split}_answers"] = sum(
            answer.strip() == one.answer for answer, one in zip(answers, asked, strict=True)
        ) / len(asked)
    return line
