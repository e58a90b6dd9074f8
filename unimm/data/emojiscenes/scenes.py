"""EmojiScenes: images of known objects on plain backgrounds, with captions and questions, from a seed.

A scene is one object, two objects beside or above each other, or one to four of the same, drawn from one
artwork family. Sample `i` of a split depends on nothing but the seed and `i`, so any sample can be drawn again.

Splits: `train`; `seen` (concept and family seen, this layout held out); `composed` (held-out background x
concept, pairs of concepts, count x concept); `vendor` (artwork families held out whole).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unimm.data.emojiscenes.concepts import (
    ARTWORK_FAMILIES,
    BACKGROUNDS,
    CATEGORIES,
    CONCEPTS,
    NOUNS,
    VENDOR_FAMILIES,
    sprite,
    with_article,
)
from unimm.data.emojiscenes.settings import SCENE_KINDS, SceneKind

__all__ = [
    "BACKGROUNDS",
    "CONCEPTS",
    "ARTWORK_FAMILIES",
    "SCENE_KINDS",
    "VENDOR_FAMILIES",
    "EmojiScenes",
    "Placed",
    "Question",
    "Scene",
    "SceneKind",
]

Split = Literal["train", "seen", "composed", "vendor"]
SPLITS: tuple[Split, ...] = ("train", "seen", "composed", "vendor")
CANVAS = 64  # pixels a side that the layouts are made for; other sizes scale them
LATTICE = 4  # pixels between neighbouring places
NUMBERS = ("zero", "one", "two", "three", "four")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_LAYOUTS = 12  # one layout in twelve is kept for `seen`
HELD_OUT_COMBINATIONS = 10  # one combination in ten is kept for `composed`

SINGLE_CAPTIONS = (
    "{a_object} on {a_background} background",
    "a picture of {a_object} on {a_background} background",
    "{a_object} on {background}",
    "there is {a_object} on {a_background} background",
    "this is {a_object} and the background is {background}",
    "on {a_background} background, {a_object}",
)
PAIR_CAPTIONS = (
    "{a_first} {relation} {a_second} on {a_background} background",
    "{a_second} {inverse} {a_first} on {a_background} background",
    "a picture of {a_first} {relation} {a_second} on {background}",
    "there is {a_first} {relation} {a_second}, the background is {background}",
    "on {a_background} background, {a_first} {relation} {a_second}",
)
COUNT_CAPTIONS = (
    "{number} {objects} on {a_background} background",
    "a picture of {number} {objects} on {a_background} background",
    "{number} {objects} on {background}",
    "there are {number} {objects} on {a_background} background",
    "on {a_background} background, {number} {objects}",
)


class Placed(NamedTuple):
    """One object: its concept, and the pixels of its top left corner and its side."""

    concept: str
    x: int
    y: int
    size: int


class Question(NamedTuple):
    """A question about a scene; `kind` is what, count, background, where, yesno or category."""

    kind: str
    question: str
    answer: str


def _held_out(one_in: int, *words: object) -> bool:
    """Whether a combination is held out: a fixed pseudo-random choice by its words alone."""
    return zlib.crc32("|".join(map(str, words)).encode()) % one_in == 0


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image before it is drawn. `objects[0]` stands in `relation` to `objects[1]`; `key` seeds its words."""

    kind: SceneKind
    family: str
    background: str
    objects: tuple[Placed, ...]
    relation: str | None = None
    key: int = 0
    size: int = CANVAS

    @property
    def concept(self) -> str:
        """The concept of the first object."""
        return self.objects[0].concept

    @property
    def mirrorable(self) -> bool:
        """Whether every caption stays true of the mirrored image."""
        return self.relation not in ("left of", "right of")

    def render(self) -> NDArray[np.uint8]:
        """Draw the scene as RGB [H, W, 3]."""
        canvas = np.empty((self.size, self.size, 3), np.float32)
        canvas[:] = BACKGROUNDS[self.background]
        scale = self.size / CANVAS
        for placed in self.objects:
            side, x, y = (round(v * scale) for v in (placed.size, placed.x, placed.y))
            colour, alpha = sprite(self.family, placed.concept, side)
            patch = canvas[y : y + side, x : x + side]
            patch *= 1 - alpha
            patch += colour
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)

    def is_held_out_combination(self) -> bool:
        """Whether the scene shows a combination kept for the `composed` split."""
        concepts = sorted({placed.concept for placed in self.objects})
        if any(_held_out(HELD_OUT_COMBINATIONS, "background", self.background, c) for c in concepts):
            return True
        if self.kind == "pair":
            return _held_out(HELD_OUT_COMBINATIONS, "pair", *concepts)
        count = len(self.objects)
        return count > 1 and _held_out(HELD_OUT_COMBINATIONS, "count", count, *concepts)

    def is_held_out_layout(self) -> bool:
        """Whether this exact layout is kept for the `seen` split."""
        return _held_out(HELD_OUT_LAYOUTS, "layout", self.family, self.background, *self.objects)

    def captions(self) -> list[str]:
        """Return every caption that fits, the plainest first."""
        first = self.objects[0].concept
        words = {"background": self.background, "a_background": with_article(self.background)}
        if self.kind == "pair":
            assert self.relation is not None
            words |= {"a_first": with_article(first), "a_second": with_article(self.objects[1].concept)}
            words |= {"relation": self.relation, "inverse": INVERSE[self.relation]}
            return [template.format(**words) for template in PAIR_CAPTIONS]
        if len(self.objects) == 1:
            return [template.format(a_object=with_article(first), **words) for template in SINGLE_CAPTIONS]
        words |= {"number": NUMBERS[len(self.objects)], "objects": NOUNS[first].plural}
        return [template.format(**words) for template in COUNT_CAPTIONS]

    def questions(self) -> list[Question]:
        """Return one question of each kind that fits, with two yes/no questions; worded by `key`."""
        rng = np.random.default_rng([self.key, 1])
        asked = [self._what(rng), self._count(rng), self._background(rng)]
        asked += [self._where(rng)] if self.kind == "pair" else [self._category(rng)]
        topics = rng.choice(4 if self.kind == "pair" else 3, 2, replace=False)
        return [*asked, *(self._yes_no(rng, topic) for topic in topics)]

    def placings(self) -> list[Question]:
        """Everything that can be asked about where two objects stand: of either, where it is, and yes or no."""
        if self.relation is None:
            return []
        first, second = (placed.concept for placed in self.objects)
        asked = []
        for one, other, relation in (
            (first, second, self.relation),
            (second, first, INVERSE[self.relation]),
        ):
            asked += [
                Question("where", f"where is the {one}?", f"{relation} the {other}"),
                Question("yesno", f"is the {one} {relation} the {other}?", "yes"),
                Question("yesno", f"is the {one} {INVERSE[relation]} the {other}?", "no"),
            ]
        return asked

    def _what(self, rng: np.random.Generator) -> Question:
        first = self.objects[0].concept
        if self.kind == "pair":
            assert self.relation is not None
            turned = rng.random() < 0.5
            asked, other = (self.objects[1].concept, first) if turned else (first, self.objects[1].concept)
            relation = INVERSE[self.relation] if turned else self.relation
            return Question("what", f"what is {relation} the {other}?", with_article(asked))
        if len(self.objects) == 1:
            return Question(
                "what", _pick(rng, "what is this?", "what is in the picture?"), with_article(first)
            )
        return Question("what", _pick(rng, "what are these?", "what is shown?"), NOUNS[first].plural)

    def _count(self, rng: np.random.Generator) -> Question:
        asked = _pick(rng, "how many objects are there?", "how many things are in the picture?")
        return Question("count", asked, NUMBERS[len(self.objects)])

    def _background(self, rng: np.random.Generator) -> Question:
        asked = _pick(rng, "what color is the background?", "which background is it?")
        return Question("background", asked, self.background)

    def _where(self, rng: np.random.Generator) -> Question:
        assert self.relation is not None
        first, second = (placed.concept for placed in self.objects)
        if rng.random() < 0.5:
            return Question("where", f"where is the {first}?", f"{self.relation} the {second}")
        return Question("where", f"where is the {second}?", f"{INVERSE[self.relation]} the {first}")

    def _category(self, rng: np.random.Generator) -> Question:
        asked = _pick(rng, "what kind of thing is it?", "what sort of thing is shown?")
        return Question("category", asked, CATEGORIES[NOUNS[self.concept].category])

    def _yes_no(self, rng: np.random.Generator, topic: int) -> Question:
        """Ask about object, background, count or place; yes and no are equally likely whatever is asked."""
        yes = bool(rng.random() < 0.5)
        if topic == 0:
            shown = {placed.concept for placed in self.objects}
            named = (
                _pick(rng, *sorted(shown)) if yes else _pick(rng, *(c for c in CONCEPTS if c not in shown))
            )
            asked = f"is there {with_article(named)}?"
        elif topic == 1:
            asked = f"is the background {_or_other(rng, yes, self.background, tuple(BACKGROUNDS))}?"
        elif topic == 2:
            number = _or_other(rng, yes, NUMBERS[len(self.objects)], NUMBERS[1:])
            asked = f"is the number of objects {number}?"
        else:
            assert self.relation is not None
            first, second = (placed.concept for placed in self.objects)
            relation = self.relation if yes else INVERSE[self.relation]
            asked = f"is the {first} {relation} the {second}?"
        return Question("yesno", asked, "yes" if yes else "no")


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]


