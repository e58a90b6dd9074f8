"""Model folders, written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging as hf_logging

from unimm.errors import UserError

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
