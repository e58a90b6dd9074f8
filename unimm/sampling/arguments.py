"""What callers give to `UniMM`: one or several of a thing, images for each, a size; and what of it makes no sense."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from unimm.errors import UserError, UserNote
from unimm.images import is_image
from unimm.videos import Video

if TYPE_CHECKING:
    from unimm.images import ImageInput
    from unimm.models.modeling import UniMMModel
    from unimm.processing.processor import UniMMProcessor

ImageInputs: TypeAlias = (
    "ImageInput | Video | Iterable[ImageInput | Video | Iterable[ImageInput | Video] | None] | None"
)
"""What goes with questions or prompts: one image or video for all, or for each one, several, or None."""


def listed(values: Any, name: str) -> list[Any]:
    """Return several values as a list.

    Raises:
        UserError: they are not several.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise UserError(f"{name}: expected one or a list of them, got {type(values).__name__}")
    return list(values)


def check_text(text: Any, name: str, wanted: str) -> None:
    """Refuse what is no text, or empty."""
    if not isinstance(text, str):
        raise UserError(f"{name}: expected a text, got {type(text).__name__}")
    if not text.strip():
        raise UserError(f"{name}: empty; {wanted}")


def is_shown(value: Any) -> bool:
    """Whether this is one image or video, and not a collection of them."""
    return isinstance(value, Video) or is_image(value)


def images_of(entry: Any) -> list[ImageInput | Video]:
    """Return the images that go with one question or prompt."""
    if entry is None:
        return []
    return [entry] if is_shown(entry) else listed(entry, "images")


def images_of_each(images: ImageInputs, prompts: int) -> list[list[ImageInput | Video]]:
    """Return the images of each prompt."""
    if images is None or is_shown(images):
        return [images_of(images)] * prompts
    entries = listed(images, "images")
    if len(entries) != prompts:
        raise UserError(f"images: {len(entries)} entries for {prompts} prompts; give one for each, or None")
    return [images_of(entry) for entry in entries]


def grid_of(model: UniMMModel, processor: UniMMProcessor, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of codes for a size in pixels."""
    rows, columns = model.layout.grid
    if size is None:
        return rows, columns
    stride = processor.stride
    width, height = size
    own = f"{columns * stride}x{rows * stride}"
    if size == (columns * stride, rows * stride):
        return rows, columns
    generation = model.config.generation_config()
    if generation is not None and generation.places:
        raise UserError(f"size: {width}x{height}; this model draws {own} only")
    if min(size) < stride or width % stride or height % stride:
        raise UserError(f"size: {width}x{height}; give multiples of {stride}, such as {own}")
    if not model.layout.sized:
        note = f"size: {width}x{height} is outside what this model was trained on ({own})"
        warnings.warn(note, UserNote, stacklevel=4)
    return height // stride, width // stride
