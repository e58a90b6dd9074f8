"""Images and videos that clients send: where they may come from, and how large they may be.

Nothing is fetched or opened unasked. `data:` URLs are always taken. `file:` URLs only below the media path, through no
link. `http(s):` URLs only from hosts that the server was told of (`unimm.server.fetch`).
"""

from __future__ import annotations

import os
import stat
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unimm.errors import UserError
from unimm.images import LIMIT_VARIABLE, decode_data_url, read_image
from unimm.server.errors import APIError
from unimm.server.fetch import Fetcher
from unimm.server.schemas import VideoURL
from unimm.server.settings import ServerSettings
from unimm.videos import Video, VideoLimits

MAX_VIDEOS = 1  # of a request

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ImageReader:
    """Reads images that requests name or bring.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.fetcher = Fetcher(settings.allow_hosts, settings.max_body)

    def check_count(self, images: int, videos: int, where: str) -> None:
        """Refuse too many images or videos.

        Raises:
            APIError: a request has more than it may.
        """
        for kind, count, most in (
            ("images", images, self.settings.max_images),
            ("videos", videos, MAX_VIDEOS),
        ):
            if count > most:
                raise APIError(
                    400, f"{where}: {count} {kind}; a request may have {most}", f"too_many_{kind}", where
                )

    def at(self, url: str, where: str) -> Image.Image:
        """Return the image at a URL as RGB.

        Args:
            url: of any kind.
            where: the field that it stands in.

        Raises:
            APIError: it may not be read from there, or is no image.
        """
        return self.read(self._data(url, where, "image"), where)

    def video(self, asked: VideoURL, where: str) -> Video:
        """Return the video at a URL; it is read, within limits, once it is looked at.

        Args:
            asked: its URL of any kind, and which frames are taken.
            where: the field that it stands in.

        Raises:
            APIError: it may not be read from there, or an option makes no sense.
        """
        data = self._data(asked.url, where, "video")
        if not data:
            raise APIError(400, f"{where}: empty", "invalid_video", where)
        limits = VideoLimits(pixels=self.settings.max_pixels, side=self.settings.max_side)
        try:
            return Video(data, asked.fps, asked.nframes, limits=limits, name=where)
        except UserError as error:
            line = str(error).removeprefix("video: ").replace("frames", "nframes", 1)
            raise APIError(400, f"{where}.{line}", "invalid_value", where) from None

    def _data(self, url: str, where: str, what: str) -> bytes:
        """Return the bytes at a URL; `what`: an image or a video, for errors."""
        scheme = url[:12].partition(":")[0].lower()
        if scheme == "data":
            try:
                return decode_data_url(url, where)
            except UserError as error:
                raise APIError(400, str(error), f"invalid_{what}", where) from None
        if scheme in ("http", "https"):
            return self.fetcher.get(url, where)
        if scheme == "file":
            return self._below_media(url, where, what)
        raise APIError(
            400, f"{where}: expected a data: URL with the {what} in base64", f"invalid_{what}", where
        )

    def read(self, data: bytes, where: str) -> Image.Image:
        """Return the image in a file's bytes as RGB; its size is checked before it is decoded.

        Raises:
            APIError: it is no image in a known format, damaged, or too large.
        """
        settings = self.settings
        if not data:
            raise APIError(400, f"{where}: empty", "invalid_image", where)
        try:
            image = read_image(data, where, settings.max_pixels)
        except UserError as error:
            line = str(error).replace(f", or set {LIMIT_VARIABLE}", "")  # which is not the client's to set
            raise APIError(422, line, "invalid_image", where) from None
        if max(image.size) > settings.max_side:
            size = f"{image.width} x {image.height} pixels"
            line = f"{where}: {size}; a side may have {settings.max_side:,}"
            raise APIError(422, line, "invalid_image", where)
        return image

    def _below_media(self, url: str, where: str, what: str) -> bytes:
        """Return the bytes of a file below the media path; what is elsewhere is neither opened nor said to exist."""
        root = self.settings.media_path
        if root is None:
            line = f"{where}: file: URLs are not read by this server; send a data: URL"
            raise APIError(400, line, f"{what}_not_allowed", where)
        refused = APIError(
            400, f"{where}: no {what} file below the server's media path", f"{what}_not_allowed", where
        )
        parts = _parts_below(url, root)
        if parts is None:
            raise refused
        try:
            return _read_through(root, parts, self.settings.max_body)
        except (OSError, ValueError):
            raise refused from None


def _parts_below(url: str, root: Path) -> Sequence[str] | None:
    """Return the names that lead from a folder to the file of a URL; None: it is not below."""
    try:
        split = urllib.parse.urlsplit(url)
        path = urllib.parse.unquote(split.path, errors="strict")
    except (ValueError, UnicodeDecodeError):
        return None
    if split.netloc not in ("", "localhost") or split.query or split.fragment or "\0" in path:
        return None
    names = path.split("/")
    if any(name in (".", "..") for name in names):
        return None
    for folder in {root.absolute(), root.resolve()}:
        prefix = f"{folder.as_posix().rstrip('/')}/"
        if path.startswith(prefix):
            parts = [name for name in path[len(prefix) :].split("/") if name]
            return parts or None
    return None


def _read_through(root: Path, parts: Sequence[str], limit: int) -> bytes:
    """Read a regular file below a folder, name by name, so that no link leads elsewhere."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, name in enumerate(parts):
            last = number == len(parts) - 1
            inner = os.open(name, _FLAGS | (0 if last else os.O_DIRECTORY), dir_fd=handle)
            os.close(handle)
            handle = inner
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise ValueError
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read(limit)
    finally:
        os.close(handle)
