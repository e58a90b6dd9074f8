"""What a config of transformers may say, key by key, before anything is built from it.

The keys and their types are those of its class; their ranges stand here, by name. Nothing else of a document reaches a
library: not the name of a file, a repository, a kernel or a class, and no key that would hide a method.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import AfterValidator, Field, create_model, model_validator
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from unimm.documents import shown_key
from unimm.sections import FieldError, Foreign, near, show, validate

MAX_SIDE = 4096  # pixels of a square image
DTYPE_KEYS = ("dtype", "torch_dtype")  # how transformers names a part's number format, today and earlier
_BASE = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))
# What transformers writes, or wrote, into any config, and what it hands on to one; none of it changes our models.
COMMON = frozenset(
    {
        *_BASE, *GenerationConfig._get_default_generation_params(), *DTYPE_KEYS, "model_type", "name_or_path",
        "_name_or_path", "_commit_hash", "_from_auto", "_attn_implementation", "attn_implementation",
        "_attn_implementation_autoset", "_experts_implementation", "experts_implementation", "output_attentions",
        "num_labels", "use_cache", "use_return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss",
        "pruned_heads", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "is_decoder",
        "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "decoder_start_token_id",
        "sep_token_id", "pretraining_tp", "quantization_config",
    }
)  # fmt: skip
_REPOSITORIES = ("attn_implementation", "experts_implementation")


def _activation(name: str) -> str:
    if name not in ACT2FN:
        raise ValueError(f"no activation is named {show(name)}{near(name, ACT2FN)}")
    return name


Text = Annotated[str, Field(max_length=2**16)]
Activation = Annotated[Text, AfterValidator(_activation)]
ChannelList = Annotated[list[Annotated[int, Field(gt=0, le=2**14)]], Field(min_length=1, max_length=8)]


class Published(Foreign):
    """Base of a part of a published checkpoint's config: it brings neither code nor quantised weights."""

    replaces_code: ClassVar[bool] = False
    """Whether the model is of code of its own, for which ours stands here, so that naming it is no fault."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        return without_code(data, cls.replaces_code)


def without_code(data: Any, replaced: bool = False) -> Any:
    """Return a section as it is, if it asks for nothing but architectures and plain weights.

    Args:
        data: the section.
        replaced: whether it may name code, which is not looked at.

    Raises:
        FieldError: it names code, a kernel of a repository, or a quantisation.
    """
    if not isinstance(data, Mapping):
        return data
    if data.get("auto_map") and not replaced:
        raise FieldError("auto_map: code of a checkpoint is never run; remove it if the model needs none")
    if data.get("quantization_config"):
        raise FieldError("quantization_config: quantised weights are not supported; use the plain ones")
    for name in _REPOSITORIES:
        for key in (name, f"_{name}", f"_{name}_internal"):
            if "/" in str(data.get(key)):
                raise FieldError(
                    f"{key}: code of a repository is never run, got {show(data[key])}; remove it"
                )
    return data


RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3", "mrope", "axial"]


class Rope(Foreign):
    """Rotary positions: their base, and how they are stretched."""

    rope_type: RopeType = "default"
    type: RopeType = "default"
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 10000.0
    factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    original_max_position_embeddings: Annotated[int, Field(gt=0, le=2**24)] | None = None
    attention_factor: Annotated[float, Field(gt=0, le=1e3)] | None = None
    beta_fast: Annotated[float, Field(gt=0, le=1e4)] | None = None
    beta_slow: Annotated[float, Field(gt=0, le=1e4)] | None = None
    low_freq_factor: Annotated[float, Field(gt=0, le=1e4)] | None = None
    high_freq_factor: Annotated[float, Field(gt=0, le=1e4)] | None = None
    short_factor: Annotated[list[float], Field(max_length=2**12)] | None = None
    long_factor: Annotated[list[float], Field(max_length=2**12)] | None = None
    mrope_section: Annotated[list[Annotated[int, Field(ge=0, le=2**12)]], Field(max_length=3)] | None = None
    mscale: Annotated[float, Field(gt=0, le=1e3)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e3)] | None = None
    truncate: bool | None = None


def check_rope(given: Any, key: str) -> None:
    """Check that rotary positions are described by fields that there are.

    Raises:
        FieldError: a field is unknown.
    """
    for name in given if isinstance(given, Mapping) else ():
        if name not in Rope.model_fields:
            raise FieldError(f"{key}.{shown_key(name)}: unknown key{near(name, Rope.model_fields)}")


Bounds = Mapping[str, Any]
# by a field's name: the first that matches all of it
_RANGES: tuple[tuple[str, Bounds], ...] = (
    (r"vocab_size|num_embeddings|codebook_size", {"gt": 0, "le": 2**22}),
    (r".*token_id", {"ge": 0, "lt": 2**31}),
    (r".*intermediate_size", {"gt": 0, "le": 2**20}),
    (r"num_hidden_layers|depth", {"gt": 0, "le": 2**10}),
    (r"num_res_blocks", {"gt": 0, "le": 2**6}),
    (r"temporal_downsample_factor|channel_multiplier", {"gt": 0, "le": 2**6}),
    (r"(original_)?max_position_embeddings", {"gt": 0, "le": 2**24}),
    (r".*(hidden_size|_dim|_heads|_channels|num_patches)", {"gt": 0, "le": 2**16}),
    (r".*eps(ilon)?", {"gt": 0, "lt": 1}),
    (r".*(dropout|drop)(_rate)?", {"ge": 0, "lt": 1}),
    (r"initializer_range|init_std", {"ge": 0, "le": 100}),
    (r"rope_theta|rotary_emb_base", {"ge": 1, "le": 1e12}),
    (r"partial_rotary_factor|rotary_pct", {"gt": 0, "le": 1}),
    (r".*ratio", {"gt": 0, "le": 2**8}),
    (r".*", {"ge": 0, "le": 2**31}),
)
# keys that configs have had, or still have, beside the fields of their class
_FORMER: dict[str, Any] = {
    "rope_theta": float,
    "rope_scaling": Rope | None,
    "partial_rotary_factor": float,
    "rotary_pct": float,
    "rotary_emb_base": float,
}
_KINDS: dict[str, Any] = {
    "rope_parameters": Rope | None,
    "image_size": Annotated[int, Field(gt=0, le=MAX_SIDE)],
    "patch_size": Annotated[int, Field(gt=0, le=2**10)],
    "hidden_act": Activation,
    "hidden_activation": Activation | None,
}


@functools.cache
def section_for(described: Any) -> type[Published]:
    """Return the section of what matters to us in a config of transformers: its own fields, within their ranges.

    Args:
        described: the class of the config.
    """
    hints = get_type_hints(described, localns={"torch": torch})
    own = [field.name for field in dataclasses.fields(described) if field.name not in _BASE]
    found = {name: hints[name] for name in own if name not in ("use_cache", "pretraining_tp")}
    found |= {alias: hints[name] for alias, name in described.attribute_map.items() if name in found}
    if "rope_parameters" in found:
        found |= {name: kind for name, kind in _FORMER.items() if name not in found}
    fields: Any = {name: (_KINDS.get(name) or _within(name, hint), None) for name, hint in found.items()}
    section: type[Published] = create_model(described.__name__, __base__=Published, **fields)
    return section


def _within(name: str, hint: Any) -> Any:
    """A field's type with the range that goes with its name."""
    bounds = next(bounds for pattern, bounds in _RANGES if re.fullmatch(pattern, name))
    return _bounded(hint, bounds)


