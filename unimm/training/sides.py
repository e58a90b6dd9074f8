"""What a recipe may ask of a model that only understands images, or only draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unimm.data.codes import some_records
from unimm.data.emojiscenes.settings import EMOJISCENES, SAMPLE_KINDS, SCENE_NAMES
from unimm.data.sources import Source
from unimm.data.tables.settings import TABLE_NAMES, TABLE_SOURCE
from unimm.processing.processor import UniMMProcessor
from unimm.sections import near

if TYPE_CHECKING:
    from unimm.training.recipe import BaseRecipe
    from unimm.training.tasks.unified import UnifiedRecipe

NO_DRAWING = "this model cannot draw; leave it out"
NO_UNDERSTANDING = "this model understands no images; leave it out"


def check_sides(recipe: UnifiedRecipe, processor: UniMMProcessor) -> None:
    """Refuse what a model has no part for.

    Args:
        recipe: what is asked for.
        processor: of the model.

    Raises:
        UserError: a key asks for drawings, or for images to be understood, where the model has no part for them.
    """
    lacking = {}
    if processor.drawing_size is None:
        lacking["generation"] = NO_DRAWING
        asked = {
            "data.size": recipe.data.size,
            "data.keep_ratio": recipe.data.keep_ratio,
            "prompts": recipe.prompts,
            "model.sampling": recipe.model.sampling,
        }
        for key, value in asked.items():
            if value:
                raise recipe.error(key, NO_DRAWING)
    if processor.views is None:
        lacking["understanding"] = NO_UNDERSTANDING
    for index, stage in enumerate(recipe.stages):
        for kind, message in lacking.items():
            if stage.mixture.get(name := f"{EMOJISCENES}/{kind}"):
                raise recipe.error(f"stages[{index}].mixture.{name}", message)
        for name in (TABLE_SOURCE, TABLE_NAMES[0]) if "understanding" in lacking else ():
            if stage.mixture.get(name):
                raise recipe.error(f"stages[{index}].mixture.{name}", NO_UNDERSTANDING)


def check_mixture_names(recipe: UnifiedRecipe) -> None:
    """Refuse mixtures of names that no data has, and sources with the names of built-in data.

    Raises:
        UserError: the first of them, and what may stand there; or a stage has no data at all.
    """
    built_in = {EMOJISCENES: "scenes", TABLE_SOURCE: "tables"}
    for name in recipe.data.sources:
        if (what := built_in.get(name.split("/")[0])) is not None:
            raise recipe.error(f"data.sources.{name}", f"this names built-in {what}; give it another name")
    known = (*recipe.data.sources, EMOJISCENES, *SCENE_NAMES, TABLE_SOURCE, *TABLE_NAMES)
    for index, stage in enumerate(recipe.stages):
        key = f"stages[{index}].mixture"
        if not recipe.mixture(stage):
            message = f"no data; give data.sources, or {{{EMOJISCENES}: 1}} here for the built-in scenes"
            raise recipe.error(key, message)
        for name in stage.mixture:
            if name in known:
                continue
            if name in SAMPLE_KINDS:
                message = (
                    f"no source has this name; write {EMOJISCENES}/{name} for the built-in scenes, or "
                    f"give your data as data.sources.{name}"
                )
            else:
                message = f"no source has this name; one of {', '.join(known)}{near(name, known)}"
            raise recipe.error(f"{key}.{name}", message)


def check_source_images(recipe: BaseRecipe, key: str, source: Source, processor: UniMMProcessor) -> None:
    """Refuse a source each of whose records has images for what the model lacks; where some have, these are bad items.

    Args:
        recipe: which names it.
        key: where the recipe does.
        source: the source, some of whose records are looked at.
        processor: of the model.

    Raises:
        UserError: naming the key.
    """
    draws, understands = processor.drawing_size is not None, processor.views is not None
    if draws and understands:
        return
    records = list(some_records(source))
    if records and not draws and all(record.images(draw=True) for record in records):
        raise recipe.error(key, f"has images to draw, but {NO_DRAWING}")
    if records and not understands and all(record.images(draw=False) for record in records):
        raise recipe.error(key, f"has images to look at, but {NO_UNDERSTANDING}")
