"""Image codes of a source's pictures to draw, computed once: in memory, in one file, or as tars of a folder.

Pictures to look at may go into the tars as features of an understanding encoder that no longer trains.

The work is cut into shards of the same records and batches of the same size whatever does it, so the codes of a
picture do not depend on who computes them, or on how often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unimm.data.sources import BadRecord, Picture, Reading, Record, Source, open_source
from unimm.data.sources.record import CODES_SUFFIX, FEATURES_SUFFIX, digest
from unimm.data.sources.tars import PLAN_FILE
from unimm.errors import UserError
from unimm.images import atomic_write
from unimm.processing import Canvas, UniMMProcessor

BATCH = 32  # pictures that go through the tokenizer at once
SHARD = 1000  # records
Codes: TypeAlias = NDArray[np.int32]
Features: TypeAlias = NDArray[np.floating[Any]]  # [tokens, width]
FeatureType = Literal["float32", "float16"]
Progress: TypeAlias = Callable[[int, int], None]


def fingerprint(tokenizer: nn.Module, canvas: Canvas | int | None) -> str:
    """A digest of an image tokenizer's weights, in float32, and of what pictures are brought to."""
    state = tokenizer.state_dict()
    words = [f"{name} {list(state[name].shape)} {_bytes_digest(state[name])}" for name in sorted(state)]
    return digest([*words, str(canvas)])


