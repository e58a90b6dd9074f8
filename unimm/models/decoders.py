"""Decoders: the causal language models of transformers that fit, and what a config says of one.

One fits if its text head alone makes its logits of the hidden states, and it takes embeddings instead of tokens: a test
builds each. Those that scale or cap their logits, or bring code, do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unimm.documents import shown_key
from unimm.errors import UserError
from unimm.models.configs import check_rope, own_keys, section_for
from unimm.sections import FieldError, near, show, validate

DECODERS = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "phi", "phi3", "olmo", "olmo2", "smollm3", "gpt_neox",
    "starcoder2", "stablelm", "glm", "glm4", "helium", "nemotron", "arcee", "seed_oss", "mixtral", "qwen2_moe",
    "qwen3_moe", "olmoe", "aria_text", "persimmon",
)  # fmt: skip


def read_decoder(fields: Any, source: str = "", key: str = "decoder") -> dict[str, Any]:
    """Return the checked fields of a decoder's config, without what transformers writes into every config.

    Args:
        fields: `model_type` and the fields of that config.
        source: the file, for errors; "" for nothing.
        key: where in the file they stand.

    Raises:
        UserError: a field is unknown, of the wrong type or out of range, or no such decoder fits.
    """
    try:
        return _checked(fields)
    except FieldError as error:
        line = f"{key}.{error}" if key else str(error)
    except UserError as error:
        line = f"{key}: {error}"
    raise UserError(f"{source}: {line}") if source else FieldError(line)


def _checked(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise UserError(f"expected a mapping, got {show(fields)}")
    kind = fields.get("model_type")
    if kind not in DECODERS:
        known = f"{near(kind, DECODERS)} (known: {', '.join(DECODERS)})"
        raise FieldError(f"model_type: no decoder is of the kind {show(kind)}{known}")
    described: Any = CONFIG_MAPPING[kind]
    section = section_for(described)
    given = own_keys(fields)
    written = described().to_dict()  # some write more than they read
    for name in given:
        if name not in section.model_fields and name not in written:
            raise FieldError(f"{shown_key(name)}: unknown key{near(name, section.model_fields)}")
    check_rope(given.get("rope_parameters"), "rope_parameters")
    return {"model_type": kind, **validate(section, given, "").model_dump(exclude_unset=True)}


def decoder_config(fields: Mapping[str, Any], key: str = "decoder.") -> PreTrainedConfig:
    """Return the config of transformers for checked fields; `key` is what stands before theirs in a line.

    Raises:
        FieldError: they do not go together.
    """
    options = dict(fields)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(options.pop("model_type"), **options)
    except Exception as error:  # each config has checks of its own, of all kinds
        raise FieldError(f"{key}model_type: {' '.join(str(error).split())[:200]}") from None
    _check_consistent(config, key)
    return config


def _check_consistent(config: PreTrainedConfig, key: str) -> None:
    """Check what transformers finds out only while it builds, or not at all."""
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and pad >= config.vocab_size:
        raise FieldError(f"{key}pad_token_id: expected less than vocab_size ({config.vocab_size}), got {pad}")
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups and heads % groups:
        raise FieldError(
            f"{key}num_key_value_heads: expected a divisor of num_attention_heads ({heads}), got {groups}"
        )
    wide = getattr(config, "head_dim", None) or config.hidden_size // heads
    if wide % 2:  # rotary positions take pairs
        raise FieldError(
            f"{key}num_attention_heads: {heads} heads of an odd width ({wide}); expected an even one"
        )
