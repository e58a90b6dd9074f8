"""Free memory goes back to the system, also that of a server at rest."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from unimm.server.freeing import give_memory_back

BLOCK, BLOCKS = 16 << 10, 6_000  # bytes; below what glibc maps apart


def resident() -> int:
    """Bytes that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc alone has it")
def test_pages_of_freed_blocks_go_back() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    full = resident()
    for block in blocks[:-1]:  # the last keeps the heap from shrinking by itself
        library.free(block)
    held = resident()
    give_memory_back()
    freed = resident()
    library.free(blocks[-1])
    assert full - held < BLOCK * BLOCKS // 4, "the library gave it back unasked"
    assert held - freed > BLOCK * BLOCKS * 3 // 4
