"""Run a batch job: items join the engine's running batch one by one, and each shard is written once it is whole."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from unimm.console import ProgressCallback
from unimm.data.sources import BadRecord
from unimm.errors import UserError
from unimm.images import as_size
from unimm.jobs.items import JobItem, JobItems, spoken
from unimm.jobs.output import ResultRow, write_job_shard
from unimm.jobs.recipe import AnyJob, DrawRecipe
from unimm.jobs.work import JobFolder
from unimm.loading import load, load_processor
from unimm.processing.processor import UniMMProcessor, grids_of
from unimm.sampling.arguments import grid_of
from unimm.sampling.drawing import drawing_requests
from unimm.sampling.requests import Request, TextRequest, Ticket, filters_of
from unimm.sampling.sampler import NoiseKey
from unimm.sampling.text import Answer

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

BAD_SHOWN = 1000  # bad items that the result lists; all are counted
Made = list[dict[str, Any]]
"""What was made of an item: for each result its words, or its codes row by row."""


def run_job(recipe: AnyJob, on_progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Run a job, or go on with it where it was stopped.

    Args:
        recipe: of the job.
        on_progress: called with items done and items in all.

    Returns:
        Counts of items, of results written and of bad items, which are listed; the number of files and their folder.

    Raises:
        UserError: the source or the model cannot be read, the model cannot do it, the folder holds something else,
            the disk is full, or no item can be used.
    """
    items = JobItems(recipe)
    _check_model(recipe, load_processor(recipe.model))
    folder = JobFolder(recipe, items)
    with folder.taken():
        todo = [shard for shard in range(folder.shards) if not folder.is_done(shard)]
        progress = _Progress(len(items), on_progress)
        progress.add(len(items) - sum(len(folder.range_of(shard)) for shard in todo))
        if todo and recipe.engine == "ray":
            cluster = importlib.import_module("unimm.jobs.cluster")  # whose workers run this module
            cluster.run_on_ray(recipe, folder, todo, progress.add)
        elif todo:
            ShardRunner(recipe, load_job_model(recipe), folder, progress.add).run(todo)
        folder.finish()
        return _summary(recipe, folder)


def load_job_model(recipe: AnyJob) -> UniMM:
    """Load the model of a job.

    Raises:
        UserError: see `unimm.load`.
    """
    um = load(recipe.model, device=recipe.device, dtype=recipe.dtype, quantize=recipe.quantize)
    um.batch_size = recipe.batch_size
    return um


def _check_model(recipe: AnyJob, processor: UniMMProcessor) -> None:
    """Refuse what the model cannot do at all, which is no fault of the items."""
    try:
        if recipe.task == "draw":
            processor.check_draws("task")
        elif recipe.task == "caption":
            processor.check_understands()
    except UserError as error:
        raise recipe.error("model", str(error)) from None


def _summary(recipe: AnyJob, folder: JobFolder) -> dict[str, Any]:
    shown = list(itertools.islice(folder.bad(), BAD_SHOWN))
    bad = sum(1 for _ in folder.bad())
    good = len(folder.items) - (bad - len(folder.items.source.broken))
    if not good:
        raise UserError(
            f"{folder.items.source.location}: none of its {len(folder.items)} items can be used; the first: "
            f"{BadRecord(**shown[0])}"
        )
    return {
        "task": recipe.task,
        "items": len(folder.items),
        "written": good * recipe.per_item,
        "bad": bad,
        "files": folder.shards,
        "folder": str(folder.path),
        "bad_items": shown,
    }


class _Progress:
    """Counts items that are done, of so many in all."""

    def __init__(self, total: int, report: ProgressCallback | None) -> None:
        self.done, self.total, self.report = 0, total, report

    def add(self, count: int) -> None:
        self.done += count
        if self.report is not None:
            self.report(self.done, self.total)


@dataclass
class _Shard:
    """A shard that is worked on."""

    number: int
    made: dict[int, Made]
    bad: dict[int, BadRecord] = field(default_factory=dict)
    left: int = 0


