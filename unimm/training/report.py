"""One image of a run: its curves, how good it is on what it never saw, and the samples it made on the way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.files import atomic_write
from unimm.images import read_image
from unimm.outputs import check_output, is_image_file
from unimm.training.logging import kind_and_step
from unimm.training.recipe import VALIDATION

WIDTH = 14.0  # inches
DPI = 110
PANEL, MARGIN = 3.1, 1.0  # inches: height of a row of panels; of the title and the caption of the figure
WIDE = 2.0  # a sheet this much wider than high shares its row with one other, else with two
TEXTED = ("held-out", "trained-on")  # kinds of sheets with text to read
PLAYERS = ("reconstruction", "commitment", "generator", "discriminator")  # losses of an image tokenizer
SMOOTHED = 20  # a curve is averaged over about this part of its points


@dataclass(frozen=True)
class Panel:
    """One plot: its title, the unit of its values, and which keys of the log it shows."""

    title: str
    unit: str
    shows: Callable[[str], bool]
    smooth: bool = True
    factor: float = 1.0


PANELS = (
    Panel("Losses", "mean over a step", lambda key: "loss" in key or key.removeprefix(VALIDATION) in PLAYERS),
    Panel("Reconstruction", "PSNR, dB", lambda key: key.removeprefix(VALIDATION) == "psnr"),
    Panel("Codebook", "codes in use, %", lambda key: key == "codebook_use", factor=100),
    Panel("Perplexity of the codes", "codes", lambda key: key == "perplexity"),
    Panel("Preferences", "share or margin", lambda key: "accuracy" in key or "margin" in key),
    Panel("Norm of the gradient, before clipping", "norm", lambda key: key == "grad_norm"),
    Panel("Learning rates", "rate", lambda key: key.startswith("lr/"), smooth=False),
    Panel("Speed", "samples a second", lambda key: key == "samples_per_second"),
    Panel("Speed", "tokens a second", lambda key: key == "tokens_per_second"),
)
PREVIEWS = {  # files of numbers beside the samples
    "psnr.jsonl": Panel("Images never trained on", "PSNR, dB", lambda key: True, smooth=False),
    "psnr-trained-on.jsonl": Panel("Images that are trained on", "PSNR, dB", lambda key: True, smooth=False),
    "captions.jsonl": Panel("Captions of scenes never trained on", "right, %", lambda key: True, False, 100),
    "held-out.jsonl": Panel("Answers on held-out items", "like the data's, %", lambda key: True, False, 100),
    "trained-on.jsonl": Panel(
        "Answers on items trained on", "like the data's, %", lambda key: True, False, 100
    ),
}


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
        UserError: there is no log, the file is something else than an image, or matplotlib is missing.
    """
    folder = Path(run)
    lines = read_metrics(folder)
    target = Path(file) if file is not None else folder / "report.png"
    check_output(target, "an image", is_image_file, (folder / "samples").rglob("*.png"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("report: needs matplotlib; install it with: pip install 'unimm[report]'") from None
    plots = _plots(folder, lines)
    rows = _sheet_rows(folder / "samples")
    heights = [PANEL] * -(-len(plots) // 2) + [_height(row) for row in rows]
    figure = Figure(figsize=(WIDTH, sum(heights) + MARGIN), layout="constrained")
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
    for number, (panel, series) in enumerate(plots):
        alone = number == len(plots) - 1 and number % 2 == 0
        columns = slice(0, 6) if alone else slice(3 * (number % 2), 3 * (number % 2) + 3)
        _draw(figure.add_subplot(grid[number // 2, columns]), panel, series, lines)
    for place, row in enumerate(rows, len(heights) - len(rows)):
        span = 6 // _across(row[0])
        for column, sheet in enumerate(row):
            _image(figure.add_subplot(grid[place, span * column : span * (column + 1)]), sheet)
    figure.suptitle(_title(folder, lines), fontsize=16, fontweight="bold")
    figure.supxlabel(
        "Faint: as logged. Strong: smoothed. Dots: measured on held-out items. Dotted upright: where a stage ends.",
        fontsize=9,
        color="0.4",
    )
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    return target


Series = Mapping[str, Sequence[tuple[int, float]]]  # name -> (step, value)


def _title(folder: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    last = lines[-1]
    stages = list(dict.fromkeys(str(line["stage"]) for line in lines if line.get("stage")))
    text = f"{folder.name}: {last['step']:,} steps"
    return f"{text} ({' → '.join(stages)})" if stages else text


def _plots(folder: Path, lines: Sequence[Mapping[str, Any]]) -> list[tuple[Panel, Series]]:
    """The panels that have something to show; quality on held-out data comes right after the losses."""
    plots = [(panel, _series(lines, panel)) for panel in PANELS]
    held_out = []
    for name, panel in PREVIEWS.items():
        with suppress(OSError, ValueError):
            text = (folder / "samples" / name).read_text(encoding="utf-8")
            held_out.append((panel, _series([json.loads(line) for line in text.splitlines()], panel)))
    return [(panel, series) for panel, series in [*plots[:1], *held_out, *plots[1:]] if series]


def _series(lines: Sequence[Mapping[str, Any]], panel: Panel) -> Series:
    """The curves of a panel; those that are 0 throughout are left out."""
    keys = dict.fromkeys(key for line in lines for key in line if key not in ("step", "stage"))
    found: dict[str, list[tuple[int, float]]] = {}
    for key in keys:
        points = [
            (int(line["step"]), panel.factor * float(line[key]))
            for line in lines
            if isinstance(line.get(key), int | float)
        ]
        if panel.shows(key) and any(value for _, value in points):
            found[key] = points
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """A moving average that weighs the latest points most; it starts at the first value, not at 0."""
    decay = 1 - 1 / max(1.0, len(values) / SMOOTHED)
    averaged, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averaged.append(total / weight)
    return averaged


def _draw(axes: Any, panel: Panel, series: Series, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the curves of one panel; the legend says where each has arrived."""
    from matplotlib.ticker import FuncFormatter

    values_of_all = [value for points in series.values() for _, value in points]
    bases = list(dict.fromkeys(name.removeprefix(VALIDATION) for name in series))
    for name, points in series.items():
        base, measured = name.removeprefix(VALIDATION), name.startswith(VALIDATION)
        steps, values = zip(*points, strict=True)
        whole = base == "loss" and len(bases) > 1  # lies over its parts, dashed, so that they are seen too
        colour = "black" if whole else f"C{bases.index(base) % 10}"  # training's and validation's the same
        smoothed = panel.smooth and not measured
        shown = smooth(values) if smoothed else values
        last = f"{max(shown):.3g} at most" if name.startswith("lr/") else f"{shown[-1]:.3g}"
        label = f"{name.removeprefix('lr/').replace('_', ' ').replace('/', ' ')}: {last}"
        if smoothed:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        marker = "o" if measured or (len(points) < 30 and not panel.smooth) else None
        style = {"linestyle": "--", "zorder": 3} if whole else {"linestyle": "-"}
        if measured:
            style = {"linestyle": ":", "zorder": 4}
        axes.plot(steps, shown, color=colour, linewidth=2, label=label, marker=marker, markersize=4, **style)
    if min(values_of_all) > 0 and max(values_of_all) > 30 * min(values_of_all):
        axes.set_yscale("log")
    for before, after in itertools.pairwise(lines):
        if before.get("stage") != after.get("stage"):
            axes.axvline(before["step"], color="0.5", linewidth=1, linestyle=":")
    axes.set_title(panel.title, fontsize=13, loc="left")
    axes.set_ylabel(panel.unit, fontsize=11)
    axes.set_xlabel("step", fontsize=11)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(labelsize=10)
    axes.set_xlim(0, lines[-1]["step"] * 1.01)
    if panel.unit.endswith("%"):
        axes.set_ylim(0, 104)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    few = len(values_of_all) < 5000  # to look for the best place takes long
    axes.legend(fontsize=10, framealpha=0.8, loc="best" if few else "upper right")


# --- samples ------------------------------------------------------------------------------------------------


def _sheet_rows(folder: Path) -> list[list[Path]]:
    """Sheets of samples, a row for each kind (`seen-0000250.png` is of the kind `seen`): early ones to late."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")):
        kinds.setdefault(kind_and_step(path)[0], []).append(path)
    return [_spread(paths, _across(paths[0])) for paths in kinds.values()]


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Return the first, the last, and what lies evenly between."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


def _across(path: Path) -> int:
    """How many sheets like this stand in a row: few where there is much to see or to read."""
    return 2 if _ratio(path) > WIDE or kind_and_step(path)[0] in TEXTED else 3


def _ratio(path: Path) -> float:
    """Width over height of an image."""
    width, height = read_image(path).size
    return width / height


def _height(row: Sequence[Path]) -> float:
    """Inches that a row of sheets needs, with their titles."""
    width = WIDTH / _across(row[0])
    return max(width / _ratio(path) for path in row) + 0.4


def _image(axes: Any, path: Path) -> None:
    axes.imshow(read_image(path))
    kind, step = kind_and_step(path)
    words = [kind or "drawings"] + ([f"step {step:,}"] if step is not None else [])
    if any(path.parent.glob("psnr*.jsonl")):  # an image tokenizer's
        words.append("originals above, reconstructions below")
    axes.set_title(", ".join(words), fontsize=12, loc="left")
    axes.axis("off")
