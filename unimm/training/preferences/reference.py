"""The reference's log-probabilities, computed once and kept beside the data, under hashes of all they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.errors import UserError
from unimm.images import atomic_write
from unimm.processing import UniMMProcessor
from unimm.training.preferences.data import Preference

MADE_OF = ("model", "data", "processor")


def hash_module(module: nn.Module) -> str:
    """Hash the weights and buffers of a module, by name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_data(path: Path, preferences: Sequence[Preference]) -> str:
    """Hash a file of preferences and every image file that it names."""
    digest = hashlib.sha256(path.read_bytes())
    for file in (file for preference in preferences for file in preference.files()):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def hash_processor(processor: UniMMProcessor) -> str:
    """Hash what decides how words and pictures become inputs."""
    names = (
        "layout",
        "conversation",
        "image_size",
        "drawing_size",
        "pad_colour",
        "mean",
        "std",
        "area",
        "stride",
    )
    settings = {name: str(getattr(processor, name)) for name in names}
    settings["words"] = json.dumps(processor.tokenizer.get_vocab(), sort_keys=True)
    settings["tokenizer"] = type(processor.tokenizer).__name__
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_or_compute(
    path: Path, marks: Mapping[str, str], compute: Callable[[], Tensor], write: bool
) -> Tensor:
    """Return the log-probabilities of a reference, float64 [N, 2]: chosen and rejected of every pair.

    Args:
        path: where they are kept.
        marks: a hash for each of `MADE_OF`.
        compute: makes them where there is no file yet.
        write: whether to keep them (one process of several does).

    Raises:
        UserError: the file is of another model, other data or another processor, or is damaged.
    """
    scores: Tensor
    if not path.exists():
        scores = compute()
        if write:
            with atomic_write(path) as temporary:
                save_file({"log_probs": scores}, temporary, metadata=dict(marks))
        return scores
    try:
        with safe_open(path, "pt") as file:
            written, scores = file.metadata() or {}, file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and it is computed anew") from None
    for name in MADE_OF:
        if written.get(name) != marks[name]:
            raise UserError(f"{path}: computed with another {name}; remove it and it is computed anew")
    return scores
