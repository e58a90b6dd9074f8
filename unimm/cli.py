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
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unimm import __version__, cli_data
from unimm.cli_data import positive
from unimm.console import (
    debugging,
    hide_loading_bars,
    print_json,
    print_table,
    print_tree,
    progress,
    quiet_stdout,
    say,
)
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


# --- the model: demo, caption, ask, draw, info -------------------------------------------------------------


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="SOURCE", help="a folder or hub id (default: the embedded model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 ... (default: auto)")


def _quantize_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quantize", metavar="HOW", help="int8: weights of a quarter of the size")


def _load(options: Options) -> Any:
    import unimm

    hide_loading_bars()
    with progress("loading the model"):
        return unimm.load(
            options.model, device=options.device, dtype=options.dtype, quantize=options.quantize
        )


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default=".", metavar="DIR", help="where the contact sheet goes")
    _model_arguments(parser)


def _demo(options: Options) -> Any:
    from unimm.demo import run

    hide_loading_bars()
    return dataclasses.asdict(run(options.output, options.model, options.device, options.dtype))


def _show_demo(report: dict[str, Any]) -> None:
    captions = [(row["split"], row["truth"], row["caption"], row["right"]) for row in report["captions"]]
    print_table(("split", "scene", "caption", "right"), captions, "Captions of held-out scenes")
    fields = ("split", "scene", "question", "answer", "right")
    print_table(fields, [[row[field] for field in fields] for row in report["answers"]], "Answers")
    print(f"Drew {len(report['prompts'])} prompts, such as: {report['prompts'][0]}")
    print(f"Contact sheet: {report['sheet']}  ({report['seconds']:.0f} s)")


def _caption_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    _model_arguments(parser)
    _quantize_argument(parser)


def _caption(options: Options) -> Any:
    from unimm.images import read_image

    pictures = [
        read_image(path) for path in options.images
    ]  # before the model is loaded: mistakes show at once
    captions = _load(options).caption(pictures)
    return [{"image": path, "caption": said} for path, said in zip(options.images, captions, strict=True)]


def _show_captions(rows: list[dict[str, str]]) -> None:
    if len(rows) == 1:
        print(rows[0]["caption"])
    else:
        print_table(("image", "caption"), [(row["image"], row["caption"]) for row in rows])


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items", nargs="+", metavar="IMAGE ... QUESTION", help="picture files, then one question"
    )
    _model_arguments(parser)
    _quantize_argument(parser)


def _ask(options: Options) -> Any:
    from unimm.images import read_image

    *paths, question = options.items
    if not paths or os.path.isfile(question):
        raise UserError(f"ask: after the pictures comes a question; {question!r} is the last argument")
    pictures = [read_image(path) for path in paths]
    answers = _load(options).ask([pictures], [question])  # one question about all of the pictures
    return {"images": paths, "question": question, "answer": answers[0]}


def _draw_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    parser.add_argument("-o", "--output", default=".", metavar="DIR", help="folder for the drawings")
    parser.add_argument(
        "-n", type=positive, default=1, metavar="N", help="drawings of each prompt (default: 1)"
    )
    image = "a picture that goes with every prompt; may be given several times"
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help=image)
    parser.add_argument("--seed", type=int, help="the same seed draws the same pictures")
    parser.add_argument("--guidance-scale", type=float, default=5.0, metavar="X", help="default: 5")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest codes")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among codes that make up P")
    parser.add_argument("--size", type=_size, metavar="WxH", help="in pixels, where the model draws several")
    _model_arguments(parser)
    _quantize_argument(parser)


def _draw(options: Options) -> Any:
    from unimm.images import read_image, save_image

    pictures = [read_image(path) for path in options.image]
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as a folder ({error.strerror})") from None
    seed = (
        secrets.randbelow(2**31) if options.seed is None else options.seed
    )  # told, so it can be drawn again
    um = _load(options)
    with progress("drawing") as report:
        drawings = um.draw(
            options.prompts,
            n=options.n,
            guidance_scale=options.guidance_scale,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=seed,
            size=options.size,
            on_progress=report,
            images=[pictures] * len(options.prompts),
        )
    rows = []
    for index, drawing in enumerate(drawings):
        prompt = options.prompts[index // options.n]
        path = folder / f"{_slug(prompt)}-{seed}-{index}.png"
        save_image(drawing, path)
        rows.append({"prompt": prompt, "seed": seed, "index": index, "image": str(path)})
    return rows


def _show_drawings(rows: list[dict[str, Any]]) -> None:
    print_table(("prompt", "image"), [(row["prompt"], row["image"]) for row in rows])


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a folder or hub id (default: the embedded)"
    )


def _info(options: Options) -> Any:
    from unimm.pipeline import describe

    return describe(options.source)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder or hub id, in any supported layout")
    parser.add_argument("folder", metavar="FOLDER", help="where the converted checkpoint goes")
    layouts = ("unimm", "transformers", "original")
    parser.add_argument("--to", required=True, choices=layouts, help="the layout to write")


