"""Recognise a foreign checkpoint, load it, and write one in another layout, tensor by tensor.

A converted folder keeps what unimm has no module for (`kept.safetensors`) and the source's own small files
(`source.NAME`), so that going back to the same layout loses nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor

from unimm.configuration import UniMMConfig
from unimm.errors import UserError
from unimm.interop import emu3, janus
from unimm.interop.image_tokenizers import convert_image_tokenizer, is_image_tokenizer
from unimm.interop.keymap import Entry, KeyMap, Rule
from unimm.interop.source import INDEXES, SINGLES, Checkpoint, NoWeightsError, read_json
from unimm.modeling import UniMMModel
from unimm.processing import UniMMProcessor, read_tokenizer
from unimm.saving import no_progress, write_folder

LAYOUTS = ("unimm", "transformers", "original")
FAMILIES = {"janus": janus, "emu3": emu3}
# of `config.json`: family and layout
MODEL_TYPES: dict[str, tuple[str, str]] = {"unimm": ("unimm", "unimm")} | {
    kind: (name, layout) for name, family in FAMILIES.items() for kind, layout in family.MODEL_TYPES.items()
}
KEPT_FILE = "kept.safetensors"
SOURCE_PREFIX = "source."  # of the files that a converted folder keeps of its source
SHARD_BYTES = 2**29  # of a written shard; small, so that little is in memory at once
SMALL_FILE = 2**26  # larger files of a source that are no weights are not kept
OWN = KeyMap(rules=(Rule("{rest}", "{rest}"),), tied=("decoder.lm_head.weight",))


def recognise(folder: Path) -> tuple[str, str]:
    """Return the family of a checkpoint folder (unimm, janus, emu3) and its layout (one of `LAYOUTS`).

    Raises:
        UserError: its `config.json` is missing or of a kind that is not supported.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"{folder / 'config.json'}: model_type: {kind!r} is not supported; known are {known}")
    return MODEL_TYPES[kind]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint of any layout, with what belongs to it in other folders."""
    return Checkpoint(folder, _beside(folder))


def _beside(folder: Path) -> dict[str, Path]:
    """Further folders of a checkpoint, by the prefix that their tensors' names get."""
    family, layout = recognise(folder)
    found: dict[str, Path] = {} if family == "unimm" else FAMILIES[family].beside(folder, layout)
    return found


def read_unimm_config(folder: Path, shapes: Mapping[str, Tensor]) -> UniMMConfig:
    """Return our configuration of a checkpoint of any layout, whose tensors have these shapes."""
    family, layout = recognise(folder)
    if family == "unimm":
        return UniMMConfig.from_dict(read_json(folder / "config.json"))
    try:
        config: UniMMConfig = FAMILIES[family].unimm_config(folder, layout, shapes)
    except UserError:
        raise
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        # a field of the wrong kind
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None
    return config


def read_config(folder: Path) -> UniMMConfig:
    """Return our configuration of a checkpoint of any layout, whether its weights are there or not."""
    if recognise(folder)[0] == "unimm":
        return read_unimm_config(folder, {})
    try:
        with open_checkpoint(folder) as checkpoint:
            return read_unimm_config(folder, checkpoint.shapes)
    except NoWeightsError:
        return read_unimm_config(folder, {})


def key_map(layout: str, config: UniMMConfig) -> KeyMap:
    """Return the map between our tensors and those of a layout of the model's family."""
    return OWN if layout == "unimm" else _family(config).key_map(layout, config)


def _family(config: UniMMConfig) -> ModuleType:
    """The family whose layouts a model may be written in."""
    return next(family for family in FAMILIES.values() if family.holds(config))


