"""Weights that are not whole are refused in a line by every way that reads them; none starts at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.image_tokenizers import load_image_tokenizer
from unimm.loading import describe

Weights = dict[str, Tensor]
Damage = Callable[[Weights, str], Weights]  # weights and the name of one, damaged


def without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


def emptied(weights: Weights, _: str) -> Weights:
    return {}


def misspelt(weights: Weights, name: str) -> Weights:
    return without(weights, name) | {f"{name}x": weights[name]}


def surplus(weights: Weights, _: str) -> Weights:
    return weights | {"decoder.extra.weight": torch.ones(3)}


def misshapen(weights: Weights, name: str) -> Weights:
    return weights | {name: weights[name][:-1].contiguous()}


def integers(weights: Weights, name: str) -> Weights:
    return weights | {name: weights[name].to(torch.int32)}


def not_a_number(weights: Weights, name: str) -> Weights:
    damaged = weights[name].clone()
    damaged.view(-1)[-1] = float("nan")
    return weights | {name: damaged}


def infinite(weights: Weights, name: str) -> Weights:
    damaged = weights[name].clone()
    damaged.view(-1)[0] = float("-inf")
    return weights | {name: damaged}


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (without, "missing"),
    "empty": (emptied, ""),
    "misspelt": (misspelt, "missing"),
    "surplus": (surplus, "decoder.extra.weight [3] not known"),
    "misshapen": (misshapen, "of the wrong shape"),
    "integers": (integers, ", expected floating point"),
    "nan": (not_a_number, "holds NaN or infinite values"),
    "infinite": (infinite, "holds NaN or infinite values"),
}
# a tensor of each layout: of the decoder, of a connector, of the codes' side, of the image tokenizer
NAMED = {
    "unimm": (
        "decoder.model.layers.1.mlp.up_proj.weight",
        "connector.layers.0.weight",
        "code_head.2.bias",
        "image_tokenizer.decoder.conv_in.weight",
        "vision.model.blocks.0.attn.qkv.weight",
    ),
    "janus": ("model.language_model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.aligner.fc1.bias"),
    "janus-original": ("language_model.lm_head.weight", "gen_head.vision_head.weight", "gen_embed.weight"),
    "emu3": ("text_model.lm_head.weight", "text_model.model.layers.0.mlp.up_proj.weight"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """A whole checkpoint of each layout."""
    root = tmp_path_factory.mktemp("whole")
    model = janus_checkpoints.janus(root / "janus")
    janus_checkpoints.original(root / "janus-original", model, binary=True)
    emu3_checkpoints.emu3(root / "emu3")
    return {"unimm": tiny, **{name: root / name for name in NAMED if name != "unimm"}}


def damaged(source: Path, target: Path, name: str, damage: Damage) -> Path:
    """A copy of a checkpoint with one tensor damaged."""
    shutil.copytree(source, target)
    if (binary := target / "pytorch_model.bin").exists():
        torch.save(damage(torch.load(binary, weights_only=True), name), binary)
        return target
    file = target / "model.safetensors"
    save_file(damage(load_file(file), name), file, metadata={"format": "pt"})
    return target


def refused(call: Callable[[], Any], words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "name", "kind"),
    [
        (layout, name, kind)
        for layout, names in NAMED.items()
        for name in names
        for kind in DAMAGES
        if name == names[0] or kind in ("missing", "nan")
    ],
)
def test_broken_weights_are_named(
    tmp_path: Path, folders: dict[str, Path], layout: str, name: str, kind: str
) -> None:
    damage, words = DAMAGES[kind]
    folder = damaged(folders[layout], tmp_path / "broken", name, damage)
    line = refused(lambda: unimm.load(folder, device="cpu"), words)
    assert str(folder) in line
    if kind not in ("empty", "surplus"):
        assert name in line
    to = {"unimm": "unimm", "emu3": "original"}.get(layout, "transformers")
    refused(lambda: convert(folder, tmp_path / "converted", to), words)
    assert not (tmp_path / "converted").exists(), "nothing broken is written on"


@pytest.mark.parametrize("kind", ["missing", "empty", "misspelt", "surplus", "misshapen", "nan"])
def test_auto_model_is_as_strict(tmp_path: Path, tiny: Path, kind: str) -> None:
    name = NAMED["unimm"][0]
    folder = damaged(tiny, tmp_path / "broken", name, DAMAGES[kind][0])
    line = refused(lambda: AutoModel.from_pretrained(folder), str(folder))
    if kind not in ("empty", "surplus"):
        assert name in line


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_more_or_fewer_is_named(tmp_path: Path, tiny: Path, layers: int) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: unimm.load(folder), "not known" if layers == 1 else "missing")
    refused(lambda: AutoModel.from_pretrained(folder), "not known" if layers == 1 else "missing")


@pytest.mark.parametrize("values", [[0.5, 0.0, 0.5], [float("nan")] * 3, [-1.0, 0.5, 0.5]], ids=str)
def test_a_deviation_that_makes_pixels_infinite_is_named(
    tmp_path: Path, tiny: Path, values: list[float]
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["views"]["std"] = values
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: unimm.load(folder), "views.std" if values[0] == values[0] else "NaN")
    refused(lambda: describe(folder), "views.std" if values[0] == values[0] else "NaN")


@pytest.mark.parametrize("values", [[0.0, 0.5, 0.5], [1e999, 0.5, 0.5]], ids=str)
def test_so_is_one_of_a_published_checkpoint(
    tmp_path: Path, folders: dict[str, Path], values: list[float]
) -> None:
    folder = shutil.copytree(folders["janus-original"], tmp_path / "model")
    options = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**options, "image_std": values}))
    refused(lambda: unimm.load(folder), "image_std[0]" if values[0] == 0 else "Infinity")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_image_tokenizer_is_named(tmp_path: Path, tiny_model: Any, kind: str) -> None:
    tiny_model.image_tokenizer.save_pretrained(tmp_path / "whole")
    damage, words = DAMAGES[kind]
    folder = damaged(tmp_path / "whole", tmp_path / "broken", "decoder.conv_in.weight", damage)
    refused(lambda: load_image_tokenizer(folder), words.removeprefix("decoder.extra.weight [3] "))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """An adapter of the tiny model's decoder, after a step of training."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    model = unimm.load(tiny, device="cpu").model
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_adapter_is_named(tmp_path: Path, tiny: Path, adapter: Path, kind: str) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    damage, words = DAMAGES[kind]
    save_file(damage(weights, sorted(weights)[0]), file)
    words = {
        "misshapen": "adapter",
        "integers": "wrong kind",
        "surplus": "decoder.extra.weight not known",
    }.get(kind, words)
    refused(lambda: unimm.load(tiny, device="cpu", adapter=folder), words)


def test_a_whole_adapter_loads_and_one_without_weights_is_named(
    tmp_path: Path, tiny: Path, adapter: Path
) -> None:
    before = unimm.load(tiny, device="cpu").model.decoder.model.layers[0].self_attn.q_proj.weight
    after = (
        unimm.load(tiny, device="cpu", adapter=adapter).model.decoder.model.layers[0].self_attn.q_proj.weight
    )
    assert not torch.equal(before, after)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    refused(lambda: unimm.load(tiny, device="cpu", adapter=folder), "adapter_model.safetensors: missing")
