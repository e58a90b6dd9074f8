"""The table and the charts of `benchmarks/systems.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from like_for_like.parts import BASE, SYSTEMS

Rows = Sequence[dict[str, Any]]
HEADS = {
    "tokens": "tokens an image",
    "memory_rows": "rows in memory",
    "samples_per_second": "samples a second, training",
    "answers_per_second": "answers a second",
    "memory_gib": "GiB, training",
}
BEGIN, END = "<!-- {name} -->", "<!-- end of {name} -->"


def write_report(rows: Rows, path: Path | None) -> None:
    """Print the tables of all tasks; with a path put them between their marks in that page, and draw the charts.

    Args:
        rows: results, one of a task and a system.
        path: of the page.
    """
    page = "" if path is None else path.read_text(encoding="utf-8")
    for task in sorted({row["task"] for row in rows}):
        own = [row for row in rows if row["task"] == task and row["system"] != BASE]
        lines = table(sorted(own, key=lambda row: list(SYSTEMS).index(row["system"])))
        print(f"\n{task}\n" + "\n".join(lines))
        if path is not None:
            begin, end = BEGIN.format(name=task), END.format(name=task)
            found = f"{begin}\n" + "\n".join(lines) + f"\n{end}"
            before, _, rest = page.partition(begin)
            page = before + found + rest.partition(end)[2]
            draw(own, path.parents[1] / "images" / f"systems-{task}.png", task)
    if path is not None:
        path.write_text(page, encoding="utf-8")


def table(rows: Rows) -> list[str]:
    """Return the lines of a Markdown table."""
    if not rows:
        return []
    figures = list(rows[0]["figures"])
    lines = [["system", *figures, *HEADS.values()]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        shares = [_share(row["figures"][name]) for name in figures]
        lines.append([row["system"], *shares, *(f"{row[name]:g}" for name in HEADS)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _share(score: dict[str, Any]) -> str:
    """A share in per cent, with its 95 % interval."""
    return f"{100 * score['rate']:.1f} ({100 * score['low']:.0f} to {100 * score['high']:.0f})"


def draw(rows: Rows, path: Path, task: str) -> None:
    """Draw what is right against what an image costs in tokens, and against the samples a second in training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    name = next(iter(rows[0]["figures"]))
    for axis, key, label in zip(
        axes,
        ("tokens", "samples_per_second"),
        ("tokens of an image in the stream", "samples a second in training"),
        strict=True,
    ):
        for row in rows:
            share = 100 * row["figures"][name]["rate"]
            looks = row["memory_rows"] > 0
            axis.scatter(row[key], share, marker="s" if looks else "o", color="C1" if looks else "C0")
            axis.annotate(
                row["system"], (row[key], share), xytext=(4, 3), textcoords="offset points", fontsize=8
            )
        axis.set_xlabel(label)
        axis.margins(x=0.2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{name} right, per cent")
    figure.suptitle(f"{task}: squares look at a memory, circles have all in the stream", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
