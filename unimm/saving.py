"""Model folders: written whole or not at all, and checked before they are read."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as hf_logging

from unimm.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "*.bin.index.json")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder through `write`, which is given a temporary neighbour; its files are then moved in.

    Moving needs no room, so a disk that fills up leaves an old folder as it was.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder.is_file():
        raise UserError(f"{folder}: a file is in the way; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            write(Path(temporary))
            written = sorted(Path(temporary).iterdir())
            for file in written:
                if (folder / file.name).is_dir():
                    shutil.rmtree(folder / file.name)
                file.replace(folder / file.name)
        _remove_stale(folder, {file.name for file in written})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written ({reason}); what was there is unchanged") from None


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Remove weights of what was in a folder before, lest an old index or shard be read with the new ones."""
    for pattern in WEIGHTS:
        for file in folder.glob(pattern):
            if file.name not in written:
                file.unlink()


@contextmanager
def no_progress() -> Iterator[None]:
    """Keep transformers from drawing a bar for the second that loading or saving takes."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check `config.json` of a model folder.

    Raises:
        UserError: it is missing, no JSON, or of another kind of model.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; name the folder of a saved model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "unimm":
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: model_type is {kind!r}; expected 'unimm'")
    return config


def check_weights(folder: Path) -> None:
    """Check that every shard is there and as long as its header says.

    Raises:
        UserError: a line that names the shard.
    """
    for shard in _shards(folder):
        path = folder / shard
        if not path.exists():
            raise UserError(f"{path}: missing; the checkpoint is not complete")
        expected, size = _expected_size(path), path.stat().st_size
        if size != expected:
            raise UserError(f"{path}: truncated or damaged, {size} bytes where its header says {expected}")


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if not index.exists():
        return [WEIGHTS_FILE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not readable as a shard index ({error})") from None
    return sorted(names)


def _expected_size(path: Path) -> int:
    """Return how long a safetensors file must be, from its header."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= path.stat().st_size:
            raise UserError(f"{path}: truncated or damaged, its header is cut short")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"{path}: no safetensors file, its header is not readable") from None
    return 8 + int(length) + max(ends, default=0)
