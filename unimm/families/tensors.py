"""Files of weights as a table of named tensors, read one at a time and never executed.

safetensors (one file or shards with an index) and `.bin`/`.pt` files (through `torch.load(weights_only=True)`,
mapped into memory, so that only the tensors asked for are read).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimm.errors import UserError
from unimm.files import open_regular, read_json

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors")
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how the files of torch before 1.6 begin
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class NoWeightsError(UserError):
    """A folder without any weight file."""


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of some files, by name; a context manager, since `.bin` files stay mapped meanwhile.

    Args:
        files: the files, by the prefix that their tensors' names get; one folder's are given by `weight_files`.

    Attributes:
        shapes: every tensor on the meta device: its shape and dtype, without its data.

    Raises:
        UserError: a file is missing, cut short, no tensor file, or a pickle with anything but tensors in it.
    """

    def __init__(self, files: Mapping[str, Sequence[Path]]) -> None:
        self._sources: dict[str, Any] = {}
        self.shapes: dict[str, Tensor] = {}
        for prefix, file in [(prefix, file) for prefix, some in files.items() for file in some]:
            self._open(file, prefix)

    @classmethod
    def of(cls, path: Path) -> WeightFiles:
        """Open the weights of one folder, or one file. Raises as `weight_files` too."""
        return cls({"": weight_files(path)})

    def __enter__(self) -> WeightFiles:
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
        open_regular(file).close()  # the libraries that read it would wait for a pipe
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
        return {
            name: (file, meta_tensor(f"{file}: {name}", shape, dtype))
            for name, (shape, dtype) in shapes.items()
        }

    def _pickled(self, file: Path) -> dict[str, tuple[Any, Tensor]]:
        content = _unpickle(file)
        for wrapper in ("ema", "model", "state_dict"):  # as LlamaGen and others wrap their weights
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
                break
        if not isinstance(content, dict):
            raise UserError(f"{file}: holds a {type(content).__name__}; expected tensors by their names")
        for name, tensor in content.items():
            if fault := _fault(name, tensor):
                raise UserError(f"{file}: {name}: {fault}")
        return {name: (content, tensor.to("meta")) for name, tensor in content.items()}


def _unpickle(file: Path) -> Any:
    """Read a file of torch's through its allow-list of tensors: a zip, or what torch wrote before 1.6."""
    with open_regular(file) as opened:
        head = opened.read(len(_OLD))
    zipped = head.startswith(b"PK\3\4")
    reason = "not written by torch.save"
    if zipped or head == _OLD:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # a broken pickle raises anything
            code = re.search("Unsupported (global|class)|Trying to (call|instantiate)", str(error))
            reason = "it holds more than tensors" if code else "damaged or cut short"
    raise UserError(f"{file}: refused as a weight file ({reason}); nothing in it was run")


def _fault(name: Any, tensor: Any) -> str | None:
    """What is wrong with an entry of a table of tensors, if anything is."""
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}; expected text"
    if not isinstance(tensor, Tensor):
        return f"of type {type(tensor).__name__}; expected a tensor"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES.values():
        return f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, which is not supported"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # one number, repeated
        return f"of shape {list(tensor.shape)}, for which the file does not hold the numbers"
    return None


def meta_tensor(what: str, shape: Sequence[int], dtype: str) -> Tensor:
    """Return a tensor without data.

    Args:
        what: the file and the tensor's name, for errors.
        shape: its lengths.
        dtype: as safetensors names it, such as "BF16".

    Raises:
        UserError: there is no such tensor.
    """
    if dtype not in _DTYPES:
        raise UserError(f"{what} is of the type {dtype}, which is not supported")
    try:
        return torch.empty(list(shape), dtype=_DTYPES[dtype], device="meta")
    except (RuntimeError, TypeError, OverflowError):
        raise UserError(f"{what} is of shape {list(shape)}, which no tensor has") from None


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


def write_single(path: Path, shapes: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor, so that one is in memory at a time.

    Args:
        path: the file.
        shapes: every tensor, of which the shapes and kinds of numbers are looked at.
        tensors: the same by name, in any order.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * shape.itemsize
        header[name] = {"dtype": names[shape.dtype], "shape": list(shape.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for name, tensor in tensors:
            file.seek(first + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.truncate(first + end)
