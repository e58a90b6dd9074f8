"""Every odd image file is read rightly or refused on one line."""

from __future__ import annotations

import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.errors import UserError, UserNote
from unimm.images import read_image, save_image, to_tensor, to_uint8

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """The pixels, row by row."""
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def png_header(width: int, height: int) -> bytes:
    """A PNG file that announces a size and holds no pixels to speak of."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


# --- images that work ------------------------------------------------------------------------------------


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    assert colours(read_image(tmp_path / "a.tiff")) == [RED] * 64


def test_cmyk_jpeg_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 255, 0)).save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - GREEN).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_is_scaled(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    assert colours(read_image(tmp_path / f"a.{suffix}")) == [(v, v, v) for v in (0, 1, 128, 255)]


def test_dark_sixteen_bit_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, np.uint16)).save(tmp_path / "a.png")
    assert colours(read_image(tmp_path / "a.png")) == [(1, 1, 1)] * 4


@pytest.mark.parametrize(("mode", "value"), [("I", 128 * 257), ("F", 0.5), ("F", 127.6), ("L", 128)])
def test_grey_images_of_other_depths(mode: str, value: float) -> None:
    image = Image.new(mode, (2, 1), value)
    assert colours(read_image(image)) == [(128, 128, 128)] * 2


def test_palette_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert colours(read_image(tmp_path / "a.png")) == [RED, WHITE]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 51)).convert(mode)
    assert colours(read_image(image)) == [(204, 204, 204)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), GREEN)
    upright.paste(RED, (0, 0, 8, 8))  # the mark: red in the upper left corner
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    undo |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright
    if orientation in undo:
        stored = upright.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame_and_says_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, WHITE)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserNote, match=r"has 3 frames; only the first is used") as notes:
        image = read_image(path)
    assert str(path) in str(notes[0].message)
    assert colours(image) == [RED] * 64


def test_pil_image_is_left_as_it_was() -> None:
    image = Image.new("RGB", (2, 2), RED)
    copy = read_image(image)
    copy.putpixel((0, 0), GREEN)
    assert image.getpixel((0, 0)) == RED


def test_large_but_allowed_image_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000_000)  # Pillow alone would warn
    (tmp_path / "a.png").write_bytes(png_header(10_000, 6_400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="damaged or cut short"):  # the pixels are missing
            read_image(tmp_path / "a.png")


# --- images that are refused, each on one line -----------------------------------------------------------


def refused(path: Path) -> str:
    """Read an image that must be refused; return the line, which names the file."""
    with pytest.raises(UserError) as caught:
        read_image(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nothing.png")


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"just some words\n", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_no_image_inside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert "not an image" in refused(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_truncated_file(tmp_path: Path, suffix: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    refused(path)


def test_truncated_jpeg_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    assert "damaged or cut short" in refused(path)


def test_enormous_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(50_000, 50_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 64 million" in refused(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024  # kilobytes; decoded it would be 7.5 GB


def test_own_limit_holds_when_pillow_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "a.png"
    path.write_bytes(png_header(50_000, 50_000))
    assert "50000 x 50000 pixels" in refused(path)


def test_empty_image() -> None:
    with pytest.raises(UserError, match="has no pixels"):
        read_image(Image.new("RGB", (0, 4)))


# --- tensors -----------------------------------------------------------------------------------------------


def test_tensor_has_channels_first_and_range_one() -> None:
    pixels = np.zeros((2, 4, 6, 3), np.uint8)
    pixels[1, 3, 5] = RED
    tensor = to_tensor(pixels)
    assert tensor.shape == (2, 3, 4, 6)
    assert tensor.dtype == torch.float32
    assert tensor[1, :, 3, 5].tolist() == [1.0, -1.0, -1.0]


def test_tensor_and_back_is_exact() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(to_uint8(to_tensor(pixels)), pixels)
    assert np.array_equal(to_uint8(to_tensor(Image.fromarray(pixels))), pixels)


def test_out_of_range_is_clipped() -> None:
    assert to_uint8(torch.full((3, 1, 1), 7.0)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[..., H, W, 3\]"):
        to_tensor(pixels)


# --- writing -----------------------------------------------------------------------------------------------


def test_image_is_saved_by_its_suffix(tmp_path: Path) -> None:
    save_image(Image.new("RGB", (4, 4), RED), tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as image:
        assert image.format == "WEBP"
    for name in ("a.doc", "a"):
        with pytest.raises(UserError, match=r"should end in \.png"):
            save_image(Image.new("RGB", (4, 4)), tmp_path / name)
