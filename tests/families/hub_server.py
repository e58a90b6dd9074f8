"""A hub of folders on this machine, which huggingface_hub's own client talks to; it notes what it is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest


class Asked(NamedTuple):
    """A file that was asked for, and how many of its bytes were sent."""

    name: str
    commit: str
    file: str
    sent: int


class Hub:
    """What is on the hub, and what it was asked for."""

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Path]] = {}  # by owner/name and commit
        self.commits: dict[str, dict[str, str]] = {}  # by owner/name and branch or tag
        self.gated: set[str] = set()
        self.asked: list[Asked] = []

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Put a folder on the hub; gives its commit."""
        commit = hashlib.sha1(f"{name} {folder} {branch}".encode()).hexdigest()
        self.folders.setdefault(name, {})[commit] = folder
        self.commits.setdefault(name, {})[branch] = commit
        return commit

    def files(self, *suffixes: str) -> set[str]:
        """Names of the files of which anything was sent, as owner/name/file."""
        return {f"{a.name}/{a.file}" for a in self.asked if a.sent and a.file.endswith(suffixes or "")}

    def sent(self, name: str, file: str) -> int:
        """How many bytes of a file were sent."""
        return sum(a.sent for a in self.asked if (a.name, a.file) == (name, file))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        if len(parts) < 4:
            return self._fail(404, "NotFound")
        name, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        if name not in self.hub.folders:
            return self._fail(404, "RepoNotFound")
        if name in self.hub.gated:
            return self._fail(403, "GatedRepo")
        commit = self.hub.commits[name].get(revision, revision)
        if commit not in self.hub.folders[name]:
            return self._fail(404, "RevisionNotFound")
        folder = self.hub.folders[name][commit]
        if api and kind == "revision":
            return self._send(json.dumps({"id": name, "sha": commit, "siblings": []}).encode())
        if api:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            tree = [
                {
                    "type": "file",
                    "path": str(f.relative_to(folder)),
                    "size": f.stat().st_size,
                    "oid": _etag(f),
                }
                for f in files
            ]
            return self._send(json.dumps(tree).encode())
        return self._file(name, commit, folder, "/".join(parts[4:]))

    def _file(self, name: str, commit: str, folder: Path, file: str) -> None:
        path = folder / file
        if not path.is_file():
            return self._fail(404, "EntryNotFound")
        body, status = path.read_bytes(), 200
        if given := self.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            body, status = body[int(first) : int(last) + 1 if last else None], 206
        self.hub.asked.append(Asked(name, commit, file, 0 if self.command == "HEAD" else len(body)))
        self._send(body, status, {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)}"'})

    def _fail(self, status: int, code: str) -> None:
        self._send(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(cache: Path) -> Iterator[Hub]:
    """Run a hub, and have huggingface_hub ask it, with an empty cache of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    try:
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # as HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE set them
            patch.setattr(constants, "ENDPOINT", address)
            patch.setattr(
                constants,
                "HUGGINGFACE_CO_URL_TEMPLATE",
                address + "/{repo_id}/resolve/{revision}/{filename}",
            )
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            yield hub
    finally:
        server.shutdown()
        server.server_close()
