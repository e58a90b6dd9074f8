"""How a checkpoint says that images are prepared is followed, to the pixel of transformers' processors, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Emu3ImageProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.source import Checkpoint
from unimm.processing.processor import UniMMProcessor

FILE = "preprocessor_config.json"
OPTIONS: dict[str, dict[str, Any]] = {
    "no normalising": {"do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5},
    "no rescaling": {"do_rescale": False},
    "neither": {"do_normalize": False, "do_rescale": False},
    "a factor alone": {"do_normalize": False, "rescale_factor": 1 / 100},
    "means of levels": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 58.0, 50.0]},
    "published": {"do_normalize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098},
    "null": {"do_normalize": None, "do_rescale": None, "resample": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("options")
    janus_checkpoints.original(root / "janus-original", janus_checkpoints.janus(root / "janus"))
    emu3_checkpoints.original(root / "emu3-original", emu3_checkpoints.emu3(root / "emu3"))
    return {path.name: path for path in root.iterdir()}


def changed(source: Path, target: Path, options: dict[str, Any]) -> Path:
    """A copy of a checkpoint with options of its images changed."""
    shutil.copytree(source, target)
    path = target / FILE
    if (inner := target / "Emu3-VisionTokenizer").exists():
        path = inner / FILE
    elif not path.exists():  # transformers has them among the processor's
        both = json.loads((target / "processor_config.json").read_text())
        both["image_processor"] |= options
        (target / "processor_config.json").write_text(json.dumps(both))
        return target
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    return target


def processor(folder: Path) -> UniMMProcessor:
    return Checkpoint(folder).processor


def make_image(height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, 20, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("layout", ["janus", "janus-original", "emu3", "emu3-original"])
def test_options_are_followed_to_the_pixel(
    tmp_path: Path, folders: dict[str, Path], layout: str, kind: str
) -> None:
    options = {name: value for name, value in OPTIONS[kind].items() if value is not None}
    ours = processor(changed(folders[layout], tmp_path / "model", OPTIONS[kind]))
    image = make_image(20 if kind == "means of levels" else 30)  # means above 1 are no colour to pad with
    theirs: Any
    if layout.startswith("janus"):
        own = {
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.4, 0.5, 0.6],
            "size": {"height": 32, "width": 32},
        }
        theirs = JanusImageProcessorPil(**own | options)
        found = ours.look([image]).pixels
    else:
        own = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.5, 0.6]}
        limits = {"min_pixels": 16 * 16, "max_pixels": 32 * 32, "spatial_factor": 4}
        theirs = Emu3ImageProcessor(**own | limits | options)
        found = ours.look([image]).pixels
    wanted = torch.as_tensor(np.asarray(theirs(image, return_tensors="np")["pixel_values"]))
    scale = wanted.abs().max()
    assert (found - wanted.reshape(found.shape)).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("to", ["transformers", "original", "unimm"])
@pytest.mark.parametrize("kind", ["no normalising", "no rescaling", "published"])
@pytest.mark.parametrize("source", ["janus", "emu3"])
def test_they_outlive_conversions(
    tmp_path: Path, folders: dict[str, Path], source: str, kind: str, to: str
) -> None:
    folder = changed(folders[source], tmp_path / "model", OPTIONS[kind])
    convert(folder, tmp_path / "new", to)
    before, after = processor(folder), processor(tmp_path / "new")
    for name in ("mean", "std"):
        assert getattr(after.views, name) == pytest.approx(getattr(before.views, name))


@pytest.mark.parametrize(
    "options",
    [
        {"do_resize": False},
        {"resample": 0},
        {"rescale_factor": 0},
        {"rescale_factor": -1},
        {"rescale_factor": "a"},
        {"rescale_factor": True},
        {"do_normalize": "no"},
        {"do_rescale": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["janus", "janus-original", "emu3", "emu3-original"])
def test_what_cannot_be_followed_is_refused(
    tmp_path: Path, folders: dict[str, Path], layout: str, options: dict[str, Any]
) -> None:
    folder = changed(folders[layout], tmp_path / "model", options)
    with pytest.raises(
        UserError, match=rf"p\w+_config\.json: (image_processor\.)?{next(iter(options))}: "
    ) as caught:
        _ = Checkpoint(folder).config
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"do_pad": False}, {"min_size": 3}], ids=str)
def test_so_is_what_only_janus_has(tmp_path: Path, folders: dict[str, Path], options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}: .* is not supported, only"):
        _ = Checkpoint(changed(folders["janus-original"], tmp_path / "model", options)).config


# --- what an earlier model leaves in a folder ----------------------------------------------------------------


@pytest.mark.parametrize("first", ["janus", "janus-original", "emu3", "emu3-original"])
@pytest.mark.parametrize("second", ["janus", "janus-original", "emu3", "emu3-original"])
def test_a_second_conversion_takes_nothing_of_the_first(
    tmp_path: Path, folders: dict[str, Path], first: str, second: str
) -> None:
    odd = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.7, 0.8, 0.9]}
    target = changed(folders[first], tmp_path / "model", odd)
    (target / "notes.txt").write_text("mine")
    for to in ("transformers", "original", "unimm"):
        convert(folders[second], target, to)
        found, wanted = processor(target), processor(folders[second])
        assert found.views.mean == pytest.approx(wanted.views.mean)
        assert found.views.std == pytest.approx(wanted.views.std)
    assert (target / "notes.txt").read_text() == "mine"


# --- models that are taken for these -------------------------------------------------------------------------


NAMESAKES: dict[str, tuple[dict[str, Any], str]] = {
    "JanusFlow": (
        {"model_type": "multi_modality", "vision_und_enc_config": {}, "vision_gen_enc_config": {}},
        "JanusFlow",
    ),
    "DeepSeek-VL": (
        {"model_type": "multi_modality", "language_config": {}, "aligner_config": {}, "vision_config": {}},
        "DeepSeek-VL",
    ),
    "DeepSeek-VL of transformers": ({"model_type": "deepseek_vl", "text_config": {}}, "DeepSeek-VL"),
    "DeepSeek-VL of two towers": ({"model_type": "deepseek_vl_hybrid"}, "DeepSeek-VL"),
    "DeepSeek-VL2": ({"model_type": "deepseek_vl_v2"}, "DeepSeek-VL2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMESAKES)
def test_a_namesake_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    config, name = NAMESAKES[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"a checkpoint of {name}, which is not supported; Janus, Janus-Pro"):
        _ = Checkpoint(tmp_path).config
    with pytest.raises(UserError, match=f"a checkpoint of {name}, which is not supported"):
        convert(tmp_path, tmp_path / "new", "unimm")


@pytest.mark.parametrize("part", ["gen_vision_config", "gen_head_config", "aligner_config"])
def test_janus_with_a_part_missing_is_still_janus(
    tmp_path: Path, folders: dict[str, Path], part: str
) -> None:
    folder = shutil.copytree(folders["janus-original"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config[part]
    (folder / "config.json").write_text(json.dumps(config))
    if part == "gen_vision_config":  # its sizes are those of the weights
        assert Checkpoint(folder).config.generation_config() is not None
        return
    with pytest.raises(UserError, match=rf"config\.json: {part}: missing"):
        _ = Checkpoint(folder).config


@pytest.mark.parametrize("kind", [None, 3, [], {}, "llama", "Emu3VisionVQ"], ids=str)
def test_what_is_no_model_is_refused(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=r"config\.json: "):
        _ = Checkpoint(tmp_path).config
