"""EmojiScenes: the same sample from its index, splits that keep their promise, questions that are true."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from unimm.data.emojiscenes.concepts import (
    ARTWORK_FAMILIES,
    BACKGROUNDS,
    CONCEPTS,
    NOUNS,
    VENDOR_FAMILIES,
    load_artwork,
)
from unimm.data.emojiscenes.pack import slug
from unimm.data.emojiscenes.scenes import INVERSE, NUMBERS, SPLITS, EmojiScenes, Scene, Split

SAMPLES = 400


def pairs(scene: Scene) -> set[tuple[str, ...]]:
    """The combinations that a scene shows."""
    concepts = sorted({placed.concept for placed in scene.objects})
    shown: set[tuple[str, ...]] = {("background", scene.background, concept) for concept in concepts}
    if scene.kind == "pair":
        shown.add(("pair", *concepts))
    elif len(scene.objects) > 1:
        shown.add(("count", str(len(scene.objects)), *concepts))
    return shown


def test_enough_concepts_drawn_by_every_family() -> None:
    assert len(CONCEPTS) >= 48
    for family in (*ARTWORK_FAMILIES, *VENDOR_FAMILIES):
        assert {slug(concept) for concept in CONCEPTS} <= set(load_artwork(family))


def test_a_sample_can_be_drawn_again_from_its_index() -> None:
    first, again = EmojiScenes("train", seed=3), EmojiScenes("train", seed=3)
    backwards = [again[i] for i in reversed(range(20))][::-1]
    assert [first[i] for i in range(20)] == backwards
    np.testing.assert_array_equal(first[5].render(), backwards[5].render())
    assert EmojiScenes("train", seed=4)[5] != first[5]


def test_splits_hold_what_training_never_shows() -> None:
    train = [EmojiScenes("train")[i] for i in range(4000)]
    trained_layouts = {(s.family, s.background, s.objects) for s in train}
    trained_pairs = set().union(*map(pairs, train))
    assert {s.family for s in train} == set(ARTWORK_FAMILIES)
    for i in range(SAMPLES):
        seen, composed, vendor = (EmojiScenes(split)[i] for split in ("seen", "composed", "vendor"))
        assert (seen.family, seen.background, seen.objects) not in trained_layouts
        assert seen.family in ARTWORK_FAMILIES
        assert not pairs(composed) <= trained_pairs
        assert vendor.family in VENDOR_FAMILIES


@pytest.mark.parametrize("split", SPLITS)
def test_images_show_what_the_scene_says(split: Split) -> None:
    for scene in (EmojiScenes(split)[i] for i in range(60)):
        image = scene.render()
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert tuple(image[0, 32]) == BACKGROUNDS[scene.background] or scene.objects[0].y == 0
        mask = (image != np.array(BACKGROUNDS[scene.background], np.uint8)).any(-1)
        for placed in scene.objects:
            assert mask[placed.y : placed.y + placed.size, placed.x : placed.x + placed.size].mean() > 0.1
            mask[placed.y : placed.y + placed.size, placed.x : placed.x + placed.size] = False
        assert not mask.any()  # nothing is drawn outside the places


def test_relations_and_counts_are_true() -> None:
    scenes = [EmojiScenes("train")[i] for i in range(SAMPLES)]
    for scene in scenes:
        if scene.kind == "pair":
            a, b = scene.objects
            assert a.concept != b.concept
            true = {
                "left of": a.x + a.size <= b.x,
                "right of": b.x + b.size <= a.x,
                "above": a.y + a.size <= b.y,
                "below": b.y + b.size <= a.y,
            }
            assert scene.relation is not None and true[scene.relation]
        else:
            assert len({placed.concept for placed in scene.objects}) == 1
    assert {len(s.objects) for s in scenes if s.kind == "count"} == {1, 2, 3, 4}


def test_captions_name_objects_and_background() -> None:
    for scene in (EmojiScenes("train")[i] for i in range(SAMPLES)):
        captions = scene.captions()
        assert 5 <= len(captions) == len(set(captions))
        many = scene.kind == "count" and len(scene.objects) > 1
        for caption in captions:
            assert scene.background in caption
            for placed in scene.objects:
                assert (NOUNS[placed.concept].plural if many else placed.concept) in caption
            if many:
                assert NUMBERS[len(scene.objects)] in caption


def test_answers_are_true_and_yes_no_in_balance() -> None:
    answers: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for scene in (EmojiScenes("train")[i] for i in range(1500)):
        concepts = [placed.concept for placed in scene.objects]
        for kind, question, answer in scene.questions():
            kinds[kind] += 1
            if kind == "count":
                assert answer == NUMBERS[len(concepts)]
            elif kind == "background":
                assert answer == scene.background
            elif kind == "where":
                relation, other = answer.rsplit(" the ", 1)
                asked = question.removeprefix("where is the ").removesuffix("?")
                assert {asked, other} == set(concepts)
                assert relation == (scene.relation if asked == concepts[0] else INVERSE[scene.relation or ""])
            elif kind == "yesno":
                answers[answer] += 1
    assert set(kinds) == {"what", "count", "background", "where", "yesno", "category"}
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.03


def test_placings_are_all_that_is_true_of_two_objects() -> None:
    for scene in (EmojiScenes("train", kinds=("pair",))[i] for i in range(100)):
        (first, second), asked = (placed.concept for placed in scene.objects), scene.placings()
        x, y = (getattr(scene.objects[0], axis) - getattr(scene.objects[1], axis) for axis in "xy")
        true = {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}
        for one, other, relations in (
            (first, second, true),
            (second, first, {INVERSE[r]: true[r] for r in true}),
        ):
            answers = {q.answer for q in asked if q.question == f"where is the {one}?"}
            assert len(answers) == 1 and relations[answers.pop().removesuffix(f" the {other}")]
            said = {q.question: q.answer for q in asked if q.question.startswith(f"is the {one} ")}
            assert sorted(said.values()) == ["no", "yes"]
            for question, answer in said.items():
                relation = question.removeprefix(f"is the {one} ").removesuffix(f" the {other}?")
                assert relations[relation] == (answer == "yes")
    assert EmojiScenes("train", kinds=("single",))[0].placings() == []


def test_a_coarser_lattice_is_a_subset_of_the_same_layouts() -> None:
    scenes = [EmojiScenes("train", kinds=("single",), lattice=8)[i] for i in range(200)]
    assert all(placed.x % 8 == placed.y % 8 == 0 for scene in scenes for placed in scene.objects)
    assert all(4 <= placed.x <= 60 - placed.size for scene in scenes for placed in scene.objects)


def test_kinds_come_in_the_shares_asked_for() -> None:
    scenes = EmojiScenes("train", kinds={"pair": 3, "count": 1, "single": 0})
    kinds = Counter(scenes[i].kind for i in range(400))
    assert kinds["single"] == 0 and 270 <= kinds["pair"] <= 330


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"kinds: .* give shares"):
        EmojiScenes(kinds={"pair": -1, "count": 2})
    with pytest.raises(ValueError, match="unknown split 'test'"):
        EmojiScenes("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown kinds"):
        EmojiScenes(kinds=("triple",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lattice: 6"):
        EmojiScenes(lattice=6)
    with pytest.raises(IndexError):
        EmojiScenes(length=3)[3]
