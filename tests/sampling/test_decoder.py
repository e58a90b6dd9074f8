"""The decoder over a row cache gives what its own forward gives, for rows of unlike lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PersimmonConfig,
    Qwen2Config,
)

from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.sampling import decoder
from unimm.sampling.cache import RowCache, RowsAt
from unimm.sampling.decoder import LlamaRunner, Runner
from unimm.sampling.runners import ExpertsRunner, PersimmonRunner, make_runner

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 300}
LENGTHS = [9, 12, 5]
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 500.0}


@pytest.fixture
def model(tiny_model: UniMM) -> UniMMModel:
    return copy.deepcopy(tiny_model.model)  # its decoder is exchanged


def _swapped(model: UniMMModel, config: Any) -> UniMMModel:
    """The model with another decoder."""
    torch.manual_seed(0)
    swapped = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in swapped.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) * 0.3)
    model.decoder = swapped
    return model


@torch.no_grad()
def _check(run: Runner, model: UniMMModel) -> None:
    """Read three rows of unlike lengths piece by piece, each piece as wide as its longest."""
    streams = [torch.randn(length, 32) for length in LENGTHS]
    whole = model.decoder.get_decoder()
    expected = [whole(inputs_embeds=stream[None]).last_hidden_state[0] for stream in streams]
    cache = RowCache(run.layers_count)
    cache.reserve(3, 24)
    filled, got = [0, 0, 0], [[], [], []]  # type: ignore[var-annotated]
    for widths in ([4, 1, 3], [1, 1, 1], [1, 6, 1], [3, 4, 0]):
        at = RowsAt(0, filled, max(widths), torch.device("cpu"))
        pieces = [
            _padded(stream[start : start + width], max(widths))
            for stream, start, width in zip(streams, filled, widths, strict=True)
        ]
        hidden = run(cache, at, torch.stack(pieces))
        for row, width in enumerate(widths):
            got[row].append(hidden[row, :width])
            filled[row] += width
    assert filled == LENGTHS
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.std() > 0.1
        assert (torch.cat(mine) - theirs).abs().max() < 1e-4


def _padded(rows: Tensor, width: int) -> Tensor:
    """Filled up with what must not be seen."""
    return torch.cat([rows, torch.full((width - len(rows), rows.shape[1]), 9.0)])


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, initializer_range=0.3, num_attention_heads=4, num_key_value_heads=2),
        LlamaConfig(
            **SIZES,
            initializer_range=0.3,
            num_attention_heads=2,
            attention_bias=True,
            mlp_bias=True,
            head_dim=24,
        ),
        LlamaConfig(
            **SIZES,
            initializer_range=0.3,
            num_attention_heads=4,
            rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
        ),
        LlamaConfig(
            **SIZES,
            initializer_range=0.3,
            num_attention_heads=4,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "rope_theta": 500.0,
            },
        ),
        Qwen2Config(**SIZES, initializer_range=0.3, num_attention_heads=4, num_key_value_heads=2),
        Qwen2Config(
            **SIZES,
            initializer_range=0.3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters=DYNAMIC,
        ),
        MistralConfig(
            **SIZES, initializer_range=0.3, num_attention_heads=4, num_key_value_heads=2, sliding_window=None
        ),
    ],
    ids=["grouped", "biases", "rope", "yarn", "qwen2", "dynamic", "mistral"],
)
def test_llama_like_layers_run_directly(
    model: UniMMModel, monkeypatch: pytest.MonkeyPatch, config: Any, joined: bool
) -> None:
    monkeypatch.setattr(decoder, "JOINED", 2**26 if joined else 0)
    run = make_runner(_swapped(model, config))
    assert isinstance(run, LlamaRunner)
    _check(run, model)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (PersimmonRunner, PersimmonConfig(**SIZES, initializer_range=0.3, num_attention_heads=4)),
        (
            PersimmonRunner,
            PersimmonConfig(
                **SIZES,
                initializer_range=0.3,
                num_attention_heads=2,
                qk_layernorm=False,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
            ),
        ),
        (
            ExpertsRunner,
            AriaTextConfig(
                **SIZES,
                initializer_range=0.3,
                num_attention_heads=4,
                num_key_value_heads=2,
                moe_num_experts=7,
                moe_topk=3,
                moe_num_shared_experts=2,
            ),
        ),
    ],
    ids=["persimmon", "persimmon without norms of heads", "aria"],
)
def test_layers_that_nearly_are_llamas_run_directly(
    model: UniMMModel, monkeypatch: pytest.MonkeyPatch, kind: type[Runner], config: Any, joined: bool
) -> None:
    monkeypatch.setattr(decoder, "JOINED", 2**26 if joined else 0)
    run = make_runner(_swapped(model, config))
    assert type(run) is kind
    _check(run, model)


@torch.no_grad()
def test_a_rotary_table_that_grows_with_the_length_is_not_kept(model: UniMMModel) -> None:
    """Beyond the length that was trained, each pass turns by its own length, as in the decoder's own forward."""
    config = Qwen2Config(
        **SIZES,
        initializer_range=0.3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        rope_parameters=DYNAMIC,
    )
    _swapped(model, config)
    body = model.decoder.get_decoder()
    untouched = copy.deepcopy(body)
    lean = make_runner(model)
    assert type(lean) is LlamaRunner
    # the second row does not turn as far as the one before it
    for passes in (((0, 5), (5, 1), (6, 1), (7, 1), (8, 1), (9, 4)), ((0, 7), (7, 2))):
        runners = (lean, Runner(copy.deepcopy(untouched)))
        caches = [RowCache(run.layers_count) for run in runners]
        for cache in caches:
            cache.reserve(1, 24)
        for start, width in passes:
            stream = torch.randn(1, width, 32)
            at = RowsAt(0, [start], width, torch.device("cpu"))
            mine, theirs = (run(cache, at, stream) for run, cache in zip(runners, caches, strict=True))
            assert (mine - theirs).abs().max() < 1e-4
    assert body.rotary_emb.inv_freq.ne(body.rotary_emb.original_inv_freq).any()


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(
            **SIZES, initializer_range=0.3, num_attention_heads=4, num_key_value_heads=2, sliding_window=3
        ),
        MixtralConfig(
            **SIZES,
            initializer_range=0.3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        ),
        GPTNeoXConfig(**SIZES, initializer_range=0.3, num_attention_heads=4),
        Gemma3TextConfig(
            **SIZES,
            initializer_range=0.3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ],
    ids=["sliding", "experts", "gpt-neox", "two kinds of layers"],
)
def test_other_decoders_run_through_their_own_forward(model: UniMMModel, config: Any) -> None:
    run = make_runner(_swapped(model, config))
    assert type(run) is Runner
    _check(run, model)
