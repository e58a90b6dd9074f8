"""The reference's log-probabilities, computed once and cached beside the data, under hashes of all they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unimm.data.sources import Location, Reading, open_source
from unimm.errors import UserError
from unimm.files import atomic_write
from unimm.preferences.data import ANYWHERE, Preference


def hash_data(location: Location, preferences: Sequence[Preference], reading: Reading = ANYWHERE) -> str:
    """Hash preferences: what was read, the files that hold it, and every image that lies in a file of its own."""
    total = hashlib.sha256()
    for file in open_source(location, reading).files():
        total.update(
            f"{file.stat().st_size} ".encode()
        )  # so that no file's end counts as the next one's beginning
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                total.update(block)
    for preference in preferences:
        total.update(json.dumps(preference.model_dump(), sort_keys=True).encode())
        for blob in preference.files():
            inside = blob.data is None and blob.size is not None  # of a file that is hashed whole
            total.update(
                f"{blob.offset} {blob.size}".encode() if inside else hashlib.sha256(blob.read()).digest()
            )
    return total.hexdigest()


def cache_beside(path: Path) -> Path:
    """Where the log-probabilities of preferences are cached, unless a recipe says otherwise."""
    return path.with_name(f"{path.name}.reference.safetensors")


def read_or_compute(
    path: Path, marks: Mapping[str, str], compute: Callable[[], Tensor], write: bool
) -> Tensor:
    """Return the log-probabilities of a reference, float32 [N, 2, T]: of each position of both answers of every pair.

    Args:
        path: where they are cached.
        marks: what it depends on, model, data and processor, each with a hash.
        compute: makes them where there is no file yet.
        write: whether to keep them (one process of several does).

    Raises:
        UserError: the file is of another model, other data or another processor, or is damaged.
    """
    if not path.exists():
        scores = compute()
        if write:
            with atomic_write(path) as temporary:
                save_file({"log_probs": scores}, temporary, metadata=dict(marks))
        return scores
    return read_cached(path, marks)


def read_cached(path: Path, marks: Mapping[str, str]) -> Tensor:
    """Read what `read_or_compute` cached, if it is of these marks; its errors are those."""
    try:
        with safe_open(path, "pt") as file:
            written, scores = file.metadata() or {}, file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and it is computed anew") from None
    for name, mark in marks.items():
        if written.get(name) != mark:
            raise UserError(f"{path}: computed with another {name}; remove it and it is computed anew")
    if scores.ndim != 3:
        raise UserError(f"{path}: has sums, of an earlier version; remove it and it is computed anew")
    cached: Tensor = scores
    return cached
