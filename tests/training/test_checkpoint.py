"""Checkpoints on disk: no half-written one counts, damage is named, lack of space spares the old ones."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unimm.errors import UserError, UserNote
from unimm.files import NEIGHBOUR
from unimm.training import checkpoint
from unimm.training.checkpoint import Snapshot, read_checkpoint, read_newest, write_checkpoint
from unimm.training.recipe import Checkpointing


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    python_rng, rng = checkpoint.random_states()
    tensors = {"w": torch.randn(64, 64), "i": torch.tensor([step])}
    more = {"optimizer": {"m": torch.randn(9)}, "ema": {"w": torch.randn(9)}, "rng": rng}
    return Snapshot(0, step, step, {"a": [1]}, tensors, python_rng=python_rng, **more)


def test_round_trip_and_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, snapshot(step), Checkpointing(keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = read_newest(tmp_path)
    assert found is not None
    expected = snapshot(3)
    assert (found.step, found.recipe, found.python_rng) == (3, {"a": [1]}, expected.python_rng)
    assert torch.equal(found.model["w"], expected.model["w"])
    torch.manual_seed(99)
    checkpoint.set_random_states(found.python_rng, found.rng)
    again = torch.rand(3)
    torch.manual_seed(3)
    torch.randn(64, 64)
    checkpoint.set_random_states(expected.python_rng, expected.rng)
    assert torch.equal(torch.rand(3), again)


@pytest.mark.parametrize(
    ("mode", "kept"), [("min", [2, 3, 6, 8, 9]), ("max", [1, 3, 5, 7, 9])], ids=["least", "greatest"]
)
def test_the_best_of_each_stage_stay(tmp_path: Path, mode: str, kept: list[int]) -> None:
    """Scores of nine checkpoints; a score of another metric, and none at all, do not count."""
    settings = Checkpointing.model_validate({"keep": 1, "keep_best": 2, "metric": "code", "mode": mode})
    scores = {1: 5.0, 2: 1.0, 3: 1.0, 4: None, 5: 9.0, 6: 4.0, 7: 6.0, 8: 5.0, 9: 5.0}
    if mode == "max":
        scores[3] = 3.0
    for step, score in scores.items():
        made = snapshot(step)
        made.stage, made.score = int(step > 4), score
        made.recipe = {"checkpoint": {"metric": "code"}}
        write_checkpoint(tmp_path, made, settings)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == kept
    best = checkpoint.best_checkpoints(tmp_path, 1, settings)
    assert read_checkpoint(best[0]).score == (4.0 if mode == "min" else 9.0)
    other = settings.model_copy(update={"metric": "text"})
    assert checkpoint.best_checkpoints(tmp_path, 1, other) == []
    assert (newest := read_newest(tmp_path)) is not None and newest.step == 9


def test_one_that_is_being_removed_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends in the middle of removing an old checkpoint leaves none that does not read."""
    for step in (1, 2):
        write_checkpoint(tmp_path, snapshot(step), Checkpointing(keep=2))

    def ended(path: Path, **_: object) -> None:
        if (path / "removed").exists():
            (path / "removed" / "state.json").unlink()
            raise KeyboardInterrupt
        remove(path)

    remove = shutil.rmtree
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", ended)
        write_checkpoint(tmp_path, snapshot(3), Checkpointing(keep=2))
    assert [read_checkpoint(path).step for path in sorted(tmp_path.glob("step-*"))] == [2, 3]
    assert read_newest(tmp_path) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "none") is None
    (tmp_path / f".step-00000009.0{NEIGHBOUR}").mkdir()
    assert read_newest(tmp_path) is None
    assert not list(tmp_path.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("none"))


