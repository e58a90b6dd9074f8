"""What scored items come to: each function takes a table of them and gives its figures as a function of weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from unimm.errors import UserError
from unimm.evaluation.bootstrap import Figures, ScoreTable, Summary, Weights, mean

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
WISE_SHARES = {
    "cultural": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1,
}  # fmt: skip
WISE_PARTS = {"consistency": 0.7, "realism": 0.2, "aesthetic": 0.1}
MMVET_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
Places = NDArray[np.int64]


def means(name: str) -> Callable[[ScoreTable], Summary]:
    """The mean score under a name, and `name/category` of each category and subcategory."""

    def summarise(table: ScoreTable) -> Summary:
        scores = table.column("score")
        groups = {**table.groups("category"), **table.groups("subcategory")}

        def figures(weights: Weights) -> Figures:
            found = {name: mean(scores, weights)}
            return found | {f"{name}/{group}": mean(scores[at], weights[at]) for group, at in groups.items()}

        return figures

    return summarise


def tables(table: ScoreTable) -> Summary:
    """`cells`: the share that is right in its place; `tables`: of those that are right whole; `similarity` (TEDS)."""
    scores, right, cells = (table.column(name) for name in ("score", "right", "cells"))
    whole = (scores == 1.0).astype(float)
    groups = {"": np.arange(len(scores))} | {f"/{name}": at for name, at in table.groups("category").items()}

    def of(at: Places, weights: Weights) -> Figures:
        own = weights[at]
        total = float((own * cells[at]).sum())
        return {
            "cells": float((own * right[at]).sum()) / total if total else float("nan"),
            "tables": mean(whole[at], own),
            "similarity": mean(scores[at], own),
        }

    return lambda weights: {
        f"{name}{group}": value for group, at in groups.items() for name, value in of(at, weights).items()
    }


def mmbench(table: ScoreTable) -> Summary:
    """`circular`: questions that are right under every rotation of their choices; `vanilla`: as the first is asked."""
    scores = table.column("score")
    first = np.array([str(row["key"]) == str(row["unit"]) for row in table.rows])
    if first.sum() != len(table.names):
        raise UserError("the data has rotations of a question that it lacks as it is first asked")
    right = np.ones(len(table.names))
    np.minimum.at(right, table.units, scores)
    asked = np.flatnonzero(first)
    whole = right[table.units[asked]]
    groups = {
        f"{name}": np.flatnonzero(np.isin(asked, at))
        for column in ("category", "subcategory")
        for name, at in table.groups(column).items()
    }

    def figures(weights: Weights) -> Figures:
        own = weights[asked]
        found = {"circular": mean(whole, own), "vanilla": mean(scores[asked], own)}
        return found | {f"circular/{name}": mean(whole[at], own[at]) for name, at in groups.items()}

    return figures


def pope(table: ScoreTable) -> Summary:
    """Accuracy, precision, recall and F1 of yes, and the share of yes, over all and in each category.

    Under the rule `exact` an answer may be neither yes nor no; recall then is of those that are, as in lmms-eval.
    """
    said = np.array([row["read"] == "yes" for row in table.rows], float)
    true = np.array([str(row["answer"]).lower().strip() == "yes" for row in table.rows], float)
    read = np.array([row["read"] in ("yes", "no") for row in table.rows], float)
    columns = np.stack([said * true, said, true * read, table.column("score"), np.ones(len(said))])
    groups = {"": (np.arange(len(table.rows)), columns)} | {
        f"/{name}": (at, columns[:, at]) for name, at in table.groups("category").items()
    }

    def of(at: Places, counted: Weights, weights: Weights) -> Figures:
        hits, called, positive, right, total = (counted @ weights[at]).tolist()
        precision = hits / called if called else 0.0
        recall = hits / positive if positive else 0.0
        both = precision + recall
        return {
            "f1": 2 * precision * recall / both if both else 0.0,
            "accuracy": right / total if total else float("nan"),
            "precision": precision,
            "recall": recall,
            "yes": called / total if total else float("nan"),
        }

    return lambda weights: {
        f"{name}{group}": value
        for group, parts in groups.items()
        for name, value in of(parts[0], parts[1], weights).items()
    }


def mme(table: ScoreTable) -> Summary:
    """The sums of accuracy and accuracy+ (both questions of an image right), in %, over categories of each kind."""
    scores = table.column("score")
    counts = np.bincount(table.units, minlength=len(table.names))
    if (counts != 2).any():
        name = table.names[int(np.flatnonzero(counts != 2)[0])]
        raise UserError(f"{name}: MME asks two questions of every image, here are {counts[counts != 2][0]}")
    pairs = np.bincount(table.units, scores, minlength=len(table.names))
    one = np.zeros(len(table.names), np.int64)  # an item of each pair, for its weight and category
    one[table.units] = np.arange(len(table.rows))
    groups = {name: np.unique(table.units[at]) for name, at in table.groups("category").items()}
    unknown = [name for name in groups if name not in PERCEPTION + COGNITION]

    def figures(weights: Weights) -> Figures:
        found: Figures = {}
        totals = {"perception": 0.0, "cognition": 0.0}
        for name, at in groups.items():
            own = weights[one[at]]
            accuracy = 100 * mean(pairs[at] / 2, own)
            plus = 100 * mean((pairs[at] == 2).astype(float), own)
            found[f"accuracy/{name}"], found[f"accuracy+/{name}"] = accuracy, plus
            kind = "cognition" if name in COGNITION else "perception" if name in PERCEPTION else None
            if kind is not None:
                totals[kind] += accuracy + plus
        if unknown:  # a set of our own: its categories count together
            totals["other"] = sum(
                found[f"{part}/{name}"] for name in unknown for part in ("accuracy", "accuracy+")
            )
        return totals | found

    return figures


def mmvet(table: ScoreTable) -> Summary:
    """The mean correctness in %, over all and for each capability that an item asks for."""
    scores = table.column("score")
    wants = [
        set(value if isinstance(value, list) else str(value).replace(" ", "").split(","))
        for value in (row["category"] for row in table.rows)
    ]
    groups = {
        name: np.array([place for place, own in enumerate(wants) if name in own], np.int64)
        for name in MMVET_CAPABILITIES
    }

    def figures(weights: Weights) -> Figures:
        found = {"total": 100 * mean(scores, weights)}
        return found | {name: 100 * mean(scores[at], weights[at]) for name, at in groups.items() if len(at)}

    return figures


def geneval(table: ScoreTable) -> Summary:
    """`overall`: the mean over tasks of their share of right images; `images`; `prompts` with any image right."""
    scores = table.column("score")
    groups = table.groups("category")
    best = np.zeros(len(table.names))
    np.maximum.at(best, table.units, scores)
    one = np.zeros(len(table.names), np.int64)
    one[table.units] = np.arange(len(table.rows))

    def figures(weights: Weights) -> Figures:
        tasks = {name: mean(scores[at], weights[at]) for name, at in groups.items()}
        known = [value for value in tasks.values() if np.isfinite(value)]
        found = {"overall": float(np.mean(known)) if known else float("nan")}
        found |= {"images": mean(scores, weights), "prompts": mean(best, weights[one])}
        return found | {f"images/{name}": value for name, value in tasks.items()}

    return figures


def geneval2(table: ScoreTable) -> Summary:
    """Soft-TIFA in %: the mean over prompts of the arithmetic (AM) and geometric (GM) mean of their atoms' scores."""
    arithmetic = np.array([float(np.mean(row["atoms"])) for row in table.rows])
    geometric = np.array([_geometric(row["atoms"]) for row in table.rows])
    atoms: dict[str, list[tuple[float, int]]] = {}
    for place, row in enumerate(table.rows):
        for skill, score in zip(row["skills"], row["atoms"], strict=True):
            atoms.setdefault(str(skill), []).append((float(score), place))
    skills = {
        name: (np.array([score for score, _ in listed]), np.array([at for _, at in listed], np.int64))
        for name, listed in atoms.items()
    }
    counts = table.groups("category")

    def figures(weights: Weights) -> Figures:
        found = {
            "soft_tifa_gm": 100 * mean(geometric, weights),
            "soft_tifa_am": 100 * mean(arithmetic, weights),
        }
        found |= {f"am/{name}": 100 * mean(scores, weights[at]) for name, (scores, at) in skills.items()}
        return found | {
            f"gm/{name} atoms": 100 * mean(geometric[at], weights[at]) for name, at in counts.items()
        }

    return figures


