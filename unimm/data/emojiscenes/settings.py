"""How training takes scenes: the section `data.emojiscenes` of a recipe, and their names in a mixture.

Nothing here draws a scene or reads artwork, so a recipe that has no scenes in its mixtures needs no more than this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from unimm.data.emojiscenes.augment import Augmentation
from unimm.sections import Positive, Rate, Section

EMOJISCENES = "emojiscenes"
"""The source in a mixture: `BOTH_SIDES` in equal shares."""
BOTH_SIDES = ("understanding", "generation")
"""Kinds of sample that a model learns its two sides from; it may have only one of them."""
SAMPLE_KINDS = ("understanding", "text", "generation")
"""What samples are made of scenes; each alone is `emojiscenes/KIND` in a mixture."""
SCENE_NAMES = tuple(f"{EMOJISCENES}/{kind}" for kind in SAMPLE_KINDS)
SceneKind = Literal["single", "pair", "count"]
SCENE_KINDS: dict[SceneKind, float] = {"single": 0.5, "pair": 0.25, "count": 0.25}


def _some(shares: dict[SceneKind, float]) -> dict[SceneKind, float]:
    if not any(shares.values()):
        raise ValueError("expected a share above 0")
    return shares


SceneShares = Annotated[dict[SceneKind, Rate], AfterValidator(_some)]


class UnderstandingSettings(Section):
    """What is shown and asked in samples to understand; scenes of models that look at codes are those to draw."""

    kinds: SceneShares = Field(default_factory=lambda: dict(SCENE_KINDS))
    """Shares of the kinds of scene."""
    augment: bool = False
    """Whether images are varied in colour and place."""
    placings: bool = False
    """Whether all is asked about where two objects stand, not one question of each kind only."""

    def changed_by(self, other: UnderstandingSettings) -> UnderstandingSettings:
        """These settings, with those that `other` names in place of their own."""
        return self.model_copy(update={name: getattr(other, name) for name in other.model_fields_set})


class SceneSettings(Section):
    """The scenes of EmojiScenes that a recipe trains on, where its mixtures name them."""

    scenes: Positive = 24_000
    """Training scenes whose codes are computed."""
    lattice: Positive = 8
    """Pixels that their objects' places are multiples of; best the tokenizer's stride."""
    kinds: SceneShares = Field(default_factory=lambda: dict(SCENE_KINDS))
    """Shares of the kinds of scene among them."""
    codes: str | None = None
    """Where the codes are cached; null: in the run's folder."""
    understanding: UnderstandingSettings = UnderstandingSettings()
    """Of all stages; `options.emojiscenes` of a stage names what is different there."""
    augmentation: Augmentation = Augmentation()
    """How far images to understand are varied, where they are."""


def expand_mixture(mixture: Mapping[str, float], sides: Sequence[str] = BOTH_SIDES) -> dict[str, float]:
    """A mixture with `emojiscenes` written as the kinds of sample that it stands for.

    Args:
        mixture: name -> share.
        sides: those of `BOTH_SIDES` that the model has.
    """
    found: dict[str, float] = {}
    for name, share in mixture.items():
        parts = {name: share}
        if name == EMOJISCENES:
            parts = {f"{EMOJISCENES}/{kind}": share / len(sides) for kind in sides}
        found |= {one: found.get(one, 0.0) + part for one, part in parts.items()}
    return found
