"""Batch jobs: what they say and draw is what the model says and draws alone, in every form of source and output."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unimm
from tests.data import forms
from tests.system_calls import contents
from unimm.data.check import check_source
from unimm.data.sources import BadRecord, open_source
from unimm.errors import UserError
from unimm.jobs.items import JobItems
from unimm.jobs.recipe import AnyJob, load_job
from unimm.jobs.run import run_job
from unimm.pipeline import UniMM
from unimm.recipes import recipe_root

FORMATS = ("jsonl", "parquet", "webdataset")


@pytest.fixture(scope="module")
def um(tiny: Path) -> UniMM:
    return unimm.load(tiny, device="cpu")


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(task: str, model: Path, source: Path, folder: object, *overrides: str) -> AnyJob:
    """A shipped recipe, for the tiny model."""
    given = [
        f"model={model}",
        f"source.path={source}",
        f"output.folder={folder}",
        "output.shard=3",
        "device=cpu",
    ]
    short = [] if task == "draw" else ["options.max_new_tokens=5"]
    return load_job(recipe_root() / "sampling" / f"{task}.yaml", [*given, *short, *overrides])


def rows(path: Path, data: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def read_back(folder: Path, form: str) -> list[dict[str, Any]]:
    """The rows of a job's output, their images decoded."""
    if form == "jsonl":
        lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
        found = [json.loads(line) for line in lines]
        for row in found:
            row["image"] = Image.open(folder / row["image"]).convert("RGB")
        return found
    source = open_source(folder)
    found = []
    for index in range(len(source)):
        entry = source.entry(index)  # type: ignore[attr-defined]
        images = entry.row.get("images") or [entry.row["image"]]
        record = source[index]
        assert len(record.images()) == len(images)
        found.append({**entry.row, "image": record.images()[0].image()})
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_drawings_are_those_of_their_seeds(form: str, um: UniMM, tiny: Path, tmp_path: Path) -> None:
    prompts = ["a red apple", "what is this?", "apple on blue", "a blue background"]
    source = rows(tmp_path / "p.jsonl", [{"id": f"p{i}", "prompt": one} for i, one in enumerate(prompts)])
    job = recipe("draw", tiny, source, "out", f"output.format={form}", "options.n=2", "seed=5")
    done = run_job(job)
    assert (done["items"], done["written"], done["bad"], done["files"]) == (4, 8, 0, 2)
    found = read_back(tmp_path / "out", form)
    assert [(row["key"], row["prompt"], row["seed"]) for row in found] == [
        (f"p{i}-{place}", prompt, 5 + 2 * i + place) for i, prompt in enumerate(prompts) for place in range(2)
    ]
    for row in found:
        assert list(row["image"].getdata()) == list(um.draw(row["prompt"], seed=row["seed"])[0].getdata())


@pytest.mark.parametrize("form", FORMATS)
def test_captions_are_those_of_the_images(form: str, um: UniMM, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(forms.encoded(forms.SCENES[number]))  # no words beside them
    (folder / "broken.png").write_bytes(b"no image")
    done = run_job(recipe("caption", tiny, folder, "out", f"output.format={form}"))
    assert (done["written"], done["bad"]) == (4, 1)
    assert done["bad_items"][0]["key"] == "broken.png" and "image" in done["bad_items"][0]["reason"]
    found = read_back(tmp_path / "out", form)
    alone = [um.caption(folder / f"{number}.png", max_new_tokens=5) for number in range(4)]
    assert [(row["key"], row["text"]) for row in found] == [
        (f"{i}.png", said) for i, said in enumerate(alone)
    ]
    for number, row in enumerate(found):
        assert row["image"].size == Image.open(folder / f"{number}.png").size
    if form != "jsonl":
        assert check_source(str(tmp_path / "out"), model=str(tiny))["kinds"] == {"image_to_text": 4}


def test_questions_come_as_columns_or_as_turns(um: UniMM, tiny: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(forms.encoded(forms.SCENES[0]))
    turns = [
        {"role": "user", "content": "<image>what is this?"},
        {"role": "assistant", "content": "a red apple"},
        {"role": "user", "content": "on what?"},
        {"role": "assistant", "content": "this answer is not looked at"},
    ]
    source = rows(
        tmp_path / "q.jsonl",
        [
            {"question": "what is this?", "image": "a.png"},
            {"question": "a red apple?"},
            {"messages": turns, "images": ["a.png"]},
            {"question": "no such image", "image": "b.png"},
            {"image": "a.png"},
            ["no object"],
        ],
    )
    done = run_job(recipe("ask", tiny, source, "out", "output.shard=100"))
    assert (done["items"], done["written"], done["bad"]) == (6, 3, 3)
    assert [item["key"] for item in done["bad_items"]] == ["line 4", "line 5", "line 6"]
    said = [json.loads(line) for line in (tmp_path / "out/000000.jsonl").read_text().splitlines()]
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": "what is this?"}],
        },
        *turns[1:3],
    ]
    expected = [
        um.ask(str(image), "what is this?", max_new_tokens=5),
        um.ask(None, "a red apple?", max_new_tokens=5),
        um.chat(chat, max_new_tokens=5),
    ]
    assert [row["answer"] for row in said] == expected
    assert said[0]["image"] == "../a.png" and "image" not in said[1]
    assert said[2]["question"] == "on what?" and said[2]["history"] == [["what is this?", "a red apple"]]


