"""The recipe folders stay folders, hide no library, and every recipe in them parses and builds."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unimm.evaluation.recipe import load_evaluation
from unimm.locate import EMBEDDED
from unimm.preferences.align import load_alignment
from unimm.recipes import FOLDERS, list_recipes
from unimm.training.model_builder import describe_model, model_groups
from unimm.training.recipe import TASKS, load_recipe
from unimm.training.tasks.unified import UnifiedRecipe
from unimm.training.tokenizer.losses import LPIPS
from unimm.training.tokenizer.task import TokenizerRecipe

ROOT = Path(__file__).parents[1]
TASK_OF = {info.path: yaml.safe_load(info.path.read_text())["task"] for info in list_recipes()}
FIRST = ("tokenizer", "siglip")  # tasks that start from nothing; the others start from what these export


def paths_of(*tasks: str) -> list[Path]:
    """The shipped recipes of some tasks."""
    return [path for path, task in TASK_OF.items() if task in tasks]


def test_tokenizers_is_the_hugging_face_library_even_at_the_root() -> None:
    code = "import tokenizers; print(tokenizers.__file__); tokenizers.Tokenizer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in Path(done.stdout.strip()).parts


@pytest.mark.parametrize("folder", FOLDERS)
def test_recipe_folders_are_no_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_programs_in_recipe_folders_are_thin(folder: str) -> None:
    for program in (ROOT / folder).rglob("*.py"):
        assert len(program.read_text().splitlines()) <= 40, f"{program}: move the work into unimm/"


def test_every_task_has_a_recipe_and_every_recipe_a_task() -> None:
    ours = {name for name, where in TASKS.items() if where.startswith("unimm.")}  # other tests add theirs
    assert set(TASK_OF.values()) == {*ours, "evaluation", "alignment", "ask", "caption", "draw"}


def is_published(path: Path) -> bool:
    """Whether a recipe is of a published model, which starts from files that are elsewhere."""
    recipe = load_recipe(path)
    if isinstance(recipe, TokenizerRecipe):
        return (recipe.loss.perceptual.network or "").startswith(LPIPS)
    return isinstance(recipe, UnifiedRecipe) and (bool(recipe.model.weights) or recipe.system is not None)


OUR_FIRST = [path for path in paths_of(*FIRST) if not is_published(path)]


def unified_in_order() -> list[Path]:
    """The unified recipes on our own parts, each after the one whose export it starts from."""
    before: dict[str, Path] = {}
    waiting = {path: load_recipe(path) for path in paths_of("unified") if not is_published(path)}
    while waiting:
        for path, recipe in list(waiting.items()):
            assert isinstance(recipe, UnifiedRecipe)
            if (recipe.model.initialize or recipe.model.pretrained) in (None, EMBEDDED, *before):
                before[f"{waiting.pop(path).output}/export"] = path
                break
        else:
            pytest.fail(f"{list(waiting)}: start from exports that no recipe makes")
    return list(before.values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the exports, untrained, of every recipe that others start from."""
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the recipes write to and read from folders relative to it
        for path in (*OUR_FIRST, *unified_in_order()):
            recipe = load_recipe(path)
            task = recipe.build_task()
            task.export(task.build(), Path(recipe.output) / "export")
    return folder


@pytest.mark.parametrize("path", OUR_FIRST, ids=lambda path: path.stem)
def test_first_recipe_builds_and_exports(exported: Path, path: Path) -> None:
    assert list((exported / load_recipe(path).output / "export").iterdir())


LATER = paths_of(*set(TASKS) - set(FIRST))


@pytest.mark.parametrize("path", filter(is_published, LATER), ids=lambda path: path.stem)
def test_published_recipe_trains_parts_of_its_model(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, UnifiedRecipe)
    groups = model_groups(describe_model(recipe), recipe.lora is not None)
    assert all(set(stage.lr) <= set(groups) for stage in recipe.stages)


@pytest.mark.parametrize("path", itertools.filterfalse(is_published, LATER), ids=lambda path: path.stem)
def test_later_recipe_builds_on_the_exports(
    exported: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported)
    recipe = load_recipe(path)
    task = recipe.build_task()
    groups = task.groups(task.build())
    assert all(set(stage.lr) <= set(groups) for stage in recipe.stages)


@pytest.mark.parametrize("path", paths_of("evaluation"), ids=lambda path: path.stem)
def test_evaluation_recipe_parses(path: Path) -> None:
    assert load_evaluation(path).output


@pytest.mark.parametrize("path", paths_of("alignment"), ids=lambda path: path.stem)
def test_alignment_recipe_parses_and_so_does_what_it_trains_by(path: Path) -> None:
    assert load_alignment(path).output
