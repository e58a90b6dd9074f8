"""The commands that use a model, run on a tiny random one: what they print, write and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimm.console import printable
from unimm.errors import UserNote
from unimm.loading import load


def test_caption_of_one_image_is_a_plain_line(unimm, tiny: Path, image: Path) -> None:
    done = unimm("caption", image, "--model", tiny, "--max-new-tokens", 8)
    assert (done.code, done.err) == (0, "")
    assert done.out == printable(load(tiny).caption(image, max_new_tokens=8)) + "\n"


def test_captions_as_json_are_one_document(unimm, tiny: Path, image: Path) -> None:
    options = ["--model", tiny, "--max-new-tokens", 8]
    done = unimm("caption", image, "--json", image, *options)  # options may stand in between
    caption = load(tiny).caption(image, max_new_tokens=8)
    assert done.code == 0
    assert json.loads(done.out) == [{"image": str(image), "caption": caption, "cut": True}] * 2


def test_ask_takes_several_images_and_one_question(unimm, tiny: Path, image: Path) -> None:
    options = ["--json", "--model", tiny, "--max-new-tokens", 8]
    done = unimm("ask", image, image, "what is this?", *options)
    answer = load(tiny).ask([[image, image]], ["what is this?"], max_new_tokens=8)[0]
    assert json.loads(done.out) == {
        "images": [str(image)] * 2,
        "question": "what is this?",
        "answer": answer,
        "cut": True,
    }


def test_ask_takes_a_question_alone(unimm, tiny: Path) -> None:
    done = unimm("ask", "what is this?", "--model", tiny, "--max-new-tokens", 8)
    answer = load(tiny).ask(None, "what is this?", max_new_tokens=8)
    assert (done.code, done.err, done.out) == (0, "", printable(answer) + "\n")


def test_an_answer_that_the_context_cuts_is_noted(unimm, tiny: Path, image: Path) -> None:
    done = unimm("caption", image, "--model", tiny)
    assert done.code == 0 and done.out
    assert done.err == "unimm: note: 1 of 1 answers were cut where the context of 128 tokens ends\n"


def test_draw_writes_n_of_each_prompt(unimm, tiny: Path, tmp_path: Path) -> None:
    prompts = ["a red apple", "what?"]
    done = unimm("draw", *prompts, "-n", 2, "--seed", 7, "-o", tmp_path / "new", "--json", "--model", tiny)
    rows = json.loads(done.out)
    assert [(row["prompt"], row["seed"], row["index"]) for row in rows] == [
        ("a red apple", 7, 0), ("a red apple", 7, 1), ("what?", 7, 2), ("what?", 7, 3)
    ]  # fmt: skip
    for row, drawing in zip(rows, load(tiny).draw(prompts, n=2, seed=7), strict=True):
        with Image.open(row["image"]) as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(drawing))
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_draw_without_a_seed_tells_the_one_it_took(unimm, tiny: Path, tmp_path: Path) -> None:
    row = json.loads(unimm("draw", "hi", "-o", tmp_path, "--json", "--model", tiny).out)[0]
    again = load(tiny).draw(["hi"], seed=row["seed"])[0]
    with Image.open(row["image"]) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(again))


def test_draw_passes_its_options_on(unimm, tiny: Path, tmp_path: Path) -> None:
    options = ["--guidance-scale", 2, "--temperature", 0, "--top-k", 3, "--top-p", 0.9, "--size", "32x32"]
    row = json.loads(unimm("draw", "hi", "-o", tmp_path, "--json", "--model", tiny, *options).out)[0]
    greedy = load(tiny).draw(["hi"], guidance_scale=2, temperature=0)[0]
    with Image.open(row["image"]) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(greedy))


def test_draw_from_images(unimm, tiny: Path, tmp_path: Path, image: Path) -> None:
    options = ["--image", image, "--image", image, "--seed", 7, "-o", tmp_path / "new", "--model", tiny]
    done = unimm("draw", "hi", "what?", *options, "--json")
    assert done.code == 0 and done.err.startswith("unimm: note: images: ") and done.err.count("\n") == 1
    with pytest.warns(UserNote):
        drawings = load(tiny).draw(["hi", "what?"], images=[[image] * 2] * 2, seed=7)
    for row, drawing in zip(json.loads(done.out), drawings, strict=True):
        with Image.open(row["image"]) as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(drawing))


def test_int8_weights(unimm, tiny: Path, image: Path, tmp_path: Path) -> None:
    small = load(tiny, quantize="int8")
    options = ["--model", tiny, "--quantize", "int8"]
    short = ["--max-new-tokens", 8]
    caption, answer = small.caption(image, 8), small.ask(image, "what?", 8)
    assert unimm("caption", image, *options, *short).out == printable(caption) + "\n"
    assert unimm("ask", image, "what?", *options, *short).out == printable(answer) + "\n"
    row = json.loads(unimm("draw", "hi", "--seed", 7, "-o", tmp_path, "--json", *options).out)[0]
    with Image.open(row["image"]) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(small.draw(["hi"], seed=7)[0]))


def test_info_tells_parts_and_parameters(unimm, tiny: Path) -> None:
    document = json.loads(unimm("info", tiny, "--json").out)
    model = load(tiny).model
    assert document["parameters"]["decoder"] == sum(p.numel() for p in model.decoder.parameters())
    assert document["context"] == 128
    assert document["draws"] == "32x32"
    assert "parameters.decoder" in unimm("info", tiny).out


def test_demo_writes_its_sheet(unimm, tiny: Path, tmp_path: Path) -> None:
    done = unimm("demo", "-o", tmp_path / "out", "--model", tiny, "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert {row["split"] for row in report["captions"]} == {"seen", "vendor"}
    assert all(row["right"] == (row["answer"] == row["truth"]) for row in report["answers"])
    with Image.open(report["sheet"]) as sheet:
        assert sheet.width > 1000


# --- mistakes: one line on stderr, nothing on stdout, status 2 ----------------------------------------------


def refused(done, words: str) -> None:
    """Check that a run was refused on one line that has these words."""
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("unimm: ")
    assert done.err.count("\n") == 1
    assert words in done.err


def test_images_are_checked_before_the_model(unimm, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("just some words")
    refused(unimm("caption", tmp_path / "nothing.png", "--model", "no/model"), "nothing.png: no such file")
    refused(unimm("ask", tmp_path / "words.png", "what?", "--model", "no/model"), "words.png: not an image")


def test_question_that_is_a_file_was_forgotten(unimm, image: Path) -> None:
    refused(unimm("ask", image, image), "after the images comes a question")
    refused(unimm("ask", "missing.png"), "after the images comes a question")
    refused(unimm("ask", image), "after the images comes a question")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", ""], "prompt: empty"),
        (["a", "word " * 100], "prompt: "),
        (["a", "--guidance-scale", "nan"], "guidance_scale: nan"),
        (["a", "--guidance-scale", "inf"], "guidance_scale: inf"),
        (["a", "--temperature", "-1"], "temperature: -1"),
        (["a", "--top-p", "0"], "top_p: 0"),
        (["a", "--top-k", "-1"], "top_k: -1"),
        (["a", "--size", "64"], "--size: expected WIDTHxHEIGHT"),
        (["a", "--size", "60x32"], "give multiples of 8, such as 32x32"),
        (["a", "--seed", "-3"], "seed: negative"),
        (["a", "-n", "0"], "expected a whole number of at least 1"),
        (["a", "--device", "abacus"], "device: 'abacus'"),
        (["a", "--dtype", "int3"], "dtype: 'int3'"),
        (["a", "--quantize", "int3"], "quantize: 'int3'; use int8 or int4"),
        (["a", "--image", "nothing.png"], "nothing.png: no such file"),
        (["a", "--colour"], "there is no option --colour"),
        ([], "required: PROMPT"),
    ],
)
def test_draw_refuses(unimm, tiny: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    refused(unimm("draw", *arguments, "-o", tmp_path / "out", "--model", tiny), words)


def test_folder_that_is_a_file(unimm, tiny: Path, image: Path) -> None:
    refused(unimm("draw", "a", "-o", image, "--model", tiny), "apple.png: cannot be used as a folder")
    refused(unimm("demo", "-o", image, "--model", tiny), "apple.png: cannot be used as a folder")


def test_model_that_is_broken(unimm, tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(unimm("draw", "a", "-o", tmp_path, "--model", broken), "model.safetensors: truncated")
    weights.unlink()
    refused(unimm("draw", "a", "-o", tmp_path, "--model", broken), "model.safetensors: missing")
    refused(unimm("info", tmp_path / "nowhere"), "nowhere: no such folder")


def test_note_of_an_animation_goes_to_stderr(unimm, tiny: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    done = unimm("caption", tmp_path / "a.gif", "--json", "--model", tiny, "--max-new-tokens", 8)
    assert done.code == 0
    assert done.err == f"unimm: note: {tmp_path / 'a.gif'}: has 2 frames; only the first is used\n"
    assert len(json.loads(done.out)) == 1


def test_a_plan_is_a_table_or_a_document(unimm) -> None:
    arguments = ("plan", "training/emu3", "--gpus", 256, "--memory", 4)
    document = json.loads(unimm(*arguments, "--json").out)
    stage = document["stages"][0]
    assert stage["trained"] == document["parameters"]["decoder"] > 8e9
    assert (stage["chosen"], stage["fits"]) == ("zero3", [])
    shown = unimm(*arguments).out
    assert "pretraining: zero3 takes more than 4 GiB" in shown and "days on 256 GPUs at 40%" in shown


def test_plans_that_make_no_sense_are_refused(unimm) -> None:
    done = unimm("plan", "training/siglip", "--gpus", 8, "--memory", 80)
    assert (done.code, "task: expected unified, got siglip" in done.err) == (2, True)
    done = unimm("plan", "training/emu3", "--gpus", 8, "--memory", 80, "--utilisation", 2)
    assert (done.code, "--utilisation: expected a share" in done.err) == (2, True)


def test_report_names_a_folder_that_is_no_run(unimm, tmp_path: Path) -> None:
    done = unimm("report", tmp_path)
    assert (done.code, "metrics.jsonl: not found" in done.err) == (2, True)
