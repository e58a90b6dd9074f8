"""Does a drawing look like the artwork of what was asked for? A linear classifier of pixels.

It is fitted on training scenes, as they are rendered and as the image tokenizer gives them back, and sees the colours
and the outline of a cut-out object. What it shares with the judge of `unimm.evaluation` is how objects are cut out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unimm.data.codes import fingerprint
from unimm.data.emojiscenes.scenes import CONCEPTS, EmojiScenes, Scene
from unimm.evaluation.emojiscenes.batches import image_size
from unimm.evaluation.emojiscenes.drawing import reconstruct
from unimm.evaluation.emojiscenes.judge import cached_probe, fit_probe
from unimm.evaluation.emojiscenes.pixels import THRESHOLD, border_colour, cut_out, find_objects
from unimm.images import Pixels

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

SIDE = 24  # pixels that a cut-out object is brought to
SCENES = 6000  # it is fitted on, each as rendered and as reconstructed
DECAY = 1e-3  # of the squared weights
FITTING_BATCH = 64


class Artwork:
    """Knows objects by their colours and outlines.

    Args:
        um: its image tokenizer gives images back as drawings have them.
        cache: file that keeps the classifier; one fitted for another tokenizer is fitted anew.
    """

    def __init__(self, um: UniMM, cache: Path) -> None:
        self.um, self.size = um, image_size(um)
        settings = {"tokenizer": fingerprint(um.image_tokenizer, self.size), "scenes": SCENES, "side": SIDE}
        self.weight, self.bias = cached_probe(cache, {**settings, "decay": DECAY}, self._fit)

    def _fit(self) -> tuple[Tensor, Tensor]:
        scenes = EmojiScenes("train", 0, self.size, SCENES, kinds=("single",))
        features, labels = [], []
        for start in range(0, SCENES, FITTING_BATCH):
            shown = [scenes[index] for index in range(start, min(start + FITTING_BATCH, SCENES))]
            rendered = [scene.render() for scene in shown]
            features += [look(image) for image in (*rendered, *reconstruct(self.um, rendered))]
            labels += 2 * [CONCEPTS.index(scene.concept) for scene in shown]
        return fit_probe(torch.from_numpy(np.stack(features)), torch.tensor(labels), len(CONCEPTS), DECAY)

    def scores(self, scenes: Sequence[Scene], images: Sequence[Pixels]) -> list[float]:
        """How surely images, each uint8 [H, W, 3], show scenes.

        One object: the probability of its concept. Two: that of the halves being the right way round, given that they
        show these two. A number of the same: 1, since a look does not count.
        """
        return [self._score(scene, image) for scene, image in zip(scenes, images, strict=True)]

    def _score(self, scene: Scene, image: Pixels) -> float:
        if scene.kind == "count":
            return 1.0
        wanted = [CONCEPTS.index(placed.concept) for placed in scene.objects]
        if scene.kind == "single":
            return float(self._log_probs(image)[wanted[0]].exp())
        first, second = (self._log_probs(half)[wanted] for half in halves(image, scene))
        return float((first[0] + second[1] - first[1] - second[0]).sigmoid())

    def _log_probs(self, image: Pixels) -> Tensor:
        """Log-probabilities [concepts] of an image's largest object."""
        return F.log_softmax(self.weight @ torch.from_numpy(look(image)) + self.bias, dim=0)


def halves(image: Pixels, scene: Scene) -> tuple[Pixels, Pixels]:
    """An image [H, W, 3] with only the half in which the first of two objects should stand, and with only the other.

    What is left out of each is of the colour of the background.
    """
    low, high = image.copy(), image.copy()
    axis = 1 if scene.relation in ("left of", "right of") else 0
    colour = border_colour(image)
    np.array_split(low, 2, axis)[1][:] = colour
    np.array_split(high, 2, axis)[0][:] = colour
    return (low, high) if scene.relation in ("left of", "above") else (high, low)


def look(image: Pixels) -> NDArray[np.float32]:
    """Colours and outline [SIDE * SIDE * 4] of the largest object of an image [H, W, 3]; 0 where there is none."""
    boxes = find_objects(image)
    if not boxes:
        return np.zeros(SIDE * SIDE * 4, np.float32)
    pixels = cut_out(image, boxes[0], SIDE).astype(np.float32)
    outline = np.abs(pixels - border_colour(image)).max(-1, keepdims=True).clip(max=THRESHOLD) / THRESHOLD
    return np.concatenate([(pixels / 255 - 0.5) * outline, outline], -1).astype(np.float32).ravel()
