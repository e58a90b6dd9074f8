"""Gated cross-attention: against Meta's block as transformers has it, and what a memory must not change."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from tests.models.test_decoders import tiny
from tests.models.test_modeling import start_alone
from unimm.models.configuration import UniMMConfig
from unimm.models.decoders import DECODERS
from unimm.models.fusion import CrossBlock, Fusion, Memory, Piece, visible_rows
from unimm.models.fusion_parts import CrossFusionConfig
from unimm.models.inputs import Images, Rows
from unimm.models.memory import who_looks
from unimm.models.modeling import UniMMModel
from unimm.sections import FieldError

FEATURE, WORDS = 59, 50
DECODER = {
    "model_type": "qwen2", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SQUARE = {
    "views": {"kind": "square", "image_size": 16},
    "encoder": {
        "kind": "timm", "name": "vit_base_patch16_siglip_224", "tokens": 4, "width": 16,
        "kwargs": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
}  # fmt: skip
CANVAS = {**SQUARE, "views": {"kind": "canvas", "tile": 16, "most": 4, "whole": "last", "alone": True}}
BLOCKS = {"layers": [1, 3], "heads": 4, "kv_heads": 2, "width": 40}
TILED = {"tile": [2, 2], "whole_at": "last", "alone": True}


def layout_of(**picture: Any) -> dict[str, Any]:
    return {"begin": None, "end": None, "feature": FEATURE, "code": 60, "grid": (1, 1), "picture": picture}


LIKE_LLAMA: dict[str, Any] = {
    **SQUARE, "fusion": {"kind": "cross", **BLOCKS}, "layout": layout_of(mark="image")
}  # fmt: skip
LIKE_NVLM_X: dict[str, Any] = {
    **CANVAS, "fusion": {"kind": "cross", **BLOCKS, "sees": "tile"}, "layout": layout_of(mark="tile", **TILED)
}  # fmt: skip
LIKE_NVLM_H: dict[str, Any] = {
    **CANVAS,
    "fusion": {"kind": "both", **BLOCKS, "tags": [[5, 6], [5, 7], [5, 8], [5, 9]]},
    "layout": layout_of(apart=True, **TILED),
}
LIKE_NVLM_D: dict[str, Any] = {**CANVAS, "layout": layout_of(**TILED)}
SYSTEMS = {"image": LIKE_LLAMA, "tile": LIKE_NVLM_X, "both": LIKE_NVLM_H}


def build(parts: dict[str, Any], gates: float = 0.7, decoder: dict[str, Any] | None = None) -> UniMMModel:
    torch.manual_seed(0)
    model = UniMMModel(UniMMConfig(decoder=decoder or DECODER, **parts)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(gates)
    return model


def image_tokens(model: UniMMModel, grid: tuple[int, int]) -> list[int]:
    """What stands for an image, its tags left out."""
    parts = model.layout.understanding(*grid)
    return [token for part in parts if not isinstance(part, str) for token in part]


def sample(
    model: UniMMModel, grids: list[tuple[int, int]], seed: int = 0, before: int = 2, after: int = 3
) -> tuple[Tensor, Images]:
    """A row of words with images between, two words apart."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(10, WORDS, (count,), generator=generator).tolist()

    ids = words(before)
    for grid in grids:
        ids += [*image_tokens(model, grid), *words(2)]
    ids += words(after)
    canvas = model.config.views["kind"] == "canvas"
    counts = [model.seeing.view_count(grid) for grid in grids]
    pixels = torch.randn(sum(counts), 3, 16, 16, generator=generator)
    images = (
        Images(pixels, views=torch.tensor(counts), grids=torch.tensor(grids)) if canvas else Images(pixels)
    )
    return torch.tensor([ids]), images if grids else Images()


# --- the block ----------------------------------------------------------------------------------------------


def mllama() -> MllamaForCausalLM:
    config = MllamaTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1, 4], max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    torch.manual_seed(1)
    model = MllamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.ndim == 1))
    return model


