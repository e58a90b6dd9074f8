"""A judge behind a URL for tests: a real server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@contextmanager
def judge_server(*replies: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A judge that gives some replies in turn, the last for ever; yields its address and what it was asked.

    A reply is a text, a pair of a text and a version, a JSON object, a function of the request that gives one, a number
    of an HTTP status, or None: it never comes.
    """
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = replies[min(len(asked), len(replies)) - 1]
            if reply is None:
                self.connection.recv(1)  # until the one who asked has gone
                return
            reply = reply(asked[-1]) if callable(reply) else reply
            if isinstance(reply, int):
                self.send_error(reply)
                return
            text, version = reply if isinstance(reply, tuple) else (reply, "judge-1")
            body = {"model": version, "choices": [{"message": {"content": text}}]}
            data = json.dumps(reply if isinstance(reply, dict) else body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
