"""How commands and groups of commands are read, listed and run, on top of click.

A command is a function from its options to a document of plain values, and a function that shows a person that
document; `--json` prints it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import click

from unimm.console import print_json, quiet_stdout
from unimm.errors import UserError

Options = SimpleNamespace  # the values of a command's arguments and options, by name
_NUMBER = re.compile(r"-\.?\d|-inf$")  # begins a negative number; no option begins so


class Command(click.Command):
    """One command: its callback takes the options and returns a document, `show` prints that for a person."""

    def __init__(self, name: str | None, show: Callable[[Any], None], **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self.show = show
        help_text = "print the result as one JSON document"
        self.params.append(click.Option(["--json"], is_flag=True, help=help_text))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments; options may stand anywhere before `--`."""
        return super().parse_args(ctx, self._options_first(ctx, args))

    def _options_first(self, ctx: click.Context, arguments: Iterable[str]) -> list[str]:
        """Put options and their values first and all else behind `--`.

        Click takes whatever begins with a dash for options, and whatever follows an option for its value. Here
        `-5` and `-5 degrees` are no options, and an option is no value.
        """
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        takes_value = {name: not option.is_flag for option in options for name in option.opts}

        def is_option(text: str) -> bool:
            if text.partition("=")[0] in takes_value or takes_value.get(text[:2]):
                return True
            return text[:1] == "-" and len(text) > 1 and not _NUMBER.match(text) and " " not in text

        first: list[str] = []
        rest: list[str] = []
        left = list(reversed(list(arguments)))
        while left:
            argument = left.pop()
            name, equals, value = argument.partition("=")
            if argument == "--":
                rest += reversed(left)
                break
            if not is_option(argument):
                rest.append(argument)
            elif not takes_value.get(name):  # a flag, -n2 or unknown
                if equals and name in takes_value and not ctx.resilient_parsing:
                    raise click.BadOptionUsage(name, f"{name}: takes no value", ctx)
                first.append(argument)
            elif equals:
                first += [name, value]
            elif left and not is_option(left[-1]):
                first += [name, left.pop()]
            elif not ctx.resilient_parsing:
                raise click.BadOptionUsage(name, f"{name}: expected a value", ctx)
        return [*first, "--", *rest]

    def invoke(self, ctx: click.Context) -> None:
        """Run the command and show what it returns."""
        assert self.callback is not None
        options = Options(**ctx.params)
        if ctx.parent is not None and ctx.parent.params.get("json"):  # unimm recipes --json copy …
            options.json = True
        with quiet_stdout():
            document = self.callback(options)
        if options.json:
            print_json(document)
        else:
            self.show(document)


class Group(click.Group):
    """Commands behind a common first word, listed in sections; `alone` is what that word does by itself."""

    def __init__(
        self,
        name: str,
        summary: str,
        sections: Mapping[str, Sequence[click.Command]],
        alone: Callable[[click.Context], None] | None = None,
        params: Sequence[click.Parameter] = (),
    ) -> None:
        super().__init__(
            name,
            commands=[command for section in sections.values() for command in section],
            invoke_without_command=True,
            callback=self._alone,
            params=list(params),
            help=summary,
        )
        self.sections = sections
        self.alone = alone

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order in which they are listed."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names."""
        name, *rest = args
        command = self.commands.get(name)
        if command is None and not ctx.resilient_parsing:
            raise click.NoSuchCommand(name, possibilities=self.commands, ctx=ctx)
        return name if command else None, command, rest

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with a line each, section by section, those of inner groups too."""
        command = "COMMAND [ARGUMENT ...]"
        usage = f"[OPTIONS] [{command}]" if self.alone and ctx.parent else command
        more = f"({ctx.command_path} COMMAND --help tells more)"
        formatter.write(f"Usage: {ctx.command_path} {usage}   {more}\n")
        prefix = "".join(f"{word} " for word in ctx.command_path.split()[1:])
        listed = {
            title: [row for command in section for row in listing(command, prefix)]
            for title, section in self.sections.items()
        }
        if ctx.parent and self.alone:  # what the group does alone, before its commands
            title = next(iter(listed))
            listed[title].insert(0, (prefix.rstrip(), self))
        width = max(len(words) for rows in listed.values() for words, _ in rows)
        for title, rows in listed.items():
            with formatter.section(title):
                formatter.write_dl([(f"{words:<{width}}", one.help or "") for words, one in rows])
        click.Command.format_options(self, ctx, formatter)

    def _alone(self, **_: Any) -> None:
        """Do what the group does without a command."""
        ctx = click.get_current_context()
        if ctx.invoked_subcommand is not None:
            return
        if self.alone is None:
            known = ", ".join(self.commands)
            raise UserError(f"{self.name}: say which: {known} (see `{ctx.command_path} --help`)")
        self.alone(ctx)


def command(
    name: str, summary: str, show: Callable[[Any], None]
) -> Callable[[Callable[[Options], Any]], Command]:
    """Make a function of options, under decorators of click for these, a command."""

    def decorate(function: Callable[[Options], Any]) -> Command:
        return click.command(name, cls=Command, show=show, help=summary)(function)

    return decorate


def listing(command: click.Command, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield a command with the words that name it; of a group, what it does alone and its commands."""
    words = f"{prefix}{command.name}"
    if not isinstance(command, Group) or command.alone:
        yield words, command
    if isinstance(command, Group):
        for inner in command.commands.values():
            yield from listing(inner, f"{words} ")


def mistake(error: click.UsageError) -> str:
    """Say what is wrong with a command line, on one line, with the nearest thing that is right."""
    path = error.ctx.command_path if error.ctx else "unimm"
    command = path.partition(" ")[2]
    if isinstance(error, click.NoSuchCommand):
        words = f"{command} {error.command_name}".strip()
        hint = f"`{path} --help` lists them"
        if error.possibilities:
            hint = f"did you mean {f'{command} {error.possibilities[0]}'.strip()}?"
        return f"there is no command {words!r}; {hint}"
    message = error.message[:1].lower() + error.message[1:].rstrip(".")
    if isinstance(error, click.NoSuchOption):
        hint = f"; did you mean {error.possibilities[0]}?" if error.possibilities else ""
        message = f"there is no option {error.option_name}{hint}"
    elif isinstance(error, click.MissingParameter) and error.ctx:
        missing = [
            one for one in error.ctx.command.params if one.required and one.name not in error.ctx.params
        ]
        message = f"the following arguments are required: {', '.join(map(_spelling, missing))}"
    elif isinstance(error, click.BadParameter) and error.param:
        message = f"{_spelling(error.param)}: {error.message}"
    return f"{f'{command}: ' if command else ''}{message} (see `{path} --help`)"


def _spelling(parameter: click.Parameter) -> str:
    """How a user writes a parameter: -o/--output, or the name of an argument."""
    if isinstance(parameter, click.Option):
        return "/".join(parameter.opts)
    return parameter.human_readable_name.removesuffix("...")


def nearest(text: str, known: Iterable[str]) -> str:
    """Return a hint at what a text may have been meant to be, or nothing."""
    import difflib

    close = difflib.get_close_matches(text, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
