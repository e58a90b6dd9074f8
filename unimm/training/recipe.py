"""Recipes: YAML files read into strict pydantic models, with one-line errors that name the file and the key.

Every task brings its own subclass of `BaseRecipe`; `TASKS` says where it lives, and `load_recipe` finds it by
the recipe's `task` key. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from unimm.errors import UserError

if TYPE_CHECKING:
    from unimm.training.task import Task

TASKS: dict[str, str] = {
    "tokenizer": "unimm.tokenizers.task:TokenizerRecipe",
    "siglip": "unimm.training.siglip:SiglipRecipe",
    "unified": "unimm.training.unified:UnifiedRecipe",
    "dpo": "unimm.training.preferences.recipe:PreferenceRecipe",
    "grpo": "unimm.preferences.grpo.recipe:GrpoRecipe",
}
"""Task name -> "module:RecipeClass"; imported only when a recipe asks for it."""

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)


class Optimizer(Section):
    """AdamW; weight decay falls on matrices only. `clip` bounds the global gradient norm (null: no bound)."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Rate = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0


class Logging(Section):
    """A line every `every` steps, a preview every `samples_every` (0: never), TensorBoard or not."""

    every: Positive = 10
    samples_every: NotNegative = 0
    tensorboard: bool = True


class Checkpointing(Section):
    """A checkpoint every `every` steps and at each stage's end; the newest `keep` stay, and the best."""

    every: Positive = 500
    keep: Positive = 2
    keep_best: NotNegative = 0
    """The best of each stage that stay too, and whose best is exported beside the last weights (0: none)."""
    metric: Annotated[str, Field(min_length=1)] = "loss"
    """What is best: a name of the log, such as text_loss; its mean over the steps since the last checkpoint."""
    mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest is best."""


class Packing(Section):
    """Several samples in a row, none of which sees another."""

    length: Positive
    """Tokens that a row holds; no sample may be longer."""
    pictures: Positive | None = None
    """Pictures to understand that a row holds; null: any number."""
    rows: Positive = 1
    """Rows in one forward on one device."""


class Stage(Section):
    """One stage: which groups train at which rate, on which mixture of data, for how many steps."""

    name: Annotated[str, Field(min_length=1)]
    steps: Positive
    batch: Positive
    """Samples in a step, over all micro-batches and ranks."""
    micro_batch: Positive | None = None
    """Samples in one forward on one device; null: the whole batch."""
    pack: Packing | None = None
    """Pack samples into rows, instead of a row for each; `micro_batch` has no meaning then."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the decoder with `torch.compile`."""
    lr: Annotated[dict[str, Rate], Field(min_length=1)]
    """Group -> learning rate; groups not listed are frozen."""
    warmup: NotNegative = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixture: dict[str, Rate] = {}
    """Kind of data -> its share; the task says which kinds there are."""
    options: dict[str, Any] = {}
    """Anything else that the task wants to know of a stage."""

    @property
    def micro(self) -> int:
        """Samples in one forward on one device."""
        return self.micro_batch or self.batch

    @field_validator("micro_batch")
    @classmethod
    def _divides(cls, value: int | None, info: Any) -> int | None:
        batch = info.data.get("batch")
        if value is not None and batch is not None and batch % value:
            raise ValueError(f"expected a divisor of batch ({batch}), got {value}")
        return value

    @field_validator("pack")
    @classmethod
    def _alone(cls, value: Packing | None, info: Any) -> Packing | None:
        if value is not None and info.data.get("micro_batch") is not None:
            raise ValueError("rows take the place of micro_batch; remove one of the two")
        return value

    @field_validator("lr")
    @classmethod
    def _trains(cls, value: dict[str, float]) -> dict[str, float]:
        if not any(value.values()):
            raise ValueError(f"every rate is 0, so nothing would train; give {next(iter(value))} one above 0")
        return value

    @field_validator("mixture")
    @classmethod
    def _some(cls, value: dict[str, float]) -> dict[str, float]:
        if value and sum(value.values()) <= 0:
            raise ValueError("expected at least one share above 0")
        return value


