"""A function run in a process of its own whose system calls are watched: it is killed, or refused room, at any of them.

Every call that changes files below a folder is seen, also those of libraries in Rust and C (of the main thread). What
is forked is this very process, so that nothing is imported again: a run takes some hundredths of a second.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from unimm.errors import UserError

TRACEME, PEEKUSER, GETREGS, SETREGS, SYSCALL, SETOPTIONS = 0, 3, 12, 13, 24, 0x4200  # requests of ptrace
TRACESYSGOOD, EXITKILL = 1, 0x100000
SYSCALL_STOP = signal.SIGTRAP | 0x80
RDX, RAX, RSI, RDI, R10, ORIG_RAX = 12, 10, 13, 14, 7, 15  # places in x86_64's `user_regs_struct`
AT_CWD = -100
PATIENCE = 300  # seconds after which what hangs is ended

# How a call names what it changes: by descriptor, path, folder and path, two paths, or two of folder and path.
_CALLS = {
    1: ("write", "fd"), 18: ("pwrite64", "fd"), 20: ("writev", "fd"), 40: ("sendfile", "fd"), 74: ("fsync", "fd"),
    75: ("fdatasync", "fd"), 76: ("truncate", "path"), 77: ("ftruncate", "fd"), 82: ("rename", "path"),
    83: ("mkdir", "path"), 84: ("rmdir", "path"), 86: ("link", "path2"), 87: ("unlink", "path"),
    88: ("symlink", "path2"), 90: ("chmod", "path"), 91: ("fchmod", "fd"), 258: ("mkdirat", "at"),
    263: ("unlinkat", "at"), 264: ("renameat", "at"), 265: ("linkat", "at2"), 266: ("symlinkat", "path2"),
    268: ("fchmodat", "at"), 285: ("fallocate", "fd"), 316: ("renameat2", "at"), 326: ("copy_file_range", "fd3"),
    2: ("open", "path"), 257: ("openat", "at"),
}  # fmt: skip
_NEED_ROOM = {
    "write", "pwrite64", "writev", "sendfile", "fsync", "fdatasync", "rename", "mkdir", "link", "symlink",
    "mkdirat", "renameat", "linkat", "symlinkat", "fallocate", "renameat2", "copy_file_range", "open", "openat",
}  # fmt: skip
_OPENS = ("open", "openat")


@dataclass
class Outcome:
    """What became of the function.

    Attributes:
        calls: the name and the path of every change, in order; of two paths the first.
        killed: whether it was killed.
        refusal: the message of a `UserError` that it ended with.
        failure: the traceback of any other error that it ended with.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    killed: bool = False
    refusal: str | None = None
    failure: str | None = None


