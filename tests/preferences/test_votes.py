"""Votes on disk: kept at once, taken back, once for each pair, whatever was cut off and whoever else writes."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from unimm.errors import UserError
from unimm.preferences.data import read_preferences
from unimm.preferences.vote.votes import Votes

SETTINGS = {"seed": 0, "pairs": None}


def row(number: int) -> dict[str, str]:
    return {"prompt": f"prompt {number} é", "chosen": "a", "rejected": "b", "source": "ann"}


def prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "votes.jsonl"


def fill(path: Path) -> None:
    """Three votes, of which the second is a tie."""
    with Votes(path, SETTINGS) as votes:
        assert (
            votes.add("p0", row(0), "ann") and votes.add("p1", None, "ann") and votes.add("p2", row(2), "ann")
        )


def test_each_vote_is_on_disk_at_once_and_ties_do_not_disturb_training(path: Path) -> None:
    with Votes(path, SETTINGS) as votes:
        for number in range(3):
            votes.add(f"p{number}", None if number == 1 else row(number), "ann")
            assert len(prompts(path)) == (1, 1, 2)[number]
        assert (votes.ties, votes.last) == (1, "p2")
    assert [one.words for one in read_preferences(path)] == ["prompt 0 é", "prompt 2 é"]


def test_a_pair_counts_once(path: Path) -> None:
    fill(path)
    before = path.read_bytes()
    with Votes(path, SETTINGS) as votes:
        for pair in ("p0", "p1", "p2"):
            assert not votes.add(pair, row(9), "bob")
    assert path.read_bytes() == before


def test_undoing_goes_on_across_restarts(path: Path) -> None:
    fill(path)
    for pair, left in [("p2", 1), ("p1", 1), ("p0", 0)]:
        with Votes(path, SETTINGS) as votes:
            assert not votes.undo("other")
            assert votes.undo(pair) and not votes.undo(pair)
        assert len(prompts(path)) == left
    with Votes(path, SETTINGS) as votes:
        assert votes.last is None and votes.kept == {}
        assert votes.add("p2", row(7), "ann")  # may be voted on again
    assert prompts(path) == ["prompt 7 é"]


def restored(path: Path) -> list[str | None]:
    with Votes(path, SETTINGS) as votes:
        return [None if kept is None else kept["prompt"] for kept in votes.kept.values()]


def test_stopped_anywhere_in_a_vote(path: Path) -> None:
    """Every state of both files that a stop in the third vote can leave."""
    fill(path)
    state = path.with_name("votes.jsonl.state")
    journal, lines = state.read_bytes(), path.read_bytes()
    early, begun = lines[: lines.index(b"\n") + 1], journal[: journal.rindex(b"\n", 0, -1) + 1]
    for length in range(len(begun), len(journal)):  # cut off in the journal: nobody was told of the vote
        state.write_bytes(journal[:length])
        path.write_bytes(early)
        assert restored(path) == ["prompt 0 é", None]
        assert (state.read_bytes(), path.read_bytes()) == (begun, early)
    for length in range(len(early), len(lines)):  # cut off in the preferences
        state.write_bytes(journal)
        path.write_bytes(lines[:length])
        assert restored(path) == ["prompt 0 é", None, "prompt 2 é"]
        assert path.read_bytes() == lines


def test_stopped_in_undoing(path: Path) -> None:
    fill(path)
    lines = path.read_bytes()
    with Votes(path, SETTINGS) as votes:
        votes.undo("p2")
    undone = path.read_bytes()
    path.write_bytes(lines)  # the journal says so, the preferences not yet
    assert restored(path) == ["prompt 0 é", None]
    assert path.read_bytes() == undone


def test_removed_preferences_are_made_again_and_said(path: Path) -> None:
    fill(path)
    lines = path.read_bytes()
    path.unlink()
    with Votes(path, SETTINGS) as votes:
        assert votes.note is not None and "made again from votes.jsonl.state, 2 preferences" in votes.note
    assert path.read_bytes() == lines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda path, state: path.write_text("{}\n" + path.read_text()),
            r"votes.jsonl:1: not what was voted",
        ),
        (
            lambda path, state: path.write_text(path.read_text() + "{}\n"),
            r"votes.jsonl:3: not what was voted",
        ),
        (lambda path, state: state.unlink(), r"holds something, and no votes.jsonl.state beside it"),
        (lambda path, state: state.write_text("{}\n"), r"state:1: not what `unimm preferences vote` keeps"),
        (lambda path, state: state.write_text(state.read_text() + "x\n"), r"state:5: not JSON"),
        (
            lambda path, state: state.write_text(state.read_text() + '{"undone": "p0"}\n'),
            r"state:5: takes back p0",
        ),
        (lambda path, state: state.write_text(state.read_text() + '{"vote": 1}\n'), r"state:5: "),
        (lambda path, state: state.write_text(state.read_text() * 2), r"state:5: "),
    ],
)
def test_what_was_not_voted_is_refused_and_left_alone(path: Path, change, line: str) -> None:
    fill(path)
    state = path.with_name("votes.jsonl.state")
    change(path, state)
    before = [file.read_bytes() for file in (path, state) if file.exists()]
    with pytest.raises(UserError, match=line) as error:
        Votes(path, SETTINGS)
    assert "\n" not in str(error.value)
    assert [file.read_bytes() for file in (path, state) if file.exists()] == before


def test_other_settings_are_refused(path: Path) -> None:
    fill(path)
    with pytest.raises(UserError, match=r"votes.jsonl: begun with seed 0, now 1; give the same"):
        Votes(path, {"seed": 1, "pairs": None})
    with pytest.raises(UserError, match=r"begun with pairs None, now 3|begun with pairs null, now 3"):
        Votes(path, {"seed": 0, "pairs": 3})


def test_one_program_at_a_time(path: Path) -> None:
    with Votes(path, SETTINGS) as votes:
        with pytest.raises(UserError, match="another `unimm preferences vote` writes into it"):
            Votes(path, SETTINGS)
        votes.add("p0", row(0), "ann")
        path.write_text("{}\n" + path.read_text())
        with pytest.raises(UserError, match="changed by another program"):
            votes.add("p1", row(1), "ann")
        assert "p1" not in votes.kept
        path.write_text(path.read_text()[3:])
        assert votes.add("p1", row(1), "ann")
    with pytest.raises(UserError, match="voting has ended"):
        votes.add("p2", row(2), "ann")
    assert restored(path) == ["prompt 0 é", "prompt 1 é"]


def test_who_never_voted_leaves_nothing(path: Path) -> None:
    Votes(path, SETTINGS).close()
    assert list(path.parent.iterdir()) == []
    path.touch()
    Votes(path, SETTINGS).close()
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_loses_that_vote_alone(path: Path) -> None:
    """Files may grow no further than the journal's next line, or than the preferences'."""
    fill(path)
    state = path.with_name("votes.jsonl.state")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead of ending the program
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Votes(path, SETTINGS) as votes:
            before = state.read_bytes(), path.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (state.stat().st_size + 10, limits[1]))
            with pytest.raises(OSError, match="too large"):
                votes.add("p3", row(3), "ann")
            assert (state.read_bytes(), path.read_bytes()) == before
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert votes.add("p3", row(3), "ann")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert restored(path) == ["prompt 0 é", None, "prompt 2 é", "prompt 3 é"]


def test_preferences_that_cannot_be_written_take_the_vote_back_from_the_journal(path: Path) -> None:
    fill(path)
    state = path.with_name("votes.jsonl.state")
    with Votes(path, SETTINGS) as votes:
        before = state.read_bytes()
        os.rename(path, path.with_name("moved"))
        with pytest.raises(FileNotFoundError):
            votes.add("p3", row(3), "ann")
        with pytest.raises(FileNotFoundError):
            votes.undo("p2")
        assert state.read_bytes() == before
        os.rename(path.with_name("moved"), path)
        assert votes.add("p3", row(3), "ann")
    assert restored(path) == ["prompt 0 é", None, "prompt 2 é", "prompt 3 é"]
