"""The commands `unimm data …`: their arguments, the calls behind them, and how a person sees the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unimm.cli.commands import Options, command
from unimm.cli.options import (
    ALL_SPLITS,
    DEVICE,
    FIELD,
    FILE,
    FOLDER,
    INTEGER,
    POSITIVE,
    Choice,
    F,
    decorate,
)
from unimm.console import hide_loading_bars, print_table, print_text, print_tree, progress
from unimm.errors import UserError

SHOWN = 20  # bad items on the screen; `--json` has more


def _source(function: F) -> F:
    """The source of data and what says how to read it."""
    kinds = "file, folder or pattern: images, JSON, CSV, tars, Parquet, datasets; or several tars or Parquet files"
    pairs = "what an image with a text is for (default: image_to_text)"
    field = "a column of another name; image= says that there is none"
    size = "side of images to draw, where a model draws any size (default: the model's)"
    return decorate(
        function,
        click.argument("source", type=FILE, nargs=-1, required=True, metavar="SOURCE...", help=kinds),
        click.option(
            "--pairs", type=Choice("image_to_text", "text_to_image"), default="image_to_text", help=pairs
        ),
        click.option("--field", type=FIELD, multiple=True, metavar="NAME=COLUMN", help=field),
        click.option(
            "--images", type=FOLDER, metavar="DIR", help="folder that names of images are relative to"
        ),
        click.option("--split", metavar="NAME", help="where names of files say several (default: train)"),
        click.option("--allow-outside", is_flag=True, help="let the data name files outside its folder"),
        click.option(
            "--model", type=FOLDER, metavar="MODEL", help="a folder, a hub id or embedded (the default)"
        ),
        click.option("--size", type=POSITIVE, metavar="PIXELS", help=size),
        click.option("--keep-ratio", is_flag=True, help="keep their ratio, in an area of that side squared"),
    )


def _reading(options: Options) -> Any:
    from unimm.data.sources import Reading

    return Reading(options.pairs, dict(options.field), options.images, options.split, options.allow_outside)


def _location(options: Options) -> str | tuple[str, ...]:
    """The one source, or the files that a shell made of a pattern."""
    names = tuple(options.source)
    return names[0] if len(names) == 1 else names


def show_check(report: dict[str, Any]) -> None:
    """Show what `check` found."""
    bad = report.pop("bad_items", [])
    print_tree(report)
    if bad:
        rows = [(item["key"], item["file"], item["reason"]) for item in bad[:SHOWN]]
        more = f", the first {SHOWN} of {report['bad']}" if report["bad"] > len(rows) else ""
        print_table(("key", "file", "reason"), rows, f"Bad items{more}")


@command("check", "read a data source whole and say what is in it", show_check)
@_source
def check(options: Options) -> Any:
    """Read a source whole; preferences are known by what their first object says."""
    from unimm.data.check import check_source
    from unimm.preferences.check import check_preferences, is_preferences

    location, reading = _location(options), _reading(options)
    if is_preferences(location, reading):
        return check_preferences(location, options.model, reading)
    with progress("reading") as report:
        return check_source(location, reading, options.model, report, options.size, options.keep_ratio)


@command("encode", "compute image codes once, into tars to train on", print_tree)
@_source
@click.argument("folder", type=FOLDER, metavar="FOLDER", help="where the tars go")
@click.option("--processes", type=POSITIVE, default=1, metavar="N", help="that work at once (default: 1)")
@click.option("--shard", type=POSITIVE, default=1000, metavar="N", help="records in a tar (default: 1000)")
@click.option(
    "--device", type=DEVICE, default="auto", metavar="DEVICE", help="auto, cpu or cuda (default: auto)"
)
@click.option(
    "--features",
    type=Choice("float32", "float16"),
    help="store images to look at as features of the model's encoder (default: as images)",
)
def encode(options: Options) -> Any:
    """Write a source with image codes."""
    from unimm.data.encode import EncodingJob, encode_source

    hide_loading_bars()
    job = EncodingJob(
        _location(options), Path(options.folder), options.model, _reading(options), options.shard,
        options.device, options.features, options.size, options.keep_ratio,
    )  # fmt: skip
    with progress("image codes") as report:
        return encode_source(job, options.processes, report)


def show_sheet(document: dict[str, str]) -> None:
    """Say where the sheet is."""
    print_text(f"Contact sheet: {document['sheet']}")


@command("preview", "show scenes or tables on a sheet", show_sheet)
@click.option(
    "--data", type=Choice("emojiscenes", "tables"), default="emojiscenes", help="default: emojiscenes"
)
@click.option("--difficulty", type=Choice("full", "small"), default="full", help="of tables (default: full)")
@click.option("-o", "--output", type=FILE, default="preview.png", metavar="FILE", help="default: preview.png")
@click.option("--split", type=ALL_SPLITS, default="train", help="default: train")
@click.option("--seed", type=INTEGER, default=0, metavar="SEED", help="of the sample (default: 0)")
def preview(options: Options) -> Any:
    """Write a contact sheet of scenes or tables."""
    from unimm.data.emojiscenes.preview import contact_sheet
    from unimm.data.emojiscenes.scenes import SPLITS as SCENE_SPLITS
    from unimm.data.tables.preview import table_sheet
    from unimm.data.tables.settings import TABLE_SPLITS, TableSettings
    from unimm.images import save_image
    from unimm.outputs import check_output, is_image_file

    known: tuple[str, ...] = TABLE_SPLITS if options.data == "tables" else SCENE_SPLITS
    if options.split not in known:
        raise UserError(f"--split: {options.data} has no {options.split!r}; use one of {', '.join(known)}")
    check_output(options.output, "an image", is_image_file)
    if options.data == "tables":
        sheet = table_sheet(options.split, options.seed, TableSettings(difficulty=options.difficulty))
    else:
        sheet = contact_sheet(split=options.split, seed=options.seed)
    save_image(sheet, options.output)
    return {"sheet": options.output}


@command("pack", "pack the artwork from npm packages", print_tree)
@click.argument(
    "modules", type=FOLDER, metavar="NODE_MODULES", help="folder with the npm packages of the artwork"
)
@click.argument("folder", type=FOLDER, metavar="DIR", help="where the packed artwork goes")
def pack(options: Options) -> Any:
    """Pack the artwork."""
    from unimm.data.emojiscenes.pack import pack as pack_artwork

    return pack_artwork(Path(options.modules), Path(options.folder))
