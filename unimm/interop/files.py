"""The small files beside a published checkpoint's weights: processors' options, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimm.interop.source import read_json
from unimm.processing import PROCESSOR_FILE

PICTURES_FILE = "preprocessor_config.json"


def read_optional(path: Path) -> dict[str, Any]:
    """Read a JSON object, an empty one if there is no such file."""
    return read_json(path) if path.exists() else {}


def picture_options(*folders: Path, key: str = "image_mean") -> dict[str, Any]:
    """Return how pictures to understand are prepared.

    Args:
        folders: where to look, in this order.
        key: what the right document has; some have one of these files for another purpose.

    Returns:
        The options of `preprocessor_config.json`, or those of the image processor in `processor_config.json`, or
        none.
    """
    for folder in folders:
        inner = read_optional(folder / PROCESSOR_FILE).get("image_processor")
        for options in (read_optional(folder / PICTURES_FILE), inner):
            if isinstance(options, dict) and key in options:
                return options
    return {}


def normalisation(options: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return the mean and deviation that `picture_options` say, one for each channel."""
    half = (0.5, 0.5, 0.5)
    return {name: tuple(options.get(f"image_{name}") or half) for name in ("mean", "std")}


def read_chat_template(folder: Path) -> str:
    """Return the template of turns as transformers' processors keep it, an empty one if there is none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", PROCESSOR_FILE, "tokenizer_config.json"):
        template = read_optional(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    return ""


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
