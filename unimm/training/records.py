"""Samples of sources: records at random access, shuffled by grain, with a bad one replaced and written down.

Everything about a sample follows from the seed and its position, replacements too, so a run that resumes meets
the same samples. Image codes of pictures to draw are read where they are stored, or computed once into a file.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unimm.data.encode import SHARD, encode_range, fingerprint
from unimm.data.sources import BadRecord, Reading, Record, Source, open_source
from unimm.data.sources.rows import Pairs
from unimm.data.stream import RowBuilder, grids_of
from unimm.errors import UserError, UserNote
from unimm.processing import CAPTION_REQUESTS, Canvas, Grid, UniMMProcessor
from unimm.sections import Section
from unimm.training.kept import Kept, kept_codes

if TYPE_CHECKING:
    from unimm.training.recipe import BaseRecipe
    from unimm.training.task import Sample

TRIES = 100  # records tried in place of a bad one
PROBES = 64  # records looked at to see whether a source has pictures to draw


class SourceSection(Section):
    """One source of a recipe: where it lies and how it is read (`unimm.data.sources`)."""

    path: str
    pairs: Pairs = "image_to_text"
    """What a picture with a text is for."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Our name of a column (image, text, question ...) -> the source's."""
    images: str | None = None
    """Folder that the names of pictures are relative to; null: where the source lies."""
    split: str | None = None
    """Which split of a Hugging Face folder."""
    requests: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = CAPTION_REQUESTS
    """What is asked of a picture that has only a caption."""

    def reading(self) -> Reading:
        """How the source is to be read."""
        return Reading(self.pairs, dict(self.fields), self.images, self.split)


class BadItems:
    """The bad items of a run, each once, in `bad-items.jsonl` of its folder, where all ranks write.

    Args:
        path: the file; what an earlier try wrote there counts too.
        limit: most that there may be.
        recipe: the recipe's file, for the message.
    """

    def __init__(self, path: Path, limit: int, recipe: str) -> None:
        self.path, self.limit, self.recipe = path, limit, recipe
        self.known = self._read()
        self.lock = threading.Lock()

    def _read(self) -> set[tuple[str, str, str]]:
        """Source, file and key of every item in the file; a line that was cut off is left out."""
        known = set()
        with suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    item = json.loads(line)
                    known.add((item["source"], item["file"], item["key"]))
        return known

    def add(self, source: str, bad: BadRecord) -> None:
        """Note one.

        Raises:
            UserError: there are more than the limit.
        """
        with self.lock:
            if (source, bad.file, bad.key) in self.known:
                return
            line = {"source": source, "key": bad.key, "file": bad.file, "reason": bad.reason}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.known = self._read()
            count = len(self.known)
        if count > self.limit:
            raise UserError(
                f"{self.recipe}: data.max_bad_items: {count} items cannot be used, more than {self.limit}; "
                f"{self.path} lists them, the last is {source}: {bad}"
            )
        warnings.warn(f"{source}: {bad}; another takes its place", UserNote, stacklevel=2)


