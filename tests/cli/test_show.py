"""`unimm ask --show` draws what an answer points at on the image that was asked about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.families.qwen2_vl_checkpoints import QWEN2_VL
from unimm import Video, load

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


@pytest.mark.parametrize("more", [("--frames", "2"), ("--fps", "1")])
def test_frames_are_for_models_that_look_at_videos(unimm, tmp_path: Path, more: tuple[str, str]) -> None:
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue", "white")]
    clip, own = tmp_path / "clip.gif", tmp_path / "qwen2_vl"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500)
    refused = unimm("ask", str(clip), "what happens?", *more)
    assert refused.code != 0 and "video: this model understands images only" in refused.err
    QWEN2_VL.write(own)
    done = unimm("ask", str(clip), "what happens?", *more, "--max-new-tokens", "4", "--model", own, "--json")
    assert done.code == 0, done.err
    kept = {"--frames": frames[::2], "--fps": frames}[more[0]]  # at least 4 by time
    wanted = load(own, device="cpu").ask(Video(kept), "what happens?", max_new_tokens=4)
    assert json.loads(done.out)["answer"] == wanted