def block_of(theirs: Any) -> CrossBlock:
    """Our block with the weights of a cross-attention layer of transformers."""
    config = CrossFusionConfig(layers=(0,), heads=4, kv_heads=2, width=40)
    block = CrossBlock(config, 32)
    attention, mlp = theirs.cross_attn, theirs.mlp
    pairs = {
        "norm": theirs.input_layernorm, "between": theirs.post_attention_layernorm,
        **{name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
        **{f"mlp.{name}": getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")},
    }  # fmt: skip
    with torch.no_grad():
        for name, module in pairs.items():
            block.get_submodule(name).weight.copy_(module.weight)
        block.attention_gate.copy_(theirs.cross_attn_attn_gate)
        block.mlp_gate.copy_(theirs.cross_attn_mlp_gate)
    return block


@torch.no_grad()
def test_a_block_is_that_of_transformers_where_tokens_see_something() -> None:
    layer: Any = mllama().model.layers[1]
    block = block_of(layer)
    stream, states = torch.randn(2, 7, 32), torch.randn(2, 10, 32)
    visible = torch.ones(2, 7, 10, dtype=torch.bool)
    visible[0, 3:, :4] = False
    mask = torch.zeros(2, 1, 7, 10).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    wanted = layer(
        hidden_states=stream,
        cross_attention_states=states,
        cross_attention_mask=mask,
        attention_mask=None,
        full_text_row_masked_out_mask=torch.ones(2, 1, 7, 1),
    )
    torch.testing.assert_close(block(stream, *block.read(states), visible), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_token_that_sees_nothing_gets_nothing_unlike_in_transformers() -> None:
    """Meta's code multiplies both branches by the flag, transformers 5.24 the second alone; fails once it is right."""
    layer: Any = mllama().model.layers[1]
    block = block_of(layer)
    stream, states = torch.randn(1, 3, 32), torch.randn(1, 10, 32)
    visible = torch.zeros(1, 3, 10, dtype=torch.bool)
    assert torch.equal(block(stream, *block.read(states), visible), stream)
    leaking = layer(
        hidden_states=stream,
        cross_attention_states=states,
        cross_attention_mask=torch.zeros(1, 1, 3, 10),
        attention_mask=None,
        full_text_row_masked_out_mask=torch.zeros(1, 1, 3, 1),
    )
    assert not torch.allclose(leaking, stream), "transformers is right now: drop the correction of its oracle"


# --- who sees what ------------------------------------------------------------------------------------------


def seen_by(marks: list[int], length: int, sees: Any, lasts: list[int] | None = None) -> list[list[bool]]:
    pieces = [Piece(0, mark, last, 1) for mark, last in zip(marks, lasts or marks, strict=True)]
    looks = who_looks(length, None, None, torch.device("cpu"))
    return visible_rows(pieces, (1, length), looks, sees)[0].tolist()


def test_the_last_image_is_seen_as_transformers_processor_says() -> None:
    drawn = random.Random(0)
    for _ in range(2000):
        ids = [drawn.choice([9, 1, 1, 2]) for _ in range(drawn.randint(1, 14))]
        spans = get_cross_attention_token_mask(ids, 9)
        if not spans:
            continue
        marks = [place for place, token in enumerate(ids) if token == 9]
        wanted = [
            [start <= time < (len(ids) if end == -1 else end) for start, end in spans]
            for time in range(len(ids))
        ]
        assert seen_by(marks, len(ids), "image") == wanted, ids


def test_a_tiles_mark_sees_its_tile_and_what_follows_sees_all() -> None:
    """The rule of NVLM-X written a second time, on random streams of two images."""
    drawn = random.Random(1)
    for _ in range(300):
        marks, lasts, place = [], [], drawn.randint(0, 4)
        for _ in range(2):
            own = [place := place + drawn.randint(1, 5) for _ in range(drawn.randint(1, 6))]
            marks, lasts = marks + own, lasts + [own[-1]] * len(own)
            place += drawn.randint(1, 3)
        length = place + drawn.randint(0, 5)
        wanted = [
            [time == mark or time > last for mark, last in zip(marks, lasts, strict=True)]
            for time in range(length)
        ]
        assert seen_by(marks, length, "tile", lasts) == wanted


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_gates_at_0_and_no_image_leave_the_decoder_bit_for_bit(name: str) -> None:
    model = build(SYSTEMS[name], gates=0.0)
    ids, images = sample(model, [(1, 2), (2, 2)])
    alone = model.decoder(inputs_embeds=model.embed(ids, images).stream).logits
    assert torch.equal(model(ids, images=images).logits, alone)
    text, model = ids[:, :2], build(SYSTEMS[name])
    assert torch.equal(model(text).logits, model.decoder(text).logits)


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_any_decoder_looks_at_a_memory(kind: str) -> None:
    decoder = {**tiny(kind), "vocab_size": 60}
    model = build(LIKE_LLAMA | {"fusion": {"kind": "cross", **BLOCKS, "layers": [0, 1]}}, 0.0, decoder)
    feature = model.layout.feature
    ids = torch.tensor([[1, 2, feature, 3, 4]])
    images = Images(torch.randn(1, 3, 16, 16))
    before = model(ids, images=images).logits
    assert torch.equal(before, model.decoder(ids).logits)
    for block in model.fusion.blocks.values():
        block.attention_gate.fill_(1.0)
    after = model(ids, images=images).logits
    # experts sum up what they were sent in another order
    torch.testing.assert_close(after[:, :2], before[:, :2], rtol=0, atol=1e-6)
    assert (after[:, 2:] - before[:, 2:]).abs().max() > 1e-4


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_text_before_an_image_does_not_move_with_it(name: str) -> None:
    model = build(SYSTEMS[name])
    ids, images = sample(model, [(2, 2)], before=4)
    assert images.pixels is not None
    other = Images(torch.randn_like(images.pixels), views=images.views, grids=images.grids)
    one, two = model(ids, images=images).logits, model(ids, images=other).logits
    assert torch.equal(one[:, :4], two[:, :4])
    assert (one[:, -1] - two[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_both_with_a_memory_that_nobody_sees_is_the_whole_in_the_stream() -> None:
    """NVLM-H whose tiles are not seen is NVLM-D that is shown the whole alone."""
    h, d = build(LIKE_NVLM_H), build(LIKE_NVLM_D)
    d.load_state_dict(h.state_dict(), strict=False)
    ids, images = sample(h, [(2, 2)])
    assert images.pixels is not None
    whole = Images(images.pixels[-1:], views=torch.tensor([1]), grids=torch.tensor([[1, 1]]))
    embedded = h.embed(ids, images)
    assert embedded.memory is not None and embedded.memory.states.shape == (1, 4 * (2 + 4), 32)
    unseen = Memory(embedded.memory.states, torch.zeros_like(embedded.memory.visible))
    nobody = h.decode(embedded.stream, unseen).last_hidden_state
    assert torch.equal(nobody, d.decode(d.embed(ids, whole).stream).last_hidden_state)
    seen = h.decode(embedded.stream, embedded.memory).last_hidden_state
    assert (seen - nobody).abs().max() > 1e-3
    # an image of one tile is the whole alone, so that there is no memory
    assert h.embed(*sample(h, [(1, 1)])).memory is None


def test_tags_stand_in_the_memory_before_their_tiles() -> None:
    model = build(LIKE_NVLM_H)
    ids, images = sample(model, [(1, 3)])
    memory = model.embed(ids, images).memory
    assert memory is not None
    table = model.decoder.get_input_embeddings().weight
    for number, tag in enumerate(model.config.fusion["tags"][:3]):
        first = number * (len(tag) + 4)
        assert torch.equal(memory.states[0, first : first + len(tag)], table[tag])


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_packed_and_padded_rows_are_the_samples_alone(name: str) -> None:
    model = build(SYSTEMS[name])
    samples = [sample(model, grids, seed) for seed, grids in enumerate([[(1, 2), (2, 2)], [], [(1, 3)]])]
    alone = [model(ids, images=images).logits[0] for ids, images in samples]
    images = Images.cat(images for _, images in samples)
    rows = Rows(
        torch.cat([torch.arange(ids.shape[1]) for ids, _ in samples])[None],
        torch.cat([torch.full((ids.shape[1],), number) for number, (ids, _) in enumerate(samples)])[None],
        torch.zeros(1, sum(ids.shape[1] for ids, _ in samples), dtype=torch.long),
    )
    packed = model(torch.cat([ids for ids, _ in samples], dim=1), images=images, rows=rows).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)

    longest = max(ids.shape[1] for ids, _ in samples)
    padded = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for number, (ids, _) in enumerate(samples):
        padded[number, -ids.shape[1] :] = ids
        mask[number, -ids.shape[1] :] = 1
    found = model(padded, attention_mask=mask, images=images).logits
    for number, wanted in enumerate(alone):
        torch.testing.assert_close(found[number, -len(wanted) :], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_branches_see_the_images_of_their_own_past(name: str) -> None:
    """A shared image, then a branch with another image and one without: each as if it were alone."""
    model = build(SYSTEMS[name])
    root, shared = sample(model, [(1, 2)], 0)
    one, own = sample(model, [(2, 2)], 1, before=1, after=2)
    two, _ = sample(model, [], 2)
    lengths = [part.shape[1] for part in (root, one, two)]
    branches = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    start = torch.arange(lengths[0])
    positions = torch.cat([start, *(lengths[0] + torch.arange(length) for length in lengths[1:])])[None]
    rows = Rows(positions, torch.zeros_like(branches), branches)
    both = Images.cat([shared, own])
    found = model(torch.cat([root, one, two], dim=1), images=both, rows=rows).logits[0].split(lengths)
    first = model(torch.cat([root, one], dim=1), images=both).logits[0]
    second = model(torch.cat([root, two], dim=1), images=shared).logits[0]
    torch.testing.assert_close(found[1], first[lengths[0] :], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], second[lengths[0] :], rtol=0, atol=1e-5)


def test_gradients_do_not_depend_on_what_is_computed_again() -> None:
    """Two forward passes over unlike memories before one backward pass, as in preference training."""
    model = build(LIKE_LLAMA).train()
    samples = [sample(model, [(1, 1)], seed) for seed in range(2)]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        losses = [model(ids, images=images).logits.pow(2).mean() for ids, images in samples]
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(plain) == len(again)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_copy_has_blocks_of_its_own() -> None:
    model = build(LIKE_LLAMA)
    ids, images = sample(model, [(1, 1)])
    before = model(ids, images=images).logits
    other = copy.deepcopy(model)
    assert isinstance(other.fusion, Fusion)
    for block in other.fusion.blocks.values():
        block.attention_gate.zero_()
        block.mlp_gate.zero_()
    assert torch.equal(other(ids, images=images).logits, other.decoder(ids).logits)
    assert torch.equal(model(ids, images=images).logits, before)


@torch.no_grad()
def test_small_weights_reach_the_blocks() -> None:
    model = build(LIKE_LLAMA, decoder={**DECODER, "hidden_size": 64})
    ids, images = sample(model, [(1, 1)])
    before = model(ids, images=images).logits
    model.quantise("int8")
    assert type(model.fusion.blocks["1"].q_proj).__name__ == "Int8Linear"
    moved = (model(ids, images=images).logits - before).abs().max()
    assert 0 < moved < 0.1 * before.abs().max()


def test_features_give_what_pixels_give() -> None:
    for parts in SYSTEMS.values():
        model = build(parts)
        ids, images = sample(model, [(1, 2), (2, 2)])
        with torch.no_grad():
            given = model.as_features(images)
            torch.testing.assert_close(model(ids, images=given).logits, model(ids, images=images).logits)


# --- what does not go together ------------------------------------------------------------------------------


def cross(**fields: Any) -> dict[str, Any]:
    return LIKE_LLAMA | {"fusion": {"kind": "cross", **BLOCKS, **fields}}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "beyond the decoder": (cross(layers=[1, 4]), "fusion.layers: expected rising numbers"),
    "twice": (cross(layers=[1, 1]), "fusion.layers"),
    "none": (cross(layers=[]), "fusion.layers"),
    "heads": (cross(heads=5), "fusion.heads: expected a divisor of 32"),
    "groups": (cross(kv_heads=3), "fusion.kv_heads: expected a divisor of 4"),
    "no encoder": (
        {name: LIKE_LLAMA[name] for name in ("fusion", "layout")},
        "fusion.kind: cross needs an encoder",
    ),
    "no mark": (
        LIKE_LLAMA | {"layout": layout_of()},
        'layout.picture.mark: expected "image" where fusion is cross',
    ),
    "another mark": (
        LIKE_NVLM_X | {"layout": layout_of(mark="image", **TILED)},
        'layout.picture.mark: expected "tile"',
    ),
    "a mark in the stream": (
        SQUARE | {"layout": layout_of(mark="image")},
        'layout.picture.mark: expected "none"',
    ),
    "tiles in the stream": (
        LIKE_NVLM_H | {"layout": layout_of(**TILED)},
        "layout.picture.apart: expected true",
    ),
    "few tags": (
        LIKE_NVLM_H | {"fusion": {"kind": "both", **BLOCKS, "tags": [[1]]}},
        "fusion.tags: expected one for each of 4 tiles",
    ),
    "no whole": (
        LIKE_LLAMA | {"fusion": {"kind": "both", **BLOCKS}},
        "fusion.kind: both goes with views of the kind canvas",
    ),
    "mrope": (
        LIKE_LLAMA | {"positions": {"kind": "mrope", "sections": [1, 1, 2]}},
        "positions.kind: expected counted where fusion is cross",
    ),
    "row ends": (
        LIKE_LLAMA | {"layout": layout_of(mark="image", row_end=3)},
        "layout.picture.row_end: expected none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together(name: str) -> None:
    parts, line = WRONG[name]
    with pytest.raises(FieldError, match=line.replace(".", r"\.")):
        UniMMConfig(decoder=DECODER, **parts)


def test_images_that_do_not_fit_their_marks() -> None:
    model = build(LIKE_NVLM_X)
    ids, images = sample(model, [(2, 2)])
    keep = ids[0] != FEATURE
    keep[(~keep).nonzero()[0]] = True  # one of five marks
    with pytest.raises(ValueError, match="images: features: 5 given, but the tokens have room for 1"):
        model(ids[:, keep], images=images)


def test_lockstep_runs_every_block() -> None:
    start_alone()
    model = build(LIKE_LLAMA).train()
    ids = torch.randint(10, WORDS, (1, 6))
    labels = ids.clone()
    alone = model(ids, labels=labels).loss
    together = model(ids, labels=labels, lockstep=True)
    assert torch.equal(together.loss, alone)
    together.loss.backward()
    lacking = [
        name for name, p in model.named_parameters() if p.grad is None and "decoder.lm_head" not in name
    ]
    assert not [name for name in lacking if name.startswith(("fusion.", "connector.", "vision."))], lacking
    assert all(p.grad.abs().max() == 0 for n, p in model.named_parameters() if n.startswith("fusion."))
