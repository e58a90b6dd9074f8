"""`unimm ask --show` draws what an answer points at on the image that was asked about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

POINT = r'<point x="[1-9][0-9]\.0" y="[1-9][0-9]\.0" alt="a">a</point>'
BOX = r"<[1-4][0-9]0, [1-4][0-9]0, [5-9][0-9]0, [5-9][0-9]0>"


@pytest.fixture
def white(tmp_path: Path) -> Path:
    path = tmp_path / "white.png"
    Image.new("RGB", (200, 100), "white").save(path)
    return path


@pytest.mark.parametrize("form", [POINT, BOX])
def test_points_and_boxes_of_an_answer_are_drawn(unimm, white: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip("llguidance")
    shown = tmp_path / "shown.png"
    done = unimm("ask", str(white), "where is it?", "--regex", form, "--show", str(shown), "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    (place,) = found["places"]
    scale = 100 if form == POINT else 1000
    said = [float(part) for part in json_numbers(found["answer"])]
    assert place["numbers"] == pytest.approx([n / scale * (200, 100)[i % 2] for i, n in enumerate(said)])
    marked = np.asarray(Image.open(shown)) != 255
    assert Image.open(shown).size == (200, 100) and 0 < marked.any(-1).mean() < 0.5
    x, y = (round(number) for number in place["numbers"][:2])
    assert marked[min(y, 99), min(x, 199)].any()


def json_numbers(text: str) -> list[str]:
    """The numbers of an answer, in their order."""
    words = "".join(c if c.isdigit() or c == "." else " " for c in text).split()
    return [word for word in words if word != "."]


def test_there_is_nothing_to_draw_on_without_an_image(unimm, tmp_path: Path) -> None:
    done = unimm("ask", "where is it?", "--show", str(tmp_path / "shown.png"))
    assert done.code != 0 and done.err.strip() == "unimm: ask: --show draws on the first image; name one"
    assert not list(tmp_path.iterdir())
