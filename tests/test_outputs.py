"""An output never eats an input, nor a file that is something else: each command refuses, and all stays as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from unimm import outputs
from unimm.cli.main import main
from unimm.data.emojiscenes import pack
from unimm.errors import UserError
from unimm.preferences.rank import RANKED
from unimm.preferences.vote.votes import Votes
from unimm.training.report import report

CODES = {"codes": [[1, 2], [3, 4]]}
DRAWN = {
    "prompt": "a red apple",
    "candidates": [{"seed": 0, **CODES}, {"seed": 1, "codes": [[0, 2], [3, 4]]}],
}
VOTE = {"prompt": "a red apple", "chosen": CODES, "rejected": "b", "source": "ann"}
RANKING = VOTE | {"source": {"scorer": "rules", "seeds": [1, 2]}}


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that a folder holds."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a user, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "candidates.jsonl").write_text(json.dumps(DRAWN) + "\n")
    (tmp_path / "votes.jsonl").write_text(json.dumps(VOTE) + "\n")
    (tmp_path / "notes.txt").write_text("notes\n")
    (tmp_path / "cut").write_text("no newline at its end")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "one", "loss": 1.0}\n')
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "000001.png")
    os.symlink("candidates.jsonl", tmp_path / "link.jsonl")
    os.link(tmp_path / "candidates.jsonl", tmp_path / "hard.jsonl")
    for name in ("unimm-demo.png", "report.json", "drawings-seen.png", "NOTICE", "seen.png"):
        (tmp_path / name).write_text('{"mine": true}\n')
    return tmp_path


RANK = "preferences rank candidates.jsonl --model no/model -o"
COMMANDS = [
    (f"{RANK} candidates.jsonl", "candidates.jsonl: is read by this command"),
    (f"{RANK} ./samples/../candidates.jsonl", "candidates.jsonl: is read by this command"),
    (f"{RANK} link.jsonl", "link.jsonl: is read by this command"),
    (f"{RANK} hard.jsonl", "hard.jsonl: is read by this command"),
    (f"{RANK} votes.jsonl", "votes.jsonl: holds something else than an earlier ranking"),
    (f"{RANK} notes.txt", "notes.txt: holds something else than an earlier ranking"),
    (f"{RANK} samples/000001.png", "000001.png: holds something else than an earlier ranking"),
    (f"{RANK} samples", "samples: cannot be written (it is a folder)"),
    ("preferences vote candidates.jsonl -o candidates.jsonl", "candidates.jsonl: holds something"),
    ("preferences vote candidates.jsonl -o link.jsonl", "link.jsonl: cannot be written (it is a link"),
    ("preferences vote candidates.jsonl -o notes.txt", "notes.txt: holds something"),
    (
        "preferences align training/align-embedded output=.",
        "report.json: holds something else than an earlier",
    ),
    ("data preview -o notes.txt", "notes.txt: holds something else than an image"),
    ("data preview -o candidates.jsonl", "candidates.jsonl: holds something else than an image"),
    ("demo -o .", "unimm-demo.png: holds something else than an image"),
    ("report . -o metrics.jsonl", "metrics.jsonl: holds something else than an image"),
    ("report . -o samples/000001.png", "000001.png: is read by this command"),
    ("eval sampling/eval-emojiscenes output=.", "report.json: holds something else than an earlier report"),
    ("recipes copy training/siglip notes.txt", "notes.txt: is there already"),
    ("data pack . .", "NOTICE: holds something else than the notice of packed artwork"),
    (
        "tokenizer eval tokenizers/emojiscenes evaluation.output=.",
        "seen.png: holds something else than an image",
    ),
    (
        "tokenizer eval tokenizers/emojiscenes evaluation.output=samples evaluation.images=samples",
        "evaluation.output: samples: the images that are read are there",
    ),
]


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_what_is_there_stays(
    folder: Path, command: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert main(command.split()) == 2
    said = capfd.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    assert contents(folder) == before


def test_a_journal_of_something_else_is_not_cut(folder: Path) -> None:
    os.rename(folder / "cut", folder / "new.jsonl.state")
    before = contents(folder)
    with pytest.raises(UserError, match=r"new\.jsonl\.state:1: not what `unimm preferences vote` keeps"):
        Votes(folder / "new.jsonl", {"seed": 0, "pairs": None})
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.jsonl.state"])
def test_votes_go_through_no_link(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.touch()
    (tmp_path / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name}: cannot be written .it is a link"):
        Votes(tmp_path / "votes.jsonl", {})
    assert target.read_bytes() == b""


def test_hidden_files_in_a_folder_of_codes_stay(unimm_data: Path, tiny: Path) -> None:
    (unimm_data / "out").mkdir()
    (unimm_data / "out" / ".mine.jsonl").write_text("mine")
    command = ["data", "encode", unimm_data / "words.jsonl", unimm_data / "out", "--model", tiny]
    assert main([str(part) for part in command]) == 0
    assert (unimm_data / "out" / ".mine.jsonl").read_text() == "mine"
    before = contents(unimm_data)
    command[3] = unimm_data
    assert main([str(part) for part in command]) == 2  # there are tars of something else
    assert contents(unimm_data) == before


@pytest.fixture
def unimm_data(tmp_path: Path) -> Path:
    """A source of words, and a tar beside it."""
    (tmp_path / "words.jsonl").write_text('{"text": "an apple"}\n')
    (tmp_path / "mine.tar").write_bytes(b"mine")
    return tmp_path


KINDS: list[tuple[Callable[..., bool], bytes, bool]] = [
    (outputs.first_line_has(*RANKED), json.dumps(RANKING).encode() + b"\n{cut", True),
    (outputs.first_line_has(*RANKED), json.dumps(VOTE).encode(), False),
    (outputs.first_line_has(*RANKED), b"[" * 100_000, False),
    (outputs.first_line_has(*RANKED), b"\xff\xfe", False),
    (outputs.first_line_has(*RANKED), b'{"source": "rules"}', False),
    (outputs.document_has("a.b"), b'{"a": {"b": 0}}', True),
    (outputs.document_has("a.b"), b'{"a": 1}', False),
    (outputs.is_image_file, b"\x89PNG\r\n\x1a\n", True),
    (outputs.is_image_file, b"notes", False),
    (pack._is_index, b'{"apple": {"hexcode": "1f34e"}}', True),
    (pack._is_index, b'{"apple": 1}', False),
]


@pytest.mark.parametrize(("is_earlier", "content", "known"), KINDS)
def test_earlier_results_are_known(
    tmp_path: Path, is_earlier: Callable[..., bool], content: bytes, known: bool
) -> None:
    path = tmp_path / "out"
    outputs.check_output(path, "one", is_earlier)
    path.touch()
    outputs.check_output(path, "one", is_earlier)
    path.write_bytes(content)
    if known:
        outputs.check_output(path, "one", is_earlier)
    else:
        with pytest.raises(UserError, match="out: holds something else than one"):
            outputs.check_output(path, "one", is_earlier)


def test_an_earlier_report_is_drawn_anew(folder: Path) -> None:
    assert report(folder) == report(folder)
    with Image.open(folder / "report.png") as sheet:
        assert sheet.format == "PNG"
