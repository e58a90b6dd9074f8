"""Models that only understand, or only draw: built from a recipe, trained, saved, loaded, described and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import unimm
from tests.data import forms
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.evaluation.recipe import EvaluationRecipe
from unimm.evaluation.run import evaluate
from unimm.families.convert import convert
from unimm.loading import describe
from unimm.locate import EMBEDDED
from unimm.training.model_builder import describe_model
from unimm.training.plan import Here, Machines, plan
from unimm.training.recipe import load_recipe, smoke_recipe
from unimm.training.tasks.unified import UnifiedRecipe
from unimm.training.trainer import train

DECODER = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
VISION = {
    "name": "vit_base_patch16_siglip_224", "image_size": 32, "tokens": 16, "width": 16,
    "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
}  # fmt: skip
CODES = {
    "image_size": 32, "patch_size": 4, "block_out_channels": [8, 16], "norm_num_groups": 4,
    "latent_channels": 8, "codebook_size": 32, "codebook_dim": 4,
}  # fmt: skip
SIDES = {
    "understands": {"vision": VISION, "image_tokenizer": None},
    "draws": {"vision": None, "image_tokenizer": CODES},
}
GROUPS = {
    "understands": ("decoder", "vision", "connector"),
    "draws": ("decoder", "code_embedding", "code_head"),
}
PAIRS = {"understands": "image_to_text", "draws": "text_to_image"}
RED = Image.new("RGB", (32, 32), "red")


def recipe_file(folder: Path, side: str, **changes: Any) -> Path:
    """A recipe of a one-sided model, on images of one's own, some of them held out."""
    images = folder / "images"
    if not images.exists():
        forms.image_folder(images, 8)
    recipe = {
        "task": "unified",
        "output": str(folder / side),
        "model": {"decoder": DECODER, "text_tokenizer": EMBEDDED, **SIDES[side]},
        "data": {
            "sources": {"own": {"path": str(images), "pairs": PAIRS[side]}},
            "validation": {"share": 0.25, "every": 2},
        },
        "stages": [{"name": "one", "steps": 2, "batch": 2, "lr": dict.fromkeys(GROUPS[side], 1e-2)}],
        "logging": {"every": 1, "samples_every": 2, "tensorboard": False},
    }
    path = folder / f"{side}.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes, and the runs of both."""
    folder = tmp_path_factory.mktemp("one_sided")
    for side in SIDES:
        train(load_recipe(recipe_file(folder, side)), quiet=True)
    return folder


@pytest.mark.parametrize("side", SIDES)
def test_a_run_trains_what_there_is_and_shows_and_measures_it(folder: Path, side: str) -> None:
    model = unimm.load(folder / side / "export", "cpu").model
    assert tuple(model.parts()) == GROUPS[side]
    assert (model.image_tokenizer is None) == (side == "understands")
    lines = [json.loads(line) for line in (folder / side / "metrics.jsonl").read_text().splitlines()]
    measured = {name for line in lines for name in line if name.startswith("validation/")}
    assert measured == {"validation/loss", f"validation/{'text' if side == 'understands' else 'code'}_loss"}
    shown = json.loads((folder / side / "samples/held-out.jsonl").read_text())
    assert ("answers" in shown, "prompts" in shown) == (side == "understands", side == "draws")


def test_scenes_are_trained_on_and_shown_by_what_there_is(tmp_path: Path) -> None:
    for side, files in (("understands", {"captions.jsonl"}), ("draws", {"000001.png"})):
        data = {"emojiscenes": {"scenes": 4, "lattice": 8}}
        overrides = ["stages[0].steps=1", "stages[0].mixture={emojiscenes: 1}", "logging.samples_every=1"]
        train(load_recipe(recipe_file(tmp_path, side, data=data), overrides), quiet=True)
        assert {path.name for path in (tmp_path / side / "samples").iterdir()} == files


@pytest.mark.parametrize("side", SIDES)
def test_info_plan_and_smoke_know_one_side(folder: Path, side: str) -> None:
    described = describe(folder / side / "export")
    draws = side == "draws"
    assert (described["understands"], described["draws"]) == ((None, "32x32") if draws else ("32x32", None))
    assert described["can"] == (["draw"] if draws else ["caption", "ask", "chat"])
    assert ("image_tokenizer" in described["parameters"]) == draws
    recipe = load_recipe(recipe_file(folder, side, data={}), ["stages[0].mixture={emojiscenes: 1}"])
    assert isinstance(recipe, UnifiedRecipe)
    planned = plan(recipe, Machines(1, 80.0, here=Here(1, 80.0, "a GPU")))
    assert set(GROUPS[side]) <= set(planned["parameters"]) and planned["stages"][0]["flops"] > 0
    smoke = smoke_recipe(load_recipe(recipe_file(folder, side)).source)
    assert isinstance(smoke, UnifiedRecipe)
    assert tuple(describe_model(smoke).parts()) == GROUPS[side]


