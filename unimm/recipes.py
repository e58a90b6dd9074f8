"""The recipes that ship with unimm: find one by name, list them all, copy one out to edit.

A recipe is a YAML file in one of the folders tokenizers/, training/ and sampling/. They stand at the root of
a checkout; an installed package carries them as `unimm/_recipes/`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from unimm.errors import UserError
from unimm.files import atomic_write

FOLDERS = ("tokenizers", "training", "sampling")


@dataclass(frozen=True)
class RecipeInfo:
    """A shipped recipe: `name` is its path without suffix, `summary` the first sentence of its first comment."""

    name: str
    path: Path
    summary: str


def recipe_root() -> Path:
    """Return the folder of the recipe folders: in the installed package, else the checkout's root."""
    package = Path(str(resources.files("unimm")))
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent


def list_recipes() -> list[RecipeInfo]:
    """Return every shipped recipe, folder by folder and by name within each."""
    root = recipe_root()
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.yaml"))]
    return [
        RecipeInfo(path.relative_to(root).with_suffix("").as_posix(), path, _summary(path)) for path in paths
    ]


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe.

    Args:
        name_or_path: a file, or the name of a shipped recipe: `training/siglip`, `siglip` or `siglip.yaml`.

    Raises:
        UserError: there is no such file or recipe, or several recipes share the short name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    wanted = path.as_posix().removesuffix(".yaml").removesuffix(".yml")
    recipes = list_recipes()
    found = [info for info in recipes if wanted in (info.name, info.name.rpartition("/")[2])]
    if len(found) == 1:
        return found[0].path
    if found:
        raise UserError(f"{path}: several recipes have this name: {', '.join(info.name for info in found)}")
    close = difflib.get_close_matches(wanted, [info.name for info in recipes], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "`unimm recipes` lists those that ship with unimm"
    raise UserError(f"{path}: no such file or recipe; {hint}")


def copy_recipe(name: str | os.PathLike[str], dest: str | os.PathLike[str] | None = None) -> Path:
    """Copy a recipe out, to be edited.

    Args:
        name: what `find_recipe` takes.
        dest: file or existing folder to copy it to; by default the working directory.

    Returns:
        The path of the copy.

    Raises:
        UserError: there is no such recipe, or a file is in the way.
    """
    source = find_recipe(name)
    target = Path(dest) if dest is not None else Path(source.name)
    if target.is_dir():
        target /= source.name
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already; give another name or remove it first")
    with atomic_write(target) as temporary:
        temporary.write_bytes(source.read_bytes())
    return target


def _summary(path: Path) -> str:
    """Return what the first comment of a YAML file says, up to the end of a sentence, without its marks."""
    said: list[str] = []
    with path.open(encoding="utf-8") as file:
        comments = itertools.takewhile(
            lambda line: line.startswith("#"),
            itertools.dropwhile(lambda line: not line.startswith("#"), file),
        )
        for line in comments:
            text = line[1:].strip()
            if said and (not text or line.startswith("#  ")):  # a paragraph ends; a command is indented
                break
            end = re.search(r"[.!?](?=\s)", text) if said else None
            said.append(text[: end.end()] if end else text)
            if end or text.endswith((".", "!", "?")):
                break
    return " ".join(said)
