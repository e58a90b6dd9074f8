"""Experts of decoders: what a token runs through, what their routers add to a loss, and their small weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.models.test_decoders import tiny
from unimm.models.configuration import UniMMConfig
from unimm.models.decoders import DECODERS, decoder_config, read_decoder
from unimm.models.experts import (
    Routing,
    SmallExperts,
    idle_weights,
    router_losses,
    routing,
    stacked_experts,
)
from unimm.models.inputs import Rows
from unimm.models.modeling import UniMMModel
from unimm.models.quantization import Int4Linear, Int8Linear, QuantisedLinear, count_weights

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "aria_text")
LAYOUT = {"begin": None, "end": None, "feature": 3, "code": 60, "grid": (1, 1)}


def fields(kind: str) -> dict[str, Any]:
    """A small decoder of four experts, wide enough for the kernels of small weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    own = {"moe_num_experts": 4} if kind == "aria_text" else {}
    wide = {"moe_intermediate_size": 64} if "moe_intermediate_size" in tiny(kind) else {}
    return {**tiny(kind), **{name: size for name, size in sizes.items() if name in tiny(kind)}, **own, **wide}


def randomise(module: nn.Module) -> None:
    """Weights large enough that experts and routers differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def build(kind: str) -> UniMMModel:
    """A model of such a decoder alone."""
    model = UniMMModel(UniMMConfig(fields(kind), layout=dict(LAYOUT)))
    randomise(model)
    model.eval()
    return model


def test_these_are_all_that_have_experts() -> None:
    found = {kind: routing(decoder_config(read_decoder(tiny(kind)))) for kind in DECODERS}
    assert {kind for kind, routed in found.items() if routed} == set(KINDS)
    assert routing(decoder_config(read_decoder(fields("aria_text")))) == Routing(4, 2)
    assert routing(decoder_config(read_decoder(tiny("olmoe")))) == Routing(4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_runs_through_the_experts_that_it_is_sent_to(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(decoder_config(read_decoder(fields(kind))))
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    body, length = model.get_decoder(), 24
    assert len(list(stacked_experts(body))) == 2
    stream = torch.randn(1, length, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        body(inputs_embeds=stream)
    whole = sum(p.numel() for p in body.parameters()) - model.get_input_embeddings().weight.numel()
    heads = body.config.num_attention_heads * (getattr(body.config, "head_dim", None) or 32)
    attention = 4 * body.config.num_hidden_layers * heads * length**2
    expected = 2 * (whole - idle_weights(body)) * length + attention
    assert counter.get_total_flops() == pytest.approx(
        expected, rel=0.02
    )  # norms count as if they were matrices
    assert idle_weights(body) > 0.2 * whole


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_is_transformers_and_z_as_published(masked: bool) -> None:
    torch.manual_seed(0)
    logits: Any = tuple(torch.randn(12, 5, requires_grad=True) for _ in range(3))
    real = torch.rand(2, 6) > 0.3 if masked else None
    found = router_losses(logits, 2, None if real is None else real.flatten())
    expected = load_balancing_loss_func(logits, 5, 2, None if real is None else real.long())
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(found.balance, expected)
    ours, theirs = (torch.autograd.grad(loss, logits) for loss in (found.balance, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    kept = torch.stack(logits)[:, real.flatten()] if real is not None else torch.stack(logits)
    torch.testing.assert_close(found.z, kept.exp().sum(-1).log().pow(2).mean())
    even = router_losses([torch.eye(4).repeat(3, 1)], 1)
    assert even.balance.item() == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_the_losses_of_its_routers_where_asked(kind: str) -> None:
    model = build(kind)
    ids = torch.arange(5, 25).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = model(input_ids=ids, attention_mask=mask, labels=ids)
    found = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert plain.router is None
    assert torch.equal(plain.loss, found.loss)
    if kind != "aria_text":  # for which transformers has none
        theirs = model.decoder(input_ids=ids, attention_mask=mask, output_router_logits=True)
        torch.testing.assert_close(found.router.balance, theirs.aux_loss)
    # samples in one row, as training packs them, count as the same in two
    rows = Rows(
        torch.cat([torch.arange(7), torch.arange(10), torch.zeros(2, dtype=torch.int64)])[None],
        torch.tensor([[0] * 7 + [1] * 10 + [-1] * 2]),
        torch.zeros(1, 19, dtype=torch.int64),
    )
    packed = torch.cat([ids[0, 3:], ids[1], torch.zeros(2, dtype=torch.int64)])[None]
    again = model(input_ids=packed, rows=rows, labels=packed, output_router_logits=True)
    torch.testing.assert_close(again.router.balance, found.router.balance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.router.z, found.router.z, rtol=1e-4, atol=1e-5)


def test_gradients_of_routers_are_the_same_with_checkpointing() -> None:
    found = []
    for wanted in (False, True):
        model = build("aria_text").train()
        if wanted:
            model.decoder.gradient_checkpointing_enable()
        ids = torch.arange(5, 25)[None]
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        (output.router.balance + output.router.z).backward()
        found.append(model.decoder.get_decoder().layers[0].mlp.router.weight.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    again = UniMMModel.from_pretrained(tmp_path).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


METHODS = {"int8": (Int8Linear, 0.02), "int4": (Int4Linear, 0.2)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_small_experts_are_near_those_of_floats(kind: str, method: str, tmp_path: Path) -> None:
    model = build(kind)
    whole = count_weights(model)
    ids = torch.arange(5, 25).view(2, 10)
    block = next(iter(stacked_experts(model)))
    hidden = torch.randn(9, 64)
    index, weights = torch.tensor([[0, 3]] * 4 + [[2, 1]] * 5), torch.rand(9, 2)
    before = block(hidden, index, weights)
    model.quantise(method)
    assert not list(stacked_experts(model)) and count_weights(model) == whole
    small = [module for module in model.modules() if isinstance(module, SmallExperts)]
    assert len(small) == 2
    assert {type(one) for one in small[0].modules() if isinstance(one, QuantisedLinear)} == {
        METHODS[method][0]
    }
    error = (small[0](hidden, index, weights) - before).norm() / before.norm()
    assert 0 < error < METHODS[method][1]
    together = model(input_ids=ids).logits
    alone = torch.cat([model(input_ids=one[None]).logits for one in ids])
    assert torch.allclose(together, alone, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = UniMMModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, together)
