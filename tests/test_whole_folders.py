"""Folders are the old one or the new one, whole, wherever the process is killed and wherever the disk fills up.

By default a few of the places are tried, every swap among them; UNIMM_EVERY_CALL=1 in the environment tries all.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.families.janus_checkpoints import janus
from tests.system_calls import Outcome, contents, watched
from tests.training.toy import ToyModel, ToyTask
from unimm.cli.main import main
from unimm.console import no_progress
from unimm.families.convert import convert
from unimm.families.image_tokenizers import is_image_tokenizer, load_image_tokenizer
from unimm.families.source import Checkpoint
from unimm.files import recover
from unimm.folders import write_folder
from unimm.loading import describe, load, load_processor
from unimm.models.lora import LoraSection, add_adapters, save_model
from unimm.pipeline import UniMM
from unimm.training.checkpoint import Snapshot, random_states, write_checkpoint
from unimm.training.model_builder import read_vision
from unimm.training.recipe import Checkpointing
from unimm.training.tokenizer.evaluate import load_trained_tokenizer

EVERY = bool(os.environ.get("UNIMM_EVERY_CALL"))
OTHERS = 3  # places that are no swap


@dataclass
class Case:
    """Two writers of one folder: `old` was there before."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]


def changed(um: UniMM) -> UniMM:
    """A model of other weights and another configuration."""
    other = copy.deepcopy(um)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    other.model.config.decoder["max_position_embeddings"] = 256
    return other


def adapted(um: UniMM, rank: int) -> UniMM:
    other = copy.deepcopy(um)
    torch.manual_seed(rank)
    add_adapters(other.model, LoraSection(r=rank, modules=["q_proj"]))
    return other


def snapshot(value: float) -> Snapshot:
    torch.manual_seed(0)
    python_rng, rng = random_states()
    weights = {"w": torch.full((64, 64), value)}
    return Snapshot(0, 5, 5, {"a": [1]}, weights, python_rng=python_rng, rng=rng)


def export(width: int, folder: Path) -> None:
    task = ToyTask(ToyModel(width=width))
    torch.manual_seed(width)
    write_folder(folder, partial(task.export, task.build()))


@pytest.fixture(scope="module")
def cases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    torch.set_num_threads(1)  # other threads do not live on in a forked process
    one, place = load(tiny, "cpu"), tmp_path_factory.mktemp("sources")
    two = changed(one)
    two.save(place / "unimm")
    janus(place / "janus")
    one.model.image_tokenizer.save_pretrained(place / "tokenizer")
    low, high = adapted(one, 2), adapted(one, 3)

    def save_adapted(um: UniMM, folder: Path) -> None:
        write_folder(folder, lambda new: save_model(um.model, new, torch.float32, str(tiny)))

    def check(made: Snapshot, folder: Path) -> None:
        write_checkpoint(folder.parent, made, Checkpointing(keep=1))

    def converted(source: str, to: str, folder: Path) -> None:
        convert(place / source, folder, to)

    return {
        "save": Case(one.save, two.save),
        "convert to unimm": Case(partial(converted, "janus", "unimm"), partial(converted, "unimm", "unimm")),
        "convert to original": Case(one.save, partial(converted, "janus", "original")),
        "image tokenizer": Case(one.save, partial(converted, "tokenizer", "original")),
        "export": Case(partial(export, 8), partial(export, 12)),
        "export with adapters": Case(partial(save_adapted, low), partial(save_adapted, high)),
        "checkpoint": Case(partial(check, snapshot(1.0)), partial(check, snapshot(2.0))),
    }


NAMES = (
    "save", "convert to unimm", "convert to original", "image tokenizer", "export", "export with adapters",
    "checkpoint",
)  # fmt: skip


