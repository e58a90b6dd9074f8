"""Checkpoints: all that a run needs to go on bit for bit, written so that a half-written one is never read.

A checkpoint is a folder `step-XXXXXXXX` of safetensors files and one `state.json`, which lists the others
with their sizes. It is written under a temporary name, flushed to disk, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimm.errors import UserError, UserNote
from unimm.sections import show
from unimm.training.recipe import BaseRecipe, Checkpointing

FORMAT = 1
_TEMPORARY = ".tmp-"
_PARTS = ("model", "optimizer", "ema", "rng")  # fields of a snapshot that are tensors, a file each
_PLAIN = ("stage", "stage_step", "step", "recipe", "ema_updates", "python_rng")  # the others, in state.json


@dataclass
class Snapshot:
    """A run at the end of a step.

    `stage` counts stages from 0, `stage_step` the steps done in it (the place in its data), `step` the steps
    done in all. `python_rng` and `rng` are the states of the global random generators. `score` is the metric by
    which checkpoints are compared; None in those of earlier versions.
    """

    stage: int
    stage_step: int
    step: int
    recipe: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    ema_updates: int = 0
    python_rng: list[Any] = field(default_factory=list)
    rng: dict[str, Tensor] = field(default_factory=dict)
    score: float | None = None


def write_checkpoint(folder: Path, snapshot: Snapshot, settings: Checkpointing) -> Path:
    """Write `snapshot` as `folder/step-XXXXXXXX`, then remove all but the last and the best checkpoints.

    Raises:
        UserError: no space or no permission; earlier checkpoints are whole.
    """
    target = folder / f"step-{snapshot.step:08d}"
    temporary = folder / f"{_TEMPORARY}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for part in _PARTS:
            save_file(_plain(getattr(snapshot, part)), temporary / f"{part}.safetensors")
        sizes = {f"{part}.safetensors": (temporary / f"{part}.safetensors").stat().st_size for part in _PARTS}
        state = {"format": FORMAT, "files": sizes, "score": snapshot.score}
        state |= {key: getattr(snapshot, key) for key in _PLAIN}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for name in (*sizes, "state.json"):
            _flush(temporary / name)
        _flush(temporary)
        if target.exists():  # a damaged one that the run fell back from
            _remove(target)
        temporary.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        message = f"{target}: cannot write the checkpoint: {reason}; earlier checkpoints are whole"
        raise UserError(message) from error
    kept = {path for stage in range(snapshot.stage + 1) for path in best_checkpoints(folder, stage, settings)}
    for old in _folders(folder)[: -settings.keep]:
        if old not in kept:
            with suppress(OSError):
                _remove(old)
    return target


def _remove(folder: Path) -> None:
    """Remove a checkpoint: under its name it is whole or gone, whenever the process is killed."""
    doomed = folder.with_name(f"{_TEMPORARY}old-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def best_checkpoints(folder: Path, stage: int, settings: Checkpointing) -> list[Path]:
    """The `keep_best` best checkpoints of a stage, best first; of equal ones the earlier."""
    if not settings.keep_best:
        return []
    scored: list[tuple[float, Path]] = []
    for path in _folders(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if state["stage"] == stage and state["recipe"]["checkpoint"]["metric"] == settings.metric:
                scored.append((float(state["score"]), path))
    scored.sort(key=lambda pair: pair[0] if settings.mode == "min" else -pair[0])
    return [path for _, path in scored[: settings.keep_best]]


def read_newest(folder: Path) -> Snapshot | None:
    """The newest checkpoint that reads whole, or None where there has been none yet.

    Leftovers of a write that was cut off are removed. A damaged checkpoint is said (`UserNote`), and the one
    before it is used.

    Raises:
        UserError: there are checkpoints, but each is damaged; the newest one's fault is named.
    """
    if not folder.is_dir():
        return None
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = _folders(folder)
    faults: list[str] = []
    for path in reversed(found):
        try:
            snapshot = read_checkpoint(path)
        except UserError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault}; going on from {path.name}", UserNote, stacklevel=2)
        return snapshot
    if faults:
        raise UserError(f"{faults[0]}; no earlier checkpoint is whole (remove {folder} to start anew)")
    return None


def read_checkpoint(path: Path) -> Snapshot:
    """One checkpoint, its tensors on the CPU.

    Raises:
        UserError: naming the file that is missing, cut short or not what it should be.
    """
    state_file = path / "state.json"
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        written, sizes, plain = state["format"], state["files"], {key: state[key] for key in _PLAIN}
    except FileNotFoundError:
        raise UserError(f"{state_file}: missing from the checkpoint") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{state_file}: damaged") from None
    if written != FORMAT:
        raise UserError(f"{state_file}: checkpoint format {written}, this version reads {FORMAT}")
    tensors: dict[str, Any] = {}
    for part in _PARTS:
        file = path / f"{part}.safetensors"
        size = sizes.get(file.name, 0)
        if not file.exists():
            raise UserError(f"{file}: missing from the checkpoint")
        if file.stat().st_size != size:
            raise UserError(f"{file}: truncated ({file.stat().st_size} of {size} bytes)")
        try:
            tensors[part] = load_file(file)
        except (SafetensorError, OSError, ValueError):
            raise UserError(f"{file}: damaged") from None
    return Snapshot(**tensors, **plain, score=state.get("score"))


def distinct_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict with tied tensors under their first name only."""
    seen: set[tuple[Any, ...]] = set()
    distinct: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        distinct[name] = tensor
    return distinct


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put back what `distinct_state` gave.

    Raises:
        UserError: the names or shapes are not this module's.
    """
    expected = distinct_state(module)
    for name in expected.keys() ^ tensors.keys():
        where = "the model" if name in expected else "the checkpoint"
        raise UserError(f"{source}: {name} is only in {where}; the checkpoint is of another model")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, expected {list(tensor.shape)}"
            raise UserError(f"{source}: {name} has the shape {shapes}; the checkpoint is of another model")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


# --- may this checkpoint be gone on from? -------------------------------------------------------------------

FREE = ("output", "logging", "checkpoint", "device", "deepspeed", "data.max_bad_items")
"""Sections and keys that may differ between a checkpoint's recipe and the one that goes on."""
FREE_IN_STAGE = ("micro_batch", "pack", "gradient_checkpointing", "compile")
"""Keys of a stage that say how a step is computed, not what it is."""


