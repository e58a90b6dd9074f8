"""Aria's and Fuyu's images against the reference's, and what of their tensors' names and tokens has varied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import unimm
from tests.families.aria_checkpoints import ARIA, sized
from tests.families.fuyu_checkpoints import FUYU, PATCH
from tests.families.survey import picture
from unimm.errors import UserError
from unimm.families.convert import convert

# small, large, wide, high, square, long, and one that fits as it is
SHAPES = [(37, 91), (1300, 450), (300, 133), (61, 900), (500, 500), (13, 200), (66, 42), (45, 30), (7, 7)]
GREY = 2 / 255  # of a level, where levels are brought to [-1, 1]


def _options(folder: Path, **changes: Any) -> None:
    """Change the image options of a folder, in both files that have them."""
    for name, within in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.exists():
            document = json.loads(path.read_text())
            (document if within is None else document[within]).update(changes)
            path.write_text(json.dumps(document))


@pytest.mark.parametrize("side", [490, 980])
@pytest.mark.parametrize("layout", list(ARIA.layouts))
def test_aria_pixels_masks_and_logits_at_both_sides(tmp_path: Path, layout: str, side: int) -> None:
    oracle = sized(ARIA.write(tmp_path, layout), side)
    _options(tmp_path, max_image_size=side)
    um = unimm.load(tmp_path, device="cpu")
    images = [picture(*size) for size in SHAPES]
    expected = oracle.pixels(images)
    seen = um.processor.look(images)
    assert seen.pixels is not None and seen.sizes is not None
    assert seen.pixels.shape == expected["pixel_values"].shape
    assert (seen.pixels - expected["pixel_values"]).abs().max() <= GREY
    mask = expected["pixel_mask"]
    assert seen.sizes.tolist() == [[int(one.any(1).sum()), int(one.any(0).sum())] for one in mask]
    question = ["what is in this image?"]
    theirs = oracle.logits(oracle.inputs(question, [images[:3]]))
    with torch.no_grad():
        ours = um.model(**um.processor(question, [images[:3]])).logits
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("layout", list(FUYU.layouts))
def test_fuyu_patches(tmp_path: Path, layout: str) -> None:
    oracle = FUYU.write(tmp_path, layout)
    um = unimm.load(tmp_path, device="cpu")
    for size in SHAPES:
        image = picture(*size)
        seen = um.processor.look([image])
        assert seen.pixels is not None and seen.grids is not None
        patches = F.unfold(seen.pixels, PATCH, stride=PATCH)[0].unflatten(0, (3, -1))
        expected = oracle.pixels([image])["pixel_values"]
        rows, columns = seen.grids[0].tolist()
        assert rows * columns == len(expected)
        assert (patches.permute(2, 1, 0).flatten(1) - expected).abs().max() <= GREY
    # the lightest padding, not the darkest: 1 of 255
    padded = um.processor.look([picture(7, 7)]).pixels
    assert padded is not None and torch.allclose(padded[0, :, 7:, 7:], torch.tensor(1 / 127.5 - 1))


def test_fuyu_takes_several_images_before_a_question(tmp_path: Path) -> None:
    oracle = FUYU.write(tmp_path)
    um = unimm.load(tmp_path, device="cpu")
    images = [picture(30, 70), picture(61, 60)]
    inputs = oracle.inputs_of(["what is it?\n"], [images])
    ours = um.processor(["what is it?"], [images])
    assert torch.equal(ours["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert (um.model(**ours).logits - oracle.logits(inputs)).abs().max() < 1e-4


def test_no_text_holds_fuyus_tokens_of_images(tmp_path: Path) -> None:
    FUYU.write(tmp_path / "model", "hub")
    convert(tmp_path / "model", tmp_path / "ours", "unimm")
    for folder in (tmp_path / "model", tmp_path / "ours"):
        processor = unimm.load(folder, device="cpu").processor
        apart = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("|SPEAKER|", "|NEWLINE|")]
        typed = processor.question_ids("a |SPEAKER|\n|NEWLINE| <s> é", images=0)
        assert not set(apart) & set(typed)
        assert processor.decode_text([typed])[0].startswith("a |SPEAKER|\n|NEWLINE|")
        assert processor.question_ids("what is it?", [(1, 2)])[:3] == [apart[0], apart[0], apart[1]]


def _inner(name: str) -> str:
    """A name of the hub's as transformers' modules have it."""
    name = name.replace("language_model.model.", "model.language_model.").replace(
        "language_model.lm_head", "lm_head"
    )
    name = name.replace("experts.fc1.weight", "experts.gate_up_proj").replace(
        "experts.fc2.weight", "experts.down_proj"
    )
    heads = ("model.", "lm_head")
    return name if name.startswith(heads) else f"model.{name}"


def _wrapped(name: str) -> str:
    """A name of the hub's as Aria's releases between the first and the last have it."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize(("reference", "rename"), [(ARIA, _inner), (ARIA, _wrapped), (FUYU, _inner)])
def test_other_names_of_the_same_tensors(tmp_path: Path, reference: Any, rename: Any) -> None:
    reference.write(tmp_path / "hub")
    expected = unimm.load(tmp_path / "hub", device="cpu").model.state_dict()
    folder = tmp_path / "other"
    (tmp_path / "hub").rename(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    got = unimm.load(folder, device="cpu").model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    convert(folder, tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == {rename(name) for name in tensors}


FAULTS: list[tuple[Any, str, dict[str, Any], str]] = [
    (ARIA, "preprocessor_config.json", {"split_image": True}, "split_image: True is not supported"),
    (ARIA, "preprocessor_config.json", {"max_image_size": "big"}, "max_image_size: expected an integer"),
    (ARIA, "preprocessor_config.json", {"max_image_size": 700}, "reducer.queries: no entry for views of 100"),
    (ARIA, "config.json", {"vision_feature_layer": -2}, "vision_feature_layer: expected one of -1"),
    (ARIA, "config.json", {"projector_patch_to_query_dict": {"49": 0}}, "projector_patch_to_query_dict"),
    (FUYU, "preprocessor_config.json", {"padding_value": 0.5}, "padding_value: 0.5 is not supported"),
    (FUYU, "preprocessor_config.json", {"padding_mode": "reflect"}, "padding_mode: 'reflect' is not supported"),
    (FUYU, "preprocessor_config.json", {"image_mean": "x"}, "image_mean"),
    (FUYU, "config.json", {"image_token_id": 3}, "config.image_token_id: 3 is not supported, only 94"),
    (FUYU, "config.json", {"num_channels": 1}, "num_channels: expected one of 3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "file", "changes", "words"),
    FAULTS,
    ids=[f"{fault[0].name}-{next(iter(fault[2]))}" for fault in FAULTS],
)
def test_what_is_not_supported_is_one_line(
    tmp_path: Path, reference: Any, file: str, changes: dict[str, Any], words: str
) -> None:
    reference.write(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError) as caught:
        unimm.load(tmp_path, device="cpu")
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
