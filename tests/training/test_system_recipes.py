"""The recipes of the published systems, on tiny parts: they train, keep frozen parts to the bit, and take any image.

Each model is trained by its recipe's own stages. What is tested of one is tested of all: images of unlike sizes packed
in a row, features in the place of pixels, adapters, and pairs of answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

import unimm
from unimm.data.encode import EncodingJob, encode_source
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe, smoke_recipe
from unimm.training.tasks.unified import UnifiedRecipe
from unimm.training.trainer import train

SYSTEMS = (
    "pixtral-12b", "qwen2-vl-7b", "nvlm-d-72b", "nvlm-x-72b", "nvlm-h-72b", "molmo-7b-d", "aria", "fuyu-8b", "mm1.5-3b",
    "baichuan-omni-7b", "llama-3.2-11b-vision",
)  # fmt: skip
SIZES = [(40, 64), (90, 30), (64, 64), (25, 61), (130, 70), (33, 48)]


@pytest.fixture(scope="module", params=SYSTEMS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A system's smoke run, and its folder."""
    folder = tmp_path_factory.mktemp("systems")
    recipe = smoke_recipe(find_recipe(request.param), [f"output={folder / 'run'}"])
    train(recipe, quiet=True)
    return request.param, folder


def pictures(folder: Path) -> Path:
    """Questions about images of unlike sizes, one or two of them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows: list[dict[str, Any]] = []
    for number in range(len(SIZES)):
        shown = [f"{i % len(SIZES)}.png" for i in range(number, number + 1 + number % 2)]
        asked = "<image>\n" * len(shown) + "what is it?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"the {number}th"}]
        rows.append({"id": str(number), "image": shown, "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder


def own_recipe(folder: Path, model: Path, path: Path, **changes: Any) -> UnifiedRecipe:
    """A recipe that trains a model on data of one's own, packed."""
    recipe = {
        "task": "unified",
        "output": str(folder / "own"),
        "model": {"pretrained": str(model)},
        "data": {"sources": {"talks": {"path": str(path)}}},
        "stages": [
            {"name": "one", "steps": 2, "batch": 4, "lr": {"decoder": 1e-3}, "pack": {"length": 2048}}
        ],
        "logging": {"every": 1, "tensorboard": False},
        "device": "cpu",
        **changes,
    }
    file = folder / f"{len(list(folder.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    found = load_recipe(file)
    assert isinstance(found, UnifiedRecipe)
    return found


def test_what_no_stage_names_stays_to_the_bit(trained: tuple[str, Path]) -> None:
    name, folder = trained
    recipe: Any = smoke_recipe(find_recipe(name), [f"output={folder / 'run'}"])
    before = recipe.build_task().build().state_dict()
    after = unimm.load(folder / "run-smoke/export", "cpu").model.state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key].to(before[key]))}
    learnt = {group for stage in recipe.stages for group in stage.lr}
    halved = recipe.export_dtype != "float32"  # then what is exported is rounded
    assert learnt <= moved | ({"connector"} if name == "fuyu-8b" else set())
    for key, own in before.items():
        if key.split(".")[0] not in learnt:
            rounded = own.to(torch.bfloat16).float() if halved and own.is_floating_point() else own
            assert torch.equal(rounded, after[key].to(rounded)), key


WRITTEN: dict[str, Any] = {
    "qwen2-vl-7b": Qwen2VLForConditionalGeneration,
    "pixtral-12b": LlavaForConditionalGeneration,
}
REFUSED = {
    "fuyu-8b": "open an answer with <0x04>",  # its own text tokenizer has it, the small one has not
    "aria": "have views of 490 or 980 pixels",
}


