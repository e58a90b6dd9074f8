"""A finished shard of a job as JSONL with images beside it, Parquet or a webdataset tar: whole or not at all.

Rows are in the order of the source and hold nothing of the time or the machine, so the same job writes the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.data.encode import add_member, image_extension
from unimm.data.sources.tables import need
from unimm.files import atomic_write, make_folder
from unimm.folders import write_folder
from unimm.jobs.recipe import AnyJob, DrawRecipe, OutputFormat
from unimm.processing.messages import ImagePart

SUFFIXES_OF: dict[OutputFormat, str] = {"jsonl": ".jsonl", "parquet": ".parquet", "webdataset": ".tar"}
DRAWN_IMAGES = "images"
ROW_GROUP = 100  # rows of Parquet that are read at once


@dataclass
class ResultRow:
    """A row of the output.

    Attributes:
        number: its place among all results of the job.
        columns: what was said or drawn, and of what.
        images: those that were looked at.
        drawn: makes the image that was drawn; None where none was.
    """

    number: int
    columns: dict[str, Any]
    images: Sequence[ImagePart] = field(default_factory=list)
    drawn: Callable[[], Image.Image] | None = None

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.number:010d}"


def shard_file(recipe: AnyJob, folder: Path, number: int) -> Path:
    """The file of a shard; a shard is done once it is there."""
    return folder / f"{number:06d}{SUFFIXES_OF[recipe.output.format]}"


def write_job_shard(recipe: AnyJob, folder: Path, number: int, rows: Iterable[ResultRow]) -> None:
    """Write a shard.

    Args:
        recipe: of the job.
        folder: where it goes.
        number: of the shard.
        rows: its results, in the order of the source.

    Raises:
        UserError: it cannot be written.
    """
    path = shard_file(recipe, folder, number)
    if recipe.output.format == "webdataset":
        with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
            for row in rows:
                for name, data in _members(row, recipe.output.images):
                    add_member(tar, f"{row.name}.{name}", data)
    elif recipe.output.format == "parquet":
        with atomic_write(path) as temporary:
            _write_parquet(temporary, recipe, rows)
    else:
        _write_lines(path, recipe, rows)


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _line(columns: Mapping[str, Any]) -> str:
    """Columns as a line of JSON; those that hold nothing are left out."""
    return json.dumps(
        {name: value for name, value in columns.items() if value is not None}, ensure_ascii=False
    )


def _write_lines(path: Path, recipe: AnyJob, rows: Iterable[ResultRow]) -> None:
    """Write JSONL, its drawings first; images that were looked at are named where they are files."""
    lines: list[str] = []
    if isinstance(recipe, DrawRecipe):
        beside = f"{DRAWN_IMAGES}/{path.stem}"

        def draw(place: Path) -> None:
            for row in rows:
                assert row.drawn is not None
                (place / f"{row.name}.png").write_bytes(png(row.drawn()))
                lines.append(_line({**row.columns, "image": f"{beside}/{row.name}.png"}))

        make_folder(path.parent, DRAWN_IMAGES)
        write_folder(path.parent / beside, draw, keep_others=False)
    else:
        for row in rows:
            names = [_file_name(image, path.parent) for image in row.images]
            shown: dict[str, Any] = {}
            if names and None not in names:
                shown = {"image": names[0]} if len(names) == 1 else {"images": names}
            lines.append(_line({**row.columns, **shown}))
    with atomic_write(path) as temporary:
        text = "".join(f"{line}\n" for line in lines)
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files that are no UTF-8


def _file_name(image: ImagePart, folder: Path) -> str | None:
    """The name of an image's file as seen from a folder; None of an image that has no file of its own."""
    blob = image.blob
    return os.path.relpath(blob.path, folder) if blob.path is not None and blob.size is None else None


def _members(row: ResultRow, images: bool) -> Iterator[tuple[str, bytes]]:
    """Extension and bytes of each member of a sample, its JSON first."""
    yield "json", _line(row.columns).encode("utf-8", "backslashreplace")
    if row.drawn is not None:
        yield "png", png(row.drawn())
    elif images:
        several = len(row.images) > 1
        for place, image in enumerate(row.images):
            extension = image_extension(image)
            yield f"{place}.{extension}" if several else extension, image.blob.read()


def _write_parquet(path: Path, recipe: AnyJob, rows: Iterable[ResultRow]) -> None:
    """Write a Parquet file in row groups small enough for reading by random access."""
    pyarrow, parquet = need("pyarrow", recipe.output.folder), need("pyarrow.parquet", recipe.output.folder)
    schema = _schema(recipe, pyarrow)
    with parquet.ParquetWriter(path, schema) as writer:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(_cells(row, recipe.output.images))
            if len(group) == ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _cells(row: ResultRow, images: bool) -> dict[str, Any]:
    """A row's columns with its images as Hugging Face's datasets have them."""
    if row.drawn is not None:
        return {**row.columns, "image": {"bytes": png(row.drawn()), "path": f"{row.name}.png"}}
    shown = row.images if images else []
    cells = [{"bytes": one.blob.read(), "path": f"{row.name}.{place}.{image_extension(one)}"}
             for place, one in enumerate(shown)]  # fmt: skip
    return {**row.columns, "images": cells or None}


def _schema(recipe: AnyJob, pyarrow: Any) -> Any:
    """The columns of a job's Parquet files."""
    text, image = pyarrow.string(), pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns: list[tuple[str, Any]] = [("key", text)]
    if isinstance(recipe, DrawRecipe):
        columns += [("prompt", text), ("seed", pyarrow.uint64()), ("image", image)]
    else:
        history = pyarrow.list_(pyarrow.list_(text))
        asked = [("system", text), ("history", history), ("question", text), ("answer", text)]
        columns += [("text", text)] if recipe.task == "caption" else asked
        columns += [("finish_reason", text), ("tokens", pyarrow.int64()), ("images", pyarrow.list_(image))]
    return pyarrow.schema(columns)
