"""The commands about scores: `eval` and `report`.

As in `unimm.cli.data`: their arguments, the calls behind them, and how a person sees the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unimm.cli.commands import Options, command
from unimm.cli.options import DEVICE, DTYPE, FILE, FOLDER, MEASURE, POSITIVE, SHARD
from unimm.console import hide_loading_bars, print_table, print_text
from unimm.errors import UserError


def show_evaluation(document: dict[str, Any]) -> None:
    """Show the tables of an evaluation, the figures of a result, or how a result was checked."""
    if "recipe" in document:
        from unimm.evaluation.report import print_report

        print_report(document["recipe"])
    elif "checked" in document:
        print_text(f"{document['result']}: {document['checked']} of {document['of']} items, all the same")
    elif "drawn" in document:
        print_text(f"Drawn: {document['images']:,} images in {document['drawn']}")
        print_text("Judge them by the official script and give its output with --judged, or set judge.kind.")
    elif "part" in document:
        print_text(f"Part {document['part']} is done; the result is written when all parts are.")
    else:
        rows = [
            (name, *(_number(one[part]) for part in ("value", "low", "high")))
            for name, one in document["figures"].items()
        ]
        print_table(("figure", "value", "low", "high"), rows, document["title"])
        print_text(document["said"])
        print_text(f"Result: {document['result']}")


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4f}"


@command("eval", "score a model by a protocol or a recipe", show_evaluation)
@click.argument(
    "measure",
    type=MEASURE,
    required=False,
    metavar="[PROTOCOL]",
    help="a protocol or recipe, by name or file",
)
@click.argument(
    "overrides", nargs=-1, metavar="[KEY=VALUE]...", help="values to set, as answer.by=likelihood"
)
@click.option("--model", type=FOLDER, metavar="SOURCE", help="a folder, a hub id or embedded (the default)")
@click.option(
    "--data", type=FILE, multiple=True, metavar="FILE", help="of the data set: a file, a folder or a hub id"
)
@click.option("--images", type=FOLDER, metavar="FOLDER", help="of the images that the data names")
@click.option("-o", "--output", type=FOLDER, metavar="FOLDER", help="default: runs/eval-PROTOCOL")
@click.option("--batch-size", type=POSITIVE, metavar="N", help="most that goes through the model at once")
@click.option("--processes", type=POSITIVE, default=1, metavar="N", help="that share the items (default: 1)")
@click.option("--shard", type=SHARD, metavar="PART/PARTS", help="do one part only, as 0/4; on any machine")
@click.option("--limit", type=POSITIVE, metavar="N", help="the first N items only")
@click.option("--judged", type=FILE, metavar="FILE", help="what an official script said of the drawings")
@click.option("--drawn", type=FOLDER, metavar="FOLDER", help="of drawings that were made elsewhere")
@click.option("--check", type=FILE, metavar="RESULT", help="make 20 items of a result again and compare")
@click.option("--device", type=DEVICE, default="auto", metavar="DEVICE", help="as of `unimm ask`")
@click.option("--dtype", type=DTYPE, default="auto", metavar="DTYPE", help="as of `unimm ask`")
def evaluate(options: Options) -> Any:
    """Score a model."""
    from unimm.evaluation.protocol import find_protocol, list_protocols

    hide_loading_bars()
    if options.check is not None:
        from unimm.evaluation.check import check_result

        if options.measure is not None:
            raise UserError("eval: --check: the result says its protocol; leave the protocol out")
        return check_result(Path(options.check), _run_options(options, Path("unused")))
    if options.measure is None:
        known = ", ".join(list_protocols())
        raise UserError(f"eval: say which protocol ({known}) or recipe (`unimm recipes` lists these)")
    path = find_protocol(options.measure)
    return _recipe(options) if path is None else _protocol(path, options)


def _recipe(options: Options) -> Any:
    """Evaluate by a recipe, which has its own keys for all but the model."""
    from unimm.evaluation import evaluate_recipe
    from unimm.evaluation.protocol import list_protocols
    from unimm.recipes import find_recipe
    from unimm.sections import near

    for name in ("images", "output", "batch_size", "shard", "limit", "judged", "drawn"):
        if getattr(options, name) is not None:
            raise UserError(f"eval: --{name.replace('_', '-')}: only with a protocol; recipes have keys")
    if options.data:
        raise UserError("eval: --data: only with a protocol; recipes have keys")
    try:
        found = find_recipe(options.measure)
    except UserError as error:
        hint = near(options.measure, list_protocols())
        raise UserError(f"{error}{hint}" if hint else str(error)) from None
    overrides = [*options.overrides, *([f"model={options.model}"] if options.model else [])]
    return {"recipe": evaluate_recipe(found, overrides)}


def _protocol(path: Path, options: Options) -> Any:
    """Score by a protocol, on one process or several."""
    from unimm.evaluation.benchmark import Benchmark
    from unimm.evaluation.protocol import load_protocol
    from unimm.evaluation.shards import run_processes

    protocol = load_protocol(path, options.overrides)
    output = Path(options.output or f"runs/eval-{protocol.name}")
    run = _run_options(options, output)
    if options.processes > 1:
        if options.shard is not None:
            raise UserError("eval: --shard: with --processes 1; a part is not split again")
        run_processes(options.processes, run, options.measure, options.overrides)
    document = Benchmark(protocol, run).run()
    if document is None:
        return {"part": "{}/{}".format(*run.shard)}
    if "drawn" in document:
        return document
    return {
        "title": protocol.title,
        "result": str(output / "result.json"),
        "main": document["main"],
        "figures": document["figures"],
        "counts": document["counts"],
        "said": _said(document),
    }


def _said(document: dict[str, Any]) -> str:
    """What one should know of a result in a line."""
    counts = document["counts"]
    parts = [f"{counts['items']:,} items"]
    parts += [f"{counts['unread']:,} answers that no rule reads"] if counts["unread"] else []
    parts += [f"{counts['cut']:,} answers cut"] if counts["cut"] else []
    parts += [] if document["data"]["verified"] else ["data without a checksum in the protocol"]
    return "; ".join(parts)


def _run_options(options: Options, output: Path) -> Any:
    from unimm.evaluation.benchmark import RunOptions

    def path(value: str | None) -> Path | None:
        return None if value is None else Path(value)

    return RunOptions(
        options.model, list(options.data), path(options.images), output, options.batch_size,
        options.shard or (0, 1), options.limit, options.device, options.dtype, path(options.judged),
        path(options.drawn), (str(options.measure), *options.overrides),
    )  # fmt: skip


def show_report(document: dict[str, Any]) -> None:
    """Say where the report is; of results also their figures side by side."""
    if "figures" in document:
        columns = (
            "figure",
            *document["names"],
            *(f"{name} less the first" for name in document["names"][1:]),
        )
        rows = [
            (name, *map(_number, one["values"]), *(f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
              for d in one["differences"]))
            for name, one in document["figures"].items()
        ]  # fmt: skip
        print_table(columns, rows, document["title"])
        print_text(f"Page: {document['page']}")
    else:
        print_text(f"Report: {document['sheet']}")


@command("report", "draw a run's curves, or compare results", show_report)
@click.argument(
    "runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...",
    help="the output folder of a training run, or results of `unimm eval`",
)  # fmt: skip
@click.option(
    "-o", "--output", type=FILE, metavar="FILE", help="default: report.png in a run's folder; comparison.html"
)
def report(options: Options) -> Any:
    """Draw the report of a run, or compare results."""
    from unimm.evaluation.result import is_result

    paths = [Path(run) for run in options.runs]
    if len(paths) > 1 or is_result(paths[0]):
        from unimm.evaluation.comparison import compare_results

        return compare_results(paths, Path(options.output or "comparison.html"))
    from unimm.training.report import report as draw_report

    return {"sheet": str(draw_report(options.runs[0], options.output))}
