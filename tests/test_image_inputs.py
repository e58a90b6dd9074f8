"""One door for images: every way to give one, the formats that are read, and bounds on what a hostile file may take."""

from __future__ import annotations

import base64
import io
import os
import resource
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from unimm.errors import UserError
from unimm.images import IMAGE_FORMATS, as_size, image_header, is_image, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)  # [H, W, 3]


def encoded(form: str = "PNG", pixels: np.ndarray[Any, Any] = PIXELS, **options: Any) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def refused(source: Any, **options: Any) -> str:
    """The line that refuses an image; it is one short line."""
    with pytest.raises(UserError) as caught:
        read_image(source, **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


# --- every way to give an image -------------------------------------------------------------------------------


class Stream:
    """A file object that cannot be rewound, as a download is."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


def given(tmp_path: Path) -> dict[str, Any]:
    """One image in all the ways that pixels and bytes come in."""
    data = encoded()
    path = tmp_path / "a.png"
    path.write_bytes(data)
    floats = PIXELS.astype(np.float32) / 255
    used = io.BytesIO(data)
    used.read()
    return {
        "str": str(path),
        "path": path,
        "PIL": Image.fromarray(PIXELS),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "file object": io.BytesIO(data),
        "file object that was read": used,
        "stream": Stream(data),
        "data URL": "data:image/png;base64," + base64.b64encode(data).decode(),
        "data URL, escaped": "DATA:image/png;base64," + base64.b64encode(data).decode().replace("+", "%2B"),
        "array": PIXELS,
        "array, channels first": np.ascontiguousarray(PIXELS.transpose(2, 0, 1)),
        "array, float64": PIXELS / 255,
        "array, upside down twice": PIXELS[::-1][::-1],
        "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
        "tensor, channels last": torch.from_numpy(PIXELS),
        "tensor, float": torch.from_numpy(floats).permute(2, 0, 1).requires_grad_(),
    }


def test_every_way_gives_the_same_pixels(tmp_path: Path) -> None:
    for way, source in given(tmp_path).items():
        image = read_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), PIXELS), way
        assert is_image(source), way


def test_an_open_file_is_read_and_stays_open(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    with open(tmp_path / "a.png", "rb") as file:
        first, second = read_image(file), read_image(file)
        assert not file.closed and first.tobytes() == second.tobytes()
    assert "a.png: cannot be read" in refused(file)


def test_arrays_of_one_and_four_channels() -> None:
    grey = PIXELS[:, :, 0]
    for source in (grey, grey[:, :, None], torch.from_numpy(grey)[None]):
        assert np.array_equal(np.asarray(read_image(source)), np.repeat(grey[:, :, None], 3, 2))
    clear = np.zeros((6, 9, 4), np.uint8)
    assert np.asarray(read_image(clear)).min() == 255  # transparent black on white


def test_channels_of_a_shape_that_reads_both_ways() -> None:
    both = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert np.array_equal(np.asarray(read_image(both)), both)  # last, as arrays have them
    first = np.asarray(read_image(torch.from_numpy(both)))  # first, as tensors have them
    assert np.array_equal(first, both.transpose(1, 2, 0))


def test_half_precision_and_small_overshoot() -> None:
    assert np.asarray(read_image(torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16)))[0, 0, 0] == 128
    assert np.asarray(read_image(np.full((4, 5, 3), 1.0005))).min() == 255


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((6, 9, 3), np.int64), "an array of int64; give uint8"),
        (np.zeros((6, 9, 3), np.uint16), "an array of uint16; give uint8"),
        (np.zeros((6, 9), bool), "an array of bool"),
        (np.zeros((6, 9), complex), "an array of complex128"),
        (np.array([["a", "b"]]), "an array of <U1"),
        (np.zeros((6, 9, 3)) - 1, "floats from -1 to -1; give them in 0 to 1"),
        (torch.full((3, 6, 9), 255.0), "floats from 255 to 255; give them in 0 to 1"),
        (torch.full((3, 6, 9), torch.nan), "floats from nan to nan"),
        (np.full((6, 9), np.inf), "floats from inf to inf"),
        (np.zeros((2, 3, 6, 9), np.uint8), "shape [2x3x6x9]"),
        (np.zeros((6, 9, 2), np.uint8), "1, 3 or 4 channels come first or last"),
        (np.zeros(9, np.uint8), "shape [9]"),
        (np.zeros((0, 9, 3), np.uint8), "has no pixels"),
        (np.zeros((1, 20_000), np.uint8), "20000 x 1 pixels, more than 10,000"),
        (b"", "not an image in a known format"),
        (io.StringIO("words"), "gives str, not bytes; open the file with mode 'rb'"),
        ("data:image/png", "the data URL: a data URL that is not base64"),
        ("data:image/png;base64,@@@", "the data URL: a data URL with broken base64"),
        ("data:,hello", "the data URL: a data URL that is not base64"),
        ("https://example.org/a.png", "URLs are not fetched"),
        ("x" * 100_000, "(100,000 characters): cannot be read"),
        ("a\0b.png", "not a name that a file can have"),
        ("a\udc80b.png", "no such file"),
        (7, "a value of type int is no image"),
        (None, "a value of type NoneType is no image"),
        ({"bytes": b""}, "a value of type dict is no image"),
    ],
)  # fmt: skip
def test_what_is_refused(source: Any, words: str) -> None:
    assert words in refused(source, max_pixels=10_000)
    assert refused(source, name="photo 3", max_pixels=10_000).startswith("photo 3: ")


def test_no_image_and_collections() -> None:
    pixels = np.zeros((2, 3, 6, 9), np.uint8)
    assert not any(map(is_image, (None, 7, [PIXELS], {"a": 1}, pixels, torch.from_numpy(pixels), iter(()))))


# --- formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_each_named_format_is_read(tmp_path: Path, form: str) -> None:
    (tmp_path / "a").write_bytes(encoded(form))  # whatever its name
    assert read_image(tmp_path / "a").size == (9, 6)
    assert image_header(encoded(form), "a")[0] == form


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICNS", "TGA", "PCX", "SGI", "IM", "DDS", "JPEG2000", "XBM"])
@pytest.mark.parametrize("name", ["a.png", "a.eps"])
def test_no_other_decoder_is_started(tmp_path: Path, form: str, name: str) -> None:
    buffer = io.BytesIO()
    Image.new("1" if form == "XBM" else "RGB", (16, 16)).save(buffer, form)
    (tmp_path / name).write_bytes(buffer.getvalue())
    assert "not an image in a known format (PNG, JPEG" in refused(tmp_path / name)
    with pytest.raises(UserError, match="not an image"):
        image_header(buffer.getvalue(), name)


# --- what is no regular file ----------------------------------------------------------------------------------


def test_pipes_sockets_and_devices_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        (tmp_path / "link.png").symlink_to("/dev/zero")
        kinds = {"pipe.png": "a pipe", "socket.png": "a socket", "link.png": "a device", ".": "a folder"}
        for name, kind in kinds.items():
            assert f"is {kind}; expected a regular file" in refused(tmp_path / name)


# --- bounds ---------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_the_bound_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (200, 100))
    assert "200 x 100 pixels, more than 19,999" in refused(image, max_pixels=19_999)
    assert read_image(image, max_pixels=20_000).size == (200, 100)
    monkeypatch.setenv("UNIMM_MAX_IMAGE_PIXELS", "19999")
    assert "set UNIMM_MAX_IMAGE_PIXELS" in refused(image)
    assert read_image(image, max_pixels=20_000).size == (200, 100)
    monkeypatch.setenv("UNIMM_MAX_IMAGE_PIXELS", "20000")
    assert read_image(image).size == (200, 100)


def test_a_higher_bound_goes_beyond_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too many pixels" in refused(encoded(pixels=np.zeros((50, 60, 3), np.uint8)), max_pixels=2000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(encoded(pixels=np.zeros((50, 60, 3), np.uint8)), max_pixels=3000).size == (60, 50)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e6", "9" * 5000, "٣"])
def test_a_bound_that_is_no_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("UNIMM_MAX_IMAGE_PIXELS", value)
    assert "UNIMM_MAX_IMAGE_PIXELS: " in refused(PIXELS)


def test_a_file_of_more_bytes_than_its_pixels_take(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    os.truncate(path, 2**31)  # a hole: nothing on the disk
    assert "more than the 1,048,576 bytes" in refused(path, max_pixels=100)
    with open(path, "rb") as file:
        assert "more than the 1,048,576 bytes" in refused(file, max_pixels=100)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt"])
@pytest.mark.parametrize("after", [False, True])
def test_png_with_megabytes_of_text_is_read(kind: str, after: bool) -> None:
    text = zlib.compress(b"words " * 600_000)  # 3.6 MB
    bodies = {
        "zTXt": b"k\0\0" + text,
        "iCCP": b"k\0\0" + text,
        "iTXt": b"k\0\1\0\0\0" + text,
        "tEXt": b"k\0" + b"words " * 600_000,
    }
    data = encoded()
    place = data.rindex(b"IEND") - 4 if after else 33  # behind the pixels, or behind the header
    whole = data[:place] + chunk(kind.encode(), bodies[kind]) + data[place:]
    assert np.array_equal(np.asarray(read_image(whole)), PIXELS)
    assert image_header(whole, "a.png") == ("PNG", (PIXELS.shape[1], PIXELS.shape[0]))


@pytest.mark.parametrize("after", [False, True])
def test_png_with_many_texts_is_read(after: bool) -> None:
    data = encoded()
    place = data.rindex(b"IEND") - 4 if after else 33
    whole = data[:place] + chunk(b"tEXt", b"k\0" + b"words " * 500_000) * 25 + data[place:]  # 75 MB
    assert np.array_equal(np.asarray(read_image(whole, max_pixels=10_000_000)), PIXELS)
    assert image_header(whole, "a.png")[0] == "PNG"


@pytest.mark.parametrize("form", ["png", "webp", "gif", "bmp", "ppm", "tiff"])
def test_a_header_is_as_bounded_as_its_image(form: str) -> None:
    with pytest.raises(UserError, match=r"a: .* pixels, more than 64 million"):
        image_header(BOMBS[form], "a")


@pytest.mark.parametrize("exif", [b"x" * 100, b"x" * 3_000_000, b"MM\0\0\0\0\0\x08" * 20], ids=len)
def test_a_header_with_broken_exif_is_a_line(exif: bytes) -> None:
    data = encoded()
    with pytest.raises(UserError, match=r"a\.png: the image is damaged"):
        image_header(data[:33] + chunk(b"eXIf", exif) + data[33:], "a.png")


def test_png_with_text_keeps_its_small_texts_and_its_transparency(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a red apple " * 300_000, zip=True)
    clear = Image.new("P", (2, 1))
    clear.putpalette([255, 0, 0, 0, 255, 0])
    clear.putdata([0, 1])
    clear.save(tmp_path / "a.png", transparency=1, pnginfo=info)
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def large_tiff() -> bytes:
    """A TIFF file whose directory says that it is large."""
    data = bytearray(encoded("TIFF"))
    start = struct.unpack("<I", data[4:8])[0] + 2
    for place in range(start, start + 24, 12):
        tag = struct.unpack("<H", data[place : place + 2])[0]
        if tag in (256, 257):  # width and height
            data[place : place + 12] = struct.pack("<HHII", tag, 4, 1, 90_000)
    return bytes(data)


BOMBS = {
    "png": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000)),
    "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 0)
    + (16_382).to_bytes(3, "little") * 2,
    "webp lossless": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f"
    + (0x3FFF | 0x3FFF << 14).to_bytes(4, "little") + bytes(16),
    "gif": encoded("GIF")[:6] + struct.pack("<HH", 60_000, 60_000) + encoded("GIF")[10:],
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 100000 100000 255\n",
    "tiff": large_tiff(),
}  # fmt: skip


@pytest.mark.parametrize("form", BOMBS)
def test_a_header_of_too_many_pixels_takes_no_memory(form: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "pixels, more than 64 million" in refused(BOMBS[form])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "F"])
def test_memory_of_a_large_image_is_bounded(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "F" else "a.png")
    Image.new(mode, (4000, 4000)).save(path)
    code = (
        "import resource, sys\nfrom unimm.images import read_image\nfrom PIL import Image\nImage.init()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nread_image(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert (
        int(done.stdout) * 1024 < 13 * 4000 * 4000
    )  # bytes; three copies would be 12 a pixel for the bands besides


# --- sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [(64, 32), [64, 32], "64x32", "64X32", " 64×32 ", np.array([64, 32]), torch.tensor([64, 32]), torch.Size((64, 32)),
     (np.int64(64), torch.tensor(32))],
)  # fmt: skip
def test_sizes_in_every_form(size: Any) -> None:
    assert as_size(size) == (64, 32)


@pytest.mark.parametrize(
    "size",
    [64, "64", "64x", "x64", "64x32x3", "-64x32", "6.4x32", "64x0", (64,), (64, 32, 3), (64, -32), (64.0, 32),
     (True, 64), (64, None), {}, torch.tensor(64), np.zeros((2, 2)), "9" * 10_000, (10**9, 64), object()],
)  # fmt: skip
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(UserError, match="size: expected WIDTHxHEIGHT in pixels, as 64x64") as caught:
        as_size(size)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
