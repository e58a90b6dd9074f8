"""Videos in: frames as they are, or a file of which some frames are taken.

GIF, WebP and PNG animations are read by Pillow, every other file by PyAV (`pip install 'unimm[video]'`). Frames are
taken evenly, as transformers' video processors do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Video:
    """A video to look at, in the place of an image.

    Attributes:
        source: frames in their order, each as `unimm.images.read_image` takes it; or the path of a file.
        fps: frames that are taken of a second of a file, by default 2; of frames as they are, all are taken.
        frames: frames that are taken, evenly; None: by `fps`.
        min_pixels: smallest area of a frame; None: the model's own.
        max_pixels: largest area of a frame; None: the model's own.

    Raises:
        UserError: there are no frames, or an option makes no sense.
    """

    source: Sequence[ImageInput] | str | os.PathLike[str]
    fps: float | None = None
    frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

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
        if not self.filed and (
            isinstance(self.source, bytes) or not isinstance(self.source, Sequence) or not self.source
        ):
            raise UserError("video: expected a file or a list of one or more frames")

    @property
    def filed(self) -> bool:
        """Whether it is a file."""
        return isinstance(self.source, str | os.PathLike)

    def read(self) -> Iterator[Image.Image]:
        """Give the frames that are taken, as RGB, one after the other.

        Raises:
            UserError: the file is missing, damaged, or of a form that is not read here.
        """
        if isinstance(self.source, str | os.PathLike):
            path = os.fspath(self.source)
            yield from _animation(self, path) if path.lower().endswith(ANIMATIONS) else _film(self, path)
            return
        for place in self._taken(len(self.source), None):
            yield read_image(self.source[place], f"video: frame {place + 1}")

    def _taken(self, total: int, rate: float | None) -> list[int]:
        """Which of so many frames are taken, of so many a second; None: that is not known."""
        count = total if self.frames is None else min(self.frames, total)
        if self.frames is None and self.filed and rate:
            wanted = total / rate * (self.fps or FRAMES_A_SECOND)
            wanted = min(max(wanted, FEWEST_FRAMES), MOST_FRAMES, total)
            count = max(math.floor(wanted / FRAME_MULTIPLE) * FRAME_MULTIPLE, 1)
        return [int(place * total / count) for place in range(count)]


def _animation(video: Video, path: str) -> Iterator[Image.Image]:
    """The frames of an animation."""
    with opened_image(path) as opened:
        total = getattr(opened, "n_frames", 1)
        seconds = 0.0
        for place in range(total) if video.frames is None else ():
            opened.seek(place)
            seconds += opened.info.get("duration", 0) / 1000
        for place in video._taken(total, total / seconds if seconds else None):
            try:
                opened.seek(place)
                frame = opened.copy()
            except Exception as error:  # decoders raise anything on a broken body
                raise UserError(f"{path}: frame {place + 1}: damaged ({error})") from None
            yield read_image(frame, f"{path}: frame {place + 1}")


def _film(video: Video, path: str) -> Iterator[Image.Image]:
    """The frames of a file that PyAV reads."""
    try:
        import av
    except ImportError:
        raise UserError(f"{path}: needs PyAV; install it with: pip install 'unimm[video]'") from None
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        with av.open(path) as file:
            if not file.streams.video:
                raise UserError(f"{path}: holds no video")
            rate = file.streams.video[0].average_rate
            total = sum(1 for _ in file.decode(video=0))
        wanted = iter(video._taken(total, None if rate is None else float(rate)))
        place = next(wanted, None)
        with av.open(path) as file:
            decoded: Any
            for number, decoded in enumerate(file.decode(video=0)):
                if number == place:
                    yield decoded.to_image()
                    place = next(wanted, None)
                if place is None:
                    return
    except av.FFmpegError as error:
        raise UserError(f"{path}: not a video that can be read ({error.strerror})") from None


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
