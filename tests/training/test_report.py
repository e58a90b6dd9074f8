"""The report of a run: one image with its curves and samples, and clear words where there is nothing to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.training.report import _draw, _plots, report, smooth


def test_curves_and_samples_are_on_one_image(tmp_path: Path) -> None:
    lines = [
        {"step": step, "stage": "one" if step < 5 else "two", "loss": 1 / step, "grad_norm": 1.0, "lr/a": 0.1}
        for step in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = report(tmp_path, tmp_path / "plain.png")
    (tmp_path / "samples").mkdir()
    for step in range(1, 6):
        Image.new("RGB", (40, 30), (50 * step, 0, 0)).save(tmp_path / "samples" / f"{step:06d}.png")
    written = report(tmp_path)
    assert written == tmp_path / "report.png"
    with Image.open(plain) as without, Image.open(written) as sheet:
        assert sheet.width == without.width and sheet.height > without.height
        colours = {pixel[:3] for _, pixel in sheet.convert("RGB").getcolors(sheet.width * sheet.height) or []}
    assert {(50, 0, 0), (150, 0, 0), (250, 0, 0)} <= colours  # first, middle and last
    assert (100, 0, 0) not in colours


def test_smoothing_follows_and_does_not_start_at_zero() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    step = smooth([0.0] * 50 + [1.0] * 50)
    assert step[49] == 0 and 0 < step[50] < 0.5 < 0.95 < step[-1] < 1
    assert smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]  # too few to smooth


def test_panels_are_those_that_the_run_logged(tmp_path: Path) -> None:
    """An image tokenizer's run: its own losses, codebook and held-out images; no tokens a second."""
    lines = [
        {"step": step, "stage": "one", "loss": 1.0, "reconstruction": 0.5, "generator": 0.0, "psnr": 20.0}
        | {"codebook_use": 0.5, "tokens_per_second": 0.0, "samples_per_second": 3.0, "grad_norm": 1.0}
        for step in (1, 2)
    ]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "psnr.jsonl").write_text('{"step": 2, "seen": 21.0, "vendor": 19.0}\n')
    plots = _plots(tmp_path, lines)
    assert [panel.unit for panel, _ in plots] == [
        "mean over a step", "PSNR, dB", "PSNR, dB", "codes in use, %", "norm", "samples a second",
    ]  # fmt: skip
    assert plots[0][1].keys() == {"loss", "reconstruction"} and plots[1][1].keys() == {"seen", "vendor"}
    assert plots[3][1] == {"codebook_use": [(1, 50.0), (2, 50.0)]}


def test_losses_of_training_and_validation_share_a_panel_and_a_colour(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    lines: list[dict[str, Any]] = [
        {"step": 0, "stage": "one", "validation/loss": 2.0, "validation/text_loss": 1.0}
    ]
    for step in range(1, 60):
        lines.append(
            {"step": step, "stage": "one", "loss": 2 / step, "text_loss": 1 / step, "other_loss": 0.1}
        )
    lines.append({"step": 60, "stage": "one", "validation/loss": 1.5, "validation/text_loss": 0.5})
    panel, series = _plots(tmp_path, lines)[0]
    assert set(series) == {"loss", "text_loss", "other_loss", "validation/loss", "validation/text_loss"}
    axes = Figure().subplots()
    _draw(axes, panel, series, lines)
    labelled = {
        str(line.get_label()).partition(":")[0]: line for line in axes.lines if ":" in str(line.get_label())
    }
    for name in ("loss", "text loss"):
        assert labelled[name].get_color() == labelled[f"validation {name}"].get_color()
        assert list(labelled[f"validation {name}"].get_xdata()) == [0, 60]
    assert labelled["validation text loss"].get_ydata()[-1] == 0.5, "measured values are not smoothed"
    assert len({line.get_color() for line in labelled.values()}) == 3


def test_answers_on_items_of_ones_own_have_a_panel(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for name in ("held-out", "trained-on"):
        line = {"step": 2, "exact_match": 0.5, "word_f1": 0.75, "answers": [{"key": "a"}]}
        (tmp_path / "samples" / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    plots = _plots(tmp_path, [{"step": 2, "loss": 1.0}])
    assert [panel.title for panel, _ in plots[1:]] == [
        "Answers on held-out items",
        "Answers on items trained on",
    ]
    assert plots[1][1] == {"exact_match": [(2, 50.0)], "word_f1": [(2, 75.0)]}


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: not found"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        report(tmp_path)
