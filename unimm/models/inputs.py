"""The images that go into a model with its tokens: one bundle, from the processor through training to the decoder.

Shape suffixes: N images to understand, of which F come as features; V views of the others, one of each unless said
otherwise; M images to generate; h x w grid of codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

INPUT_FIELDS = {
    "pixel_values": "pixels",
    "image_sizes": "sizes",
    "image_features": "features",
    "image_codes": "codes",
}
"""Keyword inputs as transformers' processors name them: fields of `Images`."""
CANVAS_FIELDS = {
    "image_views": "views", "image_grids": "grids", "image_padding": "padding", "image_times": "times",
}  # fmt: skip
"""Keyword inputs of images that have several views."""


@dataclasses.dataclass
class Images:
    """Images in the order in which they stand in the stream; each field is None where there is nothing of its kind.

    Attributes:
        pixels: float [V, 3, H, W], views of images to understand, normalised, filled up on the right and below; where
            there are videos, [V, 3 frames, H, W], each time of one a view, an image as frames that are alike.
        sizes: int64 [V, 2], height and width of each view without that filling; None: all are of one size.
        features: float [F, tokens, width], images to understand as their encoder's features; where images have
            unlike many, [P, width] of all, one after the other.
        lengths: int64 [F], features of each image, where they are [P, width].
        featured: bool [N], which images come as features, where others come as pixels.
        views: int64 [N - F], views of each image; None: each has one.
        grids: int64 [N, 2], rows and columns that each image to understand has in the stream: of tokens, or of tiles
            on a canvas; of a video, the rows of all times.
        codes: int64 [M, h, w], images to generate.
        owners: int64 [N], the row of the batch that each image to understand stands in.
        padding: uint8 [W, tokens], of the views of all images, those that come as features too: 0 where a feature is of
            the image, 1 where it is all padding, 2 where some is; None: the model does not ask.
        times: int64 [N], times of each video, 0 of an image; None: there are no videos.
    """

    pixels: Tensor | None = None
    sizes: Tensor | None = None
    features: Tensor | None = None
    featured: Tensor | None = None
    grids: Tensor | None = None
    codes: Tensor | None = None
    owners: Tensor | None = None
    views: Tensor | None = None
    lengths: Tensor | None = None
    padding: Tensor | None = None
    times: Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> Images | None:
        """Take the images out of keyword inputs as transformers' processors give them; None where there are none."""
        known = INPUT_FIELDS | CANVAS_FIELDS
        found = {field: inputs.pop(name) for name, field in known.items() if name in inputs}
        if (
            mask := inputs.pop("pixel_mask", None)
        ) is not None:  # of views that are padded on the right and below
            found["sizes"] = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], dim=1)
        return cls(**found) if any(value is not None for value in found.values()) else None

    def inputs(self) -> dict[str, Tensor]:
        """Return them as keyword inputs, as transformers' processors name them."""
        found = {name: getattr(self, field) for name, field in INPUT_FIELDS.items()}
        if self.views is not None:  # else the sizes of views tell the grids
            found |= {name: getattr(self, field) for name, field in CANVAS_FIELDS.items()}
        return {name: value for name, value in found.items() if value is not None}

    def __len__(self) -> int:
        """Images to understand."""
        seen = 0 if self.pixels is None else len(self.pixels if self.views is None else self.views)
        given = 0 if self.features is None else len(self.features if self.lengths is None else self.lengths)
        return seen + given

    def __bool__(self) -> bool:
        """Whether there is any image, to understand or to generate."""
        return len(self) > 0 or (self.codes is not None and len(self.codes) > 0)

    def each_times(self) -> list[int]:
        """Return the times of each video, 0 of an image."""
        times: list[int] = [0] * len(self) if self.times is None else self.times.tolist()
        return times

    def view_sizes(self) -> list[tuple[int, int]]:
        """Return height and width of each view."""
        assert self.pixels is not None
        if self.sizes is None:
            height, width = self.pixels.shape[-2:]
            return [(height, width)] * len(self.pixels)
        return [(height, width) for height, width in self.sizes.tolist()]

    def each_length(self) -> list[int]:
        """Return the features of each image that comes as features."""
        assert self.features is not None
        if self.lengths is None:
            return [self.features.shape[1]] * len(self.features)
        lengths: list[int] = self.lengths.tolist()
        return lengths

    def each_feature(self) -> list[Tensor]:
        """Return the features [n, width] of each image that comes as features."""
        assert self.features is not None
        flat = self.features.flatten(0, 1) if self.features.ndim == 3 else self.features
        return list(flat.split(self.each_length()))

    def to(self, *where: Any, **how: Any) -> Images:
        """Return them on another device, as `torch.Tensor.to` takes it; number formats stay."""
        moved = {name: value.to(*where, **how) for name, value in self._fields().items()}
        return dataclasses.replace(self, **moved)

    def first(self, count: int) -> Images:
        """Return the first so many images to understand, of a bundle without images to generate."""
        return self.part(0, count)

    def part(self, start: int, end: int) -> Images:
        """Return some of the images to understand, of a bundle without images to generate."""
        assert self.codes is None
        if not len(self):
            return self
        featured = self.which()
        given = [int(featured[:place].sum()) for place in (start, end)]
        seen = [start - given[0], end - given[1]]
        views, rows = _starts(self.views, seen), _starts(self.lengths, given)
        own = {"features": rows, "lengths": given, "pixels": views, "sizes": views, "views": seen}
        if self.padding is not None:
            own["padding"] = _starts(self._all_views(self.padding.shape[1]), [start, end])
        fields = {
            name: value[slice(*own.get(name, (start, end)))]
            for name, value in self._fields().items()
            if not (own.get(name) and own[name][0] == own[name][1])  # nothing of it is left
        }
        if self.featured is not None and (seen[0] == seen[1] or given[0] == given[1]):
            fields.pop("featured")
        return Images(**fields)

    def owned_by(self, row: int) -> Images:
        """Return them as standing in a row of the batch."""
        return dataclasses.replace(self, owners=torch.full((len(self),), row))

    def _fields(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def cat(cls, bundles: Iterable[Images]) -> Images | None:
        """Join bundles in their order; None where they hold nothing."""
        parts = [bundle for bundle in bundles if bundle]
        if not parts:
            return None
        codes = _cat([part.codes for part in parts])
        seen = [part for part in parts if len(part)]
        if not seen:
            return cls(codes=codes)
        pixels, sizes = _pad([part for part in seen if part.pixels is not None])
        features, lengths = _flat([part for part in seen if part.features is not None])
        featured = views = None
        if pixels is not None and features is not None:
            featured = torch.cat([part.which() for part in seen])
        if any(part.views is not None for part in seen):
            views = _cat([part._views() for part in seen if part.pixels is not None])
        grids, owners, padding = (
            _cat([getattr(part, name) for part in seen]) for name in ("grids", "owners", "padding")
        )
        times = None
        if any(part.times is not None for part in seen):
            times = torch.tensor([count for part in seen for count in part.each_times()])
        return cls(pixels, sizes, features, featured, grids, codes, owners, views, lengths, padding, times)

    def which(self) -> Tensor:
        """Which images to understand come as features: bool [N]."""
        if self.featured is not None:
            return self.featured
        return torch.full((len(self),), self.features is not None)

    def _views(self) -> Tensor | None:
        """Views of each image that comes as pixels."""
        if self.views is not None or self.pixels is None:
            return self.views
        return torch.ones(len(self.pixels), dtype=torch.int64)

    def _all_views(self, tokens: int) -> Tensor:
        """Views of each image, for views of so many features: int64 [N]."""
        views = self._views()
        computed = iter([] if views is None else views.tolist())
        given = iter([] if self.features is None else [length // tokens for length in self.each_length()])
        return torch.tensor([next(given if featured else computed) for featured in self.which().tolist()])


def _starts(lengths: Tensor | None, places: list[int]) -> list[int]:
    """Where images begin among what they have several of, each so many; where each has one, places stay."""
    return places if lengths is None else [int(lengths[:place].sum()) for place in places]


def _flat(parts: Sequence[Images]) -> tuple[Tensor | None, Tensor | None]:
    """Features of bundles, and how many each image has, where that differs."""
    stacks = [part.features for part in parts if part.features is not None]
    if not stacks:
        return None, None
    if all(part.lengths is None for part in parts) and len({stack.shape[1] for stack in stacks}) == 1:
        return torch.cat(stacks), None
    lengths = [
        torch.full((len(stack),), stack.shape[1]) if part.lengths is None else part.lengths
        for part, stack in zip(parts, stacks, strict=True)
    ]
    flat = [stack.flatten(0, 1) if stack.ndim == 3 else stack for stack in stacks]
    return torch.cat(flat), torch.cat(lengths)


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Those that are there, one after the other."""
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given) if given else None


def _pad(parts: Sequence[Images]) -> tuple[Tensor | None, Tensor | None]:
    """Pixels of bundles filled up with 0 to the largest, and the sizes without that, where any has them."""
    stacks = [part.pixels for part in parts if part.pixels is not None]
    if not stacks:
        return None, None
    channels, height, width = (max(stack.shape[axis] for stack in stacks) for axis in (1, 2, 3))
    stacks = [stack.repeat_interleave(channels // stack.shape[1], dim=1) for stack in stacks]
    padded = [F.pad(stack, (0, width - stack.shape[3], 0, height - stack.shape[2])) for stack in stacks]
    if all(part.sizes is None for part in parts) and len({stack.shape[2:] for stack in stacks}) == 1:
        return torch.cat(padded), None
    sizes = [
        part.sizes if part.sizes is not None else torch.tensor([stack.shape[2:]] * len(stack))
        for part, stack in zip(parts, stacks, strict=True)
    ]
    return torch.cat(padded), torch.cat(sizes)


@dataclasses.dataclass
class Rows:
    """How the rows of a batch are read, where they are not one sequence each.

    Attributes:
        positions: int64 [B, T], the position of each token in its sample.
        samples: int64 [B, T], which sample of its row a token belongs to; padding is -1.
        branches: int64 [B, T], which branch of its sample; see `unimm.models.attention`.
    """

    positions: Tensor
    samples: Tensor
    branches: Tensor

    def to(self, *where: Any, **how: Any) -> Rows:
        """Return them on another device, as `torch.Tensor.to` takes it."""
        return Rows(*(value.to(*where, **how) for value in (self.positions, self.samples, self.branches)))


def digests(images: Images) -> list[str]:
    """Return what tells each image to understand from others: a hash of its views or features."""
    found = []
    for place in range(len(images)):
        one = dataclasses.replace(images, codes=None).part(place, place + 1)
        tensors = [one.features] if one.pixels is None else _cut(one)
        tensors += [] if one.padding is None else [one.padding]
        told = hashlib.blake2b(b"features" if one.pixels is None else b"pixels", digest_size=16)
        for tensor in tensors:
            assert tensor is not None
            told.update(repr(tuple(tensor.shape)).encode())
            told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        found.append(told.hexdigest())
    return found


def _cut(images: Images) -> list[Tensor]:
    """Views without what fills them up to the largest."""
    assert images.pixels is not None
    return [
        view[:, :height, :width]
        for view, (height, width) in zip(images.pixels, images.view_sizes(), strict=True)
    ]
