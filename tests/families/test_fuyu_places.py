"""Boxes and points in a question to Fuyu: tags with pixels of the original image become the tokens of the reference."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import unimm
from tests.families.fuyu_checkpoints import FUYU, FuyuOracle
from tests.families.survey import picture
from unimm.errors import UserError
from unimm.pipeline import UniMM
from unimm.processing.places import fuyu_words
from unimm.sampling.text import Answer

# one is shrunk to fit, one is shown as it is
PICTURES = [picture(100, 91), picture(40, 30)]
QUESTIONS = [
    "what is <box>4, 6,30.5,40</box>?",
    "<point>8,3</point>",
    "is <point> 8.6 , 3 </point> in <box>1,2,3,4</box>",
    "what is this?",
    "<box>is a red apple",
]


@pytest.fixture(scope="module", params=list(FUYU.layouts))
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[UniMM, FuyuOracle]:
    """A model, and what it should give."""
    folder = tmp_path_factory.mktemp("fuyu")
    oracle = FUYU.write(folder, request.param)
    assert isinstance(oracle, FuyuOracle)
    return unimm.load(folder, device="cpu"), oracle


@pytest.mark.parametrize("shown", PICTURES, ids=lambda image: str(image.size))
@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_and_logits_are_those_of_the_reference(
    both: tuple[UniMM, FuyuOracle], question: str, shown: Image.Image
) -> None:
    um, oracle = both
    expected = oracle.inputs([question], [[shown]])
    given = um.processor([question], [[shown]])
    assert given["input_ids"].tolist() == expected["input_ids"].tolist()
    with torch.no_grad():
        logits = um.model(**given).logits
    assert (logits - oracle.logits(expected)).abs().max() < 1e-4


def test_turns_name_places_of_the_image_before_them(both: tuple[UniMM, FuyuOracle]) -> None:
    um, _ = both
    vocabulary = um.processor.tokenizer.get_vocab()
    images = [{"type": "image", "image": shown} for shown in PICTURES]
    turns = [
        {"role": "user", "content": [*images, {"type": "text", "text": "what is <point>40,20</point>?"}]},
        {"role": "assistant", "content": "<0x00>5,6,7,8<0x01>"},
        {"role": "user", "content": "a <point>40,20</point>?"},
    ]
    ids, _ = um.processor.chat(turns)
    point, answer = vocabulary["<0x02>"], vocabulary["<0x00>"]
    places = [ids[at + 1 : at + 3] for at, token in enumerate(ids) if token == point]
    assert places == [[vocabulary["20"], vocabulary["10"]]] * 2  # halves of the second image, shown as it is
    box = [vocabulary[token] for token in ("<0x00>", "5", "6", "7", "8", "<0x01>")]
    at = ids.index(answer)
    assert ids[at : at + 6] == box  # an answer's words are the tokens that it was made of


def test_the_words_of_an_answer_are_its_tokens_again(both: tuple[UniMM, FuyuOracle]) -> None:
    um, _ = both
    tokens = ["<0x00>", "12", "0", "120", "7", "<0x01>", "<0x02>", "3", "4", "<0x03>"]
    ids = [um.processor.tokenizer.get_vocab()[token] for token in tokens]
    assert um.processor.text_ids(fuyu_words(tokens)) == ids


def test_answers_are_read_at_the_size_that_the_model_was_shown(both: tuple[UniMM, FuyuOracle]) -> None:
    um, _ = both
    shown = PICTURES[0]
    height, width = um.processor.views.shown_size(*shown.size[::-1])
    ids, _ = um.processor.question(f"<box>0,0,{shown.height},{shown.width}</box>", [shown])
    start = ids.index(um.processor.tokenizer.get_vocab()["<0x00>"])
    tokens = um.processor.tokenizer.convert_ids_to_tokens(ids[start + 1 : start + 5])
    assert [int(token) for token in tokens] == [0, 0, round(height / 2), round(width / 2)]
    answer = Answer("", 6, "stop", tuple(ids[start : start + 6]))
    (place,) = um.places(answer, shown)
    assert place.numbers == pytest.approx((0, 0, shown.width, shown.height), rel=0.05)


@pytest.mark.parametrize(
    ("question", "line"),
    [
        (
            "<box>1,2,3</box>",
            "<box>1,2,3</box>: give 4 numbers, top, left, bottom, right, in pixels of the image",
        ),
        ("<point>a,b</point>", "<point>a,b</point>: give 2 numbers, x, y, in pixels of the image"),
        ("<point>9000,1</point>", "place 4500,0: the model has no token for 4500"),
        ("<point>-8,1</point>", "place -4,0: the model has no token for -4"),
    ],
)
def test_odd_places_are_named(both: tuple[UniMM, FuyuOracle], question: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        both[0].ask(PICTURES[1], question)
    assert line in str(caught.value)


def test_other_models_take_tags_as_words() -> None:
    um = unimm.load(device="cpu")
    ids, _ = um.processor.question("<box>1,2,3</box>", [PICTURES[0]])
    assert "<box>1,2,3</box>" in um.processor.tokenizer.decode(ids)
