"""Every field of every small file of a checkpoint, set to bad values, and what becomes of the checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import unimm
from unimm.errors import UserError, UserNote
from unimm.families.model import OurTensors
from unimm.families.source import Checkpoint
from unimm.models.configuration import UniMMConfig

Path_ = tuple[str | int, ...]
Change = tuple[str, Path_, str, Any]  # a file, a place in it, what is done there, with which value
VALUES: tuple[Any, ...] = (
    None, "x", "../../etc/passwd", -1, 0, 3, 1e300, float("nan"), 10**9, True, [], {}, {"a": [{"b": 1}]},
)  # fmt: skip
ADDED: dict[str, Any] = {
    "to_dict": 5,
    "forward": "x",
    "__class__": "x",
    "auto_map": {"AutoModel": "code.Model", "AutoTokenizer": ["code.Words", None]},
    "_attn_implementation": "kernels-community/flash-attn",
    "attn_implementation": "a/b",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "use_pretrained_backbone": True,
}
LISTED = 3  # entries of a list, or of a mapping of many, that are changed
MANY = 100  # keys of a mapping that is a table and no section


def changes(folder: Path) -> Iterator[Change]:
    """Every change of one value in the JSON files of a checkpoint."""
    for file in sorted(folder.rglob("*.json")):
        name = str(file.relative_to(folder))
        if name.endswith(".index.json"):
            continue
        document = json.loads(file.read_text())
        for place, value in _nodes(document):
            if place:
                yield name, place, "drop", None
                yield from ((name, place, "set", bad) for bad in VALUES if not _same(bad, value))
            if isinstance(value, dict) and len(value) < MANY:
                yield from ((name, (*place, key), "set", added) for key, added in ADDED.items())


def _same(one: Any, two: Any) -> bool:
    return type(one) is type(two) and one == two


def _nodes(value: Any, place: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    yield place, value
    if isinstance(value, dict):
        for key in list(value)[: LISTED if len(value) >= MANY else None]:
            yield from _nodes(value[key], (*place, key))
    elif isinstance(value, list):
        for index in range(min(len(value), LISTED)):
            yield from _nodes(value[index], (*place, index))


def apply(source: Path, target: Path, change: Change) -> None:
    """Write a checkpoint with one value changed; its weights are linked, not copied."""
    if not target.exists():
        shutil.copytree(source, target, copy_function=_link)
    name, place, action, bad = change
    document = json.loads((source / name).read_text())
    node = document
    for step in place[:-1]:
        node = node[step]
    if action == "drop":
        del node[place[-1]]
    else:
        node[place[-1]] = copy.deepcopy(bad)
    (target / name).unlink()
    (target / name).write_text(json.dumps(document))


def restore(source: Path, target: Path, change: Change) -> None:
    """Undo a change."""
    shutil.copyfile(source / change[0], target / change[0])


def _link(source: str, target: str) -> None:
    if source.endswith((".safetensors", ".bin")):
        Path(target).symlink_to(Path(source).resolve())
    else:
        shutil.copyfile(source, target)


def outcome(folder: Path, whole: dict[str, Any], image: Any) -> tuple[str, str]:
    """What becomes of a checkpoint, and the line or answer.

    Returns:
        "refused" and the line, "same" where the model is what it is unchanged, "other" and an answer, or "unanswered"
        and the line that a question gets.
    """
    try:
        checkpoint = Checkpoint(folder)
        if checkpoint.config.to_dict() == whole:
            checkpoint.processor.question_ids("what?", 0)
            return "same", ""
        with checkpoint:
            OurTensors(checkpoint)
        um = unimm.load(folder, device="cpu")
    except UserError as error:
        return "refused", str(error)
    warnings.simplefilter("ignore", UserNote)  # an untrained model's answer fills the context
    try:
        if not um.model.layout.shared:
            um.draw("a red apple", seed=0)
        return "other", str(um.ask(image, "what?"))
    except UserError as error:  # such as a context that holds no question
        return "unanswered", str(error)


def description(folder: Path) -> dict[str, Any]:
    """What a whole checkpoint's configuration is."""
    config: UniMMConfig = Checkpoint(folder).config
    found: dict[str, Any] = config.to_dict()
    return found
