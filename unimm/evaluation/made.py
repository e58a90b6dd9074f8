"""Data that the package makes itself, as the rows of a data set: EmojiScenes and synthetic tables, from a seed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Literal

from PIL import Image

from unimm.data.emojiscenes.scenes import SCENE_KINDS, EmojiScenes
from unimm.data.tables.settings import TABLE_SPLITS, TableSettings
from unimm.errors import UserError
from unimm.evaluation.rows import Columns
from unimm.sections import NotNegative, Positive, Section

MADE_VERSION = 1  # rises with any change of what is made


class MadeData(Section):
    """Which data is made."""

    kind: Literal["scene-questions", "scene-prompts", "tables", "table-questions"]
    split: Literal["seen", "composed", "vendor", "larger", "font"] = "seen"
    """Of scenes seen, composed or vendor; of tables seen, larger or font."""
    seed: NotNegative = 1
    samples: Positive = 100
    """Of each kind of question or scene; or tables."""
    size: Positive = 64
    """Pixels a side of scenes."""
    settings: TableSettings = TableSettings()
    """Which tables, as `data.tables` of a training recipe has them."""

    def checksum(self) -> str:
        """SHA-256 of what is made, and by which version."""
        text = json.dumps([MADE_VERSION, self.model_dump()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def made_rows(made: MadeData) -> Iterator[Columns]:
    """The rows: each has an `id`, and what it is asked, answered or judged by.

    Raises:
        UserError: there is no such split of that data.
    """
    tables = made.kind.startswith("table")
    splits = TABLE_SPLITS[1:] if tables else ("seen", "composed", "vendor")
    if made.split not in splits:
        raise UserError(f"data.made.split: {made.split}; {made.kind} have {', '.join(splits)}")
    makers = {
        "scene-questions": _scene_questions, "scene-prompts": _scene_prompts, "tables": _tables,
        "table-questions": _table_questions,
    }  # fmt: skip
    return makers[made.kind](made)


def _scene_questions(made: MadeData) -> Iterator[Columns]:
    from unimm.evaluation.emojiscenes.batches import render_image
    from unimm.evaluation.emojiscenes.questions import collect_questions

    chosen = collect_questions(EmojiScenes(made.split, made.seed, made.size), made.samples)  # type: ignore[arg-type]
    for number, (scene, question) in enumerate(chosen):
        parts = {"question": question.question, "answer": question.answer, "category": question.kind}
        yield {"id": f"{made.split}-{number}", **parts, "image": _png(render_image(scene))}


def _scene_prompts(made: MadeData) -> Iterator[Columns]:
    from unimm.evaluation.emojiscenes.drawing import prompt_for

    for kind in SCENE_KINDS:
        scenes = EmojiScenes(made.split, made.seed, made.size, made.samples, kinds=(kind,))  # type: ignore[arg-type]
        for number, scene in enumerate(scenes):
            named = [made.split, made.seed, kind, number]
            yield {
                "id": f"{made.split}-{kind}-{number}", "prompt": prompt_for(scene), "category": kind, "scene": named,
            }  # fmt: skip


def _tables(made: MadeData) -> Iterator[Columns]:
    from unimm.data.tables.content import TRANSCRIPTION_REQUESTS
    from unimm.data.tables.tables import SyntheticTables

    tables = SyntheticTables(made.split, made.seed, made.settings, made.samples)  # type: ignore[arg-type]
    for number, table in enumerate(tables):
        cells = [list(row) for row in table.content.cells]
        image = _png(table.image())
        for markup in made.settings.limits().formats:
            asked = {"question": TRANSCRIPTION_REQUESTS[markup][0], "answer": cells, "category": markup}
            yield {"id": f"{made.split}-{number}-{markup}", **asked, "image": image}


def _table_questions(made: MadeData) -> Iterator[Columns]:
    from unimm.data.tables.tables import SyntheticTables
    from unimm.evaluation.tables.reading import questions_of

    tables = list(SyntheticTables(made.split, made.seed, made.settings, made.samples))  # type: ignore[arg-type]
    chosen = questions_of(tables, made.settings.limits().asked, made.samples)
    for number, (table, question) in enumerate(chosen):
        parts = {"question": question.question, "answer": question.answer, "category": question.kind}
        yield {"id": f"{made.split}-{number}", **parts, "image": _png(table.image())}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
