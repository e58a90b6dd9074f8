"""Images of one's own for a tokenizer: folders and tars of them, no words needed, cropped at random.

Order, crops and flips follow from the seed and the position alone, and so does the image that takes the place of
a bad one, so a run that resumes meets the same images.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.data.sources import BadRecord, Reading, expand
from unimm.data.sources.folder import ImageFinder
from unimm.data.sources.tar_scan import is_image_member
from unimm.data.sources.tars import TarShards
from unimm.errors import UserError, UserNote
from unimm.images import Pixels, read_image
from unimm.processing.messages import digest, file_state
from unimm.processing.views import square_pixels

IMAGE_TRIES = 100  # images tried in place of a bad one


class ImageFiles:
    """Random access to the images of a place: a folder (subfolders too), tars, or a pattern of tars.

    Of a tar's sample the first image is taken.

    Args:
        location: the place.
        allow_outside: whether links may lead out of the folder.

    Raises:
        UserError: there are none, or a tar is broken.
    """

    def __init__(self, location: str, allow_outside: bool = False) -> None:
        self.location = location
        given = Path(location)
        self.finder = ImageFinder(given, allow_outside)
        self.files = self.finder.paths
        self.tars: TarShards | None = None
        if os.path.isdir(location):
            tars = [path for path in sorted(self.finder.others) if path.suffix.lower() == ".tar"]
            for path in tars:
                self.finder.reach.check(path)
            for problem in self.finder.problems():
                warnings.warn(f"{location}: {problem}", UserNote, stacklevel=2)
        else:
            tars = [given] if os.path.exists(location) else expand(location)
            if any(path.suffix.lower() != ".tar" for path in tars):
                raise UserError(f"{location}: expected a folder of images, or tars of them")
        if not self.files and tars:
            self.tars = TarShards(tars, Reading(), location)
        if not len(self):
            raise UserError(f"{location}: holds no images and no tars of images")

    def __len__(self) -> int:
        return len(self.files) if self.tars is None else len(self.tars)

    def signature(self) -> str:
        """A digest that changes when the files do."""
        if self.tars is not None:
            return self.tars.signature()
        return digest(map(file_state, self.files))

    def key(self, index: int) -> str | None:
        """What decides whether an image is held out: its file's name within the folder, or its name in its tar."""
        if self.tars is None:
            return os.path.relpath(self.files[index], self.location)
        try:
            return self.tars.members(index)[1]
        except BadRecord:
            return None

    def __getitem__(self, index: int) -> Image.Image:
        """The image at `index`, upright RGB.

        Raises:
            BadRecord: it cannot be read.
        """
        if self.tars is None:
            key, file = str(self.files[index]), self.location
            try:
                blob = self.finder.blob(self.files[index])
            except UserError as error:
                raise BadRecord(key, file, str(error)) from None
        else:
            tar, key, members = self.tars.members(index)
            file = str(tar)
            name = next((extension for extension in members if is_image_member(extension)), None)
            if name is None:
                raise BadRecord(key, file, "has no image")
            blob = members[name]
        try:
            return read_image(blob.read(), blob.name)
        except UserError as error:
            raise BadRecord(key, file, str(error)) from None


def crop_randomly(
    image: Image.Image, size: int, shorter: tuple[float, float], rng: np.random.Generator
) -> Pixels:
    """Cut a square of `size` pixels at random out of an image brought near that size (ADM, arXiv 2105.05233).

    Args:
        image: RGB.
        size: pixels a side.
        shorter: least and most share of the short side that the square takes up.
        rng: decides size and place.
    """
    least, most = math.ceil(size / shorter[1]), math.ceil(size / shorter[0])
    target = int(rng.integers(least, most + 1))
    scale = target / min(image.size)
    width, height = (max(round(side * scale), target) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0))
    x, y = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    return np.ascontiguousarray(pixels[y : y + size, x : x + size])


class RandomCrops:
    """Endless training images of one place, shuffled anew in every pass.

    Args:
        files: the images.
        size: pixels a side.
        shorter: see `crop_randomly`.
        flip: whether half of them are mirrored.
        seed: with the position it decides everything about an image.
        bad: told of every image that cannot be read.
        indices: which images are read; None: all.
    """

    def __init__(
        self,
        files: ImageFiles,
        size: int,
        shorter: tuple[float, float],
        flip: bool,
        seed: Sequence[int],
        bad: Callable[[BadRecord], None],
        indices: Sequence[int] | None = None,
    ) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # grain warns at import that there is no jax
        import grain

        self.files, self.size, self.shorter, self.flip = files, size, shorter, flip
        self.seed, self.bad = tuple(seed), bad
        order = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        self.indices = range(len(files)) if indices is None else indices
        self.order = grain.MapDataset.range(len(self.indices)).seed(order).shuffle().repeat()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The image at a position, as `pixels` [H, W, 3].

        Raises:
            UserError: too many images are bad.
        """
        index = self.indices[int(self.order[int(position)])]
        rng = np.random.default_rng([*self.seed, int(position)])
        for _ in range(IMAGE_TRIES):
            other = self.indices[int(rng.integers(len(self.indices)))]
            try:
                image = self.files[index]
            except BadRecord as error:
                self.bad(error)
                index = other
                continue
            pixels = crop_randomly(image, self.size, self.shorter, rng)
            mirrored = self.flip and rng.random() < 0.5
            return {"pixels": np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels}
        raise UserError(f"{self.files.location}: {IMAGE_TRIES} images in a row cannot be used")


def first_images(files: ImageFiles, count: int, size: int) -> Tensor:
    """The first readable images of a place, evenly spread over it: pixels [B, 3, size, size] in [-1, 1].

    Raises:
        UserError: none can be read.
    """
    found: list[Tensor] = []
    for index in np.unique(np.linspace(0, len(files) - 1, count).astype(int)).tolist():
        try:
            found.append(square_pixels([files[index]], size))
        except BadRecord:
            continue
    if not found:
        raise UserError(f"{files.location}: none of the first images can be read")
    return torch.cat(found)
