"""Write a checkpoint in another layout, tensor by tensor.

A converted folder keeps what unimm has no module for (`kept.safetensors`) and the source's own small files
(`source.NAME`), so that going back to the same layout loses nothing.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from unimm.errors import UserError
from unimm.families import own
from unimm.families.family import LAYOUTS, OWN, PARAMS_FILE, Family, Writer, family_of
from unimm.families.image_tokenizers import convert_image_tokenizer, describes_image_tokenizer
from unimm.families.keymap import Entry, translated
from unimm.families.model import OurTensors, key_map
from unimm.families.shards import write_shards
from unimm.families.source import MODEL_FILE, Checkpoint
from unimm.families.tensors import INDEXES, SINGLES, WeightFiles, write_single
from unimm.folders import write_folder
from unimm.models.configuration import UniMMConfig

KEPT_FILE = "kept.safetensors"
SOURCE_PREFIX = "source."  # of the files that a converted folder keeps of its source
SHARD_BYTES = 2**29  # of a written shard; small, so that little is in memory at once
SMALL_FILE = 2**26  # larger files of a source that are no weights are not kept


def convert(source: Path | Checkpoint, folder: Path, to: str, image_tokenizer: Path | None = None) -> None:
    """Write a checkpoint in another layout; the weights go through shard by shard.

    Args:
        source: a folder of any supported layout, as a path or opened, or an image tokenizer alone.
        folder: where to write; an old one of the same layout is replaced once all is written.
        to: one of `LAYOUTS`.
        image_tokenizer: the folder of a separate image tokenizer, for a path, if it is neither in it nor beside it.

    Raises:
        UserError: the source is broken, or the layout has no place for what the model has.
    """
    if to not in LAYOUTS:
        raise UserError(f"--to: {to!r}; one of {', '.join(LAYOUTS)}")
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source, image_tokenizer)
    if folder.resolve() == checkpoint.folder.resolve():
        raise UserError(f"{folder}: is the source itself; name another folder")
    if checkpoint.folder.is_file() or describes_image_tokenizer(checkpoint.document):
        convert_image_tokenizer(checkpoint.folder, folder, to)
        return
    with checkpoint:
        write_folder(folder, _Conversion(checkpoint, to).write)


class _Conversion:
    """A checkpoint on its way into another layout, checked before anything is written.

    Args:
        checkpoint: what to write.
        to: the layout.
    """

    def __init__(self, checkpoint: Checkpoint, to: str) -> None:
        self.checkpoint, self.to = checkpoint, to
        self.ours = OurTensors(checkpoint)
        self.config = self.ours.config
        self.family = own.FAMILY if to == OWN else checkpoint.family
        if self.family is own.FAMILY and to != OWN:
            self.family = family_of(self.config)
        self.processor = checkpoint.processor
        # A model that was saved again since has no files of its source's beside it any more.
        configs = (f"{SOURCE_PREFIX}{name}" for name in (MODEL_FILE, PARAMS_FILE))
        filed = any((checkpoint.folder / name).exists() for name in configs)
        self.back = checkpoint.layout == to or (filed and getattr(self.config, "source_layout", None) == to)
        self.writer: Writer | None = None
        if to != OWN:
            if self.config.quantization is not None:
                raise UserError(
                    f"--to: {checkpoint.folder} holds {self.config.quantization['method']} weights, for which only "
                    "the layout unimm has a place"
                )
            _check_parts(self.family, self.config)
            if not self.back:
                self.writer = _writer(self.family)
                self.writer.check(self.config, self.processor, to, str(checkpoint.folder))
        self.map = key_map(self.family, to, self._named())
        separate = self.family.image_tokenizers.get(to)
        self.subfolders = {separate.prefix: separate.folder} if separate else {}
        self.kept = _kept(self.ours, checkpoint) if self.back or to == OWN else self._started()

    def _started(self) -> dict[str, Tensor]:
        """What a writer puts those of ours into that are a part of one of theirs."""
        starts = [(entry, entry.op.start) for entry in self._returned()]
        return {entry.theirs[0]: start(self.ours[entry.ours]) for entry, start in starts if start is not None}

    def _named(self) -> UniMMConfig:
        """The configuration by which tensors are named; a writer may have names of its own."""
        if self.writer is None or self.writer.keys is None:
            return self.config
        named = copy.copy(self.config)
        named.source_keys = self.writer.keys.get(self.to)
        return named

    def write(self, target: Path) -> None:
        """Write everything."""
        self._write_weights(target)
        for prefix, name in self.subfolders.items():
            (target / name).mkdir()
            _write_weights(target / name, self._translated(prefix))
        if self.to == OWN:
            self._write_own_files(target)
        elif self.writer is None:
            self._copy_back(target)
        else:
            self.writer.write(self.config, self.processor, target, self.to)
            self.processor.write_end_tokens(target)

    def _write_weights(self, target: Path) -> None:
        """Write the tensors of the model's own folder, in the files that the layout has."""
        taken = {name for entry in self._returned() for name in entry.theirs}
        extra = {name: tensor for name, tensor in self.kept.items() if self.to != OWN and name not in taken}
        if self.writer is not None:
            kind = self._shapes(self._returned()[0])[0][1].dtype
            extra = {name: one.to(kind) for name, one in self.writer.tensors(self.config, self.to).items()}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return chain(self._translated(""), extra.items())

        if (axis := self.family.shard_axes.get(self.to)) is not None:
            write_shards(target, getattr(self.config, "source_shards", 0), axis, tensors)
        elif (single := self.family.weight_files.get(self.to)) is not None:
            shapes = {name: part for entry in self._returned() for name, part in self._shapes(entry)}
            write_single(target / single, {**shapes, **extra}, tensors())
        else:
            _write_weights(target, tensors())

    def _translated(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Their names (without the prefix) and tensors of one folder, one of ours after the other."""

        def here(entry: Entry) -> bool:
            place = next((other for other in self.subfolders if entry.theirs[0].startswith(other)), "")
            return place == prefix

        for name, tensor in translated(list(filter(here, self._returned())), self.ours, self.kept):
            yield name.removeprefix(prefix), tensor.contiguous()

    def _returned(self) -> list[Entry]:
        return [entry for entry in self.map.returned(self.ours) if entry.ours not in self.map.tied]

    def _shapes(self, entry: Entry) -> list[tuple[str, Tensor]]:
        """Their names and shapes, as tensors on the meta device, of one of ours."""
        ours = self.ours.shape(entry.ours)
        return list(zip(entry.theirs, entry.op.to_theirs(ours, len(entry.theirs)), strict=True))

    def _write_own_files(self, target: Path) -> None:
        """Write our configuration and processor, the source's small files and what we have no module for."""
        source = self.checkpoint
        if source.layout == OWN:
            for file in _small_files(source.folder, SOURCE_PREFIX):
                shutil.copyfile(file, target / file.name)
        else:
            self.config.source_layout = source.layout
            inner = {source.separate.prefix: f"{source.separate.folder}."} if source.separate else {}
            for prefix, place in source.folders.items():
                for file in _small_files(place, ""):
                    shutil.copyfile(file, target / f"{SOURCE_PREFIX}{inner.get(prefix, '')}{file.name}")
        self.config.save_pretrained(target)
        self.processor.save_pretrained(target)
        if self.kept:
            save_file(self.kept, target / KEPT_FILE)

    def _copy_back(self, target: Path) -> None:
        """Put the small files of a checkpoint's own layout where they are in it."""
        if self.checkpoint.layout != OWN:
            for prefix, place in self.checkpoint.folders.items():
                for file in _small_files(place, ""):
                    shutil.copyfile(file, target / self.subfolders.get(prefix, "") / file.name)
            return
        for file in _small_files(self.checkpoint.folder, SOURCE_PREFIX):
            name = file.name.removeprefix(SOURCE_PREFIX)
            inner = next((one for one in self.subfolders.values() if name.startswith(f"{one}.")), None)
            place = target if inner is None else target / inner
            shutil.copyfile(file, place / (name if inner is None else name.removeprefix(f"{inner}.")))


def _check_parts(family: Family, config: UniMMConfig) -> None:
    """Check that a model has all that the layouts of a family always hold."""
    if missing := family.missing(config):
        raise UserError(
            f"--to: {family.title}'s layouts need {', '.join(missing)}, which this model does not have; "
            "the layout unimm holds it"
        )


def _writer(family: Family) -> Writer:
    """What writes models in a family's layouts."""
    if family.writer is None:
        raise UserError(
            f"--to: {family.title} is read but not written by unimm; the layout unimm holds this model"
        )
    return family.writer


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write shards of at most `SHARD_BYTES` (or one tensor), and their index."""
    shards: list[list[str]] = []
    total, size = 0, 0
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(waiting, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        waiting[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLES[0])
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEXES[0]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _kept(ours: OurTensors, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the source has beyond our model: in its weights, or beside them if it was converted before."""
    file = checkpoint.folder / KEPT_FILE
    if file.exists():
        with WeightFiles.of(file) as beside:
            return {name: beside[name].clone() for name in beside}
    return {name: checkpoint.tensors[name].clone() for name in ours.kept}


def _small_files(folder: Path, prefix: str) -> list[Path]:
    """Return the files of a checkpoint that are no weights: configuration, tokenizer, processor, readme."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json")
    return [
        file
        for file in sorted(folder.glob(f"{prefix}*"))
        if file.is_file() and not file.name.endswith(weights) and file.stat().st_size < SMALL_FILE
    ]
