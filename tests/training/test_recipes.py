"""Every shipped training recipe, made tiny, trains all its stages and exports what loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import unimm
from unimm.recipes import list_recipes
from unimm.training.recipe import load_recipe, smoke_recipe
from unimm.training.trainer import train

OTHERS = ("sampling/", "training/align")  # of other programs than the trainer
RECIPES = {info.name: info.path for info in list_recipes() if not info.name.startswith(OTHERS)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_when_made_tiny(name: str, tmp_path: Path) -> None:
    whole = load_recipe(RECIPES[name])
    recipe = smoke_recipe(RECIPES[name], [f"output={tmp_path}/run"])
    assert recipe.output == f"{tmp_path}/run-smoke"
    assert [stage.lr for stage in recipe.stages] == [stage.lr for stage in whole.stages]
    folder = train(recipe, quiet=True)
    assert folder == tmp_path / "run-smoke" / "export"
    if whole.task in ("unified", "dpo", "grpo", "online_dpo"):
        um = unimm.load(folder, "cpu")
        if um.image_tokenizer is None:  # a system that answers
            assert isinstance(um.caption(Image.new("RGB", (70, 50), "red"), max_new_tokens=3), str)
        else:
            assert um.draw("a star", seed=0)[0].size == (64, 64)
