"""Samples of sources: records at random access, shuffled by grain, with a bad one replaced and written down.

Everything about a sample follows from the seed and its position, replacements too, so a run that resumes meets
the same samples. Image codes of images to draw are read where they are stored, or computed once into a file.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unimm.console import say
from unimm.data.codes import StoredCodes, draws, fingerprint
from unimm.data.samples import SampleBuilder
from unimm.data.sources import BadRecord, Reading, Source, open_source
from unimm.data.sources.rows import PairDirection
from unimm.data.split import MAX_DIVIDED, hold_out
from unimm.errors import UserError, UserNote
from unimm.files import append
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor
from unimm.processing.views import TargetSize
from unimm.sections import Section
from unimm.training.recipe import VALIDATION, leave_out
from unimm.training.sides import check_source_images

if TYPE_CHECKING:
    from unimm.data.samples import Sample
    from unimm.training.recipe import BaseRecipe, Packing

RECORD_TRIES = 100  # records tried in place of a bad one
STORED = 10  # times the samples of a run: codes of larger sources are made as they are needed


class SourceSection(Section):
    """One source of a recipe: where it lies and how it is read (`unimm.data.sources`)."""

    path: str
    pairs: PairDirection = "image_to_text"
    """What an image with a text is for."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Our name of a column (image, text, question ...) -> the source's; an empty one says that there is none."""
    images: str | None = None
    """Folder that the names of images are relative to; null: where the source lies."""
    split: str | None = None
    """Which split, where names of files or a Hugging Face folder say that there are several; null: train."""
    allow_outside: bool = False
    """Whether the data may name files outside its folder, and links may lead out of it."""
    requests: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = CAPTION_REQUESTS
    """What is asked of an image that has only a caption."""

    @property
    def kind(self) -> str:
        """What it is mostly for, as far as the section says: "understanding", "text" or "generation"."""
        if self.pairs == "text_to_image":
            return "generation"
        return "text" if self.fields.get("image") == "" else "understanding"

    def reading(self) -> Reading:
        """How the source is to be read."""
        return Reading(self.pairs, dict(self.fields), self.images, self.split, self.allow_outside)


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
            append(self.path, json.dumps(line) + "\n")
            self.known = self._read()
            count = len(self.known)
        if count > self.limit:
            raise UserError(
                f"{self.recipe}: data.max_bad_items: {count} items cannot be used, more than {self.limit}; "
                f"{self.path} lists them, the last is {source}: {bad}"
            )
        warnings.warn(f"{source}: {bad}; another takes its place", UserNote, stacklevel=2)


def leave_out_encoded(data: dict[str, Any]) -> None:
    """For `--smoke`: leave out of a recipe the sources whose codes or features are of other parts than tiny ones."""
    for name, section in list(((data.get("data") or {}).get("sources") or {}).items()):
        with suppress(UserError):  # the run says it
            source = open_source(section["path"], SourceSection.model_validate(section).reading())
            if source.mark is not None or source.encoder is not None:
                leave_out(data, name)
                say(
                    f"data.sources.{name}: {len(source):,} items, encoded by other parts than tiny ones; not trained on"
                )


class Signed(Protocol):
    """Data that can say whether its files are what they were."""

    def signature(self) -> str:
        """A digest of the files' names, sizes and times."""
        ...


def data_state(source: Signed, items: int) -> str:
    """What a checkpoint keeps of a source; of very many files only their number."""
    return f"{items:,} items" + (f", files {source.signature()[:8]}" if items <= MAX_DIVIDED else "")


class RecordSamples:
    """Endless samples of one source, for `unimm.training.batches.mix`.

    Args:
        name: of the source in the recipe.
        source: its records.
        builder: makes samples of them.
        codes: stored codes; None where the source has its own, or nothing to draw.
        bad: where bad items are noted.
        seed: of the order and of all choices.
        dropout: share of text-to-image prompts that are dropped.
        indices: which records are read; None: all.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        builder: SampleBuilder,
        codes: StoredCodes | None,
        bad: BadItems,
        seed: int,
        dropout: float,
        indices: Sequence[int] | None = None,
    ) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # grain warns at import that there is no jax
        import grain

        self.name, self.source, self.builder, self.codes = name, source, builder, codes
        self.bad, self.dropout = bad, dropout
        self.seeds = (seed, zlib.crc32(name.encode()))
        self.indices = range(len(source)) if indices is None else indices
        order_seed = int(np.random.SeedSequence(self.seeds).generate_state(1)[0])
        self.order = grain.MapDataset.range(len(self.indices)).seed(order_seed).shuffle().repeat()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position: of the record that stands there, or of the next good one that is drawn.

        Raises:
            UserError: too many items are bad.
        """
        index = int(self.indices[self.order[int(position)]])
        rng = np.random.default_rng([*self.seeds, int(position)])
        for tried in range(RECORD_TRIES):
            choice, drop, other = int(rng.integers(2**31)), rng.random() < self.dropout, rng.random()
            try:
                return {**self.sample(index, choice, drop), "skipped": tried}
            except BadRecord as error:
                self.bad.add(self.name, error)
            index = int(self.indices[int(other * len(self.indices))])
        raise UserError(f"{self.source.location}: {RECORD_TRIES} items in a row cannot be used")

    def sample(self, index: int, request: int, drop_prompt: bool) -> Sample:
        """The sample of one record.

        Raises:
            BadRecord: it cannot be used.
        """
        record, stored = self.source[index], self.codes
        codes = None if stored is None else lambda: stored.get(index)
        return self.builder.build(record, self.source.location, codes, request, drop_prompt)


