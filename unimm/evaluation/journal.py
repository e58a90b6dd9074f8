"""The journal of a run: a line for every item as soon as it is done, so that a run that was killed is resumed.

A process writes its own file and reads those of all; the first line of each says what the run is. A folder holds one
run. A line that a kill cut short is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.files import append, make_folder, open_regular

DoneItem = dict[str, Any]


class Journal:
    """The items that are done.

    Args:
        folder: of the run.
        identity: what the run is; a run of something else is not resumed.
        shard: number of this process, for the name of its file.
        name: of what is done: `items` or `judged`.

    Raises:
        UserError: the folder holds another run, or a file cannot be read or written.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], shard: int = 0, name: str = "items"
    ) -> None:
        self.folder, self.name = folder, name
        self.identity = dict(identity)
        self.path = folder / f"{name}-{shard}.jsonl"
        make_folder(folder)
        self.done = self.read()
        if not self._has_header():
            self.path.unlink(
                missing_ok=True
            )  # killed while it wrote the first line, behind which nothing can be
            append(self.path, _text({"run": self.identity}))

    def read(self) -> dict[str, DoneItem]:
        """Key -> line of every item that any process has done.

        Raises:
            UserError: a file is of another run.
        """
        found: dict[str, DoneItem] = {}
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            with open_regular(path) as file:
                header = _parsed(file.readline())
                if header is None:
                    continue
                self._check(path, header.get("run"))
                for line in map(_parsed, file):
                    if line is not None and "key" in line:
                        found[line["key"]] = line
        return found

    def add(self, lines: Iterable[DoneItem]) -> None:
        """Write the lines of items that are done.

        Raises:
            UserError: the disk is full; the file is as it was.
        """
        lines = list(lines)
        if lines:
            append(self.path, "".join(map(_text, lines)))
            self.done |= {line["key"]: line for line in lines}

    def _has_header(self) -> bool:
        if not self.path.exists():
            return False
        with open_regular(self.path) as file:
            return _parsed(file.readline()) is not None

    def _check(self, path: Path, identity: Any) -> None:
        if identity == self.identity:
            return
        named = identity if isinstance(identity, dict) else {}
        other = next((name for name, value in self.identity.items() if named.get(name) != value), "run")
        raise UserError(
            f"{path}: is of a run with another {other} ({_short(named.get(other))}, now "
            f"{_short(self.identity.get(other))}); give another output, or remove that folder"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _parsed(raw: bytes) -> DoneItem | None:
    """A line of a journal; None of one that is not whole."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and raw.endswith(b"\n") else None
