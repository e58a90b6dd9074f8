"""Points and boxes in words: each published form, its scale, writing and reading, and what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import FuyuProcessor
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from tests.families.fuyu_checkpoints import text_tokenizer
from unimm.errors import UserError
from unimm.processing.places import Coordinates, Form, draw_places, fuyu_words, read_places, write_place

SIZE = (400, 200)  # width and height, small enough that Fuyu shows it as it is
READ: list[tuple[Form, str, list[tuple[tuple[float, ...], str]]]] = [
    ("fuyu", "here <0x00>10, 20,30,40<0x01>.", [((40, 20, 80, 60), "")]),
    ("fuyu", "\x0010,20,30,40\x01 and \x025,7\x03", [((40, 20, 80, 60), ""), ((10, 14), "")]),
    ("molmo", '<point x="12.5" y="50" alt="a &lt; b">a</point>', [((50, 100), "a < b")]),
    ("molmo", '<point x="12.5" y="50.0">the cup</point>', [((50, 100), "the cup")]),
    (
        "molmo",
        'Counting <points x1="10.0" y1="20.0" x2="30.5" y2="40.0" x10="1" y10="2" alt="cups">cups</points>',
        [((40, 40), "cups"), ((122, 80), "cups"), ((4, 4), "cups")],
    ),
    (
        "qwen2_vl",
        "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(250,100),(500,1000)<|box_end|>",
        [((100, 20, 200, 200), "the dog")],
    ),
    ("qwen2_vl", "<|box_start|>(0, 0), (1, 1)<|box_end|>", [((0, 0, 0.4, 0.2), "")]),
    ("mm1_5", "a dog <250, 100, 500, 1000> at <500,500>", [((100, 20, 200, 200), ""), ((200, 100), "")]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "wanted"), READ)
def test_each_form_is_read(form: Form, text: str, wanted: list[tuple[tuple[float, ...], str]]) -> None:
    for only in (form, None):  # no form is taken for another
        found = read_places(text, SIZE, only)
        assert [place.label for place in found] == [label for _, label in wanted]
        for place, (numbers, _) in zip(found, wanted, strict=True):
            assert place.numbers == pytest.approx(numbers)
            assert place.is_box == (len(numbers) == 4)
            assert text[slice(*place.span)] and text[place.span[0]] in "<\x00\x02"


def test_words_without_tokens_and_words_without_places() -> None:
    bare = "(250,100),(500,1000)"  # as text looks whose special tokens are left out
    assert read_places(bare, SIZE) == []
    assert read_places(bare, SIZE, "qwen2_vl")[0].numbers == pytest.approx((100, 20, 200, 200))
    for text in (
        "",
        "a <b> (1,2)",
        "<1, 2, 3>",
        "<0x00>1,2,3<0x01>",
        '<point x="1">a</point>',
        "<|box_start|>(1,2)",
    ):
        assert read_places(text, SIZE) == []


def test_places_of_several_forms_come_in_the_order_of_the_text() -> None:
    text = 'b <10, 10> <point x="1" y="1">c</point> <|box_start|>(1,1),(2,2)<|box_end|> \x021,1\x03'
    assert [len(place.numbers) for place in read_places(text, SIZE)] == [2, 2, 4, 2]


@pytest.mark.parametrize("size", [(100, 80), (1920, 1080), (4000, 3000), (2500, 300)])
def test_fuyus_scale_is_that_of_its_processor(size: tuple[int, int]) -> None:
    """Numbers come back as the reference brings them back, which floors half a pixel first."""
    tokenizer = text_tokenizer()
    processor: Any = FuyuProcessor(FuyuImageProcessorPil(), tokenizer)
    tokens = ["▁a", "<0x00>", "12", "34", "56", "78", "<0x01>", "▁a", "<0x02>", "90", "21", "<0x03>"]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
    written = processor.post_process_box_coordinates(ids, torch.tensor([size[::-1]]))[0]
    numbers = "".join(tokenizer.convert_ids_to_tokens(written.tolist())).replace("▁", "")
    box, point = (numbers.split(f"<{kind}>")[1].split("</")[0].split(",") for kind in ("box", "point"))
    text = fuyu_words(tokens)
    assert text == " a<0x00>12,34,56,78<0x01> a<0x02>90,21<0x03>"
    ours, other = read_places(text, size, "fuyu")
    top, left, bottom, right = map(int, box)
    for number, wanted in zip(
        (*ours.numbers, *other.numbers), (left, top, right, bottom, *map(int, point)), strict=True
    ):
        assert abs(number - wanted) <= 2.1


def test_fuyu_by_the_size_that_a_model_shows() -> None:
    (place,) = read_places("<0x02>10,20<0x03>", (400, 200), "fuyu", shown=(200, 100))
    assert place.numbers == pytest.approx((40, 80))
    assert fuyu_words(["<0x00>", "1", "▁x", "2", "3"]) == "<0x00>1 x23"  # a place that is cut short


SIDES = st.tuples(st.integers(8, 3000), st.integers(8, 3000))
SHARES = st.lists(st.floats(0, 1), min_size=4, max_size=4)


@given(
    size=SIDES, shares=SHARES, box=st.booleans(), form=st.sampled_from(["fuyu", "molmo", "qwen2_vl", "mm1_5"])
)
def test_what_is_written_is_read(size: tuple[int, int], shares: list[float], box: bool, form: Form) -> None:
    box = {"molmo": False, "qwen2_vl": True}.get(form, box)
    numbers = tuple(share * side for share, side in zip(shares, size * 2, strict=True))[: 4 if box else 2]
    label = 'a "cup" & <b>' if form == "molmo" else "a cup" if form == "qwen2_vl" else ""
    place = Coordinates(numbers, label)
    (again,) = read_places(write_place(place, size, form), size, form)
    assert again.label == label
    step = {"fuyu": 2 * max(1, size[0] / 1920, size[1] / 1080), "molmo": max(size) / 1000}.get(
        form, max(size) / 1000
    )
    assert again.numbers == pytest.approx(numbers, abs=0.51 * step + 1)


def test_what_has_no_words_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^form: qwen2_vl writes boxes alone"):
        write_place(Coordinates((1, 2)), SIZE, "qwen2_vl")
    with pytest.raises(UserError, match=r"^form: molmo writes points alone"):
        write_place(Coordinates((1, 2, 3, 4)), SIZE, "molmo")
    with pytest.raises(UserError, match=r"^form: 'kosmos'; one of fuyu, molmo"):
        read_places("x", SIZE, "kosmos")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^size: \(0, 5\)"):
        read_places("x", (0, 5))


def test_places_are_drawn_where_they_are() -> None:
    image = Image.new("L", (120, 80), 128)
    places = [Coordinates((10, 20, 60, 50), "cup"), Coordinates((90, 40)), Coordinates((100, 70, 80, 60))]
    drawn = draw_places(image, places, line=2)
    assert image.getpixel((10, 20)) == 128 and drawn.size == image.size and drawn.mode == "RGB"
    grey = (128, 128, 128)
    for x, y in ((10, 30), (60, 30), (30, 20), (30, 50)):
        assert drawn.getpixel((x, y)) == (0xE6, 0x19, 0x4B)
    assert drawn.getpixel((90, 40)) == (0x3C, 0xB4, 0x4B)
    assert drawn.getpixel((80, 65)) == (0x43, 0x63, 0xD8)  # corners in any order
    assert drawn.getpixel((40, 45)) == grey and drawn.getpixel((5, 5)) == grey
    outside = draw_places(image, [Coordinates((-50, -50)), Coordinates((100, 60, 900, 900))])
    assert outside.size == image.size
