"""The reference in all its forms, sharded or not, on one process and two: ln 2 at the start, and never a bit moved."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import unimm
from tests.preferences.run_steps import look_and_step
from tests.two_processes import on_two_processes
from unimm.data.sources import Reading
from unimm.errors import UserError
from unimm.preferences.data import read_preferences
from unimm.preferences.reference import hash_data
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

FORMS = {
    "full-copy": {"reference": {"mode": "copy"}},
    "full-precomputed": {"reference": {"mode": "precomputed"}},
    "lora-copy": {"reference": {"mode": "copy"}, "lora": {"r": 2}},
    "lora-adapter": {"reference": {"mode": "adapter"}, "lora": {"r": 2}},
    "lora-precomputed": {"reference": {"mode": "precomputed"}, "lora": {"r": 2}},
}
# stages 1 and 2 hold the weights as 0 does, so one form shows them
ZERO = {form: range(4) if form == "full-copy" else (0, 3) for form in FORMS}
NAMES = [f"{form}-{count}-{zero}" for form in FORMS for count in ("one", "two") for zero in ZERO[form]]
KINDS = ("text", "image", "mixed")


def written(folder: Path, tiny: Path, pairs: Path, form: str, zero: int = 0, **more: Any) -> Path:
    """A recipe with a stage for each kind of batch."""
    groups = ["lora"] if "lora" in FORMS[form] else ["decoder", "code_head"]
    mixtures = {"text": {"text": 1}, "image": {"image": 1}, "mixed": {"text": 1, "image": 1}}
    looks = [
        {"name": kind, "steps": 1, "batch": 2, "micro_batch": 1, "lr": dict.fromkeys(groups, 1e-3),
         "mixture": mixture}
        for kind, mixture in mixtures.items()
    ]  # fmt: skip
    recipe: dict[str, Any] = {
        "task": "dpo",
        "output": str(folder / "run"),
        "device": "cpu",
        "model": str(tiny),
        "data": {"file": str(pairs)},
        "stages": looks,
        "deepspeed": {
            "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0 if zero else 10_000}
        },
        "logging": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 99},
        **FORMS[form],
        **more,
    }
    if recipe["reference"]["mode"] == "precomputed":
        recipe["reference"] = {"mode": "precomputed", "file": str(folder.parent / f"{form}.safetensors")}
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def runs(tiny: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every form at every stage of ZeRO, on one process and on two."""
    folder = tmp_path_factory.mktemp("reference")
    paths = {}
    for name in NAMES:
        form, _, zero = name.rsplit("-", 2)
        paths[name] = written(folder / name, tiny, pairs_file, form, int(zero))
        if "-one-" in name:
            look_and_step(paths[name])
    two = [paths[name] for name in NAMES if "-two-" in name]
    status, said = on_two_processes(Path(__file__).with_name("run_steps.py"), *two)
    assert status == 0, said[-3000:]
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def newest(folder: Path, step: int = 5) -> dict[str, Tensor]:
    return load_file(folder / "run" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """What `look_and_step` wrote."""
    read: dict[str, dict[str, float]] = json.loads((folder / "metrics.json").read_text())
    return read


@pytest.mark.parametrize("name", NAMES)
def test_the_first_loss_is_ln_2_and_every_reward_0(runs: Path, name: str) -> None:
    most = 2e-6 if "precomputed" in name else 0  # precomputed scores were taken in other batches
    for kind in KINDS:
        line = metrics(runs / name)[kind]
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6), kind
        for modality in ("text", "image"):
            shown = kind in (modality, "mixed")
            for key in ("reward_chosen", "reward_rejected", "margin"):
                assert abs(line[f"{modality}/{key}"]) <= most
            assert (line[f"{modality}/logp_chosen"] < 0) == shown


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_keeps_its_bits_and_steps_are_the_same(runs: Path, tiny: Path, name: str) -> None:
    form = name.rsplit("-", 2)[0]
    start, end = load_file(tiny / "model.safetensors"), load_file(runs / name / "end.safetensors")
    policy = {key.removeprefix("policy."): one for key, one in end.items() if key.startswith("policy.")}
    rests = {key.replace(".base_layer", ""): one for key, one in policy.items() if "lora_" not in key}
    trained = {key: one for key, one in rests.items() if key.split(".")[0] in ("decoder", "code_head")}
    if form.startswith("full"):
        rests = {key: one for key, one in rests.items() if key not in trained}
        assert trained and not any(torch.equal(one, start[key]) for key, one in trained.items())
    else:
        adapters = [one for key, one in policy.items() if "lora_B" in key]  # they start at 0
        assert adapters and all(one.abs().max() > 0 for one in adapters)
    copied = {key.removeprefix("reference."): one for key, one in end.items() if key.startswith("reference.")}
    assert (len(copied) > 20) == form.endswith("copy")
    for kept in (rests, copied):
        assert all(torch.equal(one, start[key]) for key, one in kept.items())
    first = metrics(runs / f"{form}-one-0")
    for step, mine in metrics(runs / name).items():
        for key in ("loss", "text/margin", "image/margin"):
            assert mine[key] == pytest.approx(first[step][key], abs=1e-6), (step, key)
        assert mine["norm"] == pytest.approx(first[step]["norm"], rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_form_gives_the_same_steps(runs: Path, kind: str) -> None:
    first, *others = [metrics(runs / f"{form}-one-0") for form in FORMS if form.startswith(kind)]
    for other in others:
        for step, line in other.items():
            assert line["loss"] == pytest.approx(first[step]["loss"], abs=1e-6)
    assert abs(first["step 1"]["loss"] - math.log(2)) > 1e-5


def test_the_export_is_merged_with_adapters_beside_it(tiny: Path, pairs_file: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a", tiny, pairs_file, "lora-adapter", zero=3)
    export = train(load_recipe(path, ["logging.samples_every=1"]), quiet=True)
    assert len(list((tmp_path / "a" / "run" / "samples").glob("*.png"))) == 3
    merged, adapted = unimm.load(export), unimm.load(tiny, adapter=export / "adapter")
    start = unimm.load(tiny).model.state_dict()
    ours, theirs = merged.model.state_dict(), adapted.model.state_dict()
    assert ours.keys() == theirs.keys() == start.keys()
    moved = [key for key in start if not torch.equal(ours[key], start[key])]
    assert moved and all("_proj" in key for key in moved)
    for key in moved:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)
    adapter = json.loads((export / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny)


# --- a reference that follows the policy --------------------------------------------------------------------


def following(zero: int = 0, **more: Any) -> dict[str, Any]:
    """Four steps, after the second of which the reference moves; at stage 3 some weights are too small to be cut."""
    groups = {"decoder": 1e-3, "code_head": 1e-3}
    stage = {"name": "train", "steps": 4, "batch": 4, "lr": groups}
    return {
        "reference": {"mode": "copy", "sync_every": 2, "mix": 0.6},
        "stages": [stage],
        "checkpoint": {"every": 1, "keep": 9},
        "deepspeed": {"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 100}},
        **more,
    }


@pytest.mark.parametrize("zero", [0, 3])
def test_a_reference_that_follows(tiny: Path, pairs_file: Path, tmp_path: Path, zero: int) -> None:
    train(load_recipe(written(tmp_path / "a", tiny, pairs_file, "full-copy", **following(zero))), quiet=True)
    start, two, three, four = (
        load_file(tiny / "model.safetensors"),
        *(newest(tmp_path / "a", n) for n in (2, 3, 4)),
    )
    names = [key.removeprefix("reference.") for key in two if key.startswith("reference.")]
    for name in names:
        assert torch.equal(two[f"reference.{name}"], start[name])
        expected = 0.6 * two[f"policy.{name}"] + 0.4 * start[name]
        torch.testing.assert_close(three[f"reference.{name}"], expected, rtol=0, atol=1e-6)
        assert torch.equal(three[f"reference.{name}"], four[f"reference.{name}"])
    assert any(not torch.equal(three[f"reference.{name}"], start[name]) for name in names)


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_following_run_that_goes_on_ends_with_the_same_weights(
    tiny: Path, pairs_file: Path, tmp_path: Path, stopped: int
) -> None:
    for name in ("whole", "cut"):
        path = written(tmp_path / name, tiny, pairs_file, "full-copy", **following())
        if name == "cut":
            train(load_recipe(path, [f"stages[0].steps={stopped}"]), quiet=True)
        train(load_recipe(path), quiet=True)
    ours, theirs = newest(tmp_path / "whole", 4), newest(tmp_path / "cut", 4)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_reference_that_becomes_the_policy_gives_ln_2_again(
    tiny: Path, pairs_file: Path, tmp_path: Path
) -> None:
    more = following(reference={"mode": "copy", "sync_every": 2, "mix": 1.0})
    train(load_recipe(written(tmp_path / "a", tiny, pairs_file, "full-copy", **more)), quiet=True)
    losses = [line["loss"] for line in lines(tmp_path / "a")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] == pytest.approx(math.log(2), abs=1e-6)
    assert all(abs(losses[step] - math.log(2)) > 1e-4 for step in (1, 3))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["reference.mode=adapter"], "reference.mode: adapter switches adapters off, and there is no section lora"),
        (["reference.mode=adapter", "lora.r=2", "stages[0].lr={lora: 1, code_head: 1}"],
         "stages[0].lr.code_head: would move the reference"),
        (["reference.sync_every=2", "lora.r=2"], "reference.sync_every: a copy cannot follow adapters"),
        (["reference={mode: none, sync_every: 2}"], "reference.sync_every: only a reference of mode copy"),
        (["reference={mode: copy, sync_every: 2, mix: 1.5}"], "reference.mix: expected at most 1, got 1.5"),
    ],
)  # fmt: skip
def test_references_that_would_be_none(
    tiny: Path, pairs_file: Path, tmp_path: Path, overrides: list[str], line: str
) -> None:
    path = written(tmp_path / "a", tiny, pairs_file, "full-copy")
    with pytest.raises(UserError) as error:
        train(load_recipe(path, overrides), quiet=True)
    assert line in str(error.value)


