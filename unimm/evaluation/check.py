"""Does a result come out again? A sample of its items is made once more, with the model and data that it names."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimm.errors import UserError
from unimm.evaluation import environment
from unimm.evaluation.answering import answer_items
from unimm.evaluation.items import DataFiles, EvalItem
from unimm.evaluation.protocol import held_protocol
from unimm.evaluation.result import read_result

if TYPE_CHECKING:
    from unimm.evaluation.benchmark import RunOptions

SAMPLE = 20


def check_result(path: Path, options: RunOptions) -> dict[str, Any]:
    """Make a sample of a result's items again.

    Args:
        path: the result, or its folder.
        options: where its model and data are now, if elsewhere than it says.

    Returns:
        How many items were made again, of how many.

    Raises:
        UserError: the model or the data is another, or an item comes out otherwise; the line names the first.
    """
    from unimm.evaluation.benchmark import load_for

    document = read_result(path)
    protocol = held_protocol(document["protocol"], str(path))
    if protocol.fingerprint() != document.get("protocol_sha256"):
        raise UserError(f"{path}: protocol: has been changed since; its checksum is another")
    held = document["data"]
    images = held.get("images")
    options = replace(
        options,
        model=options.model or document["model"]["source"],
        data=options.data or held["names"],
        images=options.images or (None if images is None else Path(images)),
        dtype=document["model"].get("dtype", "auto") if options.dtype == "auto" else options.dtype,
    )
    if document["model"].get("sha256") not in (environment.model_hash(options.model), "none"):
        raise UserError(f"{options.model}: other files than the model of {path}; --model names another place")
    data = DataFiles(protocol, options.data, options.images)
    if data.hashes != held["files"]:
        raise UserError(f"{', '.join(options.data)}: other files than the data of {path}; --data names them")
    lines = {line["key"]: line for line in document["items"]}
    keys = set(random.Random(0).sample(sorted(lines), min(SAMPLE, len(lines))))
    items = [item for item in data.items(held.get("limit")) if item.key in keys]
    um = load_for(options)
    if protocol.answer is None:
        from unimm.evaluation.drawing import compare_drawings

        differing = compare_drawings(um, protocol, items, lines)
    else:
        said = {item.key: one for done in answer_items(um, items, protocol.answer) for item, one in done}
        differing = [
            f"{item.key}: {_cut(lines[item.key]['answer'])} then, {_cut(said[item.key]['answer'])} now"
            for item in items
            if not _same(lines[item.key], item, said[item.key])
        ]
    if differing:
        count = f"{len(differing)} of {len(items)} items came out otherwise"
        raise UserError(f"{path}: {count}; the first: {differing[0]}")
    return {"result": str(path), "checked": len(items), "of": len(lines), "same": True}


def _same(line: dict[str, Any], item: EvalItem, said: dict[str, Any]) -> bool:
    return bool(line["prompt"] == item.prompt and line["answer"] == said["answer"])


def _cut(text: object) -> str:
    shown = " ".join(str(text).split())
    return repr(shown if len(shown) <= 60 else f"{shown[:60]}…")