def _bounded(hint: Any, bounds: Bounds) -> Any:
    """A type with its numbers bounded, and its texts and lists in length."""
    parts = [part for part in get_args(hint) if part is not Ellipsis]
    if get_origin(hint) in (Union, types.UnionType):
        if float in parts:
            parts = [part for part in parts if part is not int]  # an integer is a number too
        plain = [
            part for part in parts if not (isinstance(part, type) and issubclass(part, PreTrainedConfig))
        ]
        return Union[tuple(_bounded(part, bounds) for part in plain)]  # noqa: UP007, made here
    if get_origin(hint) in (list, tuple):
        return Annotated[list[_bounded(parts[0], bounds)], Field(max_length=2**10)]  # type: ignore[misc]
    if hint in (int, float):
        return Annotated[hint, Field(**dict(bounds))]
    return Text if hint is str else hint


class Common(Published):
    """What of a config transformers itself needs to know."""

    architectures: list[Text] | None = None
    transformers_version: Text | None = None
    name_or_path: Text | Path | None = None
    tie_word_embeddings: bool = False
    attn_implementation: Text | None = None


def common_options(options: Mapping[str, Any], *own: str) -> dict[str, Any]:
    """Return what of a config's further keys to hand to transformers.

    Args:
        options: the keys that have no argument of their own.
        own: those of them that are handled elsewhere.

    Raises:
        FieldError: a key is unknown, or of the wrong type.
    """
    for name in options:
        if name not in COMMON and name not in Common.model_fields and name not in own:
            raise FieldError(f"{shown_key(name)}: unknown key")
    for key in DTYPE_KEYS:
        dtype = options.get(key)
        if not (dtype is None or isinstance(dtype, torch.dtype) or _is_dtype(dtype)):
            raise FieldError(f"{key}: expected a number format such as float32, got {show(dtype)}")
    kept = validate(Common, dict(options), "").model_dump(exclude_unset=True, exclude_none=True)
    dtypes = {key: options[key] for key in DTYPE_KEYS if options.get(key) is not None}
    return kept | dtypes | {key: options[key] for key in own if key in options}


def _is_dtype(name: Any) -> bool:
    return isinstance(name, str) and isinstance(
        getattr(torch, name.removeprefix("torch."), None), torch.dtype
    )


def own_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part's description without what transformers writes into every config, number formats included."""
    return {key: value for key, value in without_code(section).items() if key not in COMMON}
