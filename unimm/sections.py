"""Sections: strict pydantic models that YAML files are read into, with one-line errors that name the file and the key.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unimm.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Base of every part of a file: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)


def validate(model: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """`data` as a `model`, or a one-line `UserError`: file, dotted key, what was expected, what was there."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        line = f"{source}: {_explain(model, problems[0])}"
        if len(problems) > 1:
            line += f" (and {len(problems) - 1} more)"
        raise UserError(line) from None


def near(name: object, known: Iterable[str]) -> str:
    """`; did you mean "x"?` where something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


# --- YAML ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'key "{key_node.value}" is given twice', key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"
)
_Loader.yaml_implicit_resolvers = {  # a copy: the resolvers of SafeLoader are shared by everyone
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file that holds a mapping, with `a.b=c` overrides applied; errors are one-line `UserError`s."""
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{source}: no such recipe file") from None
    except UnicodeDecodeError:
        raise UserError(f"{source}: not a text file") from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    data = _parse(text, source)
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a mapping of keys, got {show(data)}")
    for override in overrides:
        _override(data, override, source)
    return data


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{source}:{where} {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _override(data: dict[str, Any], text: str, source: str) -> None:
    """Set one `a.b[0].c=value` in place."""
    path, equals, value = text.partition("=")
    steps: list[str | int] = [
        int(part) if part.isdigit() else part
        for part in re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
    ]
    if not equals or "" in steps:
        raise UserError(f'{source}: override "{text}": expected key=value, such as stages[0].steps=100')
    node: Any = data
    for depth, step in enumerate(steps):
        here = dotted(steps[:depth]) or "the recipe"
        if isinstance(node, list):
            if not isinstance(step, int) or step >= len(node):
                raise UserError(
                    f'{source}: override "{text}": {here} has the indices 0 to {len(node) - 1}, not {step}'
                )
        elif isinstance(node, dict):
            step = str(step)
        else:
            raise UserError(f'{source}: override "{text}": {here} is {show(node)}, which has no keys')
        if depth == len(steps) - 1:
            node[step] = _parse(value, f'{source}: override "{text}"')
            return
        if isinstance(node, dict) and node.get(str(step)) is None:
            node[step] = {}
        node = node[step]


# --- what went wrong, in a line -----------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
    "none_required": "null",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _explain(model: type[BaseModel], problem: Any) -> str:
    """One pydantic error as `key: expected ..., got ...`."""
    kind, context = problem["type"], problem.get("ctx", {})
    *section, last = problem["loc"] or ("",)
    location = [part for part in section if not _is_tag(part)]
    if kind == "extra_forbidden" or not _is_tag(last):  # a key may look like a tag
        location.append(last)
    known = _fields_at(model, location[:-1])
    location = _walk(model, location)[0]
    key = dotted(location) or "recipe"
    got = f", got {show(problem['input'])}"
    if kind == "extra_forbidden":
        return f"{key}: unknown key{near(location[-1], known)}" + (
            f" (known: {', '.join(known)})" if known else ""
        )
    if kind == "missing":
        return f"{key}: missing"
    if kind in _EXPECTED:
        return f"{key}: expected {_EXPECTED[kind]}{got}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{key}: expected {words} {context[bound]:g}{got}"
    if kind == "literal_error":
        options = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"{key}: expected one of {options}{got}{near(problem['input'], options.split(', '))}"
    if kind == "union_tag_invalid":
        options, tag = context["expected_tags"].replace("'", ""), context["tag"]
        return f"{key}.kind: expected one of {options}, got {show(tag)}{near(tag, options.split(', '))}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: missing"
    if kind in ("too_short", "string_too_short"):
        return f"{key}: expected at least {context.get('min_length')}{got}"
    if kind in ("value_error", "assertion_error"):
        return f"{key}: {context['error']}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}{got}"


def _is_tag(part: str | int) -> bool:
    """Whether part of a pydantic location names a validator (`function-after[...]`), not a key."""
    return isinstance(part, str) and (
        "[" in part or part in ("float", "int", "str", "bool") or part[:1].isupper()
    )


def dotted(location: Iterable[str | int]) -> str:
    """`("stages", 1, "steps")` as `stages[1].steps`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def show(value: object) -> str:
    """A value as the reader would write it, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(model: type[BaseModel], location: Iterable[str | int]) -> tuple[list[str | int], Any]:
    """A location without the kinds by which pydantic tells apart sections, and what stands there."""
    kept: list[str | int] = []
    found: Any = model
    for part in location:
        kinds = _kinds(found)
        if part in kinds:
            found = kinds[str(part)]
            continue
        kept.append(part)
        if isinstance(part, str) and isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(part)
            annotation = field.annotation if field else None
            found = annotation if field and field.discriminator else _section(annotation)
    return kept, found


def _kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """Kind -> section, where an annotation is a union of sections that their `kind` tells apart."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return {}
    sections: list[Any] = [
        part
        for part in get_args(annotation)
        if isinstance(part, type) and issubclass(part, BaseModel) and "kind" in part.model_fields
    ]
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def _fields_at(model: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    """Names of the fields of the section at `location`; empty where it is not a section."""
    found = _walk(model, location)[1]
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def _section(annotation: Any) -> Any:
    """The first pydantic model inside an annotation such as `list[Stage]` or `Model | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    if get_origin(annotation) in (list, dict, tuple, Annotated, Union, types.UnionType):
        for inner in get_args(annotation):
            if (section := _section(inner)) is not None:
                return section
    return None
