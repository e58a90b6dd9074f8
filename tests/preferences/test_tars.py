"""Preferences in webdataset tars: read as from a file of lines, trained on, checked, and each mistake on one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.data.forms import write_tar
from unimm.errors import UserError
from unimm.pipeline import UniMM
from unimm.preferences.check import check_preferences, is_preferences
from unimm.preferences.data import read_preferences
from unimm.preferences.reference import hash_data
from unimm.preferences.samples import PairSamples
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train


def as_tars(pairs: Path, folder: Path) -> Path:
    """The pairs of a file, half of them in each of two tars; images are members of their samples."""
    folder.mkdir()
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for shard in range(2):
        files: dict[str, bytes] = {}
        for index in range(shard, len(rows), 2):
            text = json.dumps(rows[index])
            for name in ("a.png", "b.png"):
                if f'"{name}"' in text:
                    files[f"{index:03d}.{name}"] = (pairs.parent / name).read_bytes()
            files[f"{index:03d}.json"] = text.encode()
        write_tar(folder / f"{shard}.tar", files)
    return folder


def test_tars_hold_what_lines_hold(pairs_file: Path, tmp_path: Path, tiny_model: UniMM) -> None:
    folder = as_tars(pairs_file, tmp_path / "tars")
    lines = read_preferences(pairs_file)
    for location in (folder, f"{folder}/*.tar", f"{folder}/{{0..1}}.tar"):
        tars = read_preferences(location)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        assert [pair.model_dump() for pair in tars] == [lines[index].model_dump() for index in order]
    ours, theirs = (PairSamples(pairs, tiny_model.processor, tiny_model.model) for pairs in (tars, lines))
    for place, index in enumerate(order):
        one, other = ours[place], theirs[index]
        assert one["prompt"] == other["prompt"] and one["chosen"]["row"] == other["chosen"]["row"]
        assert len(one["images"]) == len(other["images"])
        assert not len(one["images"]) or torch.equal(one["images"].pixels, other["images"].pixels)
    (one,) = [pair for pair in tars if pair.chosen.image]
    assert one.where == f"{folder}/0.tar: 004" and one.names() == ["a.png", "b.png"]


def test_a_run_on_tars(pairs_file: Path, tiny: Path, tmp_path: Path) -> None:
    folder = as_tars(pairs_file, tmp_path / "tars")
    recipe = {
        "task": "dpo",
        "output": str(tmp_path / "run"),
        "model": str(tiny),
        "device": "cpu",
        "data": {"file": f"{folder}/*.tar"},
        "reference": {"mode": "precomputed", "file": str(tmp_path / "r.safetensors")},
        "stages": [{"name": "dpo", "steps": 2, "batch": 8, "lr": {"decoder": 1e-3}}],
        "logging": {"every": 1, "samples_every": 2, "tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(tmp_path / "recipe.yaml"), quiet=True)
    first, second = (
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    assert first["text/loss"] == pytest.approx(0.693147, abs=1e-5) and second["loss"] < first["loss"]
    before = hash_data(Path(f"{folder}/*.tar"), [])
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    assert hash_data(Path(f"{folder}/*.tar"), []) != before


GOOD = {"prompt": "a star", "chosen": {"image": "x.png"}, "rejected": {"codes": [[0, 1], [2, 3]]}}
MISTAKES: list[tuple[Any, str]] = [
    (None, "p.tar: b: chosen: missing"),
    ("{", "p.tar: b: json: not JSON"),
    ("[1]", "p.tar: b: chosen: missing"),
    ({**GOOD, "rejected": {"image": "y.png"}}, "p.tar: b: image: y.png: no such member of the sample"),
    ({**GOOD, "rejected": "a star"}, "p.tar: b: chosen is an image and rejected a text"),
    ({**GOOD, "scores": [float("nan"), 1.0]}, "p.tar: b: scores[0]: expected a finite number, got NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "line"), MISTAKES)
def test_mistakes_name_tar_and_sample(pairs_file: Path, tmp_path: Path, row: Any, line: str) -> None:
    image = (pairs_file.parent / "a.png").read_bytes()
    files = {"a.json": json.dumps(GOOD).encode(), "a.x.png": image, "b.x.png": image}
    if row is not None:
        files["b.json"] = (row if isinstance(row, str) else json.dumps(row)).encode()
    write_tar(tmp_path / "p.tar", files)
    with pytest.raises(UserError) as error:
        read_preferences(tmp_path / "p.tar")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_locations_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data"):
        read_preferences(tmp_path)
    with pytest.raises(UserError, match=r"none-\*\.tar: no such file"):
        read_preferences(tmp_path / "none-*.tar")
    (tmp_path / "p.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"p\.tar: not a whole tar"):
        read_preferences(tmp_path / "p.tar")
    write_tar(tmp_path / "q.tar", {})
    with pytest.raises(UserError, match=r"q\.tar: empty"):
        read_preferences(tmp_path / "q.tar")


def test_check_reads_images_codes_and_what_lies_beside(pairs_file: Path, tiny: Path, tmp_path: Path) -> None:
    report = check_preferences(str(pairs_file), str(tiny))
    assert report == {
        "preferences": str(pairs_file),
        "pairs": 8,
        "image": 4,
        "text": 4,
        "prompts": 8,
        "equal": 0,
    }
    folder = as_tars(pairs_file, tmp_path / "tars")
    assert check_preferences(str(folder), str(tiny)) == {**report, "preferences": str(folder)}
    path = tmp_path / "p.jsonl"
    (tmp_path / "x.png").write_bytes(b"no image")
    path.write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=r"p\.jsonl:1: .*x\.png: not an image"):
        check_preferences(str(path))
    (tmp_path / "x.png").write_bytes((pairs_file.parent / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"p\.jsonl:1: rejected: 2 x 2 codes; this model draws 4 x 4"):
        check_preferences(str(path), str(tiny))
    codes = {"codes": [[0, 1, 2, 32]] * 4}
    path.write_text(json.dumps({**GOOD, "rejected": codes}))
    assert check_preferences(str(path))["pairs"] == 1
    with pytest.raises(UserError, match=r"p\.jsonl:1: rejected: code 32; this model's codes are 0 to 31"):
        check_preferences(str(path), str(tiny))


def test_only_preferences_are_taken_for_preferences(pairs_file: Path, tmp_path: Path) -> None:
    assert is_preferences(str(pairs_file))
    assert is_preferences(str(as_tars(pairs_file, tmp_path / "tars")))
    (tmp_path / "half.jsonl").write_text('\n{"prompt": "a", "chosen": "b"}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("")
    write_tar(tmp_path / "other.tar", {"a.txt": b"words"})
    assert is_preferences(str(tmp_path / "half.jsonl"))  # what it lacks is then said
    for name in ("other.jsonl", "broken.jsonl", "empty.jsonl", "other.tar", "nowhere.jsonl", "nowhere", "."):
        assert not is_preferences(str(tmp_path / name)), name
