"""Our models in VLMEvalKit: a class for it, and a runner that registers models by name and starts its own program.

    python -m unimm.evaluation.plugins.vlmevalkit --unimm janus=deepseek-ai/Janus-Pro-1B --model janus --data POPE

Needs VLMEvalKit (its module `vlmeval`). All that follows is read by VLMEvalKit's own `run.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import vlmeval
from vlmeval.vlm.base import BaseModel

from unimm.errors import UserError
from unimm.evaluation.plugins.answers import SuiteQuestion, answer_questions
from unimm.loading import load


class UniMMModelForKit(BaseModel):  # type: ignore[misc]
    """A model as VLMEvalKit asks it: one message of texts and images at a time.

    Args:
        source: a folder or hub id; None or `embedded`: the embedded model.
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        **kwargs: what else VLMEvalKit gives to every model; not needed.
    """

    INTERLEAVE = True

    def __init__(
        self,
        source: str | None = None,
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.um = load(source)
        self.options = {"max_new_tokens": max_new_tokens, "temperature": temperature}

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer a message; its images and texts stay in their order."""
        parts = [{"type": one["type"], one["type"]: one["value"]} for one in message]
        return self._answer([{"role": "user", "content": parts}])

    def chat_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer a conversation."""
        return self._answer([
            {
                "role": turn["role"],
                "content": [{"type": one["type"], one["type"]: one["value"]} for one in turn["content"]],
            }
            for turn in message
        ])  # fmt: skip

    def _answer(self, messages: list[dict[str, Any]]) -> str:
        ids, seen = self.um.processor.chat(messages)
        return answer_questions(self.um, [SuiteQuestion(ids, seen, self.options, 0)])[0]


def register_models(arguments: Sequence[str]) -> list[str]:
    """Make models known to VLMEvalKit.

    Args:
        arguments: of the command; each `--unimm NAME=SOURCE` names a model.

    Returns:
        The other arguments.

    Raises:
        UserError: one is no NAME=SOURCE, or VLMEvalKit has a model of that name.
    """
    from vlmeval.config import supported_VLM

    left, given = [], list(arguments)
    while given:
        argument = given.pop(0)
        if argument != "--unimm":
            left.append(argument)
            continue
        name, mark, source = (given.pop(0) if given else "").partition("=")
        if not (name and mark and source):
            raise UserError("--unimm: expected NAME=SOURCE, as --unimm janus=deepseek-ai/Janus-Pro-1B")
        if name in supported_VLM:
            raise UserError(f"--unimm: {name}: VLMEvalKit has a model of that name; give another")
        supported_VLM[name] = partial(UniMMModelForKit, source)
    return left


def kit_program() -> ModuleType:
    """Return VLMEvalKit's own program, which its wheel has within the package and its repository beside it.

    Raises:
        UserError: it is in neither place.
    """
    if importlib.util.find_spec("vlmeval.run") is not None:
        return importlib.import_module("vlmeval.run")
    file = Path(vlmeval.__file__).parents[1] / "run.py"
    spec = importlib.util.spec_from_file_location("vlmeval_run", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f"VLMEvalKit: no {file}; install it from a clone of its repository by pip install -e")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def main() -> None:
    """Register models, and run VLMEvalKit."""
    try:
        sys.argv[1:] = register_models(sys.argv[1:])
        program = kit_program()
    except UserError as error:
        raise SystemExit(f"unimm: {error}") from None
    program.load_env()  # as it does when it is a program
    program.main()


if __name__ == "__main__":
    main()
