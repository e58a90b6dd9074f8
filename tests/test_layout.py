"""The grammar of images in the stream."""

from __future__ import annotations

import torch

from unimm.layout import ImageLayout

LAYOUT = ImageLayout(begin=5, end=6, feature=7, code=8, features=4, grid=(2, 3))


def test_images_to_understand() -> None:
    assert LAYOUT.understanding_tokens() == [5, 7, 7, 7, 7, 6]


def test_images_to_generate() -> None:
    assert LAYOUT.generation_tokens() == [5, 8, 8, 8, 8, 8, 8, 6]
    assert LAYOUT.drawing_steps(1, 2) == [8, 8]


def test_positions() -> None:
    ids = torch.tensor([[5, 7, 8, 1]])
    assert LAYOUT.feature_positions(ids).tolist() == [[False, True, False, False]]
    assert LAYOUT.code_positions(ids).tolist() == [[False, False, True, False]]
