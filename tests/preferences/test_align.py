"""The loop makes every step once and resumes where it was; changes and their intervals are what they should be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unimm
from unimm.errors import UserError
from unimm.evaluation.emojiscenes.judge import Judge
from unimm.evaluation.recipe import JudgeSection
from unimm.preferences.align import Loop, Round, align, load_alignment
from unimm.preferences.grpo import GrpoRecipe
from unimm.preferences.measure import Change, Measure, compare, measure_drawings
from unimm.preferences.online_dpo import OnlineDpoRecipe
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe

TINY = [
    "rounds=1", "prompts.scenes=6", "candidates.n=3", "ranking={scorer: self-vqa, margin: 0, easy: null, hard: null}",
    "measure={prompts: 5, n: 2, words: 4, word_splits: [seen]}", "judge={renders: 60, side: 48}",
    "training.overrides=['stages[0].steps=2', 'stages[0].batch=2', 'stages[0].micro_batch=2', 'stages[0].warmup=0']",
]  # fmt: skip


def recipe_with(*overrides: str, name: str = "align-embedded"):
    return load_alignment(find_recipe(f"training/{name}"), [*TINY, *overrides])


def test_change_is_of_pairs_and_leaves_out_what_no_prompt_asks() -> None:
    change = Change.of([0.0, 0.5, None, 0.25], [0.5, 0.5, None, 1.0])
    differences = np.array([0.5, 0.0, 0.75])
    half = 1.959964 * differences.std(ddof=1) / math.sqrt(3)
    assert change.prompts == 3
    assert (change.before, change.after) == pytest.approx((0.25, 2 / 3))
    assert (change.change, change.low, change.high) == pytest.approx(
        (5 / 12, 5 / 12 - half, 5 / 12 + half), abs=1e-6
    )


def test_several_seeds_are_averaged_prompt_by_prompt() -> None:
    def run(*values: float) -> dict[str, object]:
        return {"drawings": {"alignment": list(values)}, "words": {"seen": {"naming": values[0]}}}

    report = compare([(run(0, 1), run(1, 1)), (run(0.5, 0), run(0.5, 1))])
    figure = report["drawings"]["alignment"]
    assert (figure["before"], figure["after"], figure["prompts"]) == (0.375, 0.875, 2)
    assert (figure["low"], figure["high"]) == (0.5, 0.5)  # both prompts gained just as much
    assert report["words"]["seen"]["naming"] == {"before": 0.25, "after": 0.75, "change": 0.5}


def test_drawings_are_the_same_in_any_batch_and_other_with_another_seed() -> None:
    um, judge = unimm.load(), Judge(JudgeSection(renders=60, side=48))
    section = Measure(prompts=5, n=2)
    whole = measure_drawings(um, judge, section, 3)
    um.batch_size = 4
    again, other = measure_drawings(um, judge, section, 3), measure_drawings(um, judge, section, 4)
    for name, values in whole.items():
        given = [value for value in values if value is not None]
        assert [value for value in again[name] if value is not None] == pytest.approx(given, abs=1e-5)
    assert other["codes"] != whole["codes"]
    assert all(1 <= codes <= 128 for codes in whole["codes"])
    assert all(0 <= distance < 2 for distance in whole["distance"]) and any(whole["distance"])


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output and the report of a run of two rounds."""
    output = tmp_path_factory.mktemp("aligned") / "run"
    return output, align(recipe_with(f"output={output}", "training.processes=1", "rounds=2"))


def test_a_round_starts_from_the_model_of_the_one_before_on_other_prompts(
    aligned: tuple[Path, dict[str, Any]],
) -> None:
    output, report = aligned
    first, second = (output / "seed-0" / f"round-{number}" for number in (1, 2))
    drawn = [
        [json.loads(line) for line in (one / "candidates.jsonl").read_text().splitlines()]
        for one in (first, second)
    ]
    assert drawn[0][0]["settings"]["model"] == "embedded"
    assert drawn[1][0]["settings"]["model"] == str(first / "training" / "export")
    assert {row["prompt"] for row in drawn[0]}.isdisjoint(row["prompt"] for row in drawn[1])
    assert len(report["pairs"][0]) == 2
    assert report["seconds"][0]["train"] > json.loads((second / "seconds.json").read_text())["train"]