def _or_other(rng: np.random.Generator, same: bool, value: str, choices: Sequence[str]) -> str:
    return value if same else _pick(rng, *(choice for choice in choices if choice != value))


def _place(rng: np.random.Generator, low: int, high: int, lattice: int) -> int:
    """Draw a place from `low` to `high`, both included; on multiples of `lattice` if any lies between them."""
    places = range(low, high + 1, LATTICE)
    aligned = [place for place in places if place % lattice == 0] or places
    return aligned[rng.integers(len(aligned))]


def _single(rng: np.random.Generator, lattice: int) -> tuple[tuple[Placed, ...], None]:
    size = int(rng.choice((32, 40, 48)))
    x, y = (_place(rng, 4, CANVAS - size - 4, lattice) for _ in range(2))
    return (Placed(_pick(rng, *CONCEPTS), x, y, size),), None


def _pair(rng: np.random.Generator, lattice: int) -> tuple[tuple[Placed, ...], str]:
    first, second = rng.choice(len(CONCEPTS), 2, replace=False)
    sideways = rng.random() < 0.5
    placed = []
    for half, concept in enumerate((first, second)):
        size = int(rng.choice((24, 28)))
        # Both halves keep their distance from the middle, so that the two objects never touch.
        low, high = (0, 28 - size) if half == 0 else (36, CANVAS - size)
        along = _place(rng, low, high, lattice)
        across = _place(rng, 8, CANVAS - 8 - size, lattice)
        x, y = (along, across) if sideways else (across, along)
        placed.append(Placed(CONCEPTS[concept], x, y, size))
    relation = "left of" if sideways else "above"
    if rng.random() < 0.5:
        return (placed[1], placed[0]), INVERSE[relation]
    return (placed[0], placed[1]), relation


