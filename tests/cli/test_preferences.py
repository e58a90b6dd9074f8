"""The commands from prompts to preferences, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path


def test_draw_rank_check(unimm, tiny: Path, tmp_path: Path) -> None:
    candidates, pairs = tmp_path / "candidates.jsonl", tmp_path / "pairs.jsonl"
    asked = ("--scenes", 3, "-n", 2, "--seed", 1, "-o", candidates, "--model", tiny, "--json")
    done = unimm("preferences", "draw", *asked)
    assert (done.code, json.loads(done.out)["prompts"]) == (0, 3)
    assert json.loads(unimm("preferences", "draw", *asked).out)["drawn_before"] == 3
    done = unimm(
        "preferences",
        "rank",
        candidates,
        "-o",
        pairs,
        "--margin",
        0,
        "--hard",
        "none",
        "--model",
        tiny,
        "--json",
    )
    assert (done.code, json.loads(done.out)["pairs"]) == (0, 3)
    done = unimm("preferences", "check", pairs, "--json")
    assert json.loads(done.out) == {"preferences": str(pairs), "pairs": 3, "image": 3, "prompts": 3}


def test_mistakes_are_said_before_the_model_is_loaded(unimm, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "c.jsonl", "--model", "no/model")
    for arguments, words in [
        (("draw", *out), "give either a file of prompts or --scenes N"),
        (("draw", tmp_path / "p.txt", *out), "p.txt: not readable as text"),
        (("draw", "--scenes", 0, *out), "scenes: 0; give 1 or more"),
        (("draw", "--scenes", 1, "--temperature", "nan", *out), "temperature: nan"),
        (("rank", tmp_path / "c.jsonl", *out), "c.jsonl: no such file"),
        (("rank", tmp_path / "c.jsonl", "--easy", "very", *out), "expected a number or none"),
        (("check", tmp_path / "c.jsonl"), "c.jsonl: no such file"),
    ]:
        done = unimm("preferences", *arguments)
        assert (done.code, done.out) == (2, "")
        assert words in done.err and done.err.count("\n") == 1
