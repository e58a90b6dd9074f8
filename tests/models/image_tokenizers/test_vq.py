"""The image tokenizer: shapes and ranges, errors, saving, frozen codes, and sizes of known models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from unimm.models.image_tokenizers.vq import ImageTokenizer, ImageTokenizerConfig


def tiny(**changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "image_size": 32,
        "patch_size": 2,
        "block_out_channels": (8, 16, 16),
        "latent_channels": 8,
        "codebook_size": 32,
        "codebook_dim": 4,
    }
    return ImageTokenizer(ImageTokenizerConfig(**(settings | changes))).eval()  # type: ignore[arg-type]


def images(count: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 1},
        {"attention_levels": (2,), "mid_attention": True},
        {"linear_shortcut": True, "latent_norm": True},
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_codes_and_pixels_have_the_promised_form(changes: dict[str, object], size: tuple[int, int]) -> None:
    tokenizer = tiny(**changes)
    stride = tokenizer.stride
    codes = tokenizer.encode(images(3, *size))
    assert codes.shape == (3, size[0] // stride, size[1] // stride)
    assert codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 32
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (3, 3, *size)
    assert pixels.dtype == torch.float32 and pixels.abs().max() <= 1


def test_stride_follows_patch_and_levels() -> None:
    assert ImageTokenizerConfig(patch_size=4, block_out_channels=[8, 8]).stride == 8
    assert ImageTokenizerConfig(image_size=64, patch_size=1, block_out_channels=[8] * 4).grid_size == 8


def test_decoding_codes_is_the_second_half_of_a_forward_pass() -> None:
    tokenizer = tiny()
    with torch.no_grad():
        whole = tokenizer(images())
    assert torch.equal(whole.codes, tokenizer.encode(images()))
    # not to the bit: code vectors are brought to length 1 once more
    torch.testing.assert_close(whole.pixels.clamp(-1, 1), tokenizer.decode(whole.codes), atol=1e-5, rtol=0)


def test_a_code_is_placed_where_it_belongs() -> None:
    """Changing one code changes the image around its own square most, in a grid that is not square."""
    tokenizer = tiny()
    codes = torch.zeros(1, 4, 8, dtype=torch.long)
    other = codes.clone()
    other[0, 1, 6] = 9
    change = (tokenizer.decode(codes) - tokenizer.decode(other)).abs().sum(1)[0]  # [32, 64]
    by_square = change.reshape(4, 8, 8, 8).sum((1, 3))  # [4, 8]
    assert by_square.argmax() == 1 * 8 + 6


def test_images_do_not_depend_on_their_neighbours() -> None:
    tokenizer = tiny()
    together = tokenizer.encode(images(4))
    assert torch.equal(together, torch.cat([tokenizer.encode(image[None]) for image in images(4)]))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (torch.zeros(1, 3, 32, 36), "multiple of 8"),
        (torch.zeros(1, 3, 31, 32), "multiple of 8"),
        (torch.zeros(1, 3, 0, 32), "multiple of 8"),
        (torch.zeros(1, 4, 32, 32), r"\[B, 3, H, W\]"),
        (torch.zeros(3, 32, 32), r"\[B, 3, H, W\]"),
    ],
)
def test_encode_refuses_what_does_not_fit(pixels: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny().encode(pixels)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.full((1, 4, 4), 32), r"outside 0\.\.31"),
        (torch.full((1, 4, 4), -1), r"outside 0\.\.31"),
        (torch.zeros(1, 16, dtype=torch.long), r"\[B, h, w\]"),
        (torch.zeros(1, 4, 4), "integers"),
    ],
)
def test_decode_refuses_what_does_not_fit(codes: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny().decode(codes)


def test_channels_must_fit_the_groups() -> None:
    with pytest.raises(
        ValueError, match=r"block_out_channels\[1\]: expected a multiple of norm_num_groups \(8\), got 12"
    ):
        tiny(block_out_channels=(8, 12, 16))


@pytest.mark.parametrize("changes", [{}, {"kmeans_init": True, "latent_norm": True, "linear_shortcut": True}])
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path: Path, changes: dict[str, object]) -> None:
    tokenizer = tiny(**changes)
    tokenizer.train()(images(8))  # moves the codebook, so that its averages are not what they start as
    tokenizer.eval().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, ImageTokenizer) and not loaded.training
    read, written = (config.to_dict() for config in (AutoConfig.from_pretrained(tmp_path), tokenizer.config))
    assert {**read, "_name_or_path": ""} == {**written, "_name_or_path": ""}
    assert loaded.state_dict().keys() == tokenizer.state_dict().keys()
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    codes = tokenizer.encode(images())
    assert torch.equal(loaded.encode(images()), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    trained = loaded.train()(
        images()
    )  # the constant that is not saved is zero again, so the loss is a number
    assert trained.commitment.isfinite()


def test_encode_leaves_the_codebook_alone_even_in_training_mode() -> None:
    parent = nn.ModuleDict({"image_tokenizer": tiny(latent_norm=True)}).train()
    tokenizer = parent["image_tokenizer"]
    assert isinstance(tokenizer, ImageTokenizer)
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    tokenizer.encode(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())
    assert tokenizer.quantize.training and tokenizer.latent_norm.training


def test_blend_goes_from_plain_latents_to_codes() -> None:
    tokenizer = tiny()
    with torch.no_grad():
        latents = tokenizer.latents(images())
        plain, coded = tokenizer(images(), blend=0.0), tokenizer(images())
        directions = latents / latents.norm(dim=1, keepdim=True)
        torch.testing.assert_close(plain.pixels, tokenizer.pixels(directions))
        between = tokenizer(images(), blend=0.5).pixels
    assert not torch.allclose(plain.pixels, coded.pixels)
    assert (between - coded.pixels).norm() < (plain.pixels - coded.pixels).norm()


def test_latent_norm_spreads_the_codes() -> None:
    """Latents that share a large mean point the same way; standardised they use the whole codebook."""
    used = {}
    for latent_norm in (False, True):
        tokenizer = tiny(latent_norm=latent_norm)
        with torch.no_grad():
            tokenizer.quant_conv.bias += 20
            codes = tokenizer.train()(images(16)).codes
        used[latent_norm] = len(codes.unique())
    assert used[True] >= 3 * used[False]


def test_training_moves_the_codebook_and_reaches_the_encoder() -> None:
    tokenizer = tiny().train()
    before = tokenizer.quantize.codebook.clone()
    output = tokenizer(images())
    (output.pixels.square().mean() + output.commitment).backward()
    assert not torch.equal(before, tokenizer.quantize.codebook)
    assert torch.allclose(tokenizer.quantize.codebook.norm(dim=-1), torch.ones(32), atol=1e-5)
    gradient = tokenizer.encoder.conv_in.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_llamagen_vq16_is_a_configuration() -> None:
    """LlamaGen's VQ-16 as published: 71.88M parameters, 16 pixels a code, 16,384 codes of dimension 8."""
    config = ImageTokenizerConfig(
        image_size=384,
        block_out_channels=(128, 128, 256, 256, 512),
        layers_per_block=2,
        attention_levels=(4,),
        mid_attention=True,
        norm_num_groups=32,
        latent_channels=256,
        codebook_size=16_384,
        codebook_dim=8,
    )
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    # the codebook is a parameter there and a buffer here
    count = sum(weight.numel() for weight in tokenizer.parameters()) + tokenizer.quantize.codebook.numel()
    assert round(count / 1e6, 2) == 71.88
    assert (config.stride, config.grid_size) == (16, 24)
