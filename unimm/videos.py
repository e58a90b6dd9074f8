"""Videos in: frames as they are, or a file of which some frames are taken.

GIF, WebP and PNG animations are read by Pillow, every other file by PyAV (`pip install 'unimm[video]'`). Frames are
taken evenly, as transformers' video processors do. Of what anybody may have sent, `VideoLimits` bound how much is
decoded, and nothing is opened but what was sent: formats that name other files are not read.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from PIL import Image

from unimm.errors import UserError
from unimm.images import opened_image, read_image

if TYPE_CHECKING:
    from unimm.images import ImageInput

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ogv", ".wmv")
"""What files are called that are videos without being images."""
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
FRAMES_A_SECOND = 2.0  # frames that are taken of a second of a file
FEWEST_FRAMES, MOST_FRAMES = 4, 768  # frames that are taken of a file by its time, if it has as many
FRAME_MULTIPLE = 2  # frames by which their number is rounded down
# Containers that hold all of a video, by what stands at the beginning of a file or behind its first length.
_BEGINNINGS = {b"\x1aE\xdf\xa3": "matroska", b"RIFF": "avi"}
_BOXES = dict.fromkeys((b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"), "mp4")
_ANIMATED = (b"GIF8", b"\x89PNG")


@dataclass(frozen=True)
class VideoLimits:
    """How much of a file is read that anybody may have sent.

    Attributes:
        frames: that are taken.
        pixels: of a frame.
        side: pixels a side of a frame.
        decoded: pixels of all frames that are decoded, taken or not.
    """

    frames: int = 128
    pixels: int = 32_000_000
    side: int = 2**14
    decoded: int = 2**32

    def check(self, width: int, height: int, said: str) -> None:
        """Refuse a frame's size.

        Raises:
            UserError: it is too large.
        """
        if width * height > self.pixels or max(width, height) > self.side:
            size = f"frames of {width} x {height} pixels"
            raise UserError(
                f"{said}: {size}; a frame may have {self.pixels:,}, and a side {self.side:,}; make it smaller"
            )

    def check_length(self, frames: int, width: int, height: int, said: str) -> None:
        """Refuse more frames than may be decoded; raises as `check`."""
        if frames * width * height > self.decoded:
            raise UserError(
                f"{said}: more than {self.decoded // max(width * height, 1):,} frames of {width} x {height} pixels; "
                "make it shorter or smaller"
            )


@dataclass(frozen=True, eq=False)
class Video:
    """A video to look at, in the place of an image.

    Attributes:
        source: frames in their order, each as `unimm.images.read_image` takes it; or the path of a file, or its bytes.
        fps: frames that are taken of a second of a file, by default 2; of frames as they are, all are taken.
        frames: frames that are taken, evenly; None: by `fps`.
        min_pixels: smallest area of a frame; None: the model's own.
        max_pixels: largest area of a frame; None: the model's own.
        limits: of a file that anybody may have sent; None: as much is read as there is.
        name: what errors call it; by default its path.

    Raises:
        UserError: there are no frames, or an option makes no sense.
    """

    source: Sequence[ImageInput] | str | os.PathLike[str] | bytes
    fps: float | None = None
    frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    limits: VideoLimits | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"video: {name}: {value!r}; give a whole number of 1 or more")
        fps = self.fps
        if fps is not None and (
            isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf
        ):
            raise UserError(f"video: fps: {fps!r}; give a number above 0")
        if fps is not None and self.frames is not None:
            raise UserError("video: fps and frames; give one of them")
        if not self.source or not (self.filed or isinstance(self.source, Sequence)):
            raise UserError("video: expected a file or a list of one or more frames")
        if self.limits is not None and (self.frames or 0) > self.limits.frames:
            raise UserError(f"video: frames: {self.frames}; {self.limits.frames} may be taken")

    @property
    def filed(self) -> bool:
        """Whether it is a file."""
        return isinstance(self.source, str | os.PathLike | bytes)

    def read(self) -> Iterator[Image.Image]:
        """Give the frames that are taken, as RGB, one after the other.

        Raises:
            UserError: the file is missing, damaged, of a form that is not read here, or beyond its limits.
        """
        source = self.source
        if isinstance(source, str | os.PathLike):
            source = os.fspath(source)
            animated = source.lower().endswith(ANIMATIONS)
        elif isinstance(source, bytes):
            animated = source.startswith(_ANIMATED) or (source[:4], source[8:12]) == (b"RIFF", b"WEBP")
        else:
            for place in self._taken(len(source), None):
                yield read_image(source[place], f"video: frame {place + 1}")
            return
        said = self.name or (source if isinstance(source, str) else "video")
        yield from _animation(self, source, said) if animated else _film(self, source, said)

    def _taken(self, total: int, rate: float | None) -> list[int]:
        """Which of so many frames are taken, of so many a second; None: that is not known."""
        most = total if self.limits is None or not self.filed else min(total, self.limits.frames)
        count = most if self.frames is None else min(self.frames, total)
        if self.frames is None and self.filed and rate:
            wanted = total / rate * (self.fps or FRAMES_A_SECOND)
            wanted = min(max(wanted, FEWEST_FRAMES), MOST_FRAMES, total)
            if self.limits is not None:
                wanted = min(wanted, self.limits.frames)
            count = max(math.floor(wanted / FRAME_MULTIPLE) * FRAME_MULTIPLE, 1)
        return [int(place * total / count) for place in range(count)]


def _animation(video: Video, source: str | bytes, said: str) -> Iterator[Image.Image]:
    """The frames of an animation."""
    with opened_image(source, said) as opened:
        total = getattr(opened, "n_frames", 1)
        if video.limits is not None:
            video.limits.check(*opened.size, said)
            video.limits.check_length(total, *opened.size, said)
        seconds = 0.0
        for place in range(total) if video.frames is None else ():
            _seek(opened, place, said)
            seconds += opened.info.get("duration", 0) / 1000
        for place in video._taken(total, total / seconds if seconds else None):
            _seek(opened, place, said)
            try:
                frame = opened.copy()
            except Exception as error:  # decoders raise anything on a broken body
                raise UserError(f"{said}: frame {place + 1}: damaged ({error})") from None
            yield read_image(frame, f"{said}: frame {place + 1}")


def _seek(opened: Image.Image, place: int, said: str) -> None:
    """Go to a frame of an animation."""
    try:
        opened.seek(place)
    except Exception as error:  # as above
        raise UserError(f"{said}: frame {place + 1}: damaged ({error})") from None


def _film(video: Video, source: str | bytes, said: str) -> Iterator[Image.Image]:
    """The frames of a file that PyAV reads."""
    if find_spec("av") is None:
        raise UserError(f"{said}: needs PyAV; install it with: pip install 'unimm[video]'")
    if isinstance(source, str) and not os.path.isfile(source):
        raise UserError(f"{said}: no such file")
    if isinstance(source, bytes) and _container(source) is None:
        raise UserError(
            f"{said}: not a video in a known format (MP4, MOV, MKV, WebM, AVI; GIF, WebP or PNG animations)"
        )
    try:
        rates = [rate for rate, _ in _decoded(video, source, said)]
        wanted = iter(video._taken(len(rates), rates[0] if rates else None))
        place = next(wanted, None)
        for number, (_, frame) in enumerate(_decoded(video, source, said)):
            if place is None:
                return
            if number == place:
                yield frame.to_image()
                place = next(wanted, None)
    except UserError:
        raise
    except Exception as error:  # as above
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{said}: not a video that can be read ({reason})") from None


def _container(data: bytes) -> str | None:
    """The format of a file by its first bytes; None: none of those that are read."""
    kind = _BEGINNINGS.get(data[:4]) or _BOXES.get(data[4:8])
    return None if kind == "avi" and data[8:12] != b"AVI " else kind


def _decoded(video: Video, source: str | bytes, said: str) -> Iterator[tuple[float | None, Any]]:
    """Each frame of a file that PyAV reads, and how many a second has."""
    import av

    data, limits = isinstance(source, bytes), video.limits
    kind = _container(source) if isinstance(source, bytes) else None
    # a file's bytes open nothing further
    options = {"protocol_whitelist": "none"} if data else {}
    opened: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    with av.open(opened, format=kind, options=options) as file:
        if not file.streams.video:
            raise UserError(f"{said}: holds no video")
        stream = file.streams.video[0]
        if stream.codec_context is None:
            raise UserError(f"{said}: holds a video of no known codec")
        rate = None if stream.average_rate is None else float(stream.average_rate)
        if limits is not None:
            limits.check(stream.codec_context.width, stream.codec_context.height, said)
            # no frame of another size is made room for
            stream.codec_context.options = {"max_pixels": str(limits.pixels)}
        for number, frame in enumerate(file.decode(stream)):
            if limits is not None:
                limits.check(frame.width, frame.height, said)
                limits.check_length(number + 1, frame.width, frame.height, said)
            yield rate, frame


def as_shown(path: str, fps: float | None = None, frames: int | None = None) -> Video | None:
    """Return the video of a file; None where it is an image.

    Args:
        path: of the file. An animation is a video where `fps` or `frames` are given.
        fps: see `Video`.
        frames: see `Video`.
    """
    asked = fps is not None or frames is not None
    if path.lower().endswith(VIDEO_SUFFIXES) or (asked and path.lower().endswith(ANIMATIONS)):
        return Video(path, fps, frames)
    return None
