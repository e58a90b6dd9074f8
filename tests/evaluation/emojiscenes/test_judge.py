"""The judge of drawings on real renders, and a whole evaluation of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from unimm.data.emojiscenes.scenes import CONCEPTS, EmojiScenes
from unimm.errors import UserError
from unimm.evaluation import evaluate_recipe
from unimm.evaluation.emojiscenes.drawing import FIGURES, Verdict, judge_images
from unimm.evaluation.emojiscenes.judge import Judge, fit_probe
from unimm.evaluation.emojiscenes.pixels import find_objects
from unimm.evaluation.recipe import JudgeSection, load_evaluation
from unimm.evaluation.report import print_report

SHIPPED = Path(__file__).parents[3] / "sampling" / "eval-emojiscenes.yaml"
SMALL = JudgeSection(renders=400, side=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judge") / "judge.safetensors"


@pytest.fixture(scope="module")
def judge(cache: Path) -> Judge:
    return Judge(SMALL, cache)


def test_probe_separates_what_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator) * 3
    labels = torch.arange(80) % 4
    features = 5 + 2 * (centres[labels] + 0.1 * torch.randn(80, 16, generator=generator))
    weight, bias = fit_probe(features, labels, 4, 1e-4)
    assert torch.equal((features @ weight.T + bias).argmax(1), labels)


def test_judge_names_held_out_renders(judge: Judge) -> None:
    scenes = EmojiScenes("seen", 1, kinds=("single",))
    images = [scenes[index].render() for index in range(60)]
    guesses = judge.scores(images, [find_objects(image)[0] for image in images]).argmax(1)
    right = [CONCEPTS[guess] == scenes[index].concept for index, guess in enumerate(guesses)]
    assert np.mean(right) > 0.6  # chance is 0.02; the shipped recipe fits on many more


def test_probe_is_kept_and_fitted_anew_for_other_settings(judge: Judge, cache: Path) -> None:
    again = Judge(SMALL, cache)
    assert torch.equal(again.weight, judge.weight)
    before = cache.stat().st_mtime_ns
    other = Judge(JudgeSection(renders=60, side=32), cache)
    assert cache.stat().st_mtime_ns > before
    assert not torch.equal(other.weight, judge.weight)


def test_true_images_are_right_and_false_ones_wrong(judge: Judge) -> None:
    pairs = EmojiScenes("seen", 1, kinds=("pair",))
    counts = EmojiScenes("seen", 1, kinds=("count",))
    scenes = [pairs[index] for index in range(12)] + [counts[index] for index in range(12)]
    verdicts = judge_images(judge, scenes, [scene.render() for scene in scenes])
    assert all(verdict.background for verdict in verdicts)
    assert np.mean([verdict.place for verdict in verdicts[:12]]) > 0.8
    assert all(verdict.count for verdict in verdicts[12:])

    mirrored = [
        np.ascontiguousarray(scene.render()[::-1, ::-1]) for scene in scenes[:12]
    ]  # turned half round
    assert np.mean([verdict.place for verdict in judge_images(judge, scenes[:12], mirrored)]) < 0.3
    empty = [np.full((64, 64, 3), 0, np.uint8) for _ in scenes]
    nothing = judge_images(judge, scenes, empty)
    assert not any(verdict.place or verdict.count for verdict in nothing)
    assert Verdict(True, place=False).line() == "background right, place wrong"


def test_evaluation_of_a_tiny_model(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["naming.samples=4", "questions.samples=2", "drawing.samples=2", "drawing.shown=2"]
    report = evaluate_recipe(
        SHIPPED, [f"model={tiny}", f"output={tmp_path}", *sizes, "judge.renders=60", "judge.side=32"]
    )
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert {split: figures["both"]["count"] for split, figures in report["naming"].items()} == {
        "seen": 4,
        "composed": 4,
        "vendor": 4,
    }
    assert report["questions"]["vendor"]["all"]["count"] == 12
    assert set(report["drawing"]["composed"]) == set(FIGURES)
    background = report["drawing"]["seen"]["background"]
    assert background["drawn"]["count"] == background["rendered"]["count"] == 6
    assert background["rendered"]["rate"] == 1.0
    assert {Path(path).name for path in report["files"]} == {
        "drawings-composed.png",
        "drawings-seen.png",
        "report.json",
    }
    print_report(report)
    printed = capsys.readouterr().out
    assert "object and background" in printed
    assert "95 % interval" in printed


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("drawing.guidance_scale=.nan", "drawing.guidance_scale: expected"),
        ("naming.splits=[train]", r"naming.splits\[0\]: expected one of seen, composed, vendor"),
        ("judge.render=5", 'judge.render: unknown key; did you mean "renders"?'),
        ("task=evalution", 'task: expected "evaluation", got "evalution"; did you mean "evaluation"?'),
    ],
)
def test_mistakes_are_named_by_their_key(override: str, line: str) -> None:
    with pytest.raises(UserError) as raised:
        load_evaluation(SHIPPED, [override])
    assert line.replace("\\", "") in str(raised.value)
    assert "\n" not in str(raised.value)
