"""Checkpoints of other projects, fine-tuned: their own classes load what comes out, and agree on the loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import Emu3ForConditionalGeneration, JanusForConditionalGeneration

import unimm
from tests.data import forms
from tests.families.both_families import LAYOUTS, write_checkpoints
from tests.families.sixteen_bits import save_in_16_bits
from unimm.families.convert import convert
from unimm.models.layout import IGNORED
from unimm.processing.processor import grids_of
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedTask
from unimm.training.trainer import train

THEIRS = {"janus": JanusForConditionalGeneration, "emu3": Emu3ForConditionalGeneration}
TRAINED = {"janus": ("decoder", "connector", "code_head"), "emu3": ("decoder",)}
LORA = {"r": 2, "modules": ["q_proj", "v_proj"]}
WORDS = "what is this?"
SIZES = [(64, 64), (90, 44), (44, 90), (64, 64), (100, 50), (64, 48)]  # width, height
GRIDS = [
    (8, 8),
    (5, 11),
    (11, 5),
    (8, 8),
    (5, 11),
    (6, 9),
]  # rows, columns: of 4 pixels, in 32 squared at most


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random checkpoints of both families in both layouts."""
    return write_checkpoints(tmp_path_factory.mktemp("published"))


def recipe_file(folder: Path, model: Path, groups: tuple[str, ...], **changes: Any) -> Path:
    """Fine-tuning on a folder of images, to caption them and to draw them."""
    images = forms.image_folder(folder / "images", 6)
    any_size = {"size": 32, "keep_ratio": True} if "emu3" in model.parts else {}
    for number, size in enumerate(SIZES):  # of several shapes
        path = images / f"{number:03d}.png"
        Image.open(path).resize(size).save(path)
    recipe = {
        "task": "unified",
        "output": str(folder / "run"),
        "model": {"pretrained": str(model)},
        "data": {
            "sources": {
                "captions": {"path": str(images)},
                "drawings": {"path": str(images), "pairs": "text_to_image"},
            },
            **any_size,
        },
        "stages": [
            {"name": "tune", "steps": 3, "batch": 4, "micro_batch": 2, "lr": dict.fromkeys(groups, 1e-3),
             "mixture": {"captions": 1, "drawings": 1}},
        ],
        "logging": {"every": 1, "samples_every": 0, "tensorboard": False},
    } | changes  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def answers_alike(export: Path, family: str, folder: Path) -> float:
    """Largest difference between our logits and those of transformers' class, once the export is in its layout."""
    convert(export, folder, "transformers")
    ours = unimm.load(export, device="cpu", dtype="float32")
    theirs = THEIRS[family].from_pretrained(folder, dtype=torch.float32).eval()
    image = Image.fromarray(forms.SCENES[0].render())
    inputs = ours.processor([WORDS], [[image]])
    with torch.no_grad():
        given = ours.model(**inputs).logits
        placeholder = inputs["input_ids"] == ours.model.layout.feature  # each has an id of its own for it
        inputs["input_ids"] = inputs["input_ids"].masked_fill(placeholder, theirs.config.image_token_id)
        return float((given - theirs(**inputs).logits).abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fine_tuned_checkpoint_goes_back_to_where_it_came_from(
    checkpoints: Path, tmp_path: Path, layout: str
) -> None:
    family = layout.partition("/")[0]
    export = train(load_recipe(recipe_file(tmp_path, checkpoints / layout, TRAINED[family])), quiet=True)
    before = unimm.load(checkpoints / layout, device="cpu", dtype="float32").model.state_dict()
    after = unimm.load(export, device="cpu", dtype="float32").model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        trained = name.startswith(tuple(f"{part}." for part in TRAINED[family]))
        assert torch.equal(after[name], tensor) != trained, name
    assert answers_alike(export, family, tmp_path / "transformers") < 1e-4
    convert(tmp_path / "transformers", tmp_path / "original", "original")
    back = unimm.load(tmp_path / "original", device="cpu", dtype="float32").model.state_dict()
    assert all(torch.equal(back[name], after[name]) for name in after)


@pytest.mark.parametrize("layout", LAYOUTS[1:3])
def test_training_goes_on_from_a_checkpoint_of_16_bits(
    checkpoints: Path, tmp_path: Path, layout: str
) -> None:
    source = tmp_path / "halved" / layout
    shutil.copytree(checkpoints / layout, source)
    save_in_16_bits(source)
    path = recipe_file(tmp_path, source, TRAINED[layout.partition("/")[0]])
    export = train(load_recipe(path, ["stages[0].steps=1"]), quiet=True)
    model = unimm.load(export, device="cpu", dtype="float32").model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", LAYOUTS[::2])
def test_adapters_of_a_checkpoint_merge_into_its_own_layout(
    checkpoints: Path, tmp_path: Path, layout: str
) -> None:
    source = checkpoints / layout
    path = recipe_file(tmp_path, source, ("lora",), lora=LORA)
    export = train(load_recipe(path), quiet=True)
    adapted = unimm.load(source, device="cpu", dtype="float32", adapter=export / "adapter")
    merged = unimm.load(export, device="cpu", dtype="float32")
    inputs = merged.processor([WORDS], [[]])
    with torch.no_grad():
        logits = [um.model(**inputs).logits for um in (merged, adapted)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert answers_alike(export, layout.partition("/")[0], tmp_path / "transformers") < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS[::2])
def test_the_text_loss_is_that_of_their_class(checkpoints: Path, tmp_path: Path, layout: str) -> None:
    source = checkpoints / layout
    recipe = load_recipe(recipe_file(tmp_path, source, ("decoder",)))
    task = recipe.build_task()
    assert isinstance(task, UnifiedTask)
    stage = recipe.stages[0].model_copy(update={"mixture": {"captions": 1.0}})
    data, model = task.dataset(stage, 0), task.build().eval()
    theirs = THEIRS[layout.partition("/")[0]].from_pretrained(source, dtype=torch.float32).eval()
    for index in range(3):
        batch = task.collate([data[index]])
        loss, _ = task.loss(model, batch, 0, task.targets(batch))
        shown = batch["images"].inputs()
        with torch.no_grad():
            wanted = theirs(input_ids=batch["input_ids"], labels=batch["labels"], **shown).loss
        assert float(loss.detach() - wanted) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_trained_on_is_what_will_be_asked(checkpoints: Path, tmp_path: Path, layout: str) -> None:
    recipe = load_recipe(recipe_file(tmp_path, checkpoints / layout, ("decoder",)))
    task = recipe.build_task()
    assert isinstance(task, UnifiedTask)
    processor, captions = task.processor, [forms.caption(scene) for scene in list(forms.SCENES)[:6]]
    asked = recipe.data.sources["captions"].requests  # type: ignore[attr-defined]
    stage = recipe.stages[0].model_copy(update={"options": {"prompt_dropout": 0.0}})
    data = task.dataset(stage, 0)
    for index in range(8):
        sample = data[index]
        labelled = np.flatnonzero(sample["labels"] != IGNORED)
        prompt, rest = sample["ids"][: labelled[0]].tolist(), sample["ids"][labelled[0] :].tolist()
        if not len(sample["images"]):  # a drawing, of the model's size or near the image's shape
            grids = GRIDS if processor.layout.shared else [processor.layout.grid] * len(SIZES)
            assert prompt in [*map(processor.drawing_ids, captions, grids)]
            continue
        shown: Any = 1
        if sample["images"].sizes is not None:
            shown = grids_of(sample["images"])
        assert prompt in [processor.question_ids(words, shown) for words in asked]
        assert processor.decode_text(torch.tensor(rest)[None])[0].strip() in captions


def test_preferences_align_a_published_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(70, size=(2, 4, 4)).tolist()
    pairs = [
        {"prompt": "a red apple", "chosen": {"codes": codes[0]}, "rejected": {"codes": codes[1]}},
        {"prompt": WORDS, "chosen": "a red apple", "rejected": "a blue background"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = {
        "task": "dpo",
        "output": str(tmp_path / "run"),
        "model": str(checkpoints / "janus/original"),
        "data": {"file": str(tmp_path / "pairs.jsonl")},
        "reference": {"mode": "precomputed"},
        "stages": [{"name": "align", "steps": 4, "batch": 2, "lr": {"decoder": 1e-3, "code_head": 1e-3}}],
        "logging": {"every": 1, "samples_every": 0, "tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    export = train(load_recipe(tmp_path / "recipe.yaml"), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and lines[-1]["loss"] < lines[0]["loss"]
    assert answers_alike(export, "janus", tmp_path / "transformers") < 1e-4
    head = "model.generation_head.proj_out.weight"
    before, after = (
        load_file(folder / "model.safetensors")[head]
        for folder in (checkpoints / "janus/transformers", tmp_path / "transformers")
    )
    assert not torch.equal(before, after)
