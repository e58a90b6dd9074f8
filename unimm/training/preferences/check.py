"""Check preferences before anything is trained: the report of `unimm preferences check` and `unimm data check`."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from unimm.data.sources import Reading
from unimm.data.sources.tars import TarShards
from unimm.errors import UserError
from unimm.interop.convert import read_config
from unimm.pipeline import resolve
from unimm.training.preferences.data import check_codes, read_preferences, shards_of
from unimm.training.preferences.reference import hash_data, kept_beside, read_kept
from unimm.training.preferences.samples import SIDES


def is_preferences(location: str) -> bool:
    """Whether the first object of a location is meant as a preference; what cannot be read is none."""
    path = Path(location)
    try:
        tars = shards_of(location)
        if tars is not None:
            _, _, members = TarShards(tars[:1], Reading(), location).members(0)
            first = members["json"].read()
        elif path.suffix == ".jsonl":
            with path.open("rb") as file:
                first = next(islice(filter(bytes.strip, file), 1))
        else:
            return False
        value = json.loads(first)
    except (UserError, OSError, LookupError, StopIteration, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool({*SIDES} & value.keys())


def check_preferences(location: str, model: str | None = None) -> dict[str, Any]:
    """Read preferences whole, every picture too, and count what they hold.

    Args:
        location: what `read_preferences` takes.
        model: source of a model whose codes the drawings must be; None: their codes are not looked at.

    Raises:
        UserError: naming the first thing that is wrong; or log-probabilities of a reference that lie beside the data
            are of other data.
    """
    preferences = read_preferences(location)
    generation = None if model is None else read_config(resolve(model)).generation_config()
    for preference in preferences:
        for name in preference.names():
            preference.picture(name)
        if model is None or preference.modality == "text":
            continue
        if generation is None:
            raise UserError(f"{preference.where}: a drawing, but {model} cannot draw")
        grid = None if generation.shared else (generation.grid, generation.grid)
        for side in SIDES:
            codes = getattr(preference, side).codes
            if codes is not None:
                check_codes(codes, generation.codes, grid, f"{preference.where}: {side}")
    kept = kept_beside(Path(location))
    if kept.exists():
        read_kept(kept, {"data": hash_data(Path(location), preferences)})
    kinds: Counter[str] = Counter(preference.modality for preference in preferences)
    prompts = {preference.key() for preference in preferences}
    return {"preferences": location, "pairs": len(preferences), **kinds, "prompts": len(prompts)}
