"""A run writes into its own folder only, whatever lies there when it starts; exports are swapped whole."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.training.test_trainer import ALL, recipe, weights
from tests.training.toy import ToyRecipe
from unimm.errors import UserError
from unimm.files import NEIGHBOUR, append
from unimm.images import save_image
from unimm.training.logging import truncate_lines
from unimm.training.trainer import train

FILES = (".lock", "metrics.jsonl", "bad-items.jsonl", "tracker-id")
FOLDERS = ("checkpoints", "samples", "tensorboard", "export", "best", "codes")


def made(folder: Path, steps: int = 2, **other: object) -> ToyRecipe:
    logging = {"every": 1, "samples_every": 1, "tensorboard": False}
    return recipe(folder, {"steps": steps, "lr": ALL}, **{"logging": logging, **other})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_run_is_written_through_what_lies_there(tmp_path: Path, name: str, kind: str) -> None:
    outside, place = tmp_path / "theirs.txt", tmp_path / "run" / "out" / name
    place.parent.mkdir(parents=True)
    if kind == "link":
        outside.write_text("theirs\n")
    if kind in ("link", "dangling"):
        place.symlink_to(outside)
    else:
        place.mkdir() if kind == "folder" else os.mkfifo(place)
    with pytest.raises(UserError, match=rf"{name}: cannot be written \(it is a "):
        train(made(tmp_path / "run"), quiet=True)
    assert outside.read_text() == "theirs\n" if kind == "link" else not outside.exists()
    assert not (place.parent / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
@pytest.mark.parametrize("name", FOLDERS)
def test_no_folder_of_a_run_is_written_through_a_link(tmp_path: Path, name: str, kind: str) -> None:
    outside, place = tmp_path / "theirs", tmp_path / "run" / "out" / name
    place.parent.mkdir(parents=True)
    if kind == "link":
        outside.mkdir()
        (outside / "note.txt").write_text("theirs")
    place.symlink_to(outside) if kind != "file" else place.write_text("theirs")
    with pytest.raises(UserError, match=rf"{name}: (is a link|a file is in the way)"):
        train(made(tmp_path / "run"), quiet=True)
    assert not outside.exists() if kind != "link" else contents(outside) == {"note.txt": b"theirs"}


def test_links_within_the_folders_of_a_run_are_replaced(tmp_path: Path) -> None:
    """A run that is resumed where somebody put links in the places of its export's files and of a checkpoint's."""
    train(made(tmp_path / "run"), quiet=True)
    expected, out = weights(tmp_path / "run"), tmp_path / "run" / "out"
    outside = tmp_path / "theirs"
    outside.mkdir()
    for name, path in (
        ("w", out / "export" / "w.safetensors"),
        ("s", *(out / "checkpoints").glob("*/state.json")),
    ):
        (outside / name).write_text("theirs")
        path.unlink()
        path.symlink_to(outside / name)
    with pytest.raises(UserError, match=r"state\.json: damaged.*no earlier checkpoint is whole"):
        train(made(tmp_path / "run"), quiet=True)
    shutil.rmtree(out / "checkpoints")
    train(made(tmp_path / "run"), quiet=True)
    assert contents(outside) == {"w": b"theirs", "s": b"theirs"}
    assert all(torch.equal(weights(tmp_path / "run")[name], value) for name, value in expected.items())


def test_images_and_lines_of_previews_go_through_no_link(tmp_path: Path) -> None:
    for name in ("000001.png", "captions.jsonl"):
        (tmp_path / f"their-{name}").write_text("theirs")
        (tmp_path / name).symlink_to(tmp_path / f"their-{name}")
    with pytest.raises(UserError, match="is a link"):
        save_image(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), tmp_path / "000001.png")
    with pytest.raises(UserError, match="is a link"):
        append(tmp_path / "captions.jsonl", "x")
    with pytest.raises(UserError, match="is a link"):
        truncate_lines(tmp_path / "captions.jsonl", 0)
    assert (
        (tmp_path / "their-000001.png").read_text()
        == (tmp_path / "their-captions.jsonl").read_text()
        == "theirs"
    )


def test_leftovers_of_kills_are_gone_after_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "run" / "out"
    places = [out / f".export.0{NEIGHBOUR}", out / f".metrics.jsonl.3{NEIGHBOUR}"]
    places.append(out / "checkpoints" / f".step-00000001.0{NEIGHBOUR}")
    for place in places:
        (place / "new").mkdir(parents=True)
        (place / "new" / "w.safetensors").write_text("half")
    train(made(tmp_path / "run"), quiet=True)
    assert not [path for path in out.rglob("*") if path.name.endswith(NEIGHBOUR)]


def test_modes_of_a_run_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        train(
            made(tmp_path / "run", checkpoint={"every": 1, "keep_best": 1, "metric": "squared"}), quiet=True
        )
    finally:
        os.umask(old)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "out").rglob("*")}
    assert {
        path: oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)
    } == {}


def test_no_space_for_the_export_is_one_line_and_the_old_one_stays(tmp_path: Path) -> None:
    """A finished run is started once more, which exports once more, on a disk that is full by then."""
    wide = made(tmp_path / "run", model={"width": 200})
    train(wide, quiet=True)
    export = tmp_path / "run" / "out" / "export"
    before = contents(export)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(UserError, match=r"export: cannot be written \(File too large\)") as caught:
            train(wide, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert contents(export) == before
    assert not list(export.parent.glob(".export*"))


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("change", ["renamed", "reshaped"])
def test_a_checkpoint_of_another_model_is_one_line_that_names_it(
    part: str, change: str, tmp_path: Path
) -> None:
    """As earlier versions wrote them, without checksums."""
    train(made(tmp_path / "run"), quiet=True)
    path = tmp_path / "run" / "out" / "checkpoints" / "step-00000002"
    tensors = load_file(path / f"{part}.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    value = tensors.pop(name)
    save_file(
        {**tensors, **({f"{name}x": value} if change == "renamed" else {name: value[1:]})},
        path / f"{part}.safetensors",
    )
    state = json.loads((path / "state.json").read_text())
    del state["sha256"], state["checksum"]
    state["files"][f"{part}.safetensors"] = (path / f"{part}.safetensors").stat().st_size
    (path / "state.json").write_text(json.dumps(state))
    before = contents(path.parent)
    with pytest.raises(UserError, match=r"step-00000002: .*the checkpoint is of another model") as caught:
        train(made(tmp_path / "run", steps=4), quiet=True)
    assert "\n" not in str(caught.value)
    assert contents(path.parent) == before
