"""The commands that ask a model: `demo`, `caption`, `ask`, `chat`, `draw`, `info` and `convert`.

As in `unimm.cli.data`: their arguments, the calls behind them, and how a person sees the results.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import click

from unimm.cli.commands import Options, command
from unimm.cli.options import (
    FILE,
    FOLDER,
    INTEGER,
    NUMBER,
    POSITIVE,
    SIZE,
    Choice,
    answer_options,
    answer_values,
    hub_options,
    loading_options,
    model_options,
    sampling_options,
)
from unimm.console import hide_loading_bars, print_table, print_text, print_tree, progress, say
from unimm.errors import UserError


def load(options: Options) -> Any:
    """Load the model that `model_arguments` name."""
    from unimm.loading import load as load_model
    from unimm.processing.views import LIMITS

    hide_loading_bars()
    limits = {name: getattr(options, name, None) for name in LIMITS}
    with progress("loading the model"):
        return load_model(
            options.model,
            device=options.device,
            dtype=options.dtype,
            quantize=options.quantize,
            parts=options.parts,
            revision=options.revision,
            image_tokenizer=options.image_tokenizer,
            views={name: value for name, value in limits.items() if value is not None},
        )


def show_demo(report: dict[str, Any]) -> None:
    """Show what was said, and say where the sheet is."""
    captions = [(row["split"], row["truth"], row["caption"], row["right"]) for row in report["captions"]]
    print_table(("split", "scene", "caption", "right"), captions, "Captions of held-out scenes")
    fields = ("split", "scene", "question", "answer", "right")
    print_table(fields, [[row[field] for field in fields] for row in report["answers"]], "Answers")
    print_text(f"Drew {len(report['prompts'])} prompts, such as: {report['prompts'][0]}")
    print_text(f"Contact sheet: {report['sheet']}  ({report['seconds']:.0f} s)")


@command("demo", "caption, ask and draw; write a contact sheet", show_demo)
@click.option("-o", "--output", type=FOLDER, default=".", metavar="DIR", help="where the contact sheet goes")
@loading_options
def demo(options: Options) -> Any:
    """Caption, ask and draw; write a contact sheet."""
    from unimm.cli.demo import run

    hide_loading_bars()
    source = (options.model, options.device, options.dtype, options.revision, options.image_tokenizer)
    return dataclasses.asdict(run(options.output, *source))


def show_captions(rows: list[dict[str, Any]]) -> None:
    """Show one caption as it is, several in a table."""
    if len(rows) == 1:
        print_text(rows[0]["caption"])
    else:
        print_table(("image", "caption"), [(row["image"], row["caption"]) for row in rows])


@command("caption", "say what images show", show_captions)
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE...", help="image files")
@answer_options
@click.option(
    "--batch-size", type=POSITIVE, default=64, metavar="N", help="most images at once (default: 64)"
)
@model_options
def caption(options: Options) -> Any:
    """Caption images."""
    from unimm.images import read_image

    images = [
        read_image(path) for path in options.images
    ]  # before the model is loaded: mistakes show at once
    from unimm.processing.processor import CAPTION_REQUESTS

    values = answer_values(options)
    um = load(options)
    um.batch_size = options.batch_size
    answers = um.answers(images, [CAPTION_REQUESTS[0]] * len(images), **values)
    return [
        {"image": path, "caption": answer.text, "cut": answer.cut}
        for path, answer in zip(options.images, answers, strict=True)
    ]


@command("ask", "ask a question about images", lambda row: print_text(row["answer"]))
@click.argument(
    "items",
    type=FILE,
    nargs=-1,
    required=True,
    metavar="[IMAGE]... QUESTION",
    help="image or video files, if any, then one question",
)
@click.option(
    "--show", type=FILE, metavar="FILE", help="write the first image with the answer's points and boxes"
)
@click.option("--fps", type=NUMBER, metavar="N", help="frames of a second of a video or GIF (default: 2)")
@click.option("--frames", type=POSITIVE, metavar="N", help="frames of a video or GIF, in place of --fps")
@answer_options
@model_options
def ask(options: Options) -> Any:
    """Ask one question about any number of images."""
    from unimm.images import SUFFIXES, read_image
    from unimm.videos import Video, as_shown

    *paths, question = options.items
    if os.path.isfile(question) or (not paths and question.lower().endswith(SUFFIXES)):
        raise UserError(f"ask: after the images comes a question; {question!r} is the last argument")
    images = [as_shown(path, options.fps, options.frames) or read_image(path) for path in paths]
    if options.show is not None and not (images and not isinstance(images[0], Video)):
        raise UserError("ask: --show draws on the first image; name one")
    values = answer_values(options)
    um = load(options)
    answer = um.answers([images], [question], **values)[0]  # one about all images
    found = {"images": paths, "question": question, "answer": answer.text, "cut": answer.cut}
    if options.show is None or isinstance(images[0], Video):
        return found
    from unimm.images import save_image
    from unimm.processing.places import draw_places

    places = um.places(answer, images[0])
    save_image(draw_places(images[0], places), options.show)
    named = [{"numbers": list(place.numbers), "label": place.label} for place in places]
    return {**found, "places": named, "shown": options.show}


def show_chat(chat: Any) -> None:
    """Talk, where a person sees it."""
    from unimm.cli.chat import is_typed, talk

    talk(chat, quiet=not is_typed())


@command("chat", "talk with a model in the terminal, with images and drawings", show_chat)
@click.option("--system", metavar="TEXT", help="what the model is told before")
@click.option("-o", "--output", type=FOLDER, default=".", metavar="DIR", help="folder for the drawings")
@answer_options
@model_options
def chat(options: Options) -> Any:
    """Talk with a model; with --json, lines are read from the input and the conversation is printed."""
    from unimm.cli.chat import Chat

    values = answer_values(options)
    talking = Chat(load(options), Path(options.output), values, options.seed)
    if options.system:
        talking.messages = [{"role": "system", "content": options.system}]
    if not options.json:
        return talking
    for line in filter(str.strip, sys.stdin):
        for _ in talking.reply(line):
            pass
    return {"messages": talking.messages}


def show_drawings(rows: list[dict[str, Any]]) -> None:
    """Show where the drawings are."""
    print_table(("prompt", "image"), [(row["prompt"], row["image"]) for row in rows])


@command("draw", "draw what prompts say", show_drawings)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...", help="what to draw")
@click.option("-o", "--output", type=FOLDER, default=".", metavar="DIR", help="folder for the drawings")
@click.option("-n", type=POSITIVE, default=1, metavar="N", help="drawings of each prompt (default: 1)")
@click.option(
    "--image",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="an image that goes with every prompt; may be given several times",
)
@click.option("--seed", type=INTEGER, metavar="SEED", help="the same seed draws the same images")
@sampling_options
@click.option("--size", type=SIZE, metavar="WxH", help="in pixels, where the model draws several")
@click.option(
    "--batch-size",
    type=POSITIVE,
    default=64,
    metavar="N",
    help="most drawings at once; the files of each batch are written when it is done (default: 64)",
)
@model_options
def draw(options: Options) -> Any:
    """Draw prompts into files."""
    import secrets

    from unimm.cli.drawings import drawing_name, save_drawing
    from unimm.images import read_image

    images = [read_image(path) for path in options.image]
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as a folder ({error.strerror})") from None
    # Told to the user, so that the same can be drawn again.
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    um = load(options)
    um.batch_size = options.batch_size
    rows: list[dict[str, Any]] = []
    try:
        with progress("drawing") as report:
            batches = um.draw_batches(
                options.prompts,
                n=options.n,
                guidance_scale=options.guidance_scale,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=seed,
                size=options.size,
                on_progress=report,
                images=[images] * len(options.prompts),
            )
            for drawing in itertools.chain.from_iterable(batches):
                index = len(rows)
                prompt = options.prompts[index // options.n]
                path = save_drawing(drawing, folder, drawing_name(prompt, seed, index))
                rows.append({"prompt": prompt, "seed": seed, "index": index, "image": str(path)})
    except KeyboardInterrupt:
        say(f"{len(rows)} of {len(options.prompts) * options.n} drawings are in {folder} (seed {seed})")
        raise
    return rows


def show_info(found: dict[str, Any]) -> None:
    """Show what a model is made of, and its speed as a table."""
    speed = found.pop("speed", None)
    print_tree(found)
    if speed is not None:
        rows = [list(row.values()) for row in speed["products"]]
        fields = ("product", "rows", "shape", "float32 us", "way", "GFLOPS", "bfloat16 us")
        print_table(fields, rows, f"Products on {speed['machine']}")


@command("info", "what a model is made of", show_info)
@click.argument(
    "source",
    type=FOLDER,
    required=False,
    metavar="[SOURCE]",
    help="a folder, a hub id or embedded (the default)",
)
@click.option("--speed", is_flag=True, help="measure the products of its decoder on this machine")
@hub_options
def info(options: Options) -> Any:
    """Say what a model is made of."""
    from unimm.loading import describe

    return describe(options.source, options.revision, options.image_tokenizer, options.speed)


@command(
    "convert",
    "write a checkpoint in another layout",
    lambda row: print_text(f"Written to {row['folder']} in the {row['layout']} layout"),
)
@click.argument("source", type=FOLDER, metavar="SOURCE", help="a folder or hub id, in any supported layout")
@click.argument("folder", type=FOLDER, metavar="FOLDER", help="where the converted checkpoint goes")
@hub_options
@click.option(
    "--to", type=Choice("unimm", "transformers", "original"), required=True, help="the layout to write"
)
def convert(options: Options) -> Any:
    """Write a checkpoint in another layout."""
    from unimm.families.convert import convert as write
    from unimm.locate import locate

    file = Path(options.source)  # LlamaGen publishes one file
    one = file.is_file()
    source = file if one else locate(options.source, options.revision, options.image_tokenizer)
    write(source, Path(options.folder), options.to)
    return {"layout": options.to, "folder": options.folder}
