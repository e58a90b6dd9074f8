"""Our models in lmms-eval, as `--model unimm --model_args pretrained=SOURCE`; it finds them by an entry point.

Needs the package `lmms-eval` (`unimm[lmms-eval]`). `mode=draw` is for tasks that judge drawings, as WISE: the text is
drawn, and the answer is a JSON object with the files of its `images`, as lmms-eval's own models of that kind give it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from unimm.errors import UserError
from unimm.evaluation.answering import score_texts
from unimm.evaluation.plugins.answers import SuiteQuestion, answer_questions
from unimm.files import make_folder
from unimm.images import save_image
from unimm.loading import load
from unimm.sections import near

MODES = ("answer", "draw")


class SimpleModel(lmms):  # type: ignore[misc]
    """Tasks that give a text and images.

    Args:
        pretrained: a folder or hub id; None or `embedded`: the embedded model.
        batch_size: questions that go through the model together.
        device: as `unimm.load` takes it.
        dtype: as `unimm.load` takes it.
        mode: `answer`, or `draw`.
        output: folder of drawings.
        seed: document i of a task has the noise of (seed + i).
        **options: `max_batch_size` of lmms-eval, and options of `UniMM.draw` (`guidance_scale`, `temperature` …).

    Raises:
        UserError: an argument is unknown, or several processes share the work.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 64,
        device: str | None = None,
        dtype: str = "auto",
        mode: str = "answer",
        output: str = "runs/lmms-eval",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        options.pop("max_batch_size", None)
        known = ("guidance_scale", "temperature", "top_k", "top_p")
        for name in options:
            if name not in known or mode != "draw":
                raise UserError(f"model_args: {name}: unknown{near(name, ('pretrained', 'dtype', *known))}")
        if mode not in MODES:
            raise UserError(f"model_args: mode: {mode!r}; give one of {', '.join(MODES)}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("unimm: one process runs a task; use `unimm eval --processes` for several")
        self.um = load(pretrained, device=device or "auto", dtype=dtype)
        if str(batch_size) != "auto":
            self.um.batch_size = int(batch_size)
        self.mode, self.folder, self.seed, self.drawing = mode, Path(output), seed, options
        if mode == "draw":
            self.um.processor.check_draws("mode")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer what a task asks, or draw it; in the order of the requests."""
        if self.mode == "draw":
            return [self._drawn(*request.args) for request in requests]
        return answer_questions(self.um, (self._question(*request.args) for request in requests))

    def _question(self, *arguments: Any) -> SuiteQuestion:
        text, options, visuals, number, task, split = arguments
        ids, seen = self.um.processor.question(text, list(visuals(self.task_dict[task][split][number]) or []))
        return SuiteQuestion(ids, seen, options, self.seed + number)

    def _text(self, arguments: Sequence[Any]) -> str:
        return str(arguments[0])

    def _drawn(self, *arguments: Any) -> str:
        """The answer of a task that judges drawings."""
        number, task = arguments[3], arguments[4]
        (image,) = self.um.draw([self._text(arguments)], 1, seed=[self.seed + number], **self.drawing)
        make_folder(self.folder)
        path = self.folder / f"{task}-{number}.png"
        save_image(image, path)
        return json.dumps({"text": "", "images": [str(path.resolve())]})

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks whose later questions hang on earlier answers.

        Raises:
            UserError: always.
        """
        raise UserError("unimm: tasks of several rounds are not supported")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How unlikely each continuation is, and whether it is what the model would say.

        As lmms-eval's own models do, this returns the mean loss of a continuation's tokens: its tasks take the least.
        """
        found = []
        for text, target, visuals, number, task, split in (request.args for request in requests):
            document = self.task_dict[task][split][number]
            continuation = target if isinstance(target, str) else str(target(document))
            images = list(visuals(document) or [])
            scores = score_texts(self.um, text, images, [continuation.strip()])
            ids, seen = self.um.processor.question(text, images)
            length = int(scores.length[0])
            said = answer_questions(self.um, [SuiteQuestion(ids, seen, {"max_new_tokens": length}, 0)])[0]
            found.append((-float(scores.log_probs[0]) / length, said.strip() == continuation.strip()))
        return found


class ChatModel(SimpleModel):
    """Tasks that give messages."""

    is_simple = False

    def _question(self, *arguments: Any) -> SuiteQuestion:
        _, messages, options, number, task, split = arguments
        listed = [
            {**message, "content": [_part(part) for part in message["content"]]}
            for message in messages(self.task_dict[task][split][number])
        ]
        return SuiteQuestion(*self.um.processor.chat(listed), options, self.seed + number)

    def _text(self, arguments: Sequence[Any]) -> str:
        _, messages, _, number, task, split = arguments
        parts = [
            part for message in messages(self.task_dict[task][split][number]) for part in message["content"]
        ]
        return "\n".join(part["text"] for part in parts if part["type"] == "text")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message as `UniMM.chat` takes it; lmms-eval puts every medium under `url`."""
    return {"type": part["type"], part["type"]: part["url"]} if "url" in part else part
