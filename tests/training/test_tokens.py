"""Tokens that were never trained get values of their own, once, the same in every run; the others stay."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unimm
from tests.data import forms
from tests.training.test_records import recipe_file
from unimm.errors import UserError, UserNote
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedRecipe
from unimm.training.tokens import COMPARED_ROWS, untrained_rows
from unimm.training.trainer import train

TABLE, HEAD = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"
FRESH = range(100, 140)  # tokens of the models below that were never trained; their pad token was not either


def table(rows: int, alike: list[int], width: int = 32, noise: float = 0.01) -> Tensor:
    """Random rows, some of which are one vector but for a little noise."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    for row in alike:
        weight[row] = 3 + noise * torch.randn(width, generator=generator)
    return weight


@pytest.mark.parametrize("alike", [range(20, 60), range(0, 200, 3), [*range(10), *range(190, 200)]])
def test_rows_that_are_practically_one_are_found(alike: range | list[int]) -> None:
    assert untrained_rows(table(200, list(alike))) == list(alike)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_what_is_practically_one_depends_on_the_rows_length(scale: float) -> None:
    assert untrained_rows(table(100, list(range(30))) * scale) == list(range(30))


def test_trained_rows_are_left_out() -> None:
    assert untrained_rows(table(300, [])) == []
    assert untrained_rows(table(300, list(range(5)))) == []  # a few near synonyms
    assert untrained_rows(table(300, list(range(100)), noise=1.0)) == []


def test_rows_of_zeros_are_found() -> None:
    weight = table(100, [])
    weight[40:70] = 0
    assert untrained_rows(weight) == list(range(40, 70))


def test_a_large_vocabulary_is_compared_with_a_sample() -> None:
    alike = list(range(COMPARED_ROWS, 2 * COMPARED_ROWS))
    assert untrained_rows(table(3 * COMPARED_ROWS, alike, width=16)) == alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_number_formats(dtype: torch.dtype) -> None:
    assert untrained_rows(table(100, list(range(30))).to(dtype)) == list(range(30))


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model with tokens that were never trained, its head of its own or tied."""
    folder = tmp_path_factory.mktemp("untrained")
    found = {}
    for name in ("untied", "tied"):
        found[name] = folder / name
        shutil.copytree(tiny, found[name])
        weights = load_file(tiny / "model.safetensors")
        special = unimm.load(tiny).processor.pad
        rows = [special, *FRESH]
        for key in (TABLE, HEAD):
            weights[key][rows] = table(len(rows), list(range(len(rows)))).to(weights[key].dtype)
        if name == "tied":
            del weights[HEAD]
            config = json.loads((tiny / "config.json").read_text())
            config["decoder"]["tie_word_embeddings"] = True
            (found[name] / "config.json").write_text(json.dumps(config))
        save_file(weights, found[name] / "model.safetensors", metadata={"format": "pt"})
    return found


def finetune(folder: Path, model: Path, **changes: object) -> Path:
    """A recipe of four steps that renews tokens."""
    sources = {"captions": {"path": str(forms.image_folder(folder / "images", 6))}}
    return recipe_file(
        folder, model, sources, model={"pretrained": str(model), "renew_tokens": True}, **changes
    )


def built(path: Path, *overrides: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that a run starts from, and what it said."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        recipe = load_recipe(path, overrides)
        assert isinstance(recipe, UnifiedRecipe)
        model = recipe.build_task().build()
    return model.state_dict(), [str(note.message) for note in notes if note.category is UserNote]


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_run_starts_with_rows_of_their_own(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = finetune(tmp_path, models[name])
    start, notes = built(path)
    before = unimm.load(models[name]).model.state_dict()
    changed = [key for key in before if not torch.equal(before[key], start[key])]
    assert changed == [TABLE, HEAD]
    for key in changed:
        rows = start[key][FRESH.start : FRESH.stop]
        assert torch.pdist(rows).min() > 0.5 * rows.norm(dim=1).mean()
        others = torch.ones(len(start[key]), dtype=torch.bool)
        others[list(FRESH)] = False
        assert torch.equal(start[key][others], before[key][others])  # the pad token's too
        trained = before[key][others][1:].norm(dim=1).median()
        torch.testing.assert_close(rows.norm(dim=1), trained.expand(len(rows)), rtol=0.05, atol=0)
    assert notes == [
        f"model.renew_tokens: 40 of {len(before[TABLE])} tokens were never trained; they start anew"
    ]


def test_the_seed_decides(models: dict[str, Path], tmp_path: Path) -> None:
    path = finetune(tmp_path, models["tied"])
    one, two, other = (built(path, f"seed={seed}")[0][TABLE] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_without_the_key_nothing_is_renewed(models: dict[str, Path], tmp_path: Path) -> None:
    start, notes = built(finetune(tmp_path, models["tied"]), "model.renew_tokens=false")
    assert notes == [] and torch.equal(start[TABLE], unimm.load(models["tied"]).model.state_dict()[TABLE])


def test_a_run_that_goes_on_renews_nothing_again(models: dict[str, Path], tmp_path: Path) -> None:
    path = finetune(tmp_path, models["tied"])
    whole = train(load_recipe(path, [f"output={tmp_path}/whole"]), quiet=True)
    train(load_recipe(path, [f"output={tmp_path}/cut", "stages[0].steps=2"]), quiet=True)
    again = train(load_recipe(path, [f"output={tmp_path}/cut"]), quiet=True)
    ours, theirs = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


LORA = {"lora": {"r": 2, "modules": ["q_proj"]}, "stage": {"lr": {"lora": 0.05}}}


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_an_adapter_holds_the_rows_it_renewed(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    start, _ = built(finetune(tmp_path / "start", models[name]))
    export = train(load_recipe(finetune(tmp_path / "run", models[name], **LORA)), quiet=True)
    merged = unimm.load(export)
    after, before = merged.model.state_dict(), unimm.load(models[name]).model.state_dict()
    assert after.keys() == before.keys()
    assert torch.equal(after[TABLE], after[HEAD]) == (name == "tied")
    for key in (TABLE, HEAD):
        rows = torch.zeros(len(after[key]), dtype=torch.bool)
        rows[list(FRESH)] = True
        assert torch.equal(after[key][~rows], before[key][~rows])
        assert not torch.isclose(after[key][rows], before[key][rows]).all(1).any()
    assert not torch.equal(after[HEAD][list(FRESH)], start[HEAD][list(FRESH)])  # they train too
    ids = torch.arange(90, 130)[None]
    adapted = unimm.load(models[name], adapter=export / "adapter").model
    plain = PeftModel.from_pretrained(unimm.load(models[name]).model, export / "adapter").eval()
    with torch.no_grad():
        said = [model(input_ids=ids).logits for model in (merged.model, adapted, plain)]
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said[2], said[0], rtol=1e-4, atol=1e-4)


def test_adapters_and_sharded_weights_do_not_go_together(models: dict[str, Path], tmp_path: Path) -> None:
    path = finetune(tmp_path, models["tied"], **LORA, deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"model\.renew_tokens: does not go with lora and ZeRO stage 3"):
        built(path)
