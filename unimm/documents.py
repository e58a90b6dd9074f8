"""JSON and what YAML gave, as strangers wrote it: bounded in size, depth and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from unimm.errors import UserError

MAX_BYTES = 2**26  # of a file of JSON; a published vocabulary takes some 30 MB
MAX_DEPTH = 50  # levels of lists and mappings in one another
MAX_NODES = 4_000_000  # values in a document, those of an alias counted each time
MAX_BITS = 256  # of an integer


def parse_json(text: str, source: str) -> Any:
    """Return what a text of JSON holds.

    Raises:
        UserError: it is no JSON, too deep, or holds a number that is not finite.
    """
    try:
        document = json.loads(text, parse_constant=_not_finite)
    except RecursionError:
        raise UserError(f"{source}: nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise UserError(f"{source}: not readable as JSON ({error})") from None
    check_document(document, source)
    return document


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def check_document(document: Any, source: str, max_nodes: int = MAX_NODES, finite: bool = True) -> None:
    """Check that a document may be walked: bounded in depth and size.

    Args:
        document: what was read.
        source: where from, for the error.
        max_nodes: values it may hold.
        finite: whether numbers have to be finite; JSON has no others.

    Raises:
        UserError: a line that names what it has too much of.
    """
    waiting: list[tuple[Any, int, Any]] = [
        (document, 0, None)
    ]  # value, depth, (where its parent stands, key)
    nodes = 0
    while waiting:
        node, depth, place = waiting.pop()
        nodes += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{source}: nested more than {MAX_DEPTH} levels deep")
        if nodes > max_nodes:
            raise UserError(f"{source}: holds more than {max_nodes:,} values")
        if isinstance(node, Mapping):
            waiting += [(part, depth + 1, (place, key)) for key, part in node.items()]
        elif isinstance(node, list | tuple | set):
            waiting += [(part, depth + 1, (place, key)) for key, part in enumerate(node)]
        elif isinstance(node, int) and node.bit_length() > MAX_BITS:
            raise UserError(
                f"{source}: {_key(place)}: expected a shorter number than one of {node.bit_length()} bits"
            )
        elif finite and isinstance(node, float) and not math.isfinite(node):
            raise UserError(f"{source}: {_key(place)}: expected a finite number, got {node}")


def _key(place: Any) -> str:
    """The dotted key of a place in a document."""
    steps: list[str | int] = []
    while place is not None:
        place, step = place
        steps.insert(0, step)
    return dotted(steps) or "the document"


def dotted(location: Iterable[str | int]) -> str:
    """`("stages", 1, "steps")` as `stages[1].steps`; unprintable characters are escaped, long keys cut."""
    text = ""
    for part in location:
        name = part if isinstance(part, int) else shown_key(part)
        text += f"[{name}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return text


def shown_key(key: object) -> str:
    """A key as it may stand in a line."""
    text = str(key)
    text = text if len(text) <= 60 else text[:60] + "…"
    return text if text.isprintable() else repr(text)[1:-1]
