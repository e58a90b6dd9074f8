"""The report of a run: one picture with its curves and samples, and clear words where there is nothing to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.training.report import report


def test_curves_and_samples_are_on_one_picture(tmp_path: Path) -> None:
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


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: not found"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        report(tmp_path)
