"""Scores of fixed answers equal those of the field's own code, which `fixtures/README.md` names."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimm.evaluation.bootstrap import ScoreTable, paired, with_intervals
from unimm.evaluation.official import read_judged
from unimm.evaluation.scorers import BENCHMARK_SCORERS
from unimm.evaluation.scorers.captions import cider, word_tokens
from unimm.evaluation.scorers.drawings import dpg_questions, dpg_score, wise_category

FIXTURES = Path(__file__).parent / "fixtures"
EXACT = 1e-9


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


def figures(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of scored rows."""
    numbered = [{"unit": str(number), "key": str(number), **row} for number, row in enumerate(rows)]
    table = ScoreTable.of(numbered)
    return BENCHMARK_SCORERS[name].summarise(table)(np.ones(len(numbered)))


def said(name: str, case: Mapping[str, Any], rule: str | None = None) -> dict[str, Any]:
    """What our scorer says of a case."""
    score = BENCHMARK_SCORERS[name].score
    assert score is not None
    fields = {"answers": case.get("people"), "answer": case.get("right")}
    return {**score(fields, tuple(case.get("options", ())), case["answer"], rule), **fields}


@pytest.mark.parametrize("name", ["vqav2", "textvqa", "anls", "chartqa", "seedbench", "mmmu"])
def test_means_of_answers(name: str) -> None:
    made = fixture(name)
    scored = [said(name, case) for case in made["cases"]]
    for ours, case in zip(scored, made["cases"], strict=True):
        if "score" in case:
            assert ours["score"] == pytest.approx(case["score"], abs=EXACT), case
    found = figures(name, scored)[BENCHMARK_SCORERS[name].main]
    assert found == pytest.approx(made["total"], abs=EXACT)
    assert 0.05 < found < 0.95


@pytest.mark.parametrize("rule", ["pope", "exact"])
def test_pope(rule: str) -> None:
    made = fixture("pope")
    found = figures("pope", [said("pope", case, rule) for case in made["cases"]])
    for name, value in made[rule].items():
        assert found[name] == pytest.approx(value, abs=EXACT), name
    assert made["pope"]["f1"] != made["exact"]["f1"]


def test_mme() -> None:
    made = fixture("mme")
    found = figures("mme", [{**case, **said("mme", case)} for case in made["cases"]])
    for name in ("perception", "cognition"):
        assert found[name] == pytest.approx(made[name], abs=EXACT)
    parts = [
        found[f"{part}/{name}"]
        for name in ("code_reasoning", "text_translation")
        for part in ("accuracy", "accuracy+")
    ]
    assert sum(parts) == pytest.approx(found["cognition"], abs=EXACT)


def test_mmbench_under_all_rotations() -> None:
    made = fixture("mmbench")
    rows = []
    for case in made["cases"]:
        options = tuple(case[letter] for letter in "ABCD")
        scored = said("mmbench", {"answer": case["prediction"], "right": case["answer"], "options": options})
        index = case["index"]
        groups = {"category": case["category"], "subcategory": case["L2-category"]}
        rows.append({**scored, **groups, "key": str(index), "unit": str(index % 1_000_000)})
    random.Random(0).shuffle(rows)
    found = figures("mmbench", rows)
    assert found["circular"] == pytest.approx(made["circular"], abs=EXACT)
    assert found["vanilla"] > found["circular"] + 0.03
    for name, value in {**made["category"], **made["subcategory"]}.items():
        assert found[f"circular/{name}"] == pytest.approx(value, abs=EXACT)


def test_cider() -> None:
    made = fixture("cider")
    cases = made["cases"]
    found = cider([case["candidate"] for case in cases], [case["references"] for case in cases])
    assert found == pytest.approx([case["score"] for case in cases], abs=EXACT)
    assert np.mean(found) == pytest.approx(made["total"], abs=EXACT)
    near = [word_tokens(case["raw"]) == case["candidate"] for case in cases]
    assert np.mean(near) > 0.6  # the tokenizer that needs no Java differs at apostrophes alone


def test_geneval() -> None:
    made = fixture("geneval")
    rows = [
        {"score": float(row["correct"]), "category": row["tag"], "unit": row["metadata"]}
        for row in made["results"]
    ]
    found = figures("geneval", rows)
    for name in ("overall", "images", "prompts"):
        assert found[name] == pytest.approx(made[name], abs=EXACT)
    for tag, value in made["tags"].items():
        assert found[f"images/{tag}"] == pytest.approx(value, abs=EXACT)


