"""Models whose images are a memory take the same steps on two processes, whether theirs has an image or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import unimm
from tests.two_processes import on_two_processes
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe, smoke_recipe
from unimm.training.trainer import train

ROOT = Path(__file__).parents[2]
SYSTEMS = {"nvlm-h-72b": "both", "llama-vision-draws": "cross"}
SHARDED = {
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


def open_gates(folder: Path) -> Path:
    """A model of a smoke run, whose blocks change something."""
    um = unimm.load(folder, "cpu", "float32")
    with torch.no_grad():
        for name, parameter in um.model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.8)
    um.save(folder.parent / "open")
    return folder.parent / "open"


def recipe_of(folder: Path, model: Path, name: str, engine: dict[str, Any] | None) -> Path:
    """Four steps of two samples, of which half or so have an image."""
    recipe = {
        "task": "unified",
        "output": str(folder / name),
        "model": {"pretrained": str(model)},
        "data": {"emojiscenes": {"scenes": 64}},
        "stages": [
            {
                "name": "one",
                "steps": 4,
                "batch": 2,
                "micro_batch": 1,
                "lr": {"fusion": 1e-3, "connector": 1e-3, "decoder": 1e-3},
                "mixture": {"emojiscenes/understanding": 1, "emojiscenes/text": 1},
            }
        ],
        "logging": {"every": 1, "tensorboard": False},
        "device": "cpu",
        **({"deepspeed": engine} if engine else {}),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """In one launch: processes that waited for each other would hang."""
    sharded: dict[str, Path] = {}
    for system, kind in SYSTEMS.items():
        folder = tmp_path / system
        folder.mkdir()
        smoke = smoke_recipe(find_recipe(system), [f"output={folder / 'smoke'}"])
        model = open_gates(train(smoke, quiet=True))
        assert unimm.load(model).model.config.fusion["kind"] == kind
        alone = load_recipe(recipe_of(folder, model, "one", None))
        task, stage = alone.build_task(), alone.stages[0]
        source = task.dataset(stage, 0)
        shown = ["images" in source[i] for i in range(stage.steps * stage.batch)]
        assert any(one != other for one, other in zip(shown[::2], shown[1::2], strict=True))
        train(alone, quiet=True)
        for name in SHARDED if system == "nvlm-h-72b" else ("zero3",):
            sharded[f"{system}/{name}"] = recipe_of(folder, model, name, SHARDED[name])
    status, said = on_two_processes(Path(__file__).with_name("run_recipes.py"), *sharded.values())
    assert status == 0, said[-3000:]
    for run in sharded:
        assert_same_run(tmp_path / run, (tmp_path / run).parent / "one")


def assert_same_run(run: Path, one: Path) -> None:
    wanted, found = steps_of(one), steps_of(run)
    assert len(found) == len(wanted) == 4
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    whole = load_file(one / "export" / "model.safetensors")
    state = load_file(run / "export" / "model.safetensors")
    assert state.keys() == whole.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-3, atol=1e-3)
