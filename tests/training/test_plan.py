"""Plans: DeepSpeed's own estimates, published sizes, and the operations of a small model by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from unimm.errors import UserError
from unimm.locate import embedded_model
from unimm.recipes import find_recipe
from unimm.training.model_builder import describe_model
from unimm.training.plan import Here, Machines, plan, state_bytes, this_machine
from unimm.training.recipe import load_recipe, smoke_recipe
from unimm.training.tasks.unified import UnifiedRecipe


def recipe(name: str, *overrides: str) -> UnifiedRecipe:
    found = load_recipe(find_recipe(name), overrides)
    assert isinstance(found, UnifiedRecipe)
    return found


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_memory_is_what_deepspeed_estimates(ranks: int) -> None:
    weights, largest = 1_300_000_123, 209_715_200
    _, two = estimate_zero2_model_states_mem_needs(weights, ranks, 1, cpu_offload=False)
    _, three, _ = estimate_zero3_model_states_mem_needs(
        weights, largest, ranks, 1, cpu_offload=False, cpu_offload_params=False
    )
    assert state_bytes(2, weights, 0, largest, ranks, weight=2) == pytest.approx(two, abs=2)
    assert state_bytes(3, weights, 0, largest, ranks, weight=2) == pytest.approx(three, abs=2)


def test_memory_falls_with_the_stage_and_with_what_is_frozen() -> None:
    sizes = [state_bytes(zero, 1_000_000, 500_000, 10_000, 64) for zero in range(4)]
    assert sizes[0] == 4 * 1_500_000 + 12 * 1_000_000
    assert sizes == sorted(sizes, reverse=True)
    assert state_bytes(3, 0, 1_500_000, 10_000, 64) < sizes[3]


def test_the_published_model_has_its_published_size() -> None:
    planned = plan(recipe("janus-pro-1b"), Machines(gpus=128, memory=80))
    sizes, stages = planned["parameters"], planned["stages"]
    assert sizes["decoder"] == pytest.approx(
        1.65e9, rel=0.01
    )  # DeepSeek-LLM 1.3B, embeddings and head included
    assert sizes["vision"] == pytest.approx(304e6, rel=0.01)  # SigLIP-L/16's blocks
    assert [stage["name"] for stage in stages] == ["stage1", "stage2", "stage3"]
    assert stages[0]["trained"] == sizes["connector"] + sizes["code_embedding"] + sizes["code_head"]
    assert stages[1]["trained"] == stages[0]["trained"] + sizes["decoder"]
    assert stages[2]["trained"] == stages[1]["trained"] + sizes["vision"]
    assert stages[1]["tokens"] == pytest.approx(270_000 * 512 * (128 + 0.7 * 576 + 0.0), rel=0.01)
    assert stages[1]["flops"] > 6 * 1.2e9 * stages[1]["tokens"]
    assert planned["days"] == pytest.approx(sum(stage["days"] for stage in stages))
    twice = plan(recipe("janus-pro-1b"), Machines(gpus=256, memory=80))
    assert twice["days"] == pytest.approx(planned["days"] / 2)


def test_operations_by_hand(tmp_path: Path) -> None:
    made = smoke_recipe(
        find_recipe("janus-pro-1b"), [f"output={tmp_path}", "stages[1].mixture={emojiscenes/text: 1}"]
    )
    assert isinstance(made, UnifiedRecipe)
    stage = plan(made, Machines(gpus=1, memory=1, words=10))["stages"][1]
    model = describe_model(made)
    table = model.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.decoder.parameters()) - 2 * table
    pairs = 10 * 11 // 2
    attention = 3 * 2 * 2 * 2 * 32 * pairs  # forward, twice that backward: 2 products, 2 layers, width 32
    assert stage["tokens"] == 2 * 2 * 10
    assert stage["flops"] == 4 * (6 * 10 * (layers + table) + attention)


def test_sources_count_as_what_they_are_for() -> None:
    """By names that say nothing: a source with images to understand, texts, and images to draw."""
    names = {"understanding": "a", "text": "b", "generation": "c"}
    paths = {"a": {}, "b": {"fields": {"image": ""}}, "c": {"pairs": "text_to_image"}}
    sources = {name: {"path": "nowhere", **more} for name, more in paths.items()}
    given = plan(recipe("janus-pro-1b"), Machines(gpus=128, memory=80))
    overrides = [f"data.sources={json.dumps(sources)}"]
    for number, stage in enumerate(recipe("janus-pro-1b").stages):
        mixture = {names[kind]: share for kind, share in stage.mixture.items()}
        overrides.append(f"stages[{number}].mixture={json.dumps(mixture)}")
    renamed = plan(recipe("janus-pro-1b", *overrides), Machines(gpus=128, memory=80))
    assert renamed["stages"] == given["stages"]


def test_a_plan_needs_data_that_there_is() -> None:
    with pytest.raises(UserError, match=r"stages\[0\]\.mixture\.understanding: no source has this name"):
        plan(recipe("janus-pro-1b", "data.sources={}"), Machines(gpus=8, memory=80))


@pytest.mark.parametrize(("memory", "fits"), [(1e6, True), (0.001, False)])
def test_a_plan_says_whether_it_fits_here(memory: float, fits: bool) -> None:
    here = Here(1, memory, "RAM, no GPU")
    planned = plan(recipe("finetune-folder"), Machines(gpus=8, memory=1e6, here=here))
    stage = planned["stages"][0]
    assert stage["fits"] == ["zero0", "zero1", "zero2", "zero3"] and stage["fits_here"] is fits
    alone = plan(recipe("finetune-folder"), Machines(gpus=1, memory=1e6, here=here))["stages"][0]
    assert stage["here_gib"] == alone["memory_gib"]["zero0"]


def test_this_machine_has_memory() -> None:
    here = this_machine()
    assert here.processes == max(1, torch.cuda.device_count()) and 0.1 < here.memory < 1e5


def test_a_group_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"stages\[0\]\.lr\.vision: no such group of weights"):
        plan(recipe("emu3", "stages[0].lr={vision: 1.0}"), Machines(gpus=8, memory=80))


def test_a_plan_reads_no_weights_of_the_model_that_it_starts_from(tmp_path: Path) -> None:
    for file in embedded_model().glob("*.json"):
        shutil.copy(file, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    here, given = (
        plan(recipe("finetune-folder", f"model.pretrained={source}"), Machines(gpus=8, memory=80))
        for source in (tmp_path, "embedded")
    )
    assert here == given
