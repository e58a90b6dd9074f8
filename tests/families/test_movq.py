"""Emu3's vision tokenizer against transformers: codes, images, films, and every tensor there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

from tests.families.emu3_checkpoints import original_tokenizer
from unimm.errors import UserError
from unimm.families.movq import tokenizer_map, tokenizer_options
from unimm.models.image_tokenizers.movq import MoVQConfig, MoVQTokenizer


@pytest.fixture(scope="module")
def theirs() -> Emu3VQVAE:
    """Three levels, attention on the last, everything random, statistics too."""
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=90, base_channels=32, channel_multiplier=[1, 2, 2], num_res_blocks=1, attn_resolutions=[2],
        hidden_size=64, attn_implementation="eager",
    )  # fmt: skip
    model = Emu3VQVAE(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1:
                tensor.add_(torch.rand_like(tensor) * 0.3)
            elif "quantize" in name:
                tensor.normal_()
    return model


@pytest.fixture(scope="module", params=["transformers", "original"])
def ours(request: pytest.FixtureRequest, theirs: Emu3VQVAE) -> MoVQTokenizer:
    state = theirs.state_dict()
    given = state if request.param == "transformers" else original_tokenizer(state)
    model = MoVQTokenizer(MoVQConfig(**tokenizer_options(theirs.config.to_dict(), "config.json"))).eval()
    map_ = tokenizer_map(request.param, len(model.config.block_out_channels))
    entries, kept = map_.plan(model.state_dict(), given, "here")
    assert not kept
    model.load_state_dict({e.ours: e.op.to_ours([given[name] for name in e.theirs]) for e in entries})
    back: dict[str, Tensor] = {}
    for entry in map_.returned(model.state_dict()):
        parts = entry.op.to_theirs(model.state_dict()[entry.ours], len(entry.theirs))
        back |= dict(zip(entry.theirs, parts, strict=True))
    assert back.keys() == given.keys() and all(torch.equal(back[name], given[name]) for name in given)
    return model


@torch.no_grad()
def test_images_to_codes(ours: MoVQTokenizer, theirs: Emu3VQVAE) -> None:
    pixels = torch.rand(3, 3, 16, 24) * 2 - 1
    sizes = torch.tensor([[16, 24]] * 3)
    expected = torch.stack(theirs.encode(pixels, sizes).image_tokens)
    codes = ours.encode(pixels)
    assert torch.equal(codes, expected) and len(codes.unique()) > 7


@torch.no_grad()
def test_codes_to_images(ours: MoVQTokenizer, theirs: Emu3VQVAE) -> None:
    codes = torch.randint(90, (2, 5, 3))
    expected = theirs.decode(codes)
    assert expected.std() > 0.1
    assert (ours.decode(codes) - expected.clamp(-1, 1)).abs().max() < 1e-4


@torch.no_grad()
def test_films(ours: MoVQTokenizer, theirs: Emu3VQVAE) -> None:
    film = torch.rand(2, 8, 3, 16, 12) * 2 - 1
    expected = torch.stack(theirs.encode(film, torch.tensor([[16, 12]] * 2)).image_tokens)
    codes = ours.encode_frames(film)
    # transformers cuts films to their size along time and height, as if they were images
    assert codes.shape == (2, 2, 4, 3) and torch.equal(codes[:, :, : expected.shape[2]], expected)
    shown = theirs.decode(codes)
    assert (ours.decode_frames(codes) - shown.clamp(-1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"embed_dim": 8}, "embed_dim: 8 is not supported, only 4"),
        ({"temporal_downsample_factor": 3}, "temporal_downsample_factor: 3, expected a power of 2"),
    ],
)
def test_what_no_published_tokenizer_has_is_refused(change: dict[str, int], line: str) -> None:
    config = {**Emu3VQVAEConfig().to_dict(), **change}
    with pytest.raises(UserError, match=f"config.json: {line}"):
        tokenizer_options(config, "config.json")


def test_the_published_size_builds() -> None:
    with torch.device("meta"):
        model = MoVQTokenizer(MoVQConfig(**tokenizer_options(Emu3VQVAEConfig().to_dict(), "")))
        reference = Emu3VQVAE(Emu3VQVAEConfig())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in reference.parameters())
