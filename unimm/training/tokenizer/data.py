"""What a tokenizer trains on: scenes, freely laid artwork, and colour and orientation changed at random.

A tokenizer must draw well what it has never seen, so it sees more than the scenes that a model speaks of:
every drawing of the training families at any place, mirrored, turned and in other colours. The families held
out for evaluation are never opened.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from unimm.data.emojiscenes.concepts import load_artwork, sprite
from unimm.data.emojiscenes.scenes import ARTWORK_FAMILIES, BACKGROUNDS, LATTICE, EmojiScenes
from unimm.images import Pixels

# `aligned`: scenes whose objects lie on the tokenizer's own grid
IMAGE_KINDS = ("scenes", "aligned", "artwork")

# luma and two chroma axes; a turn of the chroma plane changes hue and keeps brightness
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
_FROM_YIQ = np.linalg.inv(_TO_YIQ).astype(np.float32)


def free_layout(rng: np.random.Generator, size: int) -> Pixels:
    """Draw one to four drawings of one training family, any concept, anywhere, on any plain colour."""
    family = ARTWORK_FAMILIES[rng.integers(len(ARTWORK_FAMILIES))]
    names = sorted(load_artwork(family))
    if rng.random() < 0.5:
        ground = np.array(list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))])
    else:
        ground = rng.integers(0, 256, 3)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = ground
    count = int(rng.integers(1, 5))
    for _ in range(count):
        largest = size * 7 // 8 if count == 1 else size // 2
        # few sizes, so that resized drawings are reused
        side = int(rng.integers(size // 4, largest + 1)) // 4 * 4
        x, y = rng.integers(0, size - side + 1, 2)
        colour, alpha = sprite(family, names[rng.integers(len(names))], side)
        patch = canvas[y : y + side, x : x + side]
        patch *= 1 - alpha
        patch += colour
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def augment_image(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirror or turn by quarters, then change hue, saturation, contrast and brightness; each at random."""
    if rng.random() < 0.5:
        pixels = np.rot90(pixels, int(rng.integers(4)))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.5:
        angle, saturation = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.3)
        cos, sin = saturation * np.cos(angle), saturation * np.sin(angle)
        turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], np.float32)
        matrix = (_FROM_YIQ @ turn @ _TO_YIQ * rng.uniform(0.7, 1.2)).astype(np.float32)
        shifted = pixels.reshape(-1, 3) @ matrix.T + np.float32(rng.uniform(-30, 30))
        pixels = np.clip(shifted, 0, 255).astype(np.uint8).reshape(pixels.shape)
    return np.ascontiguousarray(pixels)


class TokenizerImages:
    """Endless random-access source of training images.

    Args:
        seed: with the index it decides everything about an image.
        size: pixels a side.
        mixture: share of each of `IMAGE_KINDS`.
        augmented: share of images that `augment_image` changes.
        stride: pixels a side that a code stands for, which `aligned` scenes are laid on.
    """

    def __init__(
        self, seed: int, size: int, mixture: dict[str, float], augmented: float, stride: int = LATTICE
    ) -> None:
        self.scenes = EmojiScenes("train", seed=seed, size=size, length=2**62)
        self.aligned = EmojiScenes(
            "train", seed=seed, size=size, length=2**62, lattice=math.lcm(stride, LATTICE)
        )
        self.seed, self.size, self.augmented = seed, size, augmented
        total = sum(mixture.values())
        self.shares = [mixture.get(kind, 0.0) / total for kind in IMAGE_KINDS]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 7, index])  # 7: a stream of its own beside the scenes'
        kind = IMAGE_KINDS[rng.choice(len(IMAGE_KINDS), p=self.shares)]
        if kind == "artwork":
            pixels = free_layout(rng, self.size)
        else:
            pixels = (self.scenes if kind == "scenes" else self.aligned)[index].render()
        return {"pixels": augment_image(pixels, rng) if rng.random() < self.augmented else pixels}
