"""The folder of a job: what the job is, which shards are done, and what is done of those that are not.

A shard that is being worked on has a file in `.work`, a line for each item that is done, so that a job that was killed
goes on with the next item. Once all its items are done the shard is written and that file goes; with the last shard the
folder `.work` goes too, and nothing tells a job that was killed from one that was not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unimm.data.sources import BadRecord
from unimm.errors import UserError
from unimm.evaluation.environment import model_hash, model_name
from unimm.files import (
    append,
    atomic_write,
    make_folder,
    open_regular,
    read_json,
    remove_leftovers,
    write_json,
)
from unimm.jobs.items import JobItems
from unimm.jobs.output import DRAWN_IMAGES, shard_file
from unimm.jobs.recipe import AnyJob

JOB_FILE, WORK, BAD_FOLDER = "job.json", ".work", "bad"
SOURCE_BAD = "source"  # of the files of a source that cannot be read at all
MADE = "made"  # what a line of work holds of an item


class JobFolder:
    """The folder that a job writes into.

    Args:
        recipe: of the job.
        items: of its source.
        path: the folder, where it is another than the recipe says from here.
    """

    def __init__(self, recipe: AnyJob, items: JobItems, path: Path | None = None) -> None:
        self.recipe, self.items = recipe, items
        self.path = Path(recipe.output.folder) if path is None else path
        self.shards = -(-len(items) // recipe.output.shard)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the folder for this job; leftovers of one that was killed are removed.

        Raises:
            UserError: it holds something else, or another process works on it.
        """
        make_folder(self.path)
        with _locked(self.path):
            self._identify()
            for folder in (self.path, self.path / DRAWN_IMAGES, self.path / BAD_FOLDER, self.path / WORK):
                remove_leftovers(folder)
            self.write_bad(SOURCE_BAD, self.items.source.broken)
            yield

    def _identify(self) -> None:
        """See that the folder holds this job, or nothing."""
        path, identity = self.path / JOB_FILE, job_identity(self.recipe, self.items)
        if path.exists():
            earlier = read_json(path)
            for name, value in identity.items():
                if earlier.get(name) != value:
                    raise UserError(
                        f"{path}: is of a job with another {name} ({_short(earlier.get(name))}, now "
                        f"{_short(value)}); give another output.folder, or remove that folder"
                    )
        elif any(not name.startswith(".") for name in os.listdir(self.path)):
            raise UserError(f"{self.path}: holds something else than a job; give another output.folder")
        else:
            write_json(path, identity)

    def range_of(self, shard: int) -> range:
        """The indices of a shard's items."""
        size = self.recipe.output.shard
        return range(shard * size, min((shard + 1) * size, len(self.items)))

    def is_done(self, shard: int) -> bool:
        """Whether a shard is written."""
        return shard_file(self.recipe, self.path, shard).exists()

    # --- what is done of a shard ----------------------------------------------------------------------------

    def read_work(self, shard: int) -> dict[int, Any]:
        """Index -> what was made of each item of a shard that is done; a line that a kill cut is none."""
        path, known = self._work(shard), self.range_of(shard)
        found: dict[int, Any] = {}
        if not path.exists():
            return found
        with open_regular(path) as file:
            for raw in file:
                with contextlib.suppress(ValueError):
                    line = json.loads(raw)
                    if isinstance(line, dict) and raw.endswith(b"\n") and line.get("index") in known:
                        found[line["index"]] = line[MADE]
        return found

    def add_work(self, shard: int, made: Mapping[int, Any]) -> None:
        """Write down what was made of items.

        Raises:
            UserError: the disk is full.
        """
        make_folder(self.path, WORK)
        lines = (json.dumps({"index": index, MADE: value}) + "\n" for index, value in made.items())
        append(self._work(shard), "".join(lines))

    def end_work(self, shard: int) -> None:
        """Forget what was written down of a shard, which is written."""
        self._work(shard).unlink(missing_ok=True)

    def _work(self, shard: int) -> Path:
        return self.path / WORK / f"{shard:06d}.jsonl"

    # --- bad items ------------------------------------------------------------------------------------------

    def write_bad(self, name: str, bad: Iterable[BadRecord]) -> None:
        """Write down the bad items of a shard, or of the source as a whole; none where there are none."""
        lines = [json.dumps({"key": one.key, "file": one.file, "reason": one.reason}) + "\n" for one in bad]
        path = self.path / BAD_FOLDER / f"{name}.jsonl"
        if lines:
            make_folder(self.path, BAD_FOLDER)
            with atomic_write(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)

    def bad(self) -> Iterator[dict[str, str]]:
        """All bad items, shard by shard, those of the source first."""
        paths = sorted(
            (self.path / BAD_FOLDER).glob("*.jsonl"), key=lambda path: (path.stem != SOURCE_BAD, path.stem)
        )
        for path in paths:
            with open_regular(path) as file:
                yield from map(json.loads, file)

    def finish(self) -> None:
        """Leave nothing but what was to be written."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)


def job_identity(recipe: AnyJob, items: JobItems) -> dict[str, Any]:
    """What a job is: all that its files depend on, but for the machine.

    Raises:
        UserError: there is no such model.
    """
    said = recipe.model_dump(mode="json")
    names = [recipe.source.path] if isinstance(recipe.source.path, str) else recipe.source.path
    identity: dict[str, Any] = {
        "task": recipe.task,
        "source": [str(Path(name).resolve()) for name in names],
        "signature": items.source.signature(),
        "items": len(items),
        "model": model_name(recipe.model),
        "weights": model_hash(recipe.model),
        "dtype": recipe.dtype,
        "quantize": recipe.quantize,
        "seed": recipe.seed,
    }
    identity |= {f"source.{name}": value for name, value in said["source"].items() if name != "path"}
    identity |= {f"options.{name}": value for name, value in said["options"].items()}
    identity |= {f"output.{name}": value for name, value in said["output"].items() if name != "folder"}
    return identity


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that work on it; a process that is killed holds it no more."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # else a file system without locks
                raise UserError(f"{folder}: another process works on this job") from None
        yield
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