def _geometric(scores: list[float]) -> float:
    values = np.array(scores, float)
    return float(np.exp(np.log(values).mean())) if len(values) and (values > 0).all() else 0.0


def dpg(table: ScoreTable) -> Summary:
    """DPG-Bench in %: the mean score of prompts, and the share of yes in categories, by the last crop of each image.

    A prompt's score is the share of its questions with yes, those behind a no counted as no, averaged over its crops
    (Hu et al. 2024, arXiv:2403.05135); in the figures of categories each question counts by itself.
    """
    scores = table.column("score")
    answers: dict[str, list[tuple[float, int]]] = {}
    for place, row in enumerate(table.rows):
        for category, value in row["questions"]:
            broad = str(category).partition("-")[0].strip()
            for name in dict.fromkeys((f"broad/{broad}", f"detailed/{category}")):
                answers.setdefault(name, []).append((float(value), place))
    columns = {
        name: (np.array([score for score, _ in listed]), np.array([at for _, at in listed], np.int64))
        for name, listed in sorted(answers.items())
    }

    def figures(weights: Weights) -> Figures:
        found = {"dpg": 100 * mean(scores, weights)}
        return found | {name: 100 * mean(own, weights[at]) for name, (own, at) in columns.items()}

    return figures


def wise(table: ScoreTable) -> Summary:
    """WiScore from 0 to 1: of each category, and of all by the shares that the benchmark gives them."""
    scores = sum(share * table.column(part) for part, share in WISE_PARTS.items()) / 2
    assert isinstance(scores, np.ndarray)
    groups = table.groups("category")
    missing = [name for name in WISE_SHARES if name not in groups]

    def figures(weights: Weights) -> Figures:
        each = {name: mean(scores[at], weights[at]) for name, at in groups.items()}
        if missing:  # part of the benchmark: no overall figure that others could be compared with
            whole = {"wiscore": float("nan"), "mean": mean(scores, weights)}
        else:
            whole = {"wiscore": sum(share * each[name] for name, share in WISE_SHARES.items())}
        return whole | {f"wiscore/{name}": value for name, value in each.items()}

    return figures


def fid(table: ScoreTable) -> Summary:
    """The Fréchet distance of all drawings together, which is no mean: it is not drawn anew."""
    values = {row["category"]: float(row["fid"]) for row in table.rows if row.get("fid") is not None}
    whole = values.pop("all", float("nan"))
    return lambda weights: {"fid": whole} | {f"fid/{name}": value for name, value in values.items()}
