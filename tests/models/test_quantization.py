"""Int8 and int4 weights: near the float layer, the same in any batch and on any CPU, and from every layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

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
from unimm.models.quantization import Int4Linear, Int8Linear, is_quantised, pack_levels, unpack_levels
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


@pytest.mark.parametrize("group", [32, 64, 128])
@torch.no_grad()
def test_every_int4_weight_is_within_a_step_of_its_group(group: int) -> None:
    linear = _linear(2 * group, 40)
    layer = Int4Linear.of(linear, group)
    assert layer.quantised.dtype == torch.uint8 and layer.quantised.shape == (1, 2 * group, 32)
    grouped = linear.weight.view(40, 2, group)
    step = (grouped.amax(2) - grouped.amin(2)) / 15
    off = (layer.weights(torch.float32) - linear.weight).abs().view(40, 2, group)
    assert (off.amax(2) < 1.7 * step).all()  # the ends of a range may be cut
    assert (off.mean(2) < 0.3 * step).all()
    plain = ((grouped - grouped.amin(2, keepdim=True)) / step[:, :, None]).round() * step[:, :, None]
    error = (plain + grouped.amin(2, keepdim=True) - grouped).square().sum()
    assert off.square().sum() < 1.01 * error  # never worse than the whole range


@pytest.mark.parametrize("block", [32, 64])
def test_packing_can_be_undone(block: int) -> None:
    levels = torch.randint(0, 16, (128, 24), dtype=torch.uint8)
    packed = pack_levels(levels, block)
    assert packed.shape == (128 // block, 24, block // 2) and torch.equal(unpack_levels(packed), levels)


LIMITS = {Int8Linear: 0.03, Int4Linear: 0.2}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("inputs", [48, 64, 256])  # 48: not for the int8 kernel
@pytest.mark.parametrize("positions", [1, 4, 9, 300])  # 9, 300: as a prompt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_outputs_are_near_those_of_the_float_layer(
    kind: Any, inputs: int, positions: int, dtype: torch.dtype
) -> None:
    linear = _linear(inputs, 70)
    layer = kind.of(linear)
    layer.bias = layer.bias.to(dtype)
    x = torch.randn(40, positions, inputs)
    got, expected = layer(x.to(dtype)), linear(x)
    assert got.dtype == dtype and got.shape == expected.shape
    apart = (got.float() - expected).flatten(0, 1).norm(dim=0) / expected.flatten(0, 1).norm(dim=0)
    assert apart.max() < LIMITS[kind]  # of every output, not of all together


@pytest.mark.parametrize("kind", LIMITS)
@torch.no_grad()
def test_a_row_is_the_same_in_any_batch(kind: Any) -> None:
    layer = kind.of(_linear(128, 71))
    x = torch.randn(13, 1, 128)
    whole = layer(x)
    for size in (1, 2, 3, 4, 5, 8):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), whole)


@pytest.mark.parametrize("kind", LIMITS)
@torch.no_grad()
def test_joined_layers_and_parts_of_one(kind: Any) -> None:
    layers = [kind.of(_linear(64, outputs)) for outputs in (8, 5, 130)]
    x = torch.randn(2, 1, 64)
    assert torch.equal(kind.join(layers)(x), torch.cat([layer(x) for layer in layers], -1))
    for start, end in ((3, 17), (60, 130), (0, 64)):
        assert torch.equal(layers[2].rows(start, end)(x), layers[2](x)[..., start:end])


@pytest.mark.parametrize("kind", LIMITS)
@torch.no_grad()
def test_a_row_of_zeros_stays_zero(kind: Any) -> None:
    linear = nn.Linear(64, 4, bias=False)
    nn.init.zeros_(linear.weight)
    assert not kind.of(linear)(torch.ones(1, 1, 64)).any()


@torch.no_grad()
def test_weights_in_the_middle_of_a_file_are_no_crash() -> None:
    for layer in (Int8Linear.of(_linear(128, 64)), Int4Linear.of(_linear(128, 64))):
        x = torch.randn(3, 1, 128)
        expected, held = layer(x), layer.quantised
        file = torch.zeros(held.numel() + 8, dtype=held.dtype)
        layer.quantised = file[8:].view(held.shape).copy_(held)
        assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_the_kernel_the_plain_way_and_both_blocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Int4Linear.of(_linear(96, 100))
    x = torch.randn(5, 2, 96).bfloat16().float()
    fast = layer(x)
    monkeypatch.setattr("unimm.models.quantization.kernel_block", lambda: None)
    plain, stored = layer(x), layer.state_dict()["quantised"]
    assert torch.allclose(fast, plain, atol=0.02 * plain.abs().max())
    layer.quantised = pack_levels(unpack_levels(layer.quantised), 32)  # as on a CPU with AVX2
    assert torch.equal(layer(x), plain) and torch.equal(layer.state_dict()["quantised"], stored)
    layer.load_state_dict(Int4Linear.of(_linear(96, 100)).state_dict())
    assert torch.equal(layer(x), plain)


def test_gradients_flow_to_the_inputs() -> None:
    for kind in LIMITS:
        layer = kind.of(_linear(64, 8))
        x = torch.randn(1, 2, 64, requires_grad=True)
        layer(x).sum().backward()
        assert torch.allclose(x.grad[0, 0], layer.weights(torch.float32).sum(0), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def embedded() -> tuple[UniMM, UniMM]:
    return unimm.load(device="cpu"), unimm.load(device="cpu", quantize="int8")


@pytest.fixture(scope="module")
def embedded_int4() -> UniMM:
    return unimm.load(device="cpu", quantize="int4")


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


def test_the_embedded_model_in_int4(embedded: tuple[UniMM, UniMM], embedded_int4: UniMM) -> None:
    whole, small = embedded[0], embedded_int4
    layers = small.model.decoder.model.layers
    assert sum(type(layer) is Int4Linear for layer in layers.modules()) == 6 * 7
    assert type(small.model.code_head[2]) is Int8Linear
    # 4.5 bits a weight, and the widths of 688 are filled up to 704
    assert _bytes(layers) < 0.147 * _bytes(whole.model.decoder.model.layers)
    scenes = [Image.fromarray(EmojiScenes("seen")[i].render()) for i in range(4)]
    text = text_effect(whole, small, scenes, tokens=8)
    codes = code_effect(whole, small, ["a red apple on a blue background", "two stars"])
    assert 0 < text.relative < 0.2 and text.same > 0.85
    assert 0 < codes.relative < 0.25 and codes.same > 0.6


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
        "unimm.models.quantization.LARGE", 0
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


def test_unknown_names_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^quantize: 'int3'; use int8 or int4, or leave it out$"):
        unimm.load(tmp_path / "nowhere", quantize="int3")


def test_quantising_twice_changes_nothing(tiny: Path) -> None:
    model: UniMMModel = unimm.load(tiny, device="cpu", quantize="int8").model
    before = [id(layer) for layer in model.modules()]
    model.quantise()
    assert [id(layer) for layer in model.modules()] == before
    with pytest.raises(UserError, match=r"^quantize: the weights are int8 already"):
        model.quantise("int4")


def test_the_effect_of_no_change_and_of_one() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.0]])
    assert LogitsEffect.of(logits, logits) == LogitsEffect(2, 0.0, 0.0, 1.0)
    assert LogitsEffect.of(logits, logits + 5).relative < 1e-12  # a constant changes no choice
    swapped = LogitsEffect.of(logits, torch.tensor([[4.0, 2.0, 1.0], [3.0, 1.0, 0.0]]))
    assert (swapped.largest, swapped.same) == (3.0, 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("quantize", "limit"), [("int8", 0.1), ("int4", 0.3)])
def test_on_cuda(quantize: str, limit: float) -> None:
    whole, small = (unimm.load(device="cuda", quantize=how) for how in (None, quantize))
    assert code_effect(whole, small, ["a red apple"]).relative < limit
