"""Images and videos by `http(s):`, from hosts that the server was told of and from nowhere else.

A name is looked up once, the address that it leads to is checked and then connected to, so that no second look-up can
lead elsewhere. Redirects are not followed. A private address (of this machine, of the network around it) is refused
unless it is itself among the hosts.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

from unimm.server.errors import APIError

CONNECT_TIMEOUT = 5.0  # seconds
FETCH_TIMEOUT = 15.0  # seconds for all of it
TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32")))
"""IPv6 addresses that stand for IPv4 ones, private ones too (NAT64, Teredo)."""
_PIECE = 2**16


class Address(NamedTuple):
    """What a URL asks for: where, and which path."""

    scheme: str
    host: str
    port: int
    target: str


class Fetcher:
    """Fetches images and videos.

    Args:
        allowed: hosts, as `name` (its usual port) or `name:port`.
        limit: bytes of one.
    """

    def __init__(self, allowed: Sequence[str], limit: int) -> None:
        self.allowed, self.limit = frozenset(host.lower() for host in allowed), limit

    def get(self, url: str, where: str) -> bytes:
        """Return what is at a URL.

        Args:
            url: of http or https.
            where: the field that it stands in.

        Raises:
            APIError: its host is not allowed, leads to a private address, or does not give a file of bounded size.
        """
        asked = self._checked(url, where)
        try:
            return self._fetch(asked, self._lookup(asked, where), where)
        except (OSError, http.client.HTTPException):
            raise APIError(422, f"{where}: could not be fetched", "image_not_fetched", where) from None

    def _checked(self, url: str, where: str) -> Address:
        """Return the parts of a URL whose host is allowed."""
        refused = APIError(
            400, f"{where}: not fetched from there; send a data: URL", "image_not_allowed", where
        )
        try:
            split = urllib.parse.urlsplit(url)
            host, port = (split.hostname or "").lower(), split.port
        except ValueError:
            raise refused from None
        usual = 443 if split.scheme == "https" else 80
        names = {f"{host}:{port or usual}"} | ({host} if port in (None, usual) else set())
        plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
        if not plain or "@" in split.netloc or not names & self.allowed:
            raise refused
        target = urllib.parse.urlunsplit(("", "", split.path or "/", split.query, ""))
        return Address(split.scheme, host, port or usual, target)

    def _lookup(self, asked: Address, where: str) -> str:
        """Return the address that a host leads to, if one may connect to it."""
        found = socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM)
        addresses = [str(info[4][0]) for info in found]
        for address in addresses:
            if not self._may_connect(address, asked.port):
                line = f"{where}: the host leads to a private address"
                raise APIError(400, line, "image_not_allowed", where)
        return addresses[0]

    def _may_connect(self, address: str, port: int) -> bool:
        """Whether an address is public, or among the hosts itself."""
        if {address, f"{address}:{port}"} & self.allowed:
            return True
        parsed = ipaddress.ip_address(address.partition("%")[0])
        inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
        if any(parsed in network for network in TRANSLATED if network.version == parsed.version):
            return False
        return parsed.is_global and not parsed.is_multicast and (inner is None or inner.is_global)

    def _fetch(self, asked: Address, address: str, where: str) -> bytes:
        """Ask the address for the target."""
        deadline = time.monotonic() + FETCH_TIMEOUT
        line = socket.create_connection((address, asked.port), timeout=CONNECT_TIMEOUT)
        connection = http.client.HTTPConnection(asked.host, asked.port)
        try:
            if asked.scheme == "https":
                line = ssl.create_default_context().wrap_socket(line, server_hostname=asked.host)
            connection.sock = line
            connection.request(
                "GET", asked.target, headers={"Accept": "image/*, video/*", "User-Agent": "unimm"}
            )
            response = connection.getresponse()
            if response.status != 200:
                status = (
                    f"{where}: could not be fetched (status {response.status}; redirects are not followed)"
                )
                raise APIError(422, status, "image_not_fetched", where)
            content = bytearray()
            while piece := response.read1(_PIECE):
                content += piece
                if len(content) > self.limit:
                    raise APIError(
                        422, f"{where}: larger than {self.limit:,} bytes", "image_not_fetched", where
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError
            return bytes(content)
        finally:
            connection.close()
            line.close()
