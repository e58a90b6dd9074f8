"""Splits, as names of files and folders say them: `data/train-00000-of-00010.parquet`, `test/0.tar`, `val.jsonl`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from unimm.errors import UserError, UserNote

KEYWORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD = re.compile(r"^(\w[\w.]*)-\d{5}-of-\d{5}\.")
_WORD = re.compile(r"(?:^|[-_. ])(" + "|".join(KEYWORDS) + r")(?=$|[-_. \d])", re.IGNORECASE)


def split_of(path: Path) -> str | None:
    """The split that a file belongs to by its name, or else by a folder's; None where neither says one."""
    if (shard := _SHARD.match(path.name)) is not None:
        return KEYWORDS.get(shard[1].lower(), shard[1])
    if (word := _WORD.search(path.stem)) is not None:
        return KEYWORDS[word[1].lower()]
    folders = (KEYWORDS.get(part.lower()) for part in reversed(path.parts[:-1]))
    return next((split for split in folders if split is not None), None)


def split_folder(folder: Path, split: str | None, location: str) -> Path | None:
    """The folder of one split in a folder that holds such folders and no others; None where it does not.

    Raises:
        UserError: as `choose_split`.
    """
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if not inside or any(path.name.lower() not in KEYWORDS for path in inside):
        return None
    return choose_split(inside, folder, split, location)[0]


def choose_split(files: Sequence[Path], folder: Path, split: str | None, location: str) -> list[Path]:
    """The files of one split; all of them where their names say none.

    Args:
        files: in `folder` or below it.
        folder: what is above it says nothing.
        split: which is wanted; None: "train", and where there are several a `UserNote` says so.
        location: what the user called the files.

    Raises:
        UserError: there is no such split, or there are several without "train" among them.
    """
    found: dict[str, list[Path]] = {}
    for file in files:
        inside = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
        found.setdefault(split_of(inside) or "", []).append(file)
    plain = found.pop("", [])
    names = ", ".join(found)
    if split is not None:
        wanted = KEYWORDS.get(split.lower(), split)
        if wanted in found:
            return found[wanted]
        if not found and wanted == "train":
            return plain
        raise UserError(f"{location}: has no split {split}; it has {names or 'none'}")
    if len(found) + bool(plain) < 2:
        return list(files)
    if plain and "train" not in found:
        chosen, rest = plain, f"only the {len(plain)} files of none are read; name another with split"
    elif "train" in found:
        chosen, rest = found["train"], "train is read; name another with split"
    else:
        raise UserError(f"{location}: has the splits {names}; say which with split")
    warnings.warn(f"{location}: has the splits {names}; {rest}", UserNote, stacklevel=2)
    return chosen
