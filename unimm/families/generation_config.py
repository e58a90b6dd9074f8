"""`generation_config.json` of a checkpoint: where its answers end, and how it draws by itself.

How it draws is the section `sampling` of our configuration.
transformers gives one file to words and drawings alike, and has no place there for a guidance of drawings alone (its
`guidance_scale` would steer words too). What differs from the family's own defaults is therefore written under
`generation_kwargs`, which its models leave alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.models.configuration import SamplingConfig, UniMMConfig
from unimm.sections import read_dataclass

SECTION = "sampling"  # within generation_kwargs
_NAMES = [field.name for field in dataclasses.fields(SamplingConfig)]


def read_sampling(document: Mapping[str, Any], family: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return how a checkpoint draws, as fields of `SamplingConfig`.

    Args:
        document: its generation config, empty if it has none.
        family: what its family does where the checkpoint does not say.
        where: the file, for errors.

    Raises:
        UserError: a line that names the file and the key whose value cannot be.
    """
    found = {**family, **_said(document)}
    kwargs = document.get("generation_kwargs")
    own = kwargs.get(SECTION) if isinstance(kwargs, dict) else None
    return dataclasses.asdict(
        read_dataclass(SamplingConfig, {**found, **own} if isinstance(own, dict) else found, str(where))
    )


def read_end_tokens(document: Mapping[str, Any], tokens: int, where: Path) -> list[int]:
    """Return the tokens at which a checkpoint's answers end.

    Args:
        document: its generation config, empty if it has none.
        tokens: how many its text tokenizer has.
        where: the file, for errors.

    Raises:
        UserError: it names what is no token.
    """
    named = document.get("eos_token_id")
    found = named if isinstance(named, list) else [] if named is None else [named]
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < tokens:
            raise UserError(f"{where}: eos_token_id: expected a token from 0 to {tokens - 1}, got {token!r}")
    return found


def _said(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a document says, where null is nothing and a top_k of 0 switches it off, as transformers has them."""
    said = {name: document[name] for name in _NAMES if document.get(name) is not None}
    return said | ({"top_k": None} if said.get("top_k") == 0 else {})


def sampling_options(config: UniMMConfig, family: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of transformers' GenerationConfig for what the family would not do by itself."""
    usual = dataclasses.asdict(SamplingConfig(**family))
    own = dataclasses.asdict(config.sampling_config())
    differing = {name: value for name, value in own.items() if value != usual[name]}
    return {SECTION: differing} if differing else {}
