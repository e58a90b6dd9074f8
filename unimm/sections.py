"""Sections: strict pydantic models that YAML files are read into, with one-line errors that name the file and the key.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from unimm.documents import MAX_DEPTH, check_document, dotted, shown_key
from unimm.errors import UserError
from unimm.files import read_text

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Model = TypeVar("Model", bound=BaseModel)
Described = TypeVar("Described")


class Section(BaseModel):
    """Base of every part of a file: unknown keys, loose types and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Foreign(Section):
    """Base of what is read from another's file: the keys that are known have types, others may stand there."""

    model_config = ConfigDict(extra="ignore", validate_default=False)


class FieldError(UserError):
    """A mistake whose line begins with a key and not with a file, for whoever knows what the key stands in."""


def validate(model: type[Model], data: Any, source: str, key: str = "") -> Model:
    """`data` as a `model`, or a one-line `UserError`: file, dotted key, what was expected, what was there.

    Args:
        model: the section.
        data: what stands there.
        source: the file, or what else the line begins with; "" for nothing.
        key: where in the file the section stands.

    Raises:
        UserError: the line, a `FieldError` if there is no source.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        line = _explain(model, problems[0], key)
        if len(problems) > 1:
            line += f" (and {len(problems) - 1} more)"
        raise (UserError(f"{source}: {line}") if source else FieldError(line)) from None


@functools.cache
def section_of(described: Any) -> type[Section]:
    """Return the section that has the fields of a dataclass."""
    hints = get_type_hints(described, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(described):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = ... if required else Field(default_factory=_default(field))
        fields[field.name] = (hints[field.name], default)
    return create_model(described.__name__, __base__=Section, **fields)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory
    return lambda: field.default


def read_dataclass(described: type[Described], data: Any, source: str, key: str = "") -> Described:
    """Return a dataclass of checked fields; arguments and errors are those of `validate`."""
    fields: Any = described
    return described(**dict(validate(section_of(fields), data, source, key)))


def near(name: object, known: Iterable[str]) -> str:
    """`; did you mean "x"?` where something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


# --- YAML ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number (YAML 1.2) and refuses a key given twice and deep nesting."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > MAX_DEPTH:  # before it looks ahead, which takes the square of the depth
            raise yaml.scanner.ScannerError(None, None, _TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'key "{shown_key(key_node.value)}" is given twice', key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


MAX_YAML = 2**17  # bytes of a recipe
MAX_YAML_NODES = 100_000
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_NUMBERS = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")  # as YAML 1.1 has them: 1:30 is 90 there
_FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"
)
_Loader.yaml_implicit_resolvers = {  # a copy: the resolvers of SafeLoader are shared by everyone
    first: [(tag, rule) for tag, rule in rules if tag not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_INTEGER = re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file that holds a mapping, with `a.b=c` overrides applied; errors are one-line `UserError`s."""
    source = str(path)
    if not Path(path).exists():
        raise UserError(f"{source}: no such recipe file")
    data = _parse(read_text(Path(path), MAX_YAML), source)
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a mapping of keys, got {show(data)}")
    given: dict[str, str] = {}
    for override in overrides:
        _refuse_expanded(override, given, source)
        _override(data, override, source)
    for location, value in _strings(data):
        if "\0" in value:
            raise UserError(f"{source}: {dotted(location)}: holds a NUL, which no text or file name has")
    return data


def _strings(value: Any, location: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every string in what YAML holds, keys too, with where it stands."""
    if isinstance(value, str):
        yield location, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield (*location, str(key)), str(key)
            yield from _strings(one, (*location, str(key)))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _strings(one, (*location, index))


def _parse(text: str, source: str) -> Any:
    try:
        document = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{source}: {_TOO_DEEP}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{source}:{where} {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    check_document(document, source, MAX_YAML_NODES, finite=False)  # sections say where .inf may stand
    return document


def _refuse_expanded(override: str, given: dict[str, str], source: str) -> None:
    """Refuse names of files that a shell made of a range: only the last would count."""
    key, _, value = override.partition("=")
    form = re.sub(r"\d+", "#", value)
    if given.get(key) == form and "#" in form and re.search("[^\\W\\d_]", form):
        raise UserError(
            f"{source}: {key}: given several times; quote a range for the shell: '{key}=…{{000..015}}…'"
        )
    given[key] = form


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


def _explain(model: type[BaseModel], problem: Any, within: str = "") -> str:
    """One pydantic error as `key: expected ..., got ...`."""
    kind, context = problem["type"], problem.get("ctx", {})
    location = [part for part in problem["loc"][:-1] if not _is_tag(part)]
    if kind == "extra_forbidden":  # a key may look like a tag
        location.append(problem["loc"][-1])
    else:
        location += [part for part in problem["loc"][-1:] if not _is_tag(part)]
    known = _fields_at(model, location[:-1])
    location = _walk(model, location)[0]
    place = dotted([within, *location] if within else location)
    key = place or "recipe"
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
        inner = context["error"]
        if isinstance(inner, FieldError):
            return f"{place}.{inner}" if place else str(inner)
        return f"{key}: {inner}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}{got}"


_PLAIN = ("float", "int", "str", "bool")


def _is_tag(part: str | int) -> bool:
    """Whether part of a pydantic location names a validator (`function-after[...]`), not a key."""
    return isinstance(part, str) and (
        "[" in part or part in _PLAIN or part[:1].isupper() or part.startswith("constrained-")
    )


def show(value: object) -> str:
    """A value as the reader would write it, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(model: type[BaseModel], location: Iterable[str | int]) -> tuple[list[str | int], Any]:
    """A location without the kinds by which pydantic distinguishes sections, and what stands there."""
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
    """Kind -> section, where an annotation is a union of sections that their `kind` distinguishes."""
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
