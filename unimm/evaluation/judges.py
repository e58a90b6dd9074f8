"""Judges of answers and drawings: a model behind a URL, or one of ours; what each says is kept word for word.

A judge behind a URL speaks as OpenAI's chat completions do. It is asked again when it fails; if it goes on failing,
says what no rule reads, or calls itself by another version than before, the run ends in one line.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from unimm.errors import UserError
from unimm.evaluation.protocol import JudgeChoice

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_REPLY = 1 << 20  # bytes of a judge's answer
FIRST_WAIT = 0.5  # seconds before the second try; each later one waits twice as long
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
Read = TypeVar("Read")
Reader = Callable[[str], Read | None]
"""What a judge's words mean; None where they mean nothing."""


class JudgeError(UserError):
    """A judge that went on failing; another item may fare better."""


class UrlJudge:
    """A model behind a URL.

    Args:
        choice: who it is, how long it may take and how often it is asked again.
        version: what it called itself when it was first asked, if it was.

    Raises:
        UserError: the protocol gives no URL or no model.
    """

    def __init__(self, choice: JudgeChoice, version: str | None = None) -> None:
        if not choice.url or not choice.url.startswith(("http://", "https://")):
            raise UserError("judge.url: give the address of a judge, as judge.url=http://127.0.0.1:8000/v1")
        if not choice.model:
            raise UserError("judge.model: give the name of the model that the judge is to be")
        self.choice = choice
        self.version = choice.version or version
        self.address = f"{choice.url.rstrip('/')}/chat/completions"

    def ask(
        self, item: str, text: str, images: Sequence[bytes], read: Callable[[str], Read | None]
    ) -> tuple[Read, str]:
        """Ask something, and read what is said.

        Args:
            item: names what is judged, for errors.
            text: the question.
            images: encoded images that go with it.
            read: what the judge's words mean; None where they mean nothing.

        Returns:
            What they mean, and the words.

        Raises:
            JudgeError: it does not answer, or answers nonsense.
            UserError: it refuses, or is another version.
        """
        content: list[dict[str, Any]] = [
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{base64.b64encode(one).decode()}"},
            }
            for one in images
        ]
        content.append({"type": "text", "text": text})
        body = {
            "model": self.choice.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
        }
        problem, wait = "", FIRST_WAIT
        for attempt in range(self.choice.retries + 1):
            if attempt:
                time.sleep(wait)
                wait *= 2
            reply, problem = post_json(self.address, body, self.choice.timeout)
            if reply is None:
                continue
            self.check_version(item, reply)
            words = _words(reply)
            if words is None:
                problem = "gave no message"
                continue
            found = read(words)
            if found is not None:
                return found, words
            problem = f"said {_short(words)}, which no rule reads"
        tries = f" ({self.choice.retries + 1} tries)" if self.choice.retries else ""
        raise JudgeError(f"{item}: the judge {self.choice.url} {problem}{tries}; nothing was scored for it")

    def check_version(self, item: str, reply: dict[str, Any]) -> None:
        """Hold the judge to the version that it was.

        Raises:
            UserError: it calls itself by another.
        """
        said = str(reply.get("model", "unknown"))
        if self.version is None:
            self.version = said
        elif said != self.version:
            raise UserError(
                f"{item}: the judge {self.choice.url} is {said} now, and was to be {self.version}; scores of two "
                "judges are not mixed"
            )


def post_json(address: str, body: dict[str, Any], timeout: float) -> tuple[dict[str, Any] | None, str]:
    """Send a JSON request; the reply, or None and what went wrong.

    Args:
        address: where to, with its key in `OPENAI_API_KEY` if it wants one.
        body: what is sent.
        timeout: seconds the reply may take.

    Raises:
        UserError: the judge refuses the request, which no second try mends.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    late = f"did not answer within {timeout:g} s"
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            reply = json.loads(answer.read(MAX_REPLY))
    except urllib.error.HTTPError as error:
        if error.code not in RETRIED:
            raise UserError(f"judge.url: {address} refuses ({error.code} {error.reason})") from None
        return None, f"answers with {error.code} {error.reason}"
    except TimeoutError:
        return None, late
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return None, late if isinstance(reason, TimeoutError) else f"cannot be reached ({reason})"
    except ValueError:
        return None, "answered what is no JSON"
    return (reply, "") if isinstance(reply, dict) else (None, "answered no JSON object")


def _words(reply: dict[str, Any]) -> str | None:
    try:
        words = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return words if isinstance(words, str) else None


def _short(text: str) -> str:
    shown = " ".join(text.split())
    return repr(shown if len(shown) <= 60 else f"{shown[:60]}…")


class ModelJudge:
    """One of our own models.

    Args:
        um: the model.
        version: its hash.
    """

    def __init__(self, um: UniMM, version: str) -> None:
        self.um, self.version = um, version

    def ask(
        self, item: str, text: str, images: Sequence[bytes], read: Callable[[str], Read | None]
    ) -> tuple[Read, str]:
        """Ask something, and read what is said; see `UrlJudge.ask`.

        Raises:
            UserError: it says what no rule reads.
        """
        words = self.um.answers([list(images)], [text], 16)[0].text
        found = read(words)
        if found is None:
            raise UserError(
                f"{item}: the judge {self.version[:12]} said {_short(words)}, which no rule reads"
            )
        return found, words


def read_yes(text: str) -> bool | None:
    """Whether a judge says yes; None where it says neither yes nor no."""
    words = text.lower().replace(".", " ").replace(",", " ").split()
    return {"yes": True, "no": False}.get(words[0]) if words else None


def read_share(text: str) -> float | None:
    """The number from 0 to 1 that a judge's words begin with."""
    try:
        value = float(text.split()[0])
    except (ValueError, IndexError):
        return None
    return value if 0 <= value <= 1 else None
