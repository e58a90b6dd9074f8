"""The programs in benchmarks/ import what there is, take what is documented, and write recipes that can be read."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tests.training.toy  # noqa: F401  (makes the toy task known, which kills.py trains)
from unimm.folders import write_folder
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
COMMAND = re.compile(r"^ *python benchmarks/(\w+)\.py(.*)$", re.MULTILINE)
COMMANDS = [
    (name, shlex.split(arguments, comments=True))
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *FOLDER.glob("*.py")])
    for name, arguments in COMMAND.findall(path.read_text(encoding="utf-8"))
]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where one of them is run: the others are found beside it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if name in NAMES:
            del sys.modules[name]


def program(name: str) -> ModuleType:
    module = importlib.import_module(name)
    assert module.__file__ == str(FOLDER / f"{name}.py")
    return module


@pytest.mark.parametrize("name", NAMES)
def test_help_is_printed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        program(name).main()
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


class Read(Exception):
    """The arguments were read."""


@pytest.mark.parametrize(
    ("name", "arguments"), COMMANDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_documented_arguments_are_read(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(
            argparse.ArgumentParser, method, reading(getattr(argparse.ArgumentParser, method))
        )
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Read):
        program(name).main()


def reading(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that reads the arguments and then stops the program."""

    def read(*arguments: Any) -> None:
        method(*arguments)
        raise Read

    return read


def test_every_program_is_documented() -> None:
    assert {name for name, _ in COMMANDS} == set(NAMES)


def test_recipes_that_they_write_are_read(tmp_path: Path) -> None:
    recipe = load_recipe(program("training").write_recipe(tmp_path, "mixture"))
    assert set(recipe.stages[0].mixture) == {
        f"emojiscenes/{k}" for k in ("understanding", "text", "generation")
    }
    assert (
        load_recipe(program("kills").write_recipe(tmp_path / "kills", steps=10, zero=0)).stages[1].steps == 5
    )


def test_kills_sees_that_a_checkpoint_is_written(tmp_path: Path) -> None:
    checkpoints = tmp_path / "out" / "checkpoints"
    seen = []
    write_folder(checkpoints / "step-00000003", lambda new: seen.append(program("kills").is_saving(tmp_path)))
    assert seen == [True] and not program("kills").is_saving(tmp_path)
    assert program("kills").saved(tmp_path) == [checkpoints / "step-00000003"]


def test_recipes_that_they_change_have_these_keys() -> None:
    for path, overrides in program("dpo").WORKLOADS.values():
        assert load_recipe(find_recipe(path), overrides).task == "dpo"