def build_skeleton(config: UniMMConfig, tensors: int, where: Path) -> UniMMModel:
    """Return the model on the meta device: every shape, no memory.

    Args:
        config: what to build.
        tensors: how many the checkpoint has; a model of more blocks than that is refused before it is built.
        where: the checkpoint, for errors.
    """
    decoder = config.decoder_config()
    depth = max(decoder.num_hidden_layers, (config.vision or {}).get("kwargs", {}).get("depth") or 0)
    if depth > tensors:
        raise UserError(f"{where}: config.json asks for {depth} layers, the weights hold {tensors} tensors")
    try:
        with torch.device("meta"):
            return UniMMModel(config)
    except (ValueError, RuntimeError, TypeError, OverflowError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: config.json describes no model that can be built ({reason})") from None


class OurTensors(Mapping[str, Tensor]):
    """A checkpoint of any layout, seen as our model's tensors; each is made when it is asked for.

    Attributes:
        config: our configuration of it.
        kept: names, in the checkpoint, of what no module here needs.

    Raises:
        UserError: tensors are missing, surplus or of another shape.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.config = read_unimm_config(folder, checkpoint.shapes)
        self._map = key_map(recognise(folder)[1], self.config)
        self._wanted = build_skeleton(self.config, len(checkpoint), folder).state_dict()
        entries, self.kept = self._map.plan(self._wanted, checkpoint.shapes, str(folder))
        self._entries: dict[str, Entry | None] = {entry.ours: entry for entry in entries}
        self._entries |= {name: None for name in self._wanted if self._map.constant(name) is not None}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry is None:
            value, wanted = self._map.constant(name), self._wanted[name]
            assert value is not None
            return torch.full(wanted.shape, value, dtype=wanted.dtype)
        tensor = entry.op.to_ours([self._checkpoint[source] for source in entry.theirs])
        return tensor.clone(memory_format=torch.contiguous_format)  # two of ours may come from one of theirs

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load_foreign(folder: Path, dtype: torch.dtype) -> tuple[UniMMModel, UniMMProcessor]:
    """Load a checkpoint of a foreign layout as our model, on the CPU.

    Raises:
        UserError: it is broken or not supported.
    """
    with open_checkpoint(folder) as checkpoint, no_progress():
        ours = OurTensors(folder, checkpoint)
        state = dict(ours)
        model = UniMMModel.from_pretrained(None, config=ours.config, state_dict=state, dtype=dtype)
    return model, read_processor(folder, ours.config)


def read_processor(folder: Path, config: UniMMConfig) -> UniMMProcessor:
    """The processor of a checkpoint of any layout, on its own tokenizer."""
    family = recognise(folder)[0]
    words = read_tokenizer(folder) if family == "unimm" else FAMILIES[family].read_words(folder)
    return UniMMProcessor.from_config(config, words)


def convert(source: Path, folder: Path, to: str) -> None:
    """Write a checkpoint in another layout; the weights go through shard by shard.

    Args:
        source: a folder of any supported layout, or an image tokenizer alone.
        folder: where to write; an old one of the same layout is replaced once all is written.
        to: one of `LAYOUTS`.

    Raises:
        UserError: the source is broken, or the layout has no place for what the model has.
    """
    if to not in LAYOUTS:
        raise UserError(f"--to: {to!r}; one of {', '.join(LAYOUTS)}")
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder}: is the source itself; name another folder")
    if is_image_tokenizer(source):
        convert_image_tokenizer(source, folder, to)
        return
    layout = recognise(source)[1]
    with open_checkpoint(source) as checkpoint:
        ours = OurTensors(source, checkpoint)
        family, map_ = _family(ours.config), key_map(to, ours.config)
        processor = read_processor(source, ours.config)
        # A model that was saved again since has no files of its source's beside it any more.
        filed = (source / f"{SOURCE_PREFIX}config.json").exists()
        back = layout == to or (filed and getattr(ours.config, "source_layout", None) == to)
        if to != "unimm" and not back:
            family.check_writable(ours.config, processor, to, str(source))
        kept = _kept(source, ours, checkpoint) if back or to == "unimm" else {}
        subfolders: dict[str, str] = {} if to == "unimm" else family.SUBFOLDERS.get(to, {})

        def write(target: Path) -> None:
            extra = kept if to != "unimm" else {}
            _write_weights(target, chain(_translated(ours, map_, "", subfolders), extra.items()))
            for prefix, name in subfolders.items():
                (target / name).mkdir()
                _write_weights(target / name, _translated(ours, map_, prefix, subfolders))
            if to == "unimm":
                _write_own_files(source, target, ours, processor, kept)
            elif back:
                _copy_back(source, target, subfolders)
            else:
                family.write_files(ours.config, processor, target, to)

        write_folder(folder, write)


def _translated(
    ours: OurTensors, map_: KeyMap, prefix: str, subfolders: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Their names (without the prefix) and tensors of one folder, one of ours after the other."""
    for entry in map_.returned(ours):
        place = next((other for other in subfolders if entry.theirs[0].startswith(other)), "")
        if place != prefix or (entry.ours in map_.tied and ours.config.tie_word_embeddings):
            continue
        parts = entry.op.to_theirs(ours[entry.ours], len(entry.theirs))
        names = (name.removeprefix(prefix) for name in entry.theirs)
        yield from zip(names, (part.contiguous() for part in parts), strict=True)


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


def _kept(source: Path, ours: OurTensors, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the source has beyond our model: in its weights, or beside them if it was converted before."""
    if (source / KEPT_FILE).exists():
        with Checkpoint(source / KEPT_FILE) as beside:
            return {name: beside[name].clone() for name in beside}
    return {name: checkpoint[name].clone() for name in ours.kept}


def _write_own_files(
    source: Path, target: Path, ours: OurTensors, processor: UniMMProcessor, kept: dict[str, Tensor]
) -> None:
    """Write our configuration and processor, the source's small files and what we have no module for."""
    family, layout = recognise(source)
    if family == "unimm":
        for file in _small_files(source, SOURCE_PREFIX):
            shutil.copyfile(file, target / file.name)
    else:
        ours.config.source_layout = layout
        subfolders = FAMILIES[family].SUBFOLDERS.get(layout, {})
        places = {"": source} | {f"{subfolders[prefix]}.": place for prefix, place in _beside(source).items()}
        for name, place in places.items():
            for file in _small_files(place, ""):
                shutil.copyfile(file, target / f"{SOURCE_PREFIX}{name}{file.name}")
    ours.config.save_pretrained(target)
    processor.save_pretrained(target)
    if kept:
        save_file(kept, target / KEPT_FILE)


def _copy_back(source: Path, target: Path, subfolders: Mapping[str, str]) -> None:
    """Put the small files of a checkpoint's own layout back where they were."""
    prefix = SOURCE_PREFIX if recognise(source)[0] == "unimm" else ""
    for file in _small_files(source, prefix):
        name = file.name.removeprefix(prefix)
        inner = next((folder for folder in subfolders.values() if name.startswith(f"{folder}.")), None)
        place = target if inner is None else target / inner
        shutil.copyfile(file, place / (name if inner is None else name.removeprefix(f"{inner}.")))


def _small_files(folder: Path, prefix: str) -> list[Path]:
    """Return the files of a checkpoint that are no weights: configuration, tokenizer, processor, readme."""
    weights = (".safetensors", ".bin", ".pt", ".safetensors.index.json", ".bin.index.json")
    return [
        file
        for file in sorted(folder.glob(f"{prefix}*"))
        if file.is_file() and not file.name.endswith(weights) and file.stat().st_size < SMALL_FILE
    ]
