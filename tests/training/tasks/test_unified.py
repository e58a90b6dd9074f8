"""The unified task: branches that do not leak, samples that match the prompts, stages, resume after SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import unimm
from tests.data import forms
from unimm.data.emojiscenes.scenes import EmojiScenes, Scene
from unimm.data.emojiscenes.source import encode_scenes
from unimm.errors import UserError
from unimm.models.image_tokenizers.vq import ImageTokenizer, ImageTokenizerConfig
from unimm.models.layout import IGNORED
from unimm.models.modeling import UniMMModel
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe, smoke_recipe
from unimm.training.tasks.unified import UnifiedTask
from unimm.training.trainer import train

SIGLIP: dict[str, Any] = {
    "task": "siglip",
    "output": "unused",
    "model": {
        "vision": {"embed_dim": 16, "depth": 1, "num_heads": 2},
        "text": {"vocab_size": 400, "hidden_size": 16, "depth": 1, "corpus": 50},
    },
    "stages": [{"name": "none", "steps": 1, "batch": 2, "lr": {"vision": 0.1}}],
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on tiny encoders with random weights, exported as the two earlier tasks export theirs."""
    folder = tmp_path_factory.mktemp("unified")
    torch.manual_seed(0)
    sizes = ImageTokenizerConfig(
        image_size=64, patch_size=4, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=8,
        codebook_size=32, codebook_dim=4,
    )  # fmt: skip
    ImageTokenizer(sizes).save_pretrained(folder / "tokenizer")
    (folder / "siglip.yaml").write_text(yaml.safe_dump(SIGLIP))
    siglip = load_recipe(folder / "siglip.yaml").build_task()
    siglip.export(siglip.build(), folder / "vision")
    decoder = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    recipe = {
        "task": "unified",
        "output": str(folder / "run"),
        "model": {"decoder": decoder, "vision": str(folder / "vision"), "image_tokenizer": str(folder / "tokenizer")},
        "data": {"emojiscenes": {"scenes": 32}},
        "stages": [
            {"name": "one", "steps": 2, "batch": 4, "lr": {"connector": 0.01, "code_head": 0.01},
             "mixture": {"emojiscenes/understanding": 1, "emojiscenes/generation": 3}},
            {"name": "two", "steps": 4, "batch": 4, "lr": {"decoder": 0.01, "vision": 0.01},
             "mixture": {"emojiscenes/understanding": 2, "emojiscenes/text": 1, "emojiscenes/generation": 1},
             "options": {"emojiscenes": {"augment": True}}},
        ],
        "logging": {"every": 1, "samples_every": 0, "tensorboard": False},
        "checkpoint": {"every": 1},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def task(recipe_file: Path) -> UnifiedTask:
    task = load_recipe(recipe_file).build_task()
    assert isinstance(task, UnifiedTask)
    return task


def only(task: UnifiedTask, kind: str, **options: Any) -> Any:
    """The samples of one kind, with options of a stage."""
    changes = {"mixture": {f"emojiscenes/{kind}": 1}, "options": options}
    return task.dataset(task.recipe.stages[0].model_copy(update=changes), seed=0)


def scene_at(index: int, kind: str) -> Scene:
    """The scene that the sample of a kind at an index is made of."""
    drawn = kind == "generation"
    scenes = EmojiScenes("train", 0, 64, 32, lattice=8) if drawn else EmojiScenes("train", 0, 64, 2**40)
    rng = np.random.default_rng([0, index, ("understanding", "text", "generation").index(kind)])
    return scenes[int(rng.integers(len(scenes)))]


def test_each_branch_is_the_question_alone(task: UnifiedTask) -> None:
    """Packed beside other questions, an answer gets the logits that its prompt gives by itself."""
    torch.manual_seed(0)
    model = task.build().eval()
    assert isinstance(model, UniMMModel)
    sample = only(task, "understanding")[3]
    scene, processor = scene_at(3, "understanding"), task.processor
    batch = task.collate([sample])
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits[0]
        branches = torch.from_numpy(sample["branches"])
        for number, (_, question, answer) in enumerate(scene.questions(), start=1):
            prompt = processor.question_ids(question)
            row = [*prompt, *processor.text_ids(answer), processor.eos]
            alone = model(input_ids=torch.tensor([row]), images=batch["images"]).logits[0]
            where = (branches == number).nonzero()[:, 0]
            prefix = int((branches == 0).sum())
            torch.testing.assert_close(packed[where], alone[prefix:], rtol=1e-4, atol=1e-5)
            labelled = labels[0, where]
            assert labelled[labelled != IGNORED].tolist() == row[len(prompt) :]


def test_all_placings_are_asked_once_where_a_stage_says_so(task: UnifiedTask) -> None:
    index = next(i for i in range(100) if scene_at(i, "understanding").kind == "pair")
    plain = only(task, "understanding")[index]
    more = only(task, "understanding", emojiscenes={"placings": True})[index]
    words = task.processor.tokenizer.decode(more["ids"].tolist())
    scene = scene_at(index, "understanding")
    asked = dict.fromkeys(q.question for q in scene.questions() + scene.placings())
    assert all(words.count(question) == 1 for question in asked)
    assert more["branches"].max() == len(asked) + 1 > plain["branches"].max()


def test_generation_samples_are_prompt_and_codes(task: UnifiedTask) -> None:
    kept, scene = only(task, "generation", prompt_dropout=0.0)[5], scene_at(5, "generation")
    text = task.processor.tokenizer.decode(
        [i for i in kept["ids"] if i not in task.processor.tokenizer.all_special_ids]
    )
    assert text in scene.captions()
    pixels = torch.from_numpy(scene.render()).permute(2, 0, 1)[None] / 127.5 - 1
    codes = task.image_tokenizer.encode(pixels)
    assert torch.equal(kept["images"].codes, codes)
    assert kept["labels"][-64:].tolist() == codes.flatten().tolist()
    assert (kept["labels"][:-64] == IGNORED).all()
    blank = only(task, "generation", prompt_dropout=0.999)[5]
    assert set(blank["ids"][1:-65]) == {task.processor.pad} and len(blank["ids"]) == len(kept["ids"])


def kinds_of(samples: Iterable[dict[str, Any]]) -> list[str]:
    """What samples are made for."""
    images = [sample.get("images") for sample in samples]
    return sorted("text" if one is None else "codes" if one.pixels is None else "pixels" for one in images)


def test_every_step_mixes_kinds_in_their_ratio(task: UnifiedTask) -> None:
    source = task.dataset(task.recipe.stages[1], seed=0)
    for start in range(0, 40, 4):
        assert kinds_of(map(source.__getitem__, range(start, start + 4))) == [
            "codes", "pixels", "pixels", "text"
        ]  # fmt: skip


def test_the_source_by_its_name_alone_is_half_to_understand_and_half_to_draw(task: UnifiedTask) -> None:
    stage = task.recipe.stages[0].model_copy(update={"mixture": {"emojiscenes": 2, "emojiscenes/text": 2}})
    assert task.recipe.mixture(stage) == {  # type: ignore[attr-defined]
        "emojiscenes/understanding": 1, "emojiscenes/generation": 1, "emojiscenes/text": 2,
    }  # fmt: skip
    source = task.dataset(stage, seed=0)
    assert kinds_of(map(source.__getitem__, range(8))) == ["codes"] * 2 + ["pixels"] * 2 + ["text"] * 4


def test_images_to_understand_are_of_the_kinds_asked_for(task: UnifiedTask) -> None:
    source = only(task, "understanding", emojiscenes={"kinds": {"pair": 3, "count": 1}})
    where = task.processor.text_ids("where is the")  # asked of pairs only
    asked = [" ".join(map(str, source[index]["ids"])).count(" ".join(map(str, where))) for index in range(60)]
    assert 35 <= sum(map(bool, asked)) <= 55


def test_a_stage_changes_only_what_it_names(recipe_file: Path, tmp_path: Path) -> None:
    settings = "data.emojiscenes.understanding={placings: true, kinds: {pair: 1}}"
    task = load_recipe(recipe_file, [f"output={tmp_path}", settings]).build_task()
    assert isinstance(task, UnifiedTask)
    plain, varied = (only(task, "understanding", emojiscenes=one) for one in ({}, {"augment": True}))
    assert (plain[0]["ids"] == varied[0]["ids"]).all() and plain[0]["branches"].max() >= 7
    assert not torch.equal(plain[0]["images"].pixels, varied[0]["images"].pixels)


def test_images_to_draw_are_of_the_kinds_asked_for(recipe_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "codes.safetensors"  # the second recipe finds the first one's codes there
    for kind in ("count", "pair"):
        settings = f"data.emojiscenes={{scenes: 32, codes: {file}, kinds: {{{kind}: 1}}}}"
        task = load_recipe(recipe_file, [f"output={tmp_path}/run", settings]).build_task()
        assert isinstance(task, UnifiedTask)
        assert len(only(task, "generation")[0]["images"].codes)
        scenes = EmojiScenes("train", 0, 64, 32, (kind,), lattice=8)  # type: ignore[arg-type]
        expected = encode_scenes(task.image_tokenizer, scenes, torch.device("cpu"))
        assert torch.equal(load_file(file)["codes"], expected)


def test_stages_train_what_they_name_and_export_loads(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [f"output={tmp_path}/run"])
    start = load_file(recipe_file.parent / "vision" / "vision.safetensors")
    folder = train(recipe, quiet=True)
    um = unimm.load(folder)
    trained = um.model.vision.model.state_dict()
    assert not torch.equal(trained["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    first = load_recipe(recipe_file, [f"output={tmp_path}/one", "stages[1].lr={decoder: 0.01}"])
    frozen = unimm.load(train(first, quiet=True)).model.vision.model.state_dict()
    assert torch.equal(frozen["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    assert um.draw("a star", seed=0)[0].size == (64, 64)


def test_a_run_killed_and_started_again_ends_with_the_same_weights(recipe_file: Path, tmp_path: Path) -> None:
    whole = train(load_recipe(recipe_file, [f"output={tmp_path}/whole"]), quiet=True)
    command = [sys.executable, "-m", "unimm.training.trainer", str(recipe_file), f"output={tmp_path}/cut"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums come out in another order on others
    running = subprocess.Popen(
        command, env=os.environ | threads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "cut" / "checkpoints"
    deadline = time.monotonic() + 300
    while not (checkpoints.is_dir() and any(checkpoints.glob("step-*3"))) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert running.returncode == -signal.SIGKILL, "it ended before it could be killed"
    again = train(load_recipe(recipe_file, [f"output={tmp_path}/cut"]), quiet=True)
    ours, theirs = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_starts_from_parts_of_an_earlier_one(recipe_file: Path, tmp_path: Path) -> None:
    earlier = train(load_recipe(recipe_file, [f"output={tmp_path}/run"]), quiet=True)
    trained = UniMMModel.from_pretrained(earlier).parts()
    chosen = [f"model.initialize={earlier}", "model.initialize_parts=[decoder, code_head]"]
    torch.manual_seed(1)
    module = load_recipe(recipe_file, chosen).build_task().build()
    assert isinstance(module, UniMMModel)
    same = {
        name: all(map(torch.equal, part.parameters(), trained[name].parameters()))
        for name, part in module.parts().items()
    }
    assert same == {
        "decoder": True,
        "code_head": True,
        "vision": False,
        "connector": False,
        "code_embedding": False,
    }
    other = recipe_file.parent / "other"
    sizes = ImageTokenizer.from_pretrained(recipe_file.parent / "tokenizer").config
    ImageTokenizer(sizes).save_pretrained(other)
    with pytest.raises(UserError, match="another image tokenizer than"):
        load_recipe(recipe_file, [*chosen, f"model.image_tokenizer={other}"]).build_task().build()
    with pytest.raises(UserError, match="has another decoder than this recipe"):
        load_recipe(recipe_file, [*chosen, "model.decoder.hidden_size=16"]).build_task().build()


SHARDED = {
    "plain": {},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}


def test_two_processes_take_the_steps_of_one(recipe_file: Path, tmp_path: Path) -> None:
    """With an image to understand on one process only in most steps, whatever is sharded, packed too."""
    halves = [*(f"stages[{stage}].micro_batch=2" for stage in range(2)), "checkpoint.every=9"]
    train(load_recipe(recipe_file, [f"output={tmp_path}/one", *halves]), quiet=True)
    paths = []
    for name, engine in {**SHARDED, "packed": SHARDED["zero3"]}.items():
        recipe = yaml.safe_load(recipe_file.read_text()) | engine | {"output": str(tmp_path / name)}
        for stage in recipe["stages"]:
            stage |= {"pack": {"length": 128}} if name == "packed" else {"micro_batch": 2}
        recipe["logging"] |= {"samples_every": 4}
        recipe["checkpoint"] = {"every": 9}
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(Path(__file__).parents[1] / "run_recipes.py"), *map(str, paths)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([*launcher, *program], env=os.environ | environment, check=True, capture_output=True)
    one, *others = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", *SHARDED, "packed")
    )
    train(load_recipe(tmp_path / "zero3.yaml", [f"output={tmp_path}/alone"]), quiet=True)
    alone = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    for other in (*others, alone):
        for mine, theirs in zip(one, other, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    whole = load_file(tmp_path / "one" / "export" / "model.safetensors")
    for run in (*SHARDED, "packed"):
        state = load_file(tmp_path / run / "export" / "model.safetensors")
        assert state.keys() == whole.keys()
        assert (tmp_path / run / "samples" / "000004.png").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.vision=nowhere", "nowhere: no export of a siglip run"),
        ("model.image_tokenizer=nowhere", "model.image_tokenizer: nowhere holds no image tokenizer"),
        ("model.initialize=nowhere", "model.initialize: nowhere holds no exported model"),
        (
            "stages[0].mixture={images: 1}",
            r"stages\[0\].mixture.images: no source has this name; one of emojiscenes, emojiscenes/under",
        ),
        ("stages[0].options={dropout: 1}", "options: dropout: unknown key"),
        (
            "stages[0].options={emojiscenes: {kinds: {single: 0}}}",
            r"stages.one.options: emojiscenes.kinds: expected a share above 0",
        ),
        ("data.emojiscenes.kinds={pair: 0}", r"data\.emojiscenes\.kinds: expected a share above 0"),
        (
            "stages[0].options={emojiscenes: {kinds: {triple: 1}}}",
            "kinds.triple: expected one of single, pair",
        ),
        (
            "data.sources={emojiscenes/text: {path: x}}",
            "data.sources.emojiscenes/text: this names built-in scenes; give it another name",
        ),
        ("model.merge=x", 'model.merge: expected an integer, got "x"'),
    ],
)
def test_bad_recipes_are_named(recipe_file: Path, tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        train(load_recipe(recipe_file, [f"output={tmp_path}", override]), quiet=True)


@pytest.mark.parametrize("damage", ["whole", "missing", "nan", "misshapen"])
def test_a_broken_language_model_is_not_trained_from(tmp_path: Path, recipe_file: Path, damage: str) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "nan":
        weights[name][0, 0] = float("nan")
    elif damage == "misshapen":
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    task = load_recipe(recipe_file, [f"model.weights={{decoder: {tmp_path}}}"]).build_task()
    if damage == "whole":
        model = task.build()
        assert torch.equal(model.get_parameter(f"decoder.{name}"), weights[name])
        return
    with pytest.raises(UserError, match=rf"model.weights.decoder: {tmp_path}: .*") as caught:
        task.build()
    assert "\n" not in str(caught.value)
    assert damage == "misshapen" or name in str(caught.value)


# --- data is what a recipe names, and nothing else ----------------------------------------------------------


def published(folder: Path, recipe_file: Path, **changes: Any) -> Path:
    """A recipe as the published ones are, on tiny parts: sources of one's own by the names of what they are for."""
    images, texts = forms.image_folder(folder / "images", 6), folder / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a red apple"}) + "\n")
    shipped = yaml.safe_load(find_recipe("janus-pro-1b").read_text())
    paths = {"understanding": images, "text": texts, "generation": images}
    for name, source in shipped["data"]["sources"].items():
        source["path"] = str(paths[name])
    recipe = yaml.safe_load(recipe_file.read_text()) | {"output": str(folder / "run")}
    recipe["data"] = shipped["data"]
    recipe["stages"][1]["options"] = {}
    for stage, theirs in zip(recipe["stages"], shipped["stages"], strict=False):
        stage["mixture"] = theirs["mixture"]
    recipe["logging"]["samples_every"] = 2
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
    return folder / "recipe.yaml"


def test_a_recipe_that_names_no_scenes_never_reads_them(recipe_file: Path, tmp_path: Path) -> None:
    """Not at import, not for a sample, not in a preview."""
    path = published(tmp_path, recipe_file)
    program = (
        "import sys\nfrom unimm.training.recipe import load_recipe\nfrom unimm.training.trainer import train\n"
        f"train(load_recipe({str(path)!r}), quiet=True)\n"
        "print(sorted(name for name in sys.modules if name.startswith('unimm.data.emojiscenes.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(
        [f"unimm.data.emojiscenes.{name}" for name in ("augment", "settings")]
    )
    names = {path.name for path in (tmp_path / "run/samples").iterdir()}
    assert "trained-on.jsonl" in names and "captions.jsonl" not in names
    assert not (tmp_path / "run/codes.safetensors").exists()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("kind", ["understanding", "text", "generation"])
def test_a_kind_of_data_without_a_source_is_refused(
    recipe_file: Path, tmp_path: Path, kind: str, small: bool
) -> None:
    """Where nobody has said so, no scenes are trained on; with `--smoke` neither."""
    read = smoke_recipe if small else load_recipe
    recipe = read(recipe_file, [f"output={tmp_path}", f"stages[1].mixture={{{kind}: 1}}"])
    line = (
        rf"stages\[1\]\.mixture\.{kind}: no source has this name; write emojiscenes/{kind} for the built-in scenes, "
        rf"or give your data as data\.sources\.{kind}$"
    )
    with pytest.raises(UserError, match=line):
        recipe.build_task()


def test_a_recipe_without_data_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [f"output={tmp_path}", "stages[1].mixture={}"])
    with pytest.raises(
        UserError, match=r"stages\[1\]\.mixture: no data; give data\.sources, or \{emojiscenes: 1\}"
    ):
        recipe.build_task()
    small = smoke_recipe(recipe_file, [f"output={tmp_path}", "stages[1].mixture={}"])
    assert small.stages[1].mixture == {"emojiscenes": 1}


def test_a_recipe_without_mixtures_trains_on_all_its_sources(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(published(tmp_path, recipe_file), ["stages[0].mixture={}"])
    assert recipe.mixture(recipe.stages[0]) == {  # type: ignore[attr-defined]
        "understanding": 1, "text": 1, "generation": 1,
    }  # fmt: skip
