"""Votes on disk: none is lost and none counts twice, whenever the program or the machine stops.

Beside the preferences, which are all that training reads, lies a journal (`votes.jsonl.state`): every vote, tie and
undoing in order. Each is flushed to disk first in the journal, then in the preferences; after a stop in between, the
preferences are brought to what the journal says.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.files import atomic_write, check_target, open_here, recover, sync_name
from unimm.preferences.data import read_lines
from unimm.sections import Section, show, validate

_BEGINNING = b'{"settings": '  # of a journal
_FOREIGN = "not what `unimm preferences vote` keeps; give another output"


class Vote(Section):
    """A line of the journal: a pair was judged; a tie has no preference."""

    pair: str
    preference: dict[str, Any] | None
    voter: str


class Undoing(Section):
    """A line of the journal: the last vote was taken back."""

    undone: str


class Votes:
    """The votes in a file, held by this process alone until `close`.

    Args:
        path: the preferences.
        settings: how the pairs were made; those of a file that is resumed must be the same.

    Attributes:
        kept: the preference of every pair that was voted on, None for a tie, in order.
        note: what was mended, or None.

    Raises:
        UserError: another process holds the file, it was begun with other settings, or it holds what no journal
            tells of.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.state = self.path.with_name(f"{self.path.name}.state")
        self.kept: dict[str, dict[str, Any] | None] = {}
        self.note: str | None = None
        self._lock = threading.Lock()
        self._sizes: dict[Path, int] = {}
        self._begun = False
        self._open = True
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder; give a file")
        check_target(self.path)
        if not self.state.exists() and _size(self.path):
            raise UserError(
                f"{self.path}: holds something, and no {self.state.name} beside it; give another file"
            )
        self._made = not self.path.exists()
        self._handle = self._hold()
        try:
            recover(self.path)
            self._restore(dict(settings))
        except BaseException as error:
            if not _size(self.state):
                self._remove()
            self._release()
            if isinstance(error, OSError):
                raise UserError(f"{self.state}: cannot be written ({error.strerror})") from None
            raise

    def __enter__(self) -> Votes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def last(self) -> str | None:
        """The pair that was voted on last."""
        return next(reversed(self.kept), None)

    @property
    def ties(self) -> int:
        """How many pairs were found equal."""
        return sum(preference is None for preference in self.kept.values())

    def view(self) -> tuple[set[str], str | None]:
        """The pairs that were voted on, and the last of them, at one moment."""
        with self._lock:
            return set(self.kept), self.last

    def add(self, pair: str, preference: dict[str, Any] | None, voter: str) -> bool:
        """Keep a vote, on disk when this returns; False if the pair was voted on before.

        Args:
            pair: its key.
            preference: the line of preferences; None for a tie.
            voter: whose vote it is.

        Raises:
            UserError: the file was closed or changed by another program.
            OSError: the disk takes no more; the vote is not kept.
        """
        with self._lock:
            self._check_open()
            if pair in self.kept:
                return False
            before = self._sizes[self.state]
            self._append(self.state, _line({"pair": pair, "preference": preference, "voter": voter}))
            if preference is not None:
                try:
                    self._append(self.path, _line(preference))
                except BaseException:
                    self._take_back(before)
                    raise
            self.kept[pair] = preference
            self._begun = True
            return True

    def undo(self, pair: str) -> bool:
        """Take the last vote back; False if it was on another pair. Raises as `add`."""
        with self._lock:
            self._check_open()
            if pair != self.last:
                return False
            before = self._sizes[self.state]
            self._append(self.state, _line({"undone": pair}))
            preference = self.kept[pair]
            if preference is not None:
                try:
                    self._cut(self.path, self._sizes[self.path] - len(_line(preference)))
                except BaseException:
                    self._take_back(before)
                    raise
            del self.kept[pair]
            return True

    def close(self) -> None:
        """Let others have the file; if nobody ever voted, leave none behind."""
        with self._lock:
            if not self._open:
                return
            if not self._begun:
                self._remove()
            self._release()

    def _remove(self) -> None:
        """Leave no files of a voting that never began."""
        self.state.unlink(missing_ok=True)
        if self._made:
            self.path.unlink(missing_ok=True)

    # --- opening -----------------------------------------------------------------------------------------

    def _hold(self) -> int:
        """Open the journal, or make it, for this process alone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = open_here(self.state, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{self.state}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), self.state.lstat()):  # removed by who held it until now
                raise BlockingIOError
        except OSError:
            os.close(handle)
            raise UserError(f"{self.path}: another `unimm preferences vote` writes into it") from None
        return handle

    def _release(self) -> None:
        self._open = False
        os.close(self._handle)

    def _restore(self, settings: dict[str, Any]) -> None:
        """Read the journal and bring the preferences to what it says."""
        content = self.state.read_bytes()
        whole, newline, rest = content.rpartition(b"\n")
        self._sizes = {self.state: len(whole) + len(newline), self.path: 0}
        if rest:  # a line cut off in writing, which nobody was told of
            if content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
                raise UserError(f"{self.state}:1: {_FOREIGN}")
            _truncate(os.open(self.state, os.O_WRONLY | os.O_NOFOLLOW), self._sizes[self.state])
        lines = list(read_lines(self.state))
        undone: dict[str, Any] | None = None
        if lines:
            undone = self._replay(lines, settings)
            self._begun = len(lines) > 1
        expected = [_line(row) for row in self.kept.values() if row is not None]
        self._mend(expected, b"" if undone is None else _line(undone))
        if not lines:
            self._append(self.state, _line({"settings": settings}))
            sync_name(self.path)

    def _replay(self, lines: list[tuple[str, Any]], settings: dict[str, Any]) -> dict[str, Any] | None:
        """Fill `kept`; return the preference that the last line took back, if it did."""
        (where, header), *entries = lines
        begun = header.get("settings")
        if not isinstance(begun, dict) or begun.keys() != settings.keys():
            raise UserError(f"{where}: {_FOREIGN}")
        for key, value in settings.items():
            if begun[key] != value:
                raise UserError(
                    f"{self.path}: begun with {key} {show(begun[key])}, now {show(value)}; "
                    f"give the same, or another output"
                )
        undone = None
        for where, value in entries:
            undone = None
            if "undone" in value:
                pair = validate(Undoing, value, where).undone
                if pair != self.last:
                    raise UserError(f"{where}: takes back {pair}, which is not the last vote")
                undone = self.kept.pop(pair)
                continue
            vote = validate(Vote, value, where)
            if vote.pair in self.kept:
                raise UserError(f"{where}: a second vote on {vote.pair}")
            self.kept[vote.pair] = vote.preference
        return undone

    def _mend(self, lines: list[bytes], undone: bytes) -> None:
        """Bring the preferences to `lines`; `undone` may follow them still."""
        expected = b"".join(lines)
        missing = not self.path.exists()
        actual = b"" if missing else self.path.read_bytes()
        self._sizes[self.path] = len(expected)
        if not expected.startswith(actual) and (expected + undone) != actual:
            parts = actual.splitlines(keepends=True)
            same = len(
                list(itertools.takewhile(lambda both: both[0] == both[1], zip(lines, parts, strict=False)))
            )
            raise UserError(
                f"{self.path}:{same + 1}: not what was voted; remove the file to have it made again from "
                f"{self.state.name}, or give another"
            )
        if actual != expected or missing:
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(expected)
            if expected:
                self.note = f"{self.path}: made again from {self.state.name}, {len(lines)} preferences"
        try:
            os.close(self._unchanged(self.path))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    # --- writing -----------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._open:
            raise UserError(f"{self.path}: voting has ended")

    def _append(self, path: Path, line: bytes) -> None:
        """Add a line, flushed to disk, or leave the file as it was."""
        size = self._sizes[path]
        handle = self._unchanged(path)
        try:
            written = 0
            while written < len(line):
                written += os.write(handle, line[written:])
            os.fsync(handle)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise
        finally:
            os.close(handle)
        self._sizes[path] = size + len(line)

    def _take_back(self, size: int) -> None:
        """Shorten the journal after a failure; a disk that cannot even flush that now does so later."""
        os.ftruncate(self._handle, size)
        self._sizes[self.state] = size

    def _cut(self, path: Path, size: int) -> None:
        """Shorten a file, flushed to disk."""
        _truncate(self._unchanged(path), size)
        self._sizes[path] = size

    def _unchanged(self, path: Path) -> int:
        """Open a file to write at its end, if it is as long as we left it."""
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        if os.fstat(handle).st_size != self._sizes[path]:
            os.close(handle)
            raise UserError(f"{path}: was changed by another program; end voting and begin again")
        return handle


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _size(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _truncate(handle: int, size: int) -> None:
    """Shorten an open file, flush it to disk and close it."""
    try:
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)