def _count(rng: np.random.Generator, lattice: int) -> tuple[tuple[Placed, ...], None]:
    concept = _pick(rng, *CONCEPTS)
    size = int(rng.choice((20, 24)))
    half = CANVAS // 2
    placed = []
    for quarter in sorted(rng.choice(4, int(rng.integers(1, 5)), replace=False).tolist()):
        x, y = (_place(rng, 4, 28 - size, lattice) for _ in range(2))
        placed.append(Placed(concept, quarter % 2 * half + x, quarter // 2 * half + y, size))
    return tuple(placed), None


_LAYOUTS = {"single": _single, "pair": _pair, "count": _count}


class EmojiScenes(Sequence[Scene]):
    """A split of EmojiScenes as a seeded, indexable source (also a grain `RandomAccessDataSource`).

    Args:
        split: train, seen, composed or vendor.
        seed: another seed is another sample of the same split.
        size: pixels a side of the images.
        length: how many scenes there are; indices wrap nowhere, so past it is an IndexError.
        kinds: the kinds of scene to draw, in their usual ratio, or kind -> share.
        lattice: pixels that places are multiples of where possible. On a tokenizer's stride an object meets its
            grid in one phase, so the same art gives the same codes and drawing is learnt from fewer images.

    Raises:
        ValueError: for an unknown split or kind, or a lattice that is no multiple of `LATTICE`.
    """

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        size: int = CANVAS,
        length: int = 1_000_000,
        kinds: Sequence[SceneKind] | Mapping[SceneKind, float] = tuple(SCENE_KINDS),
        lattice: int = LATTICE,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        if not kinds or any(kind not in SCENE_KINDS for kind in kinds):
            raise ValueError(f"unknown kinds {list(kinds)!r}; choose from {', '.join(SCENE_KINDS)}")
        if lattice < LATTICE or lattice % LATTICE:
            raise ValueError(f"lattice: {lattice}; give a multiple of {LATTICE}")
        self.split, self.seed, self.size, self.length, self.lattice = split, seed, size, length, lattice
        self.kinds = tuple(kinds)
        shares = kinds if isinstance(kinds, Mapping) else SCENE_KINDS
        weights = np.array([shares[kind] for kind in self.kinds])
        if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
            raise ValueError(f"kinds: {dict(shares)}; give shares of at least 0, not all 0")
        self.shares = dict(zip(self.kinds, (weights / weights.sum()).tolist(), strict=True))
        self.families = VENDOR_FAMILIES if split == "vendor" else ARTWORK_FAMILIES

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), int(index)])
        # The kind is drawn once and kept, so that rejection below cannot shift the ratio of kinds.
        kind = self.kinds[rng.choice(len(self.kinds), p=list(self.shares.values()))]
        while True:
            scene = self._draw(rng, kind)
            if self._belongs(scene):
                return scene

    def _draw(self, rng: np.random.Generator, kind: SceneKind) -> Scene:
        objects, relation = _LAYOUTS[kind](rng, self.lattice)
        background, family = _pick(rng, *BACKGROUNDS), _pick(rng, *self.families)
        return Scene(kind, family, background, objects, relation, int(rng.integers(2**31)), self.size)

    def _belongs(self, scene: Scene) -> bool:
        if self.split == "composed":
            return scene.is_held_out_combination()
        if scene.is_held_out_combination():
            return False
        if self.split == "vendor":
            return True
        return scene.is_held_out_layout() == (self.split == "seen")
