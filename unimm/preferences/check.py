"""Check preferences before anything is trained: the report of `unimm preferences check` and `unimm data check`."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from unimm.data.sources import Location, Reading, RowSource, location_name, open_source
from unimm.errors import UserError, UserNote
from unimm.locate import locate
from unimm.preferences.data import Preference, check_response_codes, find_preferences, refuse_preferences
from unimm.preferences.forms import SIDES, is_form
from unimm.preferences.reference import cache_beside, hash_data, read_cached


def is_preferences(location: Location, reading: Reading | None = None) -> bool:
    """Whether the first row of a location is meant as a preference; what cannot be read is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserNote)  # who reads it says what there is to say
            source = open_source(location, reading, strict=False)
        return isinstance(source, RowSource) and len(source) > 0 and is_form(source.entry(0).row)
    except (UserError, OSError):
        return False


def check_preferences(
    location: Location, model: str | None = None, reading: Reading | None = None
) -> dict[str, Any]:
    """Read preferences whole, every image too, and count what they hold.

    Args:
        location: what `read_preferences` takes.
        model: source of a model whose codes the drawings must be; None: their codes are not looked at.
        reading: how to read it.

    Raises:
        UserError: naming what is wrong, as `read_preferences` does; or log-probabilities of a reference that lie beside
            the data are of other data.
    """
    reading = reading or Reading()
    preferences, equal = find_preferences(location, reading)
    generation = None if model is None else locate(model, weights=False).config.generation_config()
    problems = []
    for preference in preferences:
        try:
            _check(preference, model, generation)
        except UserError as error:
            problems.append(str(error))
    name = location_name(location)
    refuse_preferences(name, problems, len(preferences) + len(equal))
    cached = cache_beside(Path(name))
    if cached.exists():
        read_cached(cached, {"data": hash_data(location, preferences, reading)})
    kinds: Counter[str] = Counter(preference.modality for preference in preferences)
    prompts = {preference.key() for preference in preferences}
    counts = {"pairs": len(preferences), **kinds, "prompts": len(prompts), "equal": len(equal)}
    return {"preferences": name, **counts}


def _check(preference: Preference, model: str | None, generation: Any) -> None:
    """Read the images of a preference and hold its codes against a model's.

    Raises:
        UserError: one is unreadable, or a code is not the model's.
    """
    for name in preference.names():
        preference.read_image(name)
    if model is None or preference.modality == "text":
        return
    if generation is None:
        raise UserError(f"{preference.where}: a drawing, but {model} cannot draw")
    grid = None if generation.shared else (generation.grid, generation.grid)
    for side in SIDES:
        codes = getattr(preference, side).codes
        if codes is not None:
            check_response_codes(codes, generation.codes, grid, f"{preference.where}: {side}")
