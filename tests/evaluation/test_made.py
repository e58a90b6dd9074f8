"""EmojiScenes and tables as protocols: data that the package makes, scored as its recipes score it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimm.errors import UserError
from unimm.evaluation.benchmark import Benchmark, RunOptions
from unimm.evaluation.items import DataFiles
from unimm.evaluation.protocol import EvaluationProtocol, find_protocol, load_protocol
from unimm.evaluation.result import figures_of
from unimm.evaluation.scorers import score_answer


def protocol_of(name: str, *overrides: str) -> EvaluationProtocol:
    path = find_protocol(name)
    assert path is not None
    return load_protocol(path, overrides)


def scored(protocol: EvaluationProtocol, output: Path, **options: Any) -> dict[str, Any]:
    document = Benchmark(protocol, RunOptions(output=output, **options)).run()
    assert document is not None
    return document


def test_questions_about_scenes(tmp_path: Path) -> None:
    protocol = protocol_of("emojiscenes-questions", "data.made.samples=3")
    found = scored(protocol, tmp_path / "out")
    assert found["counts"]["items"] == 18 and found["data"]["verified"]
    right = [line["answer"].strip().lower() == line["fields"]["answer"] for line in found["items"]]
    assert found["figures"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.5  # the embedded model knows its scenes
    kinds = {name.partition("/")[2] for name in found["figures"]} - {""}
    assert kinds == {"what", "count", "background", "where", "yesno", "category"}


def test_drawings_of_scenes(tiny: Path, tmp_path: Path) -> None:
    protocol = protocol_of("emojiscenes-drawing", "data.made.samples=1")
    found = scored(protocol, tmp_path / "out", model=str(tiny))
    assert [line["fields"]["category"] for line in found["items"]] == ["single", "pair", "count"]
    assert all("background" in one["said"] for line in found["items"] for one in line["scored"])
    assert {"images/single", "images/pair", "images/count"} <= set(found["figures"])


@pytest.mark.parametrize("name", ["tables-reading", "tables-questions"])
def test_tables(name: str, tiny: Path, tmp_path: Path) -> None:
    protocol = protocol_of(name, "data.made.samples=2", "answer.max_new_tokens=8")
    found = scored(protocol, tmp_path / "out", model=str(tiny))
    assert found["figures"][found["main"]]["value"] == 0  # the tiny model cannot read
    rows = list(DataFiles(protocol, []).items())
    answers = [
        one.fields["answer"]
        if name == "tables-questions"
        else "\n".join("| " + " | ".join(row) + " |" for row in _with_rule(one.fields["answer"]))
        for one in rows
    ]
    lines = [
        {"key": one.key, "fields": one.fields, "scored": score_answer(protocol, one.fields, (), answer)}
        for one, answer in zip(rows, answers, strict=True)
    ]
    assert figures_of(protocol, lines)[found["main"]]["value"] == 1.0


def _with_rule(cells: list[list[str]]) -> list[list[str]]:
    """The rows of a table in Markdown, with the rule below its head."""
    return [cells[0], ["---"] * len(cells[0]), *cells[1:]]


def test_made_data_is_named_and_takes_no_files() -> None:
    protocol = protocol_of("emojiscenes-questions")
    other = protocol_of("emojiscenes-questions", "data.made.split=vendor")
    assert protocol.fingerprint() != other.fingerprint()
    assert DataFiles(protocol, []).hashes != DataFiles(other, []).hashes
    with pytest.raises(UserError, match="--data: its data is made"):
        DataFiles(protocol, ["x.json"])
    with pytest.raises(
        UserError, match=r"data.made.split: font; scene-questions have seen, composed, vendor"
    ):
        list(DataFiles(protocol_of("emojiscenes-questions", "data.made.split=font"), []).items())
