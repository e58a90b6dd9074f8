"""Int8 weights: near the float layer row by row, the same in any batch, from every layout, and never saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.errors import UserError
from unimm.evaluation.logits import LogitsEffect, code_effect, text_effect
from unimm.families.convert import convert
from unimm.models.modeling import UniMMModel
from unimm.models.quantization import Int8Linear, is_quantised
from unimm.pipeline import UniMM


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A layer whose rows differ in size by up to a thousand, so that another row's scale is far off."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        linear.weight.mul_(10 ** torch.linspace(-2, 1, outputs)[torch.randperm(outputs), None])
    return linear


@torch.no_grad()
def test_every_weight_is_within_half_a_step() -> None:
    linear = _linear(64, 40)
    layer = Int8Linear.of(linear)
    assert layer.quantised.dtype == torch.int8
    off = (layer.quantised * layer.scale.float()[:, None] - linear.weight).abs()
    largest = linear.weight.abs().amax(1, keepdim=True)
    assert (
        off <= largest / 127 / 2 * 1.01 + largest / 127 * 0.5
    ).all()  # the largest of a row may be cut a little
    assert (off.mean(1) < linear.weight.abs().amax(1) / 127 / 3).all()


@pytest.mark.parametrize("inputs", [48, 64, 256])  # 48: not for the kernel
@pytest.mark.parametrize("positions", [1, 4, 9])  # 9: as a prompt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_outputs_are_near_those_of_the_float_layer(inputs: int, positions: int, dtype: torch.dtype) -> None:
    linear = _linear(inputs, 70)
    layer = Int8Linear.of(linear)
    layer.bias = layer.bias.to(dtype)
    x = torch.randn(40, positions, inputs)
    got, expected = layer(x.to(dtype)), linear(x)
    assert got.dtype == dtype and got.shape == expected.shape
    apart = (got.float() - expected).flatten(0, 1).norm(dim=0) / expected.flatten(0, 1).norm(dim=0)
    assert apart.max() < 0.03  # of every output, not of all together


@torch.no_grad()
def test_a_row_is_the_same_in_any_batch() -> None:
    layer = Int8Linear.of(_linear(128, 71))
    x = torch.randn(13, 1, 128)
    whole = layer(x)
    for size in (1, 2, 3, 4, 5, 8):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), whole)


@torch.no_grad()
def test_joined_layers_and_parts_of_one() -> None:
    layers = [Int8Linear.of(_linear(64, outputs)) for outputs in (8, 5, 20)]
    x = torch.randn(2, 1, 64)
    assert torch.equal(Int8Linear.join(layers)(x), torch.cat([layer(x) for layer in layers], -1))
    assert torch.equal(layers[2].rows(3, 17)(x), layers[2](x)[..., 3:17])


def test_a_row_of_zeros_stays_zero() -> None:
    linear = nn.Linear(64, 4, bias=False)
    nn.init.zeros_(linear.weight)
    assert not Int8Linear.of(linear)(torch.ones(1, 1, 64)).any()


@pytest.fixture(scope="module")
def embedded() -> tuple[UniMM, UniMM]:
    return unimm.load(device="cpu"), unimm.load(device="cpu", quantize="int8")


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_the_embedded_models_weights_are_int8(embedded: tuple[UniMM, UniMM]) -> None:
    whole, small = (um.model for um in embedded)
    layers = [m for m in small.decoder.model.layers.modules() if isinstance(m, nn.Linear | Int8Linear)]
    assert len(layers) == 6 * 7 and all(type(layer) is Int8Linear for layer in layers)
    assert type(small.code_head[2]) is Int8Linear  # 256 x 1,024
    assert _bytes(small.decoder.model.layers) < 0.27 * _bytes(whole.decoder.model.layers)
    for name in ("connector", "vision", "code_embedding", "image_tokenizer"):
        assert not is_quantised(getattr(small, name))
    assert small.decoder.lm_head.weight is small.decoder.model.embed_tokens.weight  # tied, so left alone


def test_the_embedded_model_says_and_draws_nearly_the_same(embedded: tuple[UniMM, UniMM]) -> None:
    scenes = [Image.fromarray(EmojiScenes("seen")[i].render()) for i in range(12)]
    said = [um.caption(scenes) for um in embedded]
    assert sum(map(str.__eq__, *said)) >= 10
    text = text_effect(*embedded, scenes[:4], tokens=8)
    codes = code_effect(*embedded, ["a red apple on a blue background", "two stars"])
    assert 0 < text.relative < 0.05 and text.same > 0.9 and text.choices == 32
    assert 0 < codes.relative < 0.08 and codes.same > 0.8 and codes.choices == 128


def test_the_small_model_draws_what_its_seed_says(embedded: tuple[UniMM, UniMM]) -> None:
    draw = partial(embedded[1].draw, "a red apple", seed=7, return_codes=True)
    assert torch.equal(draw()[1], draw()[1])


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for module, make in ((janus_checkpoints, "janus"), (emu3_checkpoints, "emu3")):
        whole = getattr(module, make)(folder / f"{make}-transformers")
        module.original(folder / f"{make}-original", whole)
        convert(folder / f"{make}-original", folder / f"{make}-unimm", "unimm")
    return folder


@pytest.mark.parametrize("layout", ["transformers", "original", "unimm"])
@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_every_layout_loads_with_its_heads(
    layouts: Path, family: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "unimm.models.modeling.LARGE", 0
    )  # heads of such small models are left alone otherwise
    folder = layouts / f"{family}-{layout}"
    whole, small = unimm.load(folder, device="cpu"), unimm.load(folder, device="cpu", quantize="int8")
    assert type(small.model.decoder.lm_head) is Int8Linear
    assert small.model.code_head is None or type(small.model.code_head[0]) is Int8Linear
    assert sum(type(m) is nn.Linear for m in small.model.decoder.modules()) == 0
    text = text_effect(whole, small, [Image.new("RGB", (20, 30), c) for c in ("red", "blue")], tokens=6)
    assert 0 < text.relative < 0.06
    if family == "janus":  # Emu3's own size is some thousand codes; its head's rows are compared below
        codes = code_effect(whole, small, ["a red apple", "it"])
        assert 0 < codes.relative < 0.1 and codes.choices == 32
    hidden = torch.randn(4, 48)
    apart = LogitsEffect.of(whole.model.code_logits(hidden), small.model.code_logits(hidden))
    assert 0 < apart.relative < 0.02


def test_saving_is_refused_in_one_line(tiny: Path, tmp_path: Path) -> None:
    um = unimm.load(tiny, device="cpu", quantize="int8")
    for save in (um.save, um.model.save_pretrained):
        with pytest.raises(UserError, match=r"^quantize: a model with int8 weights cannot be saved"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_unknown_names_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^quantize: 'int4'; use int8, or leave it out$"):
        unimm.load(tmp_path / "nowhere", quantize="int4")


def test_quantising_twice_changes_nothing(tiny: Path) -> None:
    model: UniMMModel = unimm.load(tiny, device="cpu", quantize="int8").model
    before = [id(layer) for layer in model.modules()]
    model.quantise()
    assert [id(layer) for layer in model.modules()] == before


def test_the_effect_of_no_change_and_of_one() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.0]])
    assert LogitsEffect.of(logits, logits) == LogitsEffect(2, 0.0, 0.0, 1.0)
    assert LogitsEffect.of(logits, logits + 5).relative < 1e-12  # a constant changes no choice
    swapped = LogitsEffect.of(logits, torch.tensor([[4.0, 2.0, 1.0], [3.0, 1.0, 0.0]]))
    assert (swapped.largest, swapped.same) == (3.0, 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    whole, small = (unimm.load(device="cuda", quantize=quantize) for quantize in (None, "int8"))
    assert code_effect(whole, small, ["a red apple"]).relative < 0.1
