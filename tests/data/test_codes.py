"""Stored codes: a fingerprint knows all that they depend on; other files are made again, strangers are left."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import unimm
from unimm.data.codes import Cached, StoredCodes, cached_codes, fingerprint
from unimm.data.sources import Reading, open_source
from unimm.errors import UserError
from unimm.families.image_tokenizers import load_image_tokenizer
from unimm.models.configuration import UniMMConfig
from unimm.models.image_tokenizers.vq import ImageTokenizer, ImageTokenizerConfig
from unimm.models.modeling import UniMMModel
from unimm.models.vision import VisionTower
from unimm.pipeline import UniMM
from unimm.processing.processor import TargetSize, UniMMProcessor

MARK = "tokenizer and data"
OLD, NEW = torch.arange(12).view(3, 2, 2), torch.ones(4, 2, 2, dtype=torch.int64)


def compute() -> Cached:
    """New codes, with a note."""
    return {"codes": NEW}, {"bad": "{}"}


def test_a_file_with_the_mark_as_a_note_is_read(tmp_path: Path) -> None:
    file, notes = tmp_path / "codes.safetensors", {"mark": MARK, "bad": '{"1": []}'}
    save_file({"codes": OLD}, file, notes)
    before = file.read_bytes()
    tensors, found = cached_codes(file, MARK, compute, min_codes=2)
    assert torch.equal(tensors["codes"], OLD) and found == notes
    assert file.read_bytes() == before


@pytest.mark.parametrize("fault", ["absent", "damaged", "another mark", "too few"])
def test_any_other_file_is_made_again_once(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "new/codes.safetensors"
    if fault != "absent":
        file.parent.mkdir()
        save_file({"codes": OLD}, file, {"mark": "of old" if fault == "another mark" else MARK})
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:-8])
    min_codes = 4 if fault == "too few" else 0
    for make in (compute, lambda: pytest.fail("made twice")):
        tensors, notes = cached_codes(file, MARK, make, min_codes)
        assert torch.equal(tensors["codes"], NEW) and notes["bad"] == "{}"


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": OLD}, file, {"format": "pt"})
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"model\.safetensors: this is no file of image codes; name another"):
        cached_codes(file, MARK, compute)
    assert file.read_bytes() == before


SIZES: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 8,
    "codebook_size": 32, "codebook_dim": 4,
}  # fmt: skip


def tokenizer_like(other: ImageTokenizer | None = None, **sizes: Any) -> ImageTokenizer:
    """An image tokenizer, with the weights of another."""
    made = ImageTokenizer(ImageTokenizerConfig(**(SIZES | sizes))).eval()
    if other is not None:
        made.load_state_dict(other.state_dict())
    return made


@pytest.mark.parametrize(
    "reading",
    [
        Reading("image_to_text", {"image": "first"}),
        Reading("text_to_image", {"image": "second"}),
        Reading("text_to_image", {"image": "first"}, images="images"),
    ],
)
def test_codes_of_a_source_that_is_read_otherwise_are_made_again(tmp_path: Path, reading: Reading) -> None:
    (tmp_path / "images").mkdir()
    for name, level in (("a.png", 50), ("b.png", 200), ("images/a.png", 100)):
        Image.new("RGB", (64, 64), (level, 0, 0)).save(tmp_path / name)
    if reading.images:
        reading = dataclasses.replace(reading, images=str(tmp_path / reading.images))
    rows, tokenizer = tmp_path / "rows.jsonl", tokenizer_like()
    rows.write_text(json.dumps({"first": "a.png", "second": "b.png", "text": "a square"}) + "\n")

    def stored(reading: Reading) -> list[Tensor]:
        file = tmp_path / "codes.safetensors"
        codes = StoredCodes(
            file, open_source(rows, reading), reading, TargetSize(64, 8), tokenizer, torch.device("cpu")
        )
        return codes.get(0)

    def direct(reading: Reading) -> list[Tensor]:
        images = open_source(rows, reading)[0].images(draw=True)
        pixels = [TargetSize(64, 8).pixels(image.image()) for image in images]
        return [tokenizer.encode(one[None])[0] for one in pixels]

    for one in (Reading("text_to_image", {"image": "first"}), reading):
        found, wanted = stored(one), direct(one)
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


# --- fingerprints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"norm_num_groups": 2}, {"image_size": 32}])
def test_a_tokenizer_of_the_same_weights_and_another_config_has_another_fingerprint(
    sizes: dict[str, Any],
) -> None:
    tokenizer = tokenizer_like()
    assert fingerprint(tokenizer_like(tokenizer)) == fingerprint(tokenizer)
    assert fingerprint(tokenizer_like(tokenizer, **sizes)) != fingerprint(tokenizer)


def test_a_quantiser_without_weights_is_known_by_its_settings() -> None:
    levels = [
        tokenizer_like(codebook_size=None, codebook_dim=None, quantizer={"kind": "fsq", "levels": list(one)})
        for one in ((8, 5), (5, 8))
    ]
    levels[1].load_state_dict(levels[0].state_dict(), strict=False)
    assert len(set(map(fingerprint, levels))) == 2


@pytest.mark.parametrize(
    "target_size",
    [TargetSize(64, 4), TargetSize(32, 8), TargetSize(64, 8, keep_ratio=True)],
    ids=["stride", "side", "ratio"],
)
def test_images_of_another_size_have_another_fingerprint(target_size: TargetSize) -> None:
    assert fingerprint(target_size) == fingerprint(
        TargetSize(target_size.side, target_size.stride, target_size.keep_ratio)
    )
    assert fingerprint(target_size) != fingerprint(TargetSize(64, 8))


def test_data_encoded_by_earlier_versions_keep_their_fingerprint() -> None:
    assert fingerprint(TargetSize(64, 8)) == "99c63f2bad9a34f3"


@pytest.mark.parametrize(
    "change",
    [
        {"kwargs": {"num_heads": 4}}, {"kwargs": {"act_layer": "relu"}},
    ],
    ids=str,
)  # fmt: skip
def test_an_encoder_of_the_same_weights_and_another_config_has_another_fingerprint(
    tiny_model: UniMM, change: dict[str, Any]
) -> None:
    vision = tiny_model.model.vision
    assert vision is not None
    config = dataclasses.replace(
        vision.config,
        **{key: vision.config.kwargs | value if key == "kwargs" else value for key, value in change.items()},
    )
    same, other = VisionTower(vision.config), VisionTower(config)
    for made in (same, other):
        made.load_state_dict(vision.state_dict())
    assert fingerprint(same) == fingerprint(vision) != fingerprint(other)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"rope_theta": 500.0}, {"hidden_act": "gelu"}], ids=str
)
def test_a_model_of_the_same_weights_and_another_config_has_another_fingerprint(
    tiny_model: UniMM, change: dict[str, Any]
) -> None:
    plain = tiny_model.model.config.to_dict()
    made = [UniMMModel(UniMMConfig(**plain | {"decoder": plain["decoder"] | more})) for more in ({}, change)]
    for one in made:
        one.load_state_dict(tiny_model.model.state_dict())
    assert fingerprint(made[0]) == fingerprint(tiny_model.model) != fingerprint(made[1])


def test_a_model_that_is_stored_elsewhere_has_the_same_fingerprint(tiny_model: UniMM, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "copy")
    copy = unimm.load(tmp_path / "copy")
    assert copy.model.config.name_or_path != tiny_model.model.config.name_or_path
    for name in ("model", "processor"):
        assert fingerprint(getattr(copy, name)) == fingerprint(getattr(tiny_model, name)), name
    tokenizer = tiny_model.model.image_tokenizer
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert fingerprint(load_image_tokenizer(tmp_path / "tokenizer")) == fingerprint(tokenizer)


def changed_processor(processor: UniMMProcessor, changed: str) -> UniMMProcessor:
    """A copy in which one thing is another."""
    other = copy.deepcopy(processor)
    turns, layout = other.turns, other.layout
    pipeline = other.tokenizer.backend_tokenizer
    match changed:
        case "template":
            other.turns = dataclasses.replace(turns, template="{{ messages }}")
        case "system":
            other.turns = dataclasses.replace(turns, system="Be brief.")
        case "layout":
            other.layout = dataclasses.replace(layout, end_of_line=1)
        case "pad colour":
            other.views = dataclasses.replace(other.views, pad_colour=(0, 0, 0))
        case "mean":
            other.views = dataclasses.replace(other.views, mean=(0.5, 0.5, 0.4))
        case "deviation":
            other.views = dataclasses.replace(other.views, std=(0.5, 0.5, 0.4))
        case "context":
            other.conversation.context = 64
        case "end tokens":
            other.end_tokens = [*other.end_tokens, 5]
        case "features":
            other.feature_shape = (4, 8)
        case "normaliser":
            pipeline.normalizer = normalizers.Lowercase()
        case "words":
            pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        case "merges":
            stored = json.loads(pipeline.to_str())
            stored["model"]["merges"].reverse()
            other.tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(json.dumps(stored)), **other.tokenizer.special_tokens_map
            )
    return other


CHANGES = (
    "template", "system", "layout", "pad colour", "mean", "deviation", "context", "end tokens", "features",
    "normaliser", "words", "merges",
)  # fmt: skip


@pytest.mark.parametrize("changed", CHANGES)
def test_a_processor_that_differs_in_anything_has_another_fingerprint(
    tiny_model: UniMM, changed: str
) -> None:
    processor = tiny_model.processor
    before = fingerprint(processor)
    assert fingerprint(changed_processor(processor, "nothing")) == before
    assert fingerprint(changed_processor(processor, changed)) != before


def test_using_a_processor_leaves_its_fingerprint(tiny_model: UniMM, tmp_path: Path) -> None:
    processor = copy.deepcopy(tiny_model.processor)
    before = fingerprint(processor)
    processor.tokenizer(["a", "a red apple"], padding=True, truncation=True, max_length=4)
    processor.save_pretrained(tmp_path)
    assert fingerprint(processor) == before
