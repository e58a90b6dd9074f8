"""A folder of pictures, each with its words in a text file of the same name: `a.jpg` and `a.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unimm.data.sources.record import BadRecord, Blob, Record, Source, digest
from unimm.data.sources.rows import Reading, make_record
from unimm.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def find_pictures(folder: Path) -> list[Path]:
    """The picture files below a folder, in the order of their names."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


class PictureFolder(Source):
    """Pictures below a folder, with a `.txt` beside each; the key is the name within the folder."""

    form = "folder"

    def __init__(self, folder: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(location or str(folder))
        self.folder, self.reading = folder, reading
        self.pictures = find_pictures(folder)
        if self.pictures and not any(path.with_suffix(".txt").is_file() for path in self.pictures):
            raise UserError(
                f"{folder}: {len(self.pictures)} pictures, but no words; expected metadata.jsonl with "
                'file_name and text, or a .txt of the same name beside each, as "a.jpg" and "a.txt"'
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Record:
        path = self.pictures[self.check_index(index)]
        key, words = str(path.relative_to(self.folder)), path.with_suffix(".txt")
        try:
            text = words.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadRecord(key, str(self.folder), f"{words.name}: missing beside the picture") from None
        except (OSError, UnicodeDecodeError):
            raise BadRecord(key, str(words), "not a text file in UTF-8") from None
        row = {"image": Blob(str(path), path=str(path)), "text": text}
        try:
            return make_record(key, row, lambda value: value, Reading(self.reading.pairs))
        except UserError as error:
            raise BadRecord(key, str(words), str(error)) from None

    def files(self) -> Sequence[Path]:
        """All pictures."""
        return self.pictures

    def signature(self) -> str:
        """A digest of names, sizes and times of pictures and words."""
        return digest(_stamp(file) for path in self.pictures for file in (path, path.with_suffix(".txt")))


def _stamp(path: Path) -> str:
    if not path.exists():
        return f"{path} missing"
    state = path.stat()
    return f"{path} {state.st_size} {state.st_mtime_ns}"
