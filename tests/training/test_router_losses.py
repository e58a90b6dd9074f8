"""Losses of a decoder's routers in training: weighed as a recipe says, over all positions of a step, however split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import unimm
from unimm.errors import UserError
from unimm.models.configuration import UniMMConfig
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.processing.processor import UniMMProcessor
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedTask
from unimm.training.trainer import train

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32}
ARIA = {"model_type": "aria_text", "intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2, **SIZES}
OLMOE = {
    "model_type": "olmoe", "intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "output_router_logits": True, "router_aux_loss_coef": 0.02, **SIZES,
}  # fmt: skip


def recipe_file(folder: Path, tiny: Path, decoder: dict[str, Any], loss: dict[str, float]) -> Path:
    """A recipe on a model like the tiny one, with another decoder."""
    um = unimm.load(tiny)
    fields = um.model.config.to_dict()
    kept = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    fields["decoder"] = {**decoder, **{name: fields["decoder"][name] for name in kept}}
    torch.manual_seed(0)
    config = UniMMConfig(**{name: value for name, value in fields.items() if name != "model_type"})
    UniMM(UniMMModel(config), UniMMProcessor(config, um.processor.tokenizer)).save(folder / "model")
    recipe = {
        "task": "unified",
        "output": str(folder / "run"),
        "model": {"pretrained": str(folder / "model")},
        "data": {"emojiscenes": {"scenes": 8, "lattice": 4}},
        "loss": loss,
        "stages": [
            {"name": "one", "steps": 2, "batch": 4, "lr": {"decoder": 1e-3},
             "mixture": {"emojiscenes/understanding": 1}},
        ],
        "logging": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def task_of(path: Path) -> UnifiedTask:
    task = load_recipe(path).build_task()
    assert isinstance(task, UnifiedTask)
    return task


def test_the_log_has_them_and_the_loss_is_their_sum(tiny: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file(tmp_path, tiny, ARIA, {"balance": 0.1, "router_z": 0.01})), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["balance_loss"] >= 1.9 and line["router_z_loss"] > 0  # about 2, the experts of a position
        whole = (
            line["text_loss"] + line["code_loss"] + 0.1 * line["balance_loss"] + 0.01 * line["router_z_loss"]
        )
        assert line["loss"] == pytest.approx(whole, rel=1e-5)


def test_a_step_weighs_positions_alike_however_it_is_split(tiny: Path, tmp_path: Path) -> None:
    task = task_of(recipe_file(tmp_path, tiny, ARIA, {"balance": 1.0, "router_z": 1.0}))
    model = task.build().eval()
    source = task.dataset(task.recipe.stages[0], 0)
    samples = [source[i] for i in range(4)]
    parts = [task.collate(samples[:1]), task.collate(samples[1:])]
    totals = {kind: sum(task.targets(part)[kind] for part in parts) for kind in task.targets(parts[0])}
    assert totals["positions"] == sum(len(sample["ids"]) for sample in samples)
    with torch.no_grad():
        split = [task.loss(model, part, 0, totals)[1] for part in parts]
        whole = task.loss(model, task.collate(samples), 0, totals)[1]
    found = sum(float(one["router_z_loss"]) for one in split)
    assert found == pytest.approx(float(whole["router_z_loss"]), rel=1e-5)


def test_without_a_word_the_decoders_config_decides(tiny: Path, tmp_path: Path) -> None:
    task = task_of(recipe_file(tmp_path, tiny, OLMOE, {}))
    assert task.routers == (0.02, 0.0)
    model = task.build().train()
    batch = task.collate([task.dataset(task.recipe.stages[0], 0)[0]])
    totals = task.targets(batch)
    loss, metrics = task.loss(model, batch, 0, totals)
    plain = float(metrics["text_loss"]) + float(metrics["code_loss"])
    assert loss.item() == pytest.approx(plain + 0.02 * float(metrics["balance_loss"]), rel=1e-5)
    loss.backward()
    assert isinstance(model, UniMMModel)
    assert model.decoder.get_decoder().layers[0].mlp.gate.weight.grad.abs().max() > 0
    (tmp_path / "other").mkdir()
    assert task_of(recipe_file(tmp_path / "other", tiny, OLMOE, {"balance": 0.0})).routers == (0.0, 0.0)


@pytest.mark.parametrize("key", ["balance", "router_z"])
def test_a_decoder_without_experts_is_one_line(tiny: Path, tmp_path: Path, key: str) -> None:
    llama = {"model_type": "llama", "intermediate_size": 64, **SIZES}
    path = recipe_file(tmp_path, tiny, llama, {key: 0.1})
    with pytest.raises(UserError) as caught:
        load_recipe(path).build_task()
    line = f"{path}: loss.{key}: a decoder of the kind llama has no experts; remove it"
    assert str(caught.value) == line
