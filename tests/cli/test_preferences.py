"""The commands from prompts to preferences, on a tiny random model."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from unimm.preferences.vote.votes import Votes


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
    report = {"preferences": str(pairs), "pairs": 3, "image": 3, "prompts": 3, "equal": 0}
    assert json.loads(done.out) == report
    done = unimm("data", "check", pairs, "--model", tiny, "--json")
    assert (done.code, json.loads(done.out)) == (0, report)
    assert "prompts" in unimm("data", "check", pairs).out


def test_bad_preferences_get_one_line_from_either_check(unimm, tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = tmp_path / "pairs.jsonl"
    for row, words in [
        ({**good, "rejected": "b"}, "pairs.jsonl: chosen and rejected are equal in each pair"),
        ({**good, "rejected": {"codes": [[1]]}}, "pairs.jsonl:1: chosen is a text and rejected an image"),
        ({**good, "scores": [float("nan"), 0.0]}, "pairs.jsonl:1: scores[0]: expected a finite number"),
        (
            {"prompt": "a", "chosen": {"image": "x.png"}, "rejected": {"image": "y.png"}},
            "x.png: no such image",
        ),
    ]:
        path.write_text(json.dumps(row))
        for command in (("preferences", "check"), ("data", "check")):
            done = unimm(*command, path)
            assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
            assert words in done.err


def test_mistakes_are_said_before_the_model_is_loaded(unimm, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "c.jsonl", "--model", "no/model")
    for arguments, words in [
        (("draw", *out), "give either a file of prompts or --scenes N"),
        (("draw", tmp_path / "p.txt", *out), "p.txt: not readable as text"),
        (("draw", "--scenes", 0, *out), "scenes: 0; give 1 or more"),
        (("draw", "--scenes", 1, "--temperature", "nan", *out), "temperature: nan"),
        (("rank", tmp_path / "c.jsonl", *out), "c.jsonl: no such file"),
        (("rank", tmp_path / "c.jsonl", "--easy", "very", *out), "expected a number or none"),
        (("vote", tmp_path / "c.jsonl", *out), "c.jsonl: no such file"),
        (
            ("vote", tmp_path / "c.jsonl", "--pairs", 0, *out),
            "expected a whole number of at least 1, got '0'",
        ),
        (("vote", tmp_path / "c.jsonl", "--voter", " ", *out), "--voter: ' '; give a name"),
        (("check", tmp_path / "c.jsonl"), "c.jsonl: no such file"),
    ]:
        done = unimm("preferences", *arguments)
        assert (done.code, done.out) == (2, "")
        assert words in done.err and done.err.count("\n") == 1


def test_vote_says_what_is_wrong_and_leaves_the_folder_alone(unimm, tiny: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a", "candidates": ["b", "c"]}\n')
    (tmp_path / "lone.jsonl").write_text('{"prompt": "a", "candidates": ["b"]}\n')
    (tmp_path / "empty.jsonl").touch()
    image = [{"content": [{"image": "texts.jsonl"}, {"text": "what?"}]}]
    row = {"prompt": image, "candidates": ["b", "c"]}
    (tmp_path / "unreadable.jsonl").write_text(json.dumps(row) + "\n")
    drawn = [{"seed": k, "codes": [[k]]} for k in range(2)]
    row = {"prompt": "a", "candidates": drawn, "settings": {"model": "my/model"}}
    (tmp_path / "drawn.jsonl").write_text(json.dumps(row) + "\n")
    others, votes = tmp_path / "others.jsonl", tmp_path / "votes.jsonl"
    with Votes(others, {"seed": 0, "pairs": None}) as kept:
        kept.add("other", {"prompt": "x", "chosen": "y", "rejected": "z"}, "ann")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        for candidates, arguments, words in [
            ("texts", ("-o", votes, "--port", port), f"port {port}: address already in use"),
            ("texts", ("-o", others), f"{others}: holds votes on other candidates than {texts}"),
            ("texts", ("-o", texts), f"{texts}: holds something, and no texts.jsonl.state beside it"),
            ("lone", ("-o", votes), "lone.jsonl:1: candidates: a single one"),
            ("empty", ("-o", votes), "empty.jsonl: empty"),
            ("unreadable", ("-o", votes, "--port", 0), "unreadable.jsonl:1: texts.jsonl: not an image"),
            ("drawn", ("-o", votes), "drawn with my/model; give --model"),
            ("drawn", ("-o", votes, "--port", 0, "--model", tiny), "1 x 1 codes; this model draws 4 x 4"),
        ]:
            done = unimm("preferences", "vote", tmp_path / f"{candidates}.jsonl", *arguments)
            assert (done.code, done.out) == (2, ""), done.err
            assert words in done.err and done.err.count("\n") == 1
            assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_embedded_model_can_be_named(unimm, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": {"codes": [[1]]}, "rejected": {"codes": [[2]]}}))
    for command in (("preferences", "check"), ("data", "check")):
        done = unimm(*command, path, "--model", "embedded")
        assert done.code == 2 and "pairs.jsonl:1: chosen: 1 x 1 codes; this model draws 8 x 8" in done.err
    drawn = {"prompt": "a", "candidates": [{"seed": k, "codes": [[k]]} for k in range(2)]}
    candidates = tmp_path / "drawn.jsonl"
    candidates.write_text(json.dumps({**drawn, "settings": {"model": "embedded"}}))
    named = ("-o", tmp_path / "votes.jsonl", "--port", 0, "--model", "embedded")
    done = unimm("preferences", "vote", candidates, *named)
    assert done.code == 2 and "drawn.jsonl:1: 1 x 1 codes; this model draws 8 x 8" in done.err
    made = tmp_path / "made.jsonl"
    done = unimm("preferences", "draw", "--scenes", 1, "-n", 2, "-o", made, "--model", "embedded")
    assert done.code == 0 and json.loads(made.read_text())["settings"]["model"] == "embedded"
    ranked = tmp_path / "ranked.jsonl"
    ranking = ("--margin", 0, "--easy", "none", "--hard", "none", "-o", ranked, "--model", "embedded")
    assert unimm("preferences", "rank", made, *ranking).code == 0
    assert json.loads(unimm("info", "embedded", "--json").out) == json.loads(unimm("info", "--json").out)
