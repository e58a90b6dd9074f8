"""A checkpoint of any layout as a model of ours: its tensors under our names, and loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unimm.console import no_progress
from unimm.errors import UserError
from unimm.families.family import OWN, Family
from unimm.families.keymap import Entry, KeyMap
from unimm.families.source import Checkpoint
from unimm.models.configuration import UniMMConfig
from unimm.models.modeling import UniMMModel
from unimm.models.weights import is_finite
from unimm.processing.processor import UniMMProcessor

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "all": (),
    "understand": ("code_embedding.", "code_head.", "image_tokenizer."),
    "draw": ("vision.", "connector."),
}
PARTS = tuple(LEFT_OUT)  # that can be loaded


def key_map(family: Family, layout: str, config: UniMMConfig) -> KeyMap:
    """Return the map between our tensors and those of a family's layout, for a model of this configuration."""
    map_ = family.key_map(layout, config)
    return map_ if config.decoder_config().tie_word_embeddings else dataclasses.replace(map_, tied=())


def build_skeleton(config: UniMMConfig, tensors: int, where: Path) -> UniMMModel:
    """Return the model on the meta device: every shape, no memory.

    Args:
        config: what to build.
        tensors: how many the checkpoint has; a model of more blocks than that is refused before it is built.
        where: the checkpoint, for errors.
    """
    decoder = config.decoder_config()
    encoder = config.encoder or {}
    given = (encoder, encoder.get("kwargs", {}))
    depth = max(decoder.num_hidden_layers, *(fields.get("depth") or 0 for fields in given))
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
        UserError: tensors are missing, surplus, of another shape or kind; or, when one is asked for, it is not finite.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors, self._folder = checkpoint.tensors, checkpoint.folder
        self.config = checkpoint.config
        self._map = key_map(checkpoint.family, checkpoint.layout, self.config)
        self._wanted = build_skeleton(self.config, len(self._tensors), self._folder).state_dict()
        entries, self.kept = self._map.plan(self._wanted, self._tensors.shapes, str(self._folder))
        self._entries: dict[str, Entry | None] = {entry.ours: entry for entry in entries}
        self._entries |= {name: None for name in self._wanted if self._map.constant(name) is not None}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry is None:
            value, wanted = self._map.constant(name), self._wanted[name]
            assert value is not None
            return torch.full(wanted.shape, value, dtype=wanted.dtype)
        theirs = {source: self._tensors[source] for source in entry.theirs}
        for source, part in theirs.items():
            if not is_finite(part):
                raise UserError(f"{self._folder}: {source} holds NaN or infinite values")
            if entry.op.zeros is not None and bool(entry.op.zeros(part).any()):
                beyond = list(entry.op.zeros(part).shape)
                raise UserError(
                    f"{self._folder}: {source}: expected zeros in the {beyond} that the model does not use"
                )
        tensor = entry.op.to_ours(list(theirs.values()))
        return tensor.clone(memory_format=torch.contiguous_format)  # two of ours may come from one of theirs

    def shape(self, name: str) -> Tensor:
        """Return one of them on the meta device, with the checkpoint's kind of numbers."""
        entry = self._entries[name]
        wanted: Tensor = self._wanted[name]
        return wanted if entry is None else wanted.to(self._tensors.shapes[entry.theirs[0]].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def check_parts(config: UniMMConfig, parts: str) -> None:
    """Check that a model has the side that is asked for, and another that can be left out.

    Raises:
        UserError: it has not, or there is no such side.
    """
    if parts not in PARTS:
        raise UserError(f"parts: {parts!r}; use {', '.join(PARTS)}")
    views, generation = config.views_config(), config.generation_config()
    if parts == "understand" and views is None:
        raise UserError("parts: 'understand', but this model understands no images; use 'all'")
    if parts == "draw" and generation is None:
        raise UserError("parts: 'draw', but this model cannot draw; use 'all'")
    if parts != "all" and generation is not None and generation.shared:
        raise UserError(
            f"parts: {parts!r}, but this model sees images as it draws them, by their codes; use 'all'"
        )


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, parts: str = "all"
) -> tuple[UniMMModel, UniMMProcessor]:
    """Load a checkpoint of any layout, on the CPU.

    Args:
        checkpoint: what to load; its tensors are let go of.
        dtype: of the model.
        parts: one of `PARTS`; weights of what is left out are not read.

    Raises:
        UserError: it is broken or not supported.
    """
    with checkpoint:
        ours = OurTensors(checkpoint)  # names what does not fit before anything is read
        check_parts(ours.config, parts)
        own = checkpoint.layout == OWN and parts == "all"  # transformers reads these files itself
        needed = [name for name in ours if not name.startswith(LEFT_OUT[parts])]
        with no_progress():
            model = UniMMModel.from_pretrained(
                checkpoint.folder if own else None,
                config=ours.config,
                dtype=dtype,
                parts=parts,
                **({} if own else {"state_dict": {name: ours[name] for name in needed}}),
            )
    checkpoint.processor.leave_out(parts)
    return model, checkpoint.processor
