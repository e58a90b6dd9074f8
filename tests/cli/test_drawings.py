"""Files of drawings: no two prompts share a name, nothing is overwritten, and each batch is kept as it is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unimm.cli.drawings import MAX_BYTES, drawing_name, save_drawing
from unimm.loading import load

ALIKE = (
    ("a red apple!", "A red apple?", "a red apple", "a  red apple", "a-red-apple", "a_red_apple", "a red apple "),
    ("一个红苹果", "一只黑猫", "一个红苹果。"),
    ("красное яблоко", "Красное яблоко", "зелёное яблоко"),
    ("🍎", "🍏", "?", "!", "…"),
    ("word " * 40 + "one", "word " * 40 + "two"),
    ("../../etc/passwd", "etc/passwd", "..", ".", "CON", "a\x00b", "a\nb", "a b", "\ud800", "\udfff"),
)  # fmt: skip


@pytest.mark.parametrize("prompts", ALIKE)
def test_prompts_do_not_share_a_name(prompts: tuple[str, ...]) -> None:
    names = [
        drawing_name(prompt, 7, 0).lower() for prompt in prompts
    ]  # as file systems that ignore capitals see it
    assert len(set(names)) == len(prompts)


def test_letters_of_every_script_stay() -> None:
    assert drawing_name("a red apple", 7, 0) == "a-red-apple-7-0"
    assert drawing_name("一个红苹果", 7, 12) == "一个红苹果-7-12"
    assert drawing_name("красное яблоко", 7, 0) == "красное-яблоко-7-0"
    composed, taken_apart = (unicodedata.normalize(form, "un café") for form in ("NFC", "NFD"))
    assert drawing_name(composed, 1, 0) == drawing_name(taken_apart, 1, 0)


@given(st.text(max_size=300), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_every_name_is_one_of_a_file(prompt: str, seed: int, index: int) -> None:
    name = drawing_name(prompt, seed, index)
    assert name and not set(name) & set('/\\:*?"<>|\0') and name[0] not in ".-"
    assert name.isprintable() and len(name.encode()) <= MAX_BYTES + 40


def test_another_drawing_of_the_name_stays(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first = save_drawing(red, tmp_path, "apple-7-0")
    assert save_drawing(red, tmp_path, "apple-7-0") == first  # the same once more
    second = save_drawing(blue, tmp_path, "apple-7-0")
    assert (first.name, second.name) == ("apple-7-0.png", "apple-7-0-v2.png")
    assert [Image.open(path).getpixel((0, 0)) for path in (first, second)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_drawing_stays(tmp_path: Path, kind: str) -> None:
    elsewhere, there = tmp_path / "elsewhere", tmp_path / "apple-7-0.png"
    if kind == "link":
        elsewhere.write_text("mine")
    if "link" in kind:
        there.symlink_to(elsewhere)
    elif kind == "folder":
        there.mkdir()
    else:
        os.mkfifo(there)
    path = save_drawing(Image.new("RGB", (8, 8)), tmp_path, "apple-7-0")
    assert path.name == "apple-7-0-v2.png"
    assert elsewhere.exists() == (kind == "link")
    if kind == "link":
        assert elsewhere.read_text() == "mine"


def test_other_models_do_not_overwrite(unimm, tiny: Path, tmp_path: Path) -> None:
    def run(*options: object) -> str:
        done = unimm("draw", "hi", "--seed", 7, "-o", tmp_path, "--json", "--model", tiny, *options)
        return Path(json.loads(done.out)[0]["image"]).name

    assert [run(), run("--temperature", 0), run()] == ["hi-7-0.png", "hi-7-0-v2.png", "hi-7-0.png"]


def test_prompts_that_look_alike_are_all_kept(unimm, tiny: Path, tmp_path: Path) -> None:
    prompts = [prompt for group in ALIKE[:4] for prompt in group]
    done = unimm("draw", *prompts, "--seed", 7, "-o", tmp_path, "--json", "--model", tiny)
    rows = json.loads(done.out)
    assert [row["prompt"] for row in rows] == prompts
    assert len({row["image"] for row in rows}) == len(list(tmp_path.iterdir())) == len(prompts)
    for row, drawing in zip(rows, load(tiny).draw(prompts, seed=7), strict=True):
        with Image.open(row["image"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(drawing))


def test_batches_are_those_of_one_call(unimm, tiny: Path, tmp_path: Path) -> None:
    done = unimm(
        "draw", "a", "b", "-n", 3, "--seed", 7, "-o", tmp_path, "--json", "--model", tiny, "--batch-size", 4
    )
    for row, drawing in zip(json.loads(done.out), load(tiny).draw(["a", "b"], n=3, seed=7), strict=True):
        with Image.open(row["image"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(drawing))


def test_a_stop_keeps_what_is_drawn(tiny: Path, tmp_path: Path) -> None:
    options = [
        "--seed",
        "7",
        "-n",
        "4000",
        "--batch-size",
        "2",
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(tiny),
    ]
    command = [sys.executable, "-m", "unimm", "draw", "a red apple", *options]
    heard = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # which a job in the background ignores
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as running:
        while len(drawn := list((tmp_path / "out").glob("*.png"))) < 4 and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    kept = sorted((tmp_path / "out").iterdir())
    assert running.returncode == 130 and "Traceback" not in said
    assert 4 <= len(drawn) <= len(kept) < 4000
    assert f"{len(kept)} of 4000 drawings are in {tmp_path / 'out'} (seed 7)" in said
    for path in kept:
        Image.open(path).verify()
