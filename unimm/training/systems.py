"""The published systems that recipes describe, side by side: what each is made of, sees in an image, and trains when.

Everything is computed from the recipes (`system` marks them), so that the table says what a run would build.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from unimm.models.fusion_parts import StreamFusionConfig
from unimm.models.modeling import UniMMModel
from unimm.models.parts import (
    AbstractReducerConfig,
    AreaViewsConfig,
    AttendReducerConfig,
    CanvasViewsConfig,
    CodesEncoderConfig,
    FitViewsConfig,
    JoinReducerConfig,
    LinearEncoderConfig,
    MeanReducerConfig,
    MlpConnectorConfig,
    NaflexEncoderConfig,
    ResampleReducerConfig,
    SquareViewsConfig,
    TiledEncoderConfig,
    TimmEncoderConfig,
    TransformersEncoderConfig,
)
from unimm.processing.views import make_views
from unimm.recipes import list_recipes
from unimm.training.flops import weights_of
from unimm.training.model_builder import describe_model
from unimm.training.recipe import load_recipe

if TYPE_CHECKING:
    from unimm.training.tasks.unified import UnifiedRecipe

PHOTO_SIZE, PAGE_SIZE = (480, 640), (1754, 1240)
"""Height and width of the images whose tokens are counted: a photo, and an A4 page at 150 dots an inch."""
COLUMNS = {
    "system": "system",
    "year": "year",
    "fusion": "fusion",
    "views": "views",
    "encoder": "encoder",
    "reducer": "reducer",
    "connector": "connector",
    "decoder": "decoder",
    "parameters": "parameters",
    "photo": "tokens of 640 x 480",
    "page": "tokens of an A4 page",
    "trains": "what trains, stage by stage",
    "draws": "draws",
}
"""Keys of a system's row, and what stands over them."""


def systems() -> list[dict[str, Any]]:
    """Return a row of `COLUMNS` for each shipped recipe that is of a published system, the oldest first.

    Beside them, `recipe` and `paper` say where it comes from; `photo_memory` and `page_memory` how many rows of a
    memory the two images give.
    """
    rows = []
    for info in list_recipes():
        if not info.name.startswith("training/") or "\nsystem:" not in info.path.read_text(encoding="utf-8"):
            continue
        recipe: Any = load_recipe(info.path)
        if recipe.system is not None:
            rows.append({**describe_system(recipe), "recipe": info.name})
    return sorted(rows, key=lambda row: (row["year"], row["system"]))


def describe_system(recipe: UnifiedRecipe) -> dict[str, Any]:
    """Return the row of one recipe."""
    assert recipe.system is not None
    model = describe_model(recipe)
    config = model.config
    generation = config.generation_config()
    return {
        "system": recipe.system.name,
        "year": recipe.system.year,
        "fusion": fusion_in_words(model),
        "views": views_in_words(model),
        "encoder": encoder_in_words(model),
        "reducer": reducer_in_words(model),
        "connector": connector_in_words(model),
        "decoder": f"{config.decoder['model_type']}, {in_billions(weights_of(model.decoder))}",
        "parameters": sum(weights_of(part) for part in model.parts().values()),
        "photo": tokens_of(model, *PHOTO_SIZE),
        "page": tokens_of(model, *PAGE_SIZE),
        "photo_memory": memory_of(model, *PHOTO_SIZE),
        "page_memory": memory_of(model, *PAGE_SIZE),
        "trains": "; ".join(f"{stage.name}: {', '.join(stage.lr)}" for stage in recipe.stages),
        "draws": None if generation is None else f"{generation.image_size} x {generation.image_size}",
        "paper": recipe.system.paper,
    }


def tokens_of(model: UniMMModel, height: int, width: int) -> int | None:
    """Return the tokens of an image of so many pixels, with all that stands around its features.

    Words, such as the tags of tiles, are not counted: they depend on the text tokenizer.
    """
    views = make_views(model.config)
    if views is None:
        return None
    parts = model.layout.understanding(*views.grid_of(height, width))
    return sum(len(part) for part in parts if not isinstance(part, str))


def memory_of(model: UniMMModel, height: int, width: int) -> int:
    """Return the rows of the memory that an image of so many pixels gives; 0 where it stands in the stream."""
    views = make_views(model.config)
    if views is None or model.remembering is None:
        return 0
    return model.remembering.rows(views.grid_of(height, width))


