"""Checkpoints: all that a run needs to resume bit for bit, written so that a half-written one is never read.

A checkpoint is a folder `step-XXXXXXXX` of safetensors files and one `state.json`, which lists the others with
their sizes and SHA-256 and has a checksum of itself, so that a single flipped byte is noticed. It is written under a
temporary name, flushed to disk, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimm.errors import UserError, UserNote
from unimm.files import neighbour, open_regular, read_json, remove_leftovers
from unimm.folders import write_folder
from unimm.sections import NotNegative, Section, show, validate
from unimm.training.recipe import BaseRecipe, Checkpointing

FORMAT = 1
_PARTS = ("model", "optimizer", "ema", "rng")  # fields of a snapshot that are tensors, a file each
_FILES = tuple(f"{part}.safetensors" for part in _PARTS)
_PLAIN = (
    "stage",
    "stage_step",
    "step",
    "recipe",
    "ema_updates",
    "python_rng",
    "data",
)  # the others, in state.json


class _State(Section):
    """What `state.json` holds; earlier versions wrote no checksums."""

    format: Literal[1]
    files: dict[str, NotNegative]
    sha256: dict[str, str] | None = None
    checksum: str | None = None
    score: float | None = None
    stage: NotNegative
    stage_step: NotNegative
    step: NotNegative
    recipe: dict[str, Any]
    ema_updates: NotNegative
    python_rng: tuple[int, list[int], float | None] = Field(strict=False)
    data: dict[str, str] = Field(default_factory=dict)

    @field_validator("python_rng")
    @classmethod
    def _is_a_state(cls, state: tuple[int, list[int], float | None]) -> tuple[int, list[int], float | None]:
        version, words, gauss = state
        try:
            random.Random().setstate((version, tuple(words), gauss))
        except (ValueError, TypeError, OverflowError):
            raise ValueError("is no state of Python's random numbers") from None
        return state


@dataclass
class Snapshot:
    """A run at the end of a step.

    `stage` counts stages from 0, `stage_step` the steps done in it (the place in its data), `step` the steps
    done in all. `python_rng` and `rng` are the states of the global random generators. `score` is the metric by
    which checkpoints are compared; None in those of earlier versions. `source` is the folder it was read from, `data`
    what `KnowsData.data_state` gave.
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
    source: str = ""
    data: dict[str, str] = field(default_factory=dict)


