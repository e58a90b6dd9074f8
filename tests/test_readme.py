"""The commands of the README run: every block marked `<!-- run -->`, in order, in one empty folder, offline.

Of a bash block the `unimm` commands are run, set-up lines are not; a Python block is run whole. Each is a process of
its own; those of commands are forked from one that has imported torch, which would take five seconds each.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- run -->\s*\n```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


FORKS = """
import json, os, sys
import unimm.loading
from unimm.cli.main import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = 1
        try:
            status = main(json.loads(line))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the command of each line, a JSON list of arguments, in a process of its own and writes its status."""


def steps() -> list[tuple[str, str]]:
    """Everything that the README says to run: a line of bash, or a block of Python, with its language."""
    found = []
    for language, body in BLOCK.findall(README.read_text(encoding="utf-8")):
        lines = [body] if language == "python" else body.replace("\\\n", " ").splitlines()
        found += [(language, line) for line in lines if language == "python" or line.startswith("unimm ")]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all steps share, since later ones read what earlier ones wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def forks(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that runs commands."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FORKS], cwd=folder, text=True, **pipes) as running:
        yield running


def arguments(line: str, folder: Path) -> list[str]:
    """The arguments of a command as the shell hands them over, which expands *.png."""
    shell = ["bash", "-c", f'unimm() {{ printf "%s\\0" "$@"; }}; {line}']
    done = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_readme_has_commands_to_run() -> None:
    names = " ".join(line for _, line in steps())
    assert all(f"unimm {word}" in names for word in ("caption", "ask", "draw"))


@pytest.mark.parametrize(
    ("language", "line"), steps(), ids=lambda text: "" if text == "bash" else text.partition("\n")[0][:60]
)
def test_command_runs(language: str, line: str, folder: Path, forks: subprocess.Popen[str]) -> None:
    if language == "python":
        done = subprocess.run([sys.executable, "-c", line], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    assert forks.stdin is not None and forks.stdout is not None
    forks.stdin.write(json.dumps(arguments(line, folder)) + "\n")
    forks.stdin.flush()
    status = forks.stdout.readline()
    assert status == "0\n", (folder / "said.txt").read_text()
