"""Two processes for tests, with what torchrun tells each; both are forked from one that has imported torch.

Starting them takes some ten seconds less so. `tests/training/tasks/test_unified.py` uses torchrun itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKS = """
import json, os, runpy, signal, socket, sys, traceback
import unimm.training.engine, unimm.training.tasks, unimm.training.trainer


def run(asked, rank, port):
    os.environ.update(asked["environment"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [asked["program"], *asked["arguments"]]
    runpy.run_path(asked["program"], run_name="__main__")


for line in sys.stdin:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                run(json.loads(line), rank, port)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        failed = failed or os.waitstatus_to_exitcode(status)
        if failed:  # the other would wait for ever
            for left in children:
                os.kill(left, signal.SIGKILL)
    print(failed, flush=True)
"""


@cache
def _forks() -> subprocess.Popen[str]:
    """The process that forks; it ends when its input does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, env=environment, text=True, **pipes)


def on_two_processes(program: Path, *arguments: Path | str, **environment: str) -> tuple[int, str]:
    """Run a program on two processes.

    Args:
        program: a file of Python.
        *arguments: of it.
        **environment: variables that are set.

    Returns:
        0, or the status of the first that failed, whose other is then killed; and what both wrote.
    """
    with tempfile.NamedTemporaryFile(prefix="two-processes-") as log:
        asked = {"program": str(program), "arguments": [str(one) for one in arguments],
                 "environment": environment, "log": log.name}  # fmt: skip
        forks = _forks()
        assert forks.stdin is not None and forks.stdout is not None
        print(json.dumps(asked), file=forks.stdin, flush=True)
        return int(forks.stdout.readline()), log.read().decode(errors="replace")
