"""The command `unimm completion`, and what shells ask when the user presses Tab."""

from __future__ import annotations

import os
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    shell_complete,
)

from unimm.cli.commands import Options, command
from unimm.cli.options import Choice
from unimm.console import print_text

VARIABLE = "_UNIMM_COMPLETE"  # through which a shell asks


@add_completion_class
class Bash(BashComplete):
    """Bash hands `--split=se` over as three words."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one to complete, without `=`, and that word."""
        words, incomplete = super().get_completion_args()
        if words and words[-1] == "=":
            words.pop()
        return words, incomplete


class _WholeWords(ShellComplete):
    """A shell that takes `--split=se` for one word and wants all of it back."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """Return the completions of a word, each with the name of the option that it begins with."""
        items = super().get_completions(args, incomplete)
        name, equals, _ = incomplete.partition("=")
        if name.startswith("--") and equals and "--" not in args:
            for item in items:
                if item.type == "plain":
                    item.value = f"{name}={item.value}"
        return items


@add_completion_class
class Zsh(_WholeWords, ZshComplete):
    """Zsh."""


@add_completion_class
class Fish(_WholeWords, FishComplete):
    """Fish."""


def answer_shell(cli: click.Command) -> bool:
    """Print completions if a shell asks for them; returns whether it did."""
    instruction = os.environ.get(VARIABLE)
    if not instruction:
        return False
    shell_complete(cli, {}, "unimm", VARIABLE, instruction)
    return True


@command(
    "completion", "print the script that completes commands in a shell", lambda row: print_text(row["script"])
)
@click.argument("shell", type=Choice("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
def completion(options: Options) -> Any:
    """Return the script that a shell has to run."""
    shell = get_completion_class(options.shell)
    assert shell is not None
    cli = click.get_current_context().find_root().command
    return {"shell": options.shell, "script": shell(cli, {}, "unimm", VARIABLE).source()}
