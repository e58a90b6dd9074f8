"""The user's object: the same answer however it is asked, saved and loaded to the bit, and one line for bad input."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unimm
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.errors import UserError, UserNote
from unimm.loading import describe, load_processor
from unimm.locate import embedded_model, locate
from unimm.models.inputs import Images
from unimm.pipeline import UniMM

PROMPTS = [
    "apple",
    "a red apple",
    "a red apple on a blue background",
    "there is a red apple on a blue background",
    "this is a red apple and the background is blue, blue as can be",
]


def make_images(count: int = 5) -> list[Image.Image]:
    return [Image.fromarray(EmojiScenes("train")[i].render()) for i in range(count)]


def test_a_batch_draws_what_each_prompt_draws_alone(tiny_model: UniMM) -> None:
    seeds = [3, 1, 4, 1, 5]
    images, codes = tiny_model.draw(PROMPTS, seed=seeds, return_codes=True)
    assert len(images) == 5 and codes.shape == (5, 4, 4)
    for i, prompt in enumerate(PROMPTS):
        image, alone = tiny_model.draw(prompt, seed=[seeds[i]], return_codes=True)
        assert torch.equal(alone[0], codes[i])
        assert image[0].tobytes() == images[i].tobytes()


def test_small_batches_draw_the_same(tiny_model: UniMM) -> None:
    _, whole = tiny_model.draw(PROMPTS, n=2, seed=9, return_codes=True)
    assert torch.equal(tiny_model.draw_codes(PROMPTS, n=2, seed=9), whole)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        tiny_model.draw(PROMPTS, temprature=0)  # type: ignore[call-arg]
    parts = UniMM(tiny_model.model, tiny_model.processor, batch_size=3)
    _, split = parts.draw(PROMPTS, n=2, seed=9, return_codes=True)
    assert torch.equal(whole, split)


def test_seeds_and_drawings_differ(tiny_model: UniMM) -> None:
    _, codes = tiny_model.draw("a red apple", n=4, seed=0, return_codes=True)
    assert len({tuple(code.flatten().tolist()) for code in codes}) == 4
    _, greedy = tiny_model.draw("a red apple", n=2, temperature=0, return_codes=True)
    assert torch.equal(greedy[0], greedy[1])


def test_guidance_of_one_is_the_conditional_distribution(tiny_model: UniMM) -> None:
    model, processor = tiny_model.model, tiny_model.processor
    _, codes = tiny_model.draw("a red apple", guidance_scale=1.0, temperature=0, return_codes=True)
    ids = torch.tensor([processor.drawing_ids("a red apple") + processor.layout.drawing_steps()])
    with torch.no_grad():
        hidden = model.decode(model.embed(ids, Images(codes=codes)).stream).last_hidden_state
        again = model.code_logits(hidden[0, -17:-1]).argmax(-1)
    assert torch.equal(again, codes.flatten())  # one forward over all codes agrees with the cache


def test_guided_rows_agree_with_a_forward_without_cache(tiny_model: UniMM) -> None:
    model, processor = tiny_model.model, tiny_model.processor
    _, codes = tiny_model.draw("a red apple", guidance_scale=3.0, temperature=0, return_codes=True)
    prompt = processor.drawing_ids("a red apple")
    rows = [row + processor.layout.drawing_steps() for row in (prompt, processor.unconditional_ids(prompt))]
    with torch.no_grad():
        stream = model.embed(torch.tensor(rows), Images(codes=codes.repeat(2, 1, 1))).stream
        conditional, unconditional = model.code_logits(model.decode(stream).last_hidden_state[:, -17:-1])
    assert torch.equal((unconditional + 3 * (conditional - unconditional)).argmax(-1), codes.flatten())


def test_captions_and_answers_of_a_batch_equal_those_one_by_one(tiny_model: UniMM) -> None:
    images = make_images()
    assert tiny_model.caption(images, 8) == [tiny_model.caption(image, 8) for image in images]
    questions = [
        "what?",
        "what is this?",
        "is it red?",
        "what is this red thing?",
        "how many are on the blue background?",
    ]
    assert tiny_model.ask(images, questions, 8) == [
        tiny_model.ask(i, q, 8) for i, q in zip(images, questions, strict=True)
    ]


def test_shapes_of_questions(tiny_model: UniMM) -> None:
    images = make_images(3)
    assert isinstance(tiny_model.ask(images[0], "what?", 8), str)
    assert len(tiny_model.ask(images[0], ["what?", "why?"], 8)) == 2
    assert len(tiny_model.ask(images, "what?", 8)) == 3
    assert (
        len(tiny_model.ask([images[:2], images[2]], ["same?", "what?"], 8)) == 2
    )  # two images in one question
    with pytest.raises(UserError, match="2 questions for 3 images"):
        tiny_model.ask(images, ["what?", "why?"])
    with pytest.raises(UserError, match="question: empty"):
        tiny_model.ask(images[0], " ")


def test_saved_and_loaded_to_the_bit(tiny_model: UniMM, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "saved")
    again = unimm.load(tmp_path / "saved")
    images = make_images(2)
    assert again.caption(images, 8) == tiny_model.caption(images, 8)
    ours, ours_codes = tiny_model.draw(PROMPTS, seed=1, return_codes=True)
    theirs, their_codes = again.draw(PROMPTS, seed=1, return_codes=True)
    assert torch.equal(ours_codes, their_codes)
    assert [i.tobytes() for i in ours] == [i.tobytes() for i in theirs]
    inputs = tiny_model.processor(["what?"], [[images[0]]])
    with torch.no_grad():
        assert torch.equal(tiny_model.model(**inputs).logits, again.model(**inputs).logits)


def test_image_tokenizer_contract(tiny_model: UniMM) -> None:
    pixels = tiny_model.processor.drawing_pixels(make_images(2))
    codes = tiny_model.image_tokenizer.encode(pixels)
    assert codes.shape == (2, 4, 4) and codes.dtype == torch.int64
    decoded = tiny_model.image_tokenizer.decode(codes)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1


def test_describe_needs_no_weights(tiny_model: UniMM, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    said = describe(tmp_path)
    assert said["family"] == "unimm" and said["can"] == ["caption", "ask", "chat", "draw"]
    codebook = tiny_model.image_tokenizer.quantize.codebook.numel()  # a buffer, but trained
    assert said["parameters_total"] == codebook + sum(p.numel() for p in tiny_model.model.parameters())


@pytest.fixture
def broken(tiny_model: UniMM, tmp_path: Path) -> Path:
    tiny_model.save(tmp_path)
    return tmp_path


def test_missing_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: missing"):
        unimm.load(broken)


@pytest.mark.parametrize("keep", [4, 100, 5000])
def test_truncated_weights(broken: Path, keep: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: truncated or damaged"):
        unimm.load(broken)


def test_missing_shard(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: missing"):
        unimm.load(broken)


def test_sources_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        unimm.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json: not found"):
        unimm.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type: 'llama' is not supported; known are unimm"):
        unimm.load(tmp_path)
    with pytest.raises(UserError, match="dtype: 'int3'"):
        unimm.devices.choose_dtype("int3", torch.device("cpu"))
    with pytest.raises(UserError, match="device: 'gpu'"):
        unimm.devices.choose_device("gpu")


def test_embedded_names_the_embedded_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        locate("embedded").folder
        == locate(Path("embedded")).folder
        == locate(None).folder
        == embedded_model()
    )
    assert describe("embedded") == describe() and describe()["source"] == "embedded"
    assert load_processor("embedded").image_size == load_processor().image_size
    Path("embedded").touch()  # a file is no model
    assert locate("embedded").folder == embedded_model()
    Path("embedded").unlink()
    Path("embedded").symlink_to(tiny)  # a folder comes first
    assert locate("embedded").folder == Path("embedded") != embedded_model()
    assert describe("embedded")["context"] == describe(tiny)["context"] != describe()["context"]


def test_other_sizes_are_drawn_and_said_to_be_outside_training(tiny_model: UniMM) -> None:
    assert tiny_model.draw("a red apple", size=(32, 32), seed=0)[0].size == (32, 32)
    with pytest.warns(UserNote, match="size: 64x32 is outside what this model was trained on"):
        images, codes = tiny_model.draw("a red apple", size=(64, 32), seed=0, return_codes=True)
    assert images[0].size == (64, 32) and codes.shape == (1, 4, 8)
    with pytest.raises(UserError, match="size: 60x32; give multiples of 8, such as 32x32"):
        tiny_model.draw("a red apple", size=(60, 32))


def test_saving_removes_the_weights_of_what_was_there(tiny_model: UniMM, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (tmp_path / "model-1.safetensors").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    tiny_model.save(tmp_path)
    assert not list(tmp_path.glob("*index*")) and not (tmp_path / "model-1.safetensors").exists()
    assert (tmp_path / "notes.txt").exists()
    assert unimm.load(tmp_path).draw("a red apple", seed=0)


def test_a_full_disk_leaves_the_old_folder_whole(tiny_model: UniMM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model.save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # writes past 2,000 bytes fail, as on a full disk
    try:
        with pytest.raises(UserError, match="cannot be written"):
            tiny_model.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


class _NoFloat64(TorchDispatchMode):
    """Refuses what Apple's GPUs do not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), func
        return result


def test_nothing_needs_float64(tiny_model: UniMM) -> None:
    image = Image.new("RGB", (80, 50), "teal")
    with _NoFloat64():
        tiny_model.caption([image, image], 8)
        tiny_model.ask(image, "what is this?", 8)
        tiny_model.draw(["a star", "a red apple on blue"], guidance_scale=3.0, top_k=20, top_p=0.9, seed=1)
    with pytest.raises(AssertionError), _NoFloat64():
        torch.ones(2, dtype=torch.float32).double()
