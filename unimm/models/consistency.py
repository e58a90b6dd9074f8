"""Whether the parts of a model go together: checks of a configuration, each a line that names the field."""

from __future__ import annotations

from transformers import PreTrainedConfig

from unimm.models.fusion_parts import BothFusionConfig, CrossFusionConfig, StreamFusionConfig
from unimm.models.image_tokenizers.movq import MoVQConfig
from unimm.models.image_tokenizers.vq import ImageTokenizerConfig
from unimm.models.layout import ImageLayout, PictureLayout
from unimm.models.parts import (
    AreaViewsConfig,
    AttendReducerConfig,
    CanvasViewsConfig,
    CodesEncoderConfig,
    FitViewsConfig,
    FusionConfig,
    ImageGenerationConfig,
    JoinReducerConfig,
    MropePositionsConfig,
    NaflexEncoderConfig,
    PositionsConfig,
    ResampleReducerConfig,
    SquareViewsConfig,
    TiledEncoderConfig,
    TimmEncoderConfig,
    TransformersEncoderConfig,
    ViewsConfig,
)
from unimm.models.seeing import Seeing
from unimm.sections import FieldError, show


def check_seeing(seeing: Seeing, generation: ImageGenerationConfig | None, context: int) -> None:
    """Check that views, encoder and reducer go together, and with the rest of the model.

    Raises:
        FieldError: they do not.
    """
    views, encoder, _ = seeing
    if (views is None) != (encoder is None):
        given, lacking = ("encoder", "views") if views is None else ("views", "encoder")
        raise FieldError(f"{lacking}: missing, though `{given}` is given; add it, or leave out both")
    if views is None or encoder is None:
        return
    if isinstance(encoder, CodesEncoderConfig):
        if not isinstance(views, AreaViewsConfig) or generation is None or not generation.shared:
            raise FieldError("encoder.kind: codes need views of the kind area, and `generation.shared`")
        _expect("views.stride", views.stride, generation.stride, "stride of generation")
    elif isinstance(encoder, TiledEncoderConfig):
        _check_tiled(encoder, seeing)
    elif seeing.side is not None:
        if not isinstance(views, SquareViewsConfig | CanvasViewsConfig):
            raise FieldError(
                "views.kind: expected square or canvas, since all views of this encoder are squares"
            )
        _check_square(seeing, views.tile if isinstance(views, CanvasViewsConfig) else views.image_size)
    else:
        if isinstance(views, SquareViewsConfig | CanvasViewsConfig):
            raise FieldError(
                "views.kind: expected area or fit, since views of this encoder keep their own sizes"
            )
        _check_native(seeing, views)
    if isinstance(views, AreaViewsConfig):
        _check_area(views, context)


