"""Drawings of a benchmark's prompts, in the folders and under the names that its official code reads.

Each drawing has a seed of its own by the protocol's rule, so any part of them may be drawn anywhere and in any batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unimm.errors import UserError
from unimm.evaluation.items import EvalItem
from unimm.evaluation.protocol import DrawingRecipe, EvaluationProtocol
from unimm.files import atomic_write, make_folder
from unimm.images import as_size, read_image, save_image

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

DRAWINGS = "images"  # folder of an output
MAX_NAME = 200  # bytes of a prompt in a file's name
DrawnImages = list[dict[str, Any]]


def file_names(recipe: DrawingRecipe, item: EvalItem) -> list[str]:
    """The files of an item's drawings, relative to their folder: one each, or one that holds all."""
    samples = range(recipe.samples)
    first = item.index * recipe.samples
    if recipe.layout == "geneval":
        return [f"{item.index:05}/samples/{sample:05}.png" for sample in samples]
    if recipe.layout == "dpg":
        return [f"{_plain_name(item.key)}.png"]
    if recipe.layout == "t2i-compbench":
        return [f"samples/{_plain_name(item.prompt)}_{first + sample:06}.png" for sample in samples]
    if recipe.layout == "wise" or recipe.samples == 1:
        return [f"{_plain_name(item.key)}.png"]
    return [f"{_plain_name(item.key)}-{sample}.png" for sample in samples]


def _plain_name(text: str) -> str:
    """A text as part of a file's name."""
    name = "".join("-" if letter in "/\\\0\n\t" else letter for letter in text).strip() or "-"
    encoded = name.encode()
    return name if len(encoded) <= MAX_NAME else encoded[:MAX_NAME].decode(errors="ignore")


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an image's size and pixels, whatever file they stand in."""
    pixels = np.asarray(image.convert("RGB"))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def draw_items(
    um: UniMM, items: Iterable[EvalItem], recipe: DrawingRecipe
) -> Iterator[list[tuple[EvalItem, list[Image.Image]]]]:
    """Draw all samples of items, a batch of images together.

    Raises:
        UserError: the model does not draw, or a prompt is too long; the line names the item.
    """
    size = max(1, um.batch_size // recipe.samples)
    left = iter(items)
    options = {
        name: value
        for name in ("guidance_scale", "temperature", "top_k", "top_p")
        if (value := getattr(recipe, name)) is not None
    }
    while batch := list(itertools.islice(left, size)):
        prompts = [item.prompt for item in batch]
        seeds = [seed for item in batch for seed in seeds_of(recipe, item)]
        try:
            images = um.draw(prompts, recipe.samples, seed=seeds, size=as_size(recipe.size), **options)
        except UserError as error:
            raise UserError(f"items {batch[0].key} to {batch[-1].key}: {error}") from None
        each = recipe.samples
        yield [(item, images[place * each : (place + 1) * each]) for place, item in enumerate(batch)]


def seeds_of(recipe: DrawingRecipe, item: EvalItem) -> list[int]:
    """The seeds of an item's drawings."""
    first = recipe.seed + item.index * recipe.samples
    return list(range(first, first + recipe.samples))


def write_drawings(
    folder: Path, recipe: DrawingRecipe, item: EvalItem, images: Sequence[Image.Image]
) -> DrawnImages:
    """Write an item's drawings, and what the official code wants beside them.

    Raises:
        UserError: they cannot be written.
    """
    names, seeds = file_names(recipe, item), seeds_of(recipe, item)
    files = [grid_of_images(images)] if len(names) == 1 and len(images) > 1 else list(images)
    parts = [seeds] if len(files) == 1 else [[seed] for seed in seeds]
    drawn = []
    for name, image, own in zip(names, files, parts, strict=True):
        path = folder / name
        make_folder(folder, *Path(name).parts[:-1])
        save_image(image, path)
        drawn.append({"file": name, "seeds": own, "sha256": pixel_hash(image)})
    if recipe.layout == "geneval":
        with atomic_write(folder / f"{item.index:05}" / "metadata.jsonl") as path:
            path.write_text(
                json.dumps(item.fields.get("metadata", {"prompt": item.prompt})), encoding="utf-8"
            )
    return drawn


def grid_of_images(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in a square grid, row by row, as DPG-Bench crops it."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for place, image in enumerate(images):
        grid.paste(image, (place % columns * width, place // columns * height))
    return grid


def crops_of_grid(grid: Image.Image, count: int) -> list[Image.Image]:
    """The images of `grid_of_images`."""
    columns = math.ceil(math.sqrt(count))
    width, height = grid.width // columns, grid.height // math.ceil(count / columns)
    return [
        grid.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
        for x, y in ((place % columns, place // columns) for place in range(count))
    ]


def read_drawing(folder: Path, item: str, drawn: Mapping[str, Any]) -> Image.Image:
    """An image that was drawn.

    Raises:
        UserError: it is missing, or another than was drawn.
    """
    path = folder / str(drawn["file"])
    if not path.is_file():
        raise UserError(f"item {item}: {path}: no such image; draw it again before it is judged")
    image = read_image(path)
    if pixel_hash(image) != drawn["sha256"]:
        raise UserError(
            f"item {item}: {path}: is another image than was drawn; remove it to have it drawn again"
        )
    return image


def find_drawings(folder: Path, recipe: DrawingRecipe, item: EvalItem) -> DrawnImages:
    """An item's drawings that were made elsewhere.

    Raises:
        UserError: one is missing or cannot be read.
    """
    found = []
    for name in file_names(recipe, item):
        path = folder / name
        if not path.is_file():
            raise UserError(f"item {item.key}: {path}: no such image ({recipe.layout} names it so)")
        found.append({"file": name, "seeds": [], "sha256": pixel_hash(read_image(path))})
    return found


def write_prompts(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the list of prompts and their images that GenEval 2's code reads."""
    listed = {line["prompt"]: str((folder / line["images"][0]["file"]).resolve()) for line in lines}
    with atomic_write(folder / "image_paths.json") as path:
        path.write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")


def compare_drawings(
    um: UniMM, protocol: EvaluationProtocol, items: Iterable[EvalItem], lines: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Draw items again; what is said of each that comes out otherwise."""
    assert protocol.drawing is not None
    differing = []
    for batch in draw_items(um, items, protocol.drawing):
        for item, images in batch:
            names = file_names(protocol.drawing, item)
            files = [grid_of_images(images)] if len(names) == 1 and len(images) > 1 else images
            hashes = [one["sha256"] for one in lines[item.key]["images"]]
            for name, image, wanted in zip(names, files, hashes, strict=True):
                if pixel_hash(image) != wanted:
                    differing.append(f"{item.key}: {name} has other pixels")
    return differing
