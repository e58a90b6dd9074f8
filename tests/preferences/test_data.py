"""Preference files: what is read, and the one line that each mistake gets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimm.data.sources import Reading
from unimm.errors import UserError
from unimm.preferences.check import check_preferences, is_preferences
from unimm.preferences.data import check_response_codes, read_preferences, write_lines


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.png")
    asked = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]}
    ]
    rows = [
        {"prompt": "a star", "chosen": {"codes": [[1, 2], [3, 4]]}, "rejected": {"image": "b.png"}},
        {"prompt": asked, "chosen": "a pear", "rejected": {"text": "an apple"}, "margin": 0.5},
        {"prompt": "hi", "chosen": "a", "rejected": "b", "scores": [2.0, -1], "source": {"judge": "me"}},
    ]
    drawn, seen, said = read_preferences(write(tmp_path, rows[0], "\n", *rows[1:]))
    assert (drawn.modality, drawn.words, drawn.images) == ("image", "a star", [])
    assert drawn.chosen.codes == [[1, 2], [3, 4]]
    assert drawn.rejected.image == "b.png"
    assert [blob.path for blob in drawn.files()] == [str(tmp_path / "b.png")]
    assert (seen.modality, seen.words, seen.images) == ("text", "what?", ["a.png"])
    assert seen.read_images()[0].size == (4, 4) and seen.key() == ("what?", str(tmp_path / "a.png"))
    assert (seen.chosen.text, seen.rejected.text, seen.margin) == ("a pear", "an apple", 0.5)
    assert said.scores == [2.0, -1.0]


GOOD = {"prompt": "a star", "chosen": "one", "rejected": "two"}
CODES = {"codes": [[1, 2], [3, 4]]}
MISTAKES: list[tuple[Any, str]] = [
    ("{", "pairs.jsonl:2: not JSON"),
    ("[1]", "pairs.jsonl:2: expected a JSON object, got [1]"),
    ({**GOOD, "chosen": CODES}, "chosen is an image and rejected a text; give two of a kind"),
    ({**GOOD, "chosen": {"image": "c.png"}, "rejected": CODES}, "c.png: no such image"),
    ({**GOOD, "chosen": {"codes": [[1, 2], [3]]}}, "chosen: the rows of codes are of different lengths"),
    ({**GOOD, "chosen": {"codes": [[1, -2]]}}, "chosen.codes[0][1]: expected at least 0, got -2"),
    ({**GOOD, "chosen": {"codes": [[1, 2.5]]}}, "chosen.codes[0][1]: expected an integer, got 2.5"),
    ({**GOOD, "chosen": {"text": "a", "image": "b"}}, "chosen: expected one of text, image, codes, got text, image"),
    ({**GOOD, "chosen": " "}, "chosen: the text is empty"),
    ({**GOOD, "scores": [1.0, float("nan")]}, "scores[1]: expected a finite number, got NaN"),
    ({**GOOD, "scores": [1.0]}, "scores: expected at least 2, got [1.0]"),
    ({**GOOD, "margin": -1.0}, "margin: expected at least 0, got -1.0"),
    ({**GOOD, "chose": "a"}, 'chose: unknown key; did you mean "chosen"?'),
    ({"prompt": "a", "chosen": "b"}, "pairs.jsonl:2: rejected: missing"),
    ({**GOOD, "prompt": [{"role": "system", "content": "x"}]}, "prompt: ends in a turn of the system"),
    ({**GOOD, "prompt": [{"role": "x", "content": "y"}]}, "prompt[0].role: 'x' is none of system, user"),
    ({**GOOD, "prompt": " "}, "prompt: empty"),
    ({**GOOD, "reject": "a"}, 'reject: unknown key; did you mean "rejected"?'),
    ({**GOOD, "prompt": [{"content": [{"image": "x.png"}, {"text": "y"}]}]}, "x.png: no such image"),
    (
        {"prompt": [{"content": [{"image": "p.png"}]}], "chosen": CODES, "rejected": {"codes": [[1]]}},
        "a drawing is asked for in words only",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "line"), MISTAKES)
def test_mistakes_are_named_with_their_line(tmp_path: Path, row: Any, line: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    path = write(tmp_path, GOOD, row)
    with pytest.raises(UserError) as error:
        read_preferences(path)
    assert line in str(error.value)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        read_preferences(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match=r"pairs\.jsonl: empty"):
        read_preferences(write(tmp_path, "\n\n"))


@pytest.mark.parametrize(
    ("codes", "line"),
    [
        ([[0, 1], [2, 8]], "x: code 8; this model's codes are 0 to 7"),
        ([[0, 1]], "x: 1 x 2 codes; this model draws 2 x 2"),
    ],
)
def test_codes_of_another_model(codes: list[list[int]], line: str) -> None:
    with pytest.raises(UserError, match=line):
        check_response_codes(codes, 8, (2, 2), "x")
    check_response_codes([[7, 0], [0, 0]], 8, (2, 2), "x")
    check_response_codes([[7, 0, 1]], 8, None, "x")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    assert write_lines(path, [GOOD, {**GOOD, "chosen": "drei Äpfel"}]) == 2
    assert [pair.chosen.text for pair in read_preferences(path)] == ["one", "drei Äpfel"]
    with pytest.raises(ValueError):
        write_lines(path, [{**GOOD, "scores": [float("nan"), 1]}])
    assert len(read_preferences(path)) == 2  # the old file stays whole


@pytest.mark.parametrize("name", ["../private.png", "link.png", "{path}"])
def test_images_stay_in_the_folder_of_the_file_unless_allowed(name: str, tmp_path: Path) -> None:
    image = tmp_path / "private.png"
    Image.new("RGB", (4, 4)).save(image)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(image)
    row = {"prompt": "p", "chosen": {"image": name.format(path=image)}, "rejected": {"codes": [[1]]}}
    path = write(folder, row)
    with pytest.raises(
        UserError, match=r"jsonl:1: .*outside .*data; allow_outside: true \(--allow-outside\)"
    ):
        read_preferences(path, Reading())
    with pytest.raises(UserError, match="outside"):
        check_preferences(str(path))
    (found,) = read_preferences(path)
    assert found.read_image(name.format(path=image)).size == (4, 4)


def test_a_pipe_is_no_file_of_preferences(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="is a pipe; expected a regular file"):
        read_preferences(tmp_path / "pairs.jsonl")
    assert not is_preferences(str(tmp_path / "pairs.jsonl"))


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    (tmp_path / "pairs.jsonl").write_bytes(f"{row}\n".encode("utf-8-sig"))
    assert read_preferences(tmp_path / "pairs.jsonl")[0].words == "p"
    (tmp_path / "pairs.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: not JSON"):
        read_preferences(tmp_path / "pairs.jsonl")