def _check_square(seeing: Seeing, image_size: int) -> None:
    encoder, reducer, side = seeing.encoder, seeing.reducer, seeing.side
    assert side is not None
    if isinstance(encoder, TimmEncoderConfig):
        options = encoder.kwargs
        size, patch = options.get("img_size", image_size), options.get("patch_size")
        joined = options.get("embed_dim", encoder.width) * max(len(encoder.layers), 1)
        _expect("encoder.kwargs.img_size", size, image_size, "pixels a side of views")
        _expect("encoder.kwargs.embed_dim", joined, encoder.width, "width")
        if patch is not None:
            _expect("encoder.tokens", encoder.tokens, (size // patch) ** 2, "(img_size / patch_size)²")
        if options.get("embed_dim", encoder.width) % options.get("num_heads", 1):
            raise FieldError(
                "encoder.kwargs.num_heads: expected a divisor of width "
                f"({encoder.width}), got {options['num_heads']}"
            )
        depth = options.get("depth")
        if depth is not None and encoder.layers and max(encoder.layers) >= depth:
            raise FieldError(
                f"encoder.layers: {max(encoder.layers)}, but depth is {depth} and they count from 0"
            )
        tokens = encoder.tokens
    else:
        assert isinstance(encoder, TransformersEncoderConfig | NaflexEncoderConfig)
        _expect("encoder.side", side, image_size // encoder.patch, "pixels a side of views / patch")
        tokens = side**2
    if isinstance(reducer, ResampleReducerConfig):
        raise FieldError("reducer.kind: resample goes with views of the kind fit")
    if isinstance(seeing.views, CanvasViewsConfig) and (overlap := seeing.views.overlap):
        unit = (image_size // side) * getattr(reducer, "side", 1)
        if overlap % unit or 2 * overlap >= image_size:
            raise FieldError(
                f"views.overlap: expected a multiple of {unit} (patch of encoder x side of reducer), less than half of "
                f"{image_size}, got {overlap}"
            )
    if isinstance(reducer, AttendReducerConfig):
        _check_attending(seeing.views)
    whole = isinstance(reducer, JoinReducerConfig | AttendReducerConfig)
    if side**2 != tokens or (whole and side % reducer.side):
        raise FieldError(
            f"reducer.side: {reducer.side} x {reducer.side} features do not divide a square of {tokens}"
        )


def _check_tiled(encoder: TiledEncoderConfig, seeing: Seeing) -> None:
    """Check that views are the tiles of an image alone, and as many as the encoder takes."""
    views = seeing.views
    if not isinstance(views, CanvasViewsConfig) or views.whole != "none" or views.overlap:
        raise FieldError("views: expected the kind canvas, whole none and no overlap, for the tiled encoder")
    if not isinstance(seeing.reducer, JoinReducerConfig) or seeing.reducer.side != 1:
        raise FieldError("reducer: expected the kind join of side 1, for the tiled encoder")
    _expect("views.tile", views.tile, encoder.image_size, "image_size of the encoder")
    if views.most > encoder.tiles:
        raise FieldError(
            f"views.most: expected at most {encoder.tiles} (tiles of the encoder), got {views.most}"
        )
    if encoder.image_size % encoder.patch:
        raise FieldError(f"encoder.patch: expected a divisor of {encoder.image_size}, got {encoder.patch}")
    if encoder.hidden % encoder.heads:
        raise FieldError(
            f"encoder.heads: expected a divisor of hidden ({encoder.hidden}), got {encoder.heads}"
        )
    if encoder.layers and max(encoder.layers) >= encoder.depth:
        raise FieldError(
            f"encoder.layers: {max(encoder.layers)}, but depth is {encoder.depth} and they count from 0"
        )


def _check_attending(views: ViewsConfig | None) -> None:
    """Check that views are the whole image and then its tiles."""
    if not isinstance(views, CanvasViewsConfig) or views.whole != "first" or views.alone:
        raise FieldError(
            "reducer.kind: attend goes with views of the kind canvas, the whole first, never alone"
        )


def _check_native(seeing: Seeing, views: ViewsConfig) -> None:
    """Check sides that are multiples of what a token covers."""
    reducer, unit = seeing.reducer, seeing.unit
    if not isinstance(reducer, JoinReducerConfig | ResampleReducerConfig):
        raise FieldError("reducer.kind: expected join or resample where views keep their own sizes")
    if isinstance(views, AreaViewsConfig):
        _expect("views.stride", views.stride, unit, "patch of encoder x side of reducer")
        return
    assert isinstance(views, FitViewsConfig)
    if views.unit % unit:
        raise FieldError(
            f"views.unit: expected a multiple of {unit} (patch of encoder x side of reducer), got {views.unit}"
        )
    if isinstance(reducer, ResampleReducerConfig) and not seeing.tokens(*views.bounds)[1]:
        rows, columns = seeing.features(*views.bounds)
        raise FieldError(
            f"reducer.queries: no entry for views of {rows * columns} features (views.bounds / patch)"
        )


def _check_area(views: AreaViewsConfig, context: int) -> None:
    if views.least > views.most:
        raise FieldError(f"views.least: expected at most `most` ({views.most}), got {views.least}")
    if views.least // views.stride**2 > context:
        raise FieldError(
            f"views.least: {views.least} pixels take {views.least // views.stride**2} tokens, "
            f"the decoder's context holds {context}"
        )


def check_positions(positions: PositionsConfig, fusion: FusionConfig, decoder: PreTrainedConfig) -> None:
    """Check that positions go with the decoder and with what it looks at.

    Raises:
        FieldError: they do not.
    """
    if not isinstance(positions, MropePositionsConfig):
        return
    if not isinstance(fusion, StreamFusionConfig):
        raise FieldError(f"positions.kind: expected counted where fusion is {fusion.kind}, got mrope")
    width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    rope = getattr(decoder, "rope_parameters", None) or {}
    turned = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    if (own := sum(positions.sections)) != turned:
        raise FieldError(
            f"positions.sections: expected {turned} in sum (rotary frequencies of a head), got {own}"
        )


def check_rasters(layout: ImageLayout, seeing: Seeing) -> None:
    """Check that the grammar has room for what the encoder gives.

    Raises:
        FieldError: it has not.
    """
    canvas = isinstance(seeing.views, CanvasViewsConfig)
    picture = layout.picture
    if picture is not None and picture.mark == "image":  # one placeholder, whatever it stands for
        return
    if canvas != (picture is not None and picture.tile is not None):
        raise FieldError("layout.picture.tile: expected with views of the kind canvas, and there alone")
    if not canvas or picture is None:
        return
    views, tile = seeing.views, seeing.tile
    assert isinstance(views, CanvasViewsConfig)
    if tuple(picture.tile or ()) != tile or (picture.whole is not None and tuple(picture.whole) != tile):
        raise FieldError(
            f"layout.picture.tile: expected {show(tile)}, the tokens of a view, got {show(picture.tile)}"
        )
    for name, wanted in (("whole_at", views.whole), ("alone", views.alone)):
        if getattr(picture, name) != wanted:
            raise FieldError(f"layout.picture.{name}: expected {show(wanted)}, as in views")


def check_fusion(fusion: FusionConfig, seeing: Seeing, decoder: PreTrainedConfig) -> None:
    """Check that a memory goes with the decoder that looks at it, and with what it is made of.

    Raises:
        FieldError: it does not.
    """
    if isinstance(fusion, StreamFusionConfig):
        return
    if seeing.encoder is None or isinstance(seeing.encoder, CodesEncoderConfig):
        raise FieldError(f"fusion.kind: {fusion.kind} needs an encoder whose features are a memory")
    depth, width = decoder.num_hidden_layers, decoder.hidden_size
    if list(fusion.layers) != sorted(set(fusion.layers)) or fusion.layers[-1] >= depth:
        raise FieldError(
            f"fusion.layers: expected rising numbers below {depth} (layers of the decoder), got {show(fusion.layers)}"
        )
    for name, value, whole in (("heads", width, fusion.heads), ("kv_heads", fusion.heads, fusion.kv_heads)):
        if value % whole:
            raise FieldError(f"fusion.{name}: expected a divisor of {value}, got {whole}")
    views = seeing.views
    if isinstance(views, CanvasViewsConfig) and views.overlap:
        raise FieldError(f"views.overlap: expected 0 where fusion is {fusion.kind}, got {views.overlap}")
    if not isinstance(fusion, BothFusionConfig):
        return
    if not isinstance(views, CanvasViewsConfig) or views.whole == "none":
        raise FieldError("fusion.kind: both goes with views of the kind canvas that have a whole")
    if fusion.tags and len(fusion.tags) != views.most:
        raise FieldError(
            f"fusion.tags: expected one for each of {views.most} tiles, or none, got {len(fusion.tags)}"
        )


def check_marks(layout: ImageLayout, fusion: FusionConfig) -> None:
    """Check that what stands in the stream goes with what is a memory.

    Raises:
        FieldError: it does not.
    """
    picture = layout.picture or PictureLayout()
    apart = isinstance(fusion, BothFusionConfig)
    mark = "none"
    if isinstance(fusion, CrossFusionConfig):
        mark = "tile" if fusion.sees == "tile" else "image"
    for name, wanted in (("mark", mark), ("apart", apart)):
        if getattr(picture, name) != wanted:
            raise FieldError(
                f"layout.picture.{name}: expected {show(wanted)} where fusion is {fusion.kind}, "
                f"got {show(getattr(picture, name))}"
            )
    if mark == "none" and not apart:
        return
    for name in ("row_end", "last_row_end", "joint", "add"):
        if getattr(picture, name):
            raise FieldError(f"layout.picture.{name}: expected none where fusion is {fusion.kind}")


def check_generation(generation: ImageGenerationConfig, tokenizer: ImageTokenizerConfig | MoVQConfig) -> None:
    """Check that the code side goes with its image tokenizer.

    Raises:
        FieldError: it does not.
    """
    _expect("generation.codes", generation.codes, tokenizer.codebook_size, "the image tokenizer's")
    _expect("generation.stride", generation.stride, tokenizer.stride, "the image tokenizer's")
    if generation.image_size % generation.stride:
        raise FieldError(
            f"generation.image_size: expected a multiple of stride ({generation.stride}), "
            f"got {generation.image_size}"
        )
    if not generation.shared and not generation.dim:
        raise FieldError("generation.dim: expected more than 0, got 0")


def check_layout(layout: ImageLayout, vocabulary: int, generation: ImageGenerationConfig | None) -> None:
    """Check that the tokens of images go with the parts that they stand for.

    Args:
        layout: the tokens.
        vocabulary: the decoder's number of tokens.
        generation: the code side, if there is one.

    Raises:
        FieldError: they do not.
    """
    shared = generation is not None and generation.shared
    if generation is not None:
        _expect("layout.codes", layout.codes, generation.codes if shared else 0, "those that are tokens")
        for side in layout.grid:
            _expect("layout.grid", side, generation.grid, "image_size / stride of generation, twice")
    tokens = {name: getattr(layout, name) for name in _TOKENS}
    if shared:
        tokens |= {"code": layout.code + layout.codes - 1}
        tokens["feature"] = min(
            layout.feature, vocabulary - 1
        )  # it need not be a token: it is never embedded
    for name in _SHARED_TOKENS:
        if generation is not None and (tokens[name] is None) == shared:
            raise FieldError(f"layout.{name}: expected a token where codes are tokens, and there alone")
    if layout.picture is not None:
        tokens |= {f"picture.{name}": token for name, token in layout.picture.tokens().items()}
    named = {**{name: tokens[name] for name in ("begin", "end", "feature", "video")}, "code": layout.code}
    apart = {name: token for name, token in named.items() if token is not None}
    if generation is not None and layout.begin is None:
        raise FieldError(
            "layout.begin: expected a token where `generation` is given: a drawing begins with it"
        )
    if len(set(apart.values())) < len(apart):
        raise FieldError(f"layout: expected tokens that differ, got {show(apart)}")
    for name, token in tokens.items():
        if token is not None and token >= vocabulary:
            raise FieldError(f"layout.{name}: token {token} is beyond the vocabulary of {vocabulary}")


_SHARED_TOKENS = ("wrapper", "end_of_line", "end_of_frame")
_TOKENS = ("begin", "end", "feature", "video", *_SHARED_TOKENS)


def _expect(key: str, value: int, wanted: int, why: str) -> None:
    if value != wanted:
        raise FieldError(f"{key}: expected {wanted} ({why}), got {value}")
