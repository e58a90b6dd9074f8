"""Weights in files that each hold a slice of every tensor, one for each of the devices that share a model.

Meta's layouts have `consolidated.00.pth`, `consolidated.01.pth` and so on, or `consolidated.pth` for one device. Which
axis a tensor is cut along its name says; one that is not cut is whole in each file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.families.tensors import WeightFiles

Axis = Callable[[str], int | None]
"""Along which axis a tensor is cut, by its name; None: it is not."""
ONE_FILE = "consolidated.pth"


def sharded_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold slices, in their order; none where it has no such files.

    Raises:
        UserError: one is missing.
    """
    if (folder / ONE_FILE).exists():
        return [folder / ONE_FILE]
    found = [path for path in folder.glob("consolidated.*.pth") if re.fullmatch(r"\w+\.\d\d\.pth", path.name)]
    names = shard_names(max((int(path.name.split(".")[1]) for path in found), default=-1) + 1)
    for name in names if found else ():
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing; the checkpoint is not complete")
    return [folder / name for name in names] if found else []


def shard_names(count: int) -> list[str]:
    """Return the names of so many files; 0: of one without a number."""
    return [f"consolidated.{number:02d}.pth" for number in range(count)] or [ONE_FILE]


class ShardedFiles(Mapping[str, Tensor]):
    """The tensors of such files, each joined when it is asked for; a context manager, since the files stay mapped.

    Args:
        files: in their order.
        axis: along which axis a tensor is cut.

    Attributes:
        shapes: every tensor on the meta device, joined.

    Raises:
        UserError: as `WeightFiles`; or files do not hold slices of the same tensors; or, when one is asked for that is
            not cut, it differs between files.
    """

    def __init__(self, files: Sequence[Path], axis: Axis) -> None:
        self._files, self._axis = files, axis
        self._shards = [WeightFiles({"": [file]}) for file in files]
        first = self._shards[0]
        for file, shard in zip(files[1:], self._shards[1:], strict=True):
            if odd := first.shapes.keys() ^ shard.shapes.keys():
                raise UserError(
                    f"{file}: {min(odd)}: is not in each of the {len(files)} files of the checkpoint"
                )
        self.shapes = {
            name: self._joined(name, [shard.shapes[name] for shard in self._shards]) for name in first
        }

    def __enter__(self) -> ShardedFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._shards:
            shard.__exit__()

    def __getitem__(self, name: str) -> Tensor:
        parts = [shard[name] for shard in self._shards]
        if self._axis(name) is None:
            for file, part in zip(self._files[1:], parts[1:], strict=True):
                if not torch.equal(part, parts[0]):
                    raise UserError(f"{file}: {name}: is another than in {self._files[0].name}")
        return self._joined(name, parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        axis = self._axis(name)
        if len(parts) == 1:
            return parts[0]
        for file, part in zip(self._files[1:], parts[1:], strict=True):
            if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
                what = f"{list(part.shape)}, {part.dtype}"
                raise UserError(f"{file}: {name}: is {what}, unlike in {self._files[0].name}")
        return parts[0] if axis is None else torch.cat(list(parts), dim=axis)


def write_shards(
    folder: Path, count: int, axis: Axis, tensors: Callable[[], Iterable[tuple[str, Tensor]]]
) -> None:
    """Write tensors as such files, one after the other, so that one file's slices are in memory at once.

    Args:
        folder: where to write.
        count: files; 0: one without a number.
        axis: along which axis a tensor is cut.
        tensors: makes the tensors with their names; called for each file.

    Raises:
        UserError: a tensor cannot be cut into so many.
    """
    for number, name in enumerate(shard_names(count)):
        slices = {}
        for key, tensor in tensors():
            along = axis(key) if count > 1 else None
            if along is None:
                slices[key] = tensor.clone(memory_format=torch.contiguous_format)
                continue
            if tensor.shape[along] % count:
                raise UserError(f"{folder / name}: {key} of {list(tensor.shape)} cannot be cut into {count}")
            slices[key] = tensor.chunk(count, along)[number].clone(memory_format=torch.contiguous_format)
        torch.save(slices, folder / name)
