"""Image tokenizers alone: LlamaGen's VQ-8 and VQ-16, Emu3's vision tokenizer, and our own, in and out.

LlamaGen publishes one file of weights without a configuration, so its sizes are read off the tensors.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.console import no_progress
from unimm.errors import UserError
from unimm.families import llamagen, movq
from unimm.families.keymap import KeyMap
from unimm.families.tensors import SINGLES, WeightFiles
from unimm.files import read_json, settled
from unimm.folders import write_folder
from unimm.models.image_tokenizers.movq import MoVQConfig, MoVQTokenizer
from unimm.models.image_tokenizers.quantizers import AveragedCodebook
from unimm.models.image_tokenizers.vq import ImageTokenizer, ImageTokenizerConfig
from unimm.models.weights import check_finite

IMAGE_SIZE = 384  # pixels a side that LlamaGen's larger models and Janus draw
OWN: dict[str, Any] = {"unimm_vq": ImageTokenizer, "unimm_movq": MoVQTokenizer}  # classes by `model_type`
KEPT_FILE, SOURCE_CONFIG_FILE = "kept.safetensors", "source.config.json"
AnyTokenizer: TypeAlias = ImageTokenizer | MoVQTokenizer


@dataclasses.dataclass(frozen=True)
class PublishedTokenizer:
    """How a kind of image tokenizer is published.

    Attributes:
        build: makes one of ours with the sizes of a file or folder whose weights are open, yet without them.
        key_map: the map between its tensors and those of one of ours.
        check: refuses one of ours (from the folder that is named) for which there is no place.
    """

    build: Callable[[Path, WeightFiles], AnyTokenizer]
    key_map: Callable[[Any], KeyMap]
    check: Callable[[Any, Path], None]


def _llamagen(path: Path, weights: WeightFiles) -> ImageTokenizer:
    options = llamagen.tokenizer_options(weights.shapes, "conv_blocks", "res", str(path))
    return ImageTokenizer(ImageTokenizerConfig(image_size=IMAGE_SIZE, **options))


def _check_llamagen(own: ImageTokenizer, where: Path) -> None:
    if not isinstance(own.quantize, AveragedCodebook):
        kind = own.config.quantizer["kind"]
        raise UserError(
            f"{where}: LlamaGen's layout has no place for this quantiser (kind {kind}); keep it as it is"
        )


def _emu3(path: Path, weights: WeightFiles) -> MoVQTokenizer:
    config = path / "config.json"
    return MoVQTokenizer(MoVQConfig(**movq.tokenizer_options(read_json(config), str(config))))


LLAMAGEN = PublishedTokenizer(_llamagen, lambda own: llamagen.KEY_MAP, _check_llamagen)
EMU3 = PublishedTokenizer(
    _emu3,
    lambda own: movq.tokenizer_map("original", len(own.config.block_out_channels)),
    lambda own, where: None,
)
PUBLISHED = {movq.MODEL_TYPE: EMU3}  # folders, by the `model_type` of their `config.json`
ORIGINS: dict[type, PublishedTokenizer] = {ImageTokenizer: LLAMAGEN, MoVQTokenizer: EMU3}  # of ours


def is_image_tokenizer(source: Path) -> bool:
    """Whether a source is an image tokenizer alone: a file of weights, or a folder that says so."""
    if settled(source).is_file():
        return True
    config = source / "config.json"
    return config.exists() and describes_image_tokenizer(read_json(config))


def describes_image_tokenizer(document: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of an image tokenizer alone."""
    return document.get("model_type") in (*OWN, *PUBLISHED)


def load_image_tokenizer(source: str | Path) -> AnyTokenizer:
    """Load an image tokenizer, on the CPU and in float32, whatever it was saved in.

    Args:
        source: a weight file of LlamaGen (`vq_ds16_c2i.pt`), the folder of Emu3's vision tokenizer, or of ours.

    Raises:
        UserError: it is none of these, or broken.
    """
    path = settled(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        kind = read_json(path / "config.json").get("model_type")
        if isinstance(kind, str) and kind in OWN:
            with no_progress():
                own: AnyTokenizer = OWN[kind].from_pretrained(path, dtype=torch.float32)
            return own
        if kind not in PUBLISHED:
            known = ", ".join((*OWN, *PUBLISHED))
            raise UserError(
                f"{path / 'config.json'}: model_type: {kind!r} is no image tokenizer; known are {known}"
            )
    return _read(path)[0]


def _read(path: Path) -> tuple[AnyTokenizer, dict[str, Tensor]]:
    """Read a foreign tokenizer, and what of it has no place in ours."""
    published = PUBLISHED[read_json(path / "config.json")["model_type"]] if path.is_dir() else LLAMAGEN
    with WeightFiles.of(path) as weights:
        model = published.build(path, weights)
        map_ = published.key_map(model)
        wanted = model.state_dict()
        entries, kept = map_.plan(wanted, weights.shapes, str(path))
        state = {e.ours: e.op.to_ours([weights[name] for name in e.theirs]) for e in entries}
        constants = {name: map_.constant(name) for name in wanted}
        state |= {
            name: torch.full(wanted[name].shape, value, dtype=wanted[name].dtype)
            for name, value in constants.items()
            if value is not None
        }
        model.load_state_dict(state)
        check_finite(model, str(path))
        nn.Module.eval(model)
        return model, {name: weights[name].clone() for name in kept}


def convert_image_tokenizer(source: Path, folder: Path, to: str) -> None:
    """Write an image tokenizer alone in our layout or in its original's.

    Raises:
        UserError: the source is broken, or there is no such layout for it.
    """
    if to == "unimm":
        model, kept = _read(source)

        def write_ours(target: Path) -> None:
            model.save_pretrained(target)
            if kept:
                save_file(kept, target / KEPT_FILE)
            if source.is_dir():
                shutil.copyfile(source / "config.json", target / SOURCE_CONFIG_FILE)

        write_folder(folder, write_ours)
        return
    if to != "original" or source.is_file():
        raise UserError(f"--to: {to!r}; an image tokenizer alone goes to unimm, and from there to original")
    own = load_image_tokenizer(source)
    published = ORIGINS[type(own)]
    published.check(own, source)
    map_ = published.key_map(own)
    state = own.state_dict()
    weights: dict[str, Tensor] = {}
    for entry in map_.returned(state):
        parts = entry.op.to_theirs(state[entry.ours], len(entry.theirs))
        weights |= {name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)}
    if (source / KEPT_FILE).exists():
        with WeightFiles.of(source / KEPT_FILE) as beside:
            weights |= {name: beside[name].clone() for name in beside}

    def write_theirs(target: Path) -> None:
        save_file(weights, target / SINGLES[0], metadata={"format": "pt"})
        if (source / SOURCE_CONFIG_FILE).exists():
            shutil.copyfile(source / SOURCE_CONFIG_FILE, target / "config.json")

    write_folder(folder, write_theirs)
