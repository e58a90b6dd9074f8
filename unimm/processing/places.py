"""Points and boxes in the words of a model: read as pixels of the original image, written back, and drawn on it.

| form | as written | unit |
|---|---|---|
| fuyu | `<0x00>top,left,bottom,right<0x01>`, `<0x02>x,y<0x03>` | half pixels of the image as it was shown |
| molmo | `<point x="12.3" y="45.6" alt="cup">cup</point>`, `<points x1="…" y1="…" x2="…" …>` | percent |
| qwen2_vl | `<|object_ref_start|>cup<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>` | thousandths |
| mm1_5 | `<x1, y1, x2, y2>`, `<x, y>` | thousandths |

Fuyu's numbers are a token each with nothing between: `fuyu_words` puts commas there, which its plain text lacks, and
`split_places` takes them out again. A question to Fuyu may name places of the original image, `<box>top, left, bottom,
right</box>` and `<point>x, y</point>`: `tags_as_places` writes them in its form.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from PIL import Image, ImageDraw

from unimm.errors import UserError
from unimm.processing.sizes import fit_size

_Size = tuple[int, int]
Form = Literal["fuyu", "molmo", "qwen2_vl", "mm1_5"]
FUYU_BOUNDS = (1080, 1920)  # pixels of height and width that an image is shrunk to
LOCATION_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FUYU = re.compile(
    rf"(?:<0x00>|\x00){','.join([_NUMBER] * 4)}(?:<0x01>|\x01)|(?:<0x02>|\x02){_NUMBER},{_NUMBER}(?:<0x03>|\x03)"
)
FUYU_OPEN = ("<0x00>", "<0x02>")
_FUYU_CLOSE = {"<0x00>": "<0x01>", "<0x02>": "<0x03>"}
_TAG = re.compile(r"<(box|point)>(.*?)</\1>", re.DOTALL)
_TAGGED = {"box": ("<0x00>", 4, "top, left, bottom, right"), "point": ("<0x02>", 2, "x, y")}
_MOLMO = re.compile(r"<(points?)\s([^<>]*)>(?:(.*?)</\1>)?", re.DOTALL)
_MOLMO_ALT = re.compile(r'\balt="([^"]*)"')
_MOLMO_X = re.compile(rf'\bx(\d*)="{_NUMBER}"')
_QWEN_BARE = rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
_QWEN_NAME = r"(?:<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>\s*)?"
_QWEN = re.compile(rf"{_QWEN_NAME}<\|box_start\|>{_QWEN_BARE}<\|box_end\|>")
_QWEN_ANY = re.compile(rf"{_QWEN_NAME}(?:<\|box_start\|>)?{_QWEN_BARE}(?:<\|box_end\|>)?")
_MM1_5 = re.compile(rf"<{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?>")


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """A point or a box.

    Attributes:
        numbers: x and y, or left, top, right and bottom; pixels of the original image, from its top left. They are as
            the model has them, so a bad answer may lie outside.
        label: what is there, where the words say so.
        span: where it stands in the words, first character and behind the last.
    """

    numbers: tuple[float, ...]
    label: str = ""
    span: tuple[int, int] = (0, 0)

    @property
    def is_box(self) -> bool:
        """Whether it is a box."""
        return len(self.numbers) == 4


def read_places(
    text: str, size: _Size, form: Form | None = None, shown: _Size | None = None
) -> list[Coordinates]:
    """Return the points and boxes of a text, in its order.

    Args:
        text: an answer.
        size: (width, height) of the original image.
        form: the only one to look for; None: all, of which Qwen2-VL's then needs its tokens around.
        shown: (width, height) that the image was resized to, for Fuyu; None: as the published model does it.

    Raises:
        UserError: there is no such form, or a size is of no image.
    """
    forms = tuple(_READERS) if form is None else (_known(form),)
    _check_sizes(size, shown)
    found = [
        place
        for name in forms
        for place in _READERS[name](text, size, shown or _fuyu_shown(size), form is not None)
    ]
    return sorted(found, key=lambda place: place.span[0])


def write_place(place: Coordinates, size: _Size, form: Form, shown: _Size | None = None) -> str:
    """Return the words of a place; what `read_places` undoes, but for rounding.

    Args:
        place: a point, or a box; Qwen2-VL has boxes alone, Molmo points.
        size: (width, height) of the original image.
        form: in which to write it.
        shown: see `read_places`.

    Raises:
        UserError: the form has no such place, or there is no such form.
    """
    _known(form)
    _check_sizes(size, shown)
    if place.is_box != (form == "qwen2_vl") and form in ("qwen2_vl", "molmo"):
        only = "boxes" if form == "qwen2_vl" else "points"
        raise UserError(f"form: {form} writes {only} alone; use fuyu or mm1_5")
    if form == "fuyu":
        return _fuyu_text(place, size, shown or _fuyu_shown(size))
    whole = 100 if form == "molmo" else 1000
    scaled = [number / side * whole for number, side in zip(place.numbers, size * 2, strict=False)]
    if form == "molmo":
        label = html.escape(place.label)
        return f'<point x="{scaled[0]:.1f}" y="{scaled[1]:.1f}" alt="{label}">{label}</point>'
    rounded = [round(number) for number in scaled]
    if form == "mm1_5":
        return f"<{', '.join(map(str, rounded))}>"
    name = f"<|object_ref_start|>{place.label}<|object_ref_end|>" if place.label else ""
    left, top, right, bottom = rounded
    return f"{name}<|box_start|>({left},{top}),({right},{bottom})<|box_end|>"


def fuyu_words(tokens: Iterable[str]) -> str:
    """Return the text of Fuyu's tokens, with commas between the numbers of a place.

    Args:
        tokens: as the tokenizer's vocabulary has them, such as `<0x00>` and `388`.
    """
    words, left = "", ""
    inside = False  # of a place
    for token in tokens:
        number = inside and token.isdigit()
        words += f",{token}" if number and left.isdigit() else token.replace("▁", " ")
        inside, left = number or token in FUYU_OPEN, token
    return words


def tags_as_places(text: str, size: _Size, shown: _Size) -> str:
    """Return a text for Fuyu whose tags of boxes and points are in its form, with its numbers.

    Args:
        text: with `<box>top, left, bottom, right</box>` and `<point>x, y</point>` in pixels of the original image.
        size: (width, height) of that.
        shown: (width, height) that it is resized to.

    Raises:
        UserError: a tag has not its numbers.

    Source: transformers `processing_fuyu.py` (`transform_within_tags`): half a pixel of the resized image, rounded.
    """
    scale = shown[1] / size[1]

    def written(tag: re.Match[str]) -> str:
        opening, count, names = _TAGGED[tag[1]]
        found = re.fullmatch(",".join([_NUMBER] * count), tag[2])
        if found is None:
            raise UserError(f"{tag[0]}: give {count} numbers, {names}, in pixels of the image")
        numbers = [str(round(float(number) / 2 * scale)) for number in found.groups()]
        return f"{opening}{','.join(numbers)}{_FUYU_CLOSE[opening]}"

    return _TAG.sub(written, text)


def has_tags(text: str) -> bool:
    """Whether `tags_as_places` has something to do."""
    return _TAG.search(text) is not None


def split_places(text: str) -> list[str | list[str]]:
    """Return a text in Fuyu's form in pieces: words, and the tokens of a place."""
    pieces: list[str | list[str]] = []
    start = 0
    for found in _FUYU.finditer(text):
        opening = FUYU_OPEN[found[1] is None]
        numbers = [number for number in found.groups() if number is not None]
        pieces += [text[start : found.start()], [opening, *numbers, _FUYU_CLOSE[opening]]]
        start = found.end()
    return [piece for piece in (*pieces, text[start:]) if piece]


