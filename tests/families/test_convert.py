"""Conversion between layouts, and checkpoints that are broken or hostile."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

import unimm
from tests.families.janus_checkpoints import janus, original
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.families import convert as module
from unimm.families.convert import convert
from unimm.loading import describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    model = janus(folder / "transformers")
    original(folder / "original", model)
    original(folder / "binary", model, binary=True)
    janus(folder / "tied", tied=True)
    return folder


def test_from_one_published_layout_to_the_other(folder: Path, tmp_path: Path) -> None:
    convert(folder / "original", tmp_path / "new", "transformers")
    before, after = (
        load_file(folder / "transformers" / "model.safetensors"),
        load_file(tmp_path / "new" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "new").eval()
    ours = unimm.load(tmp_path / "new", device="cpu")
    inputs = ours.processor(["what is this?"], [[]])
    with torch.no_grad():
        assert (ours.model(**inputs).logits - theirs(**inputs).logits).abs().max() < 1e-4
    straight = unimm.load(folder / "original", device="cpu")
    assert ours.processor.question_ids("what is it", 2) == straight.processor.question_ids("what is it", 2)

    convert(folder / "transformers", tmp_path / "old", "original")
    wanted = {name for file in (folder / "original").glob("*.safetensors") for name in load_file(file)}
    got = load_file(tmp_path / "old" / "model.safetensors")
    assert set(got) == wanted - {"gen_vision_model.quantize.codebook_used"}
    assert unimm.load(tmp_path / "old", device="cpu").processor.turns == straight.processor.turns


def test_pickled_weights_are_read_and_kept(folder: Path, tmp_path: Path) -> None:
    binary, plain = (
        unimm.load(folder / name, device="cpu").model.state_dict() for name in ("binary", "original")
    )
    assert all(torch.equal(binary[name], plain[name]) for name in plain)
    convert(folder / "binary", tmp_path / "new", "unimm")
    kept = load_file(tmp_path / "new" / "kept.safetensors")
    assert torch.equal(kept["gen_vision_model.quantize.codebook_used"], torch.arange(65536.0))


def test_tied_embeddings_stay_tied(folder: Path, tmp_path: Path) -> None:
    model = unimm.load(folder / "tied", device="cpu").model
    head, table = model.decoder.lm_head.weight, model.get_input_embeddings().weight
    assert head.data_ptr() == table.data_ptr()
    convert(folder / "tied", tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "tied", tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_many_shards_hold_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 50_000)
    convert(folder / "original", tmp_path / "ours", "unimm")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    one, two = (
        unimm.load(path, device="cpu").model.state_dict() for path in (tmp_path / "ours", folder / "original")
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_our_own_shape_has_no_place_in_the_foreign_layouts(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no place for this model's reducer.side"):
        convert(tiny, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def _changed(folder: Path, target: Path, change: str) -> Path:
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    weights = load_file(file)
    if change == "missing":
        weights.pop("model.aligner.fc1.weight")
    elif change == "surplus":
        weights["model.extra.weight"] = torch.zeros(2, 3)
    else:
        weights["model.aligner.fc1.weight"] = weights["model.aligner.fc1.weight"].T.contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("missing", r"model\.aligner\.fc1\.weight \[48, 24\] missing"),
        ("surplus", r"model\.extra\.weight \[2, 3\] not known"),
        ("shape", r"model\.aligner\.fc1\.weight is \[24, 48\], expected \[48, 24\] of the wrong shape"),
    ],
)
def test_wrong_tensors_are_named_before_anything_is_written(
    folder: Path, tmp_path: Path, change: str, line: str
) -> None:
    broken = _changed(folder / "transformers", tmp_path / "broken", change)
    with pytest.raises(UserError, match=line):
        unimm.load(broken)
    with pytest.raises(UserError, match=line):
        convert(broken, tmp_path / "out", "unimm")
    assert not (tmp_path / "out").exists()


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (Path.touch, (Path("executed"),))


def _break(target: Path, fault: str) -> None:
    first = target / "model-00001-of-00002.safetensors"
    content = first.read_bytes()
    config = json.loads((target / "config.json").read_text())
    if fault == "truncated":
        first.write_bytes(content[: len(content) // 2])
    elif fault == "lying header":
        first.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    elif fault == "missing shard":
        first.unlink()
    elif fault == "path in index":
        index = {"weight_map": {"a": "../../etc/passwd"}}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    elif fault == "huge width":
        config["language_config"]["hidden_size"] = 10**6
        config["language_config"]["num_attention_heads"] = 10
        config["language_config"]["num_key_value_heads"] = 10
        (target / "config.json").write_text(json.dumps(config))
    elif fault == "endless layers":
        config["language_config"]["num_hidden_layers"] = 10**9
        (target / "config.json").write_text(json.dumps(config))
    else:
        (target / "model.safetensors.index.json").unlink()
        with (target / "pytorch_model.bin").open("wb") as file:
            pickle.dump({"weight": _Code()}, file)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("truncated", r"model-00001-of-00002.safetensors: truncated or damaged"),
        ("lying header", r"model-00001-of-00002.safetensors: truncated or damaged"),
        ("missing shard", r"model-00001-of-00002.safetensors: missing"),
        ("path in index", r"is no file name in this folder"),
        ("huge width", r"language_config\.hidden_size: expected at most 65536"),
        ("endless layers", r"language_config\.num_hidden_layers: expected at most 1024"),
        ("code in a pickle", r"pytorch_model.bin: refused as a weight file"),
    ],
)
def test_broken_and_hostile_checkpoints_are_refused_in_one_line(
    folder: Path, tmp_path: Path, fault: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors.index.json", "config.json"):
        assert (folder / "original" / name).exists()
    target = tmp_path / "broken"
    shutil.copytree(folder / "original", target)
    _break(target, fault)
    with pytest.raises(UserError, match=line) as caught:
        unimm.load(target)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_the_command_converts_and_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(folder / "original"), str(tmp_path / "out"), "--to", "unimm"]) == 0
    assert "unimm layout" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "out"), "--to", "original"]) == 2
    assert "is the source itself" in capsys.readouterr().err


LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
LLAMA_7B = {"num_hidden_layers": 30}  # the rest is Llama's default


# In the published files, and of no use: the vision tower's pooling head, and a record of the codebook's training.
POOLING, RECORD = 12_595_200, 65_536


@pytest.mark.parametrize(
    ("language", "width", "billions"), [(LLAMA_1B, 2048, 2.089), (LLAMA_7B, 4096, 7.420)]
)
def test_published_sizes_from_the_config_alone(
    folder: Path, tmp_path: Path, language: dict[str, int], width: int, billions: float
) -> None:
    connector = {"params": {"depth": 2, "n_embed": width}}
    config = {
        "model_type": "multi_modality",
        "language_config": {
            "model_type": "llama",
            "vocab_size": 102400,
            "max_position_embeddings": 16384,
            **language,
        },
        "vision_config": {"params": {"image_size": 384, "model_name": "siglip_large_patch16_384"}},
        "aligner_config": connector,
        "gen_aligner_config": connector,
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_head_config": {"params": {"image_token_embed": width, "image_token_size": 16384}},
    }
    for file in (folder / "original").glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    described = describe(tmp_path)
    assert described["family"] == "janus" and described["layout"] == "original"
    assert round(described["parameters"]["image_tokenizer"] / 1e6, 2) == 71.88
    assert round((described["parameters_total"] + POOLING + RECORD) / 1e9, 3) == billions
    assert described["understands"] == described["draws"] == "384x384" and described["context"] == 16384