def write_checkpoint(folder: Path, snapshot: Snapshot, settings: Checkpointing) -> Path:
    """Write `snapshot` as `folder/step-XXXXXXXX`, then remove all but the last and the best checkpoints.

    Raises:
        UserError: no space or no permission; earlier checkpoints are whole.
    """
    target = folder / f"step-{snapshot.step:08d}"

    def write(new: Path) -> None:
        for part, file in zip(_PARTS, _FILES, strict=True):
            save_file(_plain(getattr(snapshot, part)), new / file)
        sizes = {file: (new / file).stat().st_size for file in _FILES}
        state = {"format": FORMAT, "files": sizes, "sha256": _digests(new), "score": snapshot.score}
        state |= {key: getattr(snapshot, key) for key in _PLAIN}
        state = json.loads(json.dumps(state))  # as it will be read
        text = json.dumps({**state, "checksum": _checksum(state)})
        (new / "state.json").write_text(text, encoding="utf-8")

    if target.is_symlink() or target.is_file():
        _remove(target)
    write_folder(target, write, keep_others=False)  # a damaged one may be there, which the run fell back from
    kept = {path for stage in range(snapshot.stage + 1) for path in best_checkpoints(folder, stage, settings)}
    for old in _folders(folder)[: -settings.keep]:
        if old not in kept:
            with suppress(OSError):
                _remove(old)
    return target


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of tensors in a checkpoint, as hexadecimal digits.

    Raises:
        UserError: one cannot be read.
    """

    def digest(file: str) -> str:
        with open_regular(folder / file) as opened:
            try:
                return hashlib.file_digest(opened, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{folder / file}: damaged ({error.strerror})") from None

    with ThreadPoolExecutor(len(_FILES)) as pool:
        return dict(zip(_FILES, pool.map(digest, _FILES), strict=True))


def _checksum(state: Mapping[str, Any]) -> str:
    """The SHA-256 of all in `state.json` but itself."""
    text = json.dumps({key: value for key, value in state.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _remove(folder: Path) -> None:
    """Remove a checkpoint: under its name it is whole or gone, whenever the process is killed."""
    with neighbour(folder) as place:
        folder.rename(place / "removed")


def best_checkpoints(folder: Path, stage: int, settings: Checkpointing) -> list[Path]:
    """The `keep_best` best checkpoints of a stage, best first; of equal ones the earlier."""
    if not settings.keep_best:
        return []
    scored: list[tuple[float, Path]] = []
    for path in _folders(folder):
        with suppress(ValueError, KeyError, TypeError):
            state = read_json(path / "state.json")
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
    remove_leftovers(folder)
    found = _folders(folder)
    faults: list[str] = []
    for path in reversed(found):
        try:
            snapshot = read_checkpoint(path)
        except UserError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault}; resuming from {path.name}", UserNote, stacklevel=2)
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
    if not state_file.exists():
        raise UserError(f"{state_file}: missing from the checkpoint")
    try:
        document = read_json(state_file)
    except UserError as error:
        raise UserError(f"{state_file}: damaged ({str(error).removeprefix(f'{state_file}: ')})") from None
    written = document.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise UserError(f"{state_file}: checkpoint format {written}, this version reads {FORMAT}")
    if "checksum" in document and document["checksum"] != _checksum(document):
        raise UserError(f"{state_file}: damaged (not what its checksum says)")
    state = validate(_State, document, f"{state_file}: damaged")
    tensors = _read_tensors(path, state)
    plain = {key: getattr(state, key) for key in _PLAIN} | {"python_rng": [*state.python_rng]}
    return Snapshot(**tensors, **plain, score=state.score, source=str(path))


def _read_tensors(path: Path, state: _State) -> dict[str, Any]:
    """The tensors of each part of a checkpoint, from files that are as they were written. Raises UserError."""
    for file in _FILES:
        size = state.files.get(file, 0)
        if not (path / file).exists():
            raise UserError(f"{path / file}: missing from the checkpoint")
        with open_regular(path / file) as opened:
            found = os.fstat(opened.fileno()).st_size
        if found != size:
            raise UserError(f"{path / file}: truncated ({found} of {size} bytes)")
    if state.sha256 is not None:
        for file, digest in _digests(path).items():
            if state.sha256.get(file) != digest:
                raise UserError(f"{path / file}: damaged (not what its checksum says)")
    tensors: dict[str, Any] = {}
    for part, file in zip(_PARTS, _FILES, strict=True):
        try:
            tensors[part] = load_file(path / file)
        except (SafetensorError, OSError, ValueError):
            raise UserError(f"{path / file}: damaged") from None
    try:
        torch.Generator().set_state(tensors["rng"]["torch"])
        np.random.RandomState().set_state(_numpy_state(tensors["rng"]))
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError):
        raise UserError(f"{path / 'rng.safetensors'}: damaged (no states of random numbers)") from None
    return tensors


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


# --- may this checkpoint be resumed from? --------------------------------------------------------------------

FREE = ("output", "logging", "checkpoint", "device", "deepspeed", "data.max_bad_items")
"""Sections and keys that may differ between a checkpoint's recipe and that of the resumed run."""
FREE_IN_STAGE = ("micro_batch", "pack", "gradient_checkpointing", "compile")
"""Keys of a stage that say how a step is computed, not what it is."""


def check_resumable(snapshot: Snapshot, recipe: BaseRecipe) -> None:
    """Refuse to resume where the recipe has changed in a way that makes the old steps wrong.

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


def say_changed_data(snapshot: Snapshot, now: Mapping[str, str]) -> None:
    """Say (`UserNote`) which sources are not what they were when the checkpoint was written."""
    for name, before in snapshot.data.items():
        if name in now and now[name] != before:
            warnings.warn(
                f"data.sources.{name}: {before} when the checkpoint was written, now {now[name]}; "
                "some items may be read twice in this pass and others not at all",
                UserNote,
                stacklevel=2,
            )


def _harmless(key: str, after: Any, snapshot: Snapshot, recipe: BaseRecipe) -> bool:
    """Whether a run may resume although `key` is another than it was."""
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
    """Checkpoints in `folder`, oldest first, and what stands in the place of one."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdecimal())


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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


def _numpy_state(states: Mapping[str, Tensor]) -> tuple[str, NDArray[np.uint32], int, int, float]:
    """What numpy's generator takes, from what `random_states` gave."""
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    return "MT19937", keys, int(position), int(has_gauss), cached


def set_random_states(python: list[Any], states: dict[str, Tensor]) -> None:
    """Put back what `random_states` gave."""
    version, words, gauss = python
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(_numpy_state(states))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
