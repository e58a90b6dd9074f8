"""Scores that come out the same: in other batches, in parts, after kills; and what is refused in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation import twins
from tests.evaluation.conftest import Score
from unimm.cli.main import main
from unimm.errors import UserError, UserNote
from unimm.evaluation.protocol import find_protocol, list_protocols, load_protocol

QUESTION = 'prompts.default="{question}"'  # the embedded model was never told how to answer
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*no checksum of its data:unimm.errors.UserNote")


def same(document: dict[str, Any]) -> dict[str, Any]:
    """A result without its times."""
    return {name: value for name, value in document.items() if name != "run"}


def test_results_are_the_same_in_any_batch_and_in_parts(score: Score, tiny: Path, tmp_path: Path) -> None:
    model = str(tiny)
    whole = score("pope", model=model)
    assert len(whole["items"]) == twins.COUNT and whole["figures"]["accuracy"]["value"] is not None
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == json.loads(json.dumps(whole))
    small = score("pope", model=model, batch_size=5, output="small")
    assert same(small) == same(whole)
    from unimm.evaluation.benchmark import Benchmark, RunOptions

    files = json.loads((tmp_path / "data" / "pope" / "files.list").read_text())
    path = find_protocol("pope")
    assert path is not None
    protocol = load_protocol(path, ["data.sha256={}"])
    images = tmp_path / "data" / "pope" / "images"
    parts = [
        Benchmark(protocol, RunOptions(model, files, images, tmp_path / "parts", shard=(part, 2))).run()
        for part in (1, 0)
    ]
    assert parts[0] is None and parts[1] is not None
    assert same(parts[1]) == same(whole)


def test_a_run_that_is_killed_goes_on(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    files = twins.pope(tmp_path / "data", 20)
    command = [
        sys.executable, "-m", "unimm", "eval", "pope", "data.sha256={}", "answer.max_new_tokens=30", "--model",
        str(tiny),
        "--data", str(files[0]), "--images", str(tmp_path / "data" / "images"), "--batch-size", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    journal = tmp_path / "out" / "items-0.jsonl"
    running = subprocess.Popen([*command, "-o", str(tmp_path / "out")], env=environment)
    while running.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    done = journal.read_bytes()
    assert not (tmp_path / "out" / "result.json").exists()
    for output in ("out", "whole"):
        assert main([*command[3:], "-o", str(tmp_path / output)]) == 0
    for cut in (7, 200, 900):  # other places where a kill may cut it
        (tmp_path / "out" / "result.json").unlink()
        journal.write_bytes(journal.read_bytes()[:-cut])
        assert main([*command[3:], "-o", str(tmp_path / "out")]) == 0
    found, whole = (
        json.loads((tmp_path / output / "result.json").read_text()) for output in ("out", "whole")
    )
    assert same(found) == same(whole)
    assert journal.read_bytes().startswith(
        done[: done.rindex(b"\n") + 1]
    )  # what was done was not asked again


def test_check_says_whether_items_come_out_the_same(
    score: Score, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    score("pope", model=str(tiny))
    result = tmp_path / "out" / "result.json"
    assert main(["eval", "--check", str(result)]) == 0
    assert f"{twins.COUNT} of {twins.COUNT} items, all the same" in capfd.readouterr().out
    document = json.loads(result.read_text())
    document["items"][3]["answer"] = "something else"
    result.write_text(json.dumps(document))
    assert main(["eval", "--check", str(result)]) == 2
    said = capfd.readouterr().err
    assert "1 of 12 items came out otherwise; the first: coco_pope_random-4: 'something else' then" in said
    document["model"]["sha256"] = "0" * 64
    result.write_text(json.dumps(document))
    assert main(["eval", "--check", str(result)]) == 2
    assert "other files than the model" in capfd.readouterr().err


def test_choices_by_likelihood(score: Score) -> None:
    found = score("seedbench", "answer.by=likelihood", "answer.choices=texts", QUESTION)
    lines = found["items"]
    assert all(len(line["log_probs"]) == 4 and max(line["log_probs"]) <= 0 for line in lines)
    for line in lines:
        best = max(range(4), key=lambda place: line["log_probs"][place])
        assert line["answer"] == "ABCD"[best] and line["scored"]["score"] == float(best == 0)
    assert found["figures"]["accuracy"]["value"] > 0.9  # the background, which the model knows


@pytest.mark.parametrize("name", [name for name in twins.TWINS if name not in ("pope", "mmvet", "seedbench")])
def test_every_protocol_scores_its_twin(score: Score, name: str) -> None:
    more = ["scorer.rule=words"] if name == "coco-captions" else []
    more += [] if name == "coco-captions" else [QUESTION]
    found = score(name, *more, batch_size=32)
    main_figure = found["figures"][found["main"]]
    assert main_figure["low"] <= main_figure["value"] <= main_figure["high"]
    assert found["counts"]["items"] == len(found["items"]) >= twins.COUNT
    if name == "vqav2":  # whose ids are no rotations of one another
        assert [line["fields"]["unit"] for line in found["items"]] == [line["key"] for line in found["items"]]
    known = {
        "mme": 150,
        "gqa": 0.8,
        "vqav2": 0.5,
        "textvqa": 0.6,
        "docvqa": 0.5,
        "coco-captions": 2,
        "chartqa": 0.7,
    }
    if name in known:  # what the embedded model says of its own scenes
        assert main_figure["value"] >= known[name]


def test_rotations_are_made_where_the_file_has_none(score: Score, tmp_path: Path) -> None:
    published = score("mmbench", limit=5)
    (tmp_path / "plain").mkdir()
    files = [str(path) for path in twins.mmbench(tmp_path / "plain", rotations=False)]
    made = score("mmbench", "data.circular=true", data=files, output="made", limit=5)
    asked = {
        line["key"]: (line["prompt"], line["answer"], line["fields"]["answer"]) for line in made["items"]
    }
    assert {
        line["key"]: (line["prompt"], line["answer"], line["fields"]["answer"]) for line in published["items"]
    } == asked


def test_every_protocol_of_the_package_is_whole() -> None:
    assert set(twins.TWINS) <= set(list_protocols())
    for name, path in list_protocols().items():
        protocol = load_protocol(path)
        assert protocol.name == name
        assert all(len(value) == 64 for value in protocol.data.sha256.values())
        assert load_protocol(path).fingerprint() == protocol.fingerprint()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda data: (data / "images" / "scene_003.png").unlink(), "row 3: .*scene_003.png: no such image"),
        (lambda data: (data / "images" / "scene_003.png").write_bytes(b"x"), "item .*-4.*not an image"),
        (lambda data: (data / "coco_pope_random.json").write_text(""), "not readable as JSON"),
        (lambda data: (data / "coco_pope_random.json").write_text("[]"), "no items of the split random"),
        (
            lambda data: (data / "coco_pope_random.json").write_text('[{"question_id": 1}]'),
            "question: no column",
        ),
        (
            lambda data: (data / "coco_pope_random.json").write_text(
                (data / "coco_pope_random.json").read_text() * 2
            ),
            "is the key of an earlier row too",
        ),
    ],
)
def test_broken_data_is_one_line(tiny: Path, tmp_path: Path, change: Any, line: str) -> None:
    from unimm.evaluation.benchmark import Benchmark, RunOptions

    (tmp_path / "data").mkdir()
    files = [str(path) for path in twins.pope(tmp_path / "data")]
    change(tmp_path / "data")
    path = find_protocol("pope")
    assert path is not None
    options = RunOptions(str(tiny), files, tmp_path / "data" / "images", tmp_path / "out")
    with pytest.raises(UserError, match=line) as raised:
        Benchmark(load_protocol(path, ["data.sha256={}"]), options).run()
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "result.json").exists()


def test_data_of_another_checksum_is_refused(unimm_command: Any, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "data").mkdir()
    (file,) = twins.pope(tmp_path / "data")
    said = unimm_command("eval", "pope", "--data", file, "--model", tiny, "-o", tmp_path / "out")
    assert said.startswith(f"unimm: {file}: SHA-256 ") and said.count("\n") == 1
    assert "another data set (coco_pope_random.json has ac2524" in said
    said = unimm_command("eval", "pope", "scorer.version=2", "--data", file)
    assert "scorer.version: 2, but this unimm has version 1 of pope" in said
    assert "did you mean" in unimm_command("eval", "poope")
    assert "give the files of" in unimm_command("eval", "gqa")


@pytest.fixture
def unimm_command(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command that fails; returns what it says."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        return capfd.readouterr().err

    return run


def test_another_run_is_not_resumed(score: Score, tiny: Path) -> None:
    score("pope", model=str(tiny))
    with pytest.raises(
        UserError, match=r"items-0.jsonl: is of a run with another model \(.*give another output"
    ):
        score("pope")
    with pytest.raises(UserError, match="is of a run with another protocol"):
        score("pope", "scorer.rule=exact", model=str(tiny))


def test_missing_checksums_are_said(tiny: Path, tmp_path: Path) -> None:
    from unimm.evaluation.benchmark import Benchmark, RunOptions

    files = [str(path) for path in twins.pope(tmp_path)]
    path = find_protocol("pope")
    assert path is not None
    with pytest.warns(UserNote, match="the protocol has no checksum of its data"):
        Benchmark(load_protocol(path, ["data.sha256={}"]), RunOptions(str(tiny), files, tmp_path / "images"))


def test_results_are_compared_on_a_page(score: Score, tiny: Path, tmp_path: Path) -> None:
    score("pope", QUESTION, output="a")
    score("pope", QUESTION, model=str(tiny), output="b")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b" / "result.json"), "-o", str(page)]) == 0
    text = page.read_text()
    assert text.count("<article>") > 1 and "embedded" in text and "<script" not in text
    from unimm.evaluation.comparison import compare_results

    found = compare_results([tmp_path / "a", tmp_path / "b"], page)["figures"]["accuracy"]
    (difference,) = found["differences"]
    assert difference["difference"] == pytest.approx(found["values"][1] - found["values"][0])
    assert difference["low"] <= difference["difference"] <= difference["high"]
    score("gqa", model=str(tiny), output="c")
    with pytest.raises(UserError, match=r"protocol.name: gqa, but .* has pope"):
        compare_results([tmp_path / "a", tmp_path / "c"], page)
    (tmp_path / "note.html").write_text("mine")
    with pytest.raises(UserError, match="holds something else than an earlier page"):
        compare_results([tmp_path / "a", tmp_path / "b"], tmp_path / "note.html")
