"""Results side by side: every figure with paired intervals of the differences, and a page of items that differ."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.bootstrap import ScoreTable, paired
from unimm.evaluation.drawing import DRAWINGS
from unimm.evaluation.journal import DoneItem
from unimm.evaluation.protocol import held_protocol
from unimm.evaluation.result import ResultDocument, read_result, scored_rows, summary_of, table_of
from unimm.files import atomic_write
from unimm.images import read_image
from unimm.outputs import check_output

THUMBNAIL = 256  # pixels a side of a drawing on the page
MAX_SHOWN = 100  # items that differ, on the page
MARK = "<!doctype html>\n<!-- unimm report -->"


def compare_results(paths: Sequence[Path], page: Path) -> dict[str, Any]:
    """Compare results of one protocol.

    Args:
        paths: results or their folders; differences are from the first.
        page: the HTML page.

    Returns:
        `names`, and under `figures` for each figure its `values` and the `differences` from the first, each with the
        95 % interval of resamples that all results share.

    Raises:
        UserError: they are of other protocols or other items, or one cannot be read.
    """
    documents = [read_result(path) for path in paths]
    _check_alike(documents, paths)
    check_output(page, "an earlier page", lambda file: MARK.encode() in file.read(200))
    tables = [table_of(document["items"]) for document in documents]
    names = _names(documents, paths)
    figures = _figures(documents, tables)
    title = documents[0]["protocol"]["title"]
    folders = [(path if path.is_dir() else path.parent) / DRAWINGS for path in paths]
    differing = _differing(documents)
    with atomic_write(page) as temporary:
        temporary.write_text(_page(title, names, documents, figures, differing, folders), encoding="utf-8")
    return {
        "title": title, "names": names, "figures": figures, "differing": len(differing), "page": str(page),
        "of": len(documents[0]["items"]),
    }  # fmt: skip


def _check_alike(documents: Sequence[ResultDocument], paths: Sequence[Path]) -> None:
    """Refuse to compare what was not asked alike.

    Raises:
        UserError: naming what differs.
    """
    first = documents[0]
    for document, path in zip(documents[1:], paths[1:], strict=True):
        for part in ("name", "version", "scorer"):
            ours, theirs = first["protocol"].get(part), document["protocol"].get(part)
            if ours != theirs:
                raise UserError(f"{path}: protocol.{part}: {theirs}, but {paths[0]} has {ours}")
        ours, theirs = ({str(line["key"]) for line in one["items"]} for one in (first, document))
        if ours != theirs:
            other = sorted(ours ^ theirs)[0]
            raise UserError(f"{path}: other items than {paths[0]}, such as {other}; score the same data")


def _names(documents: Sequence[ResultDocument], paths: Sequence[Path]) -> list[str]:
    """What results are called: by their models where these differ, else by their files."""
    models = [str(document["model"]["source"]) for document in documents]
    if len(set(models)) == len(models):
        return models
    return [str(path.parent if path.name == "result.json" else path) for path in paths]


def _figures(documents: Sequence[ResultDocument], tables: Sequence[ScoreTable]) -> dict[str, Any]:
    protocols = [held_protocol(document["protocol"], "result") for document in documents]
    summaries = [summary_of(protocol, table) for protocol, table in zip(protocols, tables, strict=True)]
    compared = [
        paired((tables[0], table), (summaries[0], summary))
        for table, summary in zip(tables[1:], summaries[1:], strict=True)
    ]
    found = {}
    for name in documents[0]["figures"]:
        if all(name in document["figures"] for document in documents):
            found[name] = {
                "values": [document["figures"][name]["value"] for document in documents],
                "intervals": [
                    [document["figures"][name]["low"], document["figures"][name]["high"]]
                    for document in documents
                ],
                "differences": [one[name] for one in compared if name in one],
            }
    return found


def _score(line: DoneItem) -> float:
    rows = scored_rows(line)
    return sum(float(row.get("score") or 0.0) for row in rows) / max(len(rows), 1)


def _differing(documents: Sequence[ResultDocument]) -> list[list[DoneItem]]:
    """The items whose scores differ, those that differ most first."""
    others = [{str(line["key"]): line for line in document["items"]} for document in documents[1:]]
    found = []
    for line in documents[0]["items"]:
        lines = [line, *(other[str(line["key"])] for other in others)]
        scores = [_score(one) for one in lines]
        if max(scores) - min(scores) > 0:
            found.append((min(scores) - max(scores), int(line["index"]), lines))
    return [lines for _, _, lines in sorted(found, key=lambda one: one[:2])]


# --- the page -------------------------------------------------------------------------------------------------


def _page(
    title: str, names: Sequence[str], documents: Sequence[ResultDocument], figures: dict[str, Any],
    differing: Sequence[Sequence[DoneItem]], folders: Sequence[Path],
) -> str:  # fmt: skip
    """The page: figures, what was compared, and the items that differ."""
    style = resources.files("unimm").joinpath("evaluation/comparison.css").read_text(encoding="utf-8")
    shown = differing[:MAX_SHOWN]
    said = f"{len(differing):,} of {len(documents[0]['items']):,} items have other scores"
    said += (
        f"; the first {len(shown)} are shown, the largest differences first."
        if len(differing) > MAX_SHOWN
        else "."
    )
    return "\n".join(
        [
            MARK,
            f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{style}</style></head><body><main>",
            f"<h1>{_text(title)}</h1>",
            _figure_table(names, figures, str(documents[0].get("main", ""))),
            "<h2>What was compared</h2>",
            _facts_table(names, documents),
            f"<h2>Items that differ</h2><p>{said}</p>",
            *(_card(names, lines, folders) for lines in shown),
            "</main></body></html>\n",
        ]
    )


def _figure_table(names: Sequence[str], figures: dict[str, Any], main: str) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    head += "".join(f"<th>{_text(name)} less {_text(names[0])}</th>" for name in names[1:])
    rows = []
    for name, one in figures.items():
        cells = [
            f"<td>{_number(value)}<small>{_number(low)} to {_number(high)}</small></td>"
            for value, (low, high) in zip(one["values"], one["intervals"], strict=True)
        ]
        for found in one["differences"]:
            sure = found["low"] > 0 or found["high"] < 0
            kind = ' class="sure"' if sure else ""
            cells.append(
                f"<td{kind}>{_number(found['difference'], '+')}"
                f"<small>{_number(found['low'], '+')} to {_number(found['high'], '+')}</small></td>"
            )
        row = ' class="main"' if name == main else ""
        rows.append(f"<tr{row}><th scope=row>{_text(name)}</th>{''.join(cells)}</tr>")
    note = "<p class=note>95 % intervals; those of differences are paired, and bold where 0 lies outside.</p>"
    return f"<div class=wide><table><thead><tr><th>figure</th>{head}</tr></thead>{''.join(rows)}</table></div>{note}"


def _facts_table(names: Sequence[str], documents: Sequence[ResultDocument]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    facts: dict[str, list[str]] = {
        "model's SHA-256": [str(one["model"].get("sha256", ""))[:12] for one in documents],
        "protocol's SHA-256": [str(one.get("protocol_sha256", ""))[:12] for one in documents],
        "data": [", ".join(f"{n} {h[:12]}" for n, h in one["data"]["files"].items()) for one in documents],
        "judge": [str((one.get("judge") or {}).get("version") or "none") for one in documents],
        "unimm, torch": [
            ", ".join(str(one.get("versions", {}).get(name, "")) for name in ("unimm", "torch"))
            for one in documents
        ],
        "command": [str(one.get("command", "")) for one in documents],
    }
    rows = [
        f"<tr><th scope=row>{_text(name)}</th>{''.join(f'<td class=fact>{_text(value)}</td>' for value in values)}</tr>"
        for name, values in facts.items()
    ]
    return (
        f"<div class='wide facts'><table><thead><tr><th></th>{head}</tr></thead>{''.join(rows)}</table></div>"
    )


def _card(names: Sequence[str], lines: Sequence[DoneItem], folders: Sequence[Path]) -> str:
    """An item that differs: its prompt, what is right, and what each result has."""
    first = lines[0]
    right = first.get("fields", {}).get("answer", first.get("fields", {}).get("answers"))
    wanted = "" if right is None else f"<p class=right>right: {_text(_short(right))}</p>"
    parts = []
    for name, line, folder in zip(names, lines, folders, strict=True):
        score = _score(line)
        kind = "good" if score >= 1 else "bad" if score <= 0 else "half"
        said = f"<p>{_text(_short(line['answer']))}</p>" if "answer" in line else _drawings(folder, line)
        parts.append(f'<div class="{kind}"><b>{_text(name)}</b><span>{_number(score)}</span>{said}</div>')
    head = (
        f"<header><code>{_text(first['key'])}</code><p>{_text(_short(first['prompt']))}</p>{wanted}</header>"
    )
    return f"<article>{head}<section>{''.join(parts)}</section></article>"


def _drawings(folder: Path, line: DoneItem) -> str:
    """The drawings of an item, small, in the page itself; the names of those that are elsewhere now."""
    parts = []
    for one in line.get("images", []):
        path = folder / str(one["file"])
        if not path.is_file():
            parts.append(f"<p>{_text(one['file'])}</p>")
            continue
        image, buffer = read_image(path), io.BytesIO()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f'<img alt="{_text(one["file"])}" src="data:image/png;base64,{data}">')
    return "".join(parts)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 400 else f"{text[:400]}…"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:{sign}.4g}"
