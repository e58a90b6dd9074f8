"""Task `dpo`: ln 2 at the start, the reference at rest, any micro-batch, resume, precomputed scores, previews."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import unimm
from unimm.errors import UserError
from unimm.preferences.check import check_preferences
from unimm.preferences.dpo import PreferenceTask
from unimm.preferences.policy import PolicyModel
from unimm.training import checkpoint
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

STAGE = {"name": "dpo", "steps": 4, "batch": 8, "lr": {"decoder": 1e-3, "code_head": 1e-3}}


@pytest.fixture
def recipe_file(tiny: Path, pairs_file: Path, tmp_path: Path) -> Path:
    """A recipe on the tiny model, all eight pairs in every step."""
    recipe = {
        "task": "dpo",
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": str(tiny),
        "data": {"file": str(pairs_file)},
        "stages": [STAGE],
        "logging": {"every": 1, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def first_loss(file: Path, indices: list[int], *overrides: str) -> tuple[float, dict[str, Any]]:
    """Loss and metrics of a batch before any step, in training mode, with dropout in the decoder."""
    task = load_recipe(file, overrides).build_task()
    assert isinstance(task, PreferenceTask)
    module = task.build()
    assert isinstance(module, PolicyModel)
    task.dataset(task.recipe.stages[0], 0)
    assert task.pairs is not None
    module.train()
    for layer in module.policy.decoder.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = task.collate([task.pairs[index] for index in indices])
    loss, metrics = task.loss(module, batch, 0, task.targets(batch))
    return loss.item(), {key: float(value) for key, value in metrics.items()}


@pytest.mark.parametrize("packed", ["true", "false"])
@pytest.mark.parametrize("mode", ["copy", "precomputed"])
@pytest.mark.parametrize(
    "indices", [[0, 2, 4], [1, 3, 5, 7], [0, 1, 2, 3, 4, 5]], ids=["images", "texts", "mixed"]
)
def test_the_first_loss_is_ln_2(
    recipe_file: Path, tmp_path: Path, indices: list[int], mode: str, packed: str
) -> None:
    overrides = [
        f"reference.mode={mode}",
        f"data.packed={packed}",
        f"reference.file={tmp_path}/r.safetensors",
    ]
    loss, metrics = first_loss(recipe_file, indices, *overrides)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    rewards = [value for key, value in metrics.items() if "reward" in key or "margin" in key]
    assert len(rewards) == 6
    # The copy sees the very same batch; precomputed scores were taken in other batches.
    assert max(map(abs, rewards)) <= (0 if mode == "copy" else 2e-6)


def test_without_a_reference_rewards_are_log_probabilities(recipe_file: Path) -> None:
    overrides = ["reference.mode=none", "text.per_position=true", "text.beta=2.0"]
    loss, metrics = first_loss(recipe_file, [3], *overrides)
    # one pair: minus log sigmoid of the difference of mean log-probabilities, times beta
    assert loss == pytest.approx(math.log1p(math.exp(-metrics["text/margin"])), abs=1e-6)
    assert metrics["text/margin"] != 0
    assert metrics["text/reward_chosen"] < 0


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_prefers_the_chosen_and_leaves_the_reference_alone(
    recipe_file: Path, tiny: Path, tmp_path: Path
) -> None:
    overrides = [
        "stages[0].steps=12",
        "logging.samples_every=6",
        "text.losses={sigmoid: 1, cross_entropy: 0.1}",
    ]
    folder = train(load_recipe(recipe_file, overrides), quiet=True)
    logged = lines(tmp_path / "run")
    assert logged[0]["image/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("text", "image"):
        assert logged[0][f"{name}/margin"] == 0
        assert logged[-1][f"{name}/margin"] > 0.01
        assert logged[-1][f"{name}/accuracy"] > 0.7
        assert 0 < logged[-1][f"{name}/entropy"] < math.log(400)
    snapshot = checkpoint.read_newest(tmp_path / "run" / "checkpoints")
    assert snapshot is not None
    start, end = load_file(tiny / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = {n.removeprefix("reference."): t for n, t in snapshot.model.items() if n.startswith("reference.")}
    assert len(kept) > 20
    assert all(torch.equal(tensor, start[name]) for name, tensor in kept.items())
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"decoder", "code_head"}
    assert unimm.load(folder).draw("blue", seed=0)[0].size == (32, 32)
    samples = tmp_path / "run" / "samples"
    assert (samples / "000012.png").exists()
    before = [json.loads(line)["before"] for line in (samples / "answers.jsonl").read_text().splitlines()]
    assert before[:4] == before[4:] and len(before) == 8


def test_one_by_eight_is_eight_by_one(recipe_file: Path, tmp_path: Path) -> None:
    ends = []
    for micro in (1, 8):
        overrides = [f"output={tmp_path}/{micro}", f"stages[0].micro_batch={micro}", "stages[0].steps=2"]
        ends.append(load_file(train(load_recipe(recipe_file, overrides), quiet=True) / "model.safetensors"))
    for one, other in zip(lines(tmp_path / "1"), lines(tmp_path / "8"), strict=True):
        for key in ("loss", "text/loss", "image/loss", "text/margin", "image/kl"):
            assert one[key] == pytest.approx(other[key], abs=1e-6), key
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["copy", "precomputed"])
def test_a_run_that_goes_on_ends_with_the_same_weights(recipe_file: Path, tmp_path: Path, mode: str) -> None:
    common = [f"reference.mode={mode}", f"reference.file={tmp_path}/r.safetensors", "stages[0].batch=2"]
    whole = train(load_recipe(recipe_file, [*common, f"output={tmp_path}/whole"]), quiet=True)
    cut = [*common, f"output={tmp_path}/cut"]
    train(load_recipe(recipe_file, [*cut, "stages[0].steps=2"]), quiet=True)
    (tmp_path / "r.safetensors").unlink(missing_ok=True)  # must come out the same from the first weights
    again = train(load_recipe(recipe_file, cut), quiet=True)
    ours, theirs = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_precomputed_scores_are_refused_once_stale(
    recipe_file: Path, tiny: Path, pairs_file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pairs_file.parent, data)
    overrides = ["reference.mode=precomputed", f"data.file={data}/pairs.jsonl"]
    first_loss(recipe_file, [0], *overrides)
    kept = data / "pairs.jsonl.reference.safetensors"
    written = kept.read_bytes()
    first_loss(recipe_file, [0], *overrides)
    assert kept.read_bytes() == written
    other = tmp_path / "other"
    um = unimm.load(tiny)
    with torch.no_grad():
        um.model.code_head[0].bias[0] += 1e-3
    um.save(other)
    with pytest.raises(UserError, match="computed with another model; remove it"):
        first_loss(recipe_file, [0], *overrides, f"model={other}")
    shutil.copy(data / "b.png", data / "a.png")
    rows = (data / "pairs.jsonl").read_text().splitlines()
    (data / "pairs.jsonl").write_text("\n".join(rows[:2]))
    with pytest.raises(UserError, match="computed with another data; remove it"):
        first_loss(recipe_file, [0], *overrides)
    with pytest.raises(UserError, match=r"pairs\.jsonl\.reference\.safetensors: computed with another data"):
        check_preferences(str(data / "pairs.jsonl"))
    kept.write_bytes(written[:100])
    with pytest.raises(UserError, match="damaged"):
        first_loss(recipe_file, [0], *overrides)


def test_a_stage_may_mix_modalities(recipe_file: Path) -> None:
    task = load_recipe(recipe_file, ["stages[0].mixture={text: 3, image: 1}"]).build_task()
    assert isinstance(task, PreferenceTask)
    task.build()
    source = task.dataset(task.recipe.stages[0], 0)
    assert sorted(source[index]["modality"] for index in range(8)) == [0] * 6 + [1] * 2


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("image.losses={sigmod: 1}", 'image.losses: unknown loss "sigmod"; did you mean "sigmoid"?'),
        ("image.losses={exo: 1}", "image.label_smoothing: the loss exo needs more than 0"),
        ("image.losses={sigmoid: 0}", "image.losses: expected a weight above 0"),
        ("text.beta=0.0", "text.beta: expected more than 0, got 0.0"),
        ("stages[0].mixture={images: 1}", r"stages[0].mixture.images: expected one of text, image"),
        ("stages[0].lr={decoders: 1}", 'stages[0].lr.decoders: no such group of weights; did you mean "decoder"?'),
        ("data.file=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("model=nowhere", "nowhere: no such folder"),
        ("stages[0].options={a: 1}", "stages[0].options: this task has none"),
    ],
)  # fmt: skip
def test_bad_recipes_are_named(recipe_file: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        train(load_recipe(recipe_file, [override]), quiet=True)
    assert line in str(error.value)


def test_some_losses_need_a_reference(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"image.losses.nca: needs a reference; without one: sigmoid, hinge"):
        load_recipe(recipe_file, ["reference.mode=none", "image.losses={nca: 1}"]).build_task()