def _convert(options: Options) -> Any:
    from unimm.interop.convert import convert
    from unimm.pipeline import resolve

    file = Path(options.source)  # LlamaGen publishes one file
    convert(file if file.is_file() else resolve(options.source), Path(options.folder), options.to)
    return {"layout": options.to, "folder": options.folder}


# --- recipes: train, tokenizer, eval, recipes --------------------------------------------------------------


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values to set, as stages[0].steps=100"
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    smoke = "try the recipe: tiny widths, two steps a stage, into a folder of its own"
    parser.add_argument("--smoke", action="store_true", help=smoke)


def _train(options: Options, task: str | None = None) -> Any:
    from unimm.recipes import find_recipe
    from unimm.training.recipe import load_recipe, smoke_recipe

    path = find_recipe(options.recipe)
    recipe = (smoke_recipe if options.smoke else load_recipe)(path, options.overrides)
    if task is not None and recipe.task != task:
        raise UserError(f"{path}: task: expected {task}, got {recipe.task}; use `unimm train` for it")
    from unimm.training.trainer import train

    hide_loading_bars()
    return {"output": str(train(recipe, quiet=options.json))}


def _train_tokenizer(options: Options) -> Any:
    return _train(options, "tokenizer")


def _show_trained(document: dict[str, str]) -> None:
    print(f"Trained: {document['output']}")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="how many in all")
    parser.add_argument("--memory", type=float, required=True, metavar="GIB", help="of each GPU")
    parser.add_argument(
        "--peak", type=float, default=989.0, metavar="X", help="TFLOP/s of each (default: 989)"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, metavar="X", help="of the peak (default: 0.4)"
    )
    parser.add_argument(
        "--words", type=positive, default=128, metavar="N", help="text tokens a sample (default: 128)"
    )


def _plan(options: Options) -> Any:
    from unimm.recipes import find_recipe
    from unimm.training.recipe import load_recipe

    path = find_recipe(options.recipe)
    recipe = load_recipe(path, options.overrides)
    if recipe.task != "unified":
        raise UserError(f"{path}: task: expected unified, got {recipe.task}; only such recipes are planned")
    if not 0 < options.utilisation <= 1:
        raise UserError(
            f"plan: --utilisation: expected a share above 0 and up to 1, got {options.utilisation:g}"
        )
    from unimm.training.plan import Machines, plan
    from unimm.training.unified import UnifiedRecipe

    assert isinstance(recipe, UnifiedRecipe)
    machines = Machines(options.gpus, options.memory, options.peak, options.utilisation, options.words)
    return plan(recipe, machines)


def _show_plan(document: dict[str, Any]) -> None:
    machines, sizes = document["machines"], document["parameters"]
    print_table(("part", "parameters"), [(name, f"{size / 1e6:,.1f}M") for name, size in sizes.items()])
    stages = document["stages"]
    memory = [
        (
            one["name"],
            f"{one['trained'] / 1e6:,.1f}M",
            *(f"{size:.1f}" for size in one["memory_gib"].values()),
        )
        for one in stages
    ]
    print_table(("stage", "trains", *(f"ZeRO {zero}" for zero in range(4))), memory, "GiB on each GPU")
    work = [
        (one["name"], f"{one['tokens'] / 1e9:,.2f}B", f"{one['flops']:.2e}", f"{one['days']:.2f}")
        for one in stages
    ]
    print_table(("stage", "tokens", "FLOPs", "days"), work)
    for one in stages:
        if one["chosen"] not in one["fits"]:
            fitting = f"; {', '.join(one['fits'])} would fit" if one["fits"] else ""
            print(f"{one['name']}: {one['chosen']} takes more than {machines['memory']:g} GiB{fitting}")
    share = f"{machines['gpus']} GPUs at {machines['utilisation']:.0%} of {machines['peak']:g} TFLOP/s"
    print(
        f"{document['days']:.1f} days on {share}; memory without activations; {machines['words']} words a sample"
    )


def _hosts_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hostfile", metavar="HOSTFILE", help="lines of NAME slots=N, as launchers read them")
    parser.add_argument(
        "--timeout", type=positive, default=5, metavar="S", help="seconds a host has to answer (default: 5)"
    )


def _hosts(options: Options) -> Any:
    from unimm.training.hosts import check_hosts

    hosts = check_hosts(options.hostfile, options.timeout)
    return {"hosts": {host.name: host.slots for host in hosts}, "slots": sum(host.slots for host in hosts)}


def _show_hosts(document: dict[str, Any]) -> None:
    print_table(("host", "slots"), [(name, str(slots)) for name, slots in document["hosts"].items()])
    print(f"All {len(document['hosts'])} hosts answer; {document['slots']} processes.")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the output folder of a training run")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: report.png in that folder")


