"""Held-out images of a tokenizer's own sources: never trained on, measured, shown; others are called trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.data import forms
from tests.training.tokenizer.test_task import load
from unimm.errors import UserError, UserNote
from unimm.training.report import _plots, read_metrics
from unimm.training.tokenizer.task import TokenizerTask
from unimm.training.trainer import train

SHARE = "data.validation={share: 0.3, every: 2, items: 6}"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images, each of a shade of its own, one of them broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        pixels = np.full((40, 40, 3), 20 * number, np.uint8)
        pixels[10:20] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def overrides(folder: Path, source: str, *others: str) -> list[str]:
    return [
        f"output={folder}", f"data.sources={{mine: {{path: '{source}'}}}}", "loss.adversarial.weight=0",
        "loss.perceptual.network=null", "logging={every: 1, samples_every: 2, tensorboard: false}",
        "stages=[{name: one, steps: 4, batch: 4, micro_batch: 2, lr: {tokenizer: 0.001}, mixture: {mine: 1}}]",
        *others,
    ]  # fmt: skip


def started(*given: str) -> TokenizerTask:
    recipe = load(*given)
    task = recipe.build_task()
    task.dataset(recipe.stages[0], 0)
    return task


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.parametrize("place", ["folder", "tars"])
def test_a_share_is_held_out_measured_and_shown(images: Path, tmp_path: Path, place: str) -> None:
    source = str(images if place == "folder" else forms.shards(tmp_path / "tars", 12))
    given = overrides(tmp_path / "run", source, SHARE)
    train(load(*given), quiet=True)
    measured = [line for line in lines(tmp_path / "run", "metrics.jsonl") if "validation/loss" in line]
    assert [line["step"] for line in measured] == [0, 2, 4]
    assert all(line["validation/loss"] == line["validation/reconstruction"] for line in measured)
    assert all(0 < line["validation/psnr"] < 100 for line in measured)
    task = started(*given)
    held, trained = set(task.held["mine"]), set(task.trained["mine"])
    assert held and not held & trained and held | trained == set(range(12))
    source_ = task.dataset(task.recipe.stages[0], 1)
    seen = {int(crop[0, 0, 0]) for crop in (source_[index]["pixels"] for index in range(60))}
    if place == "folder":
        shades = [20 * int(task.files["mine"].files[index].stem) for index in held]
        assert all(min(abs(shade - other) for other in seen) > 5 for shade in shades if shade)
    samples = tmp_path / "run/samples"
    assert {path.name for path in samples.iterdir()} == {
        "held-out-mine-0000002.png", "held-out-mine-0000004.png", "psnr.jsonl"
    }  # fmt: skip
    titles = [panel.title for panel, _ in _plots(tmp_path / "run", read_metrics(tmp_path / "run"))]
    assert "Images never trained on" in titles and "Images that are trained on" not in titles


def test_images_that_are_trained_on_are_not_called_held_out(images: Path, tmp_path: Path) -> None:
    train(load(*overrides(tmp_path / "run", str(images))), quiet=True)
    names = {path.name for path in (tmp_path / "run/samples").iterdir()}
    assert names == {"trained-on-mine-0000002.png", "trained-on-mine-0000004.png", "psnr-trained-on.jsonl"}
    titles = [panel.title for panel, _ in _plots(tmp_path / "run", read_metrics(tmp_path / "run"))]
    assert "Images that are trained on" in titles and "Images never trained on" not in titles


def test_measuring_changes_nothing_not_even_a_codebook_that_has_not_begun(
    images: Path, tmp_path: Path
) -> None:
    own = f"data.validation={{sources: {{other: {{path: '{images}'}}}}, every: 1}}"
    weights = {}
    for name, others in {"plain": [], "measured": [own, "checkpoint.keep_best=1"]}.items():
        given = overrides(tmp_path / name, str(images), *others)
        weights[name] = load_file(train(load(*given), quiet=True) / "model.safetensors")
    assert weights["plain"].keys() == weights["measured"].keys()
    assert all(torch.equal(weights["plain"][name], value) for name, value in weights["measured"].items())
    assert (tmp_path / "measured/best/model.safetensors").exists()
    assert (tmp_path / "measured/samples/held-out-other-0000004.png").exists()


def test_a_held_out_image_that_cannot_be_read_is_left_out(images: Path, tmp_path: Path) -> None:
    task = started(*overrides(tmp_path / "a", str(images), SHARE))
    broken = task.files["mine"].files[task.held["mine"][0]]
    broken.write_bytes(b"no image")
    with pytest.warns(UserNote, match=f"mine: .*{broken.name}"):
        again = started(*overrides(tmp_path / "b", str(images), SHARE))
    assert task.measured is not None and again.measured is not None
    assert len(again.measured.places) == len(task.measured.places) - 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.validation={}", r"data\.validation: nothing is held out"),
        (
            "data.validation={sources: {a: {path: none}}}",
            r"data\.validation\.sources\.a\.path: none: no such",
        ),
        ("data.sources={}", r"data\.validation\.share: there are no sources to hold images out of"),
    ],
)
def test_mistakes_are_one_line(images: Path, tmp_path: Path, override: str, line: str) -> None:
    mixture = "stages[0].mixture={scenes: 1}" if "sources={}" in override else "seed=0"
    with pytest.raises(UserError, match=line) as caught:
        started(*overrides(tmp_path, str(images), SHARE, override, mixture))
    assert "\n" not in str(caught.value)
