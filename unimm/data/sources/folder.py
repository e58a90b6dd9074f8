"""A folder of pictures, each with its words beside it: `a.jpg` and `a.txt`, or `a.json` with any row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unimm.data.sources.pictures import find_file
from unimm.data.sources.reach import WAY_OUT, Reach, walk
from unimm.data.sources.rows import Reading, make_record, row_key
from unimm.data.sources.text import decode_text, parse_strict_json
from unimm.errors import UserError
from unimm.images import SUFFIXES
from unimm.processing.messages import BadRecord, Blob, Record, Source, digest, file_state

TEXT_SUFFIXES = (".txt", ".caption", ".json")  # beside a picture, the first that is there


class PictureFinder:
    """The picture files of a folder and of those below it, in the order of their names.

    Args:
        folder: is walked; linked folders too, where they stay inside.
        allow_outside: whether links may lead out of it.

    Attributes:
        paths: the pictures.
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
        """The bytes of a picture.

        Raises:
            UserError: it is a link that leads out of the folder.
        """
        self.reach.check(path)
        return Blob(str(path), path=str(path))


class PictureFolder(Source):
    """Pictures below a folder, with their words beside each; the key is the name within the folder."""

    form = "folder"

    def __init__(self, folder: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(location or str(folder))
        self.folder, self.reading = folder, reading
        self.found = PictureFinder(folder, reading.allow_outside)
        self.pictures = self.found.paths
        self.broken.extend(self.found.problems())
        if self.pictures and not any(_words(path) for path in self.pictures):
            raise UserError(
                f"{folder}: {len(self.pictures)} pictures, but no words; expected metadata.jsonl (or .csv) with "
                'file_name and text, or a .txt of the same name beside each, as "a.jpg" and "a.txt"'
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Record:
        path = self.pictures[self.check_index(index)]
        key, words = str(path.relative_to(self.folder)), _words(path)
        if words is None:
            missing = path.with_suffix(".txt").name
            raise BadRecord(key, str(self.folder), f"{missing}: missing beside the picture")
        try:
            return self._record(key, path, words)
        except UserError as error:
            raise BadRecord(key, str(words), str(error).removeprefix(f"{words}: ")) from None

    def _record(self, key: str, path: Path, words: Path) -> Record:
        """The record of a picture; what is in a JSON file counts before the picture beside it."""
        reading, picture = self.reading, self.found.blob(path)
        data = self.found.blob(words).read()
        if words.suffix != ".json":
            row: Any = {"image": picture, "text": decode_text(data)}
            return make_record(key, row, lambda value: value, Reading(reading.pairs))
        row = parse_strict_json(data)
        if not isinstance(row, dict):
            row = {"messages": row}
        fields = {name: field for name, field in reading.fields.items() if name != "image"}
        return make_record(
            row_key(row, key),
            row | {"image": picture},
            lambda value: find_file(path.parent, value, reading.allow_outside),
            Reading(reading.pairs, fields),
        )

    def files(self) -> Sequence[Path]:
        """All pictures."""
        return self.pictures

    def signature(self) -> str:
        """A digest of names, sizes and times of pictures and words."""
        return digest(file_state(file) for path in self.pictures for file in (path, _words(path)) if file)


def _words(path: Path) -> Path | None:
    """The file with a picture's words, where there is one."""
    beside = (path.with_suffix(suffix) for suffix in TEXT_SUFFIXES)
    return next((file for file in beside if file.exists()), None)
