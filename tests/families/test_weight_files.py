"""Files of weights: what torch wrote, old and new, whole or in shards, is read without running it, or refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from unimm.errors import UserError
from unimm.families.tensors import WeightFiles

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.arange(3), "b": torch.ones(2).half()}
BINARY = "pytorch_model.bin"
WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "alone": dict,
    "beside other notes": lambda tensors: {"state_dict": tensors, "epoch": 3},
    "parameters": lambda tensors: {name: torch.nn.Parameter(t, False) for name, t in tensors.items()},
}


def read(path: Path) -> dict[str, Tensor]:
    with WeightFiles.of(path) as checkpoint:
        assert all(checkpoint.shapes[name].shape == checkpoint[name].shape for name in checkpoint)
        return {name: checkpoint[name].clone() for name in checkpoint}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < len(str(path)) + 200
    return line


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_torch_saved_is_read(tmp_path: Path, new: bool, wrapped: str) -> None:
    torch.save(WRAPPED[wrapped](WEIGHTS), tmp_path / BINARY, _use_new_zipfile_serialization=new)
    found = read(tmp_path)
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_shards_are_read_whole_or_refused(tmp_path: Path, new: bool) -> None:
    shards = {name: f"pytorch_model-0000{number}-of-00003.bin" for number, name in enumerate(WEIGHTS, 1)}
    for name, file in shards.items():
        torch.save({name: WEIGHTS[name]}, tmp_path / file, _use_new_zipfile_serialization=new)
    (tmp_path / f"{BINARY}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert read(tmp_path).keys() == WEIGHTS.keys()
    last = tmp_path / shards["b"]
    content = last.read_bytes()
    last.write_bytes(content[:-2])
    assert f"{last}: refused as a weight file (damaged or cut short)" in refused(tmp_path)
    last.unlink()
    assert f"{last}: missing" in refused(tmp_path)


NO_TENSORS: dict[str, tuple[Any, str]] = {
    "a list": (list(WEIGHTS.values()), "holds a list; expected tensors by their names"),
    "a number": ({**WEIGHTS, "epoch": 3}, "epoch: of type int; expected a tensor"),
    "another wrapper": ({"module": WEIGHTS}, "module: of type dict; expected a tensor"),
    "numbered": (dict(enumerate(WEIGHTS.values())), "0: a name of type int"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "a: a tensor of torch.float32, torch.sparse_coo"),
    "complex": ({"a": torch.ones(3, dtype=torch.complex64)}, "a: a tensor of torch.complex64"),
    "without data": ({"a": torch.ones(3, device="meta")}, "a: a tensor of torch.float32, torch.strided, on meta"),
    "one number, repeated": ({"a": torch.zeros(1).expand(10**12)}, "a: of shape [1000000000000], for which"),
    "code": ({**WEIGHTS, "x": Path("a")}, "refused as a weight file (it holds more than tensors)"),
}  # fmt: skip


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", NO_TENSORS)
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, kind: str, new: bool) -> None:
    content, words = NO_TENSORS[kind]
    torch.save(content, tmp_path / BINARY, _use_new_zipfile_serialization=new)
    assert f"{tmp_path / BINARY}: {words}" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        b"<html>404: not found</html>",
        b"words " * 100,
        pickle.dumps(1),
        b"cos\nsystem\n(S'exit 1'\ntR.",
    ],
)
def test_a_file_that_torch_did_not_write_is_not_unpickled(tmp_path: Path, content: bytes) -> None:
    (tmp_path / BINARY).write_bytes(content)
    assert "refused as a weight file (not written by torch.save); nothing in it was run" in refused(tmp_path)


class Harm:
    """What a pickle may do when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_no_code_is_run(tmp_path: Path, new: bool) -> None:
    harm = {**WEIGHTS, "x": Harm(tmp_path / "harm")}
    torch.save(harm, tmp_path / BINARY, _use_new_zipfile_serialization=new)
    assert "nothing in it was run" in refused(tmp_path)
    assert not (tmp_path / "harm").exists()


@given(data=st.data(), new=st.booleans())
def test_damaged_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, new: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=new)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error)


# --- pointers of git-lfs, and what is no file ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", BINARY, "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    )
    assert refused(tmp_path) == f"{tmp_path / name}: a git-lfs pointer, not the file itself; " + (
        "run `git lfs pull` in its folder"
    )


def test_so_is_one_shard(tmp_path: Path) -> None:
    save_file({"a": WEIGHTS["b"]}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "two.safetensors: a git-lfs pointer" in refused(tmp_path)
