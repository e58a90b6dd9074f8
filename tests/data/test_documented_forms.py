"""The tables of docs/data.md: every line is read, in every container, as its last column says."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import unimm
from tests.data import forms
from unimm.data.sources import ImagePart, Record, open_source

DOCUMENT = Path(unimm.__file__).parent.parent / "docs" / "data.md"
PNG = forms.encoded(forms.SCENES[0])
JPEG = forms.encoded(forms.SCENES[0], "JPEG")
WANTED = (
    "LLaVA",
    "ShareGPT",
    "the_cauldron",
    "FineVision",
    "TRL",
    "webdataset",
    "Folder",
    "Parquet",
    "datasets",
)
_PLACE = re.compile(r"`([^`]+)` and `([^`]+)`: `(.+)`$")


def rows_of(heading: str) -> list[tuple[str, str, str]]:
    """The rows of a table of the document by the second column's heading."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ") and f"| {heading} |" in line) + 2
    found = []
    for line in lines[start:]:
        if not line.startswith("| "):
            return found
        name, content, reads = line.strip("| ").split(" | ")
        found.append((name, content, reads))
    raise AssertionError("the table has no end")


LINES, PLACES = rows_of("A line of it"), rows_of("What lies there")


def said(record: Record) -> str:
    """A record as the tables say it."""
    turns = []
    for message in record.messages:
        kinds = (
            "text" if isinstance(part, str) else "drawing" if part.draw else "image" for part in message.parts
        )
        turns.append(f"{message.role}: {', '.join(kinds)}")
    return "; ".join(turns) + (" (each caption in turn)" if record.versions > 1 else "")


def row_of(line: str, inside: Callable[[], Any]) -> dict[str, Any]:
    """The row that a line says, with `inside()` for the bytes of its images."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(one) for name, one in value.items()}
        if isinstance(value, list):
            return [fill(one) for one in value]
        if value == "<PNG>":
            return inside()
        return value.replace("<PNG>", base64.b64encode(PNG).decode()) if isinstance(value, str) else value

    row: dict[str, Any] = fill(json.loads(line.strip("`")))
    return row


def names_in(row: Any) -> Iterator[str]:
    """The names of images in a row."""
    if isinstance(row, dict):
        for name, value in row.items():
            if name not in ("path", "conversations", "texts"):
                yield from names_in(value)
    elif isinstance(row, list):
        for value in row:
            yield from names_in(value)
    elif isinstance(row, str) and row.endswith(".jpg"):
        yield row


def base64_png() -> str:
    return base64.b64encode(PNG).decode()


def as_json(folder: Path, line: str) -> Path:
    row = row_of(line, base64_png)
    for name in names_in(row):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    (folder / "rows.json").write_text(json.dumps([row, row]))
    return folder / "rows.json"


def as_lines(folder: Path, line: str) -> Path:
    path = as_json(folder, line)
    rows = json.loads(path.read_text())
    path.unlink()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def as_tar(folder: Path, line: str) -> Path:
    row = row_of(line, base64_png)
    files = {"0.json": json.dumps(row).encode()}
    for number, _ in enumerate(names_in(row)):
        files[f"0.{number}.jpg"] = JPEG
    return forms.write_tar(folder / "0.tar", files)


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a table has it: what no column can hold (contents of two types) stands there as JSON."""
    for name, value in row.items():
        try:
            pa.array([value])
        except pa.ArrowInvalid:
            row = row | {name: json.dumps(value)}
    return row


def as_parquet(folder: Path, line: str) -> Path:
    row = columns(row_of(line, lambda: PNG))
    for name in names_in(row):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    pq.write_table(pa.Table.from_pylist([row, row]), folder / "train-00000-of-00001.parquet")
    return folder


def as_saved(folder: Path, line: str) -> Path:
    import datasets

    row = columns(row_of(line, lambda: PNG))
    datasets.Dataset.from_list([row, row]).save_to_disk(str(folder))
    for name in names_in(row):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    return folder


def test_the_tables_name_the_forms_that_people_come_with() -> None:
    names = " ".join(name for name, _, _ in (*LINES, *PLACES))
    assert all(wanted in names for wanted in WANTED) and len(LINES) >= 15 and len(PLACES) >= 5


@pytest.mark.parametrize("container", [as_json, as_lines, as_tar, as_parquet, as_saved])
@pytest.mark.parametrize(("name", "line", "reads"), LINES, ids=[line[0] for line in LINES])
def test_a_line_is_read_as_the_table_says(
    name: str, line: str, reads: str, container: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    record = open_source(container(tmp_path, line))[0]
    assert said(record) == reads
    texts = [part for m in record.messages for part in m.parts if isinstance(part, str)]
    assert all(json.dumps(word)[1:-1] in line for text in texts for word in text.splitlines()), (
        "words of the line"
    )
    for message in record.messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                assert part.image().size == (64, 64)


@pytest.mark.parametrize(("name", "content", "reads"), PLACES, ids=[place[0] for place in PLACES])
def test_a_place_is_read_as_the_table_says(name: str, content: str, reads: str, tmp_path: Path) -> None:
    match = _PLACE.match(content)
    assert match is not None, content
    image, file, text = match.groups()
    text = text.replace("\\n", "\n") if file.endswith(".csv") else text
    files = {image: JPEG, file: text.encode()}
    if name.startswith("webdataset"):
        forms.write_tar(tmp_path / "000.tar", files)
    for path, data in () if name.startswith("webdataset") else files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    record = open_source(tmp_path)[0]
    assert said(record) == reads and record.images()[0].image().size == (64, 64)
