"""The commands `unimm data …`: their arguments, the calls behind them, and how a person sees the results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unimm.console import hide_loading_bars, print_table, print_tree, progress

Options = argparse.Namespace
SHOWN = 20  # bad items on the screen; `--json` has more


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _field(text: str) -> tuple[str, str]:
    """Parse NAME=COLUMN."""
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise argparse.ArgumentTypeError(f"expected NAME=COLUMN, as text=caption_en, got {text!r}")
    return name, column


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="file, folder or pattern: pictures, JSON, tars, Parquet, datasets"
    )
    pairs = ("image_to_text", "text_to_image")
    parser.add_argument(
        "--pairs",
        choices=pairs,
        default=pairs[0],
        help="what a picture with a text is for (default: %(default)s)",
    )
    parser.add_argument(
        "--field",
        type=_field,
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="a column of another name",
    )
    parser.add_argument("--images", metavar="DIR", help="folder that names of pictures are relative to")
    parser.add_argument("--split", metavar="NAME", help="of a Hugging Face folder that has several")
    parser.add_argument("--model", metavar="MODEL", help="a folder or hub id (default: the embedded model)")


def _reading(options: Options) -> Any:
    from unimm.data.sources import Reading

    return Reading(options.pairs, dict(options.field), options.images, options.split)


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm data check`."""
    _source_arguments(parser)


def check(options: Options) -> Any:
    """Read a source whole; preferences are known by what their first object says."""
    from unimm.data.check import check_source
    from unimm.training.preferences.check import check_preferences, is_preferences

    if is_preferences(options.source):
        return check_preferences(options.source, options.model)
    with progress("reading") as report:
        return check_source(options.source, _reading(options), options.model, report)


def show_check(report: dict[str, Any]) -> None:
    """Show what `check` found."""
    bad = report.pop("bad_items", [])
    print_tree(report)
    if bad:
        rows = [(item["key"], item["file"], item["reason"]) for item in bad[:SHOWN]]
        more = f", the first {SHOWN} of {report['bad']}" if report["bad"] > len(rows) else ""
        print_table(("key", "file", "reason"), rows, f"Bad items{more}")


def encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm data encode`."""
    _source_arguments(parser)
    parser.add_argument("folder", metavar="FOLDER", help="where the tars go")
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="that work at once (default: 1)"
    )
    parser.add_argument(
        "--shard", type=positive, default=1000, metavar="N", help="records in a tar (default: 1000)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--features",
        choices=("float32", "float16"),
        help="store pictures to look at as features of the model's encoder (default: as pictures)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="PIXELS",
        help="side of pictures to draw, where a model draws any size (default: the model's)",
    )
    parser.add_argument(
        "--keep-ratio", action="store_true", help="keep their ratio, in an area of that side squared"
    )


def encode(options: Options) -> Any:
    """Write a source with image codes."""
    from unimm.data.encode import encode_source

    hide_loading_bars()
    with progress("image codes") as report:
        return encode_source(
            options.source, Path(options.folder), options.model, _reading(options), options.processes,
            options.shard, options.device, report, options.features, options.size, options.keep_ratio,
        )  # fmt: skip


def preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm data preview`."""
    parser.add_argument("-o", "--output", default="preview.png", metavar="FILE", help="default: preview.png")
    splits = ("train", "seen", "composed", "vendor")
    parser.add_argument("--split", default="train", choices=splits, help="default: train")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")


def preview(options: Options) -> Any:
    """Write a contact sheet of scenes."""
    from unimm.data.preview import contact_sheet
    from unimm.images import save_image

    save_image(contact_sheet(split=options.split, seed=options.seed), options.output)
    return {"sheet": options.output}


def show_sheet(document: dict[str, str]) -> None:
    """Say where the sheet is."""
    print(f"Contact sheet: {document['sheet']}")


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm data pack`."""
    parser.add_argument("modules", metavar="NODE_MODULES", help="folder with the npm packages of the artwork")
    parser.add_argument("folder", metavar="DIR", help="where the packed artwork goes")


def pack(options: Options) -> Any:
    """Pack the artwork."""
    from unimm.data.pack import pack as pack_artwork

    return pack_artwork(Path(options.modules), Path(options.folder))
