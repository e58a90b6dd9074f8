"""Which files a source may read: those below its folder, unless the user says that it may read others.

Data often comes from strangers, and what it names (`../../.ssh/id_ed25519`, a link to it) would be learnt by a model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from unimm.errors import UserError

WAY_OUT = "allow_outside: true (--allow-outside) reads it all the same"


class Reach:
    """The folder that a source stays in.

    Args:
        folder: where names of files start.
        allowed: whether they may lead out of it.
    """

    def __init__(self, folder: Path, allowed: bool = False) -> None:
        self.folder, self.allowed = folder, allowed

    def path(self, name: str) -> Path:
        """The path of a file that data names, relative to the folder.

        Raises:
            UserError: no file can have that name, or it leads out of the folder.
        """
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise UserError(f"{name!a}: no name of a file") from None
        if "\0" in name or not name:
            raise UserError(f"{name!a}: no name of a file")
        path = self.folder / name
        self.check(path)
        return path

    def check(self, path: Path) -> None:
        """Refuse a file that lies outside, by its name or through links.

        Raises:
            UserError: it does.
        """
        if not self.holds(path):
            raise UserError(f"{path}: outside {self.folder}; {WAY_OUT}")

    def holds(self, path: Path) -> bool:
        """Whether a file may be read."""
        if self.allowed:
            return True
        root = real_root(str(self.folder))
        return os.path.realpath(path).startswith(root if root.endswith(os.sep) else root + os.sep)


@functools.lru_cache(maxsize=1024)
def real_root(folder: str) -> str:
    """A folder without links; of a snapshot in a hub's cache, whose files are links, the whole repository's."""
    parts = Path(os.path.realpath(folder)).parts
    for position, part in enumerate(parts[1:], 1):
        if part == "snapshots" and parts[position - 1].startswith(("datasets--", "models--")):
            return str(Path(*parts[:position]))
    return str(Path(*parts))


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def walk(reach: Reach, refused: Callable[[Path], None]) -> Iterator[Path]:
    """Everything in the reach's folder and below that is no folder and not hidden, each folder once, in no order.

    Args:
        reach: its folder is walked, linked folders too.
        refused: told of every linked folder that leads out and is not gone into.

    Raises:
        UserError: a folder may not be read.
    """
    seen = {os.path.realpath(reach.folder)}
    for parent, folders, files in os.walk(reach.folder, followlinks=True, onerror=_raise):
        entered = []
        for name in sorted(folders, key=lambda name: (os.path.islink(os.path.join(parent, name)), name)):
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if name.startswith(".") or real in seen:
                continue
            if not reach.holds(Path(path)):
                refused(Path(path))
                continue
            seen.add(real)
            entered.append(name)
        folders[:] = entered
        yield from (Path(parent, name) for name in files if not name.startswith("."))
