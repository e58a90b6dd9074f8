"""Sources written anew as tars in which images to draw are image codes, by one process or several.

Images to look at may go into the tars as features of an understanding encoder that no longer trains.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import tarfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from unimm.console import ProgressCallback
from unimm.data.codes import SHARD, CodeArray, Features, FeatureType, encode_range, feature_range, fingerprint
from unimm.data.sources import BadRecord, ImagePart, Location, Message, Reading, Record, Source, open_source
from unimm.data.sources.tars import PLAN_FILE
from unimm.errors import UserError, UserNote
from unimm.files import atomic_write, remove_leftovers, write_json
from unimm.processing.messages import CODES_SUFFIX, FEATURES_SUFFIX
from unimm.processing.processor import UniMMProcessor
from unimm.processing.views import TargetSize


@dataclass(frozen=True)
class Plan:
    """What a folder of encoded tars is of; kept beside them, so that only the same work is resumed."""

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
class EncodingJob:
    """What is to be encoded, by what and into what; each worker process has one.

    Attributes:
        location: what `open_source` takes.
        folder: where the tars go.
        model: whose image tokenizer encodes, or an image tokenizer alone; None: the embedded model's.
        reading: how to read the source.
        shard: records in a tar.
        device: "auto", "cpu" or "cuda"; with several GPUs the processes share them out.
        features: store images to look at as the features of the model's understanding encoder, in this number
            format; None: as images.
        size: pixels a side that images to draw are brought to; None: the model's.
        keep_ratio: keep their ratio, in an area of that side squared (`unimm.processing.views.TargetSize`).
    """

    location: Location
    folder: Path
    model: str | None = None
    reading: Reading = field(default_factory=Reading)
    shard: int = SHARD
    device: str = "auto"
    features: FeatureType | None = None
    size: int | None = None
    keep_ratio: bool = False


def encode_source(
    job: EncodingJob, processes: int = 1, on_progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """Write a source as webdataset tars in which images to draw are image codes.

    Tars that are whole are not written again, so a call that was cut off is resumed by the same call.
    Images to look at are copied as they are, or stored as features. Bad records are left out and listed in
    `NAME.bad.jsonl`.

    Args:
        job: what to encode.
        processes: how many work at once.
        on_progress: called with records done and records in all.

    Returns:
        Counts of records, of those written, of bad ones and of tars, and the folder.

    Raises:
        UserError: the source or the model cannot be read, the folder holds something else, or the disk is full.
    """
    folder, shard = job.folder, job.shard
    source = open_source(job.location, job.reading)
    if not len(source):
        raise UserError(f"{source.location}: has no records")
    if job.features is not None and job.features not in get_args(FeatureType):
        raise UserError(f"features: expected one of {', '.join(get_args(FeatureType))}, got {job.features!r}")
    if source.mark is not None:
        raise UserError(f"{source.location}: holds image codes already; train on it as it is")
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


def _plan(job: EncodingJob, source: Source) -> Plan:
    """What the tars will be of."""
    target_size, tokenizer, _ = _coder(job.model, "cpu", 0, job.size, job.keep_ratio, job.features is None)
    reading, encoder = job.reading, None
    if job.features is not None:
        processor, vision, _ = _viewer(job.model, "cpu", 0)
        encoder = fingerprint(vision, processor.views)
    return Plan(
        _resolved(job.location), source.signature(), len(source), job.shard, reading.pairs,
        dict(reading.fields), reading.images, reading.split, fingerprint(tokenizer, target_size), job.features, encoder,
    )  # fmt: skip


def _resolved(location: Location) -> str:
    """A location that says the same wherever one stands."""
    names = [location] if isinstance(location, str | Path) else location
    return "\n".join(str(Path(name).resolve()) for name in names)


def _run(job: EncodingJob, numbers: Sequence[int], processes: int) -> Iterator[int]:
    """Write shards here or in worker processes, giving each number as it is done."""
    if processes == 1:
        for number in numbers:
            yield write_shard(job, number)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked torch hangs
    workers, threads = min(processes, max(len(numbers), 1)), max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(workers, spawn, initializer=_begin_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(write_shard, job, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    """Let a worker have its share of the cores, and end with the process that started it."""
    torch.set_num_threads(threads)
    _die_with_parent()


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
    model: str | None, device: str, number: int, size: int | None, keep_ratio: bool, needed: bool = True
) -> tuple[TargetSize | None, Any, torch.device]:
    """What images are brought to, and the image tokenizer (float32, on a device) of a model; none if none is needed."""
    from unimm.families.image_tokenizers import is_image_tokenizer, load_image_tokenizer
    from unimm.loading import load

    place = _place(device, number)
    if model is not None and is_image_tokenizer(Path(model)):
        alone = load_image_tokenizer(model)
        target_size = TargetSize(size or int(alone.config.image_size), int(alone.config.stride), keep_ratio)
        return target_size, nn.Module.to(nn.Module.eval(alone), place), place
    um = load(model, "cpu", "float32")
    if um.processor.drawing_size is None or um.model.image_tokenizer is None:
        if not needed:
            return None, None, place
        raise UserError(f"{model}: this model has no image tokenizer, so it has no image codes")
    target_size = um.processor.target_size(size, keep_ratio)
    return target_size, nn.Module.to(um.model.image_tokenizer.eval(), place), place


def _place(device: str, number: int) -> torch.device:
    """The device for a worker of this number."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", number % torch.cuda.device_count())
    if device not in ("auto", "cpu"):
        raise UserError(f"device: {device!r} is not available here; use auto or cpu")
    return torch.device("cpu")


