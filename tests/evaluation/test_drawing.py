"""Drawing protocols on twins: folders as the official code has them, judges of every kind, and lost drawings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.conftest import Score
from tests.judge_server import judge_server
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.evaluation.drawing import crops_of_grid, grid_of_images
from unimm.evaluation.judging import frechet_distance

pytestmark = pytest.mark.filterwarnings("ignore:.*no checksum of its data:unimm.errors.UserNote")
QUICK = ("drawing.temperature=0.0", "drawing.guidance_scale=1.0")


def same(document: Mapping[str, Any]) -> dict[str, Any]:
    """A result without its times."""
    return {name: value for name, value in document.items() if name != "run"}


def test_geneval_is_drawn_in_its_folders_and_judged_by_rules(score: Score, tmp_path: Path) -> None:
    own = (
        "drawing.samples=2",
        "drawing.guidance_scale=2.0",
        "drawing.temperature=0.5",
        "judge.kind=emojiscenes",
    )
    found = score("geneval", *own, limit=4)
    folder = tmp_path / "out" / "images"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == [
        f"{prompt:05}/samples/{sample:05}.png" for prompt in range(4) for sample in range(2)
    ]
    metadata = json.loads((folder / "00001" / "metadata.jsonl").read_text())
    assert metadata["prompt"] == found["items"][1]["prompt"] and metadata["tag"] == "counting"
    assert [seed for line in found["items"] for one in line["images"] for seed in one["seeds"]] == list(
        range(8)
    )
    images = [one["score"] for line in found["items"] for one in line["scored"]]
    assert found["figures"]["images"]["value"] == pytest.approx(np.mean(images))
    assert found["figures"]["overall"]["value"] > 0 and found["judge"]["kind"] == "emojiscenes"
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "out" / "judge.safetensors", tmp_path / "other")  # fitted once
    other = score("geneval", *own, "drawing.seed=100", output="other", limit=4)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "out"), str(tmp_path / "other"), "-o", str(page)]) == 0
    differing = sum(
        np.mean([one["score"] for one in a["scored"]]) != np.mean([one["score"] for one in b["scored"]])
        for a, b in zip(found["items"], other["items"], strict=True)
    )
    assert page.read_text().count("<img ") == 4 * differing > 0
    (folder / "00002" / "samples" / "00001.png").unlink()  # it is drawn again, the same
    assert same(score("geneval", *own, batch_size=3, limit=4)) == same(found)
    assert main(["eval", "--check", str(tmp_path / "out")]) == 0
    Image.new("RGB", (64, 64)).save(folder / "00002" / "samples" / "00001.png")
    with pytest.raises(UserError, match=r"item 2: .*00001.png: is another image than was drawn"):
        score("geneval", *own, limit=4)


def test_official_output_is_the_judge(score: Score, tiny: Path, tmp_path: Path) -> None:
    model = str(tiny)
    drawn = score("geneval", *QUICK, "drawing.samples=2", model=model)
    assert drawn == {"drawn": str(tmp_path / "out" / "images"), "images": 12}
    rows = [
        {
            "filename": f"x/{prompt:05}/samples/{sample:05}.png",
            "correct": (prompt + sample) % 3 == 0,
            "reason": "r",
        }
        for sample in range(2)
        for prompt in range(6)
    ]
    judged = tmp_path / "results.jsonl"
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score("geneval", *QUICK, "drawing.samples=2", model=model, judged=judged)
    assert found["figures"]["images"]["value"] == pytest.approx(4 / 12) and found["judge"]["kind"] == "file"
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(UserError, match=r"says nothing of 00005/samples/00001.png"):
        score("geneval", *QUICK, "drawing.samples=2", model=model, judged=judged)
    elsewhere = tmp_path / "out" / "images"
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = score("geneval", "drawing.samples=2", drawn=elsewhere, judged=judged, output="elsewhere")
    assert again["figures"] == found["figures"]
    (elsewhere / "00000" / "samples" / "00000.png").unlink()
    with pytest.raises(UserError, match=r"item 0: .*00000.png: no such image"):
        score("geneval", "drawing.samples=2", drawn=elsewhere, judged=judged, output="missing")


def test_dpg_and_geneval2_are_judged_by_one_of_our_models(score: Score, tmp_path: Path) -> None:
    found = score("dpg", *QUICK, "judge.kind=model", 'judge.prompt="{question}"')
    images = sorted((tmp_path / "out" / "images").glob("*.png"))
    assert [path.name for path in images] == ["item0.png", "item1.png", "item2.png"]
    assert Image.open(images[0]).size == (128, 128)
    for line in found["items"]:
        assert 0 <= line["scored"]["score"] <= 1 and len(line["scored"]["questions"]) == 2
    mean = np.mean([line["scored"]["score"] for line in found["items"]])
    assert found["figures"]["dpg"]["value"] == pytest.approx(100 * mean)
    assert len(found["judge"]["version"]) == 64
    journal = tmp_path / "out" / "judged-0.jsonl"
    before = journal.read_bytes()
    assert same(score("dpg", *QUICK, "judge.kind=model", 'judge.prompt="{question}"')) == same(found)
    assert journal.read_bytes() == before  # nobody was asked again
    atoms = score("geneval2", *QUICK, "judge.kind=model", output="atoms")
    assert all(set(line["scored"]["atoms"]) <= {0.0, 1.0} for line in atoms["items"])


def test_compbench_and_wise_take_their_scripts_output(score: Score, tiny: Path, tmp_path: Path) -> None:
    score("t2i-compbench", *QUICK, "drawing.samples=2", model=str(tiny))
    names = sorted(path.name for path in (tmp_path / "out" / "images" / "samples").iterdir())
    assert sorted(name[-10:-4] for name in names) == [f"{n:06}" for n in range(6)]
    assert all(', "plain"_' in name for name in names)
    judged = tmp_path / "vqa_result.json"
    judged.write_text(json.dumps([{"question_id": n, "answer": str(n / 10)} for n in range(6)]))
    found = score("t2i-compbench", *QUICK, "drawing.samples=2", model=str(tiny), judged=judged)
    assert found["figures"]["score"]["value"] == pytest.approx(0.25)
    marks = tmp_path / "scores.jsonl"
    rows = [
        {"prompt_id": n, "consistency": 2, "realism": 1, "aesthetic_quality": 0}
        for n in (1, 401, 568, 701, 801, 901)
    ]
    marks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score("wise", *QUICK, model=str(tiny), judged=marks, output="wise")
    assert found["figures"]["wiscore"]["value"] == pytest.approx(0.8)
    assert (tmp_path / "wise" / "images" / "401.png").is_file()


def test_distance_of_features(score: Score, tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(500, 4)), rng.normal(1.0, 2.0, size=(400, 4))
    first, second = np.cov(ours.T), np.cov(theirs.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ second @ root)).sum()  # of the same trace, by another way
    wanted = ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * middle
    assert frechet_distance(ours, theirs) == pytest.approx(wanted, abs=1e-9)
    np.savez(tmp_path / "features.npz", drawn=ours[:6], reference=theirs)
    found = score("mjhq", *QUICK, model=str(tiny), judged=tmp_path / "features.npz")
    assert found["figures"]["fid"]["value"] == pytest.approx(frechet_distance(ours[:6], theirs))
    np.savez(tmp_path / "features.npz", drawn=ours[:5], reference=theirs)
    with pytest.raises(UserError, match="features of 5 images; give one row for each drawing"):
        score("mjhq", *QUICK, model=str(tiny), judged=tmp_path / "features.npz")


def test_clip_scores_by_a_clip_of_transformers(score: Score, tiny: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    torch.manual_seed(0)
    words = {
        "<|startoftext|>": 0,
        "<|endoftext|>": 1,
        **{f"{letter}</w>": 2 + n for n, letter in enumerate("abcde")},
    }
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 16, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pixels, tokenizer).save_pretrained(tmp_path / "clip")
    found = score("clipscore", *QUICK, f"judge.model={tmp_path / 'clip'}", model=str(tiny))
    for line in found["items"]:
        (one,) = line["scored"]
        assert -1 <= one["cosine"] <= 1 and one["score"] == pytest.approx(2.5 * max(one["cosine"], 0))
    with pytest.raises(UserError, match=r"judge.model: .*nowhere: no CLIP of transformers"):
        score("clipscore", *QUICK, f"judge.model={tmp_path / 'nowhere'}", model=str(tiny), output="none")


def test_grids_are_cut_into_what_they_were_made_of() -> None:
    images = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(4)]
    grid = grid_of_images(images)
    assert grid.size == (16, 16) and grid.getpixel((9, 1)) == (40, 0, 0)  # the second is right of the first
    assert [crop.getpixel((3, 3)) for crop in crops_of_grid(grid, 4)] == [(40 * n, 0, 0) for n in range(4)]


# --- a judge behind a URL -------------------------------------------------------------------------------------


def judge_of(url: str, *more: str) -> tuple[str, ...]:
    """The judge of a run."""
    prompt = 'judge.prompt="{question} | {answer} | {said} |"'
    return (f"judge.url={url}", "judge.model=m", "judge.version=judge-1", prompt, "judge.timeout=0.4", *more)


def test_a_judge_behind_a_url_is_asked_word_for_word(
    score: Score, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.evaluation.judges.FIRST_WAIT", 0.0)
    with judge_server(503, "0.5 I think", "0.5") as (url, asked):
        found = score("mmvet", *judge_of(url), model=str(tiny))
    assert found["figures"]["total"]["value"] == pytest.approx(50)
    assert found["figures"]["know"]["value"] == pytest.approx(50)
    assert len(asked) == 13 and {one["temperature"] for one in asked} == {0}
    texts = {one["messages"][0]["content"][0]["text"] for one in asked}
    for line in found["items"]:
        assert f"{line['prompt']} | {line['fields']['answer']} | {line['answer']} |" in texts
    assert {line["scored"]["said"] for line in found["items"]} == {"0.5 I think", "0.5"}
    assert found["judge"]["version"] == "judge-1"


@pytest.mark.parametrize(
    ("replies", "line"),
    [
        ((None,), r"did not answer within 0.4 s \(2 tries\); nothing was scored for it"),
        (("well done",), r"said 'well done', which no rule reads \(2 tries\)"),
        (("1.7",), "said '1.7', which no rule reads"),
        (
            ("0.5", ("0.5", "judge-2")),
            "is judge-2 now, and was to be judge-1; scores of two judges are not mixed",
        ),
        ((500,), "answers with 500"),
        ((401,), r"refuses \(401"),
    ],
)
def test_a_judge_that_fails_ends_the_run_in_one_line(
    score: Score,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replies: tuple[Any, ...],
    line: str,
) -> None:
    monkeypatch.setattr("unimm.evaluation.judges.FIRST_WAIT", 0.0)
    with judge_server(*replies) as (url, _), pytest.raises(UserError, match=line) as raised:
        score("mmvet", *judge_of(url, "judge.retries=1"), model=str(tiny))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_judge_that_cannot_be_asked_is_said_before_anything_is_done(
    score: Score, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"judge.url: give the address of a judge"):
        score("mmvet", model=str(tiny))
    with pytest.raises(UserError, match=r"mmvet: judge.prompt: missing"):
        score("mmvet", "judge.url=http://127.0.0.1:9/v1", model=str(tiny))
    assert not (tmp_path / "out").exists()
