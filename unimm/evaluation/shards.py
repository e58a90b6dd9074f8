"""Several processes on one machine that share the items of a run; each is the same command with its part."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from unimm.errors import UserError

if TYPE_CHECKING:
    from unimm.evaluation.benchmark import RunOptions


def run_processes(count: int, options: RunOptions, measure: str, overrides: Iterable[str]) -> None:
    """Do all parts of a run, each in a process of its own; returns when they are done.

    Raises:
        UserError: a process failed; its own line says why.
    """
    command = [sys.executable, "-m", "unimm", "eval", measure, *overrides]
    for name in options.data:
        command += ["--data", name]
    for option, value in (
        ("--model", options.model), ("--images", options.images), ("--output", options.output),
        ("--batch-size", options.batch_size), ("--limit", options.limit), ("--judged", options.judged),
        ("--drawn", options.drawn), ("--device", options.device), ("--dtype", options.dtype),
    ):  # fmt: skip
        command += [] if value is None else [option, str(value)]
    running = [
        subprocess.Popen([*command, "--shard", f"{part}/{count}"], stdout=subprocess.DEVNULL)
        for part in range(count)
    ]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
    failed = [part for part, code in enumerate(codes) if code]
    if failed:
        raise UserError(
            f"{options.output}: part {failed[0]} of {count} failed; give the command again to go on"
        )
