"""The grammar of images in the stream."""

from __future__ import annotations

import torch

from unimm.models.layout import ImageLayout

LAYOUT = ImageLayout(begin=5, end=6, feature=7, code=8, grid=(2, 3))


def test_images_to_understand() -> None:
    assert LAYOUT.understanding(2, 2) == [[5], [7, 7, 7, 7], [6]]


def test_images_to_generate() -> None:
    assert LAYOUT.opening(2, 3) == [[5]]
    assert LAYOUT.drawing_steps() == [8] * 6
    assert LAYOUT.drawing_steps(1, 2) == [8, 8]


SHARED = ImageLayout(
    begin=5, end=6, feature=7, code=20, grid=(2, 3), codes=10, wrapper=8, end_of_line=9, end_of_frame=10
)  # fmt: skip


def test_codes_that_are_tokens() -> None:
    assert SHARED.opening(2, 3) == [[5], "2*3", [8]]
    assert SHARED.understanding(2, 3) == [[5], "2*3", [8], [7] * 8, [10, 6]]
    assert SHARED.drawing_steps(2, 1) == [20, 9, 20, 9]
    assert SHARED.tokens(torch.tensor([[0, 9], [1, 2]])).tolist() == [20, 29, 9, 21, 22, 9]
    assert SHARED.code_positions(torch.tensor([19, 20, 29, 30])).tolist() == [False, True, True, False]


def test_positions() -> None:
    ids = torch.tensor([[5, 7, 8, 1]])
    assert LAYOUT.feature_positions(ids).tolist() == [[False, True, False, False]]
    assert LAYOUT.code_positions(ids).tolist() == [[False, False, True, False]]
