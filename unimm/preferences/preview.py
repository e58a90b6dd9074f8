"""Previews of a policy: drawings of fixed prompts and seeds, before the first step and now, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unimm.files import atomic_write
from unimm.models.configuration import SamplingConfig
from unimm.pipeline import UniMM
from unimm.preferences.policy import DrawingPreview
from unimm.sampling.drawing import sample_codes
from unimm.sampling.sampler import noise_keys
from unimm.sheet import Card, Line, SheetSection, draw_sheet


def draw_fixed(um: UniMM, prompts: Sequence[str], section: DrawingPreview) -> list[Any]:
    """Return the codes of one drawing of each prompt, as nested lists."""
    if not prompts:
        return []
    keys = noise_keys(section.seed, len(prompts))
    sampling = SamplingConfig(section.guidance_scale, section.temperature)
    codes = sample_codes(um.model, um.processor, prompts, keys, sampling)
    found: list[Any] = codes.tolist()
    return found


def cached_before(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a model showed before the first step, made once and cached in `folder`."""
    file = folder / "before.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(make()))
    before: dict[str, Any] = json.loads(file.read_text())
    return before


def before_and_after(um: UniMM, prompts: Sequence[str], *codes: list[Any]) -> Image.Image:
    """Return a sheet of drawings of fixed prompts, side by side."""
    images = [um.decode_codes(torch.tensor(one, device=um.model.device)) for one in codes]
    cards = [Card(list(drawings), [Line(prompt)]) for prompt, *drawings in zip(prompts, *images, strict=True)]
    return draw_sheet("Drawings", "before and after", [SheetSection("Fixed prompts and seeds", cards)])