def watched(
    work: Callable[[], object],
    root: Path,
    *,
    kill_at: int | None = None,
    full_from: int | None = None,
    unknown: Collection[str] = (),
) -> Outcome:
    """Run `work` in a process of its own.

    Args:
        work: what to run.
        root: the folder whose changes count.
        kill_at: the number, from 0, of the change before which the process is killed; a write is cut in half first.
        full_from: the number of the change from which on the disk has no room.
        unknown: names of calls that the system does not know.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("knows the system calls of Linux on x86_64 alone")
    assert not torch.distributed.is_initialized(), (
        "a fork of a process that has trained hangs; see tests/conftest.py"
    )
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _work(work, writer)
    os.close(writer)
    watcher = _Watcher(child, str(root), kill_at, full_from, frozenset(unknown))
    with os.fdopen(reader, "rb") as pipe:
        watcher.run()
        kind, _, message = pipe.read().decode().partition(":")
    outcome = Outcome(watcher.calls, killed=watcher.killed)
    if kind == "refusal":
        outcome.refusal = message
    elif kind != "ended" and not watcher.killed:
        outcome.failure = message or f"ended with the status {watcher.status}"
    return outcome


def _work(work: Callable[[], object], writer: int) -> None:
    """What the child does."""
    said = "failure:"
    signal.alarm(PATIENCE)
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
        if _ptrace(TRACEME, 0, 0, 0):
            said = "failure:may not be traced"
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            said = "ended:"
    except UserError as error:
        said = f"refusal:{error}"
    except BaseException:
        said = f"failure:{traceback.format_exc()}"
    finally:
        os.write(writer, said.encode())
        os._exit(0)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long] * 4


def _ptrace(request: int, process: int, address: int, data: int) -> int:
    return int(_libc.ptrace(request, process, address, data))


class _Watcher:
    """Steps a process from system call to system call."""

    def __init__(
        self, process: int, root: str, kill_at: int | None, full_from: int | None, unknown: frozenset[str]
    ) -> None:
        self.process, self.root = process, root
        self.kill_at, self.full_from, self.unknown = kill_at, full_from, unknown
        self.calls: list[tuple[str, str]] = []
        self.killed, self.status = False, 0
        self._registers = (ctypes.c_ulonglong * 27)()

    def run(self) -> None:
        """Until the process has ended."""
        _, status = os.waitpid(self.process, 0)
        if not os.WIFSTOPPED(status):
            self.status = status
            return
        _ptrace(SETOPTIONS, self.process, 0, TRACESYSGOOD | EXITKILL)
        entering, result, deliver = True, None, 0
        while True:
            _ptrace(SYSCALL, self.process, 0, deliver)
            _, status = os.waitpid(self.process, 0)
            if not os.WIFSTOPPED(status):
                self.status = status
                return
            stopped = os.WSTOPSIG(status)
            deliver = 0 if stopped == SYSCALL_STOP else stopped
            if deliver:
                continue
            if entering:
                result = self._enter()
            elif self.killed:
                os.kill(self.process, signal.SIGKILL)
            elif result is not None:
                self._set(RAX, -result)
            entering = not entering

    def _enter(self) -> int | None:
        """Look at a call that begins; gives the error that it is to end with instead, if any."""
        number = _ptrace(PEEKUSER, self.process, ORIG_RAX * 8, 0)
        if number not in _CALLS:
            return None
        name, form = _CALLS[number]
        _ptrace(GETREGS, self.process, 0, ctypes.addressof(self._registers))
        path = self._path(form)
        flags = self._registers[RSI if name == "open" else RDX]
        if not path.startswith(self.root) or (name in _OPENS and not flags & (os.O_CREAT | os.O_TRUNC)):
            return None
        self.calls.append((name, path))
        place = len(self.calls) - 1
        if place == self.kill_at:
            self._kill(name)
        elif name in self.unknown:
            return self._refuse(errno.ENOSYS)
        elif self.full_from is not None and place >= self.full_from and name in _NEED_ROOM:
            return self._refuse(errno.ENOSPC)
        return None

    def _kill(self, name: str) -> None:
        """Kill the process before the call, or after half of a write."""
        self.killed = True
        if name in ("write", "pwrite64") and self._registers[RDX] > 1:
            self._set(RDX, self._registers[RDX] // 2)
        else:
            os.kill(self.process, signal.SIGKILL)

    def _refuse(self, error: int) -> int:
        self._set(ORIG_RAX, -1)
        return error

    def _set(self, place: int, value: int) -> None:
        _ptrace(GETREGS, self.process, 0, ctypes.addressof(self._registers))
        self._registers[place] = value % 2**64
        _ptrace(SETREGS, self.process, 0, ctypes.addressof(self._registers))

    def _path(self, form: str) -> str:
        """What the call changes."""
        first, second, third, fourth = (self._registers[place] for place in (RDI, RSI, RDX, R10))
        if form == "fd":
            return self._opened(first)
        if form == "fd3":
            return self._opened(third)
        if form == "at":
            return self._at(first, second)
        if form == "at2":
            return self._at(third, fourth)
        return self._at(AT_CWD, first if form == "path" else second)

    def _opened(self, descriptor: int) -> str:
        try:
            return os.readlink(f"/proc/{self.process}/fd/{descriptor & 0x7FFFFFFF}")
        except OSError:
            return ""

    def _at(self, folder: int, name: int) -> str:
        with open(f"/proc/{self.process}/mem", "rb", buffering=0) as memory:
            memory.seek(name)
            path = os.fsdecode(memory.read(4096).partition(b"\0")[0])
        if path.startswith("/"):
            return path
        here = ctypes.c_int(folder & 0xFFFFFFFF).value == AT_CWD
        place = os.readlink(f"/proc/{self.process}/cwd") if here else self._opened(folder)
        return os.path.join(place, path)


def contents(folder: Path) -> dict[str, bytes]:
    """All regular files below a folder, by their path in it, but for those of unfinished writes."""
    return dict(_contents(folder))


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and ".unimm-writing" not in name:
            yield name, path.read_bytes()
