"""The fonts that tables are written in: those that matplotlib brings (DejaVu, Computer Modern, STIX).

They are read from its folder, so matplotlib itself is never imported.
"""

from __future__ import annotations

import functools
import importlib.util
from io import BytesIO
from pathlib import Path

from PIL import ImageFont

from unimm.errors import UserError

FONT_FAMILIES: dict[str, tuple[str, str]] = {
    "DejaVu Sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "DejaVu Serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    "DejaVu Sans Mono": ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    "Computer Modern Roman": ("cmr10.ttf", "cmb10.ttf"),
    "Computer Modern Sans": ("cmss10.ttf", "cmss10.ttf"),
    "STIX General": ("STIXGeneral.ttf", "STIXGeneralBol.ttf"),
    "Computer Modern Typewriter": ("cmtt10.ttf", "cmtt10.ttf"),
}
"""Family -> files of its regular and its bold face; a family without a bold face has the regular one twice."""
HELD_OUT_FONTS = ("STIX General", "Computer Modern Typewriter")
"""Families that only the split `font` shows."""
TRAINED_FONTS = tuple(family for family in FONT_FAMILIES if family not in HELD_OUT_FONTS)


@functools.cache
def font_folder() -> Path:
    """Return the folder of matplotlib's fonts.

    Raises:
        UserError: matplotlib is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "tables: their fonts come with matplotlib; install it with: pip install 'unimm[tables]'"
        )
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@functools.cache
def load_font(family: str, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """Return a face at a size in pixels; the plain layout engine gives the same pixels wherever Pillow runs.

    Raises:
        UserError: matplotlib, or the file in it, is missing.
    """
    path = font_folder() / FONT_FAMILIES[family][bold]
    try:
        # Read here: given a name, Pillow takes a file of that name from elsewhere where this one is missing.
        return ImageFont.truetype(BytesIO(path.read_bytes()), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(
            f"tables: {path}: not readable as a font ({error}); install matplotlib again"
        ) from None
