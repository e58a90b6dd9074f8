"""Validation: held-out items are never trained on, measured alike everywhere, and decide which checkpoint is best."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.data import forms
from tests.training.test_records import recipe_file
from tests.two_processes import on_two_processes
from unimm.errors import UserError, UserNote
from unimm.training.held_out import share_out, spread
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedTask
from unimm.training.trainer import train

SHARE = {"share": 0.3, "every": 3}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run: Path) -> dict[int, dict[str, float]]:
    """What validation measured, by step."""
    found = [line for line in lines(run) if "validation/loss" in line]
    assert all(
        set(line) - {"step", "stage"} == {f"validation/{x}loss" for x in ("", "text_", "code_")}
        for line in found
    )
    return {line["step"]: line for line in found}


def twice(folder: Path) -> dict[str, Any]:
    """A folder to caption and to draw."""
    return {"captions": {"path": str(folder)}, "drawings": {"path": str(folder), "pairs": "text_to_image"}}


def validated(folder: Path, tiny: Path, validation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A recipe on twelve images, some of them held out."""
    sources = twice(forms.image_folder(folder / "data", 12))
    path = recipe_file(folder, tiny, sources, **changes)
    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["validation"] = SHARE if validation is None else validation
    path.write_text(yaml.safe_dump(recipe))
    return path


def started(path: Path, *overrides: str) -> UnifiedTask:
    """The task of a recipe at the start of its first stage."""
    recipe = load_recipe(path, overrides)
    task = recipe.build_task()
    assert isinstance(task, UnifiedTask)
    task.dataset(recipe.stages[0], 0)
    return task


def test_held_out_items_are_measured_and_never_trained_on(tiny: Path, tmp_path: Path) -> None:
    path = validated(tmp_path, tiny)
    recipe = load_recipe(path)
    train(recipe, quiet=True)
    found = measured(tmp_path / "run")
    assert list(found) == [0, 3, 4], "before the first step, every third, and at the end of the stage"
    task = started(path)
    assert task.records is not None and task.measured is not None
    for name in ("captions", "drawings"):
        assert task.records.held[name] == task.records.held["captions"]
        assert not set(task.records.held[name]) & set(task.records.trained[name])
        samples = task.records.samples(0, 0.0)[name]
        read = {int(samples.indices[samples.order[position]]) for position in range(40)}
        assert read == set(task.records.trained[name])
    task_module = task.build().eval()
    batches = task.held_out()
    with torch.no_grad():  # by the loss that training has, of all in one batch
        batch = task.collate([task.measured.sample(place) for place in task.measured.places])
        _, expected = task.loss(task_module, batch, 0, task.targets(batch))
    assert len(batches) > 1 and sum(len(one["input_ids"]) for one in batches) == len(batch["input_ids"])
    for name in ("text_loss", "code_loss"):
        assert found[0][f"validation/{name}"] == pytest.approx(float(expected[name]), abs=1e-5)
    assert found[0]["validation/loss"] == pytest.approx(
        sum(float(expected[n]) for n in ("text_loss", "code_loss"))
    )


def test_measuring_changes_nothing_and_a_resumed_run_measures_the_same(tiny: Path, tmp_path: Path) -> None:
    path = validated(tmp_path, tiny, model={"pretrained": str(tiny)}, ema=0.9)
    weights = {}

    def run(name: str, *overrides: str) -> None:
        folder = train(load_recipe(path, [f"output={tmp_path}/{name}", *overrides]), quiet=True)
        weights[name] = load_file(folder / "model.safetensors")

    run("often", "data.validation.every=1")
    run("seldom", "data.validation.items=2")
    run("cut", "data.validation.every=1", "stages[0].steps=2")
    run("cut", "data.validation.every=1")
    for other in ("seldom", "cut"):
        assert all(torch.equal(weights["often"][name], weights[other][name]) for name in weights["often"])
    assert measured(tmp_path / "cut") == measured(tmp_path / "often") != measured(tmp_path / "seldom")


def test_the_split_may_not_change_in_the_middle_of_a_run(tiny: Path, tmp_path: Path) -> None:
    path = validated(tmp_path, tiny)
    train(load_recipe(path, ["stages[0].steps=2"]), quiet=True)
    with pytest.raises(
        UserError, match=r"data\.validation\.share: the checkpoint was made with 0\.3, now 0\.4"
    ):
        train(load_recipe(path, ["data.validation.share=0.4"]), quiet=True)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_checkpoint_is_that_of_validation(tiny: Path, tmp_path: Path, mode: str) -> None:
    path = validated(tmp_path, tiny, checkpoint={"every": 1, "keep": 1, "keep_best": 1, "mode": mode})
    recipe = load_recipe(path, ["stages[0].lr={decoder: 0.05, code_head: 0.05}", "data.validation.every=100"])
    assert recipe.checkpoint.metric == "validation/loss"
    train(recipe, quiet=True)
    losses = {step: line["validation/loss"] for step, line in measured(tmp_path / "run").items()}
    assert list(losses) == [0, 1, 2, 3, 4], "each checkpoint is measured"
    del losses[0]
    best = (min if mode == "min" else max)(losses, key=lambda step: losses[step])
    state = json.loads((tmp_path / f"run/checkpoints/step-{best:08d}/state.json").read_text())
    assert state["score"] == losses[best]
    assert (tmp_path / "run/best/model.safetensors").exists()


def test_a_metric_that_validation_has_not_is_named_before_the_first_step(tiny: Path, tmp_path: Path) -> None:
    path = validated(tmp_path, tiny)
    with pytest.raises(
        UserError, match=r'checkpoint\.metric: nothing named "validation/txt_loss".*validation/text_loss'
    ):
        train(load_recipe(path, ["checkpoint.metric=validation/txt_loss"]), quiet=True)
    assert list(measured(tmp_path / "run")) == [0]
    with pytest.raises(UserError, match=r'checkpoint\.metric: nothing named "validation/loss"'):
        train(
            load_recipe(
                path, ["data.validation=null", "checkpoint.metric=validation/loss", f"output={tmp_path}/none"]
            ),
            quiet=True,
        )


