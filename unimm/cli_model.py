"""The commands that ask a model: `demo`, `caption`, `ask`, `draw`, `info` and `convert`.

As in `unimm.cli_data`: their arguments, the calls behind them, and how a person sees the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import secrets
from pathlib import Path
from typing import Any

from unimm.cli_data import positive
from unimm.console import hide_loading_bars, print_table, progress
from unimm.errors import UserError

Options = argparse.Namespace


def model_arguments(parser: argparse.ArgumentParser, quantize: bool = True) -> None:
    """Arguments of every command that loads a model."""
    parser.add_argument("--model", metavar="SOURCE", help="a folder or hub id (default: the embedded model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 ... (default: auto)")
    if quantize:
        parser.add_argument("--quantize", metavar="HOW", help="int8: weights of a quarter of the size")


def load(options: Options) -> Any:
    """Load the model that `model_arguments` name."""
    import unimm

    hide_loading_bars()
    with progress("loading the model"):
        return unimm.load(
            options.model, device=options.device, dtype=options.dtype, quantize=options.quantize
        )


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm demo`."""
    parser.add_argument("-o", "--output", default=".", metavar="DIR", help="where the contact sheet goes")
    model_arguments(parser, quantize=False)


def demo(options: Options) -> Any:
    """Caption, ask and draw; write a contact sheet."""
    from unimm.demo import run

    hide_loading_bars()
    return dataclasses.asdict(run(options.output, options.model, options.device, options.dtype))


def show_demo(report: dict[str, Any]) -> None:
    """Show what was said, and say where the sheet is."""
    captions = [(row["split"], row["truth"], row["caption"], row["right"]) for row in report["captions"]]
    print_table(("split", "scene", "caption", "right"), captions, "Captions of held-out scenes")
    fields = ("split", "scene", "question", "answer", "right")
    print_table(fields, [[row[field] for field in fields] for row in report["answers"]], "Answers")
    print(f"Drew {len(report['prompts'])} prompts, such as: {report['prompts'][0]}")
    print(f"Contact sheet: {report['sheet']}  ({report['seconds']:.0f} s)")


def caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm caption`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    model_arguments(parser)


def caption(options: Options) -> Any:
    """Caption pictures."""
    from unimm.images import read_image

    pictures = [
        read_image(path) for path in options.images
    ]  # before the model is loaded: mistakes show at once
    captions = load(options).caption(pictures)
    return [{"image": path, "caption": said} for path, said in zip(options.images, captions, strict=True)]


def show_captions(rows: list[dict[str, str]]) -> None:
    """Show one caption as it is, several in a table."""
    if len(rows) == 1:
        print(rows[0]["caption"])
    else:
        print_table(("image", "caption"), [(row["image"], row["caption"]) for row in rows])


def ask_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm ask`."""
    parser.add_argument(
        "items", nargs="+", metavar="IMAGE ... QUESTION", help="picture files, then one question"
    )
    model_arguments(parser)


def ask(options: Options) -> Any:
    """Ask one question about one or more pictures."""
    from unimm.images import read_image

    *paths, question = options.items
    if not paths or os.path.isfile(question):
        raise UserError(f"ask: after the pictures comes a question; {question!r} is the last argument")
    pictures = [read_image(path) for path in paths]
    answers = load(options).ask([pictures], [question])  # one question about all of the pictures
    return {"images": paths, "question": question, "answer": answers[0]}


def draw_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm draw`."""
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
    model_arguments(parser)


def draw(options: Options) -> Any:
    """Draw prompts into files."""
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
    um = load(options)
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


def show_drawings(rows: list[dict[str, Any]]) -> None:
    """Show where the drawings are."""
    print_table(("prompt", "image"), [(row["prompt"], row["image"]) for row in rows])


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm info`."""
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a folder or hub id (default: the embedded)"
    )


def info(options: Options) -> Any:
    """Say what a model is made of."""
    from unimm.pipeline import describe

    return describe(options.source)


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unimm convert`."""
    parser.add_argument("source", metavar="SOURCE", help="a folder or hub id, in any supported layout")
    parser.add_argument("folder", metavar="FOLDER", help="where the converted checkpoint goes")
    layouts = ("unimm", "transformers", "original")
    parser.add_argument("--to", required=True, choices=layouts, help="the layout to write")


def convert(options: Options) -> Any:
    """Write a checkpoint in another layout."""
    from unimm.interop.convert import convert as write
    from unimm.pipeline import resolve

    file = Path(options.source)  # LlamaGen publishes one file
    write(file if file.is_file() else resolve(options.source), Path(options.folder), options.to)
    return {"layout": options.to, "folder": options.folder}


def _size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT."""
    match = re.fullmatch(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, as 64x64, got {text!r}")
    return int(match[1]), int(match[2])


def _slug(text: str) -> str:
    """Turn a prompt into the beginning of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "drawing"