def draw_places(image: Image.Image, places: Sequence[Coordinates], line: int | None = None) -> Image.Image:
    """Return a copy of an image, in RGB, with places drawn on it, each in a colour of its own.

    Args:
        image: the original.
        places: on it.
        line: pixels of a line; None: by the image's size.
    """
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width = max(2, round(max(image.size) / 250)) if line is None else line
    for number, place in enumerate(places):
        colour = LOCATION_COLOURS[number % len(LOCATION_COLOURS)]
        if place.is_box:
            left, right = sorted(place.numbers[::2])
            top, bottom = sorted(place.numbers[1::2])
            pen.rectangle((left, top, right, bottom), outline=colour, width=width)
            corner = (left + width + 1, top + width + 1)
        else:
            x, y = place.numbers
            pen.circle((x, y), 2 * width, fill=colour, outline="white", width=max(width // 2, 1))
            corner = (x + 2 * width + 1, y)
        if place.label:  # which stays on the image
            right, bottom = pen.textbbox((0, 0), place.label, stroke_width=1)[2:]
            corner = (min(corner[0], image.width - right), min(corner[1], image.height - bottom))
            pen.text(corner, place.label, fill=colour, stroke_width=1, stroke_fill="white")
    return drawn


# --- the forms ----------------------------------------------------------------------------------------------


def _fuyu_shown(size: _Size) -> _Size:
    """What Fuyu's processor resizes an image to."""
    (height, width), _ = fit_size(size[1], size[0], FUYU_BOUNDS, 30)
    return width, height


def _fuyu(text: str, size: _Size, shown: _Size, alone: bool) -> Iterator[Coordinates]:
    across, down = (2 * whole / part for whole, part in zip(size, shown, strict=True))
    for found in _FUYU.finditer(text):
        numbers = [float(number) for number in found.groups() if number is not None]
        if len(numbers) == 4:
            top, left, bottom, right = numbers
            numbers = [left, top, right, bottom]
        scaled = [number * (down if i % 2 else across) for i, number in enumerate(numbers)]
        yield Coordinates(tuple(scaled), span=found.span())


def _fuyu_text(place: Coordinates, size: _Size, shown: _Size) -> str:
    across, down = (part / whole / 2 for whole, part in zip(size, shown, strict=True))
    numbers = [round(number * (down if i % 2 else across)) for i, number in enumerate(place.numbers)]
    if not place.is_box:
        return f"<0x02>{numbers[0]},{numbers[1]}<0x03>"
    left, top, right, bottom = numbers
    return f"<0x00>{top},{left},{bottom},{right}<0x01>"


def _molmo(text: str, size: _Size, shown: _Size, alone: bool) -> Iterator[Coordinates]:
    for found in _MOLMO.finditer(text):
        fields = found[2]
        named = _MOLMO_ALT.search(fields)
        label = html.unescape(named[1] if named else found[3] or "").strip()
        for x in _MOLMO_X.finditer(fields):
            y = re.search(rf'\by{x[1]}="{_NUMBER}"', fields)
            if y is not None:
                numbers = float(x[2]) / 100 * size[0], float(y[1]) / 100 * size[1]
                yield Coordinates(numbers, label, found.span())


def _qwen2_vl(text: str, size: _Size, shown: _Size, alone: bool) -> Iterator[Coordinates]:
    for found in (_QWEN_ANY if alone else _QWEN).finditer(text):
        yield Coordinates(_thousandths(found.groups()[1:], size), (found[1] or "").strip(), found.span())


def _mm1_5(text: str, size: _Size, shown: _Size, alone: bool) -> Iterator[Coordinates]:
    for found in _MM1_5.finditer(text):
        yield Coordinates(_thousandths(found.groups(), size), span=found.span())


def _thousandths(numbers: Sequence[str | None], size: _Size) -> tuple[float, ...]:
    """Numbers of x and y in turn, in pixels."""
    given = [float(number) for number in numbers if number is not None]
    return tuple(number / 1000 * size[i % 2] for i, number in enumerate(given))


_READERS: dict[str, Callable[[str, _Size, _Size, bool], Iterator[Coordinates]]] = {
    "fuyu": _fuyu,
    "molmo": _molmo,
    "qwen2_vl": _qwen2_vl,
    "mm1_5": _mm1_5,
}


def _known(form: str) -> str:
    if form not in _READERS:
        raise UserError(f"form: {form!r}; one of {', '.join(_READERS)}")
    return form


def _check_sizes(*sizes: _Size | None) -> None:
    for size in sizes:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise UserError(f"size: {size}; give (width, height) in pixels, each 1 or more")
