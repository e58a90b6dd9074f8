"""What is voted on: pairs of candidates of a prompt, the same pairs in the same order for the same file and seed.

A file of candidates holds what `unimm preferences draw` writes, or a prompt and its answers as preferences have them:

    {"prompt": [{"role": "user", "content": [{"image": "a.png"}, {"text": "describe the picture"}]}],
     "candidates": ["a star", "a blue star", "a pear"]}
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from unimm.console import is_unicode
from unimm.errors import UserError
from unimm.preferences.candidates import PromptCandidates
from unimm.preferences.data import (
    Preference,
    PromptMessage,
    Response,
    find_problem,
    read_lines,
)
from unimm.sections import Section, validate

PageSide = Literal["left", "right"]


def _turn(data: Any) -> Any:
    return [{"content": data}] if isinstance(data, str) else data


def _asks(message: PromptMessage) -> PromptMessage:
    if message.role != "user":
        raise ValueError(f"expected the user's turn, got one of the {message.role}")
    return message


Prompt = Annotated[
    list[Annotated[PromptMessage, AfterValidator(_asks)]],
    Field(min_length=1, max_length=1),
    BeforeValidator(_turn),
]
"""What is answered: a user's turn, or just words."""


class Choices(Section):
    """A prompt and answers of one kind to choose from."""

    prompt: Prompt
    candidates: Annotated[list[Response], Field(min_length=1)]


@dataclass(frozen=True)
class Pair:
    """Two candidates of a prompt as they are shown.

    Attributes:
        key: a hash of the prompt and both candidates, whichever is left.
        prompt: the user's turn.
        left: a candidate.
        right: another.
        where: file and line, for messages.
    """

    key: str
    prompt: PromptMessage
    left: Response
    right: Response
    where: str

    def images(self) -> list[str]:
        """Every image file that is shown, as the data names it."""
        named = [*(part.image for part in self.prompt.content), self.left.image, self.right.image]
        return [image for image in named if image is not None]

    def preference(self, chosen: PageSide, source: Path, target: Path, voter: str) -> dict[str, Any]:
        """A vote on it as a line of a file of preferences.

        Args:
            chosen: the better side.
            source: folder that the candidates' image files are relative to.
            target: folder that those of the preferences are to be relative to.
            voter: who says so.
        """

        def move(data: dict[str, Any]) -> dict[str, Any]:
            if "image" in data:
                moved = os.path.relpath(source.resolve() / data["image"], target.resolve())
                data["image"] = Path(moved).as_posix()
            return data

        content = [move(_plain(part)) for part in self.prompt.content]
        words_only = len(content) == 1 and "text" in content[0]
        sides = (self.left, self.right) if chosen == "left" else (self.right, self.left)
        better, worse = (move(_plain(side)) for side in sides)
        return {
            "prompt": content[0]["text"] if words_only else [{"role": "user", "content": content}],
            "chosen": better.get("text", better),
            "rejected": worse.get("text", worse),
            "source": voter,
        }


@dataclass(frozen=True)
class Ballot:
    """All that is voted on.

    Attributes:
        file: the candidates.
        pairs: in the order of voting: one of every prompt, then a second one of every prompt, and so on.
        alike: prompts that are left out since all of their candidates are equal.
        models: what drew the drawings, where the file says so.
    """

    file: Path
    pairs: list[Pair]
    alike: int
    models: set[str]

    @property
    def folder(self) -> Path:
        """The folder that its image files are relative to, and lie in."""
        return self.file.parent

    @property
    def has_codes(self) -> bool:
        """Whether a model is needed to see the candidates."""
        return any(side.codes is not None for pair in self.pairs for side in (pair.left, pair.right))


def read_ballot(path: str | Path, seed: int = 0, each: int | None = None) -> Ballot:
    """Read candidates and pair them.

    Args:
        path: JSON lines of `PromptCandidates` or `Choices`.
        seed: of which candidates meet, and of which is on the left.
        each: pairs of a prompt; by default as many as show each candidate once. No candidate is shown again before
            every other one of its prompt was (but for one where their number is odd).

    Raises:
        UserError: naming file, line and field; a prompt has a single candidate; or there is nothing to choose from.
    """
    path = Path(path)
    prompts: list[list[Pair]] = []
    models: set[str] = set()
    rows = alike = 0
    for where, value in read_lines(path):
        rows += 1
        row = _read(value, where, models)
        found = _pairs(row, seed, each, where)
        alike += not found
        prompts.append(found)
    if not rows:
        raise UserError(f"{path}: empty; draw candidates first (`unimm preferences draw`)")
    in_turn = (pair for turn in itertools.zip_longest(*prompts) for pair in turn if pair is not None)
    pairs = list({pair.key: pair for pair in in_turn}.values())
    if not pairs:
        raise UserError(f"{path}: the candidates of each prompt are all equal; there is nothing to choose")
    return Ballot(path, pairs, alike, models)


