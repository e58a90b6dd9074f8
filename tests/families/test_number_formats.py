"""One number format for every part of a model, whatever any of a checkpoint's configs names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import unimm
from tests.families.both_families import write_checkpoints
from tests.families.sixteen_bits import save_in_16_bits
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.image_tokenizers import load_image_tokenizer
from unimm.models.lora import LoraSection, add_adapters, save_adapters
from unimm.pipeline import UniMM

LAYOUTS = ("unimm", "janus/transformers", "janus/original", "emu3/transformers", "emu3/original")
BOTH_WAYS = [
    ("janus/transformers", "original"),
    ("janus/original", "transformers"),
    ("emu3/transformers", "original"),
    ("emu3/original", "transformers"),
]


@pytest.fixture(scope="module")
def named(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each layout, saved from 16 bits, in whose configs every section names a format."""
    folder = tmp_path_factory.mktemp("formats")
    shutil.copytree(tiny, folder / "unimm")
    write_checkpoints(folder)
    save_in_16_bits(folder)
    return folder


def formats(um: UniMM) -> set[torch.dtype]:
    return {p.dtype for p in um.model.parameters() if p.is_floating_point()}


@torch.no_grad()
def use(um: UniMM) -> None:
    """Every way through the model: images in, text logits out, codes out."""
    image = Image.new("RGB", (40, 24), "red")
    inputs = um.processor(["what is this?", "it"], [[image], [image, image]])
    assert um.model(**inputs).logits.isfinite().all()
    stride = um.image_tokenizer.stride
    size = (2 * stride, 2 * stride) if um.model.layout.shared else None
    assert len(um.draw(["a red apple", "it"], guidance_scale=2.0, size=size)) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_format_named_by_a_part_is_not_followed(named: Path, layout: str, dtype: str) -> None:
    um = unimm.load(named / layout, device="cpu", dtype=dtype)
    assert formats(um) == {getattr(torch, dtype)}
    use(um)


def test_float16(named: Path) -> None:
    um = unimm.load(named / "janus/original", device="cpu", dtype="float16")
    assert formats(um) == {torch.float16}
    use(um)
    assert isinstance(um.caption(Image.new("RGB", (40, 24), "red"), 8), str)


@pytest.mark.parametrize("layout", LAYOUTS[::2])
def test_int8_weights_lie_beside_parts_of_the_format_asked_for(named: Path, layout: str) -> None:
    um = unimm.load(named / layout, device="cpu", dtype="float32", quantize="int8")
    assert formats(um) == {torch.float32}
    use(um)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_convert_writes_is_of_one_format_too(named: Path, tmp_path: Path, layout: str) -> None:
    convert(named / layout, tmp_path / "ours", "unimm")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert not {"dtype", "torch_dtype"} & (written["decoder"].keys() | written["image_tokenizer"].keys())
    again = unimm.load(tmp_path / "ours", device="cpu", dtype="float32")
    assert formats(again) == {torch.float32}
    use(again)


@pytest.mark.parametrize(("layout", "to"), BOTH_WAYS)
def test_from_one_published_layout_to_the_other(named: Path, tmp_path: Path, layout: str, to: str) -> None:
    convert(named / layout, tmp_path / "theirs", to)
    um = unimm.load(tmp_path / "theirs", device="cpu", dtype="float32")
    assert formats(um) == {torch.float32}
    use(um)


@pytest.mark.parametrize("layout", LAYOUTS[::2])
def test_saved_and_loaded_in_another_format(named: Path, tmp_path: Path, layout: str) -> None:
    unimm.load(named / layout, device="cpu", dtype="bfloat16").save(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values() if t.is_floating_point()} == {
        torch.bfloat16
    }
    again = unimm.load(tmp_path, device="cpu", dtype="float32")
    assert formats(again) == {torch.float32}
    use(again)


@pytest.mark.parametrize("layout", ["janus/original", "emu3/transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_leave_the_format_as_it_is(named: Path, tmp_path: Path, layout: str, dtype: str) -> None:
    model = unimm.load(named / layout, device="cpu", dtype="bfloat16").model
    add_adapters(model, LoraSection(r=2, modules=["q_proj"]))
    save_adapters(model, tmp_path, None)
    um = unimm.load(named / layout, device="cpu", dtype=dtype, adapter=tmp_path)
    assert formats(um) == {getattr(torch, dtype)}
    use(um)


def test_an_image_tokenizer_saved_in_16_bits_encodes_images(named: Path, tmp_path: Path) -> None:
    tokenizer = unimm.load(named / "unimm", device="cpu", dtype="bfloat16").image_tokenizer
    tokenizer.save_pretrained(tmp_path)
    for folder in (tmp_path, named / "emu3/original/Emu3-VisionTokenizer"):
        loaded = load_image_tokenizer(folder)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        codes = loaded.encode(torch.zeros(1, 3, 32, 32))
        assert loaded.decode(codes).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_formats_that_no_model_computes_in_are_refused(tiny: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"dtype: torch\.\w+; use auto, float32, bfloat16, float16"):
        unimm.load(tiny, dtype=dtype)
