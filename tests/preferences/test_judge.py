"""A judge behind a URL as a scorer: what it is sent, what counts as its failure, and what ends a run."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.judge_server import judge_server
from tests.preferences.online import lines, write_recipe
from unimm.errors import UserError
from unimm.pipeline import UniMM
from unimm.preferences.candidates import DrawingPrompt
from unimm.preferences.scorers import Candidate, Scorer, ScorerError, make_scorer, score_candidates
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train


def candidates(*shades: int) -> list[Candidate]:
    """Drawings in shades of grey."""
    prompt = DrawingPrompt(prompt="a grey square")
    images = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in shades]
    return [Candidate(prompt, seed, torch.zeros(4, 4), image) for seed, image in enumerate(images)]


def brightness(encoded: str) -> float:
    """How bright an image is, as a share."""
    pixel: Any = Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((0, 0))
    return float(pixel[0]) / 255


@pytest.fixture
def made(tmp_path: Path, tiny_model: UniMM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a scorer of a judge at an address."""
    monkeypatch.setattr("unimm.evaluation.judges.FIRST_WAIT", 0.0)

    def make(url: str, *lines: str, name: str = "judge.yaml") -> Scorer:
        path = tmp_path / "judge.yaml"
        retries = [] if any(line.startswith("retries") for line in lines) else ["retries: 1"]
        path.write_text("\n".join(["task: judge", f"url: {url}", "timeout: 0.4", *retries, *lines]))
        return make_scorer(name.replace("judge.yaml", str(path)), tiny_model, tmp_path)

    return make


def test_every_drawing_is_asked_about(made: Any) -> None:
    def answer(request: dict[str, Any]) -> tuple[str, str]:
        image, _ = request["messages"][0]["content"]
        return f"I say {10 * brightness(image['image_url']['url'].partition(',')[2]):.2f} of 10", "judge-1"

    with judge_server(answer) as (url, asked):
        scorer = made(url, "scale: 10", 'prompt: "{prompt}?"', "together: 3")
        found = score_candidates(scorer, candidates(0, 51, 255, 102))
        product = score_candidates(made(url, "scale: 10", name="judge.yaml^2"), candidates(51, 255))
    assert found == pytest.approx([0, 0.2, 1, 0.4])  # in their order, whichever is answered first
    assert product == pytest.approx([0.04, 1])
    assert {one["messages"][0]["content"][1]["text"] for one in asked[:4]} == {"a grey square?"}


def test_all_drawings_of_a_prompt_go_in_one_request(made: Any) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return {"scores": [brightness(image) for image in request["images"]]}

    with judge_server(503, {"scores": [1]}, answer) as (url, asked):
        scorer = made(f"{url}/score", "speaks: scores", "retries: 2")
        found = score_candidates(scorer, candidates(0, 255, 51))
    assert found == pytest.approx([0, 1, 0.2]) and scorer.failed == 0
    assert len(asked) == 3 and asked[2]["prompts"] == ["a grey square"] * 3


@pytest.mark.parametrize(
    ("speaks", "reply", "line"),
    [
        ("chat", None, r"did not answer within 0.4 s \(2 tries\)"),
        ("chat", "fine", "said 'fine', which no rule reads"),
        ("chat", "7", "said '7', which no rule reads"),  # of at most 1
        ("chat", 500, "answers with 500"),
        ("scores", {"scores": [0.5]}, r"gave no list of 2 numbers under scores \(2 tries\)"),
        ("scores", {"scores": [0.5, "x"]}, "gave no list of 2 numbers"),
        ("scores", 502, "answers with 502"),
    ],
)
def test_failures_cost_a_prompt_and_are_counted(made: Any, speaks: str, reply: Any, line: str) -> None:
    good: Any = {"scores": [0.5, 0.25]} if speaks == "scores" else "0.5"
    with judge_server(*[reply] * 4, good) as (url, _):
        scorer = made(url, f"speaks: {speaks}", "together: 2")
        with pytest.raises(ScorerError, match=line):
            score_candidates(scorer, candidates(0, 255))
        for _ in range(4):  # until the server has had enough of failing
            try:
                found = score_candidates(scorer, candidates(0, 255))
            except ScorerError:
                continue
    assert 0.5 in found and 1 <= scorer.failed < 4


def test_a_judge_that_refuses_or_changes_ends_the_run(made: Any) -> None:
    with judge_server(401) as (url, _), pytest.raises(UserError, match=r"refuses \(401"):
        score_candidates(made(url), candidates(0))
    with judge_server("0.5", ("0.5", "judge-2")) as (url, _):
        scorer = made(url)
        assert score_candidates(scorer, candidates(0)) == [0.5]
        with pytest.raises(UserError, match="is judge-2 now, and was to be judge-1"):
            score_candidates(scorer, candidates(0))


def test_settings_are_read_before_anything_is_drawn(tmp_path: Path, tiny_model: UniMM) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("task: judge\nurl: nowhere\n")
    with pytest.raises(UserError, match=r"judge.yaml: url: "):
        make_scorer(str(path), tiny_model, tmp_path)
    path.write_text("task: judge\nurl: http://127.0.0.1:9/v1\nretrys: 2\n")
    with pytest.raises(UserError, match=r"retrys: .*retries"):
        make_scorer(f"rules*{path}", tiny_model, tmp_path)


@pytest.mark.parametrize("task", ["grpo", "online_dpo"])
def test_a_model_learns_what_a_judge_likes(tiny: Path, tmp_path: Path, task: str) -> None:
    """Training asks it about its drawings as it goes; its marks are the rewards."""

    def answer(request: dict[str, Any]) -> tuple[str, str]:
        image, _ = request["messages"][0]["content"]
        mark = brightness(image["image_url"]["url"].partition(",")[2])
        marks.append(round(mark, 4))
        return f"{mark:.4f}", "judge-1"

    marks: list[float] = []
    with judge_server(answer) as (url, asked):
        judge = tmp_path / "judge.yaml"
        judge.write_text(f"task: judge\nurl: {url}\ntogether: 4\n")
        overrides = [f"scorer={judge}", "sampling.group=8", "stages[0].steps=2", "logging.every=1"]
        folder = train(load_recipe(write_recipe(task, tiny, tmp_path), overrides), quiet=True)
    each = len(asked) // 2
    assert each >= 8 and all(one["messages"][0]["content"][0]["type"] == "image_url" for one in asked)
    logged = [line["reward"] for line in lines(folder.parent)]
    wanted = [sum(marks[start : start + each]) / each for start in (0, each)]
    assert logged == pytest.approx(wanted, abs=1e-4) and max(marks) > min(marks)
