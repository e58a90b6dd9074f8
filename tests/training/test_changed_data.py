"""Sources that have changed between a stop and a resume are said, whatever their form; unchanged ones are not."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data import forms
from tests.training.test_records import recipe_file
from tests.training.tokenizer.test_validation import overrides
from unimm.errors import UserNote
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

MAKERS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda folder: forms.image_folder(folder, 6),
    "tars": lambda folder: forms.shards(folder, 6),
    "list": lambda folder: forms.llava(folder, 6, "talks.jsonl"),
}


def add(path: Path, form: str) -> None:
    """One item more."""
    if form == "folder":
        shutil.copy(path / "000.png", path / "100.png")
        shutil.copy(path / "000.txt", path / "100.txt")
    elif form == "tars":
        forms.write_tar(path / "9.tar", {"a.png": forms.encoded(forms.SCENES[9]), "a.txt": b"a bell"})
    else:
        path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")


def edit(path: Path, form: str) -> None:
    """As many items, one of them another."""
    file = {"folder": path / "003.txt", "tars": path / "001.tar", "list": path}[form]
    state = file.stat()
    if form == "folder":
        file.write_text("something else altogether")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


def stopped_and_resumed(path: Path, *between: Callable[[], None]) -> None:
    train(load_recipe(path, ["stages[0].steps=2"]), quiet=True)
    for change in between:
        change()
    train(load_recipe(path), quiet=True)


@pytest.mark.parametrize("form", MAKERS)
def test_changed_data_is_said_at_the_resume(tiny: Path, tmp_path: Path, form: str) -> None:
    data = MAKERS[form](tmp_path / "data")
    path = recipe_file(tmp_path / "r", tiny, {"mine": {"path": str(data)}})
    with pytest.warns(
        UserNote, match=r"data\.sources\.mine: 6 items, files \w{8} when .*, now 7 items, files"
    ) as said:
        stopped_and_resumed(path, lambda: add(data, form))
    assert len(said) == 1
    state = json.loads((tmp_path / "r/run/checkpoints/step-00000004/state.json").read_text())
    assert state["data"]["mine"].startswith("7 items, files ")
    with pytest.warns(UserNote, match=r"data\.sources\.mine: 7 items.* now 7 items"):
        edit(data, form)
        train(load_recipe(path, ["stages[0].steps=6"]), quiet=True)


def test_unchanged_data_is_not_spoken_of(tiny: Path, tmp_path: Path) -> None:
    sources: dict[str, Any] = {name: {"path": str(make(tmp_path / name))} for name, make in MAKERS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserNote)
        stopped_and_resumed(recipe_file(tmp_path / "r", tiny, sources))


def test_images_of_a_tokenizer_are_compared_too(tmp_path: Path) -> None:
    data = forms.image_folder(tmp_path / "data", 6)
    given = [*overrides(tmp_path / "run", str(data)), "logging.samples_every=0"]
    given = [one for one in given if not one.startswith("logging.")]
    recipe = find_recipe("emojiscenes-tiny")
    train(load_recipe(recipe, [*given, "stages[0].steps=2"]), quiet=True)
    add(data, "folder")
    with pytest.warns(UserNote, match=r"data\.sources\.mine: 6 items, .* now 7 items"):
        train(load_recipe(recipe, given), quiet=True)
