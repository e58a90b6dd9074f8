"""Training images: the same by seed and index, never a family held out, and changed as asked."""

from __future__ import annotations

import numpy as np
import pytest

from unimm.data.emojiscenes import concepts
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.training.tokenizer import data
from unimm.training.tokenizer.data import TokenizerImages, augment_image, free_layout


def test_an_image_follows_from_seed_and_index() -> None:
    mixture = {"scenes": 0.5, "artwork": 0.5}
    one, same = TokenizerImages(3, 32, mixture, 0.5), TokenizerImages(3, 32, mixture, 0.5)
    for index in (7, 0, 1234567):
        image = one[index]["pixels"]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert np.array_equal(image, same[index]["pixels"])
    other = TokenizerImages(4, 32, mixture, 0.5)
    assert any(not np.array_equal(one[i]["pixels"], other[i]["pixels"]) for i in range(3))


def test_only_families_to_train_on_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[str] = set()
    for module in (concepts, data):
        real = module.load_artwork
        monkeypatch.setattr(
            module, "load_artwork", lambda family, real=real: opened.add(family) or real(family)
        )
    concepts.sprite.cache_clear()
    source = TokenizerImages(0, 32, {"scenes": 0.5, "artwork": 0.5}, 0.5)
    for index in range(150):
        source[index]
    assert opened == set(concepts.ARTWORK_FAMILIES)
    assert not opened & set(concepts.VENDOR_FAMILIES)


def test_mixture_and_augmentation_are_shares() -> None:
    plain = TokenizerImages(0, 32, {"scenes": 1.0}, 0.0)
    scenes = EmojiScenes("train", seed=0, size=32, length=100)
    assert all(np.array_equal(plain[i]["pixels"], scenes[i].render()) for i in range(20))
    aligned = TokenizerImages(0, 32, {"aligned": 1.0}, 0.0, stride=16)
    lattice = EmojiScenes("train", seed=0, size=32, length=100, lattice=16)
    assert all(np.array_equal(aligned[i]["pixels"], lattice[i].render()) for i in range(20))
    assert any(not np.array_equal(aligned[i]["pixels"], plain[i]["pixels"]) for i in range(20))
    changed = TokenizerImages(0, 32, {"scenes": 1.0}, 1.0)
    different = sum(not np.array_equal(changed[i]["pixels"], plain[i]["pixels"]) for i in range(40))
    assert different > 25
    artwork = TokenizerImages(0, 32, {"artwork": 1.0}, 0.0)
    assert not any(np.array_equal(artwork[i]["pixels"], plain[i]["pixels"]) for i in range(20))


def test_augmentation_keeps_form_and_luma_order() -> None:
    rng = np.random.default_rng(0)
    ramp = np.repeat(np.linspace(60, 180, 16, dtype=np.uint8)[:, None, None], 16, 1).repeat(3, 2)
    for _ in range(20):
        image = augment_image(ramp, rng)
        assert image.shape == ramp.shape and image.dtype == np.uint8 and image.flags.c_contiguous
        assert np.ptp(image.astype(int)) > 60  # a grey ramp has no hue to turn, and stays a ramp


def test_free_layouts_use_the_whole_canvas() -> None:
    rng = np.random.default_rng(0)
    ink = np.zeros((32, 32))
    for _ in range(60):
        image = free_layout(rng, 32).astype(int)
        ink += np.abs(image - np.median(image, axis=(0, 1))).sum(2) > 60
    assert (ink[2:-2, 2:-2] > 0).all()
