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
from unimm.training.preferences.data import Preference, shards_of


def hash_module(module: nn.Module) -> str:
    """Hash the weights and buffers of a module, by name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_data(path: Path, preferences: Sequence[Preference]) -> str:
    """Hash preferences: a file and every image that it names, or the tars that hold them all."""
    digest = hashlib.sha256()
    tars = shards_of(path)
    for file in [path] if tars is None else tars:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    if tars is None:
        for blob in (blob for preference in preferences for blob in preference.files()):
            digest.update(blob.read())
    return digest.hexdigest()


def kept_beside(path: Path) -> Path:
    """Where the log-probabilities of preferences are kept, unless a recipe says otherwise."""
    return path.with_name(f"{path.name}.reference.safetensors")


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
        marks: what it depends on, model, data and processor, each with a hash.
        compute: makes them where there is no file yet.
        write: whether to keep them (one process of several does).

    Raises:
        UserError: the file is of another model, other data or another processor, or is damaged.
    """
    if not path.exists():
        scores = compute()
        if write:
            with atomic_write(path) as temporary:
                save_file({"log_probs": scores}, temporary, metadata=dict(marks))
        return scores
    return read_kept(path, marks)


def read_kept(path: Path, marks: Mapping[str, str]) -> Tensor:
    """Read what `read_or_compute` kept, if it is of these marks; its errors are those."""
    try:
        with safe_open(path, "pt") as file:
            written, scores = file.metadata() or {}, file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and it is computed anew") from None
    for name, mark in marks.items():
        if written.get(name) != mark:
            raise UserError(f"{path}: computed with another {name}; remove it and it is computed anew")
    kept: Tensor = scores
    return kept
