"""A contact sheet of EmojiScenes: images with a caption and their questions, to be looked at before training."""

from __future__ import annotations

from PIL import Image

from unimm.data.emojiscenes.scenes import SCENE_KINDS, EmojiScenes, Scene, Split
from unimm.sheet import Card, Line, SheetSection, draw_sheet

CARDS = 12  # scenes of each kind
SIZE = 64


def contact_sheet(split: Split = "train", seed: int = 0) -> Image.Image:
    """Draw the first scenes of each kind of a split.

    Args:
        split: train, seen, composed or vendor.
        seed: another seed is another sample.

    Raises:
        ValueError: an unknown split.
    """
    sections = []
    for kind in SCENE_KINDS:
        scenes = EmojiScenes(split, seed, SIZE, CARDS, (kind,))
        sections.append(SheetSection(kind, [_card(scene) for scene in scenes]))
    return draw_sheet("EmojiScenes", f"split {split}, seed {seed}, {SIZE} x {SIZE} pixels", sections)


def _card(scene: Scene) -> Card:
    lines = [Line(scene.captions()[0])]
    lines += [Line(f"{asked.question} {asked.answer}", "muted") for asked in scene.questions()]
    return Card([Image.fromarray(scene.render())], [*lines, Line(scene.family, "muted")])
