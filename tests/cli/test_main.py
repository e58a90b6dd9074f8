"""How the command behaves whatever the subcommand: help, mistakes, exit statuses, clean streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from unimm import __version__
from unimm.cli import recipes
from unimm.cli.commands import listing
from unimm.cli.main import CLI, main
from unimm.console import print_json, quiet_stdout
from unimm.errors import UserError, UserNote

COMMANDS = [words.removeprefix("unimm ") for words, _ in listing(CLI) if words != "unimm"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(unimm, arguments: list[str]) -> None:
    done = unimm(*arguments)
    assert done.code == 0
    assert all(f"  {words} " in done.out for words in COMMANDS)
    assert (
        done.out.index("\nTrain and evaluate:")
        < done.out.index(" tokenizer eval ")
        < done.out.index("\nData:")
    )


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help(unimm, words: str) -> None:
    done = unimm(*words.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: unimm {words} ") and "--json" in done.out
    assert unimm("help", *words.split()) == unimm(*words.split(), "-h") == done


def test_help_of_a_group(unimm) -> None:
    done = unimm("tokenizer", "--help")
    assert done.code == 0
    assert "tokenizer eval" in done.out
    assert "caption" not in done.out


def test_version(unimm) -> None:
    assert unimm("--version").out == f"unimm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["drow"], "unimm: there is no command 'drow'; did you mean draw?\n"),
        (["xyzzy"], "unimm: there is no command 'xyzzy'; `unimm --help` lists them\n"),
        (["tokenizer"], "unimm: tokenizer: say which: train, eval (see `unimm tokenizer --help`)\n"),
        (
            ["recipes", "copy", "nix"],
            "unimm: nix: no such file or recipe; `unimm recipes` lists those that ship",
        ),
        (["recipes", "cpy"], "unimm: there is no command 'recipes cpy'; did you mean recipes copy?\n"),
        (["train"], "unimm: train: the following arguments are required: RECIPE"),
        (["convert", "a"], "unimm: convert: the following arguments are required: FOLDER, --to (see"),
        (
            ["--vresion"],
            "unimm: there is no option --vresion; did you mean --version? (see `unimm --help`)\n",
        ),
        (
            ["draw", "a", "--sede", "7"],
            "unimm: draw: there is no option --sede; did you mean --seed? (see `unimm draw --help`)\n",
        ),
        (
            ["draw", "a", "--xyzzy\x1b[2J"],
            "unimm: draw: there is no option --xyzzy\\x1b[2J (see `unimm draw --help`)\n",
        ),
        (["draw", "-x"], "unimm: draw: there is no option -x (see"),
        (
            ["data", "preview", "--split", "trian"],
            "unimm: data preview: --split: 'trian' is not one of train, seen",
        ),
        (["draw", "a", "--model", "--json"], "unimm: draw: --model: expected a value (see"),
        (["draw", "a", "--model"], "unimm: draw: --model: expected a value (see"),
        (["draw", "a", "--json=no"], "unimm: draw: --json: takes no value (see"),
        (["draw", "a", "--top-k", "few"], "unimm: draw: --top-k: expected a whole number, got 'few' (see"),
        (["info", "a", "b"], "unimm: info: got unexpected extra argument (b) (see"),
        (["train", "nix.yaml"], "unimm: nix.yaml: no such file or recipe"),
    ],
)
def test_mistakes_are_one_line(unimm, arguments: list[str], line: str) -> None:
    done = unimm(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(line)
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: siglip\noutput: x\nstages: [{name: a, steps: many}]\n", "stages[0].steps"),
        ("task: siglip\n  output: [", "bad.yaml"),
        ("task: cooking\n", "cooking"),
    ],
)
def test_mistakes_in_a_recipe_name_file_and_key(unimm, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    done = unimm("train", path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"unimm: {path}: ")
    assert words in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages[0].steps=many", 'stages[0].steps: expected an integer, got "many"'),
        ("loging.every=3", "loging: unknown key"),
        ("stages", "stages"),
    ],
)
def test_mistakes_in_an_override_name_the_key(unimm, override: str, words: str) -> None:
    done = unimm("train", "training/siglip", override)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.count("\n") == 1


def test_tokenizer_train_wants_a_tokenizer_recipe(unimm) -> None:
    done = unimm("tokenizer", "train", "training/siglip")
    assert done.code == 2
    assert "task: expected tokenizer, got siglip" in done.err


def test_recipes_are_listed_and_copied(unimm, tmp_path: Path) -> None:
    rows = json.loads(unimm("recipes", "--json").out)
    assert "training/siglip" in [row["name"] for row in rows]
    assert "training/siglip" in unimm("recipes").out
    copied = json.loads(unimm("recipes", "copy", "training/siglip", tmp_path, "--json").out)["copied"]
    assert Path(copied).parent == tmp_path
    assert "is there already" in unimm("recipes", "copy", "training/siglip", tmp_path).err


def test_json_may_stand_before_the_command_of_a_group(unimm, tmp_path: Path) -> None:
    done = unimm("recipes", "--json", "copy", "training/siglip", tmp_path)
    assert Path(json.loads(done.out)["copied"]).parent == tmp_path


def test_overrides_stand_between_options(unimm) -> None:
    arguments = (
        "training/emu3",
        "--memory",
        4,
        "stages[0].steps=2",
        "--gpus=2",
        "stages[0].batch=2",
        "--json",
    )
    document = json.loads(unimm("plan", *arguments).out)
    assert document["machines"]["gpus"] == 2
    whole = json.loads(unimm("plan", *arguments[:3], *arguments[4:]).out)
    assert document["stages"][0]["tokens"] < whole["stages"][0]["tokens"]
    assert (
        "stages[0].steps: expected an integer"
        in unimm("train", "training/siglip", "--smoke", "stages[0].steps=many", "--json").err
    )


@pytest.mark.parametrize("prompt", ["-5", "-5 degrees", "-.5", "--help", "--no clouds", "--", "-"])
def test_what_is_behind_two_dashes_is_no_option(unimm, tiny: Path, tmp_path: Path, prompt: str) -> None:
    options = ("--model", tiny, "--json", "-o", tmp_path)
    assert json.loads(unimm("draw", *options, "--", prompt).out)[0]["prompt"] == prompt
    assert json.loads(unimm("--", "draw", *options, "--", "a", prompt).out)[1]["prompt"] == prompt


@pytest.mark.parametrize("prompt", ["-5", "-5 degrees", "-.5", "--no clouds", "-"])
def test_what_only_looks_like_an_option_is_none(unimm, tiny: Path, tmp_path: Path, prompt: str) -> None:
    done = unimm("draw", prompt, "--model", tiny, "--json", "-o", tmp_path)
    assert json.loads(done.out)[0]["prompt"] == prompt


@pytest.mark.parametrize("spelling", [["-n", "2"], ["-n2"], ["-n=2"]])
def test_spellings_of_an_option(unimm, tiny: Path, tmp_path: Path, spelling: list[str]) -> None:
    done = unimm("draw", "a", *spelling, f"--model={tiny}", "--json", f"-o{tmp_path / 'new'}")
    assert len(json.loads(done.out)) == 2 and len(list((tmp_path / "new").iterdir())) == 2


def run_with(monkeypatch: pytest.MonkeyPatch, action) -> None:
    """Make `unimm recipes` do something else."""
    monkeypatch.setattr(recipes.list_all, "callback", action)


def test_interrupt(unimm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    run_with(monkeypatch, interrupted)
    done = unimm("recipes")
    assert (done.code, done.err) == (130, "unimm: stopped\n")


def test_full_disk(unimm, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(options: object) -> None:
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 100_000)

    run_with(monkeypatch, fill)
    done = unimm("recipes")
    assert done.code == 2
    assert done.err == "unimm: the output: cannot be written (No space left on device)\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, lambda options: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])


def test_debugging_shows_the_traceback_of_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIMM_DEBUG", "1")
    with pytest.raises(UserError):
        main(["drow"])


def test_chatter_goes_to_stderr(unimm, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatter(options: object) -> list[dict[str, str]]:
        print("from Python")
        os.write(1, b"from compiled code\n")
        warnings.warn("a library's warning", stacklevel=1)
        warnings.warn("look here", UserNote, stacklevel=1)
        return []

    run_with(monkeypatch, chatter)
    done = unimm("recipes", "--json")
    assert json.loads(done.out) == []
    assert done.err.splitlines() == ["from compiled code", "from Python", "unimm: note: look here"] or (
        sorted(done.err.splitlines()) == ["from Python", "from compiled code", "unimm: note: look here"]
    )


def test_stdout_is_given_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), quiet_stdout():
        raise ZeroDivisionError
    os.write(1, b"here again\n")
    assert capfd.readouterr().out == "here again\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), float("inf"), 0.5], "b": Path("x"), 3: (True, None)})
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document == {"a": [None, None, 0.5], "b": "x", "3": [True, None]}


def test_reader_that_has_gone_is_no_error() -> None:
    command = [sys.executable, "-m", "unimm", "recipes", "--json"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.close()
    _, errors = run.communicate(timeout=60)
    assert b"Traceback" not in errors
    assert run.returncode != -signal.SIGPIPE
