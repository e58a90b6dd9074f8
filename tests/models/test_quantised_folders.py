"""Quantised weights in folders: saved, described, and loaded bit for bit; what does not fit is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.errors import UserError
from unimm.evaluation.logits import code_effect
from unimm.families.convert import convert
from unimm.loading import describe, load_whole
from unimm.models.modeling import UniMMModel

METHODS = {"int8": {"method": "int8"}, "int4": {"method": "int4", "group_size": 64}}


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def saved(method: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(method) / "saved"
    unimm.load(tiny, device="cpu", quantize=method).save(folder)
    return folder


def _same(one: UniMMModel, other: UniMMModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_what_is_saved_is_loaded(saved: Path, tiny: Path, method: str) -> None:
    assert json.loads((saved / "config.json").read_text())["quantization"] == METHODS[method]
    made = unimm.load(tiny, device="cpu", quantize=method)
    for read in (unimm.load(saved, device="cpu"), unimm.load(saved, device="cpu", quantize=method)):
        assert _same(read.model, made.model)
        effect = code_effect(made, read, ["a red apple"])
        assert (effect.largest, effect.same) == (0.0, 1.0)
        assert made.draw("a red apple", seed=3)[0].tobytes() == read.draw("a red apple", seed=3)[0].tobytes()
    assert _same(AutoModel.from_pretrained(saved), made.model)
    half = unimm.load(saved, device="cpu", dtype="float16").model.state_dict()
    scales = [name for name in half if name.endswith("q_proj.scale")]
    assert scales and all(torch.equal(half[name], made.model.state_dict()[name]) for name in scales)


def test_again_and_into_our_layout(saved: Path, tmp_path: Path) -> None:
    um = unimm.load(saved, device="cpu")
    um.save(tmp_path / "again")
    convert(saved, tmp_path / "converted", "unimm")
    for name in ("again", "converted"):
        assert _same(unimm.load(tmp_path / name, device="cpu").model, um.model)


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_published_models_too(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.models.quantization.LARGE", 0)
    {"janus": janus_checkpoints.janus, "emu3": emu3_checkpoints.emu3}[family](tmp_path / "whole")
    um = unimm.load(tmp_path / "whole", device="cpu", quantize=method)
    um.save(tmp_path / "small")
    assert _same(unimm.load(tmp_path / "small", device="cpu").model, um.model)
    with pytest.raises(
        UserError, match=rf"^--to: .* holds {method} weights, for which only the layout unimm"
    ):
        convert(tmp_path / "small", tmp_path / "other", "transformers")
    assert not (tmp_path / "other").exists()


def test_it_is_described(saved: Path, tiny: Path, method: str) -> None:
    told, whole = describe(saved), describe(tiny)
    assert told["quantization"] == METHODS[method] and whole["quantization"] is None
    assert told["parameters"] == whole["parameters"]


def test_what_cannot_be_done_to_it_is_one_line(saved: Path, method: str, tmp_path: Path) -> None:
    other = "int4" if method == "int8" else "int8"
    with pytest.raises(
        UserError, match=rf"^quantize: '{other}', but .* holds {method} weights; load it without$"
    ):
        unimm.load(saved, device="cpu", quantize=other)
    with pytest.raises(UserError, match=rf"^adapter: .* holds {method} weights"):
        unimm.load(saved, device="cpu", adapter=tmp_path)
    with pytest.raises(UserError, match=rf"holds {method} weights, which cannot be trained"):
        load_whole(saved)


@pytest.mark.parametrize("fault", ["missing", "surplus", "misshapen", "of floats"])
def test_faults_are_named(saved: Path, fault: str, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.up_proj.quantised"))
    if fault == "missing":
        del tensors[name]
    elif fault == "surplus":
        tensors["decoder.more"] = torch.zeros(1)
    elif fault == "misshapen":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = "decoder.more" if fault == "surplus" else name
    for load in (unimm.load, AutoModel.from_pretrained):
        with pytest.raises(UserError, match=named) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"method": "int3"}, "quantization.method: "),
        ({"method": "int4"}, "quantization.group_size: "),
        ({"method": "int8", "group_size": 64}, "quantization.group_size: "),
        ({"method": "int4", "group_size": 48}, "quantization.group_size: "),
        ({"method": "int8", "more": 1}, "quantization.more: "),
        ("int4", "quantization: "),
    ],
)
def test_wrong_entries_are_one_line(entry: object, line: str, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": entry}))
    with pytest.raises(UserError, match=rf"config.json: {line}"):
        unimm.load(folder)
