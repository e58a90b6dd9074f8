"""Sources of rows: what stands at a place, before it is known whether it is a record, a preference or neither."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from unimm.data.sources.rows import Find, Reading, make_record
from unimm.errors import UserError
from unimm.processing.messages import BadRecord, Record, Source


class RowEntry(NamedTuple):
    """A row: its key, the file that holds it, its columns, and what finds the images that they name."""

    key: str
    file: str
    row: Any
    find: Find


class RowSource(Source):
    """A source whose records are rows with columns.

    Args:
        reading: how to read them.
        location: what the user called the source.
    """

    def __init__(self, reading: Reading, location: str) -> None:
        super().__init__(location)
        self.reading = reading

    @abstractmethod
    def entry(self, index: int) -> RowEntry:
        """The row at `index`.

        Raises:
            BadRecord: it cannot be read.
            IndexError: there is none.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """Where the row at `index` is, for messages."""

    def __getitem__(self, index: int) -> Record:
        key, file, row, find = self.entry(index)
        try:
            return make_record(key, row, find, self.reading)
        except UserError as error:
            raise BadRecord(key, file, str(error).removeprefix(f"{file}: ")) from None
