"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through peft: put in, saved as peft saves them, merged.

The extra `lora` brings peft. A recipe's section `lora` puts adapters into named modules; the group `lora` of a
stage's `lr` trains them, and nothing of the modules themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from unimm.errors import UserError
from unimm.folders import write_folder
from unimm.models.modeling import UniMMModel
from unimm.sections import Fraction, Positive, Section

ADAPTER = "adapter"  # folder of the adapter within an export
_PREFIX = "base_model.model."  # of a key in a file that `PeftModel.from_pretrained` reads
_JOINED = ("query_key_value", "dense", "qkv_proj", "o_proj")  # projections of decoders that join some
_NOT_IN = r"image_tokenizer\..*"


class LoraSection(Section):
    """Adapters of rank `r`, scaled by `alpha / r`, in the named modules."""

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Fraction = 0.0
    modules: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Names of linear or embedding layers or the ends of such names, in any part of the model; where they are left out
    and a decoder joins its projections, as Persimmon does, those that it has."""


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("lora: needs peft; install it with: pip install 'unimm[lora]'") from None
    return peft


def add_adapters(model: UniMMModel, section: LoraSection, tokens: Sequence[int] = ()) -> None:
    """Put adapters into a model in place; they change nothing yet.

    Args:
        model: to adapt.
        section: where adapters go.
        tokens: ids whose rows of the token table and the text head are part of the adapter, and train whole.

    Raises:
        UserError: peft is missing, or no module is so named.
    """
    peft = _peft()
    known = [name for name, _ in model.named_modules() if not name.startswith("image_tokenizer.")]
    modules = list(section.modules)
    if "modules" not in section.model_fields_set and not _names(known, modules[0]):
        modules = [name for name in _JOINED if _names(known, name)] or modules
    config = peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=modules,
        exclude_modules=_NOT_IN,
        trainable_token_indices={name: list(tokens) for name in _token_tables(model)} if tokens else None,
    )
    for wanted in modules:
        if not _names(known, wanted):
            raise UserError(f"lora.modules: the model has no module named {wanted}")
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(f"lora.modules: {str(error).strip().splitlines()[0]}") from None
    if tokens:
        _share_tied_rows(model)


def _names(known: Sequence[str], wanted: str) -> bool:
    """Whether a module has this name, or one that ends so."""
    return any(name == wanted or name.endswith(f".{wanted}") for name in known)


def _token_tables(model: UniMMModel) -> list[str]:
    """Names of the token table and the text head, which are one weight in some models."""
    tables = (model.decoder.get_input_embeddings(), model.decoder.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is table for table in tables)]


def _share_tied_rows(model: UniMMModel) -> None:
    """Let table and head train the same rows where they are tied; peft sees that in its own kinds of model alone."""
    table, head = model.decoder.get_input_embeddings(), model.decoder.get_output_embeddings()
    if head.token_adapter.base_layer.weight is table.token_adapter.base_layer.weight:
        head.token_adapter.trainable_tokens_delta = table.token_adapter.trainable_tokens_delta


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return "lora_" in name or "trainable_tokens_delta" in name


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within, adapters add nothing: the model is what it was before they were put in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:  # peft's own switch also freezes the adapters, which the engine must not see
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_adapters(model: UniMMModel, folder: Path, base: str | None) -> None:
    """Write the adapters as peft does: `PeftModel.from_pretrained` and `unimm.load(..., adapter=folder)` read them.

    Args:
        model: with adapters.
        folder: where to.
        base: the source of the model that they belong to.
    """
    peft = _peft()
    state = peft.get_peft_model_state_dict(model, adapter_name="default")
    named = {key if key.startswith(_PREFIX) else _PREFIX + key: value for key, value in state.items()}
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in named.items()}
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True

    def write(new: Path) -> None:
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(new)

    write_folder(folder, write)


def merged(model: UniMMModel) -> UniMMModel:
    """Return a copy of the model with its adapters added to the weights, an ordinary model again."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import TrainableTokensWrapper

    _peft()
    plain = copy.deepcopy(model)
    for name, child in list(plain.named_modules()):
        layer = child.token_adapter if isinstance(child, TrainableTokensWrapper) else child
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            layer.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(owner), leaf, layer.get_base_layer())
    del plain.peft_config
    return plain


def save_model(model: UniMMModel, folder: Path, dtype: torch.dtype, base: str | None) -> None:
    """Write a copy of the model, in a number format, that is free of adapters; the adapters alone are beside it.

    Args:
        model: with adapters merged into the copy, or without.
        folder: where to; adapters go into its subfolder `ADAPTER`.
        dtype: of the copy's weights.
        base: the source of the model that adapters belong to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if has_adapters(model):
        save_adapters(model, folder / ADAPTER, base)
        plain = merged(model)
    else:
        plain = copy.deepcopy(model)
    nn.Module.to(plain, dtype).save_pretrained(folder)
