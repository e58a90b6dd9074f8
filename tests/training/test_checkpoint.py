"""Checkpoints on disk: no half-written one counts, damage is named, lack of space spares the old ones."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from unimm.errors import UserError, UserNote
from unimm.training import checkpoint
from unimm.training.checkpoint import Snapshot, read_checkpoint, read_newest, write_checkpoint
from unimm.training.recipe import Checkpointing


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    python_rng, rng = checkpoint.random_states()
    tensors = {"w": torch.randn(64, 64), "i": torch.arange(step)}
    return Snapshot(0, step, step, {"a": [1]}, tensors, python_rng=python_rng, rng=rng)


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
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.shutil, "rmtree", ended)
        write_checkpoint(tmp_path, snapshot(3), Checkpointing(keep=2))
    assert [read_checkpoint(path).step for path in sorted(tmp_path.glob("step-*"))] == [2, 3]
    assert read_newest(tmp_path) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "none") is None
    (tmp_path / ".tmp-step-00000009").mkdir()
    assert read_newest(tmp_path) is None
    assert not list(tmp_path.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


DAMAGE = [
    ("model.safetensors", cut, "truncated"),
    ("model.safetensors", scribble, "damaged"),
    ("optimizer.safetensors", Path.unlink, "missing from the checkpoint"),
    ("state.json", cut, "damaged"),
    ("state.json", Path.unlink, "missing from the checkpoint"),
]


@pytest.mark.parametrize(("name", "harm", "word"), DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, harm: object, word: str
) -> None:
    assert callable(harm)
    write_checkpoint(tmp_path, snapshot(1), Checkpointing(keep=2))
    newest = write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=2))
    harm(newest / name)
    with pytest.warns(UserNote, match=f"{name}: {word}.*; going on from step-00000001"):
        found = read_newest(tmp_path)
    assert found is not None and found.step == 1
    (tmp_path / "step-00000001" / "rng.safetensors").unlink()
    with pytest.raises(UserError, match=f"{name}: {word}.*no earlier checkpoint is whole") as caught:
        read_newest(tmp_path)
    assert "\n" not in str(caught.value)
    write_checkpoint(tmp_path, snapshot(2), Checkpointing(keep=2))  # takes the damaged one's place
    assert read_checkpoint(newest).step == 2


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
    assert "step-00000002: cannot write the checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001").step == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
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
