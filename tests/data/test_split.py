"""Holding items out: by their keys alone, together with what belongs to them; and items that both sides have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data import forms
from unimm.data.sources import Reading, open_source
from unimm.data.split import hold_out, shared_items, split_key
from unimm.errors import UserError


def held_keys(path: Path, share: float = 0.3, pairs: str = "image_to_text") -> set[str]:
    source = open_source(path, Reading(pairs))  # type: ignore[arg-type]
    trained, held = hold_out(source, share)
    assert sorted([*trained, *held]) == list(range(len(source)))
    return {source[index].key for index in held}


@pytest.mark.parametrize("form", forms.PAIRS)
def test_a_share_is_held_out_in_every_form(form: str, tmp_path: Path) -> None:
    path = forms.PAIRS[form](tmp_path / "data", 40)
    assert 4 <= len(held_keys(path)) <= 20
    assert held_keys(path) == held_keys(path) == held_keys(path, pairs="text_to_image")
    assert held_keys(path, 0.1) < held_keys(path, 0.5), "a larger share holds the same items out, and more"


def test_items_stay_on_their_side_when_others_come_and_whatever_lists_them(tmp_path: Path) -> None:
    few, many = forms.image_folder(tmp_path / "few", 20), forms.image_folder(tmp_path / "many", 40)
    assert held_keys(few) == {key for key in held_keys(many) if int(key[:3]) < 20}
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": "a star"}) for i in reversed(range(40))]
    (many / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(many)
    listed = {split_key(source[index], str(many)) for index in hold_out(source, 0.3)[1]}
    assert {key[:3] for key in held_keys(few)} == {key[:3] for key in listed if int(key[:3]) < 20}


def test_all_captions_of_an_image_stay_together(tmp_path: Path) -> None:
    folder = forms.image_list(tmp_path / "data", 12)
    file = folder / "metadata.jsonl"
    file.write_text(
        "".join(line.replace("a ", f"{word} ") + "\n" for word in ("one", "my") for line in file.open())
    )
    source = open_source(folder)
    for share in (0.1, 0.3, 0.6, 0.9):
        sides = [
            {split_key(source[index], str(folder)) for index in side} for side in hold_out(source, share)
        ]
        assert not sides[0] & sides[1] and all(sides)


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.999])
def test_few_items_are_divided_all_the_same(share: float, tmp_path: Path) -> None:
    source = open_source(forms.image_folder(tmp_path / "data", 2))
    assert [len(side) for side in hold_out(source, share)] == [1, 1]
    with pytest.raises(UserError, match="fewer than two items"):
        hold_out(open_source(forms.image_folder(tmp_path / "one", 1)), share)


def test_what_cannot_be_read_is_not_held_out(tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text("".join('{"text": "word"}\n' if i % 2 else "broken\n" for i in range(40)))
    trained, held = hold_out(open_source(path), 0.5)
    assert len(held) and set(held) < set(range(1, 40, 2)) and len(trained) + len(held) == 40


def test_the_same_content_under_other_names_is_found(tmp_path: Path) -> None:
    folder, tars = forms.image_folder(tmp_path / "data", 6), forms.shards(tmp_path / "tars", 4)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:-1] + b"?")  # as long, but another
    pairs = shared_items(list(open_source(folder)), list(open_source(tars)))
    assert pairs == [("000.png", "00000"), ("001.png", "00001"), ("002.png", "00002")]
    (folder / "000.png").unlink()  # read when it is compared, and gone by then
    assert shared_items([open_source(folder)[0]], list(open_source(tars))) == [("001.png", "00001")]


def test_texts_are_compared_where_there_are_no_images(tmp_path: Path) -> None:
    for name, words in (("a", ["one", "two"]), ("b", ["two", "six"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    a, b = (list(open_source(tmp_path / f"{name}.jsonl")) for name in "ab")
    assert shared_items(a, b) == [("line 2", "line 1")] and shared_items(a[:1], b) == []
