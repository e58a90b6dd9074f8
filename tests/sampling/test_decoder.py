"""The decoder run step by step gives what its own forward gives."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.sampling import decoder
from unimm.sampling.decoder import LlamaSteps, Steps, make_steps


@pytest.fixture
def model(tiny_model: UniMM) -> UniMMModel:
    return copy.deepcopy(tiny_model.model)  # its decoder is exchanged


def _swapped(model: UniMMModel, **options: object) -> UniMMModel:
    """The model with a decoder of another shape."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 300}
    config = LlamaConfig(**sizes, initializer_range=0.3, **options)
    decoder = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) * 0.3)
    model.decoder = decoder
    return model


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_attention_heads": 2, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
        {
            "num_attention_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
        },
    ],
)
@torch.no_grad()
def test_same_as_the_whole_forward(
    model: UniMMModel,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    padded: bool,
    joined: bool,
) -> None:
    monkeypatch.setattr(decoder, "JOINED", 2**26 if joined else 0)
    model = _swapped(model, **options)
    stream = torch.randn(3, 12, 32)
    mask = torch.ones(3, 5, dtype=torch.long)
    if padded:
        mask[0, :3] = mask[2, :1] = 0
    run, slow = (
        make_steps(model, mask, 12),
        Steps(model, model.decoder.get_decoder(), torch.nn.functional.pad(mask, (0, 7), value=1)),
    )
    assert isinstance(run, LlamaSteps)
    for start, end in ((0, 5), (5, 6), (6, 8), (8, 9), (9, 12)):
        got, expected = run(stream[:, start:end]), slow(stream[:, start:end])
        assert expected.std() > 0.1
        assert (got - expected).abs().max() < 1e-4


def test_other_decoders_run_through_their_own_forward(model: UniMMModel) -> None:
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    model.decoder = AutoModelForCausalLM.from_config(config).eval()
    run = make_steps(model, torch.ones(2, 3, dtype=torch.long), 5)
    assert type(run) is Steps
    assert run(torch.randn(2, 3, 32)).shape == run(torch.randn(2, 1, 32)).shape == (2, 32)
