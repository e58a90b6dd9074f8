"""Adapters of peft, read whole and merged into a model's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from unimm.errors import UserError
from unimm.families.tensors import WeightFiles
from unimm.files import read_json, settled
from unimm.models.weights import is_finite, refuse
from unimm.sections import Foreign, validate

if TYPE_CHECKING:
    from unimm.models.modeling import UniMMModel

ADAPTER_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


# A repeated group may match in exponentially many ways; names of modules need none.
_REPEATED = re.compile(r"\)\s*[*+{?]")
_INDEX = Annotated[int, Field(ge=0, lt=2**31)]
_RANK = Annotated[int, Field(gt=0, le=2**12)]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        raise ValueError(f"no regular expression of modules' names: {text[:40]!r}") from None
    if len(text) > 2**10 or _REPEATED.search(text):
        raise ValueError("expected a shorter regular expression, without repeated groups")
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]
Patterns = Annotated[list[Pattern], Field(max_length=2**12)]


class AdapterConfig(Foreign):
    """`adapter_config.json`: the keys of a LoRA adapter that say what its weights mean; no other reaches peft."""

    peft_type: Literal["LORA"]
    r: _RANK = 8
    target_modules: Patterns | Pattern | None = None
    exclude_modules: Patterns | Pattern | None = None
    lora_alpha: Annotated[float, Field(gt=0, le=2**16)] = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: Patterns | None = None
    layers_to_transform: Annotated[list[_INDEX], Field(max_length=2**12)] | _INDEX | None = None
    layers_pattern: Patterns | Pattern | None = None
    rank_pattern: dict[Pattern, _RANK] | None = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0, le=2**16)]] | None = Field(default_factory=dict)
    trainable_token_indices: list[_INDEX] | dict[str, list[_INDEX]] | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = None


def merge_adapter(model: UniMMModel, folder: Path) -> UniMMModel:
    """Return a model with an adapter merged into its weights.

    Raises:
        UserError: the folder holds no adapter, a broken one, or one of another model; or peft is not installed.
    """
    if not (settled(folder) / ADAPTER_FILE).exists():
        raise UserError(f"{folder}: holds no adapter ({ADAPTER_FILE} is missing)")
    where = str(folder / ADAPTER_FILE)
    options = validate(AdapterConfig, read_json(folder / ADAPTER_FILE), where).model_dump(exclude_unset=True)
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if weights is None:
        raise UserError(f"{folder / WEIGHT_FILES[0]}: missing, and so is {WEIGHT_FILES[1]}")
    try:
        from peft import LoraConfig, PeftModel
    except ImportError:
        raise UserError("adapter: needs peft; install it with: pip install 'unimm[lora]'") from None
    with WeightFiles.of(weights) as given:
        _check_ranks(options, given, where)
        try:
            adapted = PeftModel.from_pretrained(model, folder, config=LoraConfig(**options))
        except Exception as error:  # peft and what it calls raise every kind
            line = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: not an adapter of this model ({line})") from None
        _check(adapted, given, weights)
    merged: UniMMModel = adapted.merge_and_unload().eval()
    return merged


def _check_ranks(options: dict[str, Any], given: WeightFiles, where: str) -> None:
    """Check that no rank is far beyond those of the weights, before it is allocated."""
    most = max((shape.shape[0] for name, shape in given.shapes.items() if "lora_A" in name), default=0)
    patterns = options.get("rank_pattern") or {}
    ranks = {"r": options.get("r", 0), **{f"rank_pattern.{key}": rank for key, rank in patterns.items()}}
    for key, rank in ranks.items():
        if rank > max(most, 64):
            raise UserError(f"{where}: {key}: a rank of {rank}, though the weights have {most} at most")


def _check(adapted: Any, given: WeightFiles, where: Path) -> None:
    """Check that a file holds an adapter's weights, all of them, and finite: peft warns at most."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(adapted)
    both = sorted(wanted.keys() & given.shapes.keys())
    refuse(
        str(where),
        missing=sorted(wanted.keys() - given.shapes.keys()),
        misshapen=[name for name in both if wanted[name].shape != given.shapes[name].shape],
        mistyped=[name for name in both if not given.shapes[name].is_floating_point()],
        surplus=sorted(given.shapes.keys() - wanted.keys()),
    )
    for name, tensor in wanted.items():
        if not is_finite(tensor):
            raise UserError(f"{where}: {name} holds NaN or infinite values")
