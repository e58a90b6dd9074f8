"""Going through many samples in batches, with a progress bar where someone watches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.progress import track

from unimm.data.emojiscenes import CANVAS, Scene

if TYPE_CHECKING:
    from unimm.configuration import UniMMConfig
    from unimm.pipeline import UniMM

BATCH = 64


def batches(count: int, description: str) -> Iterator[range]:
    """The ranges of indices of successive batches of `count` samples; the bar goes to stderr."""
    console = Console(stderr=True)
    starts = range(0, count, BATCH)
    for start in track(starts, description, console=console, transient=True, disable=not console.is_terminal):
        yield range(start, min(start + BATCH, count))


def picture_size(um: UniMM) -> int:
    """Pixels a side of the scenes for a model: those of its drawings, else of what its encoder sees."""
    config: UniMMConfig = um.model.config
    generation, vision = config.generation_config(), config.vision_config()
    if generation is not None:
        return generation.image_size
    return vision.image_size if vision is not None else CANVAS


def picture(scene: Scene) -> Image.Image:
    """The scene as a PIL image."""
    return Image.fromarray(scene.render())
