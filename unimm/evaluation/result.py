"""The result file: one JSON document with every item, and all that its figures depend on.

`run` holds times and how the work was split; all else is the same when the same command is given again, in any batch
size, on any number of processes and however often it was killed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.bootstrap import ScoreTable, Summary, with_intervals
from unimm.evaluation.protocol import EvaluationProtocol, held_protocol
from unimm.evaluation.scorers import scorer_of
from unimm.files import atomic_write, open_regular
from unimm.outputs import check_output, first_line_has

RESULT_FORMAT = "unimm-result/1"
RESULT_FILE = "result.json"
ResultDocument = dict[str, Any]


def table_of(items: Sequence[Mapping[str, Any]]) -> ScoreTable:
    """The scored items of a result as a table; each has its fields, its key and what its scorer said."""
    return ScoreTable.of([row for item in items for row in scored_rows(item)])


def scored_rows(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table that an item makes: one, or one for each of its drawings."""
    fields = {**item.get("fields", {}), "key": item["key"]}
    fields.setdefault("unit", item["key"])
    scored = item.get("scored")
    if scored is None:
        raise UserError(f"item {item['key']}: has no score")
    return [{**fields, **one} for one in (scored if isinstance(scored, list) else [scored])]


def summary_of(protocol: EvaluationProtocol, table: ScoreTable) -> Summary:
    """The figures of a table by its items' weights."""
    return scorer_of(protocol).summarise(table)


def figures_of(protocol: EvaluationProtocol, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every figure with its interval.

    Raises:
        UserError: there is nothing to sum up.
    """
    table = table_of(items)
    if not table.rows:
        raise UserError(f"{protocol.name}: no items were scored")
    return with_intervals(table, summary_of(protocol, table))


def write_result(path: Path, document: ResultDocument) -> None:
    """Write a result, whole or not at all.

    Raises:
        UserError: something else is there, or it cannot be written.
    """
    check_output(path, "an earlier result", first_line_has_format)
    with atomic_write(path) as temporary:
        head = json.dumps(_finite({**document, "items": []}), indent=1, ensure_ascii=False)
        lines = (json.dumps(_finite(item), ensure_ascii=False) for item in document["items"])  # one a line
        before, after = head.rsplit('"items": []', 1)
        temporary.write_text(
            before + '"items": [\n  ' + ",\n  ".join(lines) + "\n ]" + after + "\n", encoding="utf-8"
        )


def first_line_has_format(file: Any) -> bool:
    """Whether an open file begins as a result."""
    return RESULT_FORMAT.encode() in file.read(200) or first_line_has("run")(file)


def _finite(value: Any) -> Any:
    """Numbers that JSON lacks become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def read_result(path: Path) -> ResultDocument:
    """Read a result; a folder stands for the one in it.

    Raises:
        UserError: it is none.
    """
    path = path / RESULT_FILE if path.is_dir() else path
    with open_regular(path) as file:
        content = file.read()
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({str(error)[:100]})") from None
    if not isinstance(document, dict) or document.get("format") != RESULT_FORMAT:
        raise UserError(f"{path}: no result of `unimm eval`; expected one of the format {RESULT_FORMAT}")
    missing = [name for name in ("protocol", "items", "figures", "model", "data") if name not in document]
    if missing:
        raise UserError(f"{path}: {missing[0]}: missing")
    held_protocol(document["protocol"], str(path))
    return document


def is_result(path: Path) -> bool:
    """Whether a path names a result file, or a folder that holds one."""
    if path.is_dir():
        return (path / RESULT_FILE).is_file()
    return path.is_file() and path.suffix == ".json"