def _report(options: Options) -> Any:
    from unimm.training.report import report

    return {"sheet": str(report(options.run, options.output))}


def _show_report(document: dict[str, str]) -> None:
    print(f"Report: {document['sheet']}")


def _evaluate_tokenizer(options: Options) -> Any:
    from unimm.recipes import find_recipe
    from unimm.tokenizers.evaluate import evaluate_recipe

    hide_loading_bars()
    return evaluate_recipe(find_recipe(options.recipe), options.overrides)


def _evaluate(options: Options) -> Any:
    from unimm.evaluation import evaluate_recipe
    from unimm.recipes import find_recipe

    hide_loading_bars()
    return evaluate_recipe(find_recipe(options.recipe), options.overrides)


def _show_evaluation(document: dict[str, Any]) -> None:
    from unimm.evaluation import print_report

    print_report(document)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that have only `--json`."""


def _recipes(options: Options) -> Any:
    from unimm.recipes import list_recipes

    return [{"name": info.name, "summary": info.summary, "path": str(info.path)} for info in list_recipes()]


def _show_recipes(rows: list[dict[str, str]]) -> None:
    print_table(("recipe", "what it is"), [(row["name"], row["summary"]) for row in rows])


def _copy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as `unimm recipes` lists it")
    parser.add_argument(
        "dest", nargs="?", metavar="DEST", help="file or folder (default: the working directory)"
    )


def _copy_recipe(options: Options) -> Any:
    from unimm.recipes import copy_recipe

    return {"copied": str(copy_recipe(options.name, options.dest))}


def _show_copied(document: dict[str, str]) -> None:
    print(f"Copied to {document['copied']}")


# --- preferences: draw, rank, vote ------------------------------------------------------------------


def _candidates_arguments(parser: argparse.ArgumentParser) -> None:
    preferences.draw_arguments(parser)
    _model_arguments(parser)
    _quantize_argument(parser)


def _rank_arguments(parser: argparse.ArgumentParser) -> None:
    preferences.rank_arguments(parser)
    _model_arguments(parser)
    _quantize_argument(parser)


def _vote_arguments(parser: argparse.ArgumentParser) -> None:
    preferences.vote_arguments(parser)
    _model_arguments(parser)
    _quantize_argument(parser)


# --- small parsers -----------------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT."""
    match = re.fullmatch(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, as 64x64, got {text!r}")
    return int(match[1]), int(match[2])


def _slug(text: str) -> str:
    """Turn a prompt into the beginning of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "drawing"


COMMANDS = (
    Command("demo", "caption, ask and draw; write a contact sheet", _demo_arguments, _demo, _show_demo),
    Command("caption", "say what pictures show", _caption_arguments, _caption, _show_captions),
    Command("ask", "ask a question about pictures", _ask_arguments, _ask, lambda row: print(row["answer"])),
    Command("draw", "draw what prompts say", _draw_arguments, _draw, _show_drawings),
    Command("info", "what a model is made of", _info_arguments, _info, print_tree),
    Command(
        "convert",
        "write a checkpoint in another layout",
        _convert_arguments,
        _convert,
        lambda row: print(f"Written to {row['folder']} in the {row['layout']} layout"),
    ),
    Command("train", "train by a recipe", _train_arguments, _train, _show_trained),
    Command("plan", "what a recipe would take on a cluster", _plan_arguments, _plan, _show_plan),
    Command("hosts", "try every host of a hostfile by ssh", _hosts_arguments, _hosts, _show_hosts),
    Command("report", "draw curves and samples of a run", _report_arguments, _report, _show_report),
    Command("eval", "evaluate a model by a recipe", _recipe_arguments, _evaluate, _show_evaluation),
    Command("tokenizer train", "train an image tokenizer", _train_arguments, _train_tokenizer, _show_trained),
    Command(
        "tokenizer eval", "evaluate an image tokenizer", _recipe_arguments, _evaluate_tokenizer, print_tree
    ),
    Command("recipes", "list the recipes that ship with unimm", _no_arguments, _recipes, _show_recipes),
    Command("recipes copy", "copy a recipe out, to edit it", _copy_arguments, _copy_recipe, _show_copied),
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
        _candidates_arguments,
        lambda options: preferences.draw(options, _load),
        print_tree,
    ),
    Command(
        "preferences rank",
        "score candidates and pair the best with the worst",
        _rank_arguments,
        lambda options: preferences.rank(options, _load),
        print_tree,
    ),
    Command(
        "preferences align",
        "draw, rank, train and measure by a recipe",
        _recipe_arguments,
        preferences.align,
        preferences.show_aligned,
    ),
    Command(
        "preferences vote",
        "pick the better of two candidates on a local page",
        _vote_arguments,
        lambda options: preferences.vote(options, _load),
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
