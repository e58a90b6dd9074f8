"""Preferences for the tiny model: drawings as codes and as files, answers about images, answers to words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def codes(seed: int) -> dict[str, Any]:
    """4 x 4 codes of the tiny model."""
    return {"codes": np.random.default_rng(seed).integers(32, size=(4, 4)).tolist()}


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of drawings and four of texts."""
    folder = tmp_path_factory.mktemp("preferences")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / name)

    def about(image: str, words: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"image": image}, {"text": words}]}]

    rows = [
        {"prompt": "a red apple", "chosen": codes(1), "rejected": codes(2)},
        {"prompt": about("a.png", "what is this?"), "chosen": "a red apple", "rejected": "a"},
        {"prompt": "a red apple on a blue background", "chosen": codes(3), "rejected": codes(4)},
        {"prompt": "what is red?", "chosen": "an apple", "rejected": "a blue apple is this"},
        {"prompt": "what", "chosen": {"image": "a.png"}, "rejected": {"image": "b.png"}},
        {"prompt": about("b.png", "is this a red apple?"), "chosen": "on a", "rejected": "no, what is this?"},
        {"prompt": "blue", "chosen": codes(5), "rejected": codes(6)},
        {"prompt": "this", "chosen": "is", "rejected": "background"},
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
