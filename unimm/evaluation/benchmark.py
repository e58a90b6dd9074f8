"""A benchmark: items, how to ask or draw them, how to score and sum up; from a protocol to a result file.

The steps are apart. Every item that is done is a line of a journal at once, so a run that was killed goes on where it
was; several processes share the items, and whoever finds all of them done writes the result.
"""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimm.errors import UserError, UserNote
from unimm.evaluation import environment
from unimm.evaluation.answering import answer_items
from unimm.evaluation.drawing import draw_items, find_drawings, write_drawings, write_prompts
from unimm.evaluation.items import DataFiles, EvalItem
from unimm.evaluation.journal import DoneItem, Journal
from unimm.evaluation.judging import check_judge, drawings_folder, judge_items
from unimm.evaluation.protocol import EvaluationProtocol
from unimm.evaluation.result import (
    RESULT_FILE,
    RESULT_FORMAT,
    ResultDocument,
    figures_of,
    first_line_has_format,
    write_result,
)
from unimm.evaluation.scorers import score_answer, scorer_of
from unimm.evaluation.scorers.captions import cider, ptb_tokens, word_tokens
from unimm.loading import load
from unimm.outputs import check_output

if TYPE_CHECKING:
    from unimm.pipeline import UniMM


@dataclass(frozen=True)
class RunOptions:
    """What a run is given besides its protocol.

    Attributes:
        model: a folder or hub id; None: the embedded model.
        data: files, folders or hub ids of the data set.
        images: folder of images that rows name.
        output: folder of the journal, the drawings and the result.
        batch_size: most that goes through the model at once; None: as the model has it.
        shard: which part of the items this process does, of how many.
        limit: only so many items, the first; a result of a part says so.
        device: as `unimm.load` takes it.
        dtype: as `unimm.load` takes it.
        judged: what an official script said of drawings.
        drawn: folder of drawings that were made elsewhere.
        command: the protocol's name or file, and the values that were set.
    """

    model: str | None = None
    data: list[str] = field(default_factory=list)
    images: Path | None = None
    output: Path = Path("runs/eval")
    batch_size: int | None = None
    shard: tuple[int, int] = (0, 1)
    limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    judged: Path | None = None
    drawn: Path | None = None
    command: tuple[str, ...] = ()


