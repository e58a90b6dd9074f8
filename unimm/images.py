"""Pictures in and out: read any picture file as plain RGB, make tensors of it and back, write files whole.

`read_image` is the only door through which a picture enters, so every odd file (rotated, transparent, 16-bit,
animated, broken, enormous) is dealt with here and nowhere else.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from unimm.errors import UserError, UserNote

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 178_000_000  # about 0.5 GB once decoded to RGB; a header that asks for more is refused unread
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_MANY_PICTURES = {"MPO", "PSD", "ICO", "ICNS"}  # formats whose further frames are previews or layers
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def read_image(source: str | os.PathLike[str] | Image.Image | bytes, name: str | None = None) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8, CMYK and palettes are
    converted, and of an animation the first frame is taken (said with a `UserNote`).

    Args:
        source: path of a picture file, its bytes, or a PIL image (left as it is; the result is a new image).
        name: what errors and notes call the picture; by default its path.

    Returns:
        A new PIL image in mode "RGB".

    Raises:
        UserError: the file is missing, is no picture, is truncated, or its header asks for too many pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or "the image")
    if isinstance(source, bytes):
        file: str | io.BytesIO = io.BytesIO(source)
        path = name or "the image"
    else:
        file = os.fspath(source)
        path = name or file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            opened = Image.open(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a picture") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read (permission denied)") from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(path, "too many")) from None
    except Exception:  # decoders raise anything on a foreign header
        raise UserError(f"{path}: not a picture in a known format (PNG, JPEG, WebP, GIF …)") from None
    with opened:
        return _to_rgb(opened, path)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Check the size, decode, turn upright and convert; `name` is what errors and notes call the picture."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(_too_large(name, f"{width} x {height}"))
    if width * height == 0:
        raise UserError(f"{name}: has no pixels ({width} x {height})")
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format not in _MANY_PICTURES and image.tell() == 0:
            message = f"{name}: has {frames} frames; only the first is used"
            warnings.warn(message, UserNote, stacklevel=3)
        image.load()
        return _flatten(ImageOps.exif_transpose(image))
    except UserNote:  # the caller turned notes into errors
        raise
    except Exception as error:  # decoders raise anything on a broken body
        raise UserError(f"{name}: the picture is damaged or cut short ({_one_line(error)})") from None


def _flatten(image: Image.Image) -> Image.Image:
    """Convert a decoded picture of any mode to RGB."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":  # Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)  # [H, W]
        deep = image.mode != "I" or values.max() > 255
        grey = np.clip((values + 128) // 257 if deep else values, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))  # [H, W]; floats are either in [0, 1] or in [0, 255]
        grey = np.clip(values * 255 if values.max() <= 1 else values, 0, 255)
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _too_large(name: str, size: str) -> str:
    """The line that refuses a picture by its header."""
    return f"{name}: {size} pixels, more than {MAX_PIXELS // 1_000_000} million; make it smaller first"


def _one_line(error: BaseException) -> str:
    """An exception's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def to_tensor(pixels: Any) -> torch.Tensor:
    """Turn 8-bit pictures into model input.

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


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields the path of a fresh, empty file in the same folder, with the same suffix. When the block ends well
    it is flushed to disk and takes the place of `path`; on any error it is removed and an old `path` stays as
    it was.

    Raises:
        UserError: the folder is missing or may not be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))  # through a symlink, so that the link itself survives
    temporary = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # mode as the umask has it
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _is_full_disk(error):
            raise UserError(f"{path}: cannot be written ({_reason(error)}); nothing was changed") from None
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk, where the system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def _is_full_disk(error: BaseException) -> bool:
    """Whether an error says that the disk took no more; safetensors says so in words only."""
    return (isinstance(error, OSError) and error.errno in _NO_ROOM) or "(os error 28)" in str(error)


def _reason(error: BaseException) -> str:
    """The system's words for an error."""
    return (error.strerror if isinstance(error, OSError) else None) or "no space left on the disk"


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture atomically, in the format that the file's suffix names.

    Raises:
        UserError: the suffix names no picture format, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    Image.init()
    if Image.EXTENSION.get(suffix) not in Image.SAVE:
        raise UserError(f"{os.fspath(path)}: the name should end in .png, .jpg or .webp")
    with atomic_write(path) as temporary:
        image.save(temporary)
