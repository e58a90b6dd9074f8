"""What is printed: other people's text never reaches the terminal as commands, and no encoding stops a result."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unimm import console
from unimm.cli.main import main
from unimm.cli.model import show_captions
from unimm.errors import UserError, UserNote
from unimm.evaluation.report import print_report
from unimm.preferences.dpo import PreferenceRecipe
from unimm.sections import read_yaml
from unimm.training.logging import RunLog

# Each moves the cursor, colours, renames the window, rings, turns text around or is no text at all.
ATTACKS = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "a\rb", "a\x08b", "\x7f", "\u202eabc", "\u2066abc\u2069", "\u200f",
    "\u2028line", "\udcff", "\U000e0041", "\ufeffx", "\x00", "\x85",
]  # fmt: skip
PLAIN = [
    "a red apple",
    "täglich",
    "赤いリンゴ",
    "👩‍👩‍👧",
    "e\u0301",
    "a [red]b[/red] :smile:",
    "日本\u3000語",
]


def harmless(text: str) -> bool:
    """Whether a terminal would only show it."""
    return all(
        character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
        for character in text
    ) and not any(
        "\u202a" <= character <= "\u202e" or "\u2060" <= character <= "\u2069" for character in text
    )


PRINTERS: dict[str, Callable[[str], Any]] = {
    "say": console.say,
    "print_text": console.print_text,
    "print_json": lambda text: console.print_json({text: text}),
    "print_tree": lambda text: console.print_tree({text: {"a": text, "b": [text]}}, text),
    "print_table": lambda text: console.print_table((text, "b"), [(text, 1)], text),
    "terminal": lambda text: console.terminal().print(text),
    "one caption": lambda text: show_captions([{"image": text, "caption": text}]),
    "captions": lambda text: show_captions([{"image": text, "caption": text}] * 2),
    "report": lambda text: print_report({"files": [text]}),
}


@pytest.mark.parametrize("name", PRINTERS)
@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_no_printer_lets_an_escape_through(
    name: str, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    PRINTERS[name](attack)
    said = capsys.readouterr()
    assert harmless(said.out + said.err) and said.out + said.err


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_notes_and_warnings_are_printed_harmless(attack: str, capfd: pytest.CaptureFixture[str]) -> None:
    with console.quiet_stdout():
        warnings.warn(f"{attack} is odd", UserNote, stacklevel=1)
        console.say(attack)
    assert harmless(capfd.readouterr().err)


def test_a_run_prints_its_names_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"name": "a", "steps": 1, "batch": 1, "lr": {"decoder": 1e-3}}
    logging = {"tensorboard": False}
    data = {"file": "x"}
    recipe = PreferenceRecipe.model_validate(
        {
            "task": "dpo",
            "output": str(tmp_path / "\x1b[31m"),
            "data": data,
            "stages": [stage],
            "logging": logging,
        }
    )
    log = RunLog(recipe, 0)
    log.say(f"done: {recipe.output}")
    log.close()
    said = capsys.readouterr().out
    assert "\\x1b[31m" in said and harmless(said)


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_stays_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.printable(text) == console.one_line(text) == text
    console.print_text(text)
    console.terminal().print(text)
    assert capsys.readouterr().out == f"{text}\n" * 2


def test_newlines_stay_in_answers_but_not_in_cells(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_text("one\ntwo\tthree")
    assert capsys.readouterr().out == "one\ntwo\tthree\n"
    console.print_table(("name",), [("one\ntwo  forged",)])
    assert "one\\ntwo  forged" in capsys.readouterr().out


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_is_made_harmless(text: str) -> None:
    assert harmless(console.printable(text))
    assert not {"\n", "\t"} & set(console.one_line(text))
    assert console.printable(console.printable(text)) == console.printable(text)
    console.printable(text).encode()


@given(st.recursive(st.text(st.characters(exclude_categories=())), lambda one: st.lists(one, max_size=3)))
def test_json_stays_what_it_was(value: Any) -> None:
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        console.print_json(value)
        said = sys.stdout.getvalue()
    finally:
        sys.stdout = before
    assert json.loads(said) == value and said.isascii() and harmless(said)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("text", [*PLAIN, *ATTACKS], ids=ascii)
def test_no_encoding_stops_a_result(monkeypatch: pytest.MonkeyPatch, encoding: str, text: str) -> None:
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(sys, "stderr", written)
    console.replace_unencodable()
    console.print_text(text)
    console.say(text)
    console.print_table((text,), [(text,)], text)
    console.print_json(text)
    assert isinstance(written.buffer, io.BytesIO) and len(written.buffer.getvalue()) > 4 * 2


COMMAND_LINES = [
    ["caption", "{}"],
    ["caption", "--model", "{}", "a.png"],
    ["ask", "a.png", "{}"],
    ["draw", "{}", "-o", "{}"],
    ["train", "training/dpo-embedded", "output={}"],
    ["train", "training/dpo-embedded", "{}=1"],
    ["train", "{}"],
    ["data", "check", "{}"],
    ["preferences", "check", "{}"],
    ["preferences", "rank", "{}", "-o", "{}"],
    ["info", "{}"],
    ["{}"],
    ["recipes", "copy", "{}"],
]


@pytest.mark.parametrize("bad", ["\udcff.png", "a\0b", "\ud800"], ids=ascii)
@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_what_is_no_text_is_one_line(
    words: list[str],
    bad: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    assert main([word.format(bad) for word in words]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("unimm: ") and said.err.count("\n") == 1
    assert harmless(said.err) and list(tmp_path.iterdir()) == [tmp_path / "a.png"]


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are Unicode there")
def test_a_file_whose_name_is_no_text_can_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.json"
    Path(os.fsdecode(name)).write_text('[{"id": "a", "text": "an apple"}]')
    assert main(["data", "check", os.fsdecode(name)]) == 0
    assert harmless(capfd.readouterr().out)


@pytest.mark.parametrize(
    ("yaml", "key"),
    [('a: {b: "x\\0y"}', "a.b"), ('a: [1, "\\0"]', "a[1]"), ('"k\\0": 1', "k"), ('a: {"\\0b": 1}', "a.")],
)
def test_a_nul_in_a_recipe_is_named(tmp_path: Path, yaml: str, key: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}: {key}") and "holds a NUL" in str(error.value)


def test_a_narrow_terminal_gets_its_result(tmp_path: Path) -> None:
    """A whole command on a terminal of Windows' old encoding, whose result has a name that it lacks."""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "unimm", "recipes", "copy", "training/dpo-embedded", "赤.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode("cp1252")
    assert done.stdout.decode("cp1252").split() == ["Copied", "to", "\\u8d64.yaml"]
    assert (tmp_path / "赤.yaml").is_file()