@functools.lru_cache(maxsize=2)
def _viewer(model: str | None, device: str, number: int) -> tuple[UniMMProcessor, nn.Module, torch.device]:
    """The processor and the understanding encoder (float32, on a device) of a model."""
    from unimm.families.image_tokenizers import is_image_tokenizer
    from unimm.loading import load

    if model is not None and is_image_tokenizer(Path(model)):
        raise UserError(f"{model}: an image tokenizer has no understanding encoder, so it has no features")
    um, place = load(model, "cpu", "float32"), _place(device, number)
    if um.model.vision is None:
        raise UserError(f"{model}: this model understands images by their codes, so it has no features")
    return um.processor, nn.Module.to(um.model.vision.eval(), place), place


def _readable(record: Record) -> BadRecord | None:
    """Why a record's images to look at cannot be used; None where they can."""
    try:
        for image in record.images(draw=False):
            image.image()
    except UserError as error:
        return BadRecord(record.key, "", str(error))
    return None


@functools.lru_cache(maxsize=1)
def _source(
    location: Location, pairs: Any, fields: tuple[tuple[str, str], ...], rest: tuple[Any, ...]
) -> Source:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNote)  # said once, where the work began
        return open_source(location, Reading(pairs, dict(fields), *rest))


def write_shard(job: EncodingJob, number: int) -> int:
    """Encode one shard's records and write its tar, whole or not at all; gives its number."""
    reading, folder = job.reading, job.folder
    source = _source(
        job.location, reading.pairs, tuple(reading.fields.items()),
        (reading.images, reading.split, reading.allow_outside),
    )  # fmt: skip
    place = number % max(torch.cuda.device_count(), 1)
    draws = job.features is None
    coder = _coder(job.model, job.device, place, job.size, job.keep_ratio, draws)
    target_size, tokenizer, device = coder
    start = number * job.shard
    stop = min(start + job.shard, len(source))
    with torch.no_grad():
        found = encode_range(source, start, stop, target_size, tokenizer, device)
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
                        add_member(tar, f"{index:010d}.{extension}", data)
            if isinstance(record, BadRecord):
                file = record.file or source.location
                bad.append({"key": record.key, "file": file, "reason": record.reason})
        if bad:  # before the tar, which says that the shard is done
            with atomic_write(_bad(folder, number)) as lines:
                lines.write_text("".join(json.dumps(line) + "\n" for line in bad), encoding="utf-8")
    return number


def sample_members(
    record: Record, codes: Sequence[CodeArray], features: Sequence[Features] | None = None
) -> list[tuple[str, bytes]]:
    """The members of a record's sample, `json` first: extension and bytes.

    Args:
        record: what to write.
        codes: of its images to draw.
        features: of its images to look at; None: these are written as they are.

    Raises:
        UserError: an image to look at cannot be read or decoded.
    """
    left, seen = iter(codes), iter(features or ())
    members: list[tuple[str, bytes]] = []
    for number, image in enumerate(record.images()):
        if image.draw:
            members.append((f"{number}{CODES_SUFFIX}", _array(next(left))))
        elif features is not None:
            members.append((f"{number}{FEATURES_SUFFIX}", _array(next(seen))))
        else:
            members.append((f"{number}.{image_extension(image)}", image.blob.read()))
    names = [name for name, _ in members]
    row: dict[str, Any] = {"key": record.key, "messages": _written(record.messages, names)}
    if record.others:
        row["others"] = [_written(messages, names) for messages in record.others]
    said = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")  # names that are no UTF-8
    return [("json", said), *members]


def _written(messages: Sequence[Message], names: Sequence[str]) -> list[dict[str, Any]]:
    """Messages as a sample's JSON has them, with the names of the members that their images are."""
    left = iter(names)
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "image": next(left), "draw": part.draw}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def _array(array: CodeArray | Features) -> bytes:
    """An array in numpy's file format."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def image_extension(image: ImagePart) -> str:
    """The extension for an image's bytes, by what they are."""
    image.image()  # a bad one is found now, not in training
    form = image.header()[0].lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(form, form)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
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
        write_json(path, asdict(plan))
    remove_leftovers(folder)


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