def fold(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap(path: Path) -> None:
    """Take the file of another step, which has as many bytes."""
    shutil.copyfile(path.parent.with_name("step-00000001") / path.name, path)


def reshape(path: Path) -> None:
    """Say another shape of as many values in the header."""
    path.write_bytes(path.read_bytes().replace(b"[64,64]", b"[8,512]"))


def rename(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"w"', b'"v"'))


def put(key: str, value: object, plain: bool = False) -> Callable[[Path], None]:
    """Give a key of `state.json` another value; `plain` writes it as earlier versions did, without checksums."""

    def change(path: Path) -> None:
        state = json.loads(path.read_text())
        if plain:
            del state["checksum"], state["sha256"]
        path.write_text(json.dumps({**state, key: value}))

    return change


def leave_out(key: str, plain: bool = False) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        state = json.loads(path.read_text())
        if plain:
            del state["checksum"], state["sha256"]
        del state[key]
        path.write_text(json.dumps(state))

    return change


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text.encode())


NUMBERS = [1] * 624
MISSING, DAMAGED = "missing from the checkpoint", "damaged"
OF_TENSORS: list[tuple[Callable[[Path], object], str]] = [
    (Path.unlink, MISSING),
    (dangle, MISSING),
    (fold, "is a folder"),
    (pipe, "is a pipe"),
    (empty, "truncated"),
    (cut, "truncated"),
    (append, "truncated"),
    (scribble, DAMAGED),
    (flip, DAMAGED),
    (partial(flip, place=0), DAMAGED),
    (partial(flip, place=30), DAMAGED),
]
OF_STATE: list[tuple[Callable[[Path], object], str]] = [
    (Path.unlink, MISSING),
    (dangle, MISSING),
    (fold, DAMAGED),
    (pipe, DAMAGED),
    (empty, DAMAGED),
    (cut, DAMAGED),
    (scribble, DAMAGED),
    (partial(flip, place=40), DAMAGED),
    (write("[]"), DAMAGED),
    (write("null"), DAMAGED),
    (write("{}"), DAMAGED),
    (write("[" * 100_000), DAMAGED),
    (put("step", 7), DAMAGED),
    (put("checksum", None), DAMAGED),
    (leave_out("step"), DAMAGED),
    *[
        (put(key, value, plain=True), rf"damaged: {key}")
        for key, value in [
            ("stage", "one"), ("stage", -1), ("step", 2.5), ("stage_step", None), ("recipe", []), ("files", [1]),
            ("files", {"model.safetensors": "x"}), ("ema_updates", True), ("format", "1"), ("format", None),
            ("python_rng", None), ("python_rng", [3, ["x"], None]), ("python_rng", [3, [1, 2], None]),
            ("python_rng", [3, [*NUMBERS, -1], None]), ("python_rng", [9, [*NUMBERS, 624], None]),
            ("python_rng", [3, [*NUMBERS, 2**40], None]), ("score", "good"),
        ]
    ],
    *[(leave_out(key, plain=True), rf"damaged: {key}") for key in ("files", "stage", "recipe", "python_rng")],
]  # fmt: skip
DAMAGE = [
    *[(f"{part}.safetensors", *how) for part in ("model", "optimizer", "ema", "rng") for how in OF_TENSORS],
    *[("model.safetensors", how, DAMAGED) for how in (swap, rename, reshape)],
    *[("state.json", *how) for how in OF_STATE],
]


@pytest.mark.parametrize(("name", "harm", "word"), DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, harm: Callable[[Path], object], word: str
) -> None:
    write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=2))
    newest = write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=2))
    harm(newest / name)
    with pytest.warns(UserNote, match=f"{name}: ({word}).*; resuming from step-00000001"):
        found = read_newest(tmp_path)
    assert found is not None and found.step == 1
    (tmp_path / "step-00000001" / "rng.safetensors").unlink()
    with pytest.raises(UserError, match=f"{name}: ({word}).*no earlier checkpoint is whole") as caught:
        read_newest(tmp_path)
    assert "\n" not in str(caught.value)
    write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=2))  # takes the damaged one's place
    assert read_checkpoint(newest).step == 2


def as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def as_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("none"))


def as_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize("harm", [as_file, as_link, as_empty])
def test_what_stands_in_the_place_of_a_checkpoint_is_named_and_replaced(
    harm: Callable[[Path], object], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=2))
    newest = write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=2))
    harm(newest)
    with pytest.warns(
        UserNote, match="step-00000002.*missing from the checkpoint; resuming from step-00000001"
    ):
        assert (found := read_newest(tmp_path)) is not None and found.step == 1
    write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=2))
    assert read_checkpoint(newest).step == 2 and not newest.is_symlink()
    assert not (tmp_path / "none").exists()
    harm(newest)  # once more, and it is the oldest by now
    write_checkpoint(tmp_path, snapshot(3), Checkpointing(keep=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    "states",
    [
        {},
        {"torch": torch.zeros(3)},
        {**snapshot(1).rng, "torch": torch.zeros(7, dtype=torch.uint8)},
        {**snapshot(1).rng, "numpy_keys": torch.zeros(5)},
        {**snapshot(1).rng, "numpy_rest": torch.zeros(2)},
    ],
    ids=["none", "torch alone", "short", "short keys", "short rest"],
)
def test_states_of_random_numbers_that_are_none_are_damage(states: dict[str, Tensor], tmp_path: Path) -> None:
    made = snapshot(1)
    made.rng = states
    path = write_checkpoint(tmp_path, made, Checkpointing(keep=1))
    with pytest.raises(UserError, match=r"rng\.safetensors: damaged \(no states"):
        read_checkpoint(path)


def test_the_state_of_another_step_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=2))
    swap(write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=2)) / "state.json")
    with pytest.warns(UserNote, match=r"model\.safetensors: damaged.*; resuming from step-00000001"):
        assert (found := read_newest(tmp_path)) is not None and found.step == 1


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=1))
    for name in ("model.safetensors", "state.json"):
        whole = (path / name).read_bytes()
        for place in range(0, len(whole), 1 + len(whole) // 100):
            flip(path / name, place)
            with pytest.raises(UserError, match=re.escape(name)):
                read_checkpoint(path)
            (path / name).write_bytes(whole)
    assert read_checkpoint(path).step == 1


def test_checkpoints_without_checksums_still_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(3), Checkpointing(keep=1))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(
        json.dumps({k: v for k, v in state.items() if k not in ("checksum", "sha256", "score")})
    )
    assert torch.equal(read_checkpoint(path).model["w"], snapshot(3).model["w"])


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=1))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=1))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99, this version reads 1"):
        read_checkpoint(path)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond `size`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_is_one_line_and_leaves_the_old_one_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=1))
    with files_of_at_most(4096), pytest.raises(UserError) as caught:
        write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=1))
    assert "step-00000002: cannot be written (File too large)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001").step == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoints.*: cannot be written \(Not a directory\)"):
        write_checkpoint(tmp_path / "file" / "checkpoints", snapshot(1), Checkpointing(keep=1))


def test_tied_weights_are_stored_once_and_come_back_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    one, two = Tied(), Tied()
    state = checkpoint.distinct_state(one)
    assert list(state) == ["embed.weight"]
    checkpoint.load_state(two, state, "here")
    assert torch.equal(two.head.weight, one.embed.weight)
    with pytest.raises(UserError, match=r"here: embed\.weight has the shape \[2, 3\], expected \[5, 3\]"):
        checkpoint.load_state(two, {"embed.weight": torch.zeros(2, 3)}, "here")
    with pytest.raises(UserError, match=r"here: other is only in the checkpoint"):
        checkpoint.load_state(two, {**state, "other": torch.zeros(1)}, "here")
