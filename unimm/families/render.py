"""A program that renders a chat template by transformers, in a process of its own, where little time and memory are.

It reads one JSON document from standard input, and writes one to standard output: for each conversation its text, or
why there is none. It imports nothing of unimm, so that it starts soon.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from contextlib import suppress
from pathlib import Path

MEMORY = 2**28  # bytes beyond what the process has once all is imported
SECONDS = 2  # of processor time, likewise
MOST = 2**16  # characters of a conversation


def main() -> None:
    """Render what standard input asks for."""
    request = json.load(sys.stdin)
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit()
    results = []
    for conversation in request["conversations"]:
        try:
            rendered = render_jinja_template(
                [conversation["messages"]],
                chat_template=request["template"],
                add_generation_prompt=conversation["asks"],
                **request["names"],
            )
            results.append(_checked(rendered[0][0]))
        except MemoryError:
            results.append({"error": "takes too much memory"})
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error)[:1000].split())[:160]
            results.append({"error": f"{type(error).__name__}: {reason}"})
    json.dump(results, sys.stdout)


def _checked(text: str) -> dict[str, str]:
    """A rendered text, if it is not too long."""
    if len(text) > MOST:
        return {"error": f"writes {len(text)} characters around a few words"}
    return {"text": text}


def _limit() -> None:
    """Take away memory and time, as far as the system can."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime) + SECONDS
    limits: dict[int, int] = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + MEMORY
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
