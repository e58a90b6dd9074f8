"""A judge behind a URL as a scorer of drawings, so that it may run in an environment of its own, or elsewhere.

A scorer named by a YAML file with `task: judge` is one. A `chat` judge speaks as OpenAI's chat completions do and is
asked about each drawing, several at once; a `scores` judge takes all drawings of a prompt in one request,
`{"prompts": [...], "images": [base64 of PNG, ...]}`, and answers `{"scores": [...]}`.
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from unimm.evaluation import judges
from unimm.evaluation.judges import JudgeError, UrlJudge, post_json
from unimm.evaluation.protocol import JudgeChoice, fill_prompt
from unimm.sections import NotNegative, Positive, Section, read_yaml, validate

if TYPE_CHECKING:
    from unimm.preferences.scorers import Candidate

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
QUESTION = (
    'How well does this image show "{prompt}"? Answer with a number from 0, not at all, to 1, entirely.'
)


class JudgeSettings(Section):
    """A judge behind a URL."""

    task: Literal["judge"]
    url: Annotated[str, Field(pattern="^https?://")]
    """Of a `chat` judge the base, as http://127.0.0.1:8000/v1; of a `scores` judge the whole address."""
    speaks: Literal["chat", "scores"] = "chat"
    model: Annotated[str, Field(min_length=1)] = "judge"
    version: str | None = None
    """What it calls itself in its answers; null: what it first does. Another version ends the run."""
    prompt: Annotated[str, Field(min_length=1)] = QUESTION
    """What a `chat` judge is asked; `{prompt}` is what was to be drawn."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The best mark; marks are divided by it."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds an answer may take."""
    retries: NotNegative = 3
    together: Positive = 8
    """Requests at once, to a `chat` judge."""


def load_judge(path: str) -> JudgeSettings:
    """Read the settings of a judge.

    Raises:
        UserError: one line naming the file and the key.
    """
    return validate(JudgeSettings, read_yaml(path), path)


class JudgeScorer:
    """Scores of candidates by a judge behind a URL.

    Args:
        settings: who it is.

    Attributes:
        failed: prompts for which it went on failing, after all tries; whoever asks counts them too.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings, self.failed = settings, 0
        choice = JudgeChoice(kind="url", **settings.model_dump(include=set(JudgeChoice.model_fields)))
        self.judge = UrlJudge(choice)

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return a mark for each of a prompt's candidates, usually from 0 to 1.

        Raises:
            JudgeError: it does not answer, or answers nonsense, for one of them.
            UserError: it refuses, or is another version than before.
        """
        images = [_png(candidate) for candidate in candidates]
        prompts = [candidate.prompt.prompt for candidate in candidates]
        try:
            marks = (
                self._scores(prompts, images)
                if self.settings.speaks == "scores"
                else self._asked(prompts, images)
            )
        except JudgeError:
            self.failed += 1
            raise
        return [mark / self.settings.scale for mark in marks]

    def _asked(self, prompts: Sequence[str], images: Sequence[bytes]) -> list[float]:
        def ask(prompt: str, image: bytes) -> float:
            text = fill_prompt(self.settings.prompt, {"prompt": prompt})
            return self.judge.ask(f"prompt {prompt!r}", text, [image], self._mark)[0]

        with ThreadPoolExecutor(self.settings.together) as pool:
            return list(pool.map(ask, prompts, images))

    def _mark(self, words: str) -> float | None:
        """The first number of a judge's words, where it is a mark."""
        found = _NUMBER.search(words)
        return float(found[0]) if found and 0 <= float(found[0]) <= self.settings.scale else None

    def _scores(self, prompts: Sequence[str], images: Sequence[bytes]) -> list[float]:
        """All marks in one request."""
        body = {
            "model": self.settings.model,
            "prompts": list(prompts),
            "images": [base64.b64encode(image).decode() for image in images],
        }
        problem, wait = "", judges.FIRST_WAIT
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(wait)
                wait *= 2
            reply, problem = post_json(self.settings.url, body, self.settings.timeout)
            if reply is None:
                continue
            self.judge.check_version(f"prompt {prompts[0]!r}", reply)
            marks = _marks(reply, len(images))
            if marks is not None:
                return marks
            problem = f"gave no list of {len(images)} numbers under scores"
        tries = f" ({self.settings.retries + 1} tries)" if self.settings.retries else ""
        raise JudgeError(f"prompt {prompts[0]!r}: the judge {self.settings.url} {problem}{tries}")


def _marks(reply: dict[str, Any], count: int) -> list[float] | None:
    """The marks of a reply; None where they are no numbers, or not so many."""
    marks = reply.get("scores")
    if not isinstance(marks, list) or len(marks) != count:
        return None
    good = all(isinstance(mark, int | float) and not isinstance(mark, bool) for mark in marks)
    return [float(mark) for mark in marks] if good else None


def _png(candidate: Candidate) -> bytes:
    buffer = io.BytesIO()
    candidate.image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
