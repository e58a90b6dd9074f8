"""The look of drawings: a classifier of pixels, on real renders, and its product with other scorers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unimm
from unimm.data.emojiscenes.scenes import INVERSE, EmojiScenes
from unimm.errors import UserError
from unimm.pipeline import UniMM
from unimm.preferences import artwork
from unimm.preferences.artwork import Artwork, halves
from unimm.preferences.candidates import DrawingPrompt, scene_prompts
from unimm.preferences.scorers import Candidate, ScorerError, make_scorer, score_candidates

FEW = 600  # scenes to fit on


@pytest.fixture(scope="module")
def um() -> UniMM:
    return unimm.load()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artwork") / "artwork.safetensors"


@pytest.fixture(scope="module")
def known(um: UniMM, cache: Path) -> Artwork:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artwork, "SCENES", FEW)
        return Artwork(um, cache)


def test_one_object_is_known_by_its_look(known: Artwork) -> None:
    scenes = EmojiScenes("seen", 1, kinds=("single",))
    shown = [scenes[index] for index in range(100)]
    right = known.scores(shown, [scene.render() for scene in shown])
    wrong = known.scores(shown, [scenes[index].render() for index in range(1, 101)])
    blank = known.scores(shown[:1], [np.full((64, 64, 3), 200, np.uint8)])
    assert np.mean(right) > 0.6 and np.mean(wrong) < 0.1  # the shipped scorer fits on ten times as many
    assert 0 <= blank[0] <= 1


def test_two_objects_are_the_right_way_round(known: Artwork) -> None:
    scenes = EmojiScenes("seen", 1, kinds=("pair",))
    shown = [scenes[index] for index in range(60)]
    turned = [dataclasses.replace(scene, relation=INVERSE[str(scene.relation)]) for scene in shown]
    images = [scene.render() for scene in shown]
    right, wrong = known.scores(shown, images), known.scores(turned, images)
    assert np.mean(right) > 0.9
    assert np.add(right, wrong) == pytest.approx(np.ones(60), abs=1e-5)
    assert {scene.relation for scene in shown} == set(INVERSE)


def test_the_first_half_is_where_the_first_object_should_stand() -> None:
    scenes = EmojiScenes("seen", 1, kinds=("pair",))
    for index in range(20):
        scene = scenes[index]
        image, placed = scene.render(), scene.objects[0]
        first, second = halves(image, scene)
        assert first.shape == second.shape == image.shape
        alone = dataclasses.replace(scene, kind="single", objects=(placed,), relation=None).render()
        there = (alone != alone[0, 0]).any(-1).sum()
        assert (first != first[0, 0]).any(-1).sum() == there


def test_it_does_not_count(known: Artwork) -> None:
    scene = EmojiScenes("seen", 1, kinds=("count",))[0]
    assert known.scores([scene], [np.zeros((64, 64, 3), np.uint8)]) == [1.0]


def test_the_classifier_is_kept_for_one_tokenizer(
    um: UniMM, tiny_model: UniMM, known: Artwork, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artwork, "SCENES", FEW)
    before = cache.stat().st_mtime_ns
    assert (Artwork(um, cache).weight == known.weight).all()
    assert cache.stat().st_mtime_ns == before
    monkeypatch.setattr(artwork, "SCENES", 64)
    Artwork(tiny_model, cache)
    assert cache.stat().st_mtime_ns > before


def test_a_product_is_high_where_each_is(
    um: UniMM, known: Artwork, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artwork, "SCENES", FEW)
    prompts = scene_prompts("seen", 1, 12)
    candidates = [
        Candidate(prompt, 0, torch.ones(2, 2), Image.fromarray(prompt.scene.scene().render()))
        for prompt in prompts
    ]
    parts = [np.array(make_scorer(name, um, cache.parent)(candidates)) for name in ("artwork", "rules")]
    for name in ("artwork*rules", "rules * artwork"):
        assert make_scorer(name, um, cache.parent)(candidates) == pytest.approx(np.prod(parts, axis=0))
    for name, wanted in (
        ("artwork^2 * rules ^ 0.5", parts[0] ** 2 * parts[1] ** 0.5),
        ("artwork^.5", parts[0] ** 0.5),
    ):
        assert make_scorer(name, um, cache.parent)(candidates) == pytest.approx(wanted)
    for name in ("rules^0", "rules^-1", "rules^", "rules^two", "rules^inf", "rules^nan", "artwork*rules^1^2"):
        with pytest.raises(UserError, match=r"scorer: 'rules\^.*give a power above 0 after \^"):
            make_scorer(name, um, cache.parent)
    plain = [Candidate(DrawingPrompt(prompt="a star"), 0, None, candidates[0].image)]
    with pytest.raises(UserError, match="rules: the prompt 'a star' names no scene"):
        make_scorer("rules*artwork", um, cache.parent)(candidates[:1] + plain)
    with pytest.raises(UserError, match=r"scorer: 'artworks'.*did you mean"):
        make_scorer("rules*artworks", um, cache.parent)
    failing = make_scorer("rules*tests.preferences.rewards.too_few", um, cache.parent)
    with pytest.raises(ScorerError, match="gave 1 scores for 12 candidates"):
        score_candidates(failing, candidates)
    below = make_scorer("tests.preferences.rewards.low*tests.preferences.rewards.low", um, cache.parent)
    with pytest.raises(ScorerError, match="a factor gave -1; factors of a product"):
        score_candidates(below, candidates)
