"""Our models in lmms-eval and VLMEvalKit: the same items give the same answers there as by `unimm eval`."""

from __future__ import annotations

import base64
import csv
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.evaluation import twins
from tests.families.qwen2_vl_checkpoints import QWEN2_VL
from unimm.errors import UserError
from unimm.evaluation.plugins.answers import SuiteQuestion, answer_questions, sampling_of
from unimm.pipeline import UniMM

ROOT = Path(__file__).parents[2]
TASK = """dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: scenes
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
process_results: !function utils.results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
TASK_CODE = """import io
from PIL import Image

def visual(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]

def results(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"].lower())}
"""


def test_options_of_suites_are_read() -> None:
    greedy = sampling_of({"temperature": 0.7, "do_sample": False, "until": ["\n\n", ""], "num_beams": 1})
    assert greedy.filters.temperature == 0 and greedy.stop == ("\n\n",) and greedy.max_new_tokens is None
    sampled = sampling_of({"temperature": 0.7, "do_sample": True, "top_p": 0.9, "max_new_tokens": 3})
    assert (sampled.filters.temperature, sampled.filters.top_p, sampled.max_new_tokens) == (0.7, 0.9, 3)
    with pytest.raises(UserError, match="max_new_tokens"):
        sampling_of({"max_new_tokens": 0})


def test_questions_are_answered_in_their_order(tiny_model: UniMM) -> None:
    images = [Image.new("RGB", (32, 32), (40 * number, 0, 90)) for number in range(5)]
    asked = [
        SuiteQuestion(*tiny_model.processor.question("what is this?", [image]), {"max_new_tokens": 4 + n}, 0)
        for n, image in enumerate(images)
    ]
    alone = [tiny_model.ask(image, "what is this?", 4 + n) for n, image in enumerate(images)]
    assert answer_questions(tiny_model, asked) == alone


def test_the_entry_point_names_what_there_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["unimm"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def scene_rows(count: int) -> list[dict[str, Any]]:
    """Questions of all kinds about scenes."""
    rows = []
    for number, scene in enumerate(twins.scenes(count)):
        asked = scene.questions()
        one = asked[number % len(asked)]
        image = {"bytes": twins.png(scene), "path": None}
        parts = {"question": one.question, "answer": one.answer, "answers": [one.answer], "image": image}
        rows.append({"questionId": str(number), **parts})
    return rows


@pytest.fixture(scope="module", params=["embedded", "qwen2_vl"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learnt, and a random one of another family."""
    if request.param == "embedded":
        return "embedded"
    folder = tmp_path_factory.mktemp("plugins") / "qwen2_vl"
    QWEN2_VL.write(folder)
    return str(folder)


def answers_of_ours(data: Path, output: Path, source: str, tokens: int) -> list[str]:
    """The answers of a model by `unimm eval`, of so many tokens at most."""
    from unimm.cli.main import main

    asked = ['prompts.default="{question}"', f"answer.max_new_tokens={tokens}"]
    words = ["eval", "docvqa", "data.sha256={}", *asked]
    assert main([*words, "--data", str(data), "-o", str(output), "--model", source]) == 0
    return [line["answer"] for line in json.loads((output / "result.json").read_text())["items"]]


@pytest.mark.filterwarnings("ignore:.*no checksum of its data:unimm.errors.UserNote")
def test_lmms_eval_gets_the_same_answers(tmp_path: Path, source: str) -> None:
    pytest.importorskip("lmms_eval", reason="needs unimm[lmms-eval]")
    data = twins.write_parquet(tmp_path / "scenes.parquet", scene_rows(20))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "scenes.yaml").write_text(TASK.format(data=data))
    (tmp_path / "task" / "utils.py").write_text(TASK_CODE)
    ours = answers_of_ours(data, tmp_path / "ours", source, 16)
    for more in ([], ["--force_simple"]):
        output = tmp_path / f"theirs{len(more)}"
        command = [
            sys.executable, "-m", "lmms_eval", "--model", "unimm", "--model_args", f"pretrained={source}",
            "--tasks", "scenes", "--include_path", str(tmp_path / "task"), "--batch_size", "16",
            "--log_samples", "--output_path", str(output), *more,
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "HF_HOME": str(tmp_path / "hub")})
        (file,) = output.rglob("*samples_scenes.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda one: one["doc_id"])
        assert [one["filtered_resps"] for one in samples] == ours


def test_lmms_eval_draws_and_weighs(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="needs unimm[lmms-eval]")
    from unimm.evaluation.plugins.lmms_eval import ChatModel, SimpleModel

    model = SimpleModel(str(tiny), mode="draw", output=str(tmp_path / "out"), temperature=0.5)
    model.task_dict = {"t": {"test": [{}, {}]}}
    request = SimpleNamespace(args=("a red apple", {}, lambda document: [], 1, "t", "test"))
    (found,) = model.generate_until([request])
    (file,) = json.loads(found)["images"]
    (wanted,) = model.um.draw(["a red apple"], seed=[1], temperature=0.5)
    assert Image.open(file).tobytes() == wanted.tobytes()
    chat = ChatModel(str(tiny), mode="draw", output=str(tmp_path / "chat"), temperature=0.5)
    chat.task_dict = model.task_dict
    said = [{"role": "user", "content": [{"type": "text", "text": "a red apple"}]}]
    request = SimpleNamespace(args=("", lambda document: said, {}, 1, "t", "test"))
    (other,) = chat.generate_until([request])
    assert Image.open(json.loads(other)["images"][0]).tobytes() == wanted.tobytes()
    weighed = SimpleModel(str(tiny))
    weighed.task_dict = {"t": {"test": [{}]}}
    image = Image.new("RGB", (32, 32), "red")
    greedy = weighed.um.ask(image, "what is this?", 3)
    targets = (greedy, "a red apple")
    losses = weighed.loglikelihood(
        [
            SimpleNamespace(args=("what is this?", one, lambda document: [image], 0, "t", "test"))
            for one in targets
        ]
    )
    assert all(loss > 0 for loss, _ in losses) and not losses[1][1]
    with pytest.raises(UserError, match=r"model_args: pretraind: unknown.*pretrained"):
        SimpleModel(pretraind=str(tiny))


@pytest.mark.filterwarnings("ignore:.*no checksum of its data:unimm.errors.UserNote")
def test_vlmevalkit_gets_the_same_answers(tmp_path: Path, source: str) -> None:
    pytest.importorskip("vlmeval", reason="needs VLMEvalKit")
    rows = scene_rows(20)
    data = twins.write_parquet(tmp_path / "scenes.parquet", rows)
    ours = answers_of_ours(data, tmp_path / "ours", source, 128)
    with (tmp_path / "Scenes.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer"])
        for row in rows:
            image = base64.b64encode(row["image"]["bytes"]).decode()
            writer.writerow([row["questionId"], image, row["question"], row["answer"]])
    command = [
        sys.executable, "-m", "unimm.evaluation.plugins.vlmevalkit", "--unimm", f"ours={source}", "--model", "ours",
        "--data", "Scenes", "--mode", "infer", "--work-dir", str(tmp_path / "theirs"),
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "LMUData": str(tmp_path), "PRED_FORMAT": "tsv", "PYTHONPATH": paths}
    subprocess.run(command, check=True, env=environment)
    file = next((tmp_path / "theirs").rglob("ours_Scenes.tsv"))
    with file.open(encoding="utf-8", newline="") as said:
        assert [row["prediction"] for row in csv.DictReader(said, delimiter="\t")] == ours
