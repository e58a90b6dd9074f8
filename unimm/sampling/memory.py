"""How much an engine may hold: rows and positions of the cache, set before the first request."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from unimm.errors import UserError
from unimm.models.modeling import UniMMModel

SHARE = 0.25  # of the machine's memory, or of what is free on a GPU, for the rows of the cache
PREFIX_SHARE = 0.02  # for prefixes that may be asked for again
MOST_ROWS = 128
MOST_TOKENS = 2**22
UNKNOWN_MEMORY = 2**33  # bytes taken to be there where the system does not say


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """What the cache of an engine may hold.

    Attributes:
        max_rows: rows that run at once; a drawing with guidance has two.
        max_tokens: positions of all rows together, each row counted as long as the longest.
        prefix_tokens: positions that are held for prompts that begin alike.
        prompt_piece: positions of prompts that are read in one step; a longer prompt does not stop the others.
        least_piece: and at least so many of each.

    Raises:
        UserError: a limit is below 1 (prefixes: below 0).
    """

    max_rows: int = MOST_ROWS
    max_tokens: int = 2**16
    prefix_tokens: int = 2**12
    prompt_piece: int = 2**10
    least_piece: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "prefix_tokens" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{field.name}: {value!r}; give a whole number of at least {least}")

    @classmethod
    def of(cls, model: UniMMModel, max_rows: int = MOST_ROWS, max_tokens: int | None = None) -> EngineLimits:
        """Return limits by the memory that there is where the model is.

        Args:
            model: whose cache it is.
            max_rows: rows that run at once.
            max_tokens: positions; None: a quarter of the memory.
        """
        return cls.within(model.decoder.config, model.dtype, model.device, max_rows, max_tokens)

    @classmethod
    def within(
        cls,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int = MOST_ROWS,
        max_tokens: int | None = None,
    ) -> EngineLimits:
        """Return the same for the configuration of a decoder whose weights need not be there."""
        usable, each = usable_memory(device), bytes_per_token(config, dtype)
        tokens = max_tokens if max_tokens is not None else min(MOST_TOKENS, int(usable * SHARE) // each)
        prefixes = min(2**14, int(usable * PREFIX_SHARE) // each)
        piece = 2**10 if device.type == "cpu" else 2**12
        return cls(max_rows, max(tokens, 1), prefixes, piece)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one position of a row's keys and values."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * dtype.itemsize


def usable_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or that the machine has, as far as the system says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # Windows does not say
        return UNKNOWN_MEMORY
