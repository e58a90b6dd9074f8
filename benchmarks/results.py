"""Measure the embedded model and write the figures into the tables of docs/results/embedded.md.

    python benchmarks/results.py                                    # the embedded model
    python benchmarks/results.py --model runs/embedded-pairs/export --curve runs/embedded-pairs

Runs `unimm eval sampling/eval-emojiscenes.yaml` and measures what `unimm tokenizer eval` does; figures that are in
`--output` already are not measured again. `--curve RUN` also makes the learning curve of that training run. What is
between `<!-- results: NAME -->` and `<!-- /results -->` on the page is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import unimm
from unimm.data.emojiscenes.scenes import Split
from unimm.evaluation import evaluate_recipe
from unimm.files import atomic_write
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.training.tokenizer.evaluate import evaluate_split

ROOT = Path(__file__).parents[1]
PAGE, RECIPE = ROOT / "docs" / "results" / "embedded.md", ROOT / "sampling" / "eval-emojiscenes.yaml"
SPLITS = [split for split in get_args(Split) if split != "train"]
NAMING = {"both": "both right", "object": "object", "background": "background"}
QUESTIONS = {
    "all": "all kinds", "what": "what", "count": "how many", "background": "which background", "where": "where",
    "yesno": "yes or no (chance 50 %)", "category": "category",
}  # fmt: skip
DRAWING = {
    "object": "object named by the judge", "background": "background", "place": "place of two objects",
    "count": "count",
}  # fmt: skip
TOKENIZER_SAMPLES, TOKENIZER_SEED = 2000, 1
STEPS = 100  # losses of the learning curve are means over so many steps


def main() -> None:
    """Measure what has not been measured yet, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder (default: the embedded model)")
    parser.add_argument("--output", type=Path, default=Path("runs/results"), help="where figures are stored")
    parser.add_argument(
        "--curve", type=Path, metavar="RUN", help="training run whose learning curve is wanted"
    )
    options = parser.parse_args()
    overrides = [f"output={options.output}", *([f"model={options.model}"] if options.model else [])]
    report = _stored(options.output / "report.json") or evaluate_recipe(RECIPE, overrides)
    if report["model"] != (options.model or "embedded"):
        parser.error(f"{options.output} holds figures of {report['model']}; give another --output")
    tokenizer = _stored(options.output / "tokenizer.json")
    if tokenizer is None:
        tokenizer = measure_tokenizer(options.model)
        with atomic_write(options.output / "tokenizer.json") as path:
            path.write_text(json.dumps(tokenizer, indent=2) + "\n")
    tables = {
        "naming": shares("naming: object and background, exact", report["naming"], NAMING),
        "questions": shares("questions", report["questions"], QUESTIONS),
        "drawing": drawing_table(report["drawing"]),
        "tokenizer": tokenizer_table(tokenizer),
    }
    if options.curve:
        tables["curve"] = curve_table(options.curve)
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in tables.items():
        text = put(text, name, rows)
    with atomic_write(PAGE) as path:
        path.write_text(text, encoding="utf-8")


def _stored(path: Path) -> Any:
    """Figures of an earlier run, or None."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measure_tokenizer(model: str | None) -> dict[str, Any]:
    """Reconstruct held-out scenes of each split with the model's image tokenizer."""
    tokenizer = unimm.load(model).image_tokenizer
    assert isinstance(tokenizer, ImageTokenizer), (
        f"{model}: only models with an image tokenizer of unimm's make"
    )
    return {split: evaluate_split(tokenizer, split, TOKENIZER_SAMPLES, TOKENIZER_SEED) for split in SPLITS}


def shares(title: str, report: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Rows of figures by columns of splits."""
    lines = [[name, *(_share(report[split][key]) for split in report)] for key, name in names.items()]
    return table([title, *report], lines)


def drawing_table(report: dict[str, Any]) -> list[str]:
    """Drawings beside their ceilings; renders of one split only, since those of the other give the same."""
    columns = ["drawn", "reconstructed", "rendered"]
    heads = [
        f"drawings from captions, guidance {_guidance():g}",
        "seen",
        "on reconstructions",
        "on real renders",
    ]
    lines = []
    for key, name in DRAWING.items():
        seen, composed = (report[split][key] for split in ("seen", "composed"))
        lines.append([name, *(_share(seen[c]) for c in columns), *(_share(composed[c]) for c in columns[:2])])
    return table([*heads, "composed", "on reconstructions"], lines)


def _guidance() -> float:
    """The guidance scale of the recipe."""
    found = re.search(r"guidance_scale: ([\d.]+)", RECIPE.read_text(encoding="utf-8"))
    assert found is not None
    return float(found[1])


def tokenizer_table(figures: dict[str, Any]) -> list[str]:
    """PSNR, SSIM and codebook use by split."""
    first = [f"PSNR in dB ({TOKENIZER_SAMPLES} images)", *(f"{figures[s]['psnr']:.1f}" for s in SPLITS)]
    second = ["SSIM", *(f"{figures[s]['ssim']:.2f}" for s in SPLITS)]
    third = ["codebook use", *(f"{figures[s]['codebook_use']:.0%}".replace("%", " %") for s in SPLITS)]
    return table(["image tokenizer, 64 codes of 1,024", *SPLITS], [first, second, third])


def curve_table(run: Path) -> list[str]:
    """Naming at each preview of a run, and the losses up to there."""
    logged = [line for line in _lines(run / "metrics.jsonl") if "text_loss" in line]
    previews = _lines(run / "samples" / "captions.jsonl")
    previews = [preview for preview in previews if preview["step"] >= logged[0]["step"]]
    heads = [f"{preview['step']:,}" for preview in previews]
    lines = [
        [f"naming, {split} (128 images)", *(f"{100 * preview[split]:.0f} %" for preview in previews)]
        for split in ("seen", "vendor")
    ]
    for kind in ("code", "text"):
        means = [_mean(logged, f"{kind}_loss", preview["step"]) for preview in previews]
        lines.append([f"{kind} loss (mean of {STEPS} steps)", *(f"{mean:.2f}" for mean in means)])
    return table(["learning curve of the last run, by step", *heads], lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _mean(logged: Iterable[dict[str, Any]], key: str, step: int) -> float:
    """The mean of what was logged in the last steps up to `step`."""
    values: list[float] = [line[key] for line in logged if step - STEPS < line["step"] <= step]
    return sum(values) / len(values)


def _share(score: dict[str, Any]) -> str:
    return f"{100 * score['rate']:.0f} % ({score['count']:,})"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]


def put(text: str, name: str, rows: Sequence[str]) -> str:
    """Replace a table of the page."""
    start, end = f"<!-- results: {name} -->", "<!-- /results -->"
    before, found, rest = text.partition(f"{start}\n")
    assert found, f"{PAGE}: no {start}"
    return "\n".join([f"{before}{start}", "", *rows, "", rest[rest.index(end) :]])


if __name__ == "__main__":
    main()
