"""Thirteen ways of seeing at one scale, and the two tasks on which they are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

BASE = "base"
WIDTH, PATCH, LAYERS = 192, 8, 4  # of the decoder; of the encoder; of the decoder
TAGS = [f"<tile_{number}>" for number in range(1, 10)] + ["<whole>"]
SPECIAL = ["<row>", "<last_row>", "<view>", "</view>", *TAGS]
Section = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is learnt and measured.

    Attributes:
        name: of the task.
        height: pixels of the largest image.
        width: likewise.
        tile: pixels a side of a tile.
        stem: of encoders; what is read is read through standardised weights, which see no even grey.
        paper: of views: what their pixels are normalised by.
        tokenizer: as `model.text_tokenizer` of a recipe.
        data: section of a recipe.
        mixture: of what is trained.
        base_mixture: of what the base is trained on.
        batch: samples of a step.
        context: most tokens of a row.
        measure: a trained model to its figures.
    """

    name: str
    height: int
    width: int
    tile: int
    stem: str
    paper: Section
    tokenizer: str
    data: Section
    mixture: Mapping[str, float]
    base_mixture: Mapping[str, float]
    batch: int
    context: int
    measure: Callable[[Any], Section]

    @property
    def square(self) -> int:
        """Pixels a side of a square that holds the largest image."""
        return max(self.height, self.width)


# --- ways of seeing -----------------------------------------------------------------------------------------


def _naflex(task: Task, side: int = 0) -> Section:
    return {"kind": "naflex", "width": 160, "depth": 3, "heads": 5, "patch": PATCH, "act": "gelu", "stem": task.stem,
            "side": side}  # fmt: skip


def _fit(task: Task, fill: str, unit: int = 2 * PATCH) -> Section:
    bounds = [task.square] * 2 if fill == "whole" else [task.height, task.width]
    return {"kind": "fit", "bounds": bounds, "unit": unit, "fill": fill, "pad_value": 255}


def _canvas(tile: int, most: int = 4, **rule: Any) -> Section:
    return {"kind": "canvas", "tile": tile, "most": most, "pad_value": 255, **rule}


def _native(task: Task, **parts: Any) -> Section:
    mlp = {"kind": "mlp", "depth": 2, "norm": "layer", "norm_at": "feature"}
    return {"views": _fit(task, "pad"), "encoder": _naflex(task), "reducer": {"kind": "join", "side": 2},
            "connector": mlp, **parts}  # fmt: skip


