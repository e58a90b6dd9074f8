"""The package's layers: what lies further in knows nothing of what lies further out, and nothing goes in circles.

Also its sizes: no long file, function or signature.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "unimm"
# The layers in `unimm/` and what each may import, with all that those may. Ground: no model and no tokens in it.
GROUND = {
    "errors", "files", "folders", "garbage", "documents", "sections", "console", "sheet", "images", "recipes",
    "outputs", "devices", "videos", "clusters",
}  # fmt: skip
LOADING = {"loading", "locate", "adapters"}
LAYERS: dict[str, tuple[str, ...]] = {
    "ground": (),
    "models": ("ground",),
    "processing": ("models",),
    "families": ("processing",),
    "sampling": ("processing",),
    "pipeline": ("sampling",),
    "loading": ("families", "pipeline"),
    "data": ("loading",),  # `data.encode`: its worker processes load the model themselves
    "server": ("loading",),
    "training": ("data",),
    "evaluation": ("data",),
    "preferences": ("training", "evaluation", "server"),
    "jobs": ("evaluation",),
    "cli": ("preferences", "jobs", "unimm"),
    "unimm": ("loading", "registration"),
    "registration": (),
    "__main__": ("cli",),
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module."""
    files = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = modules()


def layer(module: str) -> str:
    first = module.split(".")[1] if "." in module else "unimm"
    return "ground" if first in GROUND else "loading" if first in LOADING else first


@cache
def below(name: str) -> frozenset[str]:
    """A layer and all that it may import."""
    return frozenset({name}).union(*(below(inner) for inner in LAYERS[name]))


def imports(module: str, typing: bool = True) -> set[str]:
    """The modules of ours that one imports, wherever in it; `typing`: those for type checkers alone too."""
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text(encoding="utf-8")), typing):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name.name}" for name in node.names]
            names = [name if name in MODULES else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        found |= {name for name in names if name in MODULES and name != module}
    return found


def statements(node: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All nodes below one, without the blocks `if TYPE_CHECKING:` unless they are asked for."""
    for child in ast.iter_child_nodes(node):
        if typing or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child, typing)


def test_every_module_has_a_layer() -> None:
    assert {layer(module) for module in MODULES} == set(LAYERS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_inwards(module: str) -> None:
    climbing = {name for name in imports(module) if layer(name) not in below(layer(module))}
    assert not climbing


def test_no_modules_import_each_other() -> None:
    """Not in a circle of any length either; imports for type checkers alone do not count."""
    sorter = TopologicalSorter({module: imports(module, typing=False) for module in MODULES})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# Commands are called as what they run, and the files of families answer the same calls by the same names.
NAMED_ALIKE = ("unimm.cli", "unimm.families")
DEFINED_TWICE = {"main"}  # of programs of their own: `python -m`


def definitions(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements of a module define, those in its `if` and `try` blocks too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name)) if target else ()
        if isinstance(node, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                yield from definitions(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from definitions(handler.body)


def test_public_names_are_defined_in_one_module() -> None:
    places: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        alike = next((package for package in NAMED_ALIKE if module.startswith(f"{package}.")), module)
        for name in definitions(ast.parse(path.read_text(encoding="utf-8")).body):
            if not name.startswith("_") and alike != "unimm.cli":
                places.setdefault(name, set()).add(alike)
    twice = {name: sorted(modules) for name, modules in places.items() if len(modules) > 1}
    assert twice.keys() - DEFINED_TWICE == set(), twice


# --- sizes ----------------------------------------------------------------------------------------------------

MOST_LINES, MOST_IN_A_FUNCTION, MOST_ARGUMENTS = 500, 60, 8
MEASURED = [
    path
    for folder in ("unimm", "tests", "benchmarks", "tokenizers", "training", "sampling")
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, in classes and in other functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The arguments with a name of their own, the object or class that a method is of left out."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_files_and_functions_are_short_and_signatures_too() -> None:
    assert len(MEASURED) > 300
    long = [str(path) for path in MEASURED if len(path.read_text("utf-8").splitlines()) > MOST_LINES]
    for path in MEASURED:
        for function in functions(path):
            assert function.end_lineno is not None
            lines, count = function.end_lineno - function.lineno + 1, len(arguments(function))
            if lines > MOST_IN_A_FUNCTION or count > MOST_ARGUMENTS:
                long.append(f"{path}:{function.lineno} {function.name}: {lines} lines, {count} arguments")
    assert not long, "\n".join(long)