def encoder_mark(vision: nn.Module, size: int | None) -> str:
    """A digest of an understanding encoder's weights, in float32, and of the side of the pictures that it takes."""
    total = hashlib.sha256(str(size).encode())
    for name, tensor in sorted(vision.state_dict().items()):
        total.update(f"{name} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return total.hexdigest()[:16]


def _bytes_digest(tensor: Tensor) -> str:
    array = tensor.detach().cpu()
    return digest([(array.float() if array.is_floating_point() else array).numpy().tobytes().hex()])


def encode_range(
    source: Source, start: int, stop: int, canvas: Canvas, tokenizer: Any, device: torch.device
) -> list[tuple[Record | BadRecord, list[Codes]]]:
    """The records of a stretch, each with the codes [h, w] of its pictures to draw; a bad one says why.

    Codes that are stored already are taken as they are. Pictures of one size go through the tokenizer together,
    `BATCH` at once but for the last of each size.
    """
    found: list[tuple[Record | BadRecord, list[Codes]]] = []
    waiting: dict[torch.Size, list[tuple[list[Codes], int, Tensor]]] = {}

    def flush(size: torch.Size) -> None:
        batch = waiting.pop(size)
        codes = tokenizer.encode(torch.stack([pixels for _, _, pixels in batch]).to(device))
        for (target, place, _), one in zip(batch, codes.cpu().numpy().astype(np.int32), strict=True):
            target[place] = one

    for index in range(start, stop):
        try:
            record = source[index]
            drawn = [_load(picture, canvas) for picture in record.pictures(draw=True)]
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
                if len(batch) == BATCH:
                    flush(one.shape)
    for size in list(waiting):
        flush(size)
    return found


def _load(picture: Picture, canvas: Canvas) -> Tensor | Codes:
    """A picture to draw: float [3, H, W] in [-1, 1], or its codes [h, w] where those are stored."""
    if picture.encoded:
        return picture.codes().astype(np.int32)
    return canvas.pixels(picture.image())


# --- as tars ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a folder of encoded tars is of; kept beside them, so that only the same work is gone on with."""

    source: str
    signature: str
    records: int
    shard: int
    pairs: str
    fields: dict[str, str]
    images: str | None
    split: str | None
    tokenizer: str
    features: FeatureType | None = None
    encoder: str | None = None
    format: int = 1


@dataclass(frozen=True)
class Job:
    """What a worker process needs to write shards."""

    location: str
    reading: Reading
    folder: str
    model: str | None
    shard: int
    device: str
    threads: int
    features: FeatureType | None = None
    size: int | None = None
    keep_ratio: bool = False


def encode_source(
    location: str,
    folder: Path,
    model: str | None = None,
    reading: Reading | None = None,
    processes: int = 1,
    shard: int = SHARD,
    device: str = "auto",
    on_progress: Progress | None = None,
    features: FeatureType | None = None,
    size: int | None = None,
    keep_ratio: bool = False,
) -> dict[str, Any]:
    """Write a source as webdataset tars in which pictures to draw are image codes.

    Tars that are whole are not written again, so a call that was cut off is gone on with by the same call.
    Pictures to look at are copied as they are, or stored as features. Bad records are left out and listed in
    `NAME.bad.jsonl`.

    Args:
        location: what `open_source` takes.
        folder: where the tars go.
        model: whose image tokenizer encodes, or an image tokenizer alone; None: the embedded model's.
        reading: how to read the source.
        processes: how many work at once.
        shard: records in a tar.
        device: "auto", "cpu" or "cuda"; with several GPUs the processes share them out.
        on_progress: called with records done and records in all.
        features: store pictures to look at as the features of the model's understanding encoder, in this number
            format; None: as pictures.
        size: pixels a side that pictures to draw are brought to; None: the model's.
        keep_ratio: keep their ratio, in an area of that side squared (`unimm.processing.Canvas`).

    Returns:
        Counts of records, of those written, of bad ones and of tars, and the folder.

    Raises:
        UserError: the source or the model cannot be read, the folder holds something else, or the disk is full.
    """
    reading = reading or Reading()
    source = open_source(location, reading)
    if not len(source):
        raise UserError(f"{location}: has no records")
    if features is not None and features not in get_args(FeatureType):
        raise UserError(f"features: expected one of {', '.join(get_args(FeatureType))}, got {features!r}")
    if source.mark is not None:
        raise UserError(f"{location}: holds image codes already; train on it as it is")
    threads = max(1, (os.cpu_count() or 1) // processes)
    job = Job(location, reading, str(folder), model, shard, device, threads, features, size, keep_ratio)
    _take_folder(folder, _plan(job, source))
    count = -(-len(source) // shard)
    todo = [number for number in range(count) if not _tar(folder, number).exists()]
    report = on_progress or (lambda done, total: None)
    done = count - len(todo)
    report(min(done * shard, len(source)), len(source))
    for _ in _run(job, todo, processes):
        done += 1
        report(min(done * shard, len(source)), len(source))
    return _summary(folder, count, len(source))


def _plan(job: Job, source: Source) -> Plan:
    """What the tars will be of."""
    canvas, tokenizer, _ = _coder(job.model, "cpu", 0, job.size, job.keep_ratio)
    reading, encoder = job.reading, None
    if job.features is not None:
        processor, vision, _ = _viewer(job.model, "cpu", 0)
        encoder = encoder_mark(vision, processor.image_size)
    return Plan(
        str(Path(job.location).resolve()), source.signature(), len(source), job.shard, reading.pairs,
        dict(reading.fields), reading.images, reading.split, fingerprint(tokenizer, canvas), job.features, encoder,
    )  # fmt: skip


def _run(job: Job, numbers: Sequence[int], processes: int) -> Iterator[int]:
    """Write shards here or in worker processes, giving each number as it is done."""
    if processes == 1:
        for number in numbers:
            yield write_shard(job, number)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked torch hangs
    workers = min(processes, max(len(numbers), 1))
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_die_with_parent) as pool:
        futures = [pool.submit(write_shard, job, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _die_with_parent() -> None:
    """End this worker when the process that started it is gone, so that a killed command leaves none behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@functools.lru_cache(maxsize=2)
def _coder(
    model: str | None, device: str, number: int, size: int | None, keep_ratio: bool
) -> tuple[Canvas, Any, torch.device]:
    """What pictures are brought to, and the image tokenizer (float32, on a device) of a model."""
    from unimm.interop.image_tokenizers import is_image_tokenizer, load_image_tokenizer
    from unimm.pipeline import load

    place = _place(device, number)
    if model is not None and is_image_tokenizer(Path(model)):
        alone = load_image_tokenizer(model)
        canvas = Canvas(size or int(alone.config.image_size), int(alone.config.stride), keep_ratio)
        return canvas, nn.Module.to(nn.Module.eval(alone), place), place
    um = load(model, "cpu", "float32")
    if um.processor.drawing_size is None or um.model.image_tokenizer is None:
        raise UserError(f"{model}: this model has no image tokenizer, so it has no image codes")
    canvas = um.processor.canvas(size, keep_ratio)
    return canvas, nn.Module.to(um.model.image_tokenizer.eval(), place), place


def _place(device: str, number: int) -> torch.device:
    """The device for a worker of this number."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", number % torch.cuda.device_count())
    if device not in ("auto", "cpu"):
        raise UserError(f"device: {device!r} is not to be had here; use auto or cpu")
    return torch.device("cpu")


@functools.lru_cache(maxsize=2)
def _viewer(model: str | None, device: str, number: int) -> tuple[UniMMProcessor, nn.Module, torch.device]:
    """The processor and the understanding encoder (float32, on a device) of a model."""
    from unimm.interop.image_tokenizers import is_image_tokenizer
    from unimm.pipeline import load

    if model is not None and is_image_tokenizer(Path(model)):
        raise UserError(
            f"{model}: an image tokenizer alone has no understanding encoder, so it has no features"
        )
    um, place = load(model, "cpu", "float32"), _place(device, number)
    if um.model.vision is None:
        raise UserError(f"{model}: this model understands pictures by their codes, so it has no features")
    return um.processor, nn.Module.to(um.model.vision.eval(), place), place


def feature_range(
    records: Sequence[Record], viewer: tuple[UniMMProcessor, nn.Module, torch.device], dtype: FeatureType
) -> list[list[Features]]:
    """The features [tokens, width] of the pictures to look at of each record; every batch has `BATCH` pictures.

    Raises:
        UserError: a picture cannot be read; records come here after a look at them.
    """
    processor, vision, device = viewer
    found: list[list[Features]] = [[] for _ in records]
    places = [(n, picture) for n, record in enumerate(records) for picture in record.pictures(draw=False)]
    for start in range(0, len(places), BATCH):
        batch = places[start : start + BATCH]
        pixels = processor.pixels([picture.image() for _, picture in batch])
        seen = vision(pixels.to(device)).float().cpu().numpy().astype(dtype)
        for (number, _), one in zip(batch, seen, strict=True):
            found[number].append(one)
    return found


def _readable(record: Record) -> BadRecord | None:
    """Why a record's pictures to look at cannot be used; None where they can."""
    try:
        for picture in record.pictures(draw=False):
            picture.image()
    except UserError as error:
        return BadRecord(record.key, "", str(error))
    return None


@functools.lru_cache(maxsize=1)
def _source(location: str, pairs: Any, fields: tuple[tuple[str, str], ...], rest: tuple[Any, Any]) -> Source:
    return open_source(location, Reading(pairs, dict(fields), *rest))


def write_shard(job: Job, number: int) -> int:
    """Encode one shard's records and write its tar, whole or not at all; gives its number."""
    if job.threads != torch.get_num_threads():
        torch.set_num_threads(job.threads)
    reading, folder = job.reading, Path(job.folder)
    source = _source(
        job.location, reading.pairs, tuple(reading.fields.items()), (reading.images, reading.split)
    )
    place = number % max(torch.cuda.device_count(), 1)
    canvas, tokenizer, device = _coder(job.model, job.device, place, job.size, job.keep_ratio)
    start = number * job.shard
    stop = min(start + job.shard, len(source))
    with torch.no_grad():
        found = encode_range(source, start, stop, canvas, tokenizer, device)
        if job.features is not None:
            found = [(record, codes) if isinstance(record, BadRecord) else (_readable(record) or record, codes)
                     for record, codes in found]  # fmt: skip
            viewer = _viewer(job.model, job.device, place)
            good = [record for record, _ in found if isinstance(record, Record)]
            seen = iter(feature_range(good, viewer, job.features))
    bad = []
    path = _tar(folder, number)
    with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
        for index, (record, codes) in enumerate(found, start):
            if isinstance(record, Record):
                try:
                    members = sample_members(record, codes, None if job.features is None else next(seen))
                except UserError as error:
                    record = BadRecord(record.key, source.location, str(error))
                else:
                    for extension, data in members:
                        _add(tar, f"{index:010d}.{extension}", data)
            if isinstance(record, BadRecord):
                file = record.file or source.location
                bad.append({"key": record.key, "file": file, "reason": record.reason})
        if bad:  # before the tar, which says that the shard is done
            with atomic_write(_bad(folder, number)) as lines:
                lines.write_text("".join(json.dumps(line) + "\n" for line in bad), encoding="utf-8")
    return number


def sample_members(
    record: Record, codes: Sequence[Codes], features: Sequence[Features] | None = None
) -> list[tuple[str, bytes]]:
    """The members of a record's sample, `json` first: extension and bytes.

    Args:
        record: what to write.
        codes: of its pictures to draw.
        features: of its pictures to look at; None: these are written as they are.

    Raises:
        UserError: a picture to look at cannot be read or decoded.
    """
    left, seen = iter(codes), iter(features or ())
    members, number = list[tuple[str, bytes]](), 0
    messages = []
    for message in record.messages:
        parts: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
                continue
            if part.draw:
                name, data = f"{number}{CODES_SUFFIX}", _array(next(left))
            elif features is not None:
                name, data = f"{number}{FEATURES_SUFFIX}", _array(next(seen))
            else:
                data = part.blob.read()
                name = f"{number}.{_extension(part)}"
            members.append((name, data))
            parts.append({"type": "image", "image": name, "draw": part.draw})
            number += 1
        messages.append({"role": message.role, "content": parts})
    said = json.dumps({"key": record.key, "messages": messages}, ensure_ascii=False)
    return [("json", said.encode()), *members]


def _array(array: Codes | Features) -> bytes:
    """An array in numpy's file format."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _extension(picture: Picture) -> str:
    """The extension for a picture's bytes, by what they are."""
    picture.image()  # a bad one is found now, not in training
    form = picture.form().lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(form, form)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member without time or owner, so that the same data give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _tar(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tar"


def _bad(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.bad.jsonl"


def _take_folder(folder: Path, plan: Plan) -> None:
    """Make the folder, or see that it holds the same work; leftovers of a write that was cut off are removed.

    Raises:
        UserError: it holds tars of another source, tokenizer or cut.
    """
    path = folder / PLAN_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as a folder ({error.strerror})") from None
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            old = {}
        for name, value in asdict(plan).items():
            if old.get(name) != value:
                raise UserError(f"{folder}: holds codes made with another {name}; give another folder")
    elif any(folder.glob("*.tar")):
        raise UserError(f"{folder}: holds tars of something else; give another folder")
    else:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
    for leftover in [*folder.glob(".*.tar"), *folder.glob(".*.jsonl")]:
        with contextlib.suppress(OSError):
            leftover.unlink()


def _summary(folder: Path, tars: int, records: int) -> dict[str, Any]:
    from unimm.data.sources.tars import TarShards

    encoded = TarShards([_tar(folder, number) for number in range(tars)], Reading(), str(folder))
    bad = sum(len(path.read_text().splitlines()) for path in folder.glob("*.bad.jsonl"))
    return {
        "records": records,
        "written": len(encoded),
        "bad": bad,
        "tars": tars,
        "folder": str(folder),
    }
