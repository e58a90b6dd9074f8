"""The commands of the README run: every block marked `<!-- run -->`, in order, in one empty folder, offline.

Of a bash block the `unimm` commands are run, set-up lines are not; a Python block is run whole.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- run -->\s*\n```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Step(NamedTuple):
    """One thing to run: a name for the report and the command line."""

    name: str
    command: list[str]


def steps() -> list[Step]:
    """Everything that the README says to run."""
    found = []
    for language, body in BLOCK.findall(README.read_text(encoding="utf-8")):
        if language == "python":
            found.append(Step("python", [sys.executable, "-c", body]))
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("unimm "):  # through the shell, which expands *.png
                found.append(
                    Step(line, ["bash", "-c", f'unimm() {{ "{sys.executable}" -m unimm "$@"; }}; {line}'])
                )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all steps share, since later ones read what earlier ones wrote."""
    return tmp_path_factory.mktemp("readme")


def test_readme_has_commands_to_run() -> None:
    names = " ".join(step.name for step in steps())
    assert all(f"unimm {word}" in names for word in ("caption", "ask", "draw"))


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.name[:60])
def test_command_runs(step: Step, folder: Path) -> None:
    done = subprocess.run(step.command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
