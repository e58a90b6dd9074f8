"""Understanding encoders: what enters, what comes out."""

from __future__ import annotations

import pytest
import torch

from unimm.models.parts import NaflexEncoderConfig, TimmEncoderConfig
from unimm.models.stems import STEMS, scaled_conv_stem
from unimm.models.vision import ConvStem, NaflexTower, VisionTower, create_encoder
from unimm.sections import FieldError

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_features_of_every_patch(stem: str) -> None:
    config = TimmEncoderConfig("vit_base_patch16_siglip_224", 16, 16, {**SIZES, "stem": stem})
    tower = VisionTower(config).eval()
    features = tower(torch.rand(3, 3, 32, 32))
    assert features.shape == (3, 16, 16) and features.isfinite().all()
    assert isinstance(tower.model.patch_embed, ConvStem) == (stem == "conv")


def test_a_stem_sees_its_own_patch_and_its_rim_only() -> None:
    torch.manual_seed(0)
    stem = create_encoder("vit_base_patch16_siglip_224", stem="conv", **SIZES).patch_embed
    pixels = torch.rand(1, 3, 32, 32)
    changed = pixels.clone()
    changed[..., :4, :4] = 0
    moved = (stem(pixels) - stem(changed)).abs().amax(-1)[0].view(4, 4) > 1e-6
    assert moved[0, 0] and not moved[2:].any() and not moved[:, 2:].any()


def test_a_stem_wants_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="patch_size: 12"):
        create_encoder(
            "vit_base_patch16_siglip_224", stem="conv", **{**SIZES, "img_size": 36, "patch_size": 12}
        )


@pytest.mark.parametrize("stem", ["patch", *STEMS])
def test_any_size_through_any_stem(stem: str) -> None:
    torch.manual_seed(0)
    tower = NaflexTower(NaflexEncoderConfig(16, 1, 2, 8, stem=stem)).eval()  # type: ignore[arg-type]
    features = tower(torch.rand(2, 3, 24, 40), torch.tensor([[24, 40], [16, 8]]))
    assert features.shape == (3 * 5 + 2 * 1, 16) and features.isfinite().all()
    assert features[:15].std(0).min() > 0, "every patch has features of its own"


@pytest.mark.parametrize(("patch", "width"), [(12, 16), (8, 18), (1, 16)])
@pytest.mark.parametrize("stem", list(STEMS))
def test_a_stem_of_any_size_wants_a_power_of_two(stem: str, patch: int, width: int) -> None:
    with pytest.raises(FieldError, match=f"patch: {patch}; a convolutional stem needs a power of 2"):
        NaflexEncoderConfig(width, 1, 2, patch, stem=stem)  # type: ignore[arg-type]


def test_standardised_weights_keep_the_scale_of_a_signal() -> None:
    torch.manual_seed(0)
    stem = scaled_conv_stem(16, 3, 128)
    scales = []
    with torch.no_grad():
        signal = torch.randn(4, 3, 256, 256)
        for layer in stem:
            signal = layer(signal)
            scales.append(signal.square().mean().sqrt().item())
    assert len(stem) == 16 and min(scales) > 0.3 and max(scales) < 3
