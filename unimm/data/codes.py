"""Codes of images, and features of an understanding encoder: computed in batches, and cached in a file.

What is stored bears a fingerprint of all that it depends on, so that it is never taken for that of another model. The
work is cut into shards of the same records and batches of the same size whatever does it, so the codes of an image do
not depend on who computes them, or on how often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from unimm.data.sources import BadRecord, ImagePart, Reading, Record, Source
from unimm.errors import UserError
from unimm.files import atomic_write
from unimm.models.configs import own_keys
from unimm.models.seeing import feature_counts
from unimm.processing.messages import digest
from unimm.processing.processor import UniMMProcessor, grids_of
from unimm.processing.views import TargetSize

ENCODING_BATCH = 32  # images that go through the tokenizer at once
SHARD = 1000  # records
PROBES = 64  # records looked at to see whether a source has images to draw
CodeArray: TypeAlias = NDArray[np.int32]
Features: TypeAlias = NDArray[np.floating[Any]]  # [tokens, width]
FeatureType = Literal["float32", "float16"]
Cached: TypeAlias = tuple[dict[str, Tensor], dict[str, str]]


# --- what stored things depend on ---------------------------------------------------------------------------


def fingerprint(*parts: Any) -> str:
    """A digest of all that results depend on: sixteen hex digits.

    Args:
        *parts: modules, by their class, weights (in float32) and whole configuration; processors, tokenizers, configs
            and plain values, by all that they are made of.
    """
    return digest([json.dumps([_description(part) for part in parts], sort_keys=True)])


def _description(value: Any) -> Any:
    """A value as JSON has it: of what has fields, its class (or `fingerprint_name`) and every field."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_description(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _description(one) for key, one in value.items()}
    if isinstance(value, nn.Module):
        fields = {"weights": _weights_digest(value), "config": getattr(value, "config", None)}
    elif isinstance(value, PreTrainedTokenizerBase):
        fields = _tokenizer_fields(value)
    elif isinstance(value, PreTrainedConfig):
        fields = own_keys(value.to_dict())  # where it lies and in which number format are no part of it
    else:
        cached = {name for name, own in vars(type(value)).items() if isinstance(own, cached_property)}
        fields = {name: own for name, own in vars(value).items() if name not in cached}
    return {"class": getattr(value, "fingerprint_name", type(value).__name__), **_description(fields)}


def _weights_digest(module: nn.Module) -> str:
    """A digest of a module's weights and buffers, in float32."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu()
        plain = (plain.float() if plain.is_floating_point() else plain).contiguous()
        total.update(f"{name} {list(plain.shape)}".encode())
        total.update(plain.view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
    """How a text tokenizer makes tokens: its whole pipeline, without what the last call left in it."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = {name: step for name, step in pipeline.items() if name not in ("truncation", "padding")}
    return {"pipeline": steps, "special": tokenizer.special_tokens_map}


# --- computed -----------------------------------------------------------------------------------------------


def encode_range(
    source: Source,
    start: int,
    stop: int,
    target_size: TargetSize | None,
    tokenizer: Any,
    device: torch.device,
) -> list[tuple[Record | BadRecord, list[CodeArray]]]:
    """The records of a stretch, each with the codes [h, w] of its images to draw; a bad one says why.

    Codes that are stored already are taken as they are. Images of one size go through the tokenizer together,
    `ENCODING_BATCH` at once but for the last of each size.
    """
    found: list[tuple[Record | BadRecord, list[CodeArray]]] = []
    waiting: dict[torch.Size, list[tuple[list[CodeArray], int, Tensor]]] = {}

    def flush(size: torch.Size) -> None:
        batch = waiting.pop(size)
        codes = tokenizer.encode(torch.stack([pixels for _, _, pixels in batch]).to(device))
        for (target, place, _), one in zip(batch, codes.cpu().numpy().astype(np.int32), strict=True):
            target[place] = one

    for index in range(start, stop):
        try:
            record = source[index]
            drawn = [_load(image, target_size) for image in record.images(draw=True)]
        except BadRecord as error:
            found.append((error, []))
            continue
        except UserError as error:
            found.append((BadRecord(record.key, source.location, str(error)), []))
            continue
        codes = [one if isinstance(one, np.ndarray) else np.zeros((0, 0), np.int32) for one in drawn]
        found.append((record, codes))
        for place, one in enumerate(drawn):
            if isinstance(one, Tensor):
                batch = waiting.setdefault(one.shape, [])
                batch.append((codes, place, one))
                if len(batch) == ENCODING_BATCH:
                    flush(one.shape)
    for size in list(waiting):
        flush(size)
    return found


def _load(image: ImagePart, target_size: TargetSize | None) -> Tensor | CodeArray:
    """An image to draw: float [3, H, W] in [-1, 1], or its codes [h, w] where those are stored."""
    if image.encoded:
        return image.codes().astype(np.int32)
    if target_size is None:
        raise UserError("an image to draw, but this model has no image tokenizer")
    return target_size.pixels(image.image())


