"""A folder of images, each with its words beside it: `a.jpg` and `a.txt`, or `a.json` with any row."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unimm.data.sources.entries import RowEntry
from unimm.data.sources.images import find_file
from unimm.data.sources.reach import WAY_OUT, Reach, walk
from unimm.data.sources.rows import Reading, make_record, row_key
from unimm.data.sources.text import decode_text, parse_strict_json
from unimm.errors import UserError
from unimm.images import SUFFIXES
from unimm.processing.messages import BadRecord, Blob, Record, Source, digest, file_state

TEXT_SUFFIXES = (".txt", ".caption", ".json")  # beside an image, the first that is there


class ImageFinder:
    """The image files of a folder and of those below it, in the order of their names.

    Args:
        folder: is walked; linked folders too, where they stay inside.
        allow_outside: whether links may lead out of it.

    Attributes:
        paths: the images.
        others: what else lies there, in no order.
        refused: linked folders that lead out, and were not gone into.
    """

    def __init__(self, folder: Path, allow_outside: bool = False) -> None:
        self.reach = Reach(folder, allow_outside)
        self.refused: list[Path] = []
        found = list(walk(self.reach, self.refused.append)) if os.path.isdir(folder) else []
        self.paths = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
        self.others = [path for path in found if path.suffix.lower() not in SUFFIXES]

    def problems(self) -> Iterator[BadRecord]:
        """What to say of each folder that was not gone into."""
        for path in self.refused:
            reason = f"a link that leads out of {self.reach.folder}, not followed; {WAY_OUT}"
            yield BadRecord("", str(path), reason)

    def blob(self, path: Path) -> Blob:
        """The bytes of an image.

        Raises:
            UserError: it is a link that leads out of the folder.
        """
        self.reach.check(path)
        return Blob(str(path), path=str(path))


class ImageFolder(Source):
    """Images below a folder, with their words beside each; the key is the name within the folder."""

    form = "folder"

    def __init__(self, folder: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(location or str(folder))
        self.folder, self.reading = folder, reading
        self.found = ImageFinder(folder, reading.allow_outside)
        self.images = self.found.paths
        self.broken.extend(self.found.problems())
        if self.images and reading.words and not any(_words(path) for path in self.images):
            raise UserError(
                f"{folder}: {len(self.images)} images, but no words; expected metadata.jsonl (or .csv) with "
                'file_name and text, or a .txt of the same name beside each, as "a.jpg" and "a.txt"'
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        key, file, row, find = self.entry(index)
        fields = self.reading.fields if file.endswith(".json") else {}  # else the columns are ours
        fields = {name: field for name, field in fields.items() if name != "image"}
        try:
            return make_record(key, row, find, Reading(self.reading.pairs, fields))
        except UserError as error:
            raise BadRecord(key, file, str(error).removeprefix(f"{file}: ")) from None

    def entry(self, index: int) -> RowEntry:
        """The image at `index` with its words as a row; what is in a JSON file counts before the image beside it.

        Raises:
            BadRecord: its words are missing (unless `Reading.words` is false), or something cannot be read.
        """
        path = self.images[self.check_index(index)]
        key, words = str(path.relative_to(self.folder)), _words(path)
        if words is None and self.reading.words:
            missing = path.with_suffix(".txt").name
            raise BadRecord(key, str(self.folder), f"{missing}: missing beside the image")
        file = str(words or path)
        try:
            return self._entry(key, path, words)
        except UserError as error:
            raise BadRecord(key, file, str(error).removeprefix(f"{file}: ")) from None

    def _entry(self, key: str, path: Path, words: Path | None) -> RowEntry:
        image, allow_outside = self.found.blob(path), self.reading.allow_outside
        if words is None:
            return RowEntry(key, str(path), {"image": image}, lambda value: value)
        data = self.found.blob(words).read()
        if words.suffix != ".json":
            row: Any = {"image": image, "text": decode_text(data)}
            return RowEntry(key, str(words), row, lambda value: value)
        row = parse_strict_json(data)
        if not isinstance(row, dict):
            row = {"messages": row}
        find = functools.partial(find_file, path.parent, allow_outside=allow_outside)
        return RowEntry(row_key(row, key), str(words), row | {"image": image}, find)

    def files(self) -> Sequence[Path]:
        """All images."""
        return self.images

    def signature(self) -> str:
        """A digest of names, sizes and times of images and words."""
        return digest(file_state(file) for path in self.images for file in (path, _words(path)) if file)


def _words(path: Path) -> Path | None:
    """The file with an image's words, where there is one."""
    beside = (path.with_suffix(suffix) for suffix in TEXT_SUFFIXES)
    return next((file for file in beside if file.exists()), None)
