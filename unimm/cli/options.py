"""The types of arguments and options, how shells complete each, and the options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import click
from click.shell_completion import CompletionItem

from unimm.cli.commands import Options, nearest
from unimm.files import read_text

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Text(click.ParamType[str]):
    """Any text; shells complete it with the values that begin so, and with files or folders if none does."""

    name = "text"

    def __init__(self, *values: str, files: Literal["file", "dir"] | None = None) -> None:
        self.values = values
        self.files = files

    def known(self, incomplete: str) -> list[str]:
        """Return the values that begin with what is there."""
        return [value for value in self.values if value.startswith(incomplete)]

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the completions of what is there; zsh loses what was typed where files and values mix."""
        known = [CompletionItem(value) for value in self.known(incomplete)]
        return known or ([CompletionItem(incomplete, type=self.files)] if self.files else [])


class Recipe(Text):
    """A recipe's name or file; shells complete the full names, and short ones that only one recipe has."""

    name = "recipe"

    def known(self, incomplete: str) -> list[str]:
        """Return the names that begin with what is there."""
        from unimm.recipes import list_recipes

        names = [info.name for info in list_recipes()]
        short = [name.rpartition("/")[2] for name in names]
        unique = [name for name in short if incomplete and short.count(name) == 1]
        return [name for name in (*names, *unique) if name.startswith(incomplete)]


class Measure(Recipe):
    """A protocol or a recipe of an evaluation, by name or file."""

    def known(self, incomplete: str) -> list[str]:
        """Return the names that begin with what is there."""
        from unimm.evaluation.protocol import list_protocols

        return [
            *(name for name in list_protocols() if name.startswith(incomplete)),
            *super().known(incomplete),
        ]


