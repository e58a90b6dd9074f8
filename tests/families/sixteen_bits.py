"""Checkpoints as transformers saves them from 16 bits: halved weights, and a number format in every config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def save_in_16_bits(folder: Path) -> None:
    """Halve all weights in and under a folder, and name the format in every section of every config there."""
    for file in folder.rglob("*.safetensors"):
        halved = {name: _halved(tensor) for name, tensor in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
    for file in [*folder.rglob("config.json"), *folder.rglob("tokenizer_config.json")]:
        file.write_text(json.dumps(_naming(json.loads(file.read_text()))))


def _halved(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _naming(section: dict[str, Any]) -> dict[str, Any]:
    """The section and all within it, each naming a format in the earlier way and in today's."""
    inner = {key: _naming(value) if _is_part(key, value) else value for key, value in section.items()}
    return {**inner, "torch_dtype": "bfloat16", "dtype": "bfloat16"}


def _is_part(key: str, value: object) -> bool:
    return isinstance(value, dict) and (key.endswith("_config") or key in ("decoder", "image_tokenizer"))
