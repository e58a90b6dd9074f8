"""What the documents name is there: links, headings, files, functions, commands, their options, recipes and keys."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tests.test_layers import LAYERS
from unimm.cli.commands import listing
from unimm.cli.main import CLI
from unimm.evaluation.recipe import load_evaluation
from unimm.preferences.align import load_alignment
from unimm.recipes import FOLDERS, find_recipe
from unimm.training.recipe import load_recipe

COMMANDS = dict(listing(CLI))
ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAPS = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "architecture.md",
]  # where code is named by file and function
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"([\w./-]+\.(?:py|yaml|md|svg|toml))(?:: ([\w., ]+))?")  # with names of what it defines


def texts(document: Path) -> str:
    """A document without its blocks of code."""
    return BLOCK.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", texts(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for _, target in LINK.findall(texts(document)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def defined(tree: ast.Module) -> set[str]:
    """What a module defines: functions, classes, constants, and methods and attributes as `Class.name`."""
    names = set()
    for node in tree.body:
        names |= set(_names(node))
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in _names(inner)}
    return names


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def named_code(document: Path) -> Iterator[tuple[str, Path | None, list[str]]]:
    """Of every file that a document names: how, where it is (None: nowhere), and the names it is said to define."""
    text = document.read_text(encoding="utf-8")
    targets = {label.strip("`"): document.parent / target for label, target in LINK.findall(text)}
    for code in CODE.findall(text):
        if found := FILE.fullmatch(code):
            places = [targets[code]] if code in targets else [ROOT / found[1], ROOT / "unimm" / found[1]]
            path = next((place for place in places if place.is_file()), None)
            names = [name.strip() for name in (found[2] or "").split(",") if name.strip()]
            yield code, path if path and path.as_posix().endswith(found[1].split("/")[-1]) else None, names


def test_the_drawing_of_the_layers_names_them_all() -> None:
    drawing = (ROOT / "docs" / "images" / "layers.svg").read_text(encoding="utf-8")
    layers = set(LAYERS) - {"unimm", "registration", "__main__"}  # the package itself
    assert set(re.findall(r'class="n">(\w+)<', drawing)) == layers


@pytest.mark.parametrize("document", MAPS, ids=lambda path: path.name)
def test_files_and_functions_exist(document: Path) -> None:
    found = list(named_code(document))
    assert found
    wrong = [code for code, path, _ in found if path is None]
    for code, path, names in found:
        if path is not None and names:
            missing = set(names) - defined(ast.parse(path.read_text(encoding="utf-8")))
            wrong += [code] if missing else []
    assert not wrong


def commands(document: Path) -> Iterator[list[str]]:
    """The commands in a document's shell blocks, word by word; one may go over several lines."""
    for language, block in BLOCK.findall(document.read_text(encoding="utf-8")):
        if language != "bash":
            continue
        text = ""
        for line in block.replace("\\\n", " ").splitlines():
            text += line + "\n"
            try:
                words = shlex.split(text, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            text = ""
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words
        assert not text, f"{document}: a quotation has no end: {text}"


WORDS = [(document.name, words) for document in DOCUMENTS for words in commands(document)]


def of(*first: str) -> list[tuple[str, list[str]]]:
    """The commands that begin with some words."""
    return [(name, words) for name, words in WORDS if tuple(words[: len(first)]) == first]


def check_recipe(name: str, overrides: Sequence[str]) -> None:
    """Read a shipped recipe with some keys set; one that stands for the reader's own is not read."""
    if name.partition("/")[0] not in FOLDERS:
        return
    path = find_recipe(name)
    task = yaml.safe_load(path.read_text(encoding="utf-8"))["task"]
    read = {"evaluation": load_evaluation, "alignment": load_alignment}.get(task, load_recipe)
    read(path, list(overrides))


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Which command some words are, and its arguments and options."""
    for count in (3, 2):
        name = " ".join(words[:count])
        if name in COMMANDS:
            root = click.Context(CLI, **CLI.context_settings)
            context = COMMANDS[name].make_context(name, list(words[count:]), parent=root)
            return name, context.params
    raise AssertionError(f"there is no command {words[1]}")


@pytest.mark.parametrize(
    ("document", "words"),
    of("unimm"),
    ids=lambda value: " ".join(value)[:70] if isinstance(value, list) else "",
)
def test_commands_take_these_arguments(document: str, words: list[str]) -> None:
    name, options = parsed(words)  # raises where they are wrong
    if "recipe" in options:
        check_recipe(options["recipe"], options["overrides"])
    if name == "unimm recipes copy":
        assert find_recipe(options["name"])


def test_recipes_under_launchers_take_these_keys() -> None:
    launched = [words[words.index("unimm.training.trainer") + 1 :] for _, words in of("torchrun")]
    assert len(launched) > 2
    for name, *overrides in launched:
        check_recipe(name, overrides)


def test_programs_have_these_options() -> None:
    programs = of("python")
    assert len(programs) > 5
    for document, (_, program, *arguments) in programs:
        if program == "-m":  # a runner, which hands what is not its own to another program
            program, arguments = arguments[0].replace(".", "/") + ".py", arguments[1:2]
        source = (ROOT / program).read_text(encoding="utf-8")
        unknown = [one for one in arguments if one.startswith("--") and f'"{one}"' not in source]
        assert not unknown, f"{document}: {program}"


def test_inline_programs_and_test_files_exist() -> None:
    for document in DOCUMENTS:
        text = " ".join(document.read_text(encoding="utf-8").split())
        named = re.findall(r"(?:python |bash )(\w+/[\w./]+\.py)", text)
        named += [one for many in re.findall(r'make test ARGS="?([^"`]+)', text) for one in many.split()]
        missing = [one for one in named if not one.startswith("-") and not (ROOT / one.rstrip('")')).exists()]
        assert not missing, document