@pytest.mark.parametrize("side", SIDES)
def test_a_whole_one_sided_model_is_trained_on_and_grown(folder: Path, tmp_path: Path, side: str) -> None:
    export = folder / side / "export"
    again = recipe_file(tmp_path, side, model={"pretrained": str(export)})
    before, after = (
        unimm.load(place, "cpu").model.state_dict()
        for place in (export, train(load_recipe(again), quiet=True))
    )
    assert before.keys() == after.keys()
    moved = {name.split(".")[0] for name, weight in after.items() if not weight.equal(before[name])}
    assert moved == set(GROUPS[side])
    whole = {"decoder": DECODER, "text_tokenizer": EMBEDDED, "vision": VISION, "image_tokenizer": CODES}
    grown = recipe_file(
        tmp_path, side, model={**whole, "initialize": str(export), "initialize_parts": ["decoder"]}
    )
    model = load_recipe(grown).build_task().build()
    earlier = unimm.load(export, "cpu").model.decoder.state_dict()
    assert all(weight.equal(earlier[name]) for name, weight in model.decoder.state_dict().items())


def test_parts_of_an_export_that_are_not_named_are_those_of_this_model(folder: Path, tmp_path: Path) -> None:
    export = folder / "understands/export"
    model = {
        "decoder": DECODER,
        "text_tokenizer": EMBEDDED,
        **SIDES["understands"],
        "initialize": str(export),
    }
    built = load_recipe(recipe_file(tmp_path, "understands", model=model)).build_task().build().state_dict()
    earlier = unimm.load(export, "cpu").model.state_dict()
    assert all(weight.equal(earlier[name]) for name, weight in built.items())
    model |= SIDES["draws"]
    with pytest.raises(UserError, match=r"model.initialize: .*export has no code_embedding; name the parts"):
        load_recipe(recipe_file(tmp_path, "draws", model=model)).build_task().build()