class Stage:
    """A folder with the old content, before each try."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case, self.root, self.spare = case, root / "work", root / "spare"
        self.target = self.root / "step-00000005"  # a checkpoint's name
        self.root.mkdir()
        case.old(self.target)
        if not list(self.target.glob("state.json")):
            (self.target / "notes.txt").write_text("mine")  # no file of a model
        self.old = contents(self.target)
        shutil.copytree(self.root, self.spare)
        self.run()
        self.new = contents(self.target)
        assert self.new != self.old

    def reset(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.spare, self.root)

    def run(self) -> None:
        with no_progress():
            self.case.new(self.target)

    def calls(self, unknown: Sequence[str] = ()) -> list[tuple[str, str]]:
        """What writing calls, once."""
        self.reset()
        return self.watch(unknown=unknown).calls

    def watch(
        self, kill_at: int | None = None, full_from: int | None = None, unknown: Sequence[str] = ()
    ) -> Outcome:
        outcome = watched(self.run, self.root, kill_at=kill_at, full_from=full_from, unknown=unknown)
        assert outcome.failure is None, outcome.failure
        return outcome


def swaps_of(calls: Sequence[tuple[str, str]]) -> list[int]:
    """Numbers of the calls that move the whole new folder, or the old one."""
    moved = ("new", "step-00000005")
    return [n for n, (name, path) in enumerate(calls) if "rename" in name and Path(path).name in moved]


def chosen(calls: Sequence[tuple[str, str]]) -> list[int]:
    """Numbers of calls to try: every swap and what follows it, and of the others some."""
    swaps = {*swaps_of(calls)}
    after = {number + 1 for number in swaps} & {*range(len(calls))}
    return sorted({*swaps, *after, *range(0, len(calls), 1 if EVERY else len(calls) // OTHERS)})


WAYS = [(name, ()) for name in NAMES]
WAYS += [
    (name, ("renameat2",)) for name in (NAMES if EVERY else ("save", "checkpoint"))
]  # without an exchange
each_way = pytest.mark.parametrize(
    ("name", "unknown"), WAYS, ids=[f"{name}{', two renames' if unknown else ''}" for name, unknown in WAYS]
)


@each_way
def test_a_kill_leaves_the_old_or_the_new(
    cases: dict[str, Case], name: str, unknown: Sequence[str], tmp_path: Path
) -> None:
    stage = Stage(cases[name], tmp_path)
    seen: list[bool] = []
    for number in chosen(calls := stage.calls(unknown)):
        stage.reset()
        assert stage.watch(kill_at=number, unknown=unknown).killed
        recover(stage.target)  # as who loads it does
        found, where = contents(stage.target), f"{number}: {calls[number]}"
        assert found in (stage.old, stage.new), where
        assert [path.name for path in stage.root.iterdir()] == [stage.target.name], where
        seen.append(found == stage.new)
    assert seen == sorted(seen) and not seen[0] and seen[-1]


@pytest.mark.parametrize(("name", "unknown"), [way for way in WAYS if EVERY or "convert" not in way[0]])
def test_the_next_write_leaves_nothing_of_a_killed_one(
    cases: dict[str, Case], name: str, unknown: Sequence[str], tmp_path: Path
) -> None:
    stage = Stage(cases[name], tmp_path)
    calls = stage.calls(unknown)
    swaps = swaps_of(calls)
    for number in range(len(calls)) if EVERY else {swaps[0], swaps[-1] + 1}:
        stage.reset()
        assert stage.watch(kill_at=number, unknown=unknown).killed
        stage.run()
        assert contents(stage.target) == stage.new, f"{number}: {calls[number]}"
        assert [path.name for path in stage.root.iterdir()] == [stage.target.name], (
            f"{number}: {calls[number]}"
        )


@each_way
def test_a_full_disk_is_one_line_and_leaves_the_old(
    cases: dict[str, Case], name: str, unknown: Sequence[str], tmp_path: Path
) -> None:
    stage = Stage(cases[name], tmp_path)
    for number in chosen(calls := stage.calls(unknown)):
        stage.reset()
        outcome, where = stage.watch(full_from=number, unknown=unknown), f"{number}: {calls[number]}"
        recover(stage.target)  # nothing is left to do, but that here not even an old name could be given back
        if outcome.refusal is None:  # all that was left to do takes no room
            assert contents(stage.target) == stage.new, where
        else:
            assert "No space left on device" in outcome.refusal and "\n" not in outcome.refusal, where
            assert stage.target.name in outcome.refusal, where
            assert contents(stage.target) == stage.old, where
        assert [path.name for path in stage.root.iterdir()] == [stage.target.name], where


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("name", NAMES)
def test_modes_follow_the_umask(cases: dict[str, Case], name: str, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        target = tmp_path / "runs" / "step-00000005"
        with no_progress():
            cases[name].new(target)
    finally:
        os.umask(before)
    for path in (target, *target.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("number", [3, 20, -2])
def test_a_first_write_that_is_killed_leaves_nothing_or_all(
    cases: dict[str, Case], number: int, tmp_path: Path
) -> None:
    work, target = partial(cases["save"].new, tmp_path / "work" / "model"), tmp_path / "work" / "model"
    calls = watched(work, tmp_path).calls
    whole = contents(target)
    shutil.rmtree(target)
    assert watched(work, tmp_path, kill_at=number % len(calls)).killed
    recover(target)
    assert contents(target) == (whole if number < 0 else {})
    assert target.exists() == (number < 0) and not list(target.parent.glob(".*"))


READERS: dict[str, Callable[[Path], object]] = {
    "load": lambda folder: load(folder, "cpu"),
    "load_processor": load_processor,
    "describe": describe,
    "info": lambda folder: main(["info", str(folder)]) or True,
    "family": lambda folder: Checkpoint(folder).family,
    "convert": lambda folder: convert(folder, folder.with_name("converted"), "unimm") or True,
    "image tokenizer": lambda folder: is_image_tokenizer(folder) is False,
}


def set_aside(folder: Path) -> None:
    """As a kill between two renames leaves it."""
    old = folder.with_name(f".{folder.name}.0.unimm-writing") / "old"
    old.mkdir(parents=True)
    folder.rename(old / folder.name)


@pytest.mark.parametrize("read", READERS)
def test_a_model_that_was_set_aside_is_read(read: str, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    set_aside(folder)
    assert READERS[read](folder)
    assert contents(folder) == contents(tiny)
    assert not list(tmp_path.glob(".*"))


def test_other_parts_that_were_set_aside_are_read(tiny: Path, tiny_model: UniMM, tmp_path: Path) -> None:
    tiny_model.image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    adapter = adapted(tiny_model, 2)
    save_model(adapter.model, tmp_path / "both", torch.float32, None)
    for read in (load_image_tokenizer, load_trained_tokenizer):
        set_aside(tmp_path / "tokenizer")
        assert read(tmp_path / "tokenizer").config.codebook_size == 32
    set_aside(tmp_path / "both" / "adapter")
    assert load(tiny, "cpu", adapter=tmp_path / "both" / "adapter").model.config
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "vision.json").write_text('{"width": 16}')
    save_file({"a": torch.zeros(1)}, tmp_path / "vision" / "vision.safetensors")
    set_aside(tmp_path / "vision")
    assert read_vision(tmp_path / "vision", 2)[0] == {"width": 16, "merge": 2}


@pytest.mark.parametrize("kind", ["link", "other name", "file"])
def test_nothing_else_comes_out_of_a_hidden_neighbour(kind: str, tmp_path: Path) -> None:
    """A data folder may bring one, made to move files of others or to slip a file in."""
    data, outside = tmp_path / "data", tmp_path / "outside"
    place = data / ".model.0.unimm-writing"
    for folder in (data, outside, place):
        folder.mkdir()
    (outside / "model").write_text("theirs")
    if kind == "link":
        (place / "old").symlink_to(outside)
    elif kind == "file":
        (place / "old").write_text("x")
    else:
        (place / "old").mkdir()
        (place / "old" / "config.json").write_text("{}")
    recover(data / "model")
    assert list(data.iterdir()) == []
    assert contents(outside) == {"model": b"theirs"}
