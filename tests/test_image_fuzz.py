"""Damaged image files of every format: an RGB image or one line, never another error."""

from __future__ import annotations

import io
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from unimm.errors import UserError, UserNote
from unimm.images import IMAGE_FORMATS, read_image

LIMIT = 1_000_000  # pixels, so that a large image that a damaged header asks for is quickly decoded


def whole(form: str) -> bytes:
    """An image file with what a format may hold: transparency, palettes, orientation, frames."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    if form == "GIF":
        image.save(buffer, form, save_all=True, append_images=[image.rotate(90)])
    elif form in ("PNG", "WEBP"):
        image.convert("RGBA").save(buffer, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    elif form == "JPEG":
        image.save(buffer, form, exif=exif, progressive=True)
    elif form == "TIFF":
        image.save(buffer, form, compression="tiff_deflate")
    else:
        image.save(buffer, form)
    return buffer.getvalue()


FILES = {form: whole(form) for form in IMAGE_FORMATS}


def read(data: bytes) -> None:
    """Read bytes: an image, or one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = read_image(data, max_pixels=LIMIT)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert image.mode == "RGB" and 0 < image.width * image.height <= LIMIT


@st.composite
def damaged(draw: st.DrawFn, form: str) -> bytes:
    """A file with some bytes changed, mostly near its head, and parts cut out, doubled or swapped with another's."""
    data = bytearray(FILES[form])
    head = st.integers(0, min(len(data), 200) - 1)
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.one_of(head, st.integers(0, len(data) - 1)))
        data[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 64))
    how = draw(st.sampled_from(["whole", "cut", "out", "twice", "mixed"]))
    if how == "cut":
        del data[start:]
    elif how == "out":
        del data[start : start + length]
    elif how == "twice":
        data[start:start] = data[start : start + length]
    elif how == "mixed":
        data[start:] = FILES[draw(st.sampled_from(IMAGE_FORMATS))][start:]
    return bytes(data)


@pytest.mark.parametrize("form", IMAGE_FORMATS)
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_files(form: str, data: st.DataObject) -> None:
    read(data.draw(damaged(form)))


@settings(max_examples=150)
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF0000WEBP", b"BM", b"II*\0", b"P6 "]),
    st.binary(),
)
def test_any_bytes(head: bytes, data: bytes) -> None:
    read(head + data)


def test_notes_that_are_errors_stay_notes() -> None:
    with pytest.raises(UserNote):
        read_image(FILES["GIF"])