@dataclass
class Benchmark:
    """A protocol with its data.

    Raises:
        UserError: the data or the scorer is not the protocol's.
    """

    protocol: EvaluationProtocol
    options: RunOptions

    def __post_init__(self) -> None:
        self.scorer = scorer_of(self.protocol)
        check_judge(self.protocol)
        self.keys: list[str] = []  # of all items, once they have been gone through
        number, parts = self.options.shard
        if not 0 <= number < parts:
            raise UserError(f"--shard: {number}/{parts}; parts are counted from 0")
        self.data = DataFiles(self.protocol, self.options.data, self.options.images)
        if not self.data.verified:
            note = f"{self.protocol.name}: the protocol has no checksum of its data; the result holds that of yours"
            warnings.warn(note, UserNote, stacklevel=2)

    def items(self) -> Iterator[EvalItem]:
        """All items, in the order of the data."""
        return self.data.items(self.options.limit)

    def identity(self) -> dict[str, Any]:
        """What has to be equal for a run to be resumed: protocol, data, model, and how many items."""
        return {
            "protocol": self.protocol.fingerprint(),
            "data": self.data.hashes,
            "model": environment.model_hash(self.options.model) if self.options.drawn is None else "none",
            "dtype": self.options.dtype,
            "limit": self.options.limit,
        }

    def run(self) -> ResultDocument | None:
        """Do this process's part, and sum up if all parts are done then.

        Returns:
            The result, which is also in the output's `result.json`; None where other processes are not done.

        Raises:
            UserError: something is wrong with the data, the model, an image or the judge.
        """
        started, clock = time.time(), time.monotonic()
        path = self.options.output / RESULT_FILE
        check_output(path, "an earlier result", first_line_has_format)
        identity = self.identity()
        journal = Journal(self.options.output, identity, self.options.shard[0])
        um = self._work(journal)
        lines = self._all_lines(journal)
        if lines is None:
            return None
        if not self.judged:
            return self._drawn(lines)
        document = self._document(lines, identity, um)
        seconds = round(time.monotonic() - clock, 2)
        document["run"] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": seconds,
            "batch_size": um.batch_size if um is not None else None,
            "parts": self.options.shard[1],
        }
        write_result(path, document)
        return document

    def _left(self, done: Mapping[str, DoneItem]) -> Iterator[EvalItem]:
        """The items of this process that are not done."""
        number, parts = self.options.shard
        self.keys = []
        for item in self.items():
            self.keys.append(item.key)
            if item.index % parts == number and not self._is_done(done.get(item.key)):
                yield item

    def _is_done(self, line: DoneItem | None) -> bool:
        """Whether an item was answered, or drawn and its files are still there."""
        folder = drawings_folder(self.options)
        return line is not None and all((folder / one["file"]).is_file() for one in line.get("images", []))

    def _work(self, journal: Journal) -> UniMM | None:
        """Ask what is left; returns the model if it was loaded."""
        left = self._left(journal.done)
        first = next(left, None)
        if first is None:
            return None
        if self.options.drawn is not None:
            self._find(journal, _again(first, left))
            return None
        um = load_for(self.options)
        if self.protocol.drawing is not None:
            um.processor.check_draws(self.protocol.name)
            for batch in draw_items(um, _again(first, left), self.protocol.drawing):
                journal.add(self._drawn_line(item, images) for item, images in batch)
            return um
        if um.processor.views is None and first.images:
            raise UserError(f"{self.protocol.name}: this model understands no images")
        assert self.protocol.answer is not None
        for done in answer_items(um, _again(first, left), self.protocol.answer):
            journal.add(self._line(item, said) for item, said in done)
        return um

    def _find(self, journal: Journal, items: Iterator[EvalItem]) -> None:
        """Take drawings that were made elsewhere for what this process was to draw."""
        assert self.options.drawn is not None
        if self.protocol.drawing is None:
            raise UserError(f"{self.protocol.name}: --drawn: nothing is drawn by this protocol")
        for item in items:
            images = find_drawings(self.options.drawn, self.protocol.drawing, item)
            journal.add([self._plain_line(item, images)])

    def _drawn_line(self, item: EvalItem, images: Sequence[Any]) -> DoneItem:
        """Write an item's drawings; what the journal holds of them."""
        assert self.protocol.drawing is not None
        folder = drawings_folder(self.options)
        return self._plain_line(item, write_drawings(folder, self.protocol.drawing, item, images))

    @staticmethod
    def _plain_line(item: EvalItem, images: list[dict[str, Any]]) -> DoneItem:
        parts = {"key": item.key, "index": item.index, "prompt": item.prompt}
        return {**parts, "images": images, "fields": dict(item.fields)}

    @property
    def judged(self) -> bool:
        """Whether something says what drawings are worth, or answers need nobody who does."""
        asked = self.protocol.judge.kind not in ("none", "file")
        return self.protocol.drawing is None or asked or self.options.judged is not None

    def _drawn(self, lines: list[DoneItem]) -> ResultDocument:
        """What is known when all is drawn and nobody judges yet."""
        folder = drawings_folder(self.options)
        if self.protocol.drawing is not None and self.protocol.drawing.layout == "geneval2":
            write_prompts(folder, lines)
        return {"drawn": str(folder), "images": sum(len(line["images"]) for line in lines)}

    def _line(self, item: EvalItem, said: Mapping[str, Any]) -> DoneItem:
        """What the journal and the result hold of an item."""
        line: DoneItem = {"key": item.key, "index": item.index, "prompt": item.prompt, **said}
        if item.choices:
            line["choices"] = list(item.choices)
        line["fields"] = dict(item.fields)
        scored = score_answer(self.protocol, item.fields, item.choices, str(said["answer"]))
        return {**line, "scored": scored} if scored else line

    def _all_lines(self, journal: Journal) -> list[DoneItem] | None:
        """The lines of all items in their order; None if some are not done yet."""
        done = journal.read()
        if any(key not in done for key in self.keys):
            return None
        return [done[key] for key in self.keys]

    def _document(
        self, lines: list[DoneItem], identity: Mapping[str, Any], um: UniMM | None
    ) -> ResultDocument:
        judge: dict[str, Any] | None = None
        if self.protocol.drawing is not None or self.protocol.judge.kind != "none":
            lines, judge = judge_items(self.protocol, self.options, lines, identity)
        lines = self._together(lines)
        device = um.device if um is not None else load_device(self.options.device)
        unread = sum(
            isinstance(line["scored"], dict) and line["scored"].get("read", "") is None for line in lines
        )
        counts = {"items": len(lines), "cut": sum(bool(line.get("cut")) for line in lines), "unread": unread}
        figures = figures_of(self.protocol, lines)
        return {
            "format": RESULT_FORMAT,
            "protocol": self.protocol.model_dump(),
            "protocol_sha256": identity["protocol"],
            "model": {
                "source": environment.model_name(self.options.model),
                "sha256": identity["model"],
                "dtype": self.options.dtype,
            },
            "data": {
                "names": self.options.data,
                "images": None if self.options.images is None else str(self.options.images),
                "files": self.data.hashes,
                "verified": self.data.verified,
                "limit": self.options.limit,
            },
            "judge": judge,
            "command": self.command(),
            "versions": environment.versions(),
            "machine": environment.machine(device),
            "main": self.scorer.main,
            "counts": counts,
            "figures": figures,
            "items": lines,
        }

    def _together(self, lines: list[DoneItem]) -> list[DoneItem]:
        """Items with the scores that only all answers together give."""
        if self.protocol.scorer.name != "cider":
            return lines
        people = {line["key"]: [str(one) for one in line["fields"]["answers"]] for line in lines}
        said = {line["key"]: [str(line["answer"]).replace("\n", " ")] for line in lines}
        if self.protocol.scorer.rule == "ptb":
            people, said = ptb_tokens(people), ptb_tokens(said)
        else:
            people = {key: [word_tokens(text) for text in texts] for key, texts in people.items()}
            said = {key: [word_tokens(text) for text in texts] for key, texts in said.items()}
        scores = cider([said[line["key"]][0] for line in lines], [people[line["key"]] for line in lines])
        return [{**line, "scored": {"score": score}} for line, score in zip(lines, scores, strict=True)]

    def command(self) -> str:
        """The command that makes this result again; what changes no item is left out."""
        words = ["unimm", "eval", *(self.options.command or (self.protocol.name,))]
        if self.options.model is not None:
            words += ["--model", str(self.options.model)]
        for name in self.options.data:
            words += ["--data", name]
        for option, value in (
            ("--images", self.options.images), ("--limit", self.options.limit), ("--judged", self.options.judged),
            ("--drawn", self.options.drawn),
        ):  # fmt: skip
            words += [] if value is None else [option, str(value)]
        return shlex.join(words)


def load_for(options: RunOptions) -> UniMM:
    """The model of a run."""
    um = load(options.model, device=options.device, dtype=options.dtype)
    if options.batch_size is not None:
        um.batch_size = options.batch_size
    return um


def load_device(name: str) -> Any:
    """The device of a run that loads no model."""
    from unimm.devices import choose_device

    return choose_device(name)


def _again(first: EvalItem, rest: Iterator[EvalItem]) -> Iterator[EvalItem]:
    yield first
    yield from rest


def with_shard(options: RunOptions, number: int, parts: int) -> RunOptions:
    """The options of one process of several."""
    return replace(options, shard=(number, parts))
