"""Pictures of one's own for a tokenizer: folders and tars of them, no words needed, cropped at random.

Order, crops and flips follow from the seed and the position alone, and so does the picture that takes the place of
a bad one, so a run that resumes meets the same pictures.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unimm.data.sources import BadRecord, Blob, Reading, expand
from unimm.data.sources.folder import find_pictures
from unimm.data.sources.tars import TarShards, is_picture
from unimm.errors import UserError
from unimm.images import read_image

Pixels = NDArray[np.uint8]  # [H, W, 3]
TRIES = 100  # pictures tried in place of a bad one


class PictureFiles:
    """Random access to the pictures of a place: a folder (subfolders too), tars, or a pattern of tars.

    Of a tar's sample the first picture is taken.

    Raises:
        UserError: there are none, or a tar is broken.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        given = Path(location)
        self.files: list[Path] = []
        self.tars: TarShards | None = None
        if given.is_dir():
            self.files = find_pictures(given)
            tars = sorted(path for path in given.rglob("*.tar") if not path.name.startswith("."))
        else:
            tars = expand(location) if not given.exists() else [given]
            if any(path.suffix.lower() != ".tar" for path in tars):
                raise UserError(f"{location}: expected a folder of pictures, or tars of them")
        if not self.files and tars:
            self.tars = TarShards(tars, Reading(), location)
        if not len(self):
            raise UserError(f"{location}: holds no pictures and no tars of pictures")

    def __len__(self) -> int:
        return len(self.files) if self.tars is None else len(self.tars)

    def __getitem__(self, index: int) -> Image.Image:
        """The picture at `index`, upright RGB.

        Raises:
            BadRecord: it cannot be read.
        """
        if self.tars is None:
            path = self.files[index]
            key, file, blob = str(path), self.location, Blob(str(path), path=str(path))
        else:
            tar, key, members = self.tars.members(index)
            file = str(tar)
            name = next((extension for extension in members if is_picture(extension)), None)
            if name is None:
                raise BadRecord(key, file, "has no picture")
            blob = members[name]
        try:
            return read_image(blob.read(), blob.name)
        except UserError as error:
            raise BadRecord(key, file, str(error)) from None


def crop_randomly(
    picture: Image.Image, size: int, shorter: tuple[float, float], rng: np.random.Generator
) -> Pixels:
    """Cut a square of `size` pixels at random out of a picture brought near that size (ADM, arXiv 2105.05233).

    Args:
        picture: RGB.
        size: pixels a side.
        shorter: least and most share of the short side that the square takes up.
        rng: decides size and place.
    """
    least, most = math.ceil(size / shorter[1]), math.ceil(size / shorter[0])
    target = int(rng.integers(least, most + 1))
    scale = target / min(picture.size)
    width, height = (max(round(side * scale), target) for side in picture.size)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0))
    x, y = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    return np.ascontiguousarray(pixels[y : y + size, x : x + size])


class RandomCrops:
    """Endless training pictures of one place, shuffled anew in every pass.

    Args:
        files: the pictures.
        size: pixels a side.
        shorter: see `crop_randomly`.
        flip: whether half of them are mirrored.
        seed: with the position it decides everything about a picture.
        bad: told of every picture that cannot be read.
    """

    def __init__(
        self,
        files: PictureFiles,
        size: int,
        shorter: tuple[float, float],
        flip: bool,
        seed: Sequence[int],
        bad: Callable[[BadRecord], None],
    ) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # grain warns at import that there is no jax
        import grain

        self.files, self.size, self.shorter, self.flip = files, size, shorter, flip
        self.seed, self.bad = tuple(seed), bad
        order = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        self.order = grain.MapDataset.range(len(files)).seed(order).shuffle().repeat()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The picture at a position, as `pixels` [H, W, 3].

        Raises:
            UserError: too many pictures are bad.
        """
        index = int(self.order[int(position)])
        rng = np.random.default_rng([*self.seed, int(position)])
        for _ in range(TRIES):
            other = int(rng.integers(len(self.files)))
            try:
                picture = self.files[index]
            except BadRecord as error:
                self.bad(error)
                index = other
                continue
            pixels = crop_randomly(picture, self.size, self.shorter, rng)
            mirrored = self.flip and rng.random() < 0.5
            return {"pixels": np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels}
        raise UserError(f"{self.files.location}: {TRIES} pictures in a row cannot be used")
