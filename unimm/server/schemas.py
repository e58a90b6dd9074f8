"""The requests of OpenAI's routes as they are taken here: which fields there are, their types, and what is left out.

What OpenAI's clients send and a model here has no use for is accepted where ignoring it does no harm (`user`,
`quality`) and refused where an answer would be another than asked for (`tools`, `logprobs`). A misspelt field is
refused too.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, Field, field_validator, model_validator

from unimm.sections import FieldError, Section, validate
from unimm.server.body import form_value
from unimm.server.errors import APIError

Seed = Annotated[int, Field(ge=0, lt=2**64)]
MAX_MESSAGES = 1024
MAX_PROMPT = 32_000  # characters, as OpenAI's longest


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImageURL(Section):
    """Where an image is: `data:`, `http(s):` or `file:`; `detail` has no effect."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class VideoURL(Section):
    """Where a video is, as an image; which frames are taken: `fps` of a second, or `nframes` in all."""

    url: str
    fps: float | None = None
    nframes: int | None = None


class ContentPart(Section):
    """A piece of a message: words, an image or a video."""

    type: Literal["text", "image_url", "video_url"]
    text: str | None = None
    image_url: Annotated[ImageURL | None, BeforeValidator(_as_url)] = None
    video_url: Annotated[VideoURL | None, BeforeValidator(_as_url)] = None

    @model_validator(mode="after")
    def _one(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise FieldError(f"{self.type}: missing")
        for other in ("text", "image_url", "video_url"):
            if other != self.type and getattr(self, other) is not None:
                raise FieldError(f"{other}: does not go with the type {self.type}")
        return self


class ChatMessage(Section):
    """A turn: who says what. `content` is a text or a list of parts; `name` has no effect."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart], Field(min_length=1), BeforeValidator(_as_parts)]
    name: str | None = None


class StreamOptions(Section):
    """What a stream has beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JSONSchema(Section):
    """A JSON schema that an answer follows; its name, description and strictness have no effect."""

    json_schema: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Section):
    """What form an answer has: words, a JSON object, or what a JSON schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @property
    def schema_text(self) -> dict[str, Any] | None:
        """The schema that an answer follows."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.json_schema

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("json_schema: goes with the type json_schema, and that with it")
        return self


class APIRequest(Section):
    """What all requests have.

    Attributes:
        IGNORED: fields that may stand there and have no effect.
        UNSUPPORTED: fields that change an answer and cannot be had, with the values that ask for nothing.
    """

    IGNORED: ClassVar[frozenset[str]] = frozenset({"user", "safety_identifier"})
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None

    @property
    def count(self) -> int:
        """How many answers or drawings are asked for."""
        return self.n or 1


class ChatRequest(APIRequest):
    """`POST /v1/chat/completions`; `top_k`, `repetition_penalty` and `regex` are ours (`extra_body`)."""

    IGNORED = APIRequest.IGNORED | {
        "store", "metadata", "service_tier", "parallel_tool_calls", "reasoning_effort", "verbosity", "prompt_cache_key",
        "prompt_cache_retention", "prompt_cache_options", "prediction",
    }  # fmt: skip
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
        "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "frequency_penalty": (0,),
        "presence_penalty": (0,), "audio": (), "modalities": (["text"],), "moderation": (), "web_search_options": (),
    }  # fmt: skip

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    repetition_penalty: float | None = None
    regex: Annotated[str, Field(max_length=4096)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The bound on an answer's length."""
        given = [most for most in (self.max_tokens, self.max_completion_tokens) if most is not None]
        return min(given, default=None)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends in the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("stream_options")
    @classmethod
    def _streams(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("goes with stream: true")
        return value


class ImageRequest(APIRequest):
    """`POST /v1/images/generations`; `seed`, `guidance_scale`, `temperature`, `top_k`, `top_p` and `negative_prompt`
    are ours (`extra_body`).
    """  # noqa: D205

    IGNORED = APIRequest.IGNORED | {"quality", "style", "moderation", "input_fidelity"}
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": ("auto", "opaque"), "mask": (), "markup": (), "svg": (), "complexity": (), "frame_count": (1,),
        "frame_duration_ms": (),
    }  # fmt: skip

    prompt: Annotated[str, Field(max_length=MAX_PROMPT)]
    size: str | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    partial_images: Annotated[int, Field(ge=0)] | None = None
    guidance_scale: float | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None

    @property
    def format(self) -> str:
        """The format of the images, as Pillow names it."""
        return (self.output_format or "png").upper()


class SentImage(Section):
    """An image to edit, as JSON has it."""

    image_url: Annotated[ImageURL, BeforeValidator(_as_url)]


class EditRequest(ImageRequest):
    """`POST /v1/images/edits`: as `/v1/images/generations`, with images that the drawing starts from.

    A form has them as files, `image` or `image[]`.
    """

    images: list[SentImage] = Field(default_factory=list)


AnyRequest = TypeVar("AnyRequest", bound=APIRequest)


def read_request(kind: type[AnyRequest], document: Mapping[str, Any]) -> AnyRequest:
    """Return the request that a document is.

    Args:
        kind: of request.
        document: the JSON object.

    Raises:
        APIError: a field is unknown, missing, of the wrong type, or cannot be had here.
    """
    fields = {name: value for name, value in document.items() if name not in kind.IGNORED}
    for name, harmless in kind.UNSUPPORTED.items():
        value = fields.pop(name, None)
        if value is not None and not any(
            value == one and type(value) in (type(one), float) for one in harmless
        ):
            raise APIError(400, f"{name}: not supported here; leave it out", "unsupported", name)
    try:
        return validate(kind, fields, "")
    except FieldError as error:
        line = str(error)
        code = "unknown_field" if ": unknown key" in line else "invalid_value"
        raise APIError(400, line, code, line.partition(":")[0]) from None


def read_fields(kind: type[AnyRequest], fields: Mapping[str, Any]) -> AnyRequest:
    """Return the request that the fields of a form are, in which numbers are texts.

    Args:
        kind: of request.
        fields: texts by their names.

    Raises:
        APIError: as `read_request`.
    """
    document = dict(fields)
    for name, value in fields.items():
        field = kind.model_fields.get(name)
        if field is not None and not _is_text(field.annotation):
            document[name] = form_value(value)
    return read_request(kind, document)


def _is_text(annotation: Any) -> bool:
    """Whether a field holds a text."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_text(part) for part in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    return annotation is str or get_origin(annotation) is Literal
