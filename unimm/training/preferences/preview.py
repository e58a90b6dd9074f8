"""Previews of a policy: drawings of fixed prompts and seeds, before the first step and now, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from unimm.images import atomic_write
from unimm.pipeline import UniMM
from unimm.sampling.choose import streams
from unimm.sampling.images import sample_codes
from unimm.sheet import Card, Line, Section, draw_sheet

if TYPE_CHECKING:
    from unimm.training.preferences.recipe import DrawingPreview

PREVIEW_PROMPTS = 16


def draw_fixed(um: UniMM, prompts: Sequence[str], section: DrawingPreview) -> list[Any]:
    """Return the codes of one drawing of each prompt, as nested lists."""
    if not prompts:
        return []
    rows, columns = um.model.layout.grid
    uniforms = streams(section.seed, len(prompts), rows * columns)
    codes = sample_codes(
        um.model, um.processor, prompts, uniforms, section.guidance_scale, section.temperature
    )
    found: list[Any] = codes.tolist()
    return found


def kept_before(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a model showed before the first step, made once and kept in `folder`."""
    file = folder / "before.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(make()))
    before: dict[str, Any] = json.loads(file.read_text())
    return before


def before_and_after(um: UniMM, prompts: Sequence[str], *codes: list[Any]) -> Image.Image:
    """Return a sheet of drawings of fixed prompts, side by side."""
    device = um.model.device
    pictures = [
        um.processor.to_images(um.image_tokenizer.decode(torch.tensor(one, device=device))) for one in codes
    ]
    cards = [
        Card(list(drawings), [Line(prompt)]) for prompt, *drawings in zip(prompts, *pictures, strict=True)
    ]
    return draw_sheet("Drawings", "before and after", [Section("Fixed prompts and seeds", cards)])
