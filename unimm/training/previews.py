"""What a run shows on the way: fixed prompts, drawn from fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.images import save_image
from unimm.pipeline import UniMM
from unimm.processing.views import TargetSize
from unimm.sheet import Card, Line, SheetSection, draw_sheet

PREVIEW_PROMPTS = 16


def draw(
    um: UniMM, prompts: Sequence[str], target_size: TargetSize, images: Sequence[Any] | None = None
) -> list[Image.Image]:
    """A drawing of each prompt, with the images that go with it, from fixed seeds and as large as `target_size`."""
    size = (
        (target_size.side, target_size.side) if um.model.layout.sized else None
    )  # others draw one size only
    drawings: list[Image.Image] = um.draw(list(prompts), seed=0, size=size, images=images)
    return drawings


def draw_prompts(um: UniMM, prompts: Sequence[str], target_size: TargetSize, folder: Path, step: int) -> None:
    """Draw prompts onto a sheet in `folder`, named after the step."""
    cards = [
        Card([drawing], [Line(prompt)])
        for drawing, prompt in zip(draw(um, prompts, target_size), prompts, strict=True)
    ]
    sheet = draw_sheet("Drawings", f"step {step}", [SheetSection("Fixed prompts and seeds", cards)])
    folder.mkdir(parents=True, exist_ok=True)
    save_image(sheet, folder / f"{step:06d}.png")
