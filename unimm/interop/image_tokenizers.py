"""Image tokenizers alone: LlamaGen's VQ-8 and VQ-16, Emu3's vision tokenizer, and our own, in and out.

LlamaGen publishes one file of weights without a configuration, so its sizes are read off the tensors.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.errors import UserError
from unimm.interop import emu3, llamagen
from unimm.interop.keymap import KeyMap
from unimm.interop.source import SINGLES, Checkpoint, read_json
from unimm.saving import no_progress, write_folder
from unimm.tokenizers.model import ImageTokenizer, ImageTokenizerConfig
from unimm.tokenizers.movq import MoVQConfig, MoVQTokenizer
from unimm.tokenizers.quantizers import AveragedCodebook

IMAGE_SIZE = 384  # pixels a side that LlamaGen's larger models and Janus draw
OWN: dict[str, Any] = {"unimm_vq": ImageTokenizer, "unimm_movq": MoVQTokenizer}  # classes by `model_type`
EMU3 = "Emu3VisionVQ"
KEPT_FILE, CONFIG_FILE = "kept.safetensors", "source.config.json"
LLAMAGEN = KeyMap(
    rules=tuple(llamagen.ORIGINAL),
    kept=llamagen.KEPT,
    constants=llamagen.CONSTANTS,
    derived=llamagen.DERIVED,
)


def is_image_tokenizer(source: Path) -> bool:
    """Whether a source is an image tokenizer alone: a file of weights, or a folder that says so."""
    if source.is_file():
        return True
    config = source / "config.json"
    return config.exists() and read_json(config).get("model_type") in (*OWN, EMU3)


def load_image_tokenizer(source: str | Path) -> ImageTokenizer | MoVQTokenizer:
    """Load an image tokenizer, on the CPU.

    Args:
        source: a weight file of LlamaGen (`vq_ds16_c2i.pt`), the folder of Emu3's vision tokenizer, or of ours.

    Raises:
        UserError: it is none of these, or broken.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        kind = read_json(path / "config.json").get("model_type")
        if kind in OWN:
            with no_progress():
                own: ImageTokenizer | MoVQTokenizer = OWN[kind].from_pretrained(path)
            return own
        if kind != EMU3:
            known = ", ".join((*OWN, EMU3))
            raise UserError(
                f"{path / 'config.json'}: model_type: {kind!r} is no image tokenizer; known are {known}"
            )
    return _read(path)[0]


def _read(path: Path) -> tuple[ImageTokenizer | MoVQTokenizer, dict[str, Tensor]]:
    """Read a foreign tokenizer, and what of it has no place in ours."""
    model: ImageTokenizer | MoVQTokenizer
    with Checkpoint(path) as checkpoint:
        if path.is_dir():
            where = str(path / "config.json")
            model = MoVQTokenizer(
                MoVQConfig(**emu3.tokenizer_options(read_json(path / "config.json"), where))
            )
            map_ = emu3.tokenizer_map("original", len(model.config.block_out_channels))
        else:
            options = llamagen.tokenizer_options(checkpoint.shapes, "conv_blocks", "res", str(path))
            model, map_ = ImageTokenizer(ImageTokenizerConfig(image_size=IMAGE_SIZE, **options)), LLAMAGEN
        wanted = model.state_dict()
        entries, kept = map_.plan(wanted, checkpoint.shapes, str(path))
        state = {e.ours: e.op.to_ours([checkpoint[name] for name in e.theirs]) for e in entries}
        constants = {name: map_.constant(name) for name in wanted}
        state |= {
            name: torch.full(wanted[name].shape, value, dtype=wanted[name].dtype)
            for name, value in constants.items()
            if value is not None
        }
        model.load_state_dict(state)
        nn.Module.eval(model)
        return model, {name: checkpoint[name].clone() for name in kept}


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
                shutil.copyfile(source / "config.json", target / CONFIG_FILE)

        write_folder(folder, write_ours)
        return
    if to != "original" or source.is_file():
        raise UserError(f"--to: {to!r}; an image tokenizer alone goes to unimm, and from there to original")
    own = load_image_tokenizer(source)
    if isinstance(own, ImageTokenizer) and not isinstance(own.quantize, AveragedCodebook):
        kind = own.config.quantizer["kind"]
        raise UserError(
            f"{source}: LlamaGen's layout has no place for this quantiser (kind {kind}); keep it as it is"
        )
    levels = len(own.config.block_out_channels)
    map_ = LLAMAGEN if isinstance(own, ImageTokenizer) else emu3.tokenizer_map("original", levels)
    state = own.state_dict()
    weights: dict[str, Tensor] = {}
    for entry in map_.returned(state):
        parts = entry.op.to_theirs(state[entry.ours], len(entry.theirs))
        weights |= {name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)}
    if (source / KEPT_FILE).exists():
        with Checkpoint(source / KEPT_FILE) as beside:
            weights |= {name: beside[name].clone() for name in beside}

    def write_theirs(target: Path) -> None:
        save_file(weights, target / SINGLES[0], metadata={"format": "pt"})
        if (source / CONFIG_FILE).exists():
            shutil.copyfile(source / CONFIG_FILE, target / "config.json")

    write_folder(folder, write_theirs)
