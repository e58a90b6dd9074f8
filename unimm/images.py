"""Images in and out: read any image file as plain RGB, make tensors of it and back, write it whole.

`read_image` is the only door through which an image enters, so every odd file (rotated, transparent, 16-bit,
animated, broken, enormous) and every way to give one (path, bytes, array, data URL ...) is dealt with here and
nowhere else. Only `IMAGE_FORMATS` are read, whatever a file is called: Pillow knows decoders that start other programs.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from unimm.errors import UserError, UserNote
from unimm.files import POINTER, atomic_write, is_pointer, open_regular

if TYPE_CHECKING:
    import torch

    ImageInput: TypeAlias = (
        str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | torch.Tensor
        | bytes | bytearray | memoryview | BinaryIO
    )  # fmt: skip
    """All that `read_image` takes for one image."""

_Read = TypeVar("_Read")
Pixels: TypeAlias = NDArray[np.uint8]
"""An RGB image [H, W, 3]."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""The formats that are read, as Pillow names them."""
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
)  # fmt: skip
"""What files of these formats are called, where a folder is searched for images."""
MAX_PIXELS = 64_000_000  # 0.5 GB while it is decoded; a header that asks for more is refused unread
LIMIT_VARIABLE = "UNIMM_MAX_IMAGE_PIXELS"
MAX_BYTES_PER_PIXEL = 16  # of a file; no format that is read needs more
_BAND_PIXELS = 1_000_000  # converted at once where a conversion needs copies
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_KNOWN = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or PPM"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}  # no pixel depends on these chunks, and they may be bombs