def feature_range(
    records: Sequence[Record], viewer: tuple[UniMMProcessor, nn.Module, torch.device], dtype: FeatureType
) -> list[list[Features]]:
    """The features [tokens, width] of the images to look at of each record, `ENCODING_BATCH` images at once.

    Raises:
        UserError: an image cannot be read; records come here after a look at them.
    """
    processor, vision, device = viewer
    found: list[list[Features]] = [[] for _ in records]
    places = [(n, image) for n, record in enumerate(records) for image in record.images(draw=False)]
    for start in range(0, len(places), ENCODING_BATCH):
        batch = places[start : start + ENCODING_BATCH]
        images = processor.look([image.image() for _, image in batch])
        assert images.pixels is not None
        features = vision(images.pixels.to(device), images.sizes, tiles=images.grids)
        seen = features.float().cpu().numpy().astype(dtype)
        counts = feature_counts(processor.seeing, images, processor.layout)
        parts = np.split(seen.reshape(-1, seen.shape[-1]), np.cumsum(counts)[:-1])
        padding = [images.part(n, n + 1).padding for n in range(len(images))]
        for (number, _), one, grid, own in zip(batch, parts, grids_of(images), padding, strict=True):
            marks = None if own is None else own.flatten().numpy()
            found[number].append(processor.store_features(one, grid, marks))
    return found


def draws(source: Source) -> bool:
    """Whether a source has images to draw that are not encoded yet, by a look at some of its records."""
    images = (image for record in some_records(source) for image in record.images(draw=True))
    return any(not image.encoded for image in images)


def some_records(source: Source) -> Iterator[Record]:
    """Some good records of a source, evenly spread over it."""
    for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist():
        with suppress(BadRecord):
            yield source[index]


# --- cached in a file ---------------------------------------------------------------------------------------


def cached_codes(path: Path, mark: str, compute: Callable[[], Cached], min_codes: int = 0) -> Cached:
    """Return the tensors of a file and the notes beside them, which are computed first where the file is not these.

    Args:
        path: the file; made again if it is damaged, bears another mark or has too few codes.
        mark: all that the codes depend on.
        compute: makes the tensors, `codes` [M, ...] among them, and the notes.
        min_codes: how many codes there have to be; a file may have more.

    Raises:
        UserError: the file bears no mark, so it is something else; or it cannot be written.
    """
    if not _is_these(path, mark, min_codes):
        tensors, notes = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"mark": mark, **notes})
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata() or {}


def _is_these(path: Path, mark: str, min_codes: int) -> bool:
    """Whether a file has the codes of a mark, and enough of them."""
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get("mark")
        if written is None:
            raise UserError(f"{path}: this is no file of image codes; name another")
        return bool(written == mark and file.get_slice("codes").get_shape()[0] >= min_codes)
    return False


class StoredCodes:
    """The image codes of a source's images to draw, computed once and cached in one file.

    Args:
        path: the safetensors file; made again if it is of another tokenizer or of other data.
        source: whose images.
        reading: how it is read.
        target_size: what they are brought to.
        tokenizer: what encodes.
        device: where.

    Raises:
        UserError: the file is no file of image codes, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        source: Source,
        reading: Reading,
        target_size: TargetSize,
        tokenizer: Any,
        device: torch.device,
    ) -> None:
        mark = fingerprint(tokenizer, target_size, source.signature(), len(source), reading)
        stored, notes = cached_codes(path, mark, lambda: _compute(source, target_size, tokenizer, device))
        self.bad: dict[str, list[str]] = json.loads(notes["bad"])
        self.codes, self.sizes = stored["codes"], stored["sizes"].tolist()
        self.starts, self.places = _ends(stored["counts"]), _ends(stored["sizes"].prod(1))

    def get(self, index: int) -> list[Tensor]:
        """Codes int64 [h, w] of each image to draw of a record.

        Raises:
            BadRecord: one of them could not be read.
        """
        if str(index) in self.bad:
            key, file, reason = self.bad[str(index)]
            raise BadRecord(key, file, reason)
        return [
            self.codes[self.places[one] : self.places[one + 1]].view(self.sizes[one]).long()
            for one in range(self.starts[index], self.starts[index + 1])
        ]


def _ends(counts: Tensor) -> list[int]:
    """Where each of some stretches begins, and where the last ends."""
    return [0, *counts.cumsum(0).tolist()]


def _compute(source: Source, target_size: TargetSize, tokenizer: Any, device: torch.device) -> Cached:
    """Codes int32 of all M images in a row, their sizes [M, 2], counts for each record [N], and the bad by index."""
    from rich.progress import track

    torch.nn.Module.to(tokenizer, device)
    codes: list[Tensor] = []
    counts, bad = [], {}
    starts = range(0, len(source), SHARD)
    for start in track(starts, f"image codes of {source.location}", disable=len(starts) == 1):
        stop = min(start + SHARD, len(source))
        with torch.no_grad():
            found = encode_range(source, start, stop, target_size, tokenizer, device)
        for index, (record, drawn) in enumerate(found, start):
            if isinstance(record, BadRecord):
                bad[str(index)] = [record.key, record.file, record.reason]
            counts.append(len(drawn))
            codes += [torch.from_numpy(one) for one in drawn]
    sizes = torch.tensor([one.shape for one in codes], dtype=torch.int64).view(-1, 2)
    flat = torch.cat([torch.zeros(0, dtype=torch.int32), *(one.flatten() for one in codes)])
    return {"codes": flat, "sizes": sizes, "counts": torch.tensor(counts)}, {"bad": json.dumps(bad)}
