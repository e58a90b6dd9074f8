"""What EmojiScenes is made of: its concepts with their plurals and categories, backgrounds, families, art."""

from __future__ import annotations

import functools
import io
import tarfile
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unimm.data.emojiscenes.pack import slug

ARTWORK_FAMILIES = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat")
VENDOR_FAMILIES = ("emojione", "fxemoji")  # for evaluation only: nothing is ever trained on these

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (190, 194, 200),
    "pink": (248, 182, 200),
    "orange": (250, 188, 128),
    "yellow": (250, 230, 130),
    "green": (165, 215, 150),
    "blue": (150, 195, 240),
    "purple": (195, 165, 230),
    "brown": (172, 132, 108),
}


class Noun(NamedTuple):
    """How a concept is spoken of; `label` is its key in the packed artwork."""

    label: str
    plural: str
    category: str


_IRREGULAR = {
    "cactus": "cactuses",
    "maple leaf": "maple leaves",
    "octopus": "octopuses",
    "peach": "peaches",
    "strawberry": "strawberries",
    "trophy": "trophies",
}


def _nouns(category: str, *labels: str) -> list[Noun]:
    return [Noun(label, _IRREGULAR.get(label, label + "s"), category) for label in labels]


_ALL = [
    *_nouns("animal", "panda", "penguin", "frog", "turtle", "whale", "lady beetle", "koala", "octopus"),
    *_nouns(
        "plant", "sunflower", "tulip", "palm tree", "cactus", "mushroom", "Christmas tree", "four leaf clover"
    ),
    *_nouns("plant", "maple leaf", "deciduous tree"),
    *_nouns(
        "fruit", "watermelon", "lemon", "pineapple", "red apple", "green apple", "strawberry", "pear", "peach"
    ),
    *_nouns("food", "eggplant", "hamburger", "doughnut", "lollipop", "birthday cake", "beer mug"),
    *_nouns("vehicle", "bicycle", "rocket", "fire engine", "airplane", "sailboat"),
    *_nouns("sky", "crescent moon", "star", "snowflake", "droplet"),
    *_nouns("object", "balloon", "trophy", "soccer ball", "anchor", "jack-o-lantern", "skull"),
    *_nouns("object", "bullseye", "top hat", "guitar", "crown", "bell", "umbrella"),
]
NOUNS: dict[str, Noun] = {noun.label: noun for noun in _ALL}
CONCEPTS = tuple(NOUNS)
CATEGORIES = {
    "animal": "an animal",
    "plant": "a plant",
    "fruit": "a fruit",
    "food": "food",
    "vehicle": "a vehicle",
    "sky": "something in the sky",
    "object": "an object",
}


def with_article(noun: str) -> str:
    """Return `noun` with its indefinite article."""
    return f"{'an' if noun[0].lower() in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


@functools.cache
def load_artwork(family: str) -> dict[str, Image.Image]:
    """Return the packed RGBA images of a family, by slug of the concept."""
    file = resources.files("unimm") / "assets" / "emojiscenes" / f"{family}.tar"
    images = {}
    with tarfile.open(fileobj=io.BytesIO(file.read_bytes())) as tar:
        for member in tar:
            handle = tar.extractfile(member)
            assert handle is not None
            images[member.name.removesuffix(".webp")] = Image.open(io.BytesIO(handle.read())).convert("RGBA")
    return images


@functools.lru_cache(maxsize=8192)
def sprite(family: str, concept: str, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return one object at `size` pixels: colour times alpha [S, S, 3] in 0..255, and alpha [S, S, 1] in 0..1."""
    image = load_artwork(family)[slug(concept)]
    rgba = np.asarray(image, dtype=np.float32)
    alpha = rgba[..., 3:] / 255
    # Premultiplied before resizing: the colour of transparent pixels must not bleed into the edge.
    planes = np.concatenate([rgba[..., :3] * alpha, alpha], axis=2)
    resized = np.stack(
        [
            np.asarray(Image.fromarray(planes[..., c]).resize((size, size), Image.Resampling.BOX))
            for c in range(4)
        ],
        axis=2,
    )
    return resized[..., :3], resized[..., 3:]