@torch.no_grad()
def test_transformers_reads_what_was_trained(trained: tuple[str, Path], tmp_path: Path) -> None:
    """Written in its family's layout, it is loaded by transformers' own classes and gives the same.

    Their processor makes the inputs: it reads the text tokenizer, the chat template and the options of images.
    """
    name, folder = trained
    if name in REFUSED:
        with pytest.raises(UserError, match=f"--to: .*{REFUSED[name]}"):
            convert(folder / "run-smoke/export", tmp_path / "written", "transformers")
    if name not in WRITTEN:
        return
    convert(folder / "run-smoke/export", tmp_path / "written", "transformers")
    theirs = WRITTEN[name].from_pretrained(tmp_path / "written", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "written")
    # asked for the PIL backend, the processor would want it of its video processor too, which has none
    processor.image_processor = AutoImageProcessor.from_pretrained(tmp_path / "written", backend="pil")
    ours = unimm.load(folder / "run-smoke/export", "cpu", dtype="float32")
    again = unimm.load(tmp_path / "written", "cpu", dtype="float32")
    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES[:3]]
    for images in (shown[:1], shown, []):
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "what is it?"}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        given = processor(text=[text], images=images or None, add_special_tokens=False, return_tensors="pt")
        inputs = ours.processor(["what is it?"], [images])
        assert torch.equal(inputs["input_ids"], given["input_ids"])
        assert torch.equal(inputs["input_ids"], again.processor(["what is it?"], [images])["input_ids"])
        expected = ours.model(**inputs).logits
        assert torch.equal(expected, again.model(**inputs).logits)
        assert (theirs(**given).logits - expected).abs().max() < 1e-4


def test_images_of_unlike_sizes_train_packed_as_pixels_and_as_features(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    _, folder = trained
    model = folder / "run-smoke/export"
    talks = pictures(tmp_path / "talks")
    encode_source(EncodingJob(str(talks), tmp_path / "tars", str(model), features="float32"))
    losses = {}
    for name, path in (("pixels", talks), ("features", tmp_path / "tars")):
        (tmp_path / name).mkdir()
        recipe = own_recipe(tmp_path / name, model, path)
        task = recipe.build_task()
        data = task.dataset(recipe.stages[0], 0)
        batch = task.collate([data[i] for i in range(6)])
        assert (batch["images"].pixels is None) == (name == "features")
        model_ = task.build()
        with torch.no_grad():
            output = model_(**{key: value for key, value in batch.items() if key != "skipped"})
        losses[name] = float(output.text_loss)
        train(recipe, quiet=True)
    assert losses["features"] == pytest.approx(losses["pixels"], rel=1e-5)


def test_adapters_merge_into_what_was_trained(trained: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = trained
    talks = pictures(tmp_path / "talks")
    stage = {"name": "one", "steps": 2, "batch": 2, "lr": {"lora": 1e-2}}
    recipe = own_recipe(
        tmp_path, folder / "run-smoke/export", talks, stages=[stage], lora={"r": 2, "alpha": 4}
    )
    export = train(recipe, quiet=True)
    merged = unimm.load(export, "cpu")
    beside = unimm.load(folder / "run-smoke/export", "cpu", adapter=Path(export) / "adapter")
    for (key, own), (_, other) in zip(
        merged.model.state_dict().items(), beside.model.state_dict().items(), strict=True
    ):
        assert torch.allclose(own, other, atol=1e-5), key
    assert merged.caption(Image.new("RGB", (50, 40), "red"), max_new_tokens=3) is not None


def test_pairs_of_answers_align_it(trained: tuple[str, Path], tmp_path: Path) -> None:
    """DPO on answers about images of unlike sizes: the loss begins at log 2, and two steps move it."""
    _, folder = trained
    talks = pictures(tmp_path / "talks")
    rows = [
        {"images": [str(talks / f"{i}.png")], "prompt": "what is it?", "chosen": "a red one", "rejected": "b"}
        for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = {
        "task": "dpo",
        "output": str(tmp_path / "dpo"),
        "model": str(folder / "run-smoke/export"),
        "data": {"file": str(tmp_path / "pairs.jsonl"), "packed": True},
        "text": {"losses": {"sigmoid": 1.0}, "beta": 0.1},
        "stages": [{"name": "align", "steps": 2, "batch": 4, "lr": {"decoder": 1e-3}}],
        "logging": {"every": 1, "tensorboard": False},
        "device": "cpu",
    }
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(tmp_path / "dpo.yaml"), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "dpo/metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["text/loss"], lines[-1]["text/loss"]
    assert first == pytest.approx(np.log(2), abs=1e-4) and last < first