# --- stored scores are of these very preferences ------------------------------------------------------------


@pytest.mark.parametrize(
    "reading",
    [
        Reading(fields={"chosen": "worse", "rejected": "better"}),
        Reading(fields={"chosen": "better", "rejected": "worse", "prompt": "other"}),
        Reading(fields={"chosen": "better", "rejected": "worse"}, images="images", allow_outside=True),
    ],
    ids=["sides", "prompt", "images"],
)
def test_preferences_that_are_read_otherwise_have_another_hash(tmp_path: Path, reading: Reading) -> None:
    (tmp_path / "images").mkdir()
    for name, level in (("a.png", 50), ("b.png", 200), ("images/a.png", 100), ("images/b.png", 150)):
        Image.new("RGB", (32, 32), (level, 0, 0)).save(tmp_path / name)
    if reading.images:
        reading = dataclasses.replace(reading, images=str(tmp_path / reading.images))
    path = tmp_path / "pairs.jsonl"
    row = {
        "prompt": "a square",
        "other": "a red square",
        "better": {"image": "a.png"},
        "worse": {"image": "b.png"},
    }
    path.write_text(json.dumps(row) + "\n")
    usual = Reading(fields={"chosen": "better", "rejected": "worse"})
    hashes = [hash_data(path, read_preferences(path, one), one) for one in (usual, usual, reading)]
    assert hashes[0] == hashes[1] != hashes[2]
