"""Where a model computes and in which number format: the names that users give, as torch knows them."""

from __future__ import annotations

import torch

from unimm.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """Return the device that a name means.

    Raises:
        UserError: torch knows no such device, or it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise UserError(f"device: {device!r} is not available here; use auto, cpu, cuda or mps") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number format that a name means on a device.

    Raises:
        UserError: an unknown name, or a format that no model computes in.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in (*DTYPES.values(), torch.float64):
            raise UserError(f"dtype: {dtype}; use auto, {', '.join(DTYPES)}")
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
