"""Understanding encoders: what enters, what comes out."""

from __future__ import annotations

import pytest
import torch

from unimm.models.parts import TimmEncoderConfig
from unimm.models.vision import ConvStem, VisionTower, create_encoder

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
