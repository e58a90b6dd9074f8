"""EmojiScenes as a source: each sample by hand from its scene, and codes that are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unimm
from tests.data.test_codes import tokenizer_like
from unimm.data.emojiscenes.augment import Augmentation, augment, draw_numbers
from unimm.data.emojiscenes.scenes import BACKGROUNDS, EmojiScenes, Scene
from unimm.data.emojiscenes.settings import SCENE_NAMES, SceneSettings, UnderstandingSettings, expand_mixture
from unimm.data.emojiscenes.source import EmojiScenesSource, SceneCodes, encode_scenes
from unimm.images import to_tensor
from unimm.models.layout import IGNORED
from unimm.pipeline import UniMM
from unimm.processing.processor import CAPTION_REQUESTS

CPU, SEED, RECIPE_SEED = torch.device("cpu"), 5, 1
DRAWN = EmojiScenes("train", RECIPE_SEED, 64, 16, lattice=8)


@pytest.fixture(scope="module")
def um() -> UniMM:
    return unimm.load("embedded")


@pytest.fixture(scope="module")
def source(um: UniMM, tmp_path_factory: pytest.TempPathFactory) -> EmojiScenesSource:
    assert um.image_tokenizer is not None
    folder = tmp_path_factory.mktemp("run")
    settings = SceneSettings(scenes=16)
    return EmojiScenesSource(settings, um.processor, um.image_tokenizer, 64, RECIPE_SEED, folder, CPU)


def samples(source: EmojiScenesSource, kind: str, prompt_dropout: float = 0.5, **shown: Any) -> Any:
    name = f"emojiscenes/{kind}"
    return source.samples({name: 1.0}, SEED, UnderstandingSettings(**shown), prompt_dropout)[name]


def chosen(scenes: EmojiScenes, index: int, salt: int) -> tuple[Scene, np.random.Generator, int]:
    """The scene of a sample, and the random numbers that come after it."""
    rng = np.random.default_rng([SEED, index, salt])
    number = int(rng.integers(len(scenes)))
    return scenes[number], rng, number


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("index", range(6))
def test_understanding_by_hand(source: EmojiScenesSource, um: UniMM, index: int, augmented: bool) -> None:
    """An image once, and each question as if it were asked alone; the caption comes last."""
    scene, rng, _ = chosen(EmojiScenes("train", SEED, 64, 2**40, ("pair", "count")), index, 0)
    sample = samples(source, "understanding", kinds={"pair": 0.5, "count": 0.5}, augment=augmented)[index]
    asked = [(question.question, question.answer) for question in scene.questions()]
    request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
    captions = scene.captions()
    asked.append((request, captions[rng.integers(len(captions))]))
    prefix = int((sample["branches"] == 0).sum())
    shared = sample["ids"][:prefix].tolist()
    for number, (question, answer) in enumerate(dict.fromkeys(asked), 1):
        mine = sample["branches"] == number
        said = [*um.processor.text_ids(answer), um.processor.eos]
        assert [*shared, *sample["ids"][mine]] == [*um.processor.question_ids(question), *said]
        labels = sample["labels"][mine]
        assert labels[-len(said) :].tolist() == said and (labels[: -len(said)] == IGNORED).all()
        assert sample["positions"][mine].tolist() == [*range(prefix, prefix + mine.sum())]
    assert sample["branches"].max() == len(dict.fromkeys(asked))
    pixels = torch.from_numpy(scene.render()).permute(2, 0, 1)[None].float() / 127.5 - 1
    if augmented:
        background = torch.tensor([BACKGROUNDS[scene.background]]) / 127.5 - 1
        draws = torch.from_numpy(draw_numbers(rng))[None]
        pixels = augment(pixels, background, torch.tensor([scene.mirrorable]), draws, Augmentation())
    assert torch.equal(sample["images"].pixels, pixels)


@pytest.mark.parametrize("index", range(6))
def test_text_by_hand(source: EmojiScenesSource, um: UniMM, index: int) -> None:
    scene, rng, _ = chosen(EmojiScenes("train", SEED, 64, 2**40), index, 1)
    caption = scene.captions()[rng.integers(len(scene.captions()))]
    sample = samples(source, "text")[index]
    ids = [*um.processor.text_ids(caption), um.processor.eos]
    assert sample["ids"].tolist() == [um.processor.bos, *ids]
    assert sample["labels"].tolist() == [IGNORED, *ids] and "images" not in sample


def test_generation_by_hand(source: EmojiScenesSource, um: UniMM) -> None:
    """About half of the prompts are blanked, and these are the ones that the random numbers say."""
    blanked = 0
    for index in range(12):
        scene, rng, number = chosen(DRAWN, index, 2)
        caption = scene.captions()[rng.integers(len(scene.captions()))]
        sample = samples(source, "generation")[index]
        assert um.image_tokenizer is not None
        codes = um.image_tokenizer.encode(to_tensor(DRAWN[number].render()[None]))
        assert torch.equal(sample["images"].codes, codes)
        assert sample["labels"][-64:].tolist() == codes.flatten().tolist()
        assert (sample["labels"][:-64] == IGNORED).all()
        words = um.processor.text_ids(caption)
        prompt = sample["ids"][2 : 2 + len(words)].tolist()  # after the begin and the user's turn
        if rng.random() < 0.5:
            blanked += 1
            assert set(prompt) == {um.processor.pad}
        else:
            assert prompt == words
    assert 0 < blanked < 12


def test_scenes_are_encoded_only_where_they_are_drawn(um: UniMM, tmp_path: Path) -> None:
    assert um.image_tokenizer is not None
    source = EmojiScenesSource(
        SceneSettings(scenes=2), um.processor, um.image_tokenizer, 64, 0, tmp_path, CPU
    )
    mixture = {"emojiscenes/understanding": 1.0, "emojiscenes/text": 1.0, "emojiscenes/generation": 0.0}
    assert tuple(source.samples(mixture, 0, UnderstandingSettings(), 0.0)) == SCENE_NAMES
    assert not (tmp_path / "codes.safetensors").exists()
    source.samples({"emojiscenes/generation": 0.1}, 0, UnderstandingSettings(), 0.0)
    assert (tmp_path / "codes.safetensors").exists()


def test_the_name_alone_is_to_understand_and_to_draw() -> None:
    assert expand_mixture({"mine": 2.0, "emojiscenes": 1.0}) == {
        "mine": 2.0, "emojiscenes/understanding": 0.5, "emojiscenes/generation": 0.5,
    }  # fmt: skip
    assert expand_mixture({"emojiscenes/generation": 3.0, "emojiscenes": 2.0}) == {
        "emojiscenes/generation": 4.0, "emojiscenes/understanding": 1.0,
    }  # fmt: skip


def test_codes_of_scenes_are_computed_once(tmp_path: Path) -> None:
    tokenizer, scenes = tokenizer_like(), EmojiScenes("train", 1, 64, 3)
    file, cpu = tmp_path / "codes.safetensors", torch.device("cpu")
    codes = SceneCodes(file, tokenizer, scenes, cpu)
    assert torch.equal(codes.codes, encode_scenes(tokenizer, scenes, cpu))
    assert codes.codes.dtype == torch.int16
    before = file.stat().st_mtime_ns
    fewer = EmojiScenes("train", 1, 64, 2)
    assert torch.equal(SceneCodes(file, tokenizer, fewer, cpu).codes, codes.codes)
    assert file.stat().st_mtime_ns == before


CHANGED = ["codebook", "signs", "config", "seed", "kinds", "split"]


@pytest.mark.parametrize("changed", CHANGED)
def test_codes_of_other_scenes_or_of_another_tokenizer_are_made_again(tmp_path: Path, changed: str) -> None:
    tokenizer, file, cpu = tokenizer_like(), tmp_path / "codes.safetensors", torch.device("cpu")
    SceneCodes(file, tokenizer, EmojiScenes("train", 1, 64, 3), cpu)
    before = file.stat().st_ino
    other = tokenizer_like(tokenizer, norm_num_groups=2) if changed == "config" else tokenizer_like(tokenizer)
    if changed == "codebook":
        next(buffer for name, buffer in other.named_buffers() if name.endswith("codebook.embed")).neg_()
    if changed == "signs":
        with torch.no_grad():
            other.encoder.conv_in.weight.neg_()
    scenes = EmojiScenes(
        "seen" if changed == "split" else "train", 2 if changed == "seed" else 1, 64, 3,
        ("pair",) if changed == "kinds" else ("single", "pair", "count"),
    )  # fmt: skip
    codes = SceneCodes(file, other, scenes, cpu).codes
    assert torch.equal(codes, encode_scenes(other, scenes, cpu)) and file.stat().st_ino != before
