"""Commands that are killed, or find the disk full, at any of their writes: one line, nothing half-written, and the same
command finishes the work.

UNIMM_EVERY_CALL=1 in the environment tries every write, else a few are tried.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.data import forms
from tests.system_calls import Outcome, contents, watched
from tests.training.test_trainer import ALL, recipe
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.files import append, sweep
from unimm.preferences.vote.votes import Votes
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

EVERY = bool(os.environ.get("UNIMM_EVERY_CALL"))
SEVERAL = 3  # writes of a command that are tried


def command(*arguments: object) -> None:
    """Run a command of the command line; what it says in failing is raised."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    if code:
        raise UserError(said.getvalue().removesuffix("\n"))


@pytest.fixture(scope="module")
def commands(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], object]]:
    """What is tried, each given a folder to write into."""
    torch.set_num_threads(1)  # other threads do not live on in a forked process
    data = tmp_path_factory.mktemp("data")
    forms.image_list(data / "list", 5)
    (data / "list" / "images" / "3.png").write_bytes(b"no image")
    forms.shards(data / "tars", 6)
    model = ("--model", tiny)
    drawing = ("preferences", "draw", "--scenes", 4, "-n", 2, "--seed", 1, *model)
    command(*drawing, "-o", data / "candidates.jsonl")

    def ranked(folder: Path) -> None:
        loose = ("--margin", 0, "--hard", "none")
        command(
            "preferences", "rank", data / "candidates.jsonl", "-o", folder / "pairs.jsonl", *loose, *model
        )

    def check_tars(folder: Path) -> None:
        sweep.cache_clear()  # as a process of its own
        command("data", "check", folder)

    def vote(folder: Path) -> None:
        with Votes(folder / "votes.jsonl", {"seed": 0}) as votes:
            for number in range(3):
                row = {"prompt": f"prompt {number}", "chosen": "a", "rejected": "b", "source": "ann"}
                try:
                    votes.add(f"p{number}", None if number == 1 else row, "ann")
                except OSError as error:  # which the voting page answers
                    raise UserError(f"{folder}: {error.strerror}") from None

    def toy(folder: Path) -> None:
        train(load_recipe(folder / "recipe.yaml"), quiet=True)

    return {
        "data encode": lambda folder: command(
            "data",
            "encode",
            data / "list",
            folder / "codes",
            "--shard",
            2,
            "--pairs",
            "text_to_image",
            *model,
        ),
        "data check": check_tars,
        "preferences draw": lambda folder: command(*drawing, "-o", folder / "candidates.jsonl"),
        "preferences rank": ranked,
        "vote": vote,
        "convert": lambda folder: command("convert", tiny, folder / "model", "--to", "unimm"),
        "recipes copy": lambda folder: command("recipes", "copy", "finetune-folder", folder / "mine.yaml"),
        "draw": lambda folder: command(
            "draw", "a red apple", "-n", 2, "--seed", 3, "-o", folder / "drawn", *model
        ),
        "train": toy,
        **jobs(data, tiny),
    }


def jobs(data: Path, tiny: Path) -> dict[str, Callable[[Path], object]]:
    """Batch jobs, with a bad item each."""
    prompts = ["a red apple", "", "a cat", "a dog", "an apple on blue"]
    (data / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))

    def sample(folder: Path, task: str, source: Path, *overrides: str) -> None:
        given = (f"source.path={source}", f"model={tiny}", f"output.folder={folder}/job", *overrides)
        command("sample", task, *given)

    return {
        "sample draw": lambda folder: sample(
            folder, "draw", data / "prompts.jsonl", "output.format=jsonl", "output.shard=2"
        ),
        "sample caption": lambda folder: sample(
            folder,
            "caption",
            data / "list",
            "output.format=webdataset",
            "output.shard=3",
            "options.max_new_tokens=4",
        ),
    }


NAMES = (
    "data encode", "data check", "preferences draw", "preferences rank", "vote", "convert", "recipes copy", "draw",
    "train", "sample draw", "sample caption",
)  # fmt: skip


def chosen(count: int) -> Sequence[int]:
    return range(0, count, 1 if EVERY else max(1, count // SEVERAL))


class Trial:
    """A command and the folder that it writes into, anew for each try."""

    def __init__(self, name: str, commands: dict[str, Callable[[Path], object]], folder: Path) -> None:
        self.name, self.folder = name, folder
        self.work = lambda: commands[name](folder)
        self.calls = self.fresh().watch().calls
        self.wanted = self.written()

    def fresh(self) -> Trial:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if self.name == "data check":
            forms.shards(self.folder, 6)
            for path in self.folder.glob("*.index"):
                path.unlink()
        if self.name == "train":
            recipe(self.folder, {"steps": 4, "lr": ALL}, checkpoint={"every": 2, "keep": 1})
        return self

    def watch(self, **how: int) -> Outcome:
        outcome = watched(self.work, self.folder, **how)
        assert outcome.failure is None, outcome.failure
        return outcome

    def written(self) -> dict[str, bytes]:
        """What the command made, but for what depends on the time, and checkpoints that are to go with the next one."""
        passing = (".index", "metrics.jsonl")
        found = contents(self.folder)
        return {
            name: data
            for name, data in found.items()
            if not name.endswith(passing) and "step-00000002" not in name
        }

    def again(self) -> None:
        """The same command finishes the work, whatever was interrupted, and nothing is left of that."""
        outcome = self.watch()
        done = outcome.refusal is not None and "is there already" in outcome.refusal
        assert outcome.refusal is None or done, outcome.refusal
        assert self.written() == self.wanted
        if not done:
            assert not list(self.folder.rglob("*.unimm-writing"))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line(
    name: str, commands: dict[str, Callable[[Path], object]], tmp_path: Path
) -> None:
    trial = Trial(name, commands, tmp_path / "work")
    numbers = chosen(len(trial.calls))
    for number in numbers:
        outcome = trial.fresh().watch(full_from=number)
        where = f"{number}: {trial.calls[number]}"
        if outcome.refusal is not None:
            assert "No space left on device" in outcome.refusal and "\n" not in outcome.refusal, where
            assert str(trial.folder) in outcome.refusal, where
        assert not list(trial.folder.rglob("*.unimm-writing")), where
        if EVERY or number == numbers[len(numbers) // 2]:
            trial.again()


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_is_finished_by_the_next(
    name: str, commands: dict[str, Callable[[Path], object]], tmp_path: Path
) -> None:
    trial = Trial(name, commands, tmp_path / "work")
    for number in chosen(len(trial.calls)):
        assert trial.fresh().watch(kill_at=number).killed
        trial.again()


def append_two(path: Path) -> None:
    append(path, "1\n")
    append(path, "22\n")


@pytest.mark.parametrize("before", ["", "0\n"])
def test_lines_that_are_added_are_whole(before: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for number in range(8):
        path.write_text(before)
        outcome = watched(lambda: append_two(path), tmp_path, full_from=number)
        assert outcome.failure is None
        assert path.read_text() in (before, f"{before}1\n", f"{before}1\n22\n")
        path.write_text(before)
        if watched(lambda: append_two(path), tmp_path, kill_at=number).killed:
            append(path, "333\n")
            assert path.read_text().endswith("\n333\n") or path.read_text() == "333\n"
            assert path.read_text().startswith(before)
