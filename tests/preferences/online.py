"""Recipes of models that draw while they learn, on the tiny model, and what their runs leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from unimm.models.inputs import Images
from unimm.models.modeling import UniMMModel
from unimm.preferences.online import DrawingPolicy, OnlineTask
from unimm.training.batches import read_step
from unimm.training.recipe import load_recipe
from unimm.training.task import Batch

PROMPTS = ("a red apple", "blue", "what is this? an apple on a blue background", "on a")
SIZE = 16  # codes of a drawing
LORA = ("lora={r: 2, modules: [q_proj, v_proj, gate_proj, code_head.0]}", "stages[0].lr={lora: 0.01}")


def write_recipe(task: str, tiny: Path, folder: Path) -> Path:
    """A recipe on the tiny model, four prompts in every step."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = {
        "task": task,
        "output": str(folder / "run"),
        "device": "cpu",
        "model": str(tiny),
        "prompts": {"file": str(folder / "prompts.txt")},
        "scorer": "tests.preferences.rewards.low",
        "sampling": {"group": 4},
        "stages": [
            {"name": "online", "steps": 4, "batch": 4, "lr": {"decoder": 1e-3, "code_head": 1e-2}},
        ],
        "checkpoint": {"every": 1, "keep": 9},
        "logging": {"every": 1, "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest(folder: Path, step: int = 4) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def drawn(file: Path, *overrides: str) -> tuple[OnlineTask, DrawingPolicy, Batch, dict[str, float]]:
    """A task, its module, and the first step's drawings."""
    task = load_recipe(file, overrides).build_task()
    assert isinstance(task, OnlineTask)
    torch.manual_seed(0)
    module = task.build()
    assert isinstance(module, DrawingPolicy)
    for name, weight in module.named_parameters():
        if "lora_B" in name:  # they start at 0, where nothing could be distinguished
            torch.nn.init.normal_(weight, std=0.3)
    stage = task.recipe.stages[0]
    step = read_step(task, task.dataset(stage, 0), stage, 0)
    task.before_step(module, 0)
    return task, module, task.draw(module, step.micro_batches, 0)[0], step.totals


def logits_by_hand(task: OnlineTask, model: UniMMModel, number: int, codes: Tensor) -> Tensor:
    """Logits [16, K] of one drawing [h, w], alone in its row."""
    prompt = task.rows[number]
    steps = task.layout.drawing_steps(*codes.shape)
    stream = model.embed(torch.tensor([prompt + steps]), Images(codes=codes[None])).stream
    hidden = model.decode(stream).last_hidden_state[0, len(prompt) - 1 : -1]
    return model.code_logits(hidden)


def log_probs_by_hand(
    task: OnlineTask, model: UniMMModel, number: int, codes: Tensor, temperature: float
) -> Tensor:
    """Log-probability, float64 [16], of each code of one drawing [h, w], alone in its row."""
    logits = logits_by_hand(task, model, number, codes) / temperature
    return logits.log_softmax(-1)[torch.arange(SIZE), codes.flatten()].double()


def assert_same_gradient(module: DrawingPolicy, loss: Tensor, expected: Tensor) -> None:
    """Two losses have the same gradient in every weight that the second reaches."""
    weights = [weight for name, weight in module.policy.named_parameters() if "image_tokenizer" not in name]
    pairs = [torch.autograd.grad(one, weights, allow_unused=True) for one in (loss, expected)]
    reached = [(ours, theirs) for ours, theirs in zip(*pairs, strict=True) if theirs is not None]
    assert len(reached) > 20
    for ours, theirs in reached:
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-6)
