"""Foreign checkpoint folders as a table of named tensors, read one at a time and never executed.

safetensors (one file or shards with an index) and `.bin`/`.pt` files (through `torch.load(weights_only=True)`,
mapped into memory, so that only the tensors asked for are read).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimm.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class NoWeightsError(UserError):
    """A folder without any weight file."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}; expected an object")
    return document


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder (or of one file), by name; a context manager, since `.bin` files stay mapped meanwhile.

    Args:
        path: the folder or file.
        beside: further folders of the same checkpoint, by the prefix that their tensors' names get.

    Attributes:
        path: the folder or file, for errors.
        shapes: every tensor on the meta device: its shape and dtype, without its data.

    Raises:
        UserError: a file is missing, cut short, no tensor file, or a pickle with anything but tensors in it.
    """

    def __init__(self, path: Path, beside: Mapping[str, Path] | None = None) -> None:
        self.path = path
        self._sources: dict[str, Any] = {}
        self.shapes: dict[str, Tensor] = {}
        places = {"": path, **(beside or {})}
        files = [(prefix, file) for prefix, place in places.items() for file in weight_files(place)]
        for prefix, file in files:
            self._open(file, prefix)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._sources.clear()  # lets go of the mapped `.bin` files

    def __getitem__(self, name: str) -> Tensor:
        source, own_name = self._sources[name]
        tensor: Tensor
        if isinstance(source, dict):
            tensor = source[own_name]
            return tensor
        # Opened anew each time: what a mapping has read stays in memory until it is closed.
        with safe_open(source, framework="pt", device="cpu") as file:
            tensor = file.get_tensor(own_name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _open(self, file: Path, prefix: str) -> None:
        found = self._safetensors(file) if file.suffix == ".safetensors" else self._pickled(file)
        for own_name, (source, shape) in found.items():
            name = prefix + own_name
            if name in self._sources:
                raise UserError(
                    f"{file}: {own_name} is in another file too; the checkpoint contradicts itself"
                )
            self._sources[name], self.shapes[name] = (source, own_name), shape

    def _safetensors(self, file: Path) -> dict[str, tuple[Any, Tensor]]:
        try:
            with safe_open(file, framework="pt", device="cpu") as source:
                views = {name: source.get_slice(name) for name in source.keys()}  # noqa: SIM118, no mapping
                shapes = {name: (view.get_shape(), view.get_dtype()) for name, view in views.items()}
        except (SafetensorError, OSError, ValueError) as error:
            size = f"{file.stat().st_size} bytes long"
            raise UserError(
                f"{file}: truncated or damaged, or no safetensors file ({_line(error)}; it is {size})"
            ) from None
        for name, (_, dtype) in shapes.items():
            if dtype not in _DTYPES:
                raise UserError(f"{file}: {name} is of the type {dtype}, which is not supported")
        return {
            name: (file, torch.empty(shape, dtype=_DTYPES[dtype], device="meta"))
            for name, (shape, dtype) in shapes.items()
        }

    def _pickled(self, file: Path) -> dict[str, tuple[Any, Tensor]]:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
            reason = "it holds more than tensors" if "weights_only" in str(error).lower() else _line(error)
            raise UserError(f"{file}: refused as a weight file ({reason}); nothing in it was run") from None
        for wrapper in ("ema", "model", "state_dict"):  # as LlamaGen and others wrap their weights
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
                break
        if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
            raise UserError(f"{file}: holds no table of tensors")
        return {name: (content, tensor.to("meta")) for name, tensor in content.items()}


def check_weights(folder: Path) -> None:
    """Check that every weight file of a folder is there and as long as its header says.

    Raises:
        UserError: a line that names the file.
    """
    with Checkpoint(folder):
        pass


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's tensors, whatever its layout.

    Raises:
        NoWeightsError: there are none.
        UserError: the index names one that is not there.
    """
    if path.is_file():
        return [path]
    for index in INDEXES:
        if (path / index).exists():
            return _indexed(path, path / index)
    for single in SINGLES:
        if (path / single).exists():
            return [path / single]
    others = ", ".join((*SINGLES[1:], *INDEXES))
    raise NoWeightsError(f"{path / SINGLES[0]}: missing, and so are {others}; the folder holds no weights")


def _indexed(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"{index}: weight_map: expected tensor names with the files that hold them")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:  # a name such as ../../secret
            raise UserError(f"{index}: {name!r} is no file name in this folder")
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing; the checkpoint is not complete")
        files.append(folder / name)
    return files


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