def test_geneval2() -> None:
    made = fixture("geneval2")
    rows = [
        {"atoms": scores, "skills": row["skills"], "category": row["atom_count"], "score": 0.0}
        for row, scores in zip(made["benchmark"], made["scores"], strict=True)
    ]
    found = figures("geneval2", rows)
    assert found["soft_tifa_gm"] == pytest.approx(made["gm"], abs=EXACT)
    assert found["soft_tifa_am"] == pytest.approx(made["am"], abs=EXACT)
    for skill, value in made["skills"].items():
        assert found[f"am/{skill}"] == pytest.approx(value, abs=EXACT)
    for count, value in made["atoms"].items():
        assert found[f"gm/{count} atoms"] == pytest.approx(value, abs=EXACT)


def test_wise() -> None:
    made = fixture("wise")
    rows = [
        {
            "category": wise_category(number),
            **dict(zip(("consistency", "realism", "aesthetic"), marks, strict=True)),
        }
        for number, marks in enumerate(made["scores"], 1)
    ]
    found = figures("wise", rows)
    assert found["wiscore"] == pytest.approx(made["overall"], abs=EXACT)
    for name in ("cultural", "time", "space", "biology", "physics", "chemistry"):
        assert found[f"wiscore/{name}"] == pytest.approx(made[name], abs=EXACT)


def test_dpg() -> None:
    made = fixture("dpg")
    questions = dpg_questions(made["csv"][1:])
    answers: dict[str, dict[str, dict[str, bool]]] = {}
    for line in made["detail"].splitlines():
        path, rest = line.split(", (", 1)
        crop, rest = rest.split("), ", 1)
        asked, answer = rest.rsplit(", ", 1)
        answers.setdefault(Path(path).stem, {}).setdefault(crop, {})[asked] = answer == "yes"
    rows = []
    for name, own in questions.items():
        crops = [{one["id"]: said[one["question"]] for one in own} for said in answers[name].values()]
        rows.append(dpg_score(own, crops))
    found = figures("dpg", rows)
    for name, value in made["figures"].items():
        ours = found.get(name, found.get(f"detailed/{name}", found.get(f"broad/{name}")))
        assert ours == pytest.approx(value, abs=EXACT), name


def test_intervals_hold_the_figure_and_pairing_narrows_them() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    rows = [
        [{"unit": str(n), "key": str(n), "score": float(rng.random() > h)} for n, h in enumerate(hard)]
        for _ in range(2)
    ]
    tables = tuple(map(ScoreTable.of, (rows[0], rows[1][::-1])))
    summarise = BENCHMARK_SCORERS["exact"].summarise
    found = with_intervals(tables[0], summarise(tables[0]))["accuracy"]
    assert found["low"] < found["value"] < found["high"]
    spread = 1.96 * np.sqrt(found["value"] * (1 - found["value"]) / 400)
    assert found["high"] - found["value"] == pytest.approx(spread, rel=0.2)
    pair = paired((tables[0], tables[1]), (summarise(tables[0]), summarise(tables[1])))["accuracy"]
    first, second = (np.array([row["score"] for row in own]) for own in rows)
    assert pair["difference"] == pytest.approx(float(second.mean() - first.mean()))
    wanted = 1.96 * np.std(second - first) / np.sqrt(400)
    assert (pair["high"] - pair["low"]) / 2 == pytest.approx(wanted, rel=0.15)
    assert pair["high"] - pair["low"] < 2 * np.sqrt(2) * (found["high"] - found["low"]) / 2


def test_output_of_the_official_code_of_dpg_is_read(tmp_path: Path) -> None:
    made = fixture("dpg")
    detail = tmp_path / "dpg_detail.txt"
    detail.write_text(made["detail"])
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in made["csv"][1:]:
        rows.setdefault(row["item_id"], []).append(row)
    lines = [
        {"key": key, "images": [{"file": f"{key}.png"}], "fields": {"rows": own}} for key, own in rows.items()
    ]
    found = figures("dpg", read_judged("dpg", detail, lines))
    assert found["dpg"] == pytest.approx(made["figures"]["dpg"], abs=EXACT)