def read_image(source: ImageInput, name: str | None = None, max_pixels: int | None = None) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8, CMYK and palettes are
    converted, and of an animation the first frame is taken (said with a `UserNote`).

    Args:
        source: path of an image file; its bytes; a binary file object, read from its beginning; a `data:` URL; a
            PIL image (left as it is; the result is a new image); or pixels, as a NumPy array or torch tensor:
            [H, W], or with 1 (grey), 3 (RGB) or 4 (RGBA) channels, which come last in an array and first in a
            tensor, or the other way where only that fits; uint8, or floats in [0, 1].
        name: what errors and notes call the image; by default its path.
        max_pixels: most pixels of an image; by default `UNIMM_MAX_IMAGE_PIXELS` of the environment, else
            `MAX_PIXELS`.

    Returns:
        A new PIL image in mode "RGB".

    Raises:
        UserError: the file is missing, is no image or none of `IMAGE_FORMATS`, is truncated, or its header asks for
            too many pixels; the array's shape, type or range is another; or this is no kind of image at all.
    """
    limit = pixel_limit() if max_pixels is None else max_pixels
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or "the image", limit)
    if _is_array(source):
        return _to_rgb(_from_array(source, name or "the array"), name or "the array", limit)
    with _opened(source, name, limit) as (file, said):
        return _past_texts(lambda opened: _decode(opened, said, limit), file, limit)


@contextmanager
def opened_image(source: ImageInput, name: str | None = None) -> Iterator[Image.Image]:
    """Give an image file as Pillow opens it, for who reads more of it than its first frame; see `read_image`."""
    limit = pixel_limit()
    with _opened(source, name, limit) as (file, said), _open(file, said, limit) as opened:
        _check_size(opened, said, limit)
        yield opened


def is_image(value: Any) -> bool:
    """Whether this is one image, of any kind that `read_image` takes, and not a collection of them."""
    if isinstance(value, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return True
    return hasattr(value, "read") or (_is_array(value) and value.ndim <= 3)


def image_header(data: bytes, name: str) -> tuple[str, tuple[int, int]]:
    """Return an image's format by its header, as Pillow names it ("JPEG"), and its width and height when upright.

    Raises:
        UserError: it is no image, none of `IMAGE_FORMATS`, or of too many pixels, or its header is damaged.
    """
    limit = pixel_limit()
    return _past_texts(lambda file: _header(file, name, limit), io.BytesIO(data), limit)


def pixel_limit() -> int:
    """Return how many pixels an image may have here.

    Raises:
        UserError: `UNIMM_MAX_IMAGE_PIXELS` is no whole number above 0.
    """
    given = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not given:
        return MAX_PIXELS
    if not (given.isascii() and given.isdigit()) or len(given) > 12 or int(given) == 0:
        raise UserError(f"{LIMIT_VARIABLE}: {_short(given)}; give a number of pixels, such as {MAX_PIXELS}")
    return int(given)


def decode_data_url(url: str, name: str = "the data URL") -> bytes:
    """Return what a `data:` URL of base64 holds.

    Raises:
        UserError: it has no comma, is not base64, or holds nothing.
    """
    head, comma, body = url.partition(",")
    if not (comma and head.lower().endswith(";base64")):
        raise UserError(
            f"{name}: a data URL that is not base64; expected data:image/png;base64, and the image"
        )
    with suppress(ValueError):  # of base64
        if data := base64.b64decode(b"".join(urllib.parse.unquote_to_bytes(body).split()), validate=True):
            return data
    raise UserError(f"{name}: a data URL with broken base64")


def as_size(size: Any) -> tuple[int, int] | None:
    """Return (width, height) of a size in pixels: a pair in any form, or "64x64"; None stays None.

    Raises:
        UserError: it is neither, or a side is no whole number above 0.
    """
    if size is None:
        return None
    sides: list[Any] = []
    if isinstance(size, str):
        sides = re.split("[xX×]", size.strip()) if len(size) < 20 else []
        sides = [int(side) if side.isascii() and side.isdigit() else 0 for side in sides]
    elif hasattr(size, "tolist"):
        listed = size.tolist()
        sides = listed if isinstance(listed, list) else [listed]
    elif isinstance(size, list | tuple):
        sides = [side.item() if hasattr(side, "item") else side for side in size]
    whole = all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 10**6 for side in sides)
    if len(sides) != 2 or not whole:
        shown = size if isinstance(size, str) else repr(size)
        raise UserError(f"size: expected WIDTHxHEIGHT in pixels, as 64x64 or (64, 64), got {_short(shown)}")
    return sides[0], sides[1]


# --- what an image is given as -----------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    """Whether this is a NumPy array, a torch tensor, or what acts as one."""
    return hasattr(value, "__array__") and hasattr(value, "ndim") and not isinstance(value, Image.Image)


def _from_array(value: Any, name: str) -> Image.Image:
    """Return the image of an array or tensor of pixels."""
    if hasattr(value, "detach"):  # a torch tensor, of any device and of types that NumPy lacks
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    array = np.asarray(value)
    shape = "x".join(map(str, array.shape))
    if array.ndim not in (2, 3):
        raise UserError(f"{name}: an array of shape [{shape}]; give [H, W], [H, W, 3] or [3, H, W]")
    if 0 in array.shape:
        raise UserError(f"{name}: has no pixels (shape [{shape}])")
    if array.ndim == 3:
        axis = _channel_axis(array.shape, first=hasattr(value, "detach"))
        if axis is None:
            raise UserError(f"{name}: an array of shape [{shape}]; 1, 3 or 4 channels come first or last")
        array = array.transpose(1, 2, 0) if axis == 0 else array
        array = array[:, :, 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_levels(array, name)))


def _channel_axis(shape: tuple[int, ...], first: bool) -> int | None:
    """Return the axis of 1, 3 or 4 channels; where both would do, `first` says which. None: neither is."""
    axes = [axis for axis in ((0, 2) if first else (2, 0)) if shape[axis] in (1, 3, 4)]
    return axes[0] if axes else None


def _levels(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return pixels as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise UserError(f"{name}: an array of {array.dtype}; give uint8 in 0 to 255, or floats in 0 to 1")
    least, most = float(array.min()), float(array.max())
    if not (least >= -1e-3 and most <= 1 + 1e-3):  # true of NaN too
        ways = "(x + 1) / 2 brings -1 to 1 there, x / 255 brings 0 to 255"
        raise UserError(f"{name}: floats from {least:.4g} to {most:.4g}; give them in 0 to 1 ({ways})")
    levels: np.ndarray[Any, Any] = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return levels


@contextmanager
def _opened(source: Any, name: str | None, limit: int) -> Iterator[tuple[BinaryIO, str]]:
    """Give a seekable file of the image's bytes, and what it is called."""
    max_bytes = max(MAX_BYTES_PER_PIXEL * limit, 2**20)
    if isinstance(source, str) and source[:5].lower() == "data:":
        said = name or "the data URL"
        yield io.BytesIO(decode_data_url(source, said)), said
    elif isinstance(source, str) and re.match(r"(?i)https?://", source):
        raise UserError(
            f"{name or _short(source)}: URLs are not fetched; download the image and give the file"
        )
    elif isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        said = name or (_short(path) if isinstance(path, str) else _short(os.fsdecode(path)))
        with _open_path(path, said) as file:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise UserError(_too_long(said, max_bytes))
            yield file, said
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), name or "the image"
    elif hasattr(source, "read"):
        said = name or _short(str(getattr(source, "name", "the file")))
        yield io.BytesIO(_read_object(source, said, max_bytes)), said
    else:
        kind = type(source).__name__
        given = "a path, a PIL image, an array, bytes or a file"
        raise UserError(f"{name or 'the image'}: a value of type {kind} is no image; give {given}")


