"""The commands about recipes and runs: `train`, `plan`, `hosts`, `report`, `eval`, `tokenizer …` and `recipes …`.

As in `unimm.cli_data`: their arguments, the calls behind them, and how a person sees the results.
"""

from __future__ import annotations

import argparse
from typing import Any

from unimm.cli_data import positive
from unimm.console import hide_loading_bars, print_table
from unimm.errors import UserError

Options = argparse.Namespace


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that takes a recipe."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values to set, as stages[0].steps=100"
    )


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm train` and `unimm tokenizer train`."""
    recipe_arguments(parser)
    smoke = "try the recipe: tiny widths, two steps a stage, into a folder of its own"
    parser.add_argument("--smoke", action="store_true", help=smoke)


def train(options: Options, task: str | None = None) -> Any:
    """Train by a recipe, which has to be of `task` where one is given."""
    from unimm.recipes import find_recipe
    from unimm.training.recipe import load_recipe, smoke_recipe

    path = find_recipe(options.recipe)
    recipe = (smoke_recipe if options.smoke else load_recipe)(path, options.overrides)
    if task is not None and recipe.task != task:
        raise UserError(f"{path}: task: expected {task}, got {recipe.task}; use `unimm train` for it")
    from unimm.training.trainer import train as run

    hide_loading_bars()
    return {"output": str(run(recipe, quiet=options.json))}


def train_tokenizer(options: Options) -> Any:
    """Train an image tokenizer."""
    return train(options, "tokenizer")


def show_trained(document: dict[str, str]) -> None:
    """Say where the run is."""
    print(f"Trained: {document['output']}")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm plan`."""
    recipe_arguments(parser)
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


def plan(options: Options) -> Any:
    """Say what a recipe would take."""
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
    from unimm.training.plan import Machines
    from unimm.training.plan import plan as make_plan
    from unimm.training.unified import UnifiedRecipe

    assert isinstance(recipe, UnifiedRecipe)
    machines = Machines(options.gpus, options.memory, options.peak, options.utilisation, options.words)
    return make_plan(recipe, machines)


def show_plan(document: dict[str, Any]) -> None:
    """Show parameters, memory, work and days."""
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


def hosts_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm hosts`."""
    parser.add_argument("hostfile", metavar="HOSTFILE", help="lines of NAME slots=N, as launchers read them")
    parser.add_argument(
        "--timeout", type=positive, default=5, metavar="S", help="seconds a host has to answer (default: 5)"
    )


def hosts(options: Options) -> Any:
    """Try every host."""
    from unimm.training.hosts import check_hosts

    hosts = check_hosts(options.hostfile, options.timeout)
    return {"hosts": {host.name: host.slots for host in hosts}, "slots": sum(host.slots for host in hosts)}


def show_hosts(document: dict[str, Any]) -> None:
    """Show the hosts that answered."""
    print_table(("host", "slots"), [(name, str(slots)) for name, slots in document["hosts"].items()])
    print(f"All {len(document['hosts'])} hosts answer; {document['slots']} processes.")


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm report`."""
    parser.add_argument("run", metavar="RUN", help="the output folder of a training run")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: report.png in that folder")


def report(options: Options) -> Any:
    """Draw the report of a run."""
    from unimm.training.report import report as draw_report

    return {"sheet": str(draw_report(options.run, options.output))}


def show_report(document: dict[str, str]) -> None:
    """Say where the report is."""
    print(f"Report: {document['sheet']}")


def evaluate_tokenizer(options: Options) -> Any:
    """Evaluate an image tokenizer by a recipe."""
    from unimm.recipes import find_recipe
    from unimm.tokenizers.evaluate import evaluate_recipe

    hide_loading_bars()
    return evaluate_recipe(find_recipe(options.recipe), options.overrides)


def evaluate(options: Options) -> Any:
    """Evaluate a model by a recipe."""
    from unimm.evaluation import evaluate_recipe
    from unimm.recipes import find_recipe

    hide_loading_bars()
    return evaluate_recipe(find_recipe(options.recipe), options.overrides)


def show_evaluation(document: dict[str, Any]) -> None:
    """Show the tables of an evaluation."""
    from unimm.evaluation import print_report

    print_report(document)


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that have only `--json`."""


def list_all(options: Options) -> Any:
    """List the recipes that ship with the package."""
    from unimm.recipes import list_recipes

    return [{"name": info.name, "summary": info.summary, "path": str(info.path)} for info in list_recipes()]


def show_recipes(rows: list[dict[str, str]]) -> None:
    """Show their names and what they are."""
    print_table(("recipe", "what it is"), [(row["name"], row["summary"]) for row in rows])


def copy_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm recipes copy`."""
    parser.add_argument("name", metavar="NAME", help="as `unimm recipes` lists it")
    parser.add_argument(
        "dest", nargs="?", metavar="DEST", help="file or folder (default: the working directory)"
    )


def copy(options: Options) -> Any:
    """Copy a recipe out."""
    from unimm.recipes import copy_recipe

    return {"copied": str(copy_recipe(options.name, options.dest))}


def show_copied(document: dict[str, str]) -> None:
    """Say where the copy is."""
    print(f"Copied to {document['copied']}")
