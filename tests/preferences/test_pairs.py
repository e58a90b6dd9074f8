"""Which pairs are voted on, how a vote becomes a preference, and the line that each mistake gets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.preferences.ballots import captions, drawings, write
from unimm.errors import UserError
from unimm.preferences.data import read_preferences
from unimm.preferences.vote.pairs import read_ballot


def texts(pairs) -> list[tuple[str | None, str | None]]:
    return [(pair.left.text, pair.right.text) for pair in pairs]


@pytest.mark.parametrize("each", [2, 4, 5, 7])
def test_every_candidate_is_shown_before_one_is_shown_again(tmp_path: Path, each: int) -> None:
    path = captions(tmp_path, prompts=1, each=each)
    half, all_pairs = each // 2, each * (each - 1) // 2
    shown = [text for pair in texts(read_ballot(path).pairs) for text in pair]
    assert len(shown) == 2 * half and len(set(shown)) == 2 * half
    whole = texts(read_ballot(path, each=100).pairs)
    assert len({frozenset(pair) for pair in whole}) == len(whole) == all_pairs
    for start in range(0, all_pairs, half):
        met = [text for pair in whole[start : start + half] for text in pair]
        assert len(set(met)) == len(met)


def test_the_file_and_the_seed_say_which_pairs(tmp_path: Path) -> None:
    path = captions(tmp_path, prompts=8)
    once = texts(read_ballot(path, 1).pairs)
    assert texts(read_ballot(path, 1).pairs) == once
    assert texts(read_ballot(path, 2).pairs) != once
    prompts = [pair.prompt.content[1].text for pair in read_ballot(path, 1).pairs]
    assert prompts == [f"describe picture {number}" for number in (*range(8), *range(8))]
    kept = {pair.key for pair in read_ballot(path, 1).pairs}
    captions(tmp_path, prompts=10)  # the file grows
    assert kept < {pair.key for pair in read_ballot(path, 1).pairs}


def test_the_place_of_a_candidate_in_the_file_does_not_say_its_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {number}", "candidates": ["a", "b"]} for number in range(400)]
    pairs = read_ballot(write(tmp_path / "c.jsonl", *rows)).pairs
    assert 160 < Counter(pair.left.text for pair in pairs)["a"] < 240  # 4 standard deviations


def test_equal_candidates_never_meet(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "candidates": ["a", "a", "a"]},
        {"prompt": "two", "candidates": ["a", "b", "a", "b"]},
        {"prompt": "two", "candidates": ["b", "a"]},  # the same pair again
    ]
    ballot = read_ballot(write(tmp_path / "c.jsonl", *rows))
    assert (len(ballot.pairs), ballot.alike) == (1, 1)


def test_votes_are_preferences_wherever_they_are_written(tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "elsewhere" / "deep"
    folder.mkdir()
    other.mkdir(parents=True)
    ballots = [read_ballot(captions(folder)), read_ballot(drawings(folder / "d.jsonl"))]
    pairs = [pair for ballot in ballots for pair in ballot.pairs]
    rows = [pair.preference("left", folder, other, "ann") for pair in pairs]
    for pair, row in zip(pairs, read_preferences(write(other / "votes.jsonl", *rows)), strict=True):
        assert (row.chosen, row.rejected, row.source) == (pair.left, pair.right, "ann")
        found = [Path(str(blob.path)).resolve() for blob in row.files()]
        assert found == [folder / image for image in pair.images()]
    swapped = pairs[0].preference("right", folder, other, "ann")
    assert (swapped["chosen"], swapped["rejected"]) == (rows[0]["rejected"], rows[0]["chosen"])
    assert rows[-1]["prompt"] == "prompt 1"  # words stay words


CODES = {"seed": 0, "codes": [[1, 2], [3, 4]]}
MISTAKES: list[tuple[Any, str]] = [
    ("{", "c.jsonl:1: not JSON"),
    ({"prompt": "a", "candidates": []}, "c.jsonl:1: candidates: expected at least 1"),
    ({"prompt": "a", "candidates": ["b"]}, "c.jsonl:1: candidates: a single one; a choice takes two"),
    ({"prompt": "a", "candidates": [CODES]}, "c.jsonl:1: candidates: a single one"),
    ({"prompt": "a", "candidates": [CODES, "b"]}, "c.jsonl:1: candidates[1]: expected a mapping"),
    ({"prompt": "a", "candidates": ["b", {"codes": [[1]]}]}, "some are texts, some are images"),
    (
        {"prompt": "a", "candidates": ["b", {"codes": [[1], [1, 2]]}]},
        "rows of codes are of different lengths",
    ),
    ({"prompt": "a", "candidates": ["b", "b"]}, "c.jsonl: the candidates of each prompt are all equal"),
    ({"prompt": " ", "candidates": ["b", "c"]}, "c.jsonl:1: prompt: has no words"),
    ({"prompt": "a", "candidates": ["b", "c"], "winner": 0}, "c.jsonl:1: winner: unknown key"),
    ({"prompt": "a", "candidates": ["b", "\ud83d"]}, "c.jsonl:1: half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "line"), MISTAKES)
def test_mistakes_are_named(tmp_path: Path, row: Any, line: str) -> None:
    path = write(tmp_path / "c.jsonl", row)
    with pytest.raises(UserError) as error:
        read_ballot(path)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_vote_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"c\.jsonl: empty; draw candidates first"):
        read_ballot(write(tmp_path / "c.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_ballot(tmp_path / "none.jsonl")


def test_both_forms_may_share_a_file(tmp_path: Path) -> None:
    path = captions(tmp_path)
    path.write_text(path.read_text() + drawings(tmp_path / "d.jsonl").read_text())
    ballot = read_ballot(path)
    assert ballot.has_codes and ballot.models == {"tiny"}
    assert len(ballot.pairs) == 3 * 2 + 2 * 2
    assert json.loads(json.dumps(ballot.pairs[3].preference("left", tmp_path, tmp_path, "x")))["chosen"][
        "codes"
    ]
