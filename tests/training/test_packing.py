"""Packing: budgets are kept, no sample sees its neighbour, and the steps are those of a row for each sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.tasks.test_unified import recipe_file, task  # noqa: F401  (fixtures)
from unimm.errors import UserError
from unimm.models.attention import block_mask, dense_mask
from unimm.models.modeling import UniMMModel
from unimm.training.packing import best_fit
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedTask
from unimm.training.trainer import train


def test_best_fit_by_hand() -> None:
    # 7 opens a row, 5 another that 4 fits too, and 3 goes where there is the least room for it: beside 7
    assert best_fit([3, 7, 4, 5, 1], [0] * 5, 10) == [[0, 1], [2, 3, 4]]
    assert best_fit([3, 7, 4, 5, 1], [1] * 5, 10, 2) == [[0, 1], [2, 3], [4]]
    assert best_fit([], [], 10) == []


def test_best_fit_keeps_its_budgets_and_leaves_little_room() -> None:
    random = np.random.default_rng(0)
    lengths, images = random.integers(20, 600, 500).tolist(), random.integers(0, 3, 500).tolist()
    rows = best_fit(lengths, images, 2048, 8)
    assert sorted(index for row in rows for index in row) == [*range(500)]
    assert all(sum(lengths[i] for i in row) <= 2048 and sum(images[i] for i in row) <= 8 for row in rows)
    assert len(rows) <= 1.03 * sum(lengths) / 2048 + 1


ROW = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1]]), torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 0]])


def test_mask_by_hand() -> None:
    """A prefix with two branches, then a sample of its own, then padding."""
    assert dense_mask(*ROW)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_block_mask_says_the_same() -> None:
    from torch.nn.attention.flex_attention import create_mask

    flexible = create_mask(block_mask(*ROW).mask_mod, 1, 1, 9, 9, device="cpu")
    assert torch.equal(flexible.bool(), dense_mask(*ROW))


def samples(task: UnifiedTask, first: int) -> list[Any]:  # noqa: F811
    """Text, an image to understand and one to draw, all others for another `first`."""
    kinds = ("text", "understanding", "generation")
    stage = task.recipe.stages[0].model_copy(update={"options": {"prompt_dropout": 0.0}})
    return [
        task.dataset(stage.model_copy(update={"mixture": {f"emojiscenes/{kind}": 1}}), seed=0)[first]
        for kind in kinds
    ]


def test_changing_one_sample_changes_no_logit_of_another(task: UnifiedTask) -> None:  # noqa: F811
    torch.manual_seed(0)
    model = task.build().eval()
    assert isinstance(model, UniMMModel)
    before = samples(task, 3)

    def hidden(row: list[Any]) -> list[Tensor]:
        batch = task.collate_rows([row])
        with torch.no_grad():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
        return list(logits.split([len(sample["ids"]) for sample in row]))

    old = hidden(before)
    for changed in range(3):
        other = list(before)
        random = np.random.default_rng(changed)
        other[changed] = {**before[changed], "ids": before[changed]["ids"].copy()}
        words = ~np.isin(other[changed]["ids"], task.processor.tokenizer.all_special_ids)
        other[changed]["ids"][words] = random.integers(20, 200, words.sum())
        new = hidden(other)
        for number in range(3):
            assert torch.equal(new[number], old[number]) == (number != changed)
    for number, sample in enumerate(before):  # and each is as if it were alone
        torch.testing.assert_close(old[number], hidden([sample])[0], rtol=1e-4, atol=1e-5)


def test_packed_steps_are_those_of_padded_rows(recipe_file: Path, tmp_path: Path) -> None:  # noqa: F811
    pack = "{length: 300, images: 2, rows: 1}"
    packed = [f"stages[{stage}].pack={pack}" for stage in range(2)]
    train(load_recipe(recipe_file, [f"output={tmp_path}/padded"]), quiet=True)
    train(load_recipe(recipe_file, [f"output={tmp_path}/packed", *packed]), quiet=True)
    checkpointing = [*packed, "stages[1].gradient_checkpointing=true"]
    train(load_recipe(recipe_file, [f"output={tmp_path}/again", *checkpointing]), quiet=True)
    runs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("padded", "packed", "again")
    ]
    for padded, *others in zip(*runs, strict=True):
        for other in others:
            assert other["loss"] == pytest.approx(padded["loss"], abs=1e-5)
            assert other["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


def test_what_does_not_fit_is_named(recipe_file: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"stages\[0\]\.pack: rows take the place of micro_batch"):
        load_recipe(recipe_file, ["stages[0].pack={length: 20}", "stages[0].micro_batch=2"])
    override = [f"output={tmp_path}", "stages[0].pack={length: 20}"]
    with pytest.raises(
        UserError, match=r"stages\.one\.pack\.length: a sample has \d+ tokens, a row holds 20"
    ):
        train(load_recipe(recipe_file, override), quiet=True)
