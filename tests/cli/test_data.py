"""`unimm data check` and `unimm data encode`: the report, its exit status, and mistakes on one line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data import forms


def test_check_counts_kinds_sizes_tokens_and_names_what_is_bad(unimm, tiny: Path, tmp_path: Path) -> None:
    folder = forms.image_list(tmp_path / "data", 5)
    (folder / "images" / "3.png").write_bytes(b"no image")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"text": "only words"}) + "\n{broken\n")
    done = unimm("data", "check", folder, "--model", tiny, "--json")
    report = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert report["records"] == 5 and report["bad"] == 2
    assert report["kinds"] == {"text": 1, "image_to_text": 4}
    assert report["images"]["count"] == 4 and report["images"]["width"]["max"] == 64
    assert report["images"]["formats"] == {"PNG": 4}
    assert report["tokens"]["context"] == 128 and report["tokens"]["min"] > 0
    image, line = report["bad_items"]
    assert image["key"] == "line 4" and "3.png: not an image" in image["reason"]
    assert line["key"] == "line 7" and "not JSON" in line["reason"]
    shown = unimm("data", "check", folder, "--model", tiny)
    assert shown.code == 0 and "kinds.image_to_text" in shown.out and "line 7" in shown.out


def test_check_goes_on_past_a_broken_shard(unimm, tiny: Path, tmp_path: Path) -> None:
    folder = forms.shards(tmp_path, 6)
    (folder / "000.tar").write_bytes(b"broken")
    report = json.loads(unimm("data", "check", folder, "--model", tiny, "--json").out)
    assert report["records"] == 3 and report["bad_items"][0]["file"] == str(folder / "000.tar")
    (folder / "001.tar").write_bytes(b"broken")
    done = unimm("data", "check", folder, "--model", tiny)
    assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
    assert "000.tar: not a whole tar" in done.err


def test_mistakes_are_one_line(unimm, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text("{\n[\n")
    for path, words in {
        "nowhere": "nowhere: no such file or folder",
        "empty.jsonl": "empty.jsonl: has no records",
        "bad.jsonl": "none of its 2 records can be used; the first: ",
    }.items():
        done = unimm("data", "check", tmp_path / path, "--model", tiny)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert words in done.err
    done = unimm("data", "encode", tmp_path / "empty.jsonl", tmp_path / "out", "--model", tiny)
    assert done.code == 2 and "has no records" in done.err
    done = unimm("data", "check", tmp_path, "--field", "text")
    assert done.code == 2 and "expected NAME=COLUMN" in done.err


def test_files_that_the_shell_expanded(unimm, tiny: Path, tmp_path: Path) -> None:
    folder = forms.shards(tmp_path / "tars", 6)
    names = sorted(folder.glob("*.tar"))
    report = json.loads(unimm("data", "check", *names, "--model", tiny, "--json").out)
    assert report["records"] == 6 and report["source"].endswith("001.tar (2 files)")
    options = ["--pairs", "text_to_image", "--model", tiny, "--json"]
    encoded = json.loads(unimm("data", "encode", *names, tmp_path / "out", *options).out)
    again = unimm("data", "encode", *names, tmp_path / "out", *options)
    assert encoded["written"] == 6 and (again.code, json.loads(again.out)) == (0, encoded)
    done = unimm("data", "encode", names[0], tmp_path / "out", *options)
    assert done.code == 2 and "holds codes made with another source" in done.err


def test_what_leads_outside_needs_a_word(unimm, tiny: Path, tmp_path: Path) -> None:
    forms.image_folder(tmp_path / "private", 1)
    rows = tmp_path / "data" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text(json.dumps({"snapshot": "../private/000.png", "text": "a"}))
    done = unimm("data", "check", rows, "--model", tiny)
    assert done.code == 2 and "fields: {image: snapshot}" in done.err and done.err.count("\n") == 1
    done = unimm("data", "check", rows, "--model", tiny, "--field", "image=snapshot")
    assert done.code == 2 and "--allow-outside" in done.err and done.err.count("\n") == 1
    for options, kind in (
        (["--field", "image=snapshot", "--allow-outside"], "image_to_text"),
        (["--field", "image="], "text"),
    ):
        report = json.loads(unimm("data", "check", rows, "--model", tiny, "--json", *options).out)
        assert report["kinds"] == {kind: 1} and report["bad"] == 0


def test_encode_and_check_what_it_wrote(unimm, tiny: Path, tmp_path: Path) -> None:
    folder = forms.image_folder(tmp_path / "data", 3)
    options = ["--pairs", "text_to_image", "--model", tiny]
    report = json.loads(unimm("data", "encode", folder, tmp_path / "out", *options, "--json").out)
    assert report["written"] == 3 and report["tars"] == 1
    checked = json.loads(unimm("data", "check", tmp_path / "out", "--model", tiny, "--json").out)
    assert checked["kinds"] == {"text_to_image": 3} and checked["images"]["formats"] == {"codes": 3}


def test_preview_shows_tables_of_their_own_splits(unimm, tmp_path: Path) -> None:
    sheet = tmp_path / "tables.png"
    done = unimm(
        "data", "preview", "--data", "tables", "--difficulty", "small", "--split", "font", "-o", sheet
    )
    assert (done.code, done.err) == (0, "") and sheet.read_bytes().startswith(b"\x89PNG")
    for data, split, known in (
        ("tables", "vendor", "train, seen, larger, font"),
        ("emojiscenes", "font", "train, seen, composed, vendor"),
    ):
        done = unimm("data", "preview", "--data", data, "--split", split, "-o", tmp_path / "none.png")
        assert done.code == 2 and not (tmp_path / "none.png").exists()
        assert done.err == f"unimm: --split: {data} has no {split!r}; use one of {known}\n"