def pair_of_drawings(prompt: str, left: list[list[int]], right: list[list[int]], where: str) -> Pair | None:
    """Return two drawings of a prompt as a pair; None: they are equal.

    Args:
        prompt: what was to be drawn.
        left: rows of codes of the drawing on the left.
        right: the other's.
        where: names them in messages.

    Raises:
        UserError: the prompt cannot be learned from.
    """
    if not is_unicode(prompt):
        raise UserError(f"{where}: half of a surrogate pair, which no file can hold; remove it")
    row = validate(Choices, {"prompt": prompt, "candidates": [{"codes": left}, {"codes": right}]}, where)
    one, other = row.candidates
    if left == right:
        return None
    if (problem := find_problem(Preference(prompt=row.prompt, chosen=one, rejected=other))) is not None:
        raise UserError(f"{where}: {problem}")
    texts = sorted(_text(_plain(side)) for side in row.candidates)
    key = _hash(_text(_plain(row.prompt[0])), *texts)
    return Pair(key, row.prompt[0], one, other, where)


def _read(value: Mapping[str, Any], where: str, models: set[str]) -> Choices:
    """A line of either form; the model that drew is added to `models`."""
    if not is_unicode(_text(value)):
        raise UserError(f"{where}: half of a surrogate pair, which no file can hold; remove it")
    candidates = value.get("candidates")
    first = candidates[0] if isinstance(candidates, list) and candidates else None
    if isinstance(first, dict) and "seed" in first:
        drawn = validate(PromptCandidates, value, where)
        if "model" in drawn.settings:
            models.add(str(drawn.settings["model"]))
        value = {"prompt": drawn.prompt, "candidates": [{"codes": one.codes} for one in drawn.candidates]}
    row = validate(Choices, value, where)
    if len(row.candidates) < 2:
        raise UserError(f"{where}: candidates: a single one; a choice takes two or more")
    return row


def _pairs(row: Choices, seed: int, each: int | None, where: str) -> list[Pair]:
    """The pairs of a prompt; none if all of its candidates are equal."""
    if len({answer.modality for answer in row.candidates}) > 1:
        raise UserError(f"{where}: candidates: some are texts, some are images; give one kind")
    distinct = list({_text(_plain(answer)): answer for answer in row.candidates}.items())
    if len(distinct) < 2:
        return []
    (_, one), (_, other) = distinct[:2]
    if (problem := find_problem(Preference(prompt=row.prompt, chosen=one, rejected=other))) is not None:
        raise UserError(f"{where}: {problem}")
    prompt = _text(_plain(row.prompt[0]))
    texts = [text for text, _ in distinct]
    matches = _matches(len(distinct), random.Random(f"{seed} {_hash(prompt, *texts)}"))
    pairs = []
    for a, b in itertools.islice(matches, each or len(distinct) // 2):
        key = _hash(prompt, *sorted((texts[a], texts[b])))
        left, right = sorted((a, b), key=lambda place: texts[place])
        if random.Random(f"{seed} {key}").random() < 0.5:
            left, right = right, left
        pairs.append(Pair(key, row.prompt[0], distinct[left][1], distinct[right][1], where))
    return pairs


def _matches(count: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """All pairs of `count` things in rounds, in each of which a thing is at most once (the circle method)."""
    order: list[int | None] = list(range(count))
    rng.shuffle(order)
    if count % 2:
        order.append(None)  # who meets it rests
    half = len(order) // 2
    for _ in range(len(order) - 1):
        for a, b in zip(order[:half], reversed(order[half:]), strict=True):
            if a is not None and b is not None:
                yield a, b
        order = [order[0], order[-1], *order[1:-1]]


def _plain(section: Section) -> dict[str, Any]:
    return section.model_dump(exclude_none=True)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:20]