REFUSED = [
    ("understands", {}, "stages[0].mixture={own: 1, emojiscenes/generation: 1}",
     "stages[0].mixture.emojiscenes/generation: this model cannot draw; leave it out"),
    ("draws", {}, "stages[0].mixture={own: 1, emojiscenes/understanding: 1}",
     "stages[0].mixture.emojiscenes/understanding: this model understands no images; leave it out"),
    ("understands", {}, "data.sources.own.pairs=text_to_image",
     "data.sources.own: has images to draw, but this model cannot draw; leave it out"),
    ("draws", {}, "data.sources.own.pairs=image_to_text",
     "data.sources.own: has images to look at, but this model understands no images; leave it out"),
    ("understands", {}, "data.size=64", "data.size: this model cannot draw; leave it out"),
    ("understands", {}, "data.keep_ratio=true", "data.keep_ratio: this model cannot draw; leave it out"),
    ("understands", {}, "prompts=[a bell]", "prompts: this model cannot draw; leave it out"),
    ("understands", {}, "model.sampling={temperature: 0.5}", "model.sampling: this model cannot draw; leave it out"),
    ("understands", {}, "model.vision=null", "model: vision and image_tokenizer are null; give one of them"),
    ("understands", {}, "model.shared=true", "model.vision: a model whose codes are tokens understands by them"),
    ("draws", {}, "model.weights={vision: nowhere}", "model.weights.vision: this model has no such part; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("side", "changes", "override", "line"), REFUSED)
def test_a_recipe_that_asks_for_what_is_lacking_is_a_line(
    tmp_path: Path, side: str, changes: dict[str, Any], override: str, line: str
) -> None:
    path = recipe_file(tmp_path, side, **changes)
    with pytest.raises(UserError) as caught:
        train(load_recipe(path, [override]), quiet=True)
    assert str(caught.value).startswith(f"{path}: {line}") and "\n" not in str(caught.value)


def test_a_part_that_is_not_said_to_be_left_out_is_missing(tmp_path: Path) -> None:
    for name in ("vision", "image_tokenizer"):
        model = {"decoder": DECODER, "text_tokenizer": EMBEDDED, "vision": VISION, "image_tokenizer": CODES}
        del model[name]
        with pytest.raises(UserError, match=rf"model.{name}: missing; give it, or null for a model without"):
            load_recipe(recipe_file(tmp_path, "draws", model=model))


def test_a_model_that_only_understands_says_so_before_it_runs(folder: Path, monkeypatch: Any) -> None:
    um = unimm.load(folder / "understands/export", "cpu")
    assert um.image_tokenizer is None
    assert isinstance(um.ask(RED, "what is this?", 4), str) and isinstance(um.caption(RED, 4), str)
    monkeypatch.setattr(um.model, "decode", None)
    for call in (um.draw, um.draw_codes, um.draw_batches):
        with pytest.raises(UserError, match=r"^prompts: this model cannot draw$"):
            call("a red apple")
    with pytest.raises(UserError, match=r"^codes: this model has no image tokenizer"):
        um.decode_codes(torch.zeros(1, 4, 4, dtype=torch.long))


def test_a_model_that_only_draws_says_so_before_it_runs(folder: Path, monkeypatch: Any) -> None:
    um = unimm.load(folder / "draws/export", "cpu")
    assert um.draw("a red apple", seed=0)[0].size == (32, 32)
    assert isinstance(um.ask(None, "what is this?", 4), str)
    um.batch_size = 1
    monkeypatch.setattr("unimm.sampling.engine.Engine.submit", None)
    for call in (
        lambda: um.ask([None, RED], ["what is this?"] * 2),
        lambda: um.ask(RED, "what is this?"),
        lambda: um.caption([RED, RED]),
    ):
        with pytest.raises(UserError, match=r"^images: this model understands no images$"):
            call()
    with pytest.raises(UserError, match=r"^images: this model understands no images$"):
        um.draw("a red apple", images=RED)


@pytest.mark.parametrize("side", SIDES)
def test_the_command_line_says_so_too(folder: Path, tmp_path: Path, side: str, capsys: Any) -> None:
    model, image = ["--model", str(folder / side / "export")], tmp_path / "red.png"
    RED.save(image)
    refused = {
        "understands": (["draw", "a bell", "-o", str(tmp_path)], "prompts: this model cannot draw"),
        "draws": (["caption", str(image)], "images: this model understands no images"),
    }
    demo = (
        ["demo", "-o", str(tmp_path)],
        "--model: the demo wants a model that understands images and draws",
    )
    for command, line in (refused[side], demo):
        assert main([*command, *model]) == 2
        assert line in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["red.png"]
    assert main(["info", str(folder / side / "export")]) == 0


@pytest.mark.parametrize("side", SIDES)
def test_an_evaluation_of_what_is_lacking_is_a_line(folder: Path, tmp_path: Path, side: str) -> None:
    recipe = EvaluationRecipe(task="evaluation", output=str(tmp_path), model=str(folder / side / "export"))
    line = (
        "drawing: this model cannot draw"
        if side == "understands"
        else "naming: this model understands no images"
    )
    with pytest.raises(UserError, match=f"^{line}; give null$"):
        evaluate(recipe)


@pytest.mark.parametrize("side", SIDES)
def test_our_layout_holds_it_and_a_published_one_does_not(folder: Path, tmp_path: Path, side: str) -> None:
    source = folder / side / "export"
    convert(source, tmp_path / "ours", "unimm")
    one, two = (unimm.load(place, "cpu").model.state_dict() for place in (source, tmp_path / "ours"))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    with pytest.raises(UserError, match=r"^--to: ") as caught:
        convert(source, tmp_path / "out", "transformers")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["copy", "precomputed"])
def test_preferences_about_words_align_a_model_that_only_understands(
    folder: Path, tmp_path: Path, mode: str
) -> None:
    RED.save(tmp_path / "red.png")
    pair = {"prompt": "what is this?", "image": "red.png", "chosen": "a red square", "rejected": "a bell"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    recipe = {
        "task": "dpo",
        "output": str(tmp_path / "run"),
        "model": str(folder / "understands/export"),
        "data": {"file": str(tmp_path / "pairs.jsonl")},
        "reference": {"mode": mode},
        "stages": [{"name": "align", "steps": 3, "batch": 1, "lr": {"decoder": 1e-3}}],
        "logging": {"every": 1, "samples_every": 3, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    train(load_recipe(path), quiet=True)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < losses[0]
    assert (tmp_path / "run/samples/answers.jsonl").exists()
    with pytest.raises(UserError, match=r"preview.prompts: this model cannot draw; leave it out"):
        train(load_recipe(path, ["preview.prompts=[a bell]", f"output={tmp_path}/two"]), quiet=True)
    drawn = {"prompt": "a bell", "chosen": {"codes": [[1]]}, "rejected": {"codes": [[2]]}}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(drawn) + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl.*: a drawing, but this model cannot draw"):
        train(load_recipe(path, [f"output={tmp_path}/three"]), quiet=True)
