"""The `unimm` command: each subcommand is one call into the library; results are text, tables or JSON.

The commands are in the modules beside this one. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from unimm import __version__
from unimm.cli import data, evaluate, jobs, model, preferences, recipes, serve
from unimm.cli.commands import Group, mistake
from unimm.cli.completion import answer_shell, completion
from unimm.console import debugging, is_unicode, replace_unencodable, say
from unimm.errors import UserError
from unimm.garbage import collect_seldom

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # the disk's fault, not the program's

TOKENIZER = Group(
    "tokenizer", "image tokenizers", {"Commands": (recipes.train_tokenizer, recipes.evaluate_tokenizer)}
)
RECIPES = Group(
    "recipes",
    recipes.list_all.help or "",
    {"Commands": (recipes.copy,)},
    alone=recipes.list_all.invoke,
    params=recipes.list_all.params,
)
DATA = Group("data", "data to train on", {"Commands": (data.check, data.encode, data.preview, data.pack)})
PREFERENCES = Group(
    "preferences",
    "preferences between drawings or answers",
    {
        "Commands": (
            preferences.draw,
            preferences.rank,
            preferences.align,
            preferences.vote,
            preferences.check,
        )
    },
)
CLI = Group(
    "unimm",
    "one decoder that looks at images, answers questions about them and draws",
    {
        "Use a model": (
            model.demo,
            model.caption,
            model.ask,
            model.chat,
            model.draw,
            jobs.sample,
            serve.serve,
            model.info,
            model.convert,
        ),
        "Train and evaluate": (
            recipes.train,
            recipes.plan,
            recipes.systems,
            recipes.hosts,
            evaluate.report,
            evaluate.evaluate,
            TOKENIZER,
            RECIPES,
        ),
        "Data": (DATA,),
        "Preferences": (PREFERENCES,),
        "Shell": (completion,),
    },
    alone=lambda ctx: click.echo(ctx.get_help()),
)
CLI.context_settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
click.version_option(__version__, message="%(prog)s %(version)s")(CLI)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 2 for a mistake of the user, 130 when interrupted."""
    replace_unencodable()
    collect_seldom()
    try:
        if not answer_shell(CLI):
            _dispatch(_checked(sys.argv[1:] if arguments is None else arguments))
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


def _checked(arguments: Sequence[str]) -> list[str]:
    """The arguments, if each is text or, whatever its bytes, the name of a file that is there."""
    for argument in arguments:
        if "\0" in argument:
            raise UserError(f"{argument}: holds a NUL, which no text or file name has")
        if not is_unicode(argument) and not os.path.lexists(argument):
            raise UserError(f"{argument}: neither text in the terminal's encoding nor the name of a file")
    return list(arguments)


def _dispatch(arguments: list[str]) -> None:
    """Find the command, parse its arguments and run it; `unimm help draw` is `unimm draw --help`."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    try:
        with CLI.make_context("unimm", arguments) as ctx:
            CLI.invoke(ctx)
    except click.exceptions.Exit:  # help or the version has been printed
        return
    except click.UsageError as error:
        raise UserError(mistake(error)) from error