def test_sources_of_its_own_are_measured_on(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text('{"text": "a red apple"}\n{"text": "a blue star"}\nbroken\n')
    tars = forms.shards(tmp_path / "tars", 16)
    for number in range(4):  # of what is trained on
        (tars / f"{number:03d}.tar").unlink()
    other = {"path": str(tars), "pairs": "text_to_image"}
    own = {"sources": {"words": {"path": str(tmp_path / "words.jsonl")}, "other": other}, "items": 6}
    path = validated(tmp_path / "a", tiny, own)
    with pytest.warns(UserNote, match=r"words.*not JSON"):
        train(load_recipe(path), quiet=True)
    assert list(measured(tmp_path / "a/run")) == [0, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNote)
        task = started(path)
    assert task.measured is not None and task.records is not None
    words = [("validation/words", index) for index in range(2)]  # the third is broken
    assert sorted(task.measured.places) == [*(("validation/other", index) for index in range(3)), *words]
    assert [len(indices) for indices in task.records.trained.values()] == [12, 12]
    assert (tmp_path / "a/run/codes/validation/other.safetensors").exists()


def test_what_training_and_validation_share_is_said(tiny: Path, tmp_path: Path) -> None:
    own = {
        "sources": {"other": {"path": str(forms.shards(tmp_path / "tars", 20))}}
    }  # twelve of them are trained on
    path = validated(tmp_path / "a", tiny, own)
    with pytest.warns(
        UserNote, match=r"data\.validation: 24 of the items trained on are held out too, such as 000\.png"
    ):
        started(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserNote)
        started(validated(tmp_path / "b", tiny))


@pytest.mark.parametrize(
    ("validation", "line"),
    [
        ({}, "data.validation: nothing is held out; give a share, such as 0.1, or sources"),
        ({"share": 1.0}, "data.validation.share: expected less than 1"),
        ({"shares": 0.1}, 'data.validation.shares: unknown key; did you mean "share"'),
        ({"share": 0.1, "every": 0}, "data.validation.every: expected more than 0"),
        ({"sources": {"x": {"path": "no"}}}, r"data.validation.sources.x: no: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(tiny: Path, tmp_path: Path, validation: dict[str, Any], line: str) -> None:
    path = validated(tmp_path, tiny, validation)
    with pytest.raises(UserError, match=line) as caught:
        started(path)
    assert "\n" not in str(caught.value)


def test_there_must_be_something_to_hold_out(tiny: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, tiny, {}, stage={"mixture": {"emojiscenes/understanding": 1}})
    with pytest.raises(
        UserError, match=r"data\.validation\.share: there are no sources to hold items out of"
    ):
        load_recipe(path, ["data.validation={share: 0.1}"]).build_task()
    one = recipe_file(tmp_path / "b", tiny, twice(forms.image_folder(tmp_path / "one", 1)))
    with pytest.raises(UserError, match=r"data\.validation\.share: .*one: fewer than two items"):
        started(one, "data.validation={share: 0.1}")


def test_epochs_count_passes_through_what_is_trained_on(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    path = validated(tmp_path, tiny, stage={"mixture": {"captions": 3, "drawings": 1}})
    train(load_recipe(path))
    task = started(path)
    assert task.records is not None
    trained = len(task.records.trained["captions"])
    last = next(line for line in reversed(lines(tmp_path / "run")) if "loss" in line)
    assert last["epoch/captions"] == pytest.approx(12 / trained) == pytest.approx(3 * last["epoch/drawings"])
    said = capfd.readouterr().out
    assert f"epoch {4 / trained:.1f} to {12 / trained:.1f}  " in said
    assert "one 3/4  validation: loss " in said and "  text_loss " in said


def test_two_processes_measure_what_one_does(tiny: Path, tmp_path: Path) -> None:
    """With nothing sharded and with the weights sharded; the same bits while the weights are the same."""
    paths = []
    for name, engine in {"plain": {}, "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}}}.items():
        made = validated(tmp_path / name, tiny, output=str(tmp_path / f"{name}/two"), **engine)
        paths.append(str(made))
    status, said = on_two_processes(Path(__file__).with_name("run_recipes.py"), *paths)
    assert status == 0, said[-3000:]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(load_recipe(paths[0], [f"output={tmp_path}/one"]), quiet=True)
    finally:
        torch.set_num_threads(before)
    one = measured(tmp_path / "one")
    for name in ("plain", "zero3"):
        two = measured(tmp_path / name / "two")
        assert two.keys() == one.keys() and two[0] == one[0]
        assert two[4]["validation/loss"] == pytest.approx(one[4]["validation/loss"], abs=1e-5)


def test_a_mixture_decides_how_many_items_of_each_source_are_measured() -> None:
    assert share_out(100, {"a": 500, "b": 500}, {"a": 3.0, "b": 1.0}) == {"a": 75, "b": 25}
    assert share_out(100, {"a": 10, "b": 500}, {"a": 3.0, "b": 1.0}) == {"a": 10, "b": 25}
    assert share_out(2, {"a": 9, "b": 9, "c": 9}, {"a": 8.0, "b": 1.0, "c": 1.0}) == {"a": 1, "b": 1, "c": 1}
    assert share_out(5, {}, {}) == {}
    assert (
        spread([4, 6, 8, 9], 2) == [4, 8] and spread(range(5), 5) == [0, 1, 2, 3, 4] and spread([], 0) == []
    )