def test_the_loop_runs_and_goes_on_where_it_was(aligned: tuple[Path, dict[str, Any]]) -> None:
    output, report = aligned
    folder = output / "seed-0"
    assert {"round-1", "before.json", "after.json", "before-after.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert report["drawings"]["alignment"]["prompts"] == 5
    assert [counts["pairs"] for counts in report["pairs"][0]] == [6, 6]
    assert set(report["seconds"][0]) == {"draw", "rank", "train", "measure before", "measure after"}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    (folder / "after.json").unlink()
    again = align(recipe_with(f"output={output}", "training.processes=1", "rounds=2"))
    assert again["drawings"] == report["drawings"] and again["words"] == report["words"]
    changed = {path.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"after.json", "seconds.json"}
    with pytest.raises(UserError, match=r"before.json: measured with other settings; remove it"):
        align(recipe_with(f"output={output}", "training.processes=1", "measure.words=0", "rounds=3"))
    assert not (folder / "round-3").exists()  # it is said before anything is done
    assert json.loads((output / "report.json").read_text())["drawings"] == report["drawings"]


def test_a_model_that_draws_while_it_learns_needs_no_pairs(tmp_path: Path) -> None:
    recipe = recipe_with(
        f"output={tmp_path}/run", "measure.words=0", "training.processes=1",
        "training.overrides=['scorer=self-vqa', 'sampling.group=2', 'sampling.learnt=2', 'stages[0].steps=1', "
        "'stages[0].batch=3', 'stages[0].micro_batch=3', 'stages[0].warmup=0', 'stages[0].mixture={}']",
        name="align-grpo-embedded",
    )  # fmt: skip
    report = align(recipe)
    folder = tmp_path / "run" / "seed-0" / "round-1"
    assert {path.name for path in folder.iterdir()} == {"training", "seconds.json"}
    assert report["pairs"][0] == [] and report["drawings"]["alignment"]["prompts"] == 5
    one = Round(recipe, 0, 1, None, folder.parent)
    trained = load_recipe(one.training, one.overrides())
    assert isinstance(trained, GrpoRecipe)
    assert (trained.prompts.scenes, trained.prompts.seed, trained.sampling.group) == (6, 1100, 2)


def test_online_dpo_is_a_round_of_its_own_too(tmp_path: Path) -> None:
    recipe = recipe_with(f"output={tmp_path}/run", "training.overrides=[]", name="align-online-dpo-embedded")
    one = Round(recipe, 3, 0, None, tmp_path)
    trained = load_recipe(one.training, one.overrides())
    assert one.online and isinstance(trained, OnlineDpoRecipe)
    assert (trained.prompts.scenes, trained.prompts.seed, trained.seed) == (6, 1003, 3)


def test_rounds_may_differ_in_what_they_draw_and_how_they_train(tmp_path: Path) -> None:
    first = "{times: 2, prompts: {scenes: 9, kinds: {single: 1}}}"
    then = "{training: {recipe: training/grpo-embedded, overrides: ['prompts.scenes=80']}}"
    recipe = recipe_with(f"output={tmp_path}", "training.overrides=[]", f"rounds=[{first}, {then}]")
    *dpo, grpo = [Round(own, 0, number, None, tmp_path) for number, own in enumerate(recipe.each_round())]
    assert [(one.online, one.recipe.prompts.scenes, one.recipe.prompts.kinds) for one in dpo] == [
        (False, 9, {"single": 1.0})
    ] * 2
    assert grpo.online and grpo.recipe.prompts.scenes == 6 and grpo.recipe.candidates == recipe.candidates
    trained = load_recipe(grpo.training, grpo.overrides())
    assert isinstance(trained, GrpoRecipe)
    assert (trained.prompts.scenes, trained.prompts.seed) == (80, 1200)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rounds=0", r"rounds[0].times: expected more than 0, got 0$"),
        ("rounds=[]", "rounds: expected a number of rounds, or a list of at least one"),
        ("rounds=[{times: 1}, {training: {recipe: nowhere}}]", "nowhere: no such file or recipe"),
        ("measure.n=1", "measure.n"),
        ("training.recipe=nowhere", "nowhere"),
        ("training.overrides=['stages[0].step=3']", "stages"),
        ("ranking.scorer=3", "ranking.scorer"),
        ("task=dpo", 'task: expected "alignment", got "dpo"'),
    ],
)
def test_bad_recipes_are_named_before_anything_is_drawn(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError, match=line.replace("[", r"\[")):
        recipe_with(f"output={tmp_path}/run", override)
    assert not (tmp_path / "run").exists()


def test_a_failed_training_is_said_and_keeps_what_was_made(tmp_path: Path) -> None:
    recipe = recipe_with(f"output={tmp_path}/run", "training.processes=1")
    loop = Loop(recipe, 0, tmp_path / "run")
    folder = loop.folder / "round-1"
    folder.mkdir(parents=True)
    (folder / "pairs.jsonl").write_text('{"prompt": "a star"}\n')
    (folder / "ranking.json").write_text("{}")
    with pytest.raises(UserError, match="training stopped with status"):
        loop.run()
    assert (folder / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rounds", "1000000000", "rounds[0].times: expected at most 100"),
        ("rounds", "[{times: 1000000000}]", "rounds[0].times: expected at most 100"),
        ("training.recipe", "none-such", "training.recipe: none-such: no such file or recipe"),
        ("model", '"a: [b"', None),
        ("model", '"2001-01-01"', None),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_planned(key: str, value: str, words: str | None) -> None:
    path = find_recipe("align-embedded")
    if words is None:  # a name of any kind is a name, in the training recipe too
        assert load_alignment(path, [f"{key}={value}"]).model == value.strip('"')
        return
    with pytest.raises(UserError) as caught:
        load_alignment(path, [f"{key}={value}"])
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