def _open_path(path: str | bytes, said: str) -> BinaryIO:
    """Open a regular file; nothing else is an image, and a pipe would be waited for."""
    try:
        return open_regular(path)  # type: ignore[arg-type]
    except UserError as error:
        reason = str(error).rpartition(": ")[2].replace("not found", "no such file")
        raise UserError(f"{said}: {reason}") from None


def _read_object(file: Any, said: str, max_bytes: int) -> bytes:
    """Return the bytes of a file object, from its beginning where it can be rewound."""
    try:
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
        data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: cannot be read ({_one_line(error)})") from None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UserError(f"{said}: gives {type(data).__name__}, not bytes; open the file with mode 'rb'")
    if len(data) > max_bytes:
        raise UserError(_too_long(said, max_bytes))
    return bytes(data)


def _short(text: str) -> str:
    """A name or value as a line of an error can hold it."""
    text = " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())  # no lone surrogates
    return text if len(text) <= 300 else f"{text[:60]}... ({len(text):,} characters)"


# --- decoding -----------------------------------------------------------------------------------------------


def _decode(file: BinaryIO, name: str, limit: int) -> Image.Image:
    """Read an image of one of `IMAGE_FORMATS` as RGB."""
    with _open(file, name, limit) as opened:
        return _to_rgb(opened, name, limit)


def _header(file: BinaryIO, name: str, limit: int) -> tuple[str, tuple[int, int]]:
    """Return the format, and the width and height when upright."""
    with _open(file, name, limit) as opened:
        _check_size(opened, name, limit)  # before the EXIF, for which Pillow decodes a PNG
        try:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        except Exception as error:  # decoders raise anything on a broken body
            raise UserError(_damaged(name, error)) from None
        width, height = opened.size
        return opened.format or "unknown", (height, width) if turned else (width, height)


def _past_texts(read: Callable[[BinaryIO], _Read], file: BinaryIO, limit: int) -> _Read:
    """Read an image, again without its texts if it is refused for them."""
    try:
        return read(file)
    except UserNote:  # the caller turned notes into errors
        raise
    except UserError:
        smaller = _without_text(file, limit)
        if smaller is None:
            raise
    return read(smaller)