class StoredCodes:
    """The image codes of a source's pictures to draw, computed once and kept in one file.

    Args:
        path: the safetensors file; made again if it is of another tokenizer or of other data.
        source: whose pictures.
        canvas: what they are brought to.
        tokenizer: what encodes.
        device: where.

    Raises:
        UserError: the file is no file of image codes, or cannot be written.
    """

    def __init__(
        self, path: Path, source: Source, canvas: Canvas, tokenizer: Any, device: torch.device
    ) -> None:
        mark = f"{fingerprint(tokenizer, canvas)} {source.signature()} {len(source)} by size"
        stored, notes = kept_codes(path, mark, lambda: _compute(source, canvas, tokenizer, device))
        self.bad: dict[str, list[str]] = json.loads(notes["bad"])
        self.codes, self.sizes = stored["codes"], stored["sizes"].tolist()
        self.starts, self.places = _ends(stored["counts"]), _ends(stored["sizes"].prod(1))

    def get(self, index: int) -> list[Tensor]:
        """Codes int64 [h, w] of each picture to draw of a record.

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


def _compute(source: Source, canvas: Canvas, tokenizer: Any, device: torch.device) -> Kept:
    """Codes int32 of all M pictures in a row, their sizes [M, 2], counts for each record [N], and the bad by index."""
    from rich.progress import track

    torch.nn.Module.to(tokenizer, device)
    codes: list[Tensor] = []
    counts, bad = [], {}
    starts = range(0, len(source), SHARD)
    for start in track(starts, f"image codes of {source.location}", disable=len(starts) == 1):
        stop = min(start + SHARD, len(source))
        with torch.no_grad():
            found = encode_range(source, start, stop, canvas, tokenizer, device)
        for index, (record, drawn) in enumerate(found, start):
            if isinstance(record, BadRecord):
                bad[str(index)] = [record.key, record.file, record.reason]
            counts.append(len(drawn))
            codes += [torch.from_numpy(one) for one in drawn]
    sizes = torch.tensor([one.shape for one in codes], dtype=torch.int64).view(-1, 2)
    flat = torch.cat([torch.zeros(0, dtype=torch.int32), *(one.flatten() for one in codes)])
    return {"codes": flat, "sizes": sizes, "counts": torch.tensor(counts)}, {"bad": json.dumps(bad)}


def draws(source: Source) -> bool:
    """Whether a source has pictures to draw that are not encoded yet, by a look at some of its records."""
    for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist():
        with suppress(BadRecord):
            if any(not picture.encoded for picture in source[index].pictures(draw=True)):
                return True
    return False


class RecordSamples:
    """Endless samples of one source, for `unimm.training.batches.mix`.

    Args:
        name: of the source in the recipe.
        source: its records.
        section: how they are read.
        processor: words and pictures to tokens and pixels.
        codes: stored codes; None where the source has its own, or nothing to draw.
        tokenizer: encodes a picture to draw that none of these has.
        canvas: what such a picture is brought to.
        bad: where bad items are noted.
        seed: of the order and of all choices.
        dropout: share of text-to-image prompts that are blanked.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        section: SourceSection,
        processor: UniMMProcessor,
        codes: StoredCodes | None,
        tokenizer: Any,
        canvas: Canvas,
        bad: BadItems,
        seed: int,
        dropout: float,
    ) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # grain warns at import that there is no jax
        import grain

        self.name, self.source, self.processor, self.codes = name, source, processor, codes
        self.tokenizer, self.canvas, self.bad, self.dropout = tokenizer, canvas, bad, dropout
        self.builder = RowBuilder(processor, section.requests)
        self.seeds = (seed, zlib.crc32(name.encode()))
        order_seed = int(np.random.SeedSequence(self.seeds).generate_state(1)[0])
        self.order = grain.MapDataset.range(len(source)).seed(order_seed).shuffle().repeat()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position: of the record that stands there, or of the next good one that is drawn.

        Raises:
            UserError: too many items are bad.
        """
        index = int(self.order[int(position)])
        rng = np.random.default_rng([*self.seeds, int(position)])
        for tried in range(TRIES):
            choice, blank, other = int(rng.integers(2**31)), rng.random() < self.dropout, rng.random()
            try:
                return {**self.sample(index, choice, blank), "skipped": tried}
            except BadRecord as error:
                self.bad.add(self.name, error)
            index = int(other * len(self.source))
        raise UserError(f"{self.source.location}: {TRIES} items in a row cannot be used")

    def sample(self, index: int, choice: int, blank: bool) -> Sample:
        """The sample of one record.

        Raises:
            BadRecord: it cannot be used.
        """
        record = self.source[index]
        try:
            return self._sample(record, index, choice, blank)
        except BadRecord:
            raise
        except UserError as error:
            raise BadRecord(record.key, self.source.location, str(error)) from None

    def _sample(self, record: Record, index: int, choice: int, blank: bool) -> Sample:
        processor = self.processor
        codes = self._codes(record, index)
        pixels, sizes = None, None
        features: Tensor | None = None
        grids: list[Grid] = []
        shown = record.pictures(draw=False)
        if shown and all(picture.featured for picture in shown):
            features = torch.stack([torch.from_numpy(picture.features()) for picture in shown])
            grids = [processor.layout.grid] * len(shown)
        elif pictures := [picture.image() for picture in shown]:
            if processor.layout.shared:
                pixels, sizes = processor.sized_pixels(pictures)
                grids = grids_of(processor, sizes.tolist())
            else:
                pixels, grids = processor.pixels(pictures), [processor.layout.grid] * len(pictures)
        row = self.builder.build(record, grids, codes, choice, blank)
        length = len(row.ids)
        sample: Sample = {
            "ids": np.array(row.ids, np.int64),
            "labels": np.array(row.labels, np.int64),
            "positions": np.arange(length, dtype=np.int64),
            "branches": np.zeros(length, np.int64),
        }
        if pixels is not None and row.seen:
            sample["pixels"] = pixels[: row.seen]
            if sizes is not None:
                sample["sizes"] = sizes[: row.seen]
        if features is not None and row.seen:
            sample["features"] = features[: row.seen]
        if row.drawn and not processor.layout.shared:
            sample["codes"] = torch.stack(codes[: row.drawn])
        return sample

    def _codes(self, record: Record, index: int) -> list[Tensor]:
        """Codes of the record's pictures to draw: its own, the stored ones, or computed now."""
        drawn = record.pictures(draw=True)
        if not drawn:
            return []
        if all(picture.encoded for picture in drawn):
            codes = [torch.from_numpy(picture.codes()) for picture in drawn]
        elif self.codes is not None:
            codes = self.codes.get(index)
        else:
            codes = self._encode(record)
        grid = self.processor.layout.grid
        for one in codes:
            if not self.processor.layout.shared and tuple(one.shape) != tuple(grid):
                raise UserError(f"image codes of {list(one.shape)}, the model draws {list(grid)}")
        return codes

    def _encode(self, record: Record) -> list[Tensor]:
        pictures = [self.canvas.pixels(picture.image()) for picture in record.pictures(draw=True)]
        with torch.no_grad():
            device = next(self.tokenizer.parameters()).device
            return [self.tokenizer.encode(pixels[None].to(device))[0].cpu() for pixels in pictures]


