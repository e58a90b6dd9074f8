"""Sources in training: mixtures, bad items that are replaced and counted, codes of either form, exact resume."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import unimm
from tests.data import forms
from unimm.data.encode import EncodingJob, encode_source
from unimm.data.sources import Reading
from unimm.errors import UserError, UserNote
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe
from unimm.training.records import Records
from unimm.training.tasks.unified import UnifiedRecipe, UnifiedTask
from unimm.training.trainer import train


def recipe_file(folder: Path, tiny: Path, sources: dict[str, Any], **changes: Any) -> Path:
    """A recipe that starts from the tiny model and mixes sources."""
    stage = {
        "name": "one", "steps": 4, "batch": 4, "micro_batch": 2, "lr": {"decoder": 0.01, "code_head": 0.01},
        "mixture": dict.fromkeys(sources, 1), "options": {"prompt_dropout": 0.2},
    }  # fmt: skip
    recipe = {
        "task": "unified",
        "output": str(folder / "run"),
        "model": {"pretrained": str(tiny)},
        "data": {"sources": sources, "emojiscenes": {"scenes": 8}},
        "stages": [stage | changes.pop("stage", {})],
        "logging": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 2},
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def records(path: Path) -> Records:
    """The sources of a recipe, opened as training opens them."""
    recipe = load_recipe(path)
    assert isinstance(recipe, UnifiedRecipe)
    task = recipe.build_task()
    task.dataset(recipe.stages[0], 0)
    assert task.records is not None
    return task.records


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """Conversations with several images, drawings and plain text."""
    lines = [json.dumps({"text": caption}) for caption in ("a red apple", "a blue star", "two bells")]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    return {
        "talks": {"path": str(forms.llava(tmp_path / "llava", 6))},
        "images": {"path": str(forms.shards(tmp_path / "tars", 5)), "pairs": "text_to_image"},
        "words": {"path": str(tmp_path / "words.jsonl")},
    }


def test_sources_and_scenes_train_together_and_resume_exactly(
    tiny: Path, sources: dict[str, Any], tmp_path: Path
) -> None:
    mixture = {"talks": 1, "images": 1, "words": 1, "emojiscenes/understanding": 1}
    path = recipe_file(tmp_path / "r", tiny, sources, stage={"mixture": mixture})
    whole = train(load_recipe(path, [f"output={tmp_path}/whole"]), quiet=True)
    train(load_recipe(path, [f"output={tmp_path}/cut", "stages[0].steps=2"]), quiet=True)
    again = train(load_recipe(path, [f"output={tmp_path}/cut"]), quiet=True)
    ours, theirs = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = load_file(tiny / "model.safetensors")
    assert not torch.equal(
        ours["decoder.model.embed_tokens.weight"], before["decoder.model.embed_tokens.weight"]
    )
    frozen = [name for name in before if name.startswith(("vision.", "connector.", "image_tokenizer."))]
    assert frozen and all(torch.equal(ours[name], before[name]) for name in frozen)
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["skipped"] == 0 for line in lines)
    assert all(np.isfinite(line["text_loss"]) and line["code_loss"] > 0 for line in lines)
    assert unimm.load(whole).draw("a star", seed=0)[0].size == (32, 32)


def test_batches_hold_images_and_codes_of_every_sample(
    tiny: Path, sources: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file(tmp_path / "r", tiny, sources))
    task = recipe.build_task()
    assert isinstance(task, UnifiedTask)
    data = task.dataset(recipe.stages[0], 3)
    samples = [data[i] for i in range(18)]  # every record of each source
    batch = task.collate(samples)
    layout = task.processor.layout
    assert int(batch["images"].grids.prod(1).sum()) == int(layout.feature_positions(batch["input_ids"]).sum())
    assert batch["images"].codes.numel() == int(layout.code_positions(batch["input_ids"]).sum())
    assert max(len(sample.get("images", ())) for sample in samples) == 2
    loss, metrics = task.loss(task.build(), batch, 0, task.targets(batch))
    assert torch.isfinite(loss) and float(metrics["skipped"]) == 0


def test_images_and_encoded_tars_give_equal_samples(tiny: Path, tmp_path: Path) -> None:
    folder = forms.image_list(tmp_path / "data", 6)
    encode_source(EncodingJob(str(folder), tmp_path / "tars", str(tiny), Reading("text_to_image"), shard=4))
    plain = recipe_file(tmp_path / "a", tiny, {"mine": {"path": str(folder), "pairs": "text_to_image"}})
    stored = recipe_file(tmp_path / "b", tiny, {"mine": {"path": str(tmp_path / "tars")}})
    first, second = (records(path).samples(5, 0.3)["mine"] for path in (plain, stored))
    assert (tmp_path / "a/run/codes/mine.safetensors").exists()
    assert not (tmp_path / "b/run/codes").exists(), "encoded tars need no codes made"
    for position in range(20):
        one, two = first[position], second[position]
        assert torch.equal(one["images"].codes, two["images"].codes)
        assert np.array_equal(one["ids"], two["ids"]) and np.array_equal(one["labels"], two["labels"])
    written = (tmp_path / "a/run/codes/mine.safetensors").stat().st_mtime_ns
    records(plain)
    assert (tmp_path / "a/run/codes/mine.safetensors").stat().st_mtime_ns == written, "made once"


def with_bad(tmp_path: Path, bad: int, good: int = 12) -> dict[str, Any]:
    """Drawings of which some cannot be read."""
    folder = forms.image_list(tmp_path / "data", good + bad)
    for i in range(bad):
        (folder / "images" / f"{i * 2}.png").write_bytes(b"broken")
    return {"mine": {"path": str(folder)}}


def test_bad_items_are_replaced_the_same_way_and_written_down(tiny: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path / "r", tiny, with_bad(tmp_path, 3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        samples = records(path).samples(1, 0.0)["mine"]
        drawn = [samples[position] for position in range(30)]
    notes = [str(note.message) for note in said if note.category is UserNote]
    assert len(notes) == 3, "each bad item is said once"
    assert all("png: not an image" in note and "another takes its place" in note for note in notes)
    assert 5 <= sum(sample["skipped"] > 0 for sample in drawn) <= 12
    listed = [json.loads(line) for line in (tmp_path / "r/run/bad-items.jsonl").read_text().splitlines()]
    assert sorted(item["key"] for item in listed) == ["line 1", "line 3", "line 5"]
    assert all(item["source"] == "mine" for item in listed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserNote)  # what is listed is not said again
        again = records(path).samples(1, 0.0)["mine"]
        for position in reversed(range(30)):
            assert np.array_equal(again[position]["ids"], drawn[position]["ids"])
            assert torch.equal(again[position]["images"].pixels, drawn[position]["images"].pixels)


def test_a_run_stops_above_the_limit_and_goes_on_below_it(tiny: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path / "r", tiny, with_bad(tmp_path, 3, good=3))
    line = r"data\.max_bad_items: 2 items cannot be used, more than 1"
    with pytest.warns(UserNote), pytest.raises(UserError, match=line) as stopped:
        train(load_recipe(path, ["data.max_bad_items=1"]), quiet=True)
    assert "\n" not in str(stopped.value) and ".png: not an image" in str(stopped.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNote)
        train(load_recipe(path, ["data.max_bad_items=3"]), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "r/run/metrics.jsonl").read_text().splitlines()]
    assert sum(line["skipped"] for line in lines) > 0


PACKS = {
    "tokens": {"length": 40},  # the third conversation is longer, the long text is cut
    "images": {"length": 128, "images": 1},  # every third conversation shows two
}


@pytest.mark.parametrize("pack", PACKS)
def test_what_a_packed_row_has_no_room_for_is_a_bad_item(tiny: Path, tmp_path: Path, pack: str) -> None:
    words = tmp_path / "words.jsonl"
    long, question = "a red apple " * 30, {"from": "human", "value": "what is this? " * 20}
    rows = [
        {"text": long},
        {"text": "a bell"},
        {"conversations": [question, {"from": "gpt", "value": "a bell"}]},
    ]
    words.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = {"words": {"path": str(words)}, "talks": {"path": str(forms.llava(tmp_path / "llava", 6))}}
    packed = {"micro_batch": None, "pack": PACKS[pack], "steps": 4, "batch": 8}
    path = recipe_file(tmp_path / "r", tiny, mine, stage=packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNote)
        train(load_recipe(path, ["data.validation={share: 0.4}"]), quiet=True)
    listed = [json.loads(line) for line in (tmp_path / "r/run/bad-items.jsonl").read_text().splitlines()]
    bad = {(item["source"], item["key"]): item["reason"] for item in listed}
    if pack == "images":
        assert bad.keys() == {("talks", "scene-0"), ("talks", "scene-3")}
        assert set(bad.values()) == {"2 images, a row holds 1"}
        return
    assert ("words", "line 3") in bad and not any(
        key in bad for key in [("words", "line 1"), ("words", "line 2")]
    )
    assert all("tokens, the context holds 40" in reason for reason in bad.values())


def test_a_source_that_no_stage_reads_is_said(tiny: Path, tmp_path: Path, sources: dict[str, Any]) -> None:
    for number, mixture in enumerate(({"talks": 1, "words": 1}, {"talks": 1, "words": 1, "images": 0})):
        path = recipe_file(tmp_path / str(number), tiny, sources, stage={"mixture": mixture})
        with pytest.warns(
            UserNote, match=r"data\.sources\.images: no stage's mixture gives it a share"
        ) as said:
            load_recipe(path).build_task()
        assert len(said) == 1
    for mixture in ({}, dict.fromkeys(sources, 1)):
        load_recipe(recipe_file(tmp_path / "r", tiny, sources, stage={"mixture": mixture})).build_task()


def test_a_mistake_with_a_source_is_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    broken = forms.shards(tmp_path / "tars", 6)
    (broken / "001.tar").write_bytes((broken / "001.tar").read_bytes()[:1000])
    foreign = forms.image_folder(tmp_path / "data", 2)
    encode_source(EncodingJob(str(foreign), tmp_path / "coded", str(tiny), Reading("text_to_image")))
    plan = tmp_path / "coded" / "codes.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"tokenizer": "another"}))
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"a": {"path": str(tmp_path / "no")}}, {}, r"data\.sources\.a: .*no: no such file or folder"),
        ({"a": {"path": str(tmp_path / "empty.jsonl")}}, {}, r"data\.sources\.a: .*empty\.jsonl: has no records"),
        ({"a": {"path": str(broken)}}, {}, r"data\.sources\.a: .*001\.tar: "),
        ({"a": {"path": str(tmp_path / "coded")}}, {}, "image codes of another image tokenizer"),
        ({"a": {"path": "x"}}, {"mixture": {"a": 0}}, "mixture: expected at least one share above 0"),
        ({"a": {"path": "x"}}, {"mixture": {"b": 1}}, r"mixture\.b: no source has this name; one of a, emojiscenes, "),
        ({"emojiscenes": {"path": "x"}}, {}, r"data\.sources\.emojiscenes: this names built-in scenes"),
        ({"a": {"path": "x", "pairs": "both"}}, {}, r"pairs: expected one of image_to_text, text_to_image"),
    ]  # fmt: skip
    for number, (sources, stage, line) in enumerate(cases):
        with pytest.raises(UserError, match=line) as caught:
            train(load_recipe(recipe_file(tmp_path / str(number), tiny, sources, stage=stage)), quiet=True)
        assert "\n" not in str(caught.value)


def test_the_recipe_for_a_folder_of_images_trains_the_embedded_model(tmp_path: Path) -> None:
    folder = forms.image_folder(tmp_path / "images", 6)
    paths = [f"data.sources.{name}.path={folder}" for name in ("captions", "drawings")]
    small = ["stages[0].steps=3", "stages[0].batch=4", "stages[0].micro_batch=2", "logging.samples_every=0"]
    quiet = ["logging.tensorboard=false", "logging.every=1", f"output={tmp_path}/run"]
    folder = train(load_recipe(find_recipe("finetune-folder"), [*paths, *small, *quiet]), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "validation/loss" in line]
    lines = [line for line in lines if "validation/loss" not in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and [line["step"] for line in measured] == [0, 3]
    assert all(0 < line["text_loss"] < 3 and 0 < line["code_loss"] < 7 for line in lines), "it starts trained"
    before, after = unimm.load().model.state_dict(), unimm.load(folder).model.state_dict()
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "vision", "connector", "code_embedding", "code_head"}


def test_features_and_pixels_train_alike(tiny: Path, tmp_path: Path) -> None:
    """The same losses, step by step, with the encoder frozen; alone and beside images of another source."""
    talks = str(forms.llava(tmp_path / "llava", 6))
    encode_source(EncodingJob(talks, tmp_path / "tars", str(tiny), shard=4, features="float32"))
    more = {"path": str(forms.shards(tmp_path / "more", 5))}
    losses = {}
    for name, path in (("pixels", talks), ("features", str(tmp_path / "tars"))):
        recipe = load_recipe(
            recipe_file(tmp_path / name, tiny, {"talks": {"path": path}, "more": more},
                        stage={"lr": {"decoder": 0.01, "connector": 0.01}})
        )  # fmt: skip
        train(recipe, quiet=True)
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["text_loss"] for line in lines]
        task = recipe.build_task()
        assert isinstance(task, UnifiedTask)
        data = task.dataset(recipe.stages[0], 0)
        batch = task.collate([data[i] for i in range(8)])
        images = batch["images"]
        assert (images.features is not None) == (name == "features") and images.pixels is not None
        assert name == "pixels" or 0 < int(images.featured.sum()) < len(images.featured)
    assert losses["features"] == pytest.approx(losses["pixels"], abs=1e-5)
    assert len(set(losses["pixels"])) == 4


def test_features_are_refused_where_they_cannot_be_right(tiny: Path, tmp_path: Path) -> None:
    talks = str(forms.llava(tmp_path / "llava", 3))
    encode_source(EncodingJob(talks, tmp_path / "tars", str(tiny), features="float16"))
    mine = {"mine": {"path": str(tmp_path / "tars")}}
    trained = recipe_file(tmp_path / "a", tiny, mine, stage={"lr": {"vision": 0.01}})
    with pytest.raises(
        UserError, match=r"stages.one.lr.vision: data.sources.mine holds features .*--features"
    ):
        train(load_recipe(trained), quiet=True)
    um = unimm.load(tiny)
    with torch.no_grad():
        next(um.model.vision.parameters()).add_(1.0)
    um.save(tmp_path / "other")
    other = recipe_file(tmp_path / "b", tmp_path / "other", mine)
    with pytest.raises(UserError, match=r"data.sources.mine: features of another understanding encoder"):
        train(load_recipe(other), quiet=True)
    um.model.image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="an image tokenizer has no understanding encoder"):
        encode_source(EncodingJob(talks, tmp_path / "c", str(tmp_path / "tokenizer"), features="float32"))
    with pytest.raises(UserError, match="holds codes made with another features"):
        encode_source(EncodingJob(talks, tmp_path / "tars", str(tiny), features="float32"))
