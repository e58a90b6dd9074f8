"""Going through many samples in batches, with a progress bar where someone watches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image
from rich.progress import track

from unimm.console import terminal
from unimm.data.emojiscenes.scenes import CANVAS, Scene
from unimm.models.parts import SquareViewsConfig

if TYPE_CHECKING:
    from unimm.models.configuration import UniMMConfig
    from unimm.pipeline import UniMM

ANSWER_BATCH = 64
MAX_TOKENS = 64  # of what is said about a scene; a model that has not learnt to end would fill its context


def batches(count: int, description: str) -> Iterator[range]:
    """The ranges of indices of successive batches of `count` samples; the bar goes to stderr."""
    console = terminal(stderr=True)
    starts = range(0, count, ANSWER_BATCH)
    for start in track(starts, description, console=console, transient=True, disable=not console.is_terminal):
        yield range(start, min(start + ANSWER_BATCH, count))


def image_size(um: UniMM) -> int:
    """Pixels a side of the scenes for a model: those of its drawings, else of what its encoder sees."""
    config: UniMMConfig = um.model.config
    generation, views = config.generation_config(), config.views_config()
    if generation is not None:
        return generation.image_size
    return views.image_size if isinstance(views, SquareViewsConfig) else CANVAS


def render_image(scene: Scene) -> Image.Image:
    """The scene as a PIL image."""
    return Image.fromarray(scene.render())
