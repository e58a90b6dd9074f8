"""What reaches the user's screen: results on stdout, the rest on stderr, and no litter from libraries.

Names of files, keys, data and what models say are other people's text: whatever is printed here goes through
`printable`, so that none of it moves the cursor, renames the window or turns the line around.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TypeAlias

from unimm.errors import UserNote

if TYPE_CHECKING:
    from rich.console import Console

ProgressCallback: TypeAlias = Callable[[int, int], None]
"""Is told of work that takes a while: how much is done, of how much."""

# Read by the libraries when they are imported; what the user has set stays.
_QUIET = {
    "GRPC_VERBOSITY": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

# What terminals obey or hide: control characters but for newline and tab, marks that reorder text, other line ends,
# surrogates, invisible tags. What joins letters and emojis stays.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return a text with everything that a terminal would obey, or not show, written as an escape in hex."""
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """Return a text as `printable` does, its newlines and tabs as escapes too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no surrogates, which stand for bytes that are no text."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def debugging() -> bool:
    """Whether the user asked for tracebacks and for what libraries have to say (UNIMM_DEBUG=1)."""
    return os.environ.get("UNIMM_DEBUG", "0") not in ("", "0")


def say(line: str) -> None:
    """Tell the user something on stderr, on one line."""
    print("unimm:", printable(" ".join(line.split())), file=sys.stderr)


def print_text(text: str) -> None:
    """Print a text on stdout; its newlines stay."""
    print(printable(text))


def replace_unencodable() -> None:
    """Let streams write as an escape what their encoding lacks, rather than fail after the work is done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def terminal(**options: Any) -> Console:
    """A console of rich, with these options, that shows every text as `printable` has it and knows no markup."""
    from rich.console import Console
    from rich.text import Text

    class Printable(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(printable(text), **how)

    return Printable(**{"markup": False, "highlight": False, "emoji": False} | options)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Keep stdout for the result: whatever is printed in the block goes to stderr, even from compiled code.

    Unless the user is debugging, warnings and log lines of libraries are dropped; notes of unimm are shown.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    disabled = logging.root.manager.disable
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not debugging():
                logging.disable(logging.WARNING)
                if not sys.warnoptions:
                    warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserNote)
            warnings.showwarning = _show_warning
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        logging.disable(disabled)


def hide_loading_bars() -> None:
    """Switch off transformers' bar for loading weights; those for downloads stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def no_progress() -> Iterator[None]:
    """Keep transformers from drawing a bar for the second that loading or saving takes."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a note of unimm as a plain line, any other warning as Python does."""
    if issubclass(category, UserNote):
        say(f"note: {message}")
    else:
        sys.stderr.write(printable(warnings.formatwarning(message, category, filename, lineno, line)))


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if that is a terminal; yields what takes steps done and steps in all."""
    from rich.markup import escape
    from rich.progress import Progress

    console = terminal(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(one_line(what)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(document: Any) -> None:
    """Print one JSON document; numbers that JSON lacks (NaN, infinity) become null."""
    print(json.dumps(_plain(document), indent=2).replace("\x7f", "\\u007f"))  # all else is ASCII


def _plain(value: Any) -> Any:
    """Turn a result into what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "size", 1) in (1, None):  # a NumPy number
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """Print a table on stdout; numbers are set flush right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) for row in rows)
        table.add_column(one_line(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    terminal().print(table)


def print_tree(document: dict[str, Any], title: str | None = None) -> None:
    """Print a nested dictionary as a table of dotted keys and values."""
    print_table(("", "value"), [(key, _cell(value)) for key, value in _flat(document)], title)


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dictionary with their dotted keys."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell(value: Any) -> str:
    """Write a value as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return one_line(str(value))
