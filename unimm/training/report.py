"""One picture of a run: its curves, and the samples that it drew on the way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.images import atomic_write

SHOWN = 3  # sheets of samples: first, middle, last
HIDDEN = ("step", "stage")
PANELS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Losses", lambda key: "loss" in key),
    ("Gradient norm", lambda key: key == "grad_norm"),
    ("Learning rates", lambda key: key.startswith("lr/")),
    ("Speed (a second)", lambda key: key.endswith("_per_second")),
)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log.

    Raises:
        UserError: there is none, or it holds no step.
    """
    path = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path}: not found; name the folder of a run (its `output`)") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines ({error})") from None
    if not lines:
        raise UserError(f"{path}: empty; no step has been logged yet")
    return lines


def report(run: str | Path, file: str | Path | None = None) -> Path:
    """Draw curves and samples of a run.

    Args:
        run: its output folder.
        file: the PNG to write; by default `report.png` in that folder.

    Returns:
        The file.

    Raises:
        UserError: there is no log, or matplotlib is missing.
    """
    folder = Path(run)
    lines = read_metrics(folder)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("report: needs matplotlib; install it with: pip install 'unimm[report]'") from None
    sheets = _spread(sorted((folder / "samples").glob("*.png")))
    figure = Figure(figsize=(12, 7 + (5 if sheets else 0)), layout="constrained")
    grid = figure.add_gridspec(3 if sheets else 2, 6)
    for number, (title, chosen) in enumerate(PANELS):
        axes = figure.add_subplot(grid[number // 2, 3 * (number % 2) : 3 * (number % 2) + 3])
        _curves(axes, title, lines, [key for key in lines[-1] if key not in HIDDEN and chosen(key)])
    for number, sheet in enumerate(sheets):
        axes = figure.add_subplot(grid[2, 2 * number : 2 * number + 2])
        _picture(axes, sheet)
    last = lines[-1]
    figure.suptitle(f"{folder.name}: step {last['step']}, stage {last.get('stage', '')}")
    target = Path(file) if file is not None else folder / "report.png"
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return target


def _spread(paths: Sequence[Path]) -> list[Path]:
    """Return the first, the middle and the last of many."""
    if len(paths) <= SHOWN:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _curves(axes: Any, title: str, lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Draw values over steps; where stages change, a line."""
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        if any(value for _, value in points):
            axes.plot([step for step, _ in points], [value for _, value in points], label=key, linewidth=1)
    for before, after in itertools.pairwise(lines):
        if before.get("stage") != after.get("stage"):
            axes.axvline(before["step"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def _picture(axes: Any, path: Path) -> None:
    from PIL import Image

    with Image.open(path) as picture:
        axes.imshow(picture.convert("RGB"))
    axes.set_title(path.stem.lstrip("0") or "0")
    axes.axis("off")
