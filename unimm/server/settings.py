"""What a server may be told: where it listens, who may use it, and how much one request or all of them may take."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from pathlib import Path

from unimm.errors import UserError

ANY = "*"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:+-]{0,199}")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]{1,253}(:\d{1,5})?")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """How a server is set.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0: any that is free.
        model_name: what clients call the model.
        api_key: what clients have to bring; None: nothing.
        server_names: further names under which the server is reached; `*`: any.
        allow_origins: other pages' origins whose scripts may use the server.
        allow_hosts: hosts (`name`, `name:port`) that images may be fetched from; a private address only if it is
            listed itself.
        media_path: folder below which `file:` URLs may name images.
        max_body: bytes of a request.
        max_pixels: pixels of one image that is sent.
        max_side: pixels a side of one.
        max_images: images of a request.
        max_n: answers or drawings of a request.
        max_tokens: most tokens of an answer; None: what the context has room for.
        max_waiting: answers and drawings that wait for the engine.
        max_connections: connections that are open at once.
        request_timeout: seconds that a request may take in all.
        shutdown_timeout: seconds that running requests have once the server is told to stop.
        log_words: whether the log may hold prompts and answers.

    Raises:
        UserError: a value makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "embedded"
    api_key: str | None = dataclasses.field(default=None, repr=False)
    server_names: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    media_path: Path | None = None
    max_body: int = 2**25
    max_pixels: int = 32_000_000
    max_side: int = 2**14
    max_images: int = 16
    max_n: int = 16
    max_tokens: int | None = None
    max_waiting: int = 256
    max_connections: int = 512
    request_timeout: float = 600.0
    shutdown_timeout: float = 30.0
    log_words: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_body",
            "max_pixels",
            "max_side",
            "max_images",
            "max_n",
            "max_waiting",
            "max_connections",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{_option(name)}: {getattr(self, name)}; give a whole number of at least 1")
        if self.max_n > self.max_waiting:
            raise UserError(
                f"--max-n: {self.max_n} is more than --max-waiting, {self.max_waiting}, lets wait"
            )
        for name in ("request_timeout", "shutdown_timeout"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{_option(name)}: {getattr(self, name)}; give a number of seconds above 0")
        if not _MODEL_NAME.fullmatch(self.model_name) or ".." in self.model_name:
            raise UserError(f"--model-name: {self.model_name!r}; give letters, digits and . _ - / @ : +")
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and self.api_key
        ):
            raise UserError("--api-key: give printable ASCII characters")
        for name in self.server_names:
            if name != ANY and not _NAME.fullmatch(name):
                raise UserError(f"--server-name: {name!r}; give a host name without port, or *")
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(f"--allow-origin: {origin!r}; give one such as https://example.org")
        for host in self.allow_hosts:
            if not _NAME.fullmatch(host.partition(":")[0]) or not _is_port(host):
                raise UserError(f"--allow-host: {host!r}; give a host name, or NAME:PORT")
        if self.media_path is not None and not self.media_path.is_dir():
            raise UserError(f"--media-path: {self.media_path}: no such folder")

    @property
    def local(self) -> bool:
        """Whether only this machine is listened to."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _is_port(host: str) -> bool:
    _, colon, port = host.partition(":")
    return not colon or (port.isascii() and port.isdigit() and 0 < int(port) < 2**16)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
