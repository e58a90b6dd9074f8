"""A checkpoint's text tokenizer: faults of its files are said of them, and tokens that it does not name are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.errors import UserError
from unimm.families.source import Checkpoint
from unimm.processing.processor import UniMMProcessor, read_tokenizer
from unimm.processing.tokenizer_files import LENGTH_BOUNDS

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "cut short": b'{"version": "1.0", "added_tok',
    "a list": b"[]",
    "bytes": bytes(range(256)),
    "a page": b"<html>not found</html>",
    "pointer": POINTER,
    "deep": b"[" * 100_000,
    "NaN": b'{"model_max_length": NaN}',
}
FILES = {
    "unimm": ("tokenizer.json", "tokenizer_config.json"),
    "janus": ("tokenizer.json", "tokenizer_config.json"),
    "emu3": ("tokenizer.json", "tokenizer_config.json"),
    "emu3-original": ("emu3.tiktoken", "emu3_vision_tokens.txt"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    emu3_checkpoints.original(root / "emu3-original", emu3_checkpoints.emu3(root / "emu3"))
    janus_checkpoints.janus(root / "janus")
    return {"unimm": tiny, **{path.name: path for path in root.iterdir()}}


def without_weights(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors")))


def processor(folder: Path) -> UniMMProcessor:
    return Checkpoint(folder).processor


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in FILES for name in FILES[layout]])
def test_a_damaged_file_is_named(
    tmp_path: Path, folders: dict[str, Path], layout: str, name: str, kind: str
) -> None:
    folder = without_weights(folders[layout], tmp_path / "model")
    (folder / name).write_bytes(DAMAGE[kind])
    with pytest.raises(UserError) as caught:
        processor(folder)
    line = str(caught.value)
    assert "config.json: " not in line.replace("tokenizer_config.json: ", "") and "\n" not in line
    assert len(line) < len(str(folder)) + 400
    if name != "emu3_vision_tokens.txt" or kind in (
        "bytes",
        "pointer",
    ):  # else it is a list, and lacks tokens
        assert line.startswith(f"{folder / name}: ")
    if kind == "pointer":
        assert line.endswith("run `git lfs pull` in its folder")


BROKEN: dict[str, Any] = {
    "no vocabulary": {"model": {"type": "BPE"}},
    "another kind": {"model": {"type": "Magic", "vocab": {}, "merges": []}},
    "merges that it has no words for": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
    "a broken pattern": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
    "no object": {"added_tokens": 3},
    "negative ids": {"added_tokens": [{"id": -1, "content": "<x>"}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("layout", ["unimm", "janus", "emu3"])
def test_json_that_is_no_tokenizer_is_named(
    tmp_path: Path, folders: dict[str, Path], layout: str, kind: str
) -> None:
    folder = without_weights(folders[layout], tmp_path / "model")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **BROKEN[kind]}))
    with pytest.raises(UserError) as caught:
        processor(folder)
    assert str(caught.value).startswith(f"{path}: no tokenizer that can be read (")


@pytest.mark.parametrize("value", [3, [], {"content": 5}, {"a": 1}], ids=str)
def test_so_is_what_its_configuration_may_not_hold(tmp_path: Path, tiny: Path, value: Any) -> None:
    folder = without_weights(tiny, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": value}))
    try:
        processor(folder)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize("layout", ["unimm", "janus", "emu3"])
def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path, folders: dict[str, Path], layout: str) -> None:
    folder = without_weights(folders[layout], tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: not found; the folder holds no text tokenizer"):
        processor(folder)


@given(data=st.data())
def test_damaged_tokenizers_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        without_weights(tiny, folder)
    name = data.draw(st.sampled_from(FILES["unimm"]))
    content = bytearray((tiny / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.sampled_from(b'"{}[]:,0x\x00\xff')
        )
    (folder / name).write_bytes(content)
    try:
        read_tokenizer(folder)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
    finally:
        shutil.copyfile(tiny / name, folder / name)


# --- tokens that a tokenizer does not name --------------------------------------------------------------------


def unnamed(source: Path, target: Path, *names: str, decoder: bool) -> Path:
    """A copy of our model whose tokenizer does not name some tokens; nor does its decoder, if so said."""
    folder = Path(shutil.copytree(source, target))
    path = folder / "tokenizer_config.json"
    options = json.loads(path.read_text())
    for name in names:
        options.pop(f"{name}_token")
    path.write_text(json.dumps(options))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in names if decoder else ():
        config["decoder"][f"{name}_token_id"] = None
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("decoder", [False, True], ids=["the decoder does", "nor does the decoder"])
def test_a_tokenizer_without_a_pad_token(tmp_path: Path, tiny: Path, decoder: bool) -> None:
    um = unimm.load(unnamed(tiny, tmp_path / "model", "pad", decoder=decoder), device="cpu")
    whole = unimm.load(tiny, device="cpu")
    image = Image.new("RGB", (32, 32), "red")
    questions = ["what is this?", "what is a red apple on a blue background?"]
    assert um.ask(image, questions, 8) == whole.ask(image, questions, 8)  # what pads is not looked at
    assert um.processor.pad == (whole.processor.eos if decoder else whole.processor.pad)
    codes = um.draw_codes(["a red apple", "hi"], seed=1)
    if not decoder:
        assert torch.equal(codes, whole.draw_codes(["a red apple", "hi"], seed=1))
    um.save(tmp_path / "again")
    assert unimm.load(tmp_path / "again", device="cpu").processor.pad == um.processor.pad


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_token_that_only_the_decoder_names_is_taken(tmp_path: Path, tiny: Path, name: str) -> None:
    found = processor(unnamed(tiny, tmp_path / "model", name, decoder=False))
    assert getattr(found, name) == getattr(processor(tiny), name)


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_token_that_nothing_names_is_asked_for(tmp_path: Path, tiny: Path, name: str) -> None:
    folder = unnamed(tiny, tmp_path / "model", name, decoder=True)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json: {name}_token: missing"):
        processor(folder)


@pytest.mark.parametrize("layout", ["janus", "emu3"])
def test_so_for_published_checkpoints(tmp_path: Path, folders: dict[str, Path], layout: str) -> None:
    folder = without_weights(folders[layout], tmp_path / "model")
    path = folder / "tokenizer_config.json"
    options = json.loads(path.read_text())
    del options["pad_token"]
    path.write_text(json.dumps(options))
    found = processor(folder)
    assert found.pad == processor(folders[layout]).pad  # the decoder's
    assert found.pad_left([[1], [1, 2]])[0].tolist() == [[found.pad, 1], [1, 2]]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_length_that_texts_were_cut_to_is_let_go_of(file: str, tiny: Path, tmp_path: Path) -> None:
    """As a text tower's training leaves it: transformers' processors would cut each prompt to it, images too."""
    folder = without_weights(tiny, tmp_path / "model")
    if file == "tokenizer.json":
        words = Tokenizer.from_file(str(folder / file))
        words.enable_truncation(4)
        words.enable_padding(length=4)
        words.save(str(folder / file))
    else:
        bounds = {"max_length": 4, "truncation_strategy": "longest_first", "pad_to_multiple_of": 4}
        document = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(document | bounds))
    found = processor(folder)
    found.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/tokenizer_config.json").read_text())
    assert not written.keys() & {*LENGTH_BOUNDS}
    words = Tokenizer.from_file(str(tmp_path / "again/tokenizer.json"))
    assert words.truncation is None and words.padding is None
    text = "a red apple on a blue background"
    for tokenizer in (found.tokenizer, read_tokenizer(tmp_path / "again")):
        assert len(tokenizer.backend_tokenizer.encode(text).ids) > 4  # type: ignore[attr-defined]
        assert not tokenizer.init_kwargs.keys() & {*LENGTH_BOUNDS}
