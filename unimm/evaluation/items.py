"""Items of a benchmark: the rows of a data set as a protocol names their columns, with the prompt that is asked.

Items are made one by one while they are asked, so a data set with its images never stands in memory whole.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimm.data.sources.images import find_file
from unimm.errors import UserError
from unimm.evaluation.made import made_rows
from unimm.evaluation.protocol import EvaluationProtocol, fill_prompt
from unimm.evaluation.rows import Columns, file_hash, find_files, join_rows, read_rows
from unimm.processing.messages import Blob
from unimm.sections import near

LETTERS = string.ascii_uppercase
ROTATION = 1_000_000  # what MMBench adds to the index of a question for each rotation of its choices
ADDED = ("file", "folder", "row", "images", "coco")  # what templates may name besides columns
_TEMPLATE = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\d{1,12}")


@dataclass(frozen=True)
class EvalItem:
    """One thing that is asked or drawn.

    Attributes:
        key: names it among all of the data.
        index: its place in the data, from 0.
        prompt: what is asked, or drawn, word for word.
        images: what is looked at.
        choices: the words of the choices, in the order of their letters.
        fields: what scoring needs (answer, category ...), plain values of JSON.
    """

    key: str
    index: int
    prompt: str
    images: tuple[Blob, ...] = ()
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class DataFiles:
    """A data set on disk.

    Args:
        protocol: says what its columns are.
        names: files, folders or hub ids, as the user gave them.
        images: the folder of images that rows name; None: beside the files.

    Raises:
        UserError: a file is missing, or none that the protocol knows by its checksum.
    """

    protocol: EvaluationProtocol
    names: list[str]
    images: Path | None = None
    files: list[Path] = field(init=False)
    hashes: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        made = self.protocol.data.made
        if made is not None:
            if self.names:
                raise UserError(f"{self.protocol.name}: --data: its data is made; data.made has its settings")
            self.files, self.hashes = [], {made.kind: made.checksum()}
            return
        if not self.names:
            raise UserError(f"{self.protocol.name}: --data: give the files of {self.protocol.data.source}")
        self.files = find_files(self.names)
        self.hashes = {path.name: file_hash(path) for path in self.files}
        known = self.protocol.data.sha256
        for path in self.files:
            found = self.hashes[path.name]
            if known and found not in known.values():
                named = known.get(path.name)
                wanted = f"{path.name} has {named}" if named else f"its files are {', '.join(known)}"
                raise UserError(
                    f"{path}: SHA-256 {found}, but the protocol {self.protocol.name} has another data set "
                    f"({wanted}); data.sha256={{}} asks it all the same, as another protocol"
                )

    @property
    def verified(self) -> bool:
        """Whether the protocol knows the checksums of its files."""
        return bool(self.protocol.data.sha256) or self.protocol.data.made is not None

    def rows(self) -> Iterator[tuple[Columns, Path]]:
        """The rows of all files that belong to the split, each with the file it is from.

        Raises:
            UserError: a row cannot be read.
        """
        data = self.protocol.data
        listed: Iterator[tuple[Columns, Path]]
        if data.made is not None:
            path = Path(data.made.kind)
            listed = ((row, path) for row in made_rows(data.made))
        elif data.join is not None and len(self.files) > 1 and self.files[0].suffix == ".json":
            parts = [read_rows(path, data.columns) for path in self.files]
            listed = ((row, self.files[0]) for row in join_rows(parts, data.join, ", ".join(self.names)))
        else:
            listed = ((row, path) for path in self.files for row in read_rows(path, data.columns))
        group: list[Columns] = []
        for number, (row, path) in enumerate(itertools.islice(listed, data.skip, None)):
            if not all(str(row.get(column)) == value for column, value in data.where.items()):
                continue
            if data.group is None:
                yield _named(row, path, number), path
                continue
            if group and group[-1].get(data.group) != row.get(data.group):
                yield _named({**group[0], "rows": group}, path, number), path
                group = []
            group.append(dict(row))
        if group:
            yield _named({**group[0], "rows": group}, self.files[-1], 0), self.files[-1]

    def items(self, limit: int | None = None) -> Iterator[EvalItem]:
        """The items, in the order of the data.

        Args:
            limit: at most so many; None: all.

        Raises:
            UserError: a row lacks a column, two have the same key, or there is none.
        """
        seen: set[str] = set()
        earlier: dict[str, str] = {}  # cells with an image, by key: a later row may name the key instead
        count = 0
        for number, (row, path) in enumerate(self.rows()):
            for item in self._items_of(row, path, number, earlier):
                if item.key in seen:
                    raise UserError(f"{path}: row {number}: {item.key!r} is the key of an earlier row too")
                if limit is not None and count >= limit:
                    return
                seen.add(item.key)
                yield dataclasses.replace(item, index=count)
                count += 1
        if not count:
            where = "".join(f", {name} {value}" for name, value in self.protocol.data.where.items())
            raise UserError(
                f"{', '.join(self.names)}: no items of the split {self.protocol.data.split}{where}"
            )

    def _items_of(self, row: Columns, path: Path, number: int, earlier: dict[str, str]) -> Iterator[EvalItem]:
        """The item of a row; several where its choices are rotated."""
        data, source = self.protocol.data, f"{path}: row {number}"
        fields = {name: _value(row, columns, name, source) for name, columns in data.fields.items()}
        key = fields.get(data.key)
        if key is None:
            raise UserError(f"{source}: no {data.key}, which names items")
        images = self._images(fields.pop("image", None), str(key), path, source, earlier)
        choices = _choices(row, data.options, source)
        fields = {name: _plain(value) for name, value in fields.items() if value is not None}
        rotations = len(choices) if data.circular and choices else 1
        for rotation in range(rotations):
            turned = choices[rotation:] + choices[:rotation]
            own = dict(fields) if rotations == 1 else _rotated(fields, choices, rotation, source)
            own.setdefault(
                "unit", _question(str(key)) if self.protocol.scorer.name == "mmbench" else str(key)
            )
            prompt = self._prompt(own, turned)
            yield EvalItem(_rotated_key(str(key), rotation), 0, prompt, tuple(images), turned, own)

    def _prompt(self, fields: Mapping[str, Any], choices: tuple[str, ...]) -> str:
        prompts = self.protocol.prompts
        name = "default"
        if "open" in prompts and not choices:
            name = "open"
        elif "hint" in prompts and fields.get("hint"):
            name = "hint"
        options = "\n".join(f"{letter}. {words}" for letter, words in zip(LETTERS, choices, strict=False))
        return fill_prompt(prompts[name], {**fields, "options": options})

    def _images(self, value: Any, key: str, path: Path, source: str, earlier: dict[str, str]) -> list[Blob]:
        """The images of a row: a value or several, as names, bytes or base64."""
        if value is None:
            return []
        values = list(value) if isinstance(value, list | tuple) else [value]
        found = []
        for one in values:
            if one is None:
                continue
            if isinstance(one, str) and _NUMBER.fullmatch(one) and one in earlier:
                one = earlier[one]
            elif isinstance(one, str) and len(one) > 64:
                earlier[key] = one
            try:
                blob = find_file(self.images or path.parent, one, allow_outside=True)
            except UserError as error:
                raise UserError(f"{source}: {error}") from None
            if blob.path is not None and not Path(blob.path).is_file():
                raise UserError(f"{source}: {blob.path}: no such image; --images names their folder")
            found.append(dataclasses.replace(blob, name=f"{source}: image") if blob.data else blob)
        return found


def _named(row: Columns, path: Path, number: int) -> Columns:
    """A row with what is known of it besides its columns, for templates; its images in one list, as MMMU has them."""
    images = [row[name] for name in (f"image_{place}" for place in range(1, 8)) if row.get(name) is not None]
    more = {
        "file": path.stem,
        "folder": path.parent.name,
        "row": number,
        **({"images": images} if images else {}),
    }
    if isinstance(row.get("image_id"), int):
        more["coco"] = f"COCO_val2014_{row['image_id']:012}.jpg"
    return {**more, **row}


def _value(row: Columns, columns: str | list[str], name: str, source: str) -> Any:
    """The value of a field: of the first column that is there, or of templates filled in, of which lists are made."""
    tried = [columns] if isinstance(columns, str) else columns
    optional = any(column.endswith("?") for column in tried)
    for column in (one.removesuffix("?") for one in tried):
        if column == "*":
            return {key: value for key, value in row.items() if key not in ADDED}
        if not _TEMPLATE.search(column):
            if row.get(column) is not None:
                return row[column]
            continue
        wanted = _TEMPLATE.findall(column)
        if all(row.get(one) is not None for one in wanted):
            return _TEMPLATE.sub(lambda match: str(row[match[1]]), column)
    if optional:
        return None
    said = " or ".join(tried)
    raise UserError(f"{source}: {name}: no column {said}{near(said, row)} (columns: {', '.join(row)[:200]})")


def _choices(row: Columns, columns: list[str], source: str) -> tuple[str, ...]:
    """The words of the choices."""
    if len(columns) == 1 and columns[0] in row:
        value = row[columns[0]]
        if isinstance(value, str):  # MMMU writes a list of Python
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise UserError(f"{source}: {columns[0]}: expected a list, got {value[:60]!r}") from None
        if not isinstance(value, list | tuple):
            raise UserError(f"{source}: {columns[0]}: expected a list, got {type(value).__name__}")
        return tuple(str(one) for one in value)
    found = []
    for column in columns:
        value = row.get(column)
        if value is None or value == "" or value == "nan":
            break
        found.append(str(value))
    return tuple(found)


def _rotated(
    fields: Mapping[str, Any], choices: tuple[str, ...], rotation: int, source: str
) -> dict[str, Any]:
    """The fields of a question whose choices are rotated to the left, the right one's letter with them."""
    answer = str(fields.get("answer"))
    if answer not in LETTERS[: len(choices)]:
        raise UserError(
            f"{source}: answer: expected a letter up to {LETTERS[len(choices) - 1]}, got {answer!r}"
        )
    place = (LETTERS.index(answer) - rotation) % len(choices)
    return {**fields, "answer": LETTERS[place]}


def _rotated_key(key: str, rotation: int) -> str:
    if rotation == 0:
        return key
    return str(int(key) + rotation * ROTATION) if _NUMBER.fullmatch(key) else f"{key}#{rotation}"


def _question(key: str) -> str:
    """The question that an index of MMBench's files is a rotation of; others' ids are as long without being any."""
    return str(int(key) % ROTATION) if _NUMBER.fullmatch(key) else key


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