class Records:
    """All sources of a recipe, open and with their image codes at hand.

    Args:
        recipe: whose; its folder keeps the codes and the list of bad items.
        sections: name -> source.
        limit: most bad items.
        processor: of the model.
        tokenizer: the model's image tokenizer.
        canvas: what pictures to draw are brought to.
        device: where codes are made.

    Raises:
        UserError: a source cannot be read or is empty, or its codes are of another tokenizer.
    """

    def __init__(
        self,
        recipe: BaseRecipe,
        sections: Mapping[str, SourceSection],
        limit: int,
        processor: UniMMProcessor,
        tokenizer: Any,
        canvas: Canvas,
        device: torch.device,
    ) -> None:
        self.sections, self.processor, self.tokenizer, self.canvas = sections, processor, tokenizer, canvas
        self.bad = BadItems(Path(recipe.output) / "bad-items.jsonl", limit, recipe.source)
        self.sources: dict[str, Source] = {}
        self.codes: dict[str, StoredCodes | None] = {}
        for name, section in sections.items():
            try:
                source = self.sources[name] = open_source(section.path, section.reading())
            except UserError as error:
                raise recipe.error(f"data.sources.{name}", str(error)) from None
            if not len(source):
                raise recipe.error(f"data.sources.{name}", f"{section.path}: has no records")
            if source.mark is not None and source.mark != fingerprint(tokenizer, canvas):
                message = (
                    "image codes of another image tokenizer, or of another size, than here; encode it anew"
                )
                raise recipe.error(f"data.sources.{name}", f"{section.path}: {message}")
        for name, source in self.sources.items():
            path = Path(recipe.output) / "codes" / f"{name}.safetensors"
            self.codes[name] = StoredCodes(path, source, canvas, tokenizer, device) if draws(source) else None

    def samples(self, seed: int, dropout: float) -> dict[str, RecordSamples]:
        """Endless samples of each source; see `RecordSamples` for the arguments."""
        return {
            name: RecordSamples(
                name, source, self.sections[name], self.processor, self.codes[name], self.tokenizer,
                self.canvas, self.bad, seed, dropout,
            )
            for name, source in self.sources.items()
        }  # fmt: skip
