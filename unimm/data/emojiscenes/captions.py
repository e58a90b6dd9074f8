"""What a run on scenes shows on the way, of held-out ones: captions to draw, and how many it captions rightly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimm.data.emojiscenes.scenes import EmojiScenes, Scene
from unimm.files import append
from unimm.models.modeling import UniMMModel
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor
from unimm.sampling.text import generate_text


def held_out_prompts(count: int) -> list[str]:
    """Captions of the first `count` held-out scenes."""
    scenes = EmojiScenes("seen", 7, 64, max(count, 64), ("single",))
    return [scenes[i].captions()[0] for i in range(count)]


def caption_held_out(model: UniMMModel, processor: UniMMProcessor, folder: Path, step: int) -> None:
    """Caption held-out scenes, and write how many captions are right as a line of `captions.jsonl` in `folder`."""
    line: dict[str, Any] = {"step": step}
    for split in ("seen", "vendor"):
        scenes = list(EmojiScenes(split, 7, processor.image_size or 64, 128, ("single",)))
        captions = caption_scenes(model, processor, scenes)
        line[split] = float(np.mean([c in s.captions() for s, c in zip(scenes, captions, strict=True)]))
        line[f"{split}_captions"] = captions[:4]
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / "captions.jsonl", json.dumps(line) + "\n")


def caption_scenes(model: UniMMModel, processor: UniMMProcessor, scenes: Sequence[Scene]) -> list[str]:
    """Caption scenes in one batch."""
    images = [[Image.fromarray(scene.render())] for scene in scenes]
    inputs = processor([CAPTION_REQUESTS[0]] * len(images), images)
    return generate_text(model, processor, inputs, max_new_tokens=32)
