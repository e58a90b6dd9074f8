"""What official scripts wrote about drawings, read as verdicts on the items of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.rows import Columns, read_rows
from unimm.evaluation.scorers.drawings import dpg_questions, dpg_score, wise_category
from unimm.files import read_text

ItemVerdict = Any
Lines = Sequence[Mapping[str, Any]]
_GENEVAL_NAME = re.compile(r"(\d+)/samples/(\d+)\.png$")
_DPG_LINE = re.compile(r"(?P<image>.+?), (?P<crop>None|\([\d, ]+\)), (?P<question>.+), (?P<answer>[^,]*)$")


def read_judged(scorer: str, path: Path, lines: Lines) -> list[ItemVerdict]:
    """What an official script said, one verdict for each item.

    Args:
        scorer: of the protocol.
        path: the script's output.
        lines: the items, with their drawings.

    Raises:
        UserError: it cannot be read, or says nothing of a drawing.
    """
    reader = READERS.get(scorer)
    if reader is None:
        raise UserError(f"--judged: {scorer} has no official script whose output is read")
    return reader(path, lines)


def _geneval(path: Path, lines: Lines) -> list[ItemVerdict]:
    """`results.jsonl` of evaluate_images.py."""
    found: dict[str, Columns] = {}
    for number, row in enumerate(read_rows(path), 1):
        name = _GENEVAL_NAME.search(str(row.get("filename")))
        if name is None or not isinstance(row.get("correct"), bool | int):
            raise UserError(
                f"{path}: row {number}: expected a filename such as 00000/samples/00000.png and correct"
            )
        found[f"{int(name[1]):05}/samples/{int(name[2]):05}.png"] = row
    return [
        [
            {"score": float(row["correct"]), "said": str(row.get("reason", ""))}
            for row in (_of(found, one["file"], path) for one in line["images"])
        ]
        for line in lines
    ]


def _of(found: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in found:
        raise UserError(f"{path}: says nothing of {name}; judge all drawings")
    return found[name]


def _geneval2(path: Path, lines: Lines) -> list[ItemVerdict]:
    """`score_lists.json` of evaluation.py: the scores of the atoms of each prompt, in the order of the data."""
    document = list(_listed(path))
    if len(document) != len(lines):
        raise UserError(
            f"{path}: scores of {len(document)} prompts, here are {len(lines)}; judge the same data"
        )
    return [_atoms(scores, line, path) for scores, line in zip(document, lines, strict=True)]


def _atoms(scores: Any, line: Mapping[str, Any], path: Path) -> ItemVerdict:
    wanted = len(line["fields"]["skills"])
    if not isinstance(scores, list) or len(scores) != wanted:
        raise UserError(f"{path}: item {line['key']}: expected {wanted} scores")
    atoms = [float(one) for one in scores]
    return {"score": sum(atoms) / wanted, "atoms": atoms}


def _listed(path: Path) -> list[Any]:
    from unimm.documents import parse_json

    document = parse_json(read_text(path), str(path))
    if not isinstance(document, list):
        raise UserError(f"{path}: expected a list, got {type(document).__name__}")
    return document


def _dpg(path: Path, lines: Lines) -> list[ItemVerdict]:
    """`…_detail.txt` of compute_dpg_bench.py: every question about every crop, with its answer."""
    said: dict[str, dict[str, dict[str, bool]]] = {}
    for number, text in enumerate(read_text(path).splitlines(), 1):
        match = _DPG_LINE.match(text)
        if match is None:
            raise UserError(f"{path}: line {number}: expected image, crop, question, answer")
        crops = said.setdefault(Path(match["image"]).stem, {})
        crops.setdefault(match["crop"], {})[match["question"]] = match["answer"] == "yes"
    verdicts = []
    for line in lines:
        asked: list[dict[str, bool]] = list(_of(said, Path(line["images"][0]["file"]).stem, path).values())
        (questions,) = dpg_questions(line["fields"]["rows"]).values()
        try:
            answers = [{one["id"]: crop[one["question"]] for one in questions} for crop in asked]
        except KeyError as error:
            raise UserError(f"{path}: item {line['key']}: no answer to {error}") from None
        verdicts.append(dpg_score(questions, answers))
    return verdicts


def _wise(path: Path, lines: Lines) -> list[ItemVerdict]:
    """The JSON lines of marks that gpt_eval.py writes; several files may be joined into one."""
    found = {str(row.get("prompt_id")): row for row in read_rows(path)}
    verdicts = []
    for line in lines:
        row = _of(found, str(line["key"]), path)
        try:
            marks = {
                "consistency": float(row["consistency"]),
                "realism": float(row["realism"]),
                "aesthetic": float(row["aesthetic_quality"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: prompt_id {line['key']}: no mark {error}") from None
        verdicts.append(wise_verdict(marks, int(line["key"])))
    return verdicts


def wise_verdict(marks: Mapping[str, float], prompt_id: int) -> ItemVerdict:
    """A verdict of three marks from 0 to 2."""
    score = (0.7 * marks["consistency"] + 0.2 * marks["realism"] + 0.1 * marks["aesthetic"]) / 2
    return {"score": score, "category": wise_category(prompt_id), **marks}


def _compbench(path: Path, lines: Lines) -> list[ItemVerdict]:
    """`vqa_result.json` of T2I-CompBench's scripts: a score for each image, in the order of their numbers."""
    scores = {int(row["question_id"]): float(row["answer"]) for row in _listed(path)}
    place, verdicts = 0, []
    for line in lines:
        own = range(place, place + len(line["images"]))
        place = own.stop
        missing = next((number for number in own if number not in scores), None)
        if missing is not None:
            raise UserError(f"{path}: says nothing of image {missing}; judge all drawings")
        verdicts.append([{"score": scores[number]} for number in own])
    return verdicts


READERS: dict[str, Callable[[Path, Lines], list[ItemVerdict]]] = {
    "geneval": _geneval, "geneval2": _geneval2, "dpg": _dpg, "wise": _wise, "compbench": _compbench,
}  # fmt: skip
