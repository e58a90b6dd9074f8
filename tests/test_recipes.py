"""Shipped recipes are listed, found by name and copied out."""

from __future__ import annotations

from pathlib import Path

import pytest

from unimm import recipes
from unimm.errors import UserError
from unimm.recipes import copy_recipe, find_recipe, list_recipes


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with recipes of our own."""
    for name, text in {
        "tokenizers/small.yaml": "# A small tokenizer.\ntask: tokenizer\n",
        "training/small.yaml": "# A small model. For tests.\ntask: unified\n",
        "training/long.yaml": "# A model that takes\n# two lines, `a.b` in it. And more.\n# More.\ntask: unified\n",
        "training/open.yaml": "# A model without an end\n#   unimm train open\ntask: unified\n",
        "training/janus/stage1.yaml": "task: unified\n# Comes late.\n",
        "training/notes.txt": "no recipe",
        "elsewhere/other.yaml": "# Not in a recipe folder.\n",
    }.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(recipes, "recipe_root", lambda: tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


def test_all_are_listed_with_the_first_sentence_of_their_comment(root: Path) -> None:
    assert [(info.name, info.summary) for info in list_recipes()] == [
        ("tokenizers/small", "A small tokenizer."),
        ("training/janus/stage1", "Comes late."),
        ("training/long", "A model that takes two lines, `a.b` in it."),
        ("training/open", "A model without an end"),
        ("training/small", "A small model. For tests."),
    ]


@pytest.mark.parametrize("name", ["training/small", "training/small.yaml"])
def test_found_by_full_name(root: Path, name: str) -> None:
    assert find_recipe(name) == root / "training/small.yaml"


@pytest.mark.parametrize("name", ["stage1", "stage1.yaml"])
def test_found_by_short_name(root: Path, name: str) -> None:
    assert find_recipe(name) == root / "training/janus/stage1.yaml"


def test_a_file_wins_over_a_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "stage1").write_text("task: siglip")
    assert find_recipe("stage1") == Path("stage1")


def test_ambiguous_name_lists_what_it_may_mean(root: Path) -> None:
    with pytest.raises(UserError, match=r"small: several recipes .*: tokenizers/small, training/small$"):
        find_recipe("small")


def test_unknown_name_suggests_a_near_one(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"training/smal: no such file or recipe; did you mean training/small\?"
    ):
        find_recipe("training/smal")


def test_copy_keeps_the_bytes_and_never_overwrites(root: Path, tmp_path: Path) -> None:
    target = copy_recipe("stage1")
    assert target == Path("stage1.yaml")
    assert target.read_bytes() == (root / "training/janus/stage1.yaml").read_bytes()
    target.write_text("edited")
    with pytest.raises(UserError, match=r"stage1\.yaml: is there already"):
        copy_recipe("training/janus/stage1", target)
    assert target.read_text() == "edited"


def test_copy_into_a_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert copy_recipe("stage1", "mine") == Path("mine/stage1.yaml")
    assert copy_recipe("stage1", "mine/other.yaml").is_file()


def test_recipes_of_the_checkout_are_found() -> None:
    infos = list_recipes()
    assert {info.name.partition("/")[0] for info in infos} >= {"tokenizers", "training"}
    assert all(info.summary.endswith(".") for info in infos), (
        "every recipe opens with a sentence on what it is"
    )
