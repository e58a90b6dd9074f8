"""EmojiScenes in training: the image codes of its scenes, computed once and kept; captions of its scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unimm.data.emojiscenes import EmojiScenes, Scene
from unimm.images import to_tensor
from unimm.modeling import UniMMModel
from unimm.processing import CAPTION_REQUESTS, UniMMProcessor
from unimm.sampling.text import generate_text
from unimm.tokenizers.model import ImageTokenizer
from unimm.training.kept import Kept, kept_codes


class SceneCodes:
    """The image codes of the first `scenes` training scenes, computed once and kept in one file.

    Args:
        path: the safetensors file; made again if it is of another tokenizer or of other scenes, or too few.
        tokenizer: what encodes.
        scenes: the scenes to encode.
        device: where to encode.

    Raises:
        UserError: the file is no file of image codes, or cannot be written.
    """

    def __init__(
        self, path: Path, tokenizer: ImageTokenizer, scenes: EmojiScenes, device: torch.device
    ) -> None:
        weights = sum(p.detach().double().abs().sum().item() for p in tokenizer.parameters())
        mark = f"{weights:.6f} {scenes.seed} {scenes.size} {scenes.lattice} {scenes.shares}"

        def compute() -> Kept:
            noted = torch.frombuffer(bytearray(mark, "ascii"), dtype=torch.uint8)  # where files always had it
            return {"codes": encode_scenes(tokenizer, scenes, device), "mark": noted}, {}

        self.codes = kept_codes(path, mark, compute, least=len(scenes))[0]["codes"]

    def __getitem__(self, index: int) -> Tensor:
        """Codes [h, w] of a scene."""
        return self.codes[index].long()


def encode_scenes(tokenizer: ImageTokenizer, scenes: EmojiScenes, device: torch.device) -> Tensor:
    """Return the codes int16 [N, h, w] of all scenes, with a progress bar."""
    from rich.progress import track

    nn.Module.to(tokenizer, device)
    starts = range(0, len(scenes), 128)
    codes = []
    for start in track(starts, "image codes"):
        stop = min(start + 128, len(scenes))
        pixels = to_tensor(np.stack([scenes[i].render() for i in range(start, stop)])).to(device)
        codes.append(tokenizer.encode(pixels).to("cpu", torch.int16))
    return torch.cat(codes)


def caption_scenes(model: UniMMModel, processor: UniMMProcessor, scenes: Sequence[Scene]) -> list[str]:
    """Caption scenes in one batch."""
    pictures = [[Image.fromarray(scene.render())] for scene in scenes]
    inputs = processor([CAPTION_REQUESTS[0]] * len(pictures), pictures)
    return generate_text(model, processor, inputs, max_new_tokens=32)
