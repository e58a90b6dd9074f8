"""What an engine is asked for: an answer in words or a drawing, how to sample it, and where its pieces go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor

from unimm.errors import UserError
from unimm.models.configuration import SamplingConfig
from unimm.models.inputs import Images
from unimm.models.layout import Grid
from unimm.sampling.grammar import read_grammar
from unimm.sampling.sampler import (
    COLDEST,
    HOTTEST,
    STRONGEST_GUIDANCE,
    Filters,
    NoiseKey,
)

FinishReason = Literal["stop", "length", "cancelled", "error"]
MOST_STOPS, LONGEST_STOP = 16, 256
GREEDY, UNSEEDED = Filters(temperature=0.0), NoiseKey(0)


class TextOptions(TypedDict, total=False):
    """How words are sampled, as keywords of `UniMM.caption`, `ask` and `chat`.

    Keys:
        temperature: 0, the default, takes the likeliest token at every step.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens of this mass; 1 keeps all.
        repetition_penalty: what the logits of tokens that were there before are divided by (arXiv:1909.05858).
        stop: words at which an answer ends; they are not part of it.
        seed: as in `UniMM.draw`.
        json_schema: a JSON schema that the answer follows, as a mapping or as text; `{}` is any JSON.
        regex: a regular expression that the whole answer matches.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    seed: Any
    json_schema: Any
    regex: str | None


@dataclasses.dataclass(frozen=True)
class TextSampling:
    """How one answer is sampled; see `TextOptions`.

    Raises:
        UserError: a line that names the option that makes no sense.
    """

    filters: Filters = GREEDY
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    grammar: str | None = None

    @classmethod
    def of(cls, options: TextOptions, max_new_tokens: Any = None) -> TextSampling:
        """Read keyword options; what is None is left out."""
        given: dict[str, Any] = {k: v for k, v in options.items() if v is not None and k != "seed"}
        unknown = set(given) - set(TextOptions.__annotations__)
        if unknown:
            raise TypeError(f"unexpected option {sorted(unknown)[0]!r}")
        stop = given.get("stop", ())
        penalty = given.get("repetition_penalty", 1.0)
        if not _number(penalty) or not 0.01 <= penalty <= 100:
            raise UserError(f"repetition_penalty: {penalty!r}; give a number from 0.01 to 100 (1 is none)")
        sampling = SamplingConfig(temperature=0.0).updated(
            temperature=given.get("temperature"), top_k=given.get("top_k"), top_p=given.get("top_p")
        )
        return cls(
            filters_of(sampling),
            check_max_new_tokens(max_new_tokens),
            repetition_penalty=float(penalty),
            stop=_stops(stop),
            grammar=read_grammar(given.get("json_schema"), given.get("regex")),
        )


def filters_of(sampling: SamplingConfig) -> Filters:
    """Return the filters of a configuration.

    Raises:
        UserError: a temperature or guidance that float32 cannot compute with.
    """
    temperature, scale = sampling.temperature, sampling.guidance_scale
    if temperature != 0 and not COLDEST <= temperature <= HOTTEST:
        raise UserError(
            f"temperature: {temperature}; give 0 (greedy) or a number from {COLDEST:g} to {HOTTEST:g}"
        )
    if abs(scale) > STRONGEST_GUIDANCE:
        raise UserError(
            f"guidance_scale: {scale:g}; give a number of at most {STRONGEST_GUIDANCE:g} (5 is usual)"
        )
    return Filters(temperature, sampling.top_k, sampling.top_p)


def check_max_new_tokens(most: Any) -> int | None:
    """Return the bound on an answer's length; None: up to the end of the context.

    Raises:
        UserError: it is no whole number of at least 1.
    """
    if most is None:
        return None
    value = most.item() if hasattr(most, "item") else most
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"max_new_tokens: {most!r}; give a whole number of at least 1, or leave it out")
    return value


def _stops(stop: Any) -> tuple[str, ...]:
    listed = (stop,) if isinstance(stop, str) else tuple(stop)
    good = all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in listed)
    if not good or len(listed) > MOST_STOPS:
        raise UserError(f"stop: {stop!r}; give up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
    return listed


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclasses.dataclass
class Request:
    """What is asked for.

    Attributes:
        ids: the prompt's tokens, with placeholders where images stand.
        images: what it sees.
        key: whose noise it has.
    """

    ids: list[int]
    images: Images | None = None
    key: NoiseKey = UNSEEDED


@dataclasses.dataclass
class TextRequest(Request):
    """An answer in words.

    Attributes:
        sampling: how.
        on_text: called with each piece of the answer as soon as it is known.
        remember: whether what was read is held with the answer, for a next turn that begins so.
    """

    sampling: TextSampling = dataclasses.field(default_factory=TextSampling)
    on_text: Callable[[str], None] | None = None
    remember: bool = False


@dataclasses.dataclass
class DrawingRequest(Request):
    """A drawing.

    Attributes:
        grid: (rows, columns) of its codes.
        unconditional: the tokens that guidance steers away from; None: no guidance.
        sampling: how.
        on_codes: called with all codes so far whenever there are more.
    """

    grid: Grid = (0, 0)
    unconditional: list[int] | None = None
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    on_codes: Callable[[list[int]], None] | None = None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way, and what came of it.

    Attributes:
        request: what was asked for.
        known_by: the prompt's tokens with what images hold in their places.
        finish_reason: `stop`: ended by itself; `length`: cut by its bound or the context; `cancelled`; `error`;
            None: it runs or waits.
        ids: of an answer, the tokens so far, without the one that ends it.
        text: of an answer, its words, once it is done.
        codes: of a drawing, int64 [h, w] once it is done.
        error: what went wrong in this request alone.
        passes: of the decoder, for its own codes or tokens.
        prompt_tokens: of its prompt; `cached_tokens` of these were not computed anew.
    """

    request: Request
    known_by: tuple[Hashable, ...] = dataclasses.field(repr=False)
    finish_reason: FinishReason | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    codes: Tensor | None = None
    error: BaseException | None = None
    passes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None
