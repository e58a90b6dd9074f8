"""NVLM-D's own: heads that are there for their number alone, words as tags, rotary positions that stretch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unimm
from tests.families.nvlm_checkpoints import DUMMY, NVLM, TEMPLATE, TOKENS
from tests.families.survey import picture
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.pipeline import UniMM
from unimm.sampling.decoder import LlamaRunner
from unimm.sampling.runners import make_runner

# Qwen2's, which writes a message's content as one text
TEXT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    NVLM.write(tmp_path / "hub")
    return tmp_path / "hub"


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The same folder with other weights, in one file."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def dummies(name: str) -> Any:
    """Where the dummy heads are in a tensor of 3 heads of 16, 7 dummy ones behind them."""
    if name.endswith("attn.qkv.weight"):
        return [row for part in range(3) for row in range(part * 160 + 48, part * 160 + 160)]
    return (..., slice(48, 160))


@pytest.mark.parametrize(
    "name", ["attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight"]
)
def test_dummy_heads_are_zeros_or_a_line(name: str, folder: Path) -> None:
    tensors = weights(folder)
    key = f"vision_model.encoder.layers.1.{name}"
    assert not tensors[key][dummies(name)].any() and tensors[key].any()
    tensors[key][dummies(name)] = 1e-3
    rewrite(folder, tensors)
    with pytest.raises(
        UserError, match=rf"hub: {key}: expected zeros in the \[.*\] that the model does not use$"
    ):
        unimm.load(folder, device="cpu")


@pytest.mark.parametrize("dummy", [0, 2])
def test_a_folder_of_other_dummy_heads(dummy: int, folder: Path, tmp_path: Path) -> None:
    """How many there are, the weights say: with fewer the model is the same, and they are written back."""
    expected = unimm.load(folder, device="cpu").model.state_dict()
    fewer = {}
    for name, tensor in weights(folder).items():
        if name.endswith("attn.qkv.weight"):
            parts = [part[: 48 + 16 * dummy] for part in tensor.chunk(3)]
            tensor = torch.cat(parts)
        elif name.endswith(("attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight")):
            tensor = tensor[..., : 48 + 16 * dummy].contiguous()
        fewer[name] = tensor
    rewrite(folder, fewer)
    got = unimm.load(folder, device="cpu").model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    convert(folder, tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", "original")
    back = weights(tmp_path / "back")
    assert back.keys() == fewer.keys() and all(torch.equal(back[name], fewer[name]) for name in fewer)


def test_no_number_of_dummy_heads_is_a_line(folder: Path) -> None:
    tensors = weights(folder)
    key = "vision_model.encoder.layers.1.attn.qkv.weight"
    tensors[key] = tensors[key][:-3].contiguous()
    rewrite(folder, tensors)
    with pytest.raises(
        UserError, match=rf"{key} is \[{3 * 16 * (3 + DUMMY) - 3}, 48\], expected \[480, 48\] of"
    ):
        unimm.load(folder, device="cpu")


def test_tags_are_words(folder: Path) -> None:
    um = unimm.load(folder, device="cpu")
    ids, images = um.processor.question("what?", [picture(90, 60), picture(13, 12)])
    text = um.processor.tokenizer.decode(ids)
    pads = "<|vision_pad|>" * TOKENS
    tiles = "".join(f"<tile_{number}>{pads}" for number in range(1, 7))
    whole = f"<tile_global_thumbnail>{pads}"
    assert f"<Image>{tiles}{whole}</Image>\n<Image>{whole}</Image>\nwhat?" in text
    assert images is not None and images.views is not None and images.views.tolist() == [7, 1]
    assert images.pixels is not None and images.pixels.shape == (8, 3, 30, 30)


def test_a_template_of_texts_alone_writes_the_same(folder: Path) -> None:
    """Qwen2's template knows no images; with none at all, the turns are ChatML too."""
    shown = [picture(37, 91)]
    expected = unimm.load(folder, device="cpu").processor.question("a red apple", shown)[0]
    path = folder / "tokenizer_config.json"
    assert json.loads(path.read_text())["chat_template"] == TEMPLATE
    edit(path, chat_template=TEXT_TEMPLATE)
    assert unimm.load(folder, device="cpu").processor.question("a red apple", shown)[0] == expected
    edit(path, chat_template=None)
    assert unimm.load(folder, device="cpu").processor.question("a red apple", shown)[0] == expected


@torch.no_grad()
def test_positions_beyond_the_context_stretch_as_the_references_do(folder: Path) -> None:
    """The decoder's rotary tables depend on the length of its stream from there on, so no runner may keep them."""
    path = folder / "config.json"
    decoder = json.loads(path.read_text())["llm_config"]
    edit(path, llm_config={**decoder, "max_position_embeddings": 40})
    um = unimm.load(folder, device="cpu")
    assert isinstance(make_runner(um.model), LlamaRunner)
    reference: Any = NVLM.make().model
    text = reference.model.language_model
    short = copy.deepcopy(text.config)
    short.max_position_embeddings = 40
    text.rotary_emb = type(text.rotary_emb)(short)
    generator = torch.Generator().manual_seed(0)
    for length in (20, 60, 30):
        ids = torch.randint(0, 300, (1, length), generator=generator)
        expected = reference(input_ids=ids).logits
        assert (um.model(input_ids=ids).logits - expected).abs().max() < 1e-4
        plain = NVLM.make().model(input_ids=ids).logits
        assert ((plain - expected).abs().max() > 1e-2) == (length > 40)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"select_layer": -2}, r"select_layer: expected .*-1, got -2"),
        ({"ps_version": "v1"}, r"ps_version: expected .*v2.*, got .*v1"),
        ({"use_thumbnail": False}, r"use_thumbnail: expected .*[Tt]rue"),
        ({"downsample_ratio": 0.4}, r"downsample_ratio: 0.4 does not divide 6 features a side"),
        (
            {"force_image_size": 60},
            r"force_image_size: 60 is not supported, only vision_config.image_size \(30\)",
        ),
        ({"llm_config": {"architectures": ["LlamaForCausalLM"]}}, r"llm_config.architectures"),
        ({"vision_config": {"num_attention_heads": 3}}, r"vision_config.hidden_size"),
    ],
)
def test_a_line_for_what_is_not_supported(changes: dict[str, Any], line: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=rf"config\.json: {line}"):
        unimm.load(folder, device="cpu")


def test_without_tiles_an_image_is_the_whole(folder: Path) -> None:
    edit(folder / "config.json", dynamic_image_size=False)
    um: UniMM = unimm.load(folder, device="cpu")
    _, images = um.processor.question("a", [picture(90, 60)])
    assert images is not None and images.views is not None and images.views.tolist() == [1]
    edit(folder / "config.json", dynamic_image_size=True, max_dynamic_patch=2)
    _, images = unimm.load(folder, device="cpu").processor.question("a", [picture(90, 30)])
    assert images is not None and images.views is not None and images.views.tolist() == [3]
