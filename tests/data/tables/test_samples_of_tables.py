"""Tables as training data: each sample by hand, the names in a mixture, their tokenizer, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unimm
from unimm.data.tables.content import TRANSCRIPTION_REQUESTS
from unimm.data.tables.settings import TableSettings, expand_tables
from unimm.data.tables.source import exchanges_of, table_samples
from unimm.data.tables.tables import ENDLESS_TABLES, SyntheticTables
from unimm.data.tables.text import table_tokenizer
from unimm.data.tables.vocabulary import words_by_topic
from unimm.errors import UserError
from unimm.evaluation import evaluate_recipe
from unimm.models.layout import IGNORED
from unimm.pipeline import UniMM
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe, smoke_recipe
from unimm.training.trainer import train

SMALL = TableSettings(difficulty="small")


@pytest.fixture(scope="module")
def um() -> UniMM:
    return unimm.load("embedded")


@pytest.mark.parametrize("index", range(4))
def test_a_sample_by_hand(um: UniMM, index: int) -> None:
    """A table once, and behind it all that is asked, each as if it were asked alone."""
    sample = table_samples(um.processor, {"tables/understanding": 1.0}, 5, SMALL)["tables/understanding"][
        index
    ]
    rng = np.random.default_rng([5, index, 0])
    table = SyntheticTables("train", 5, SMALL)[int(rng.integers(ENDLESS_TABLES))]
    asked = exchanges_of(table, rng, SMALL)
    assert asked[0] == (TRANSCRIPTION_REQUESTS["markdown"][0], table.text("markdown")) and len(asked) == 3
    answers = {one.question: one.answer for one in table.questions()}
    assert all(answers[question] == answer for question, answer in asked[1:])
    prefix = int((sample["branches"] == 0).sum())
    shared = sample["ids"][:prefix].tolist()
    for number, (question, answer) in enumerate(asked, 1):
        mine = sample["branches"] == number
        said = [*um.processor.text_ids(answer), um.processor.eos]
        assert [*shared, *sample["ids"][mine]] == [*um.processor.question_ids(question), *said]
        labels = sample["labels"][mine]
        assert labels[-len(said) :].tolist() == said and (labels[: -len(said)] == IGNORED).all()
    assert torch.equal(sample["images"].pixels, um.processor.look([table.image()]).pixels)


def test_samples_of_text_are_answers_alone(um: UniMM) -> None:
    samples = table_samples(um.processor, {"tables/text": 1.0}, 5, SMALL)["tables/text"]
    for index in range(6):
        rng = np.random.default_rng([5, index, 1])
        table = SyntheticTables("train", 5, SMALL)[int(rng.integers(ENDLESS_TABLES))]
        sample = samples[index]
        text = um.processor.tokenizer.decode(sample["ids"][1:-1])
        assert text in {table.text("markdown"), *(one.answer for one in table.questions())}
        assert "images" not in sample


@pytest.mark.parametrize("difficulty", ["small", "full"])
def test_each_word_and_each_digit_is_one_token(difficulty: str) -> None:
    settings = TableSettings.model_validate({"difficulty": difficulty})
    tokenizer = table_tokenizer(settings)
    limits = settings.limits()
    for words in words_by_topic(limits.word_length, limits.words).values():
        for word in words:
            assert len(tokenizer.encode(f" {word}")) == 1, word
    assert [tokenizer.decode([token]) for token in tokenizer.encode(" 1207")] == [" ", "1", "2", "0", "7"]
    for split in ("train", "larger"):
        table = SyntheticTables(split, 0, settings)[0]  # type: ignore[arg-type]
        for text in (table.text("markdown"), table.text("latex"), "a word that no table has: ëx"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert table_tokenizer(settings).get_vocab() == tokenizer.get_vocab()


def test_names_in_a_mixture() -> None:
    assert expand_tables({"tables": 2.0, "own": 1.0}) == {"tables/understanding": 2.0, "own": 1.0}
    assert expand_tables({"tables": 1.0, "tables/understanding": 1.0}) == {"tables/understanding": 2.0}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.tables={columns: [3, 2]}", r"data\.tables\.columns: expected the least first"),
        ("stages[0].mixture={tables/drawing: 1}", r"stages\[0\]\.mixture\.tables/drawing: no source has this name"),
        ("stages[0].options={tables: {least: [400, 9]}}", r"stages\.words\.options\.tables: most: expected a width"),
        ("stages[0].options={tables: {colour: 1}}", r"stages\.words\.options: tables\.colour: unknown key"),
        ("data.sources={tables: {path: x}}", r"data\.sources\.tables: this names built-in tables; give it another"),
    ],
)  # fmt: skip
def test_bad_recipes_are_named_in_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        load_recipe(find_recipe("training/tables"), [override]).build_task()
    assert "\n" not in str(caught.value) and str(caught.value).count("tables.yaml: ") == 1


def test_changes_need_not_fit_together_alone() -> None:
    changed = load_recipe(find_recipe("training/tables"), ["stages[0].options={tables: {most: [90, 70]}}"])
    assert changed.tables(changed.stages[0]).limits().most == (90, 70)  # type: ignore[attr-defined]


def test_a_stage_changes_the_tables(tmp_path: Path) -> None:
    recipe: Any = load_recipe(find_recipe("training/tables"), [f"output={tmp_path}"])
    shapes = []
    task = recipe.build_task()
    for stage in recipe.stages:
        limits = recipe.tables(stage).limits()
        shapes.append((limits.columns, limits.rows))
        sample = task.dataset(stage, 0)[0]
        assert len(sample["ids"]) <= stage.pack.length
    assert shapes == [((1, 1), (1, 2)), ((1, 3), (1, 3)), ((2, 4), (2, 6))]


def test_the_recipe_runs_and_what_comes_of_it_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export = train(smoke_recipe(find_recipe("training/tables"), [f"output={tmp_path}/run"]), quiet=True)
    um = unimm.load(export, "cpu")
    settings = TableSettings(difficulty="small")
    assert um.processor.tokenizer.get_vocab().items() >= table_tokenizer(settings).get_vocab().items()
    size = ["tables.samples=2", "tables.questions=1", f"model={export}", f"output={tmp_path}/eval"]
    report = evaluate_recipe(find_recipe("eval-tables"), size)
    assert list(report["tables"]) == ["seen", "larger", "font"]
    for figures in report["tables"].values():
        assert figures["markdown"]["tables"]["count"] == 2 and figures["markdown"]["similarity"] < 1
        assert figures["answers"]["all"]["count"] >= 2
    assert json.loads((tmp_path / "eval/report.json").read_text())["tables"] == report["tables"]