@dataclass
class _Open:
    """An item that the engine has."""

    shard: _Shard
    index: int
    item: JobItem
    tickets: list[Ticket]

    @property
    def done(self) -> bool:
        return all(ticket.done for ticket in self.tickets)


class ShardRunner:
    """Runs shards of a job through a model's engine, one after the other without a gap.

    Args:
        recipe: of the job.
        um: its model.
        folder: where it writes.
        on_done: called with a number of items that are done.

    Raises:
        UserError: an option makes no sense for this model.
    """

    def __init__(self, recipe: AnyJob, um: UniMM, folder: JobFolder, on_done: Callable[[int], None]) -> None:
        self.recipe, self.um, self.folder, self.on_done = recipe, um, folder, on_done
        self.items: JobItems = folder.items
        self._open: list[_Open] = []
        try:
            if isinstance(recipe, DrawRecipe):
                self.grid = grid_of(um.model, um.processor, as_size(recipe.options.size))
                self.drawn = um.model.config.sampling_config().updated(**recipe.options.sampling())
                filters_of(self.drawn)
            else:
                self.said = recipe.options.sampling()
        except UserError as error:
            raise recipe.error("options", str(error)) from None

    def run(self, shards: Sequence[int]) -> None:
        """Do what is left of shards, and write each.

        Raises:
            UserError: the disk is full.
        """
        engine, left = self.um.engine, self._left(shards)
        try:
            while True:
                while sum(len(one.tickets) for one in self._open) < self.recipe.batch_size:
                    following = next(left, None)
                    if following is None:
                        break
                    self._begin(*following)
                if not self._open:
                    return
                engine.step()
                self._collect()
        finally:
            for one in self._open:
                for ticket in one.tickets:
                    engine.cancel(ticket)
            if self._open:
                engine.step()
                self._open = []
            engine.release()

    def _left(self, shards: Sequence[int]) -> Iterator[tuple[_Shard, int]]:
        """Yield the items that are not done, shard by shard."""
        for number in shards:
            indices = self.folder.range_of(number)
            shard = _Shard(number, self.folder.read_work(number))
            todo = [index for index in indices if index not in shard.made]
            shard.left = len(todo)
            self.on_done(len(indices) - len(todo))
            if not todo:
                self._write(shard)
            for index in todo:
                yield shard, index

    def _begin(self, shard: _Shard, index: int) -> None:
        """Hand an item to the engine, or note why it cannot be used."""
        try:
            item = self.items[index]
        except BadRecord as error:
            self._end(shard, {}, {index: error})
            return
        tickets: list[Ticket] = []
        try:
            for request in self._requests(item, index):
                tickets.append(self.um.engine.submit(request))
        except UserError as error:
            for ticket in tickets:
                self.um.engine.cancel(ticket)
            self._end(shard, {}, {index: self._bad(item, error)})
            return
        self._open.append(_Open(shard, index, item, tickets))

    def _requests(self, item: JobItem, index: int) -> Iterator[Request]:
        """Yield what the engine is asked for.

        Raises:
            UserError: an image cannot be read, the model understands none, or the words are too long.
        """
        processor, shown = self.um.processor, [image.image() for image in item.images]
        keys = [NoiseKey(seed) for seed in self.seeds(index)]
        if isinstance(self.recipe, DrawRecipe):
            prompts, images = [item.words] * len(keys), [shown] * len(keys)
            yield from drawing_requests(processor, prompts, images, keys, self.drawn, self.grid)
            return
        seen = processor.look(shown)
        ids = processor.conversation.ask(item.messages, grids_of(seen))
        yield TextRequest(ids, seen, keys[0], sampling=self.said)

    def seeds(self, index: int) -> list[int]:
        """The seeds of an item's results."""
        first = self.recipe.seed + index * self.recipe.per_item
        return list(range(first, first + self.recipe.per_item))

    def _bad(self, item: JobItem, error: UserError) -> BadRecord:
        return BadRecord(item.key, self.items.source.location, str(error))

    def _collect(self) -> None:
        """Write down what is done."""
        done = [one for one in self._open if one.done]
        if not done:
            return
        self._open = [one for one in self._open if not one.done]
        shards = {one.shard.number: one.shard for one in done}
        for shard in shards.values():
            made: dict[int, Made] = {}
            bad: dict[int, BadRecord] = {}
            for one in done:
                if one.shard is not shard:
                    continue
                error = next((ticket.error for ticket in one.tickets if ticket.error is not None), None)
                if error is None:
                    made[one.index] = [_made(ticket) for ticket in one.tickets]
                elif isinstance(error, UserError):
                    bad[one.index] = self._bad(one.item, error)
                else:
                    raise error
            self._end(shard, made, bad)

    def _end(self, shard: _Shard, made: dict[int, Made], bad: dict[int, BadRecord]) -> None:
        """Note items that are done; the last ones end their shard."""
        if made:
            self.folder.add_work(shard.number, made)
        shard.made |= made
        shard.bad |= bad
        shard.left -= len(made) + len(bad)
        self.on_done(len(made) + len(bad))
        if not shard.left:
            self._write(shard)

    def _write(self, shard: _Shard) -> None:
        """Write a shard that is whole: its bad items first, since its file says that it is done."""
        self.folder.write_bad(f"{shard.number:06d}", [shard.bad[index] for index in sorted(shard.bad)])
        write_job_shard(self.recipe, self.folder.path, shard.number, self._rows(shard))
        self.folder.end_work(shard.number)

    def _rows(self, shard: _Shard) -> Iterator[ResultRow]:
        """Yield the results of a shard; items are read again for what stands beside them."""
        for index in sorted(shard.made):
            item, seeds = self.items[index], self.seeds(index)
            for place, (made, seed) in enumerate(zip(shard.made[index], seeds, strict=True)):
                number = index * self.recipe.per_item + place
                yield ResultRow(
                    number, self._columns(item, made, seed, place), item.images, self._drawing(made)
                )

    def _columns(self, item: JobItem, made: dict[str, Any], seed: int, place: int) -> dict[str, Any]:
        """The columns of a result."""
        if isinstance(self.recipe, DrawRecipe):
            key = item.key if self.recipe.per_item == 1 else f"{item.key}-{place}"
            return {"key": key, "prompt": item.words, "seed": seed}
        said = {"finish_reason": made["finish_reason"], "tokens": made["tokens"]}
        if self.recipe.task == "caption":
            return {"key": item.key, "text": made["text"], **said}
        before = item.messages[:-1]
        system = spoken(before[0]) if before and before[0].role == "system" else None
        turns = before[1:] if system is not None else before
        history = [[spoken(one) for one in turns[at : at + 2]] for at in range(0, len(turns), 2)]
        asked = {"system": system, "history": history or None, "question": item.words}
        return {"key": item.key, **asked, "answer": made["text"], **said}

    def _drawing(self, made: dict[str, Any]) -> Callable[[], Image.Image] | None:
        """What makes a drawing of its codes, each alone: so it does not depend on its company."""
        if "codes" not in made:
            return None
        codes = torch.tensor(made["codes"], device=self.um.device).view(1, *self.grid)
        return lambda: self.um.decode_codes(codes)[0]


def _made(ticket: Ticket) -> dict[str, Any]:
    """What a request made, as a line of work holds it."""
    if ticket.codes is not None:
        return {"codes": ticket.codes.flatten().tolist()}
    answer = Answer.of(ticket)
    return {"text": answer.text, "finish_reason": answer.finish_reason, "tokens": answer.tokens}


def job_folder(recipe: AnyJob, path: Path) -> JobFolder:
    """The folder of a job that another process holds.

    Args:
        recipe: of the job.
        path: the folder.
    """
    return JobFolder(recipe, JobItems(recipe), path)