def check_resumable(snapshot: Snapshot, recipe: BaseRecipe) -> None:
    """Refuse to go on where the recipe has changed in a way that makes the old steps wrong.

    Logging, checkpointing, device, engine settings, micro-batches and packing may change, and so may stages not
    yet begun; the stage at which the run stands may change its `steps` where its schedule is constant. Keys that
    the checkpoint is too old to know are taken at their defaults.

    Raises:
        UserError: naming the key, its old and its new value.
    """
    old = snapshot.recipe
    with suppress(ValueError):  # where a version with other keys made it, it is compared as it is
        old = type(recipe).model_validate_json(json.dumps(old)).model_dump(mode="json")
    for key, before, after in _differences(old, recipe.model_dump(mode="json")):
        if not _harmless(key, after, snapshot, recipe):
            change = f"the checkpoint was made with {show(before)}, now {show(after)}"
            raise recipe.error(key, f"{change}; put it back, or give another output folder")


def _harmless(key: str, after: Any, snapshot: Snapshot, recipe: BaseRecipe) -> bool:
    """Whether a run may go on although `key` is another than it was."""
    if not key.startswith("stages["):
        return key.split(".")[0] in FREE or key in FREE
    number = int(key[len("stages[") : key.index("]")])
    rest = key.partition("].")[2]
    if number > snapshot.stage or rest.split(".")[0] in FREE_IN_STAGE:
        return True
    constant = rest == "steps" and recipe.stages[number].schedule == "constant"
    return constant and number == snapshot.stage and int(after) >= snapshot.stage_step


def _differences(old: Any, new: Any, key: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Dotted keys at which two resolved recipes differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list):
        for number in range(max(len(old), len(new))):
            before = old[number] if number < len(old) else None
            after = new[number] if number < len(new) else None
            yield from _differences(before, after, f"{key}[{number}]")
    elif old != new:
        yield key, old, new


# --- small parts --------------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def random_states() -> tuple[list[Any], dict[str, Tensor]]:
    """The states of the global generators: Python's, and numpy's and torch's as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return [version, list(words), gauss], states


def set_random_states(python: list[Any], states: dict[str, Tensor]) -> None:
    """Put back what `random_states` gave."""
    version, words, gauss = python
    random.setstate((version, tuple(words), gauss))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
