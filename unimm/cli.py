"""The `unimm` command: each subcommand is one call into the library; results are text, tables or JSON.

A command is a row of `COMMANDS`: its words, its arguments, the call that returns a document of plain values,
and how a person sees that document (`--json` prints it as it is). Nothing heavy is imported before it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from unimm import __version__, cli_data, cli_model, cli_recipes
from unimm.console import debugging, print_json, print_tree, quiet_stdout, say
from unimm.errors import UserError
from unimm.preferences import commands as preferences

Options = argparse.Namespace
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # the disk's fault, not the program's


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: its words, a line of help, its arguments, what it does and how the result is shown."""

    words: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], Any]
    show: Callable[[Any], None]


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake on one line."""

    def error(self, message: str) -> Any:
        command = self.prog.removeprefix("unimm ")
        raise UserError(f"{command}: {message} (see `{self.prog} --help`)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 2 for a mistake of the user, 130 when interrupted."""
    try:
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except UserError as error:
        if debugging():
            raise
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        if debugging() or error.errno not in UNWRITABLE:
            raise
        say(f"{error.filename or 'the output'}: cannot be written ({error.strerror})")
        return 2
    return 0


def _dispatch(arguments: list[str]) -> None:
    """Find the command, parse its arguments, run it and show what it returns."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(COMMANDS))
        return
    if arguments[0] == "--version":
        print(f"unimm {__version__}")
        return
    command, rest = _find(arguments)
    if command is None:
        return
    parser = _Parser(prog=f"unimm {command.words}", description=command.summary, allow_abbrev=False)
    command.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    options = parser.parse_intermixed_args(rest)
    with quiet_stdout():
        document = command.run(options)
    if options.json:
        print_json(document)
    else:
        command.show(document)


def _find(arguments: list[str]) -> tuple[Command | None, list[str]]:
    """Return the command that the first words name, and the rest; None once a group's help is shown."""
    for count in (2, 1):
        words = " ".join(arguments[:count])
        for command in COMMANDS:
            if len(arguments) >= count and command.words == words:
                return command, arguments[count:]
    group = [command for command in COMMANDS if command.words.startswith(f"{arguments[0]} ")]
    if group and arguments[1:2] in (["-h"], ["--help"]):
        print(_help(group))
        return None, []
    if group:
        known = ", ".join(command.words.split()[1] for command in group)
        raise UserError(f"{arguments[0]}: say which: {known} (see `unimm {arguments[0]} --help`)")
    close = difflib.get_close_matches(arguments[0], [command.words.split()[0] for command in COMMANDS], n=1)
    hint = f"did you mean {close[0]}?" if close else "`unimm --help` lists them"
    raise UserError(f"there is no command {arguments[0]!r}; {hint}")


def _help(commands: Sequence[Command]) -> str:
    """List commands with a line each."""
    width = max(len(command.words) for command in commands) + 2
    lines = [f"  {command.words:<{width}}{command.summary}" for command in commands]
    head = ["usage: unimm COMMAND [ARGUMENT ...]   (unimm COMMAND --help tells more)", "", "commands:"]
    return "\n".join([*head, *lines])


COMMANDS = (
    Command(
        "demo",
        "caption, ask and draw; write a contact sheet",
        cli_model.demo_arguments,
        cli_model.demo,
        cli_model.show_demo,
    ),
    Command(
        "caption",
        "say what pictures show",
        cli_model.caption_arguments,
        cli_model.caption,
        cli_model.show_captions,
    ),
    Command(
        "ask",
        "ask a question about pictures",
        cli_model.ask_arguments,
        cli_model.ask,
        lambda row: print(row["answer"]),
    ),
    Command(
        "draw", "draw what prompts say", cli_model.draw_arguments, cli_model.draw, cli_model.show_drawings
    ),
    Command("info", "what a model is made of", cli_model.info_arguments, cli_model.info, print_tree),
    Command(
        "convert",
        "write a checkpoint in another layout",
        cli_model.convert_arguments,
        cli_model.convert,
        lambda row: print(f"Written to {row['folder']} in the {row['layout']} layout"),
    ),
    Command(
        "train", "train by a recipe", cli_recipes.train_arguments, cli_recipes.train, cli_recipes.show_trained
    ),
    Command(
        "plan",
        "what a recipe would take on a cluster",
        cli_recipes.plan_arguments,
        cli_recipes.plan,
        cli_recipes.show_plan,
    ),
    Command(
        "hosts",
        "try every host of a hostfile by ssh",
        cli_recipes.hosts_arguments,
        cli_recipes.hosts,
        cli_recipes.show_hosts,
    ),
    Command(
        "report",
        "draw curves and samples of a run",
        cli_recipes.report_arguments,
        cli_recipes.report,
        cli_recipes.show_report,
    ),
    Command(
        "eval",
        "evaluate a model by a recipe",
        cli_recipes.recipe_arguments,
        cli_recipes.evaluate,
        cli_recipes.show_evaluation,
    ),
    Command(
        "tokenizer train",
        "train an image tokenizer",
        cli_recipes.train_arguments,
        cli_recipes.train_tokenizer,
        cli_recipes.show_trained,
    ),
    Command(
        "tokenizer eval",
        "evaluate an image tokenizer",
        cli_recipes.recipe_arguments,
        cli_recipes.evaluate_tokenizer,
        print_tree,
    ),
    Command(
        "recipes",
        "list the recipes that ship with unimm",
        cli_recipes.no_arguments,
        cli_recipes.list_all,
        cli_recipes.show_recipes,
    ),
    Command(
        "recipes copy",
        "copy a recipe out, to edit it",
        cli_recipes.copy_arguments,
        cli_recipes.copy,
        cli_recipes.show_copied,
    ),
    Command(
        "data check",
        "read a data source whole and say what is in it",
        cli_data.check_arguments,
        cli_data.check,
        cli_data.show_check,
    ),
    Command(
        "data encode",
        "compute image codes once, into tars to train on",
        cli_data.encode_arguments,
        cli_data.encode,
        print_tree,
    ),
    Command(
        "data preview",
        "show scenes of a data set on a sheet",
        cli_data.preview_arguments,
        cli_data.preview,
        cli_data.show_sheet,
    ),
    Command(
        "data pack", "pack the artwork from npm packages", cli_data.pack_arguments, cli_data.pack, print_tree
    ),
    Command(
        "preferences draw",
        "draw several candidates of each prompt",
        preferences.draw_arguments,
        preferences.draw,
        print_tree,
    ),
    Command(
        "preferences rank",
        "score candidates and pair the best with the worst",
        preferences.rank_arguments,
        preferences.rank,
        print_tree,
    ),
    Command(
        "preferences align",
        "draw, rank, train and measure by a recipe",
        cli_recipes.recipe_arguments,
        preferences.align,
        preferences.show_aligned,
    ),
    Command(
        "preferences vote",
        "pick the better of two candidates on a local page",
        preferences.vote_arguments,
        preferences.vote,
        preferences.show_vote,
    ),
    Command(
        "preferences check",
        "check a file of preferences",
        preferences.check_arguments,
        preferences.check,
        print_tree,
    ),
)
