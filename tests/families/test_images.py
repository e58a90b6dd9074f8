"""Real artwork of odd sizes and modes, prepared as by transformers' PIL-backed processors, down to the codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Emu3ForConditionalGeneration, Emu3Processor, JanusForConditionalGeneration
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

import unimm
from tests.families.emu3_checkpoints import emu3
from tests.families.janus_checkpoints import janus
from unimm.data.emojiscenes.concepts import ARTWORK_FAMILIES, BACKGROUNDS, CONCEPTS, load_artwork
from unimm.data.emojiscenes.pack import slug
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.pipeline import UniMM

SIZES = (
    (37, 411),
    (640, 113),
    (385, 384),
    (384, 385),
    (15, 14),
    (97, 97),
    (383, 5),
    (200, 301),
    (64, 641),
    (33, 8),
)
MODES = ("RGB", "RGBA", "L", "P", "CMYK")


def art(number: int) -> Image.Image:
    """The image of a number: an emoji on a coloured ground or a whole scene, of odd size, in one of the modes."""
    size = SIZES[number % len(SIZES)]
    if number % 4 == 3:
        scene = Image.fromarray(EmojiScenes("train", size=96)[number].render())
        image = scene.resize(size, Image.Resampling.LANCZOS)
    else:
        family = sorted(set(ARTWORK_FAMILIES))[number % len(ARTWORK_FAMILIES)]
        emoji = load_artwork(family)[slug(CONCEPTS[number])]
        ground = Image.new("RGBA", emoji.size, (*list(BACKGROUNDS.values())[number % len(BACKGROUNDS)], 255))
        image = Image.alpha_composite(ground, emoji).resize(size, Image.Resampling.LANCZOS)
    return image.convert(MODES[number // 2 % len(MODES)])


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    made = [art(number) for number in range(50)]
    assert {image.mode for image in made} == set(MODES) and {image.size for image in made} == set(SIZES)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    janus(folder / "janus")
    emu3(folder / "emu3")
    return folder


@pytest.fixture(scope="module")
def of_janus(folder: Path) -> UniMM:
    return unimm.load(folder / "janus", device="cpu")


@pytest.fixture(scope="module")
def of_emu3(folder: Path) -> UniMM:
    return unimm.load(folder / "emu3", device="cpu")


@torch.no_grad()
def test_janus(folder: Path, of_janus: UniMM, images: list[Image.Image]) -> None:
    reference = JanusImageProcessorPil.from_pretrained(folder / "janus")
    expected = torch.cat(
        [reference(image.convert("RGB"), return_tensors="pt")["pixel_values"] for image in images]
    )
    pixels = of_janus.processor.look(images).pixels
    deviation = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    assert ((pixels - expected) * deviation).abs().max() <= 1 / 255
    vq = JanusForConditionalGeneration.from_pretrained(folder / "janus").eval().model.vqmodel
    latents = F.normalize(vq.quant_conv(vq.encoder(expected)).movedim(1, -1), dim=-1)  # [B, h, w, D]
    nearest = (latents @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(-1)
    codes = of_janus.image_tokenizer.encode(pixels)
    assert torch.equal(codes, nearest) and len(codes.unique()) > 5


@torch.no_grad()
def test_emu3(folder: Path, of_emu3: UniMM, images: list[Image.Image]) -> None:
    processor = Emu3Processor.from_pretrained(folder / "emu3")
    processor.downsample_ratio = 4  # fixed at 8 in its code
    theirs = Emu3ForConditionalGeneration.from_pretrained(folder / "emu3").eval().model
    deviation = torch.tensor([0.5, 0.5, 0.6]).view(3, 1, 1)
    seen: set[int] = set()
    for image in images:
        expected = processor.image_processor(image, return_tensors="pt")
        mine = of_emu3.processor(["a red apple"], [[image]])
        assert torch.equal(mine["image_sizes"], expected["image_sizes"])
        assert ((mine["pixel_values"] - expected["pixel_values"]) * deviation).abs().max() <= 1 / 255
        tokens = theirs.get_image_tokens(expected["pixel_values"], expected["image_sizes"])
        codes = of_emu3.image_tokenizer.encode(mine["pixel_values"])[0]
        assert torch.equal(of_emu3.model.layout.tokens(codes), tokens)
        text = "You are a helpful assistant. USER: <image>a red apple ASSISTANT:"
        asked = processor(text=[text], images=[image], return_tensors="pt")
        assert torch.equal(mine["input_ids"], asked["input_ids"])
        seen |= set(codes.flatten().tolist())
    assert len(seen) > 5


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_what_the_reference_would_spoil_is_brought_to_rgb_first(
    folder: Path, of_janus: UniMM, mode: str
) -> None:
    """Transparency lies on white here and is dropped there; 16-bit grey is scaled here and clipped there."""
    image = load_artwork("noto")[slug("red apple")].resize((61, 37))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    given, flat = image, white
    if mode == "P":
        given = white.quantize(16)
        clear = given.getpixel((0, 0))
        flat = Image.fromarray(
            np.where(np.asarray(given)[..., None] == clear, 255, np.asarray(given.convert("RGB")))
        )
        palette = given.getpalette() or []
        given.putpalette([9 if index // 3 == clear else level for index, level in enumerate(palette)])
        given.info["transparency"] = clear
    elif mode == "I;16":
        flat = white.convert("L").convert("RGB")
        given = Image.fromarray(np.asarray(flat)[..., 0].astype(np.uint16) * 257)
    assert given.mode == mode
    reference = JanusImageProcessorPil.from_pretrained(folder / "janus")
    deviation = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    pixels = of_janus.processor.look([given]).pixels
    expected, spoilt = (
        reference(one, return_tensors="pt")["pixel_values"] for one in (flat, given.convert("RGB"))
    )
    assert ((pixels - expected) * deviation).abs().max() <= 1 / 255
    assert ((pixels - spoilt) * deviation).abs().max() > 0.1