def test_one_question_is_asked_of_every_image(um: UniMM, tiny: Path, tmp_path: Path) -> None:
    source = forms.shards(tmp_path / "tars", 4)
    done = run_job(recipe("ask", tiny, source, "out", "options.question='what is this?'"))
    assert done["written"] == 4
    said = [json.loads(line) for path in sorted(Path("out").glob("*.jsonl")) for line in path.open()]
    records = open_source(source)
    images = [records[index].images()[0].image() for index in range(4)]
    assert [row["answer"] for row in said] == um.ask(images, "what is this?", max_new_tokens=5)


@pytest.mark.parametrize("form", ["llava", "image_list", "image_folder", "shards"])
def test_every_form_of_data_has_items(form: str, tiny: Path, tmp_path: Path) -> None:
    source = getattr(forms, form)(tmp_path / form, 3)
    items = JobItems(recipe("caption", tiny, source, "out"))
    assert len(items) >= 3 and all(items[index].images for index in range(len(items)))
    assert {items[index].words for index in range(len(items))} == {"describe the picture"}


def killed_at(seconds: float, job: AnyJob) -> bool:
    """Run a job in a process of its own and kill that after a while; whether it was still running."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run_job(job)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.parametrize("form", ["jsonl", "webdataset"])
def test_a_job_that_is_killed_at_any_moment_writes_the_same(form: str, tiny: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # other threads do not live on in a forked process
    prompts = [{"prompt": f"a {'red ' * (i % 3)}apple {i}"} for i in range(12)] + [{"prompt": ""}]
    source = rows(tmp_path / "p.jsonl", prompts)
    given = (f"output.format={form}", "output.shard=5", "batch_size=3")
    start = time.monotonic()
    run_job(recipe("draw", tiny, source, "calm", *given))
    seconds = time.monotonic() - start
    job = recipe("draw", tiny, source, "killed", *given)
    moments = random.Random(form)
    kills = sum(killed_at(seconds * moments.uniform(0.2, 0.7), job) for _ in range(4))
    assert kills
    done = run_job(job)
    assert (done["written"], done["bad"]) == (12, 1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


def test_what_is_done_is_not_done_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rows(tmp_path / "p.jsonl", [{"prompt": f"apple {i}"} for i in range(5)])
    job = recipe("draw", tiny, source, "out", "output.format=webdataset")
    run_job(job)
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("unimm.jobs.run.load_job_model", lambda recipe: pytest.fail("a model was loaded"))
    assert run_job(job, lambda done, total: seen.append((done, total)))["written"] == 5
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    assert seen == [(5, 5)]


def test_two_jobs_do_not_share_a_folder(tiny: Path, tmp_path: Path) -> None:
    source = rows(tmp_path / "p.jsonl", [{"prompt": "apple"}])
    run_job(recipe("draw", tiny, source, "out"))
    with pytest.raises(UserError, match=r"job\.json: is of a job with another seed \(0, now 1\)"):
        run_job(recipe("draw", tiny, source, "out", "seed=1"))
    with pytest.raises(UserError, match=r"another options\.temperature"):
        run_job(recipe("draw", tiny, source, "out", "options.temperature=0.5"))
    rows(source, [{"prompt": "another apple"}])
    with pytest.raises(UserError, match="another signature"):
        run_job(recipe("draw", tiny, source, "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine: holds something else than a job"):
        run_job(recipe("draw", tiny, source, "mine"))
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("task=drew", r'task: expected one of caption, ask, draw, got "drew"; did you mean "draw"\?'),
        ("options.temprature=1", r'options\.temprature: unknown key; did you mean "temperature"\?'),
        ("options.size=8", r"options\.size: expected a string"),
        ("options.size=8x", r"options\.size: expected WIDTHxHEIGHT"),
        ("options.size=33x33", r"options: size: 33x33"),
        ("options.temperature=100000", r"options: temperature: 100000"),
        ("output.format=json", r"output\.format: expected one of jsonl, parquet, webdataset"),
        ("output.shard=0", r"output\.shard: expected more than 0"),
        ("engine=spark", r"engine: expected one of local, ray"),
        ("dtype=float23", r'dtype: expected one of auto, float32.*did you mean "float32"'),
        ("source.path=nothing", r"nothing: no such file or folder"),
        ("source.path=empty.jsonl", r"empty\.jsonl: has no records"),
        (
            "source.path=useless.jsonl",
            r"none of its 2 items can be used; the first: useless\.jsonl: line 1: prompt",
        ),
    ],
)
def test_mistakes_are_named_in_a_line(override: str, line: str, tiny: Path, tmp_path: Path) -> None:
    source = rows(tmp_path / "p.jsonl", [{"prompt": "apple"}])
    rows(tmp_path / "empty.jsonl", [])
    rows(tmp_path / "useless.jsonl", [{"colour": "red"}, {"colour": "blue"}])
    with pytest.raises(UserError, match=line) as raised:
        run_job(recipe("draw", tiny, source, "out", override))
    assert "\n" not in str(raised.value)


def test_a_bad_item_says_where_it_is(tiny: Path, tmp_path: Path) -> None:
    source = rows(tmp_path / "p.jsonl", [{"prompt": "apple"}, {"prompt": 7}])
    items = JobItems(recipe("draw", tiny, source, "out"))
    with pytest.raises(BadRecord, match=r"p\.jsonl: line 2: text: expected a text, got int"):
        items[1]
