"""What the classes for other suites share: many questions through the engine, by the options that suites have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unimm.models.inputs import Images
from unimm.sampling.requests import TextRequest, TextSampling
from unimm.sampling.sampler import noise_keys
from unimm.sampling.text import Answer

if TYPE_CHECKING:
    from unimm.pipeline import UniMM


@dataclass(frozen=True)
class SuiteQuestion:
    """A question of another suite.

    Attributes:
        ids: its tokens, up to where the answer begins.
        images: what the model sees.
        options: `max_new_tokens`, `temperature`, `do_sample`, `top_p`, `top_k` and `until`, as suites name them.
        seed: of its noise, where it is sampled.
    """

    ids: list[int]
    images: Images
    options: Mapping[str, Any]
    seed: int


def sampling_of(options: Mapping[str, Any]) -> TextSampling:
    """A suite's options as the engine takes them; what the engine has nothing like (`num_beams`) is left out.

    Raises:
        UserError: one makes no sense.
    """
    given = {name: options[name] for name in ("top_p", "top_k") if options.get(name) is not None}
    sampled = options.get("do_sample", True) and options.get("temperature")
    until = options.get("until")
    stop = [until] if isinstance(until, str) else [one for one in until or () if one]
    return TextSampling.of(
        {**given, "temperature": float(options["temperature"]) if sampled else 0.0, "stop": stop},  # type: ignore[typeddict-item]
        options.get("max_new_tokens"),
    )


def answer_questions(um: UniMM, questions: Iterable[SuiteQuestion]) -> list[str]:
    """Answer questions, `um.batch_size` of them together; in their order."""
    requests = (
        TextRequest(one.ids, one.images, noise_keys([one.seed], 1)[0], sampling=sampling_of(one.options))
        for one in questions
    )
    engine = um.engine
    answers = [Answer.of(ticket).text for ticket in engine.run(requests, um.batch_size)]
    engine.release()
    return answers