def _open(file: BinaryIO, name: str, limit: int) -> Image.Image:
    """Open an image of one of `IMAGE_FORMATS` by its header."""
    file.seek(0)
    width, height = _webp_size(file.read(30))
    if width * height > limit:  # libwebp takes the memory of two canvases when it opens a file
        raise UserError(_too_large(name, f"{width} x {height}", limit))
    if Image.MAX_IMAGE_PIXELS is not None and limit > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow's own bound, which the user asked to exceed
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit decides
            return Image.open(file, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:
        raise UserError(_too_large(name, "too many", limit)) from None
    except Exception:  # decoders raise anything on a foreign header
        file.seek(0)
        if is_pointer(
            file.read(100)
        ):  # in a tar or a table; a file on its own is looked at when it is opened
            raise UserError(f"{name}: {POINTER}") from None
        raise UserError(f"{name}: not an image in a known format ({_KNOWN})") from None


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return the width and height in the 30 bytes that open a WebP file, 0 and 0 if it is none."""
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", head[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _without_text(file: BinaryIO, limit: int) -> BinaryIO | None:
    """Return a PNG without the texts beside its pixels, for which Pillow has bounds; None if it has none."""
    file.seek(0)
    if file.read(8) != _PNG:
        return None
    kept, found = io.BytesIO(), False
    kept.write(_PNG)
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big") + 4  # with its checksum
        if head[4:] in _PNG_TEXT:
            found = True
            file.seek(length, os.SEEK_CUR)
            continue
        if kept.tell() + length > MAX_BYTES_PER_PIXEL * limit + 2**20:
            return None
        kept.write(head)
        kept.write(file.read(length))
    return kept if found else None


def _to_rgb(image: Image.Image, name: str, limit: int) -> Image.Image:
    """Check the size, decode, turn upright and convert; `name` is what errors and notes call the image."""
    _check_size(image, name, limit)
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO" and image.tell() == 0:  # MPO: a JPEG with previews behind it
            message = f"{name}: has {frames} frames; only the first is used"
            warnings.warn(message, UserNote, stacklevel=3)
        image.load()
        return _flatten(ImageOps.exif_transpose(image))
    except UserNote:  # the caller turned notes into errors
        raise
    except Exception as error:  # decoders raise anything on a broken body
        raise UserError(_damaged(name, error)) from None


def _check_size(image: Image.Image, name: str, limit: int) -> None:
    """Refuse an image of too many pixels, or of none."""
    width, height = image.size
    if width * height > limit:
        raise UserError(_too_large(name, f"{width} x {height}", limit))
    if width * height == 0:
        raise UserError(f"{name}: has no pixels ({width} x {height})")


def _flatten(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to RGB; where that needs copies, band by band."""
    if image.mode == "F":  # floats are either in [0, 1] or in [0, 255]
        unit = all(np.nan_to_num(np.asarray(band)).max() <= 1 for _, band in _bands(image))
        return _in_bands(image, lambda band: _grey(np.nan_to_num(np.asarray(band)) * (255 if unit else 1)))
    if image.mode in _SIXTEEN_BIT or image.mode == "I":  # Pillow would clip at 255
        deep = image.mode != "I" or any(np.asarray(band).max() > 255 for _, band in _bands(image))
        return _in_bands(image, lambda band: _grey(_eight_bit(np.asarray(band).astype(np.int64), deep)))
    if image.has_transparency_data:
        return _in_bands(image, _on_white)
    return image.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in bands of rows, each with the row it begins at."""
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB band by band, so that the copies of a conversion stay small."""
    whole = Image.new("RGB", image.size)
    for top, band in _bands(image):
        whole.paste(convert(band), (0, top))
    return whole


def _eight_bit(levels: np.ndarray[Any, Any], deep: bool) -> np.ndarray[Any, Any]:
    """Scale levels of 16 bits to 8, if they are of 16."""
    scaled: np.ndarray[Any, Any] = (levels + 128) // 257 if deep else levels
    return scaled


def _grey(levels: np.ndarray[Any, Any]) -> Image.Image:
    """Return the RGB image of grey levels [H, W] of any type."""
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Lay an image with transparency on white."""
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _damaged(name: str, error: Exception) -> str:
    """The line that refuses what a decoder could not read."""
    return f"{name}: the image is damaged or cut short ({_one_line(error)})"


def _too_long(name: str, max_bytes: int) -> str:
    """The line that refuses a file by its length."""
    return f"{name}: more than the {max_bytes:,} bytes that an image may have; set {LIMIT_VARIABLE} for larger ones"


def _too_large(name: str, size: str, limit: int) -> str:
    """The line that refuses an image by its header."""
    bound = f"{limit / 1e6:g} million" if limit >= 1_000_000 else f"{limit:,}"
    return f"{name}: {size} pixels, more than {bound}; make it smaller, or set {LIMIT_VARIABLE}"


def _one_line(error: BaseException) -> str:
    """An exception's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def to_tensor(pixels: Any) -> torch.Tensor:
    """Turn 8-bit images into model input.

    Args:
        pixels: uint8 array or tensor [..., H, W, 3], or an RGB PIL image.

    Returns:
        float32 tensor [..., 3, H, W] in [-1, 1].
    """
    import torch

    tensor = pixels if isinstance(pixels, torch.Tensor) else torch.from_numpy(np.array(pixels))
    if tensor.dtype != torch.uint8 or tensor.ndim < 3 or tensor.shape[-1] != 3:
        raise ValueError(f"expected uint8 [..., H, W, 3], got {tensor.dtype} {list(tensor.shape)}")
    return tensor.movedim(-1, -3).float().div(127.5).sub(1.0).contiguous()


def to_uint8(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Undo `to_tensor`: float [..., 3, H, W] in [-1, 1] (clipped) to a uint8 array [..., H, W, 3]."""
    levels = tensor.detach().float().cpu().clamp(-1, 1).add(1.0).mul(127.5).round()
    array: np.ndarray[Any, np.dtype[np.uint8]] = levels.movedim(-3, -1).numpy().astype(np.uint8)
    return array


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an image atomically, in the format that the file's suffix names.

    Raises:
        UserError: the suffix names no image format, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    Image.init()
    if Image.EXTENSION.get(suffix) not in Image.SAVE:
        raise UserError(f"{os.fspath(path)}: the name should end in .png, .jpg or .webp")
    with atomic_write(path) as temporary:
        image.save(temporary)
