"""Tables of an evaluation for people; the same numbers as in the JSON report."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from unimm.console import one_line, terminal

FIGURE_NAMES = {
    "both": "object and background",
    "yesno": "yes/no",
    "place_named": "place, both objects named",
    "object": "object",
}


def print_report(document: dict[str, Any]) -> None:
    """Print the tables of a report from `unimm.evaluation.evaluate_recipe` on stdout."""
    console = terminal()
    for title in ("naming", "questions"):
        if title in document:
            console.print(_shares(title, document[title]))
    if "tables" in document:
        console.print(_tables(document["tables"]))
    if "drawing" in document:
        console.print(_drawing(document["drawing"]))
    for line in document.get("files", []):
        console.print(one_line(line))


def _shares(title: str, report: dict[str, Any]) -> Table:
    """A table with a row for each split and figure."""
    table = Table(title=title.capitalize(), title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("split", "figure"):
        table.add_column(column)
    for column in ("right", "of", "share", "95 % interval"):
        table.add_column(column, justify="right")
    for split, figures in report.items():
        for figure, score in figures.items():
            if isinstance(score, dict):
                cells = (
                    f"{score['right']:,}",
                    f"{score['count']:,}",
                    _percent(score["rate"]),
                    _interval(score),
                )
                table.add_row(split, FIGURE_NAMES.get(figure, figure), *cells)
            else:
                table.add_row(split, "answer is yes", "", "", _percent(score), "")
    return table


def _tables(report: dict[str, Any]) -> Table:
    """A table with a row for each split, format and figure, and for each kind of question."""
    table = Table(title="Tables", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("split", "asked for", "figure"):
        table.add_column(column)
    for column in ("right", "of", "share", "95 % interval"):
        table.add_column(column, justify="right")
    for split, parts in report.items():
        for part, figures in parts.items():
            for figure, score in figures.items():
                if isinstance(score, dict):
                    counts = f"{score['right']:,}", f"{score['count']:,}"
                    table.add_row(split, part, figure, *counts, _percent(score["rate"]), _interval(score))
                else:
                    table.add_row(split, part, figure, "", "", _percent(score), "")
    return table


def _drawing(report: dict[str, Any]) -> Table:
    """A table with a row for each split and figure, the ceilings beside the drawings."""
    table = Table(title="Drawing", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("split", "figure"):
        table.add_column(column)
    for column in ("of", "drawings", "95 % interval", "reconstructions", "renders", "ratio"):
        table.add_column(column, justify="right")
    for split, figures in report.items():
        for figure, scores in figures.items():
            drawn = scores["drawn"]
            table.add_row(
                split,
                FIGURE_NAMES.get(figure, figure),
                f"{drawn['count']:,}",
                _percent(drawn["rate"]),
                _interval(drawn),
                _percent(scores["reconstructed"]["rate"]),
                _percent(scores["rendered"]["rate"]),
                "" if scores["ratio"] is None else _percent(scores["ratio"]),
            )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(score: dict[str, Any]) -> str:
    return f"{100 * score['low']:.1f} – {100 * score['high']:.1f}"