class BaseRecipe(Section):
    """What all recipes have in common; a task's recipe adds its own sections and `build_task`."""

    ENGINE_KEYS: ClassVar[tuple[str, ...]] = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
    )

    task: str
    output: Annotated[str, Field(min_length=1)]
    seed: NotNegative = 0
    stages: Annotated[list[Stage], Field(min_length=1)]
    optimizer: Optimizer = Optimizer()
    logging: Logging = Logging()
    checkpoint: Checkpointing = Checkpointing()
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights; previews, exports and the next stage use the average."""
    deepspeed: dict[str, Any] = {}
    """Merged into the engine's configuration."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype (weights stay float32); auto: bfloat16 on CUDA, float32 on CPU."""

    _source: str = PrivateAttr(default="recipe")

    @field_validator("stages")
    @classmethod
    def _names(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'two stages are named "{name}"; give each its own name')
        return stages

    @field_validator("deepspeed")
    @classmethod
    def _engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in cls.ENGINE_KEYS:
            if key in value:
                raise ValueError(f'"{key}" is set by the trainer from the recipe; remove it here')
        zero = value.get("zero_optimization", {})
        if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
            raise ValueError(f"zero_optimization: expected a stage of 0, 1, 2 or 3, got {show(zero)}")
        _check_offload(zero)
        for key in ("bf16", "fp16"):
            if isinstance(value.get(key), dict) and value[key].get("enabled"):
                raise ValueError(f'{key}: weights stay float32; set "dtype" for bfloat16 arithmetic')
        return value

    @property
    def zero_stage(self) -> int:
        """What DeepSpeed shards over the ranks: 0 nothing, 1 the optimizer, 2 and gradients, 3 and weights."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is kept out of the GPUs' memory."""
        section = self.deepspeed.get("zero_optimization", {}).get("offload_optimizer")
        return isinstance(section, dict) and section.get("device", "cpu") == "cpu"

    @property
    def source(self) -> str:
        """The file that the recipe was read from, for messages."""
        return self._source

    def error(self, key: str, message: str) -> UserError:
        """A one-line error about a key of this recipe, for a task that finds one later."""
        return UserError(f"{self._source}: {key}: {message}")

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """Make the model and the data of a recipe, as read from its file, tiny; see `smoke_recipe`."""

    def build_task(self) -> Task:
        """The task that this recipe describes."""
        raise NotImplementedError(f"{type(self).__name__} must define build_task")


def _check_offload(zero: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed would move out of a GPU's memory where whole checkpoints could not be had from it."""
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key)
        device = section.get("device", "cpu") if isinstance(section, dict) else section
        if device in (None, "none"):
            continue
        where = f"zero_optimization.{key}"
        if key == "offload_param":
            raise ValueError(f"{where}: weights stay on the devices; use stage 3, and offload_optimizer")
        if not isinstance(section, dict) or device != "cpu":
            raise ValueError(
                f"{where}: expected {{device: cpu}}, from which checkpoints are made, got {show(section)}"
            )
        if not zero.get("stage", 0):
            raise ValueError(f"{where}: needs a stage of 1, 2 or 3")


Recipe = BaseRecipe
Model = TypeVar("Model", bound=BaseModel)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> BaseRecipe:
    """Read a training recipe.

    Args:
        path: the YAML file.
        overrides: `a.b=c` or `stages[0].steps=5`; the value is parsed as YAML.

    Raises:
        UserError: one line naming the file and the key.
    """
    source = str(path)
    data = read_yaml(path, overrides)
    return _typed(_recipe_class(data, source), data, source)


def smoke_recipe(path: str | Path, overrides: Iterable[str] = ()) -> BaseRecipe:
    """Read a training recipe and make it so small that two cores finish it in a minute: does it run at all?

    Every stage keeps its groups, rates, schedule, mixture and options, on two steps of two samples each, with
    tiny widths and random weights; the run goes into a folder of its own.

    Raises:
        UserError: one line naming the file and the key.
    """
    source = str(path)
    data = read_yaml(path, overrides)
    recipe_class = _recipe_class(data, source)
    _typed(recipe_class, data, source)  # mistakes in the recipe itself are named as ever
    data["output"] = f"{str(data['output']).rstrip('/')}-smoke"
    for stage in data["stages"]:
        stage |= {"steps": 2, "batch": 2, "micro_batch": None, "warmup": min(stage.get("warmup", 0), 1)}
        if stage.get("pack"):
            stage |= {"pack": {"length": 512}}
    data |= {"device": "cpu", "checkpoint": {"every": 2}, "logging": {"every": 1, "tensorboard": False}}
    recipe_class.shrink(data)
    return _typed(recipe_class, data, source)


def _recipe_class(data: Mapping[str, Any], source: str) -> type[BaseRecipe]:
    """The recipe class of the task that a recipe names."""
    name = data.get("task")
    if name is None:
        raise UserError(f"{source}: task: missing; one of {', '.join(TASKS)}")
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(
            f"{source}: task: expected one of {', '.join(TASKS)}, got {show(name)}{near(name, TASKS)}"
        )
    module, _, attribute = TASKS[name].partition(":")
    recipe_class: type[BaseRecipe] = getattr(importlib.import_module(module), attribute)
    return recipe_class


def _typed(recipe_class: type[BaseRecipe], data: Mapping[str, Any], source: str) -> BaseRecipe:
    """The recipe that `data` holds."""
    recipe = validate(recipe_class, data, source)
    recipe._source = source
    return recipe


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
