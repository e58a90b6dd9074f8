"""Scores, the parsing of captions, the choice of questions, and the pixel rules on real renders."""

from __future__ import annotations

import numpy as np
import pytest

from unimm.data.emojiscenes.scenes import SCENE_KINDS, EmojiScenes, Placed, Scene, SceneKind
from unimm.evaluation.emojiscenes.naming import parse_caption
from unimm.evaluation.emojiscenes.pixels import Box, background_name, cut_out, enclose, find_objects, relation
from unimm.evaluation.emojiscenes.questions import QUESTION_KINDS, collect_questions, is_right
from unimm.evaluation.score import Score


def test_wilson_interval_by_hand() -> None:
    # 8 of 10: centre (0.8 + z²/20) / (1 + z²/10), half-width z sqrt(0.016 + z²/400) / (1 + z²/10), z² = 3.8415.
    low, high = Score(8, 10).interval()
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert Score(10, 10).interval()[1] == pytest.approx(1.0)
    assert Score(0, 10).interval()[0] == pytest.approx(0.0)
    assert Score.of([True, False, True, True]) == Score(3, 4)


@pytest.mark.parametrize(
    ("text", "concepts", "backgrounds"),
    [
        ("a green apple on a green background", ["green apple"], ["green"]),
        ("a red apple on orange", ["red apple"], ["orange"]),
        ("On a Pink background, a christmas tree", ["Christmas tree"], ["pink"]),
        ("a panda and a panda on blue", ["panda", "panda"], ["blue"]),
        ("three stars on blue", [], ["blue"]),  # a plural is not the name of one object
        ("a starfish", [], []),
        ("a jack-o-lantern on a gray background or brown", ["jack-o-lantern"], ["gray", "brown"]),
    ],
)
def test_captions_are_parsed(text: str, concepts: list[str], backgrounds: list[str]) -> None:
    assert parse_caption(text) == (concepts, backgrounds)


def test_every_true_caption_of_a_single_object_is_understood() -> None:
    scenes = EmojiScenes("composed", 1, kinds=("single",))
    for index in range(100):
        scene = scenes[index]
        for caption in scene.captions():
            assert parse_caption(caption) == ([scene.concept], [scene.background])


def test_questions_are_equally_many_and_yes_no_balanced() -> None:
    chosen = collect_questions(EmojiScenes("seen", 1), 300)
    kinds = [question.kind for _, question in chosen]
    assert {kind: kinds.count(kind) for kind in QUESTION_KINDS} == dict.fromkeys(QUESTION_KINDS, 300)
    yes = [question.answer == "yes" for _, question in chosen if question.kind == "yesno"]
    assert 0.4 < np.mean(yes) < 0.6
    assert is_right(" A Panda\n", "a panda")
    assert not is_right("a panda bear", "a panda")


@pytest.mark.parametrize("kind", SCENE_KINDS)
@pytest.mark.parametrize("split", ["seen", "vendor"])
def test_rules_are_right_about_real_renders(split: str, kind: SceneKind) -> None:
    scenes = EmojiScenes(split, 1, kinds=(kind,))  # type: ignore[arg-type]
    backgrounds, counts, places = [], [], []
    for index in range(300):
        scene = scenes[index]
        image = scene.render()
        boxes = find_objects(image)
        backgrounds.append(background_name(image) == scene.background)
        counts.append(len(boxes) == len(scene.objects))
        if scene.relation is not None and counts[-1]:
            first = scene.objects[0]
            middle = (first.x + first.size / 2, first.y + first.size / 2)
            boxes.sort(key=lambda box: np.hypot(*np.subtract(box.centre, middle)))
            places.append(relation(*boxes) == scene.relation)
    assert np.mean(backgrounds) >= 0.97
    assert np.mean(counts) >= 0.97
    assert not places or np.mean(places) >= 0.97


def test_rules_notice_what_is_wrong() -> None:
    scene = Scene("pair", "noto", "blue", (Placed("panda", 0, 20, 28), Placed("bell", 36, 20, 28)), "left of")
    image = scene.render()
    assert background_name(image) == "blue"
    left, right = sorted(find_objects(image))
    assert relation(left, right) == "left of"
    assert relation(right, left) == "right of"
    assert find_objects(np.full((64, 64, 3), 200, np.uint8)) == []
    speck = np.full((64, 64, 3), 200, np.uint8)
    speck[30:32, 30:32] = 0
    assert find_objects(speck) == []


def test_relation_takes_the_longer_axis() -> None:
    box = Box(0, 0, 10, 10)
    assert relation(box, Box(5, 30, 15, 40)) == "above"
    assert relation(Box(5, 30, 15, 40), box) == "below"
    assert enclose([box, Box(20, 5, 30, 15)]) == (0, 0, 30, 15)


def test_cut_outs_are_square_and_filled_with_the_background() -> None:
    image = Scene("single", "noto", "pink", (Placed("panda", 4, 4, 32),)).render()
    (box,) = find_objects(image)
    crop = cut_out(image, box, 48)
    assert crop.shape == (48, 48, 3)
    assert np.array_equal(crop[0, 0], image[0, 0])
    assert np.abs(crop[24, 24].astype(int) - image[20, 20]).max() < 60
