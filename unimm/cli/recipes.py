"""The commands about recipes and runs: `train`, `plan`, `hosts`, `tokenizer …` and `recipes …`.

As in `unimm.cli.data`: their arguments, the calls behind them, and how a person sees the results.
"""

from __future__ import annotations

from typing import Any

import click

from unimm.cli.commands import Options, command
from unimm.cli.options import FILE, NUMBER, POSITIVE, RECIPE, recipe_arguments
from unimm.console import hide_loading_bars, print_table, print_text, print_tree
from unimm.errors import UserError

_smoke = click.option(
    "--smoke", is_flag=True, help="try the recipe: tiny widths, two steps a stage, into a folder of its own"
)


def _train(options: Options, task: str | None = None) -> Any:
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


def show_trained(document: dict[str, str]) -> None:
    """Say where the run is."""
    print_text(f"Trained: {document['output']}")


@command("train", "train by a recipe", show_trained)
@recipe_arguments
@_smoke
def train(options: Options) -> Any:
    """Train."""
    return _train(options)


@command("train", "train an image tokenizer", show_trained)
@recipe_arguments
@_smoke
def train_tokenizer(options: Options) -> Any:
    """Train an image tokenizer."""
    return _train(options, "tokenizer")


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
        size = one["memory_gib"][one["chosen"]]
        if one["chosen"] in one["fits"]:
            print_text(
                f"{one['name']}: {one['chosen']} takes {size:.3g} of {machines['memory']:.4g} GiB: it fits"
            )
        else:
            fitting = f"; {', '.join(one['fits'])} would fit" if one["fits"] else ""
            taken = f"takes more than {machines['memory']:.4g} GiB ({size:.3g})"
            print_text(f"{one['name']}: {one['chosen']} {taken}{fitting}")
    _show_here(document["here"], stages)
    share = f"{machines['gpus']} GPUs at {machines['utilisation']:.0%} of {machines['peak']:g} TFLOP/s"
    print_text(
        f"{document['days']:.1f} days on {share}; memory without activations; {machines['words']} words a sample"
    )


def _show_here(here: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """Say whether this machine has the memory for every stage."""
    most = max(stages, key=lambda one: one["here_gib"])
    verdict = "it fits" if most["fits_here"] else "it does not fit"
    several = here["processes"] > 1
    machine = f"{here['processes']} x {here['memory']:.4g}" if several else f"{here['memory']:.4g}"
    takes = f"{most['name']} takes {most['here_gib']:.3g} GiB{' of each' if several else ''}"
    print_text(f"This machine ({machine} GiB, {here['what']}): {takes}: {verdict}")


@command("plan", "what a recipe would take on a cluster", show_plan)
@recipe_arguments
@click.option("--gpus", type=POSITIVE, metavar="N", help="how many in all (default: those here)")
@click.option(
    "--memory", type=NUMBER, metavar="GIB", help="of each GPU (default: this machine's, or its RAM)"
)
@click.option("--peak", type=NUMBER, default=989.0, metavar="X", help="TFLOP/s of each (default: 989)")
@click.option("--utilisation", type=NUMBER, default=0.4, metavar="X", help="of the peak (default: 0.4)")
@click.option("--words", type=POSITIVE, default=128, metavar="N", help="text tokens a sample (default: 128)")
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
    from unimm.training.plan import Machines, this_machine
    from unimm.training.plan import plan as make_plan
    from unimm.training.tasks.unified import UnifiedRecipe

    assert isinstance(recipe, UnifiedRecipe)
    here = this_machine()
    gpus, memory = options.gpus or here.processes, options.memory or here.memory
    work = (options.peak, options.utilisation, options.words)
    return make_plan(recipe, Machines(gpus, memory, *work, here))


def show_hosts(document: dict[str, Any]) -> None:
    """Show the hosts that answered."""
    print_table(("host", "slots"), [(name, str(slots)) for name, slots in document["hosts"].items()])
    print_text(f"All {len(document['hosts'])} hosts answer; {document['slots']} processes.")


@command("hosts", "try every host of a hostfile by ssh", show_hosts)
@click.argument(
    "hostfile", type=FILE, metavar="HOSTFILE", help="lines of NAME slots=N, as launchers read them"
)
@click.option(
    "--timeout", type=POSITIVE, default=5, metavar="S", help="seconds a host has to answer (default: 5)"
)
def hosts(options: Options) -> Any:
    """Try every host."""
    from unimm.training.hosts import check_hosts

    hosts = check_hosts(options.hostfile, options.timeout)
    return {"hosts": {host.name: host.slots for host in hosts}, "slots": sum(host.slots for host in hosts)}


@command("eval", "evaluate an image tokenizer", print_tree)
@recipe_arguments
def evaluate_tokenizer(options: Options) -> Any:
    """Evaluate an image tokenizer by a recipe."""
    from unimm.recipes import find_recipe
    from unimm.training.tokenizer.evaluate import evaluate_tokenizer

    hide_loading_bars()
    return evaluate_tokenizer(find_recipe(options.recipe), options.overrides)


def show_recipes(rows: list[dict[str, str]]) -> None:
    """Show their names and what they are."""
    print_table(("recipe", "what it is"), [(row["name"], row["summary"]) for row in rows])


@command("recipes", "list the recipes that ship with unimm", show_recipes)
def list_all(options: Options) -> Any:
    """List the recipes that ship with the package."""
    from unimm.recipes import list_recipes

    return [{"name": info.name, "summary": info.summary, "path": str(info.path)} for info in list_recipes()]


def show_copied(document: dict[str, str]) -> None:
    """Say where the copy is."""
    print_text(f"Copied to {document['copied']}")


@command("copy", "copy a recipe out, to edit it", show_copied)
@click.argument("name", type=RECIPE, metavar="NAME", help="as `unimm recipes` lists it")
@click.argument(
    "dest",
    type=FILE,
    required=False,
    metavar="[DEST]",
    help="file or folder (default: the working directory)",
)
def copy(options: Options) -> Any:
    """Copy a recipe out."""
    from unimm.recipes import copy_recipe

    return {"copied": str(copy_recipe(options.name, options.dest))}


def show_systems(document: dict[str, Any]) -> None:
    """Show the systems side by side, as a table for a terminal or in Markdown."""
    from unimm.training.systems import COLUMNS, as_markdown, cells

    rows = document["systems"]
    if document["markdown"]:
        print_text(as_markdown(rows))
        return
    for row in rows:
        values = zip(list(COLUMNS.values())[2:], cells(row)[2:], strict=True)
        lines = [*values, ("recipe", row["recipe"]), ("paper", row["paper"])]
        print_table((f"{row['system']}, {row['year']}", ""), lines)


@command("systems", "the published systems, side by side", show_systems)
@click.option("--markdown", is_flag=True, help="as a table in Markdown")
def systems(options: Options) -> Any:
    """Compare the published systems that recipes describe."""
    from unimm.training.systems import systems as describe

    hide_loading_bars()
    return {"systems": describe(), "markdown": options.markdown}
