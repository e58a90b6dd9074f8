"""Files of candidates to vote on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def write(path: Path, *rows: Any) -> Path:
    """JSON lines; a row that is a text is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def captions(folder: Path, prompts: int = 3, each: int = 4) -> Path:
    """Captions of images, each of which says which it is."""
    rows = []
    for number in range(prompts):
        Image.new("RGB", (30, 20), (80 * number, 0, 99)).save(folder / f"{number}.png")
        content = [{"image": f"{number}.png"}, {"text": f"describe picture {number}"}]
        texts = [f"caption {number}{letter}" for letter in "abcdefgh"[:each]]
        rows.append({"prompt": [{"role": "user", "content": content}], "candidates": texts})
    return write(folder / "captions.jsonl", *rows)


def drawings(path: Path, prompts: int = 2, each: int = 4) -> Path:
    """Drawings of the tiny model, each with codes of its own."""
    rows = []
    for number in range(prompts):
        candidates = [
            {
                "seed": k,
                "codes": [[(number + 3 * k + row * column) % 32 for column in range(4)] for row in range(4)],
            }
            for k in range(each)
        ]
        rows.append({"prompt": f"prompt {number}", "candidates": candidates, "settings": {"model": "tiny"}})
    return write(path, *rows)
