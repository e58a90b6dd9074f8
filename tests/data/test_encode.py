"""Image codes written to tars: equal to the tokenizer's, whoever writes them and however often it is cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.data import forms
from unimm.data.encode import EncodingJob, encode_source
from unimm.data.sources import Reading, open_source
from unimm.errors import UserError
from unimm.images import to_tensor
from unimm.pipeline import UniMM
from unimm.processing.views import square_pixels

DRAWING = Reading(pairs="text_to_image")


def test_codes_are_those_of_the_tokenizer(tiny: Path, tiny_model: UniMM, tmp_path: Path) -> None:
    folder = forms.image_list(tmp_path / "data", 7)
    report = encode_source(EncodingJob(str(folder), tmp_path / "out", str(tiny), DRAWING, shard=3))
    assert (report["records"], report["written"], report["bad"], report["tars"]) == (7, 7, 0, 3)
    source, encoded = open_source(folder, DRAWING), open_source(tmp_path / "out")
    for i in range(7):
        assert encoded[i].key == source[i].key and encoded[i].kind == "text_to_image"
        assert encoded[i].messages[0] == source[i].messages[0]
        pixels = square_pixels([Image.fromarray(forms.SCENES[i].render())], 32)
        codes = tiny_model.image_tokenizer.encode(pixels)[0]
        assert torch.equal(torch.from_numpy(encoded[i].images()[0].codes()), codes)


def test_images_to_look_at_keep_their_bytes_and_bad_records_are_listed(tiny: Path, tmp_path: Path) -> None:
    forms.image_list(tmp_path / "data", 4)
    rows = [
        {"input_image": f"images/{i}.png", "instruction": "redder", "output_image": f"images/{i + 1}.png"}
        for i in range(3)
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "images" / "3.png").write_bytes(b"no image")
    report = encode_source(EncodingJob(str(tmp_path / "data"), tmp_path / "out", str(tiny)))
    assert (report["written"], report["bad"]) == (2, 1)
    listed = json.loads((tmp_path / "out" / "000000.bad.jsonl").read_text())
    assert listed["key"] == "line 3" and "not an image" in listed["reason"]
    record = open_source(tmp_path / "out")[1]
    assert record.kind == "image_text_to_image"
    assert record.images(draw=False)[0].blob.read() == (tmp_path / "data/images/1.png").read_bytes()


@pytest.mark.parametrize("pairs", ["text_to_image", "image_to_text"])
def test_every_caption_is_written(pairs: Any, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.png", "b\udcff.png"):  # the second is no UTF-8
        (folder / name).write_bytes(forms.encoded(forms.SCENES[0]))
    rows = [
        {"id": name, "file_name": name, "captions": ["one", "two", "three"]}
        for name in ("a.png", "b\udcff.png")
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = encode_source(EncodingJob(str(folder), tmp_path / "out", str(tiny), Reading(pairs)))
    assert (report["written"], report["bad"]) == (2, 0)
    source, encoded = open_source(folder, Reading(pairs)), open_source(tmp_path / "out")
    for index in range(2):
        assert encoded[index].key == source[index].key and encoded[index].versions == 3
        for number in range(3):
            ours, theirs = (one[index].version(number).messages for one in (source, encoded))
            assert [[p for p in m.parts if isinstance(p, str)] for m in ours] == [
                [p for p in m.parts if isinstance(p, str)] for m in theirs
            ]


def test_a_folder_of_other_work_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = forms.image_folder(tmp_path / "data", 2)
    out = tmp_path / "out"
    encode_source(EncodingJob(str(folder), out, str(tiny), DRAWING))
    with pytest.raises(UserError, match="out: holds codes made with another shard; give another folder"):
        encode_source(EncodingJob(str(folder), out, str(tiny), DRAWING, shard=7))
    (folder / "000.txt").write_text("another word")
    with pytest.raises(UserError, match="holds codes made with another signature"):
        encode_source(EncodingJob(str(folder), out, str(tiny), DRAWING))
    with pytest.raises(UserError, match="holds image codes already"):
        encode_source(EncodingJob(str(out), tmp_path / "again", str(tiny)))
    with pytest.raises(UserError, match="holds tars of something else"):
        encode_source(EncodingJob(str(folder), forms.shards(tmp_path / "tars", 1), str(tiny), DRAWING))


def test_an_image_tokenizer_alone_encodes_too(tiny: Path, tiny_model: UniMM, tmp_path: Path) -> None:
    folder = forms.image_folder(tmp_path / "data", 2)
    tiny_model.image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    encode_source(EncodingJob(str(folder), tmp_path / "a", str(tmp_path / "tokenizer"), DRAWING))
    encode_source(EncodingJob(str(folder), tmp_path / "b", str(tiny), DRAWING))
    first, second = (open_source(tmp_path / name) for name in "ab")
    assert first.mark == second.mark is not None
    assert np.array_equal(first[1].images()[0].codes(), second[1].images()[0].codes())


def test_images_keep_their_ratio_where_asked(tiny: Path, tiny_model: UniMM, tmp_path: Path) -> None:
    folder = forms.image_folder(tmp_path / "data", 5)
    shapes = [(64, 64), (100, 50), (50, 100), (64, 64), (640, 100)]  # width, height
    for number, shape in enumerate(shapes):
        image = Image.open(folder / f"{number:03d}.png").resize(shape)
        image.save(folder / f"{number:03d}.png")
    tokenizer = tiny_model.image_tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"model": str(tmp_path / "tokenizer"), "reading": DRAWING, "size": 48, "keep_ratio": True}
    encode_source(EncodingJob(str(folder), tmp_path / "out", **options))
    found = [record.images()[0].codes() for record in open_source(tmp_path / "out")]
    assert [codes.shape for codes in found] == [(6, 6), (4, 8), (8, 4), (6, 6), (2, 15)]  # of 8 pixels
    for number in (1, 3):
        image = Image.open(folder / f"{number:03d}.png").convert("RGB")
        rows, columns = found[number].shape
        resized = ImageOps.fit(image, (columns * 8, rows * 8), Image.Resampling.BICUBIC)
        assert np.array_equal(tokenizer.encode(to_tensor(resized)[None])[0].numpy(), found[number])
    with pytest.raises(UserError, match=r"size: 50; give a multiple of 8, such as 48"):
        encode_source(EncodingJob(str(folder), tmp_path / "other", **options | {"size": 50}))
    with pytest.raises(UserError, match=r"size: this model draws 32x32 only; leave out size and ratio"):
        encode_source(EncodingJob(str(folder), tmp_path / "other", **options | {"model": str(tiny)}))
