"""A model over several GPUs: the decoder's layers are spread by accelerate, all else is on the first.

This was tested on CPUs only, with accelerate's hooks; it was not run on several GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unimm.errors import UserError

if TYPE_CHECKING:
    from unimm.models.modeling import UniMMModel


def place_modules(model: UniMMModel, device_map: str | Mapping[str, Any]) -> None:
    """Spread a model that is on the CPU over devices.

    Raises:
        UserError: accelerate is missing, or the map is no map of this model.
    """
    if not (device_map == "auto" or (isinstance(device_map, Mapping) and device_map)):
        raise UserError(f"device_map: {device_map!r}; use auto, or a device for each module's name")
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise UserError("device_map: 'disk' is not supported; use cpu or numbers of GPUs")
    try:
        from accelerate import dispatch_model
    except ImportError:
        raise UserError(
            "device_map: needs accelerate; install it with: pip install 'unimm[multi-gpu]'"
        ) from None
    places = dict(device_map) if isinstance(device_map, Mapping) else over_gpus(model)
    try:
        dispatch_model(model, places, main_device=next(iter(places.values())), force_hooks=True)
    except (ValueError, RuntimeError, AssertionError, AttributeError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"device_map: does not fit this model or machine ({line})") from None


def is_spread(model: nn.Module) -> bool:
    """Whether a model was spread, so that its modules have to be called, not their weights used."""
    return getattr(model, "hf_device_map", None) is not None


def over_gpus(model: UniMMModel) -> dict[str, Any]:
    """Return the map of equal runs of layers over all GPUs, what is not a layer on the first; without GPUs the CPU."""
    count = torch.cuda.device_count()
    if not count:
        return {"": "cpu"}
    layers = next(
        (name for name, part in model.decoder.named_modules() if isinstance(part, nn.ModuleList)), None
    )
    if layers is None:
        return {"": 0}
    prefix = f"decoder.{layers}"
    total = len(model.get_submodule(prefix))  # type: ignore[arg-type]  # a list of modules
    places: dict[str, Any] = {f"{prefix}.{i}": i * count // total for i in range(total)}
    # By module, so that each brings its inputs to its own device.
    owners = [name for name, part in model.named_modules() if [*part.parameters(False), *part.buffers(False)]]
    return places | {name: 0 for name in owners if not name.startswith(f"{prefix}.")}