def in_billions(count: int) -> str:
    """Return a number of parameters in words: 631M, 12.2B."""
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


# --- parts in words -----------------------------------------------------------------------------------------


def views_in_words(model: UniMMModel) -> str | None:
    """Return what an image is brought to."""
    views = model.config.views_config()
    if isinstance(views, SquareViewsConfig):
        return f"a square of {views.image_size}, padded"
    if isinstance(views, AreaViewsConfig):
        return f"own size, multiples of {views.stride}, up to {views.most / 1e6:.3g} megapixels"
    if isinstance(views, FitViewsConfig):
        height, width = views.bounds
        ways = {"stretch": "own size", "pad": "own size, padded", "whole": "enlarged or shrunk, padded"}
        return f"{ways[views.fill]}, within {width} x {height}"
    if isinstance(views, CanvasViewsConfig):
        tiles = f"{views.least} to {views.most}" if views.least > 1 else f"up to {views.most}"
        overlap = " that overlap" if views.overlap else ""
        whole = "" if views.whole == "none" else f", the whole {views.whole}"
        return f"{tiles} tiles of {views.tile}{overlap}{whole}"
    return None


def encoder_in_words(model: UniMMModel) -> str | None:
    """Return what makes features of it."""
    encoder = model.config.encoder_config()
    if isinstance(encoder, CodesEncoderConfig):
        return "its image tokenizer"
    if encoder is None or model.vision is None:
        return None
    size = in_billions(weights_of(model.vision))
    if isinstance(encoder, LinearEncoderConfig):
        return f"none: patches of {encoder.patch} x {encoder.patch} pixels, {size}"
    names = {
        TimmEncoderConfig: lambda part: part.name,
        NaflexEncoderConfig: lambda part: f"ViT of any size, {part.depth} x {part.width}",
        TransformersEncoderConfig: lambda part: part.name,
        TiledEncoderConfig: lambda part: (
            f"ViT of all tiles at once, {part.depth} + {part.global_depth} x {part.hidden}"
        ),
    }
    return f"{names[type(encoder)](encoder)}, {size}"  # type: ignore[no-untyped-call]


@functools.singledispatch
def _reduced(reducer: Any) -> str:
    raise TypeError(type(reducer).__name__)


@_reduced.register
def _(reducer: JoinReducerConfig) -> str:
    return "none" if reducer.side == 1 else f"{reducer.side} x {reducer.side} joined"


@_reduced.register
def _(reducer: MeanReducerConfig) -> str:
    return f"mean of {reducer.side} x {reducer.side}"


@_reduced.register
def _(reducer: AttendReducerConfig) -> str:
    return f"attention over {reducer.side} x {reducer.side}"


@_reduced.register
def _(reducer: ResampleReducerConfig) -> str:
    return f"{' or '.join(str(count) for _, count in reducer.queries)} learned queries"


@_reduced.register
def _(reducer: AbstractReducerConfig) -> str:
    return f"C-Abstractor to {reducer.side} x {reducer.side}"


def reducer_in_words(model: UniMMModel) -> str | None:
    """Return what makes fewer features of many."""
    return None if model.vision is None else _reduced(model.config.reducer_config())


def fusion_in_words(model: UniMMModel) -> str:
    """Return how what was seen reaches the decoder."""
    fusion = model.config.fusion_part()
    if isinstance(fusion, StreamFusionConfig) or model.fusion is None:
        return fusion.kind
    return f"{fusion.kind}, {len(fusion.layers)} blocks, {in_billions(weights_of(model.fusion))}"


def connector_in_words(model: UniMMModel) -> str | None:
    """Return what brings features to the decoder's width."""
    connector = model.config.connector_config()
    if model.connector is None:
        return None
    if not isinstance(connector, MlpConnectorConfig):
        return "none"
    if connector.gated:
        return "gated MLP"
    return "linear" if connector.depth == 1 else f"MLP of {connector.depth}"


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of `systems` as words."""
    shown = {**row, "parameters": in_billions(row["parameters"]), "draws": row["draws"] or "no"}
    for name in ("photo", "page"):
        if rows := row[f"{name}_memory"]:
            shown[name] = f"{row[name]}, and {rows} in memory"
    return ["" if shown[key] is None else str(shown[key]) for key in COLUMNS]