class Choice(click.Choice[str]):
    """One of some texts."""

    def __init__(self, *choices: str) -> None:
        super().__init__(choices)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Say which texts there are, and which may have been meant."""
        return f"{value!r} is not one of {', '.join(self.choices)}{nearest(str(value), self.choices)}"


class Parsed(click.ParamType[T], Generic[T]):
    """A value that a function makes of a text, or cannot."""

    name = "value"

    def __init__(self, parse: Callable[[str], T], expected: str) -> None:
        self.parse = parse
        self.expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """Return the value; a default is one already."""
        if not isinstance(value, str):
            default: T = value
            return default
        try:
            return self.parse(value)
        except ValueError:
            self.fail(f"expected {self.expected}, got {value!r}", param, ctx)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise ValueError
    return int(number), int(parts)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})", text)
    if match is None:
        raise ValueError
    return int(match[1]), int(match[2])


def _field(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and (column or name == "image")):
        raise ValueError
    return name, column


FILE = Text(files="file")
FOLDER = Text(files="dir")
DEVICE = Text("auto", "cpu", "cuda")
DTYPE = Text("auto", "float32", "bfloat16", "float16")
RECIPE = Recipe(files="file")
MEASURE = Measure(files="file")
INTEGER = Parsed(int, "a whole number")
POSITIVE = Parsed(_positive, "a whole number of at least 1")
NUMBER = Parsed(float, "a number")
NUMBER_OR_NONE = Parsed(lambda text: None if text == "none" else float(text), "a number or none")
SHARD = Parsed(_shard, "PART/PARTS, as 0/4 for the first of four")
SIZE = Parsed(_size, "WIDTHxHEIGHT in pixels, as 64x64")
FIELD = Parsed(_field, "NAME=COLUMN, as text=caption_en")
SPLITS = Choice("train", "seen", "composed", "vendor")  # of EmojiScenes
ALL_SPLITS = Choice(*SPLITS.choices, "larger", "font")  # of EmojiScenes and of tables


def hub_options(function: F) -> F:
    """Options of every command that a model is named to."""
    apart = "folder or hub id of Emu3's vision tokenizer, which its original layout has apart"
    return decorate(
        function,
        click.option("--revision", metavar="REV", help="of a hub id: a branch, a tag or a commit"),
        click.option("--image-tokenizer", type=FOLDER, metavar="SOURCE", help=apart),
    )


def loading_options(function: F) -> F:
    """Options of every command that loads a model in full precision."""
    source = "a folder, a hub id or embedded (the default)"
    device, dtype = (
        "auto, cpu, cuda, cuda:1 ... (default: auto)",
        "auto, float32, bfloat16 ... (default: auto)",
    )
    return decorate(
        function,
        click.option("--model", type=FOLDER, metavar="SOURCE", help=source),
        hub_options,
        click.option("--device", type=DEVICE, default="auto", metavar="DEVICE", help=device),
        click.option("--dtype", type=DTYPE, default="auto", metavar="DTYPE", help=dtype),
    )


def model_options(function: F) -> F:
    """Options of every command that loads a model in any precision."""
    smaller = "int8 or int4: weights of a quarter or a seventh of the size"
    part = "leave out what only draws (understand) or only looks (draw)"
    return decorate(
        function,
        loading_options,
        click.option("--quantize", type=Text("int8", "int4"), metavar="HOW", help=smaller),
        click.option("--parts", type=Choice("all", "understand", "draw"), default="all", help=part),
    )


def sampling_options(function: F) -> F:
    """Options of every command that draws; what is left out is as the model has it."""
    own = "(default: the model's own)"
    return decorate(
        function,
        click.option("--guidance-scale", type=NUMBER, metavar="X", help=f"1 is no guidance {own}"),
        click.option("--temperature", type=NUMBER, metavar="T", help=f"0 is greedy {own}"),
        click.option("--top-k", type=INTEGER, metavar="K", help=f"among the K likeliest codes; 0: all {own}"),
        click.option("--top-p", type=NUMBER, metavar="P", help=f"among codes that make up P; 1: all {own}"),
    )


def answer_options(function: F) -> F:
    """Options of every command that answers in words."""
    room = "(default: what the model's context has room for)"
    schema = "a file with a JSON schema that answers follow"
    sees = "(default: the model's own)"
    return decorate(
        function,
        click.option("--max-new-tokens", type=POSITIVE, metavar="N", help=f"most tokens of an answer {room}"),
        click.option("--temperature", type=NUMBER, metavar="T", help="0 is greedy (default: 0)"),
        click.option(
            "--top-k", type=INTEGER, metavar="K", help="among the K likeliest tokens (default: all)"
        ),
        click.option("--top-p", type=NUMBER, metavar="P", help="among tokens that make up P (default: 1)"),
        click.option(
            "--repetition-penalty", type=NUMBER, metavar="X", help="above 1 repeats less (default: 1)"
        ),
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="ends an answer; may be given several times"
        ),
        click.option("--seed", type=INTEGER, metavar="SEED", help="the same seed gives the same answers"),
        click.option("--json-schema", type=FILE, metavar="FILE", help=schema),
        click.option("--regex", metavar="REGEX", help="a regular expression that answers match"),
        click.option("--min-pixels", type=POSITIVE, metavar="N", help=f"smallest area of an image {sees}"),
        click.option("--max-pixels", type=POSITIVE, metavar="N", help=f"largest area of an image {sees}"),
        click.option("--max-tiles", type=POSITIVE, metavar="N", help=f"most tiles of an image {sees}"),
    )


def answer_values(options: Options) -> dict[str, Any]:
    """Return the options of `answer_options` as keywords of `UniMM.ask`.

    Raises:
        UserError: the schema's file cannot be read.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "regex")
    values = {name: getattr(options, name) for name in names}
    schema = None if options.json_schema is None else read_text(options.json_schema)
    return {**values, "stop": list(options.stop) or None, "json_schema": schema}


def recipe_arguments(function: F) -> F:
    """Arguments of every command that takes a recipe."""
    named = "a YAML file, or the name of a shipped recipe"
    values = "values to set, as stages[0].steps=100"
    return decorate(
        function,
        click.argument("recipe", type=RECIPE, metavar="RECIPE", help=named),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", help=values),
    )


def decorate(function: F, *decorators: Callable[[F], F]) -> F:
    """Apply decorators so that help lists the options in this order."""
    for decorator in reversed(decorators):
        function = decorator(function)
    return function
