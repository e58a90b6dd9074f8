"""When Python looks for garbage: seldom, in programs that import torch and the libraries around it.

These imports make a million objects that stay. With Python's defaults the collector walks through them nine times
meanwhile, a fifth of the time until a command starts.
"""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """Collect garbage after every 10,000 new objects, not 700; for the first lines of a program."""
    gc.set_threshold(10_000, 10, 10)
