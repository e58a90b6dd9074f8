"""The SigLIP task: loss and truth by hand, augmentation, and a run through the trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from unimm.data.emojiscenes.augment import DRAWS, Augmentation, augment, draw_numbers
from unimm.data.emojiscenes.scenes import BACKGROUNDS, CONCEPTS, Placed, Scene
from unimm.errors import UserError
from unimm.images import to_tensor
from unimm.models.former import VisionConfig
from unimm.models.parts import read_part
from unimm.models.vision import VisionTower
from unimm.training.recipe import load_recipe
from unimm.training.tasks.siglip import SceneSource, SiglipTask, content, sigmoid_loss, truth_table
from unimm.training.trainer import train

TINY = Path(__file__).parents[3] / "training" / "siglip-tiny.yaml"


def pair(first: str, relation: str, second: str, background: str = "blue", family: str = "noto") -> Scene:
    places = {"left of": (4, 20, 36, 20), "right of": (36, 20, 4, 20), "above": (20, 4, 20, 36)}
    a, b, c, d = places[relation]
    return Scene("pair", family, background, (Placed(first, a, b, 24), Placed(second, c, d, 24)), relation)


def test_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    truth = torch.tensor([[True, False], [False, True]])
    # Right pairs pay log(1 + e^-z), wrong ones log(1 + e^z).
    expected = sum(math.log(1 + math.exp(v)) for v in (-2.0, -1.0, 0.5, -3.0))
    assert sigmoid_loss(logits, truth).item() == pytest.approx(expected, rel=1e-6)


def test_scenes_that_read_the_same_are_true_of_each_other() -> None:
    scenes = [
        pair("panda", "left of", "bell"),
        pair("bell", "right of", "panda", family="twemoji"),  # the same said the other way round
        pair("panda", "right of", "bell"),
        pair("panda", "left of", "bell", background="pink"),
    ]
    facts = [(content(scene), scene.background) for scene in scenes]
    captions = truth_table(facts, facts)[:, len(CONCEPTS) + len(BACKGROUNDS) :]
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert captions.int().tolist() == expected


def test_names_are_true_of_what_is_shown() -> None:
    scene = pair("panda", "above", "bell", background="pink")
    facts = [(content(scene), scene.background)]
    row = truth_table(facts, facts)[0]
    names = [*CONCEPTS, *BACKGROUNDS, "caption"]
    assert {names[index] for index in row.nonzero().flatten()} == {"panda", "bell", "pink", "caption"}


def batch_of(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    colours = np.array([BACKGROUNDS[scene.background] for scene in scenes], np.float32) / 127.5 - 1
    return to_tensor(np.stack([scene.render() for scene in scenes])), torch.from_numpy(colours)


def test_augmentation_varies_objects_and_keeps_the_background() -> None:
    scenes = [Scene("single", "noto", name, (Placed("panda", 12, 12, 40),)) for name in BACKGROUNDS]
    pixels, colours = batch_of(scenes)
    draws = torch.from_numpy(np.stack([draw_numbers(np.random.default_rng(i)) for i in range(len(scenes))]))
    mirrored = torch.ones(len(scenes), dtype=torch.bool)
    changed = augment(pixels, colours, mirrored, draws, Augmentation())
    corners = changed[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # [B, 3, 4]
    assert torch.allclose(corners, colours[:, :, None].expand_as(corners), atol=2e-2)
    assert ((changed - pixels).abs().amax((1, 2, 3)) > 0.1).all()
    assert torch.equal(changed, augment(pixels, colours, mirrored, draws, Augmentation()))


def test_augmentation_mirrors_only_where_it_may() -> None:
    pixels, colours = batch_of([pair("panda", "left of", "bell")] * 2)
    draws = torch.zeros(2, DRAWS)
    draws[:, 0] = -1.0  # asks for a mirror image; everything else stays as it is
    how = Augmentation(blur=0.0, outline=0.0, flat=0.0)
    changed = augment(pixels, colours, torch.tensor([False, True]), draws, how)
    assert torch.allclose(changed[0], pixels[0], atol=1e-4)
    assert torch.allclose(changed[1], pixels[1].flip(-1), atol=1e-4)


def test_samples_follow_from_seed_and_index() -> None:
    first, again, other = (SceneSource({"single": 1.0, "pair": 1.0}, 32, seed) for seed in (3, 3, 4))
    backwards = [again[index] for index in reversed(range(20))][::-1]
    for index, sample in enumerate(backwards):
        assert np.array_equal(first[index]["pixels"], sample["pixels"])
        assert first[index]["caption"] == sample["caption"]
    assert any(first[i]["caption"] != other[i]["caption"] for i in range(20))
    assert {len(first[i]["content"]) for i in range(20)} == {2, 3}  # both kinds of the mixture occur


def test_two_steps_through_the_trainer(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, [f"output={tmp_path / 'run'}"])
    export = train(recipe, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["objects", "captions"]
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    watched = (tmp_path / "run" / "samples" / "retrieval.jsonl").read_text().splitlines()
    retrieval = json.loads(watched[-1])
    assert {"seen_object", "vendor_object", "seen_background"} <= retrieval.keys()
    assert (tmp_path / "run" / "samples" / "step-000002.png").exists()

    # What is exported is an encoder of the unified model, and the tokenizer that goes with it.
    tower = VisionTower(
        read_part(
            "encoder", VisionConfig(**json.loads((export / "vision.json").read_text())).parts()["encoder"]
        )
    )
    weights = load_file(export / "vision.safetensors")
    missing, unexpected = tower.model.load_state_dict(weights, strict=False)
    assert not missing
    assert all(name.startswith("attn_pool.") for name in unexpected)
    assert tower(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 32)
    words = AutoTokenizer.from_pretrained(export)
    text = " A naïve  🍎, isn't it ?\n"
    assert words.decode(words.encode(text)) == text


def test_text_features_do_not_depend_on_the_padding() -> None:
    task = load_recipe(TINY).build_task()
    assert isinstance(task, SiglipTask)
    torch.manual_seed(0)
    model = task.build().eval()
    ids = task.tokenize(["panda"])
    changed = ids.clone()
    changed[0, 0] = task.tokenizer.convert_tokens_to_ids("a")  # a word where there was a pad
    features = [model.encode_texts(rows) for rows in (ids, changed)]
    assert not torch.allclose(*features)
    names = model.encode_texts(task.name_ids[: len(CONCEPTS)])
    others = ~torch.eye(len(CONCEPTS), dtype=torch.bool)
    assert (names @ names.T)[others].mean() < 0.9  # pads at the end would make this 0.99


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "stages[0].mixture={sinlge: 1.0}",
            r"stages\[0\]\.mixture\.sinlge: expected one of single, pair, count",
        ),
        ("model.vision.depht=2", r"model\.vision\.depht: unknown key; did you mean \"depth\"\?"),
        ("data.augmentation.hue=red", r"data\.augmentation\.hue: expected a number, got \"red\""),
    ],
)
def test_mistakes_are_named_by_their_key(override: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        load_recipe(TINY, [override]).build_task()
    assert "\n" not in str(raised.value)