class Records:
    """All sources of a recipe, open, divided into training and validation, and with their image codes at hand.

    Args:
        recipe: whose; its folder keeps the codes and the list of bad items.
        sections: name -> source.
        limit: most bad items.
        processor: of the model.
        tokenizer: the model's image tokenizer; None where it does not draw.
        target_size: what images to draw are brought to; None where it does not draw.
        device: where codes are made.

    Raises:
        UserError: a source cannot be read, is empty or too small to hold items out, asks for what the model lacks, or
            its codes are of another tokenizer.
    """

    def __init__(
        self,
        recipe: BaseRecipe,
        sections: Mapping[str, SourceSection],
        limit: int,
        processor: UniMMProcessor,
        tokenizer: Any,
        target_size: TargetSize | None,
        device: torch.device,
    ) -> None:
        self.recipe, self.processor, self.tokenizer, self.target_size = (
            recipe,
            processor,
            tokenizer,
            target_size,
        )
        self.bad = BadItems(Path(recipe.output) / "bad-items.jsonl", limit, recipe.source)
        self.sections = dict(sections)
        self.sources: dict[str, Source] = {}
        self.codes: dict[str, StoredCodes | None] = {}
        self.trained: dict[str, Sequence[int]] = {}
        """Which records of each source are trained on."""
        self.held: dict[str, Sequence[int]] = {}
        """Which of each are held out; those of validation's own sources too, as `validation/NAME`."""
        for name in sections:
            self._open(name, f"data.sources.{name}")
            self._divide(name)
        for name, section in (recipe.validation.sources if recipe.validation else {}).items():
            self.sections[VALIDATION + name] = section
            self._open(VALIDATION + name, f"data.validation.sources.{name}")
            self.held[VALIDATION + name] = range(len(self.sources[VALIDATION + name]))
        self.states = {name: data_state(source, len(source)) for name, source in self.sources.items()}
        for name, source in self.sources.items():
            path = Path(recipe.output) / "codes" / f"{name}.safetensors"
            stored = target_size is not None and len(source) <= STORED * recipe.samples and draws(source)
            self.codes[name] = self._stored(name, path, device) if stored else None

    def _stored(self, name: str, path: Path, device: torch.device) -> StoredCodes:
        """The image codes of a source in a file, made first where they are not there."""
        assert self.target_size is not None
        source, reading = self.sources[name], self.sections[name].reading()
        return StoredCodes(path, source, reading, self.target_size, self.tokenizer, device)

    def _open(self, name: str, key: str) -> None:
        """Open a source, which the recipe has under a key."""
        section = self.sections[name]
        try:
            source = self.sources[name] = open_source(section.path, section.reading())
        except UserError as error:
            raise self.recipe.error(key, str(error)) from None
        if not len(source):
            raise self.recipe.error(key, f"{section.path}: has no records")
        check_source_images(self.recipe, key, source, self.processor)
        if self.target_size is None or source.mark is None:
            return
        if source.mark != fingerprint(self.tokenizer, self.target_size):
            message = "image codes of another image tokenizer, or of another size, than here; encode it anew"
            raise self.recipe.error(key, f"{section.path}: {message}")

    def _divide(self, name: str) -> None:
        """Decide which records of a source are trained on and which are held out."""
        source, validation = self.sources[name], self.recipe.validation
        self.trained[name], self.held[name] = range(len(source)), ()
        if validation is None or not validation.share:
            return
        if len(source) > MAX_DIVIDED:
            message = f"{name} has {len(source):,} items, too many to look at each; name sources instead"
            raise self.recipe.error("data.validation.share", message)
        try:
            trained, held = hold_out(source, validation.share)
        except UserError as error:
            raise self.recipe.error("data.validation.share", str(error)) from None
        self.trained[name], self.held[name] = trained.tolist(), held.tolist()

    def samples(self, seed: int, dropout: float, pack: Packing | None = None) -> dict[str, RecordSamples]:
        """Endless samples to train on of each source; what a row of `pack` has no room for is a bad item.

        See `RecordSamples` for the other arguments.
        """
        return {
            name: self._samples(name, indices, seed, dropout, pack) for name, indices in self.trained.items()
        }

    def makers(
        self, indices: Mapping[str, Sequence[int]], pack: Packing | None = None
    ) -> dict[str, RecordSamples]:
        """Of each source with records among `indices`, what makes samples of them."""
        return {name: self._samples(name, own, 0, 0.0, pack) for name, own in indices.items() if len(own)}

    def _samples(
        self, name: str, indices: Sequence[int], seed: int, dropout: float, pack: Packing | None
    ) -> RecordSamples:
        room = (pack.length, pack.images) if pack is not None else (None, None)
        builder = SampleBuilder(
            self.processor, self.target_size, self._encode, self.sections[name].requests, *room
        )
        return RecordSamples(
            name, self.sources[name], builder, self.codes[name], self.bad, seed, dropout, indices
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            device = next(self.tokenizer.parameters()).device
            codes: Tensor = self.tokenizer.encode(pixels[None].to(device))[0].cpu()
            return codes
