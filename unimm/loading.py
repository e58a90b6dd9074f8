"""Load models: `load` makes a `UniMM` of a folder, a hub id or the package; `describe` tells what one is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from unimm.adapters import merge_adapter
from unimm.devices import choose_device, choose_dtype
from unimm.errors import UserError
from unimm.families.model import load_model
from unimm.families.source import Checkpoint
from unimm.locate import EMBEDDED, embedded_model, locate
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.models.modeling import UniMMModel
from unimm.models.parts import AreaViewsConfig, CanvasViewsConfig, FitViewsConfig, ViewsConfig
from unimm.models.placing import place_modules
from unimm.models.quantization import check_method, count_weights
from unimm.pipeline import UniMM
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.memory import EngineLimits, bytes_per_token
from unimm.sampling.speed import measure_products


class LoadOptions(TypedDict, total=False):
    """What few models are loaded with; see `load`."""

    device_map: str | Mapping[str, Any] | None
    views: Mapping[str, int] | None


def load(
    source: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    image_tokenizer: str | os.PathLike[str] | None = None,
    parts: str = "all",
    **further: Unpack[LoadOptions],
) -> UniMM:
    """Load a model.

    Args:
        source: None or "embedded" for the model that ships with the package, else a folder or a hub id.
        device: "auto" takes CUDA, then MPS, then the CPU.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        quantize: "int8" gives the decoder's linear layers and large heads int8 weights (`unimm.models.quantization`),
            a quarter of float32's memory; "int4" gives the layers int4 ones, a seventh. On CPUs small batches are
            faster too. What was saved quantised is loaded as it is, without this.
        adapter: folder of a peft adapter of that model, which is merged into its weights.
        revision: of a hub id: a branch, a tag or a commit (owner/name@revision says it too).
        image_tokenizer: folder or hub id of Emu3's vision tokenizer, which its original layout has apart; by default
            it is looked for in the folder and beside it, and fetched for a hub id.
        parts: "understand" leaves out the code side and the image tokenizer, "draw" the encoder and its connector;
            their weights are not read, and the model cannot be saved. "all" is all.
        **further: `device_map`, "auto" to spread the decoder's layers over all GPUs, or the device of each module by
            name, by accelerate (`unimm.models.placing`; not run on several GPUs yet). `views`, limits of the images to
            understand where the model has some: `{"max_pixels": 512 * 512}`, `min_pixels`, `max_tiles`.

    Raises:
        UserError: the source is missing, broken, or not a unimm model; the adapter is, or is of another model; or
            an option is unknown.
    """
    check_method(quantize)
    device_map, limits = further.get("device_map"), further.get("views")
    if device_map is not None and device != "auto":
        raise UserError(f"device: {device!r}, though device_map says where; leave one of them out")
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    checkpoint = locate(source, revision, image_tokenizer)
    _check_quantised(checkpoint, quantize, adapter)
    model, processor = load_model(checkpoint, number_format, parts)
    if limits:
        processor.limit_views(limits)
    if adapter is not None:
        model = merge_adapter(model, Path(adapter))
    if quantize is not None:  # before it moves: the device then never holds the whole weights
        model.quantise(quantize)
    if device_map is not None:
        place_modules(model, device_map)
        return UniMM(model, processor)
    return UniMM(nn.Module.to(model, place), processor)


def _check_quantised(
    checkpoint: Checkpoint, quantize: str | None, adapter: str | os.PathLike[str] | None
) -> None:
    """Refuse what cannot be done to weights that were saved quantised."""
    held = checkpoint.config.small_weights()
    if held is None:
        return
    if quantize not in (None, held.method):
        raise UserError(
            f"quantize: {quantize!r}, but {checkpoint.folder} holds {held.method} weights; load it without"
        )
    if adapter is not None:
        raise UserError(
            f"adapter: {checkpoint.folder} holds {held.method} weights; merge into the model that they were made of"
        )


def load_whole(source: str | os.PathLike[str] | None) -> UniMM:
    """Load a model to train: as float32, on the CPU.

    Raises:
        UserError: as `load`; or its weights are quantised.
    """
    um = load(source, device="cpu", dtype="float32")
    if (held := um.model.config.small_weights()) is not None:
        raise UserError(
            f"{source}: holds {held.method} weights, which cannot be trained; use those it is made of"
        )
    return um


def load_processor(source: str | os.PathLike[str] | None = None) -> UniMMProcessor:
    """Load a model's processor alone; its weights are neither fetched nor read.

    Args:
        source: what `load` takes.

    Raises:
        UserError: the source is missing or broken.
    """
    with locate(source, weights=False) as checkpoint:
        return checkpoint.processor


def describe(
    source: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    image_tokenizer: str | os.PathLike[str] | None = None,
    speed: bool = False,
) -> dict[str, Any]:
    """Say what a model is, from its configuration alone; no weights are read, nor fetched from the hub.

    Args:
        source: as `load` takes it.
        revision: as `load` takes it.
        image_tokenizer: as `load` takes it.
        speed: whether the products of its decoder are measured on this machine, with weights of its shapes
            (`unimm.sampling.speed.measure_products`).

    Returns:
        Family, parts with their parameters, context, image sizes and what the model can do.
    """
    with locate(source, revision, image_tokenizer, weights=False) as checkpoint:
        config = checkpoint.config
    with torch.device("meta"):
        model = UniMMModel(config)
    return {
        "source": EMBEDDED if checkpoint.folder == embedded_model() else str(checkpoint.folder),
        "family": checkpoint.family.name,
        "layout": checkpoint.layout,
        **describe_loaded(model),
        **({"speed": _speed(config.decoder_config())} if speed else {}),
    }


def describe_loaded(model: UniMMModel) -> dict[str, Any]:
    """Say what a model is made of, whether its weights are there or not.

    Args:
        model: on any device.

    Returns:
        Parts with their parameters, context, image sizes, what the model can do and what its engine may hold.
    """
    config = model.config
    parts = {name: count_weights(part) for name, part in model.parts().items()}
    if model.image_tokenizer is not None:
        parts["image_tokenizer"] = sum(p.numel() for p in model.image_tokenizer.parameters())
        if isinstance(model.image_tokenizer, ImageTokenizer):  # its codebook may be a buffer
            parts["image_tokenizer"] += model.image_tokenizer.quantize.stored
    views, generation = config.views_config(), config.generation_config()
    decoder = config.decoder_config()
    return {
        "decoder": decoder.model_type,
        "quantization": config.quantization,
        "parameters": parts,
        "parameters_total": sum(parts.values()),
        "context": decoder.max_position_embeddings,
        "understands": _understood(views),
        "draws": f"{generation.image_size}x{generation.image_size}" if generation else None,
        "can": [*(["caption", "ask", "chat"] if views else []), *(["draw"] if generation else [])],
        "engine": _engine_limits(decoder),
    }


def _speed(decoder: Any) -> dict[str, Any]:
    """The machine, and what it multiplies in what time with weights of a decoder's shapes."""
    device = choose_device("auto")
    machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {"machine": machine, "products": measure_products(decoder, device)}


def _engine_limits(decoder: Any) -> dict[str, int]:
    """What the cache of a model's engine may hold on this machine, in float32 on the CPU."""
    limits = EngineLimits.within(decoder, torch.float32, torch.device("cpu"))
    each = bytes_per_token(decoder, torch.float32)
    return {"max_rows": limits.max_rows, "max_tokens": limits.max_tokens, "bytes_per_token": each}


def _understood(views: ViewsConfig | None) -> str | None:
    """What sizes of images a model understands."""
    if isinstance(views, AreaViewsConfig):
        return f"any size, {views.least} to {views.most} pixels"
    if isinstance(views, FitViewsConfig):
        height, width = views.bounds
        return f"{'any size' if views.fill == 'whole' else 'its own size'}, within {width}x{height}"
    if isinstance(views, CanvasViewsConfig):
        whole = "" if views.whole == "none" else " and the whole"
        return f"up to {views.most} tiles of {views.tile}x{views.tile}{whole}"
    return None if views is None else f"{views.image_size}x{views.image_size}"
