"""The server's log: a line of JSON on stderr for each request and each failure, without what people say."""

from __future__ import annotations

import json
import sys
import time
import traceback
from typing import Any


def write_log(event: str, **fields: Any) -> None:
    """Write a line.

    Args:
        event: what happened.
        **fields: what is known of it; None is left out.
    """
    now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
    known = {name: value for name, value in fields.items() if value is not None}
    print(json.dumps({"time": moment, "event": event, **known}), file=sys.stderr, flush=True)


def write_failure(what: str, error: BaseException) -> None:
    """Write a line of a fault of the program: where it was, not with which words.

    Args:
        what: failed.
        error: what was raised; its message may hold what a person said.
    """
    frames = [
        f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    write_log("failure", what=what, error=type(error).__name__, frames=frames)
