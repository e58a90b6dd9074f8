"""The survey's pixels: our views against what the published processors give, whose patches are put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

import unimm
from tests.families.llama_vision_checkpoints import LLAMA_VISION, RATIOS
from tests.families.nvlm_checkpoints import NVLM
from tests.families.pixtral_checkpoints import PIXTRAL
from tests.families.qwen2_vl_checkpoints import QWEN2_VL
from tests.families.survey import Inputs, Oracle, Reference, picture
from unimm.models.inputs import Images
from unimm.pipeline import UniMM

LEVEL = 1 / 255  # of a colour between 0 and 1
# width and height: small, larger than every limit, wide, high, a square, an odd ratio, a line, and a single pixel
SIZES = [
    (37, 91),
    (1300, 450),
    (300, 133),
    (61, 900),
    (64, 64),
    (45, 30),
    (13, 200),
    (100, 99),
    (1, 1),
    (29, 28),
]


Seen = list[list[Tensor]]
"""Of each image its views, normalised: float [3, h, w]."""


def pixtral(inputs: Inputs, oracle: Oracle) -> Seen:
    """Images filled up to the largest, and their sizes."""
    rows = zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True)
    return [[pixels[:, :height, :width]] for pixels, (height, width) in rows]


def qwen2_vl(inputs: Inputs, oracle: Oracle) -> Seen:
    """Patches of two frames, in squares of those that make a token."""
    config = oracle.model.config.vision_config
    patch, frames, merge = config.patch_size, config.temporal_patch_size, config.spatial_merge_size
    grids = inputs["image_grid_thw"].tolist()
    views: Seen = []
    patches = inputs["pixel_values"].split([t * rows * columns for t, rows, columns in grids])
    for own, (times, rows, columns) in zip(patches, grids, strict=True):
        assert times == 1
        squares = own.view(rows // merge, columns // merge, merge, merge, 3, frames, patch, patch)
        film = squares.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(frames, 3, rows * patch, columns * patch)
        assert all(torch.equal(frame, film[0]) for frame in film)
        views.append([film[0]])
    return views


def nvlm(inputs: Inputs, oracle: Oracle) -> Seen:
    """Tiles, and how many each image has."""
    counts = inputs["num_patches"].tolist()
    return [list(own) for own in inputs["pixel_values"].split(counts)]


def llama_vision(inputs: Inputs, oracle: Oracle) -> Seen:
    """Tiles filled up with zeros to the most, and the arrangement that each image has."""
    (pixels,), (ids,) = inputs["pixel_values"], inputs["aspect_ratio_ids"].tolist()
    counts = [rows * columns for rows, columns in (RATIOS[number - 1] for number in ids)]
    assert all(not own[count:].any() for own, count in zip(pixels, counts, strict=True))
    return [list(own[:count]) for own, count in zip(pixels, counts, strict=True)]


Unpacked = Callable[[Inputs, Oracle], Seen]
PROCESSORS: tuple[tuple[Reference, Unpacked], ...] = (
    (PIXTRAL, pixtral),
    (QWEN2_VL, qwen2_vl),
    (NVLM, nvlm),
    (LLAMA_VISION, llama_vision),
)
CASES = [(reference, layout, unpacked) for reference, unpacked in PROCESSORS for layout in reference.layouts]


@dataclasses.dataclass
class Case:
    """A checkpoint as the reference and as ours."""

    oracle: Oracle
    unpacked: Unpacked
    um: UniMM


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    reference, layout, unpacked = request.param
    folder = tmp_path_factory.mktemp(reference.name) / layout
    oracle = reference.write(folder, layout)
    return Case(oracle, unpacked, unimm.load(folder, device="cpu"))


def ours(images: Images | None) -> Seen:
    """What our processor gives, without what views are filled up with."""
    assert images is not None and images.pixels is not None
    sizes = images.view_sizes()
    cut = [pixels[:, :height, :width] for pixels, (height, width) in zip(images.pixels, sizes, strict=True)]
    counts = [1] * len(cut) if images.views is None else images.views.tolist()
    views = iter(cut)
    return [[next(views) for _ in range(count)] for count in counts]


def check(case: Case, got: Seen, expected: Seen) -> None:
    """Compare views, in the levels that colours had before they were normalised."""
    views = case.um.model.config.views_config()
    assert views is not None
    std = torch.tensor(views.std).view(3, 1, 1)
    assert len(got) == len(expected)
    for own, theirs in zip(got, expected, strict=True):
        assert [view.shape for view in own] == [view.shape for view in theirs]
        for view, other in zip(own, theirs, strict=True):
            assert ((view - other) * std).abs().max() < LEVEL


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_an_image_alone(case: Case, size: tuple[int, int]) -> None:
    images = [picture(*size)]
    expected = case.unpacked(case.oracle.pixels(images), case.oracle)
    check(case, ours(case.um.processor.look(images)), expected)
    assert expected[0][-1].std() > 0.1 or size == (1, 1)  # a picture, not a plane


def test_images_of_all_sizes_at_once(case: Case) -> None:
    images = [picture(*size) for size in SIZES]
    expected = case.unpacked(case.oracle.pixels(images), case.oracle)
    check(case, ours(case.um.processor.look(images)), expected)
    assert len({view.shape for own in expected for view in own} | {len(own) for own in expected}) > 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_other_modes(case: Case, mode: str) -> None:
    """Grey, transparent and palette images are brought to three colours first, as the processors do."""
    image = picture(91, 37).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = case.unpacked(case.oracle.pixels([image]), case.oracle)
    check(case, ours(case.um.processor.look([image])), expected)