def _tiled(task: Task, views: Section, **parts: Any) -> Section:
    return _native(task, views=views, encoder=_naflex(task, views["tile"] // PATCH), **parts)


def _blocks(**more: Any) -> Section:
    return {"layers": [0, 2], "heads": 4, "kv_heads": 4, "width": 512, **more}


def _nvlm(task: Task, **parts: Any) -> Section:
    views = _canvas(task.tile, choose="ratio", place="stretch", whole="last", alone=True)
    return _tiled(task, views, **parts)


def _tags(**more: Any) -> Section:
    return {"tile_tag": "<tile_{}>", "whole_tag": "<whole>", **more}


def _molmo(task: Task) -> Section:
    tile = task.tile + 2 * PATCH
    views = _canvas(
        tile, choose="scale", place="centre", whole="first", overlap=2 * PATCH, whole_place="centre"
    )
    return _tiled(
        task, views, reducer={"kind": "attend", "side": 2, "width": 160, "heads": 5, "padding": True},
        connector={"kind": "mlp", "gated": True, "width": 384},
        picture={"begin": "<view>", "end": "</view>", "row_end": "<row>", "joint": True, "add": True},
    )  # fmt: skip


def _mm1(task: Task) -> Section:
    tile, side = task.tile * 2 // 3 // PATCH * PATCH, task.tile * 2 // 3 // PATCH // 2
    views = _canvas(tile, 9, least=4, choose="pad", place="centre", whole="last", whole_place="centre")
    return _tiled(task, views, reducer={"kind": "abstract", "side": side, "width": 160, "depth": 2},
                  picture=_tags())  # fmt: skip


def _aria(task: Task) -> Section:
    features = (task.square // PATCH) ** 2
    queries = [[features, max(features // 9, 8)]]
    return _native(
        task, views=_fit(task, "whole"), reducer={"kind": "resample", "heads": 5, "queries": queries}
    )


def _llama(task: Task) -> Section:
    views = _canvas(task.tile, choose="scale", place="corner", whole="none")
    return _tiled(task, views, reducer={"kind": "join", "side": 1}, fusion={"kind": "cross", **_blocks()},
                  picture={"mark": "image"})  # fmt: skip


def _fuyu(task: Task) -> Section:
    encoder = {"kind": "linear", "width": WIDTH, "patch": 2 * PATCH}
    return _native(
        task, encoder=encoder, reducer={}, connector={"kind": "none"}, picture={"row_end": "<row>"}
    )


SYSTEMS: dict[str, Callable[[Task], Section | None]] = {
    "Fuyu": _fuyu,
    "Emu3": lambda task: None,  # the image tokenizer, which has learnt EmojiScenes
    "Janus": lambda task: _native(
        task, views={"kind": "square", "image_size": task.square, "pad_value": 255},
        encoder=_naflex(task, task.square // PATCH),
    ),
    "Qwen2-VL": lambda task: _native(
        task, views={"kind": "area", "least": 256, "most": task.height * task.width, "stride": 2 * PATCH},
        positions={"kind": "mrope", "sections": [6, 9, 9]},
    ),
    "Pixtral": lambda task: _native(
        task, views=_fit(task, "stretch", PATCH), reducer={"kind": "join", "side": 1},
        picture={"row_end": "<row>", "last_row_end": "<last_row>"},
    ),
    "Aria": _aria,
    "Molmo": _molmo,
    "MM1.5": _mm1,
    "Baichuan-Omni": lambda task: _tiled(
        task, _canvas(task.tile, choose="scale", place="centre", whole="first", whole_place="centre"),
        reducer={"kind": "mean", "side": 2}, picture={"begin": "<view>", "end": "</view>"},
    ),
    "NVLM-D": lambda task: _nvlm(task, picture=_tags()),
    "NVLM-X": lambda task: _nvlm(
        task, fusion={"kind": "cross", **_blocks(sees="tile")}, picture=_tags(mark="tile")
    ),
    "NVLM-H": lambda task: _nvlm(task, fusion={"kind": "both", **_blocks()}, picture=_tags(apart=True)),
    "Llama 3.2": _llama,
}  # fmt: skip
"""System -> its `model.understanding` at the scale of a task; None: its image tokenizer sees for it."""


def model_section(task: Task, system: str, tokenizer: str) -> Section:
    """Return the section `model` of a recipe that builds a system.

    Args:
        task: says how large images are.
        system: one of `SYSTEMS`, or `BASE`: images at their own size in the stream.
        tokenizer: a folder with all special tokens, so that all have one vocabulary.
    """
    decoder = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": task.context,
        "tie_word_embeddings": True, "initializer_range": 0.04,
    }  # fmt: skip
    understanding = _native(task) if system == BASE else SYSTEMS[system](task)
    if understanding is None:
        return {
            "decoder": decoder,
            "shared": True,
            "image_tokenizer": "embedded",
            "text_tokenizer": tokenizer,
        }
    return {
        "decoder": decoder,
        "understanding": understanding | {"views": understanding["views"] | task.paper},
        "image_tokenizer": None,
        "text_tokenizer": tokenizer,
    }


# --- what is measured ---------------------------------------------------------------------------------------


def measured_tokens(um: Any, images: Sequence[Image.Image]) -> Section:
    """Return the mean tokens of an image in the stream, and rows of a memory."""
    blank = len(um.processor.question("what?", [])[0])
    stream = [len(um.processor.question("what?", [image])[0]) - blank for image in images]
    remembering = um.model.remembering
    views = um.processor.views
    rows = [
        0 if remembering is None else remembering.rows(views.grid_of(image.height, image.width))
        for image in images
    ]
    return {"tokens": round(statistics.mean(stream), 1), "memory_rows": round(statistics.mean(rows), 1)}


def measure_tables(um: Any) -> Section:
    """Read held-out tables: cells and answers."""
    from unimm.data.tables.settings import TableSettings
    from unimm.data.tables.tables import SyntheticTables
    from unimm.evaluation.recipe import TablesSection
    from unimm.evaluation.tables.reading import evaluate_tables

    settings = TableSettings(**TABLES)
    section = TablesSection(samples=120, questions=60, splits=["seen", "larger"], settings=settings)
    begun = time.perf_counter()
    report = evaluate_tables(um, section, seed=1)
    seconds = time.perf_counter() - begun
    asked = sum(report[split]["answers"]["all"]["count"] + section.samples for split in report)
    images = [table.image() for table in SyntheticTables("seen", 1, settings, 40)]
    return {
        "figures": {
            "cells": report["seen"]["markdown"]["cells"],
            "cells, larger": report["larger"]["markdown"]["cells"],
            "answers": report["seen"]["answers"]["all"],
        },
        "answers_per_second": round(asked / seconds, 2),
        **measured_tokens(um, images),
    }


def measure_scenes(um: Any) -> Section:
    """Ask about held-out scenes."""
    from unimm.data.emojiscenes.scenes import EmojiScenes
    from unimm.evaluation.emojiscenes.batches import render_image
    from unimm.evaluation.emojiscenes.questions import evaluate_questions
    from unimm.evaluation.recipe import Questions

    begun = time.perf_counter()
    report = evaluate_questions(um, Questions(samples=60, splits=["seen", "vendor"]), seed=1)
    seconds = time.perf_counter() - begun
    asked = sum(report[split]["all"]["count"] for split in report)
    scenes = EmojiScenes("seen", 1, 64)
    return {
        "figures": {"answers": report["seen"]["all"], "answers, vendor": report["vendor"]["all"]},
        "answers_per_second": round(asked / seconds, 2),
        **measured_tokens(um, [render_image(scenes[number]) for number in range(40)]),
    }


TABLES: Section = {
    "difficulty": "small",
    "columns": [1, 3],
    "rows": [1, 4],
    "least": [32, 16],
    "questions": 1,
}
TASKS = {
    "tables": Task(
        "tables", 160, 192, 96, "scaled_conv", {"mean": [0.92] * 3, "std": [0.2] * 3}, "tables", {"tables": TABLES},
        {"tables/understanding": 1}, {"tables/understanding": 0.8, "tables/text": 0.2}, 16, 1024, measure_tables,
    ),
    "scenes": Task(
        "scenes", 64, 64, 32, "conv", {}, "embedded", {"emojiscenes": {"scenes": 24000}},
        {"emojiscenes/understanding": 1}, {"emojiscenes/understanding": 0.9, "emojiscenes/text": 0.1}, 16, 512,
        measure_scenes,
    ),
}  # fmt: skip
