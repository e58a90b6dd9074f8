"""Image codes that are computed once and kept in a safetensors file, under a mark of all that they depend on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimm.errors import UserError
from unimm.images import atomic_write

Kept: TypeAlias = tuple[dict[str, Tensor], dict[str, str]]


def kept_codes(path: Path, mark: str, compute: Callable[[], Kept], least: int = 0) -> Kept:
    """Return the tensors of a file and the notes beside them, which are computed first where the file is not these.

    Args:
        path: the file; made again if it is damaged, bears another mark or has too few codes.
        mark: all that the codes depend on.
        compute: makes the tensors, `codes` [M, ...] among them, and the notes.
        least: how many codes there have to be; a file may have more.

    Raises:
        UserError: the file bears no mark, so it is something else; or it cannot be written.
    """
    if not _is_these(path, mark, least):
        tensors, notes = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"mark": mark, **notes})
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata() or {}


def _is_these(path: Path, mark: str, least: int) -> bool:
    """Whether a file has the codes of a mark, and enough of them."""
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        written = _mark_of(file)
        if written is None:
            raise UserError(f"{path}: this is no file of image codes; name another")
        return written == mark and file.get_slice("codes").get_shape()[0] >= least
    return False


def _mark_of(file: Any) -> str | None:
    """The mark of an open file: a note, or a tensor of its bytes."""
    notes: dict[str, str] = file.metadata() or {}
    with suppress(SafetensorError):
        return notes.get("mark") or bytes(file.get_tensor("mark").numpy()).decode()
    return None
