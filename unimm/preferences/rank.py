"""From scored candidates to pairs: the best and the worst drawings of a prompt, where they differ enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.outputs import check_output, first_line_has
from unimm.preferences.candidates import PromptCandidates
from unimm.preferences.data import write_lines
from unimm.preferences.scorers import Candidate, Scorer, ScorerError, image_candidates, score_candidates

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

RANKED = ("prompt", "chosen", "rejected", "source.scorer")  # what tells a ranking from votes of people
OUTCOMES = ("pairs", "ties", "near_ties", "easy", "hard", "failed")


@dataclass(frozen=True)
class Rules:
    """Which prompts make a pair.

    Attributes:
        margin: least difference of the best and the worst score.
        easy: a prompt of which every candidate scores at least this teaches nothing; None: there are none.
        hard: nor does one of which no candidate scores more than this; None: there are none.
        each: most pairs of a prompt: the best with the worst, the second best with the second worst, and so on.
        on_error: what a scorer that raises, or gives no number for each candidate, does: its prompt is skipped and
            counted, or the run stops.
    """

    margin: float = 0.1
    easy: float | None = 0.95
    hard: float | None = 0.05
    each: int = 1
    on_error: Literal["skip", "stop"] = "stop"


def rank_candidates(
    um: UniMM,
    rows: Sequence[PromptCandidates],
    scorer: Scorer,
    name: str,
    path: str | Path,
    rules: Rules = Rules(),
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score every prompt's candidates and write the pairs as preferences.

    Args:
        um: the model that drew, which turns codes into images.
        rows: candidates.
        scorer: gives each candidate a number.
        name: what the scorer is called, kept with each pair.
        path: where the pairs go.
        rules: which prompts make a pair.
        on_progress: called with prompts done and prompts in all.

    Returns:
        The file, the mean score, how many pairs there are, and how many prompts tied, were too easy or hard, or failed.

    Raises:
        UserError: `path` holds something else than an earlier ranking; a scorer fails and `rules.on_error` says stop;
            or not one pair is left.
    """
    check_output(path, "an earlier ranking", first_line_has(*RANKED))
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    scored: list[float] = []

    def pairs() -> Iterator[dict[str, Any]]:
        for done, row in enumerate(rows, start=1):
            try:
                scores = score_candidates(scorer, candidates_of(um, row))
            except ScorerError as error:
                if rules.on_error == "stop":
                    raise UserError(f"scorer {name}: prompt {row.prompt!r}: {error}") from error
                counts["failed"] += 1
                continue
            scored.extend(scores)
            outcome = _outcome(scores, rules)
            counts[outcome] += 1
            if outcome == "pairs":
                yield from _pairs(row, scores, name, rules)
            if on_progress is not None:
                on_progress(done, len(rows))

    found = list(pairs())
    outcomes = ", ".join(f"{counts[key]} {key.replace('_', ' ')}" for key in OUTCOMES[1:])
    if not found:
        raise UserError(
            f"{path}: no pair is left of {len(rows)} prompts ({outcomes}); lower the margin or draw more"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_lines(Path(path), found)
    mean = sum(scored) / len(scored)
    counts["pairs"] = len(found)
    return {"preferences": str(path), "prompts": len(rows), **counts, "mean_score": round(mean, 4)}


def best_and_worst(scores: Tensor, count: int) -> Tensor:
    """Return which candidates of each prompt make pairs.

    Args:
        scores: [P, G].
        count: of pairs K, at most G / 2.

    Returns:
        Indices into each prompt's candidates [P, 2 K]: the best K from the best down, then the worst K from the worst
        up; of equals the first.
    """
    best, worst = (scores.argsort(dim=1, descending=down, stable=True)[:, :count] for down in (True, False))
    return torch.cat([best, worst], 1)


def candidates_of(um: UniMM, row: PromptCandidates) -> list[Candidate]:
    """A prompt's candidates with their images."""
    codes = torch.tensor([drawing.codes for drawing in row.candidates])
    return image_candidates(um, row, [drawing.seed for drawing in row.candidates], codes)


def _outcome(scores: Sequence[float], rules: Rules) -> str:
    """What becomes of a prompt."""
    best, worst = max(scores), min(scores)
    if rules.easy is not None and worst >= rules.easy:
        return "easy"
    if rules.hard is not None and best <= rules.hard:
        return "hard"
    if best == worst:
        return "ties"
    return "pairs" if best - worst >= rules.margin else "near_ties"


def _pairs(
    row: PromptCandidates, scores: Sequence[float], scorer: str, rules: Rules
) -> Iterator[dict[str, Any]]:
    """Good and bad candidates as preferences, from the outer ranks inwards."""
    count = min(rules.each, len(scores) // 2)
    best, worst = best_and_worst(torch.tensor([scores], dtype=torch.float64), count)[0].chunk(2)
    for better, worse in zip(best.tolist(), worst.tolist(), strict=True):
        margin = scores[better] - scores[worse]
        if margin <= 0 or margin < rules.margin:
            return
        chosen, rejected = row.candidates[better], row.candidates[worse]
        yield {
            "prompt": row.prompt,
            "chosen": {"codes": chosen.codes},
            "rejected": {"codes": rejected.codes},
            "margin": margin,
            "scores": [scores[better], scores[worse]],
            "source": {"scorer": scorer, "seeds": [chosen.seed, rejected.seed], **row.settings},
        }
