"""LoRA: only adapters train, and saved, loaded or merged they say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import unimm
from unimm.errors import UserError
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that adapts the tiny model."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = {
        "task": "unified",
        "output": str(folder / "run"),
        "model": {"pretrained": str(tiny)},
        "lora": {"r": 2, "alpha": 8, "dropout": 0.1, "modules": ["q_proj", "v_proj", "code_head.0"]},
        "data": {"emojiscenes": {"scenes": 8, "lattice": 4}},
        "stages": [
            {"name": "adapt", "steps": 3, "batch": 2, "lr": {"lora": 0.05},
             "mixture": {"emojiscenes/text": 1, "emojiscenes/generation": 1}},
        ],
        "logging": {"every": 1, "samples_every": 0, "tensorboard": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(folder / "recipe.yaml"), quiet=True)
    return folder


def logits(um: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = um.model(input_ids=torch.arange(20, 32)[None]).logits
    return found


def test_the_adapter_alone_has_trained(run: Path, tiny: Path) -> None:
    state = load_file(run / "run" / "checkpoints" / "step-00000003" / "model.safetensors")
    start = load_file(tiny / "model.safetensors")
    adapters = {name for name in state if "lora_" in name}
    assert len(adapters) == 2 * (2 * 2 + 1)
    for name, tensor in state.items():
        if name not in adapters:
            assert torch.equal(tensor, start[name.replace(".base_layer", "")]), name
    assert all(state[name].abs().max() > 0 for name in adapters)  # B starts at 0


def test_adapter_and_merged_export_say_the_same(run: Path, tiny: Path) -> None:
    export = run / "run" / "export"
    merged, adapted = unimm.load(export), unimm.load(tiny, adapter=export / "adapter")
    assert not torch.equal(logits(merged), logits(unimm.load(tiny)))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)
    assert merged.model.state_dict().keys() == unimm.load(tiny).model.state_dict().keys()


def test_peft_reads_the_adapter(run: Path, tiny: Path) -> None:
    from peft import PeftModel

    export = run / "run" / "export"
    assert json.loads((export / "adapter" / "adapter_config.json").read_text())["r"] == 2
    um = unimm.load(tiny)
    um.model = PeftModel.from_pretrained(um.model, export / "adapter").eval()
    torch.testing.assert_close(logits(um), logits(unimm.load(export)), rtol=1e-5, atol=1e-5)


def test_mistakes_are_named(run: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.modules: the model has no module named k_prj"):
        chosen = [f"output={tmp_path}", "lora.modules=[k_prj]"]
        train(load_recipe(run / "recipe.yaml", chosen), quiet=True)
    with pytest.raises(UserError, match="holds no adapter"):
        unimm.load(tiny, adapter=tmp_path)
