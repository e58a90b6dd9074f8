"""What shells complete: commands, options, choices, recipes and files, by the scripts of `unimm completion`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unimm.recipes import list_recipes

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def complete(unimm, monkeypatch: pytest.MonkeyPatch):
    """Ask as the script of bash does: the last word is to be completed; returns (type, value) of each item."""

    def ask(*words: str) -> list[tuple[str, str]]:
        monkeypatch.setenv("_UNIMM_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["unimm", *map(shlex.quote, words[:-1]), words[-1]]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        done = unimm()
        assert (done.code, done.err) == (0, "")
        return [tuple(line.split(",", 1)) for line in done.out.splitlines() if line]

    return ask


def plain(*values: str) -> list[tuple[str, str]]:
    return [("plain", value) for value in values]


def test_commands(complete) -> None:
    assert complete("d") == plain("demo", "draw", "data")
    assert complete("data", "") == plain("check", "encode", "preview", "pack")
    assert complete("recipes", "") == plain("copy")
    assert complete("data", "xyzzy") == []
    assert complete("xyzzy", "") == complete("")  # the mistake is said when the command is run


def test_options(complete) -> None:
    assert complete("draw", "a red apple", "--s") == plain("--seed", "--size")
    assert complete("draw", "--seed", "7", "a", "--s") == plain("--size")
    assert complete("draw", "--image", "a.png", "--im") == plain(
        "--image", "--image-tokenizer"
    )  # several may be given
    assert complete("recipes", "--j") == plain("--json")
    assert complete("draw", "--", "--s") == []
    assert complete("draw", "--json=no", "--model", "--si") == plain("--size")  # after mistakes too


def test_values(complete) -> None:
    assert complete("data", "preview", "--split", "") == plain(
        "train", "seen", "composed", "vendor", "larger", "font"
    )
    assert complete("data", "preview", "--split", "=", "s") == plain("seen")  # --split=s, as bash cuts it
    assert complete("data", "preview", "--split", "=") == complete("data", "preview", "--split", "")
    assert complete("convert", "a", "b", "--to", "t") == plain("transformers")
    assert complete("completion", "") == plain(*SHELLS)
    assert complete("draw", "a", "--seed", "") == []


def test_files_and_folders(complete) -> None:
    assert complete("caption", "a.png", "pic") == [("file", "pic")]
    assert complete("draw", "a", "-o", "") == [("dir", "")]
    assert complete("draw", "a", "--model", "em") == [("dir", "em")]


def test_recipes(complete) -> None:
    names = [info.name for info in list_recipes()]
    assert complete("train", "") == plain(*names)
    assert complete("tokenizer", "train", "tok") == plain(*[name for name in names if name.startswith("tok")])
    assert complete("train", "sigl") == plain("siglip-tiny", "siglip")
    assert complete("train", "my/recipe") == [("file", "my/recipe")]
    assert complete("train", "training/siglip", "--smoke", "st") == []  # overrides


def test_shells_that_do_not_cut_words_get_whole_ones_back(unimm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", "unimm data preview --split=s")
    for shell, word, expected in (
        ("zsh", "3", "plain\n--split=seen\n_\n"),
        ("fish", "--split=s", "plain,--split=seen\n"),
    ):
        monkeypatch.setenv("_UNIMM_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_CWORD", word)
        assert unimm().out == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_script(unimm, shell: str) -> None:
    done = unimm("completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_UNIMM_COMPLETE={shell}_complete" in done.out
    assert json.loads(unimm("completion", shell, "--json").out) == {"shell": shell, "script": done.out[:-1]}
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=done.out, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    (tmp_path / "unimm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m unimm "$@"\n')
    (tmp_path / "unimm").chmod(0o755)
    press = (
        'eval "$(unimm completion bash)"; COMP_WORDS=(unimm train training/sig); COMP_CWORD=2; '
        '_unimm_completion unimm 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"; complete -p unimm'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", press], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "training/siglip-tiny",
        "training/siglip",
        "complete -o nosort -F _unimm_completion unimm",
    ]
