"""Recipes: YAML files read into sections (`unimm.sections`), the parts that all have in common among them.

Every task brings its own subclass of `BaseRecipe`; `TASKS` says where it lives, and `load_recipe` finds it by
the recipe's `task` key. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from unimm.console import say
from unimm.errors import UserError, UserNote
from unimm.recipes import recipe_root
from unimm.sections import Fraction, NotNegative, Positive, Rate, Section, near, read_yaml, show, validate

if TYPE_CHECKING:
    from unimm.training.task import Task

TASKS: dict[str, str] = {
    "tokenizer": "unimm.training.tokenizer.task:TokenizerRecipe",
    "siglip": "unimm.training.tasks.siglip:SiglipRecipe",
    "unified": "unimm.training.tasks.unified:UnifiedRecipe",
    "dpo": "unimm.preferences.dpo:PreferenceRecipe",
    "grpo": "unimm.preferences.grpo:GrpoRecipe",
    "online_dpo": "unimm.preferences.online_dpo:OnlineDpoRecipe",
}
"""Task name -> "module:RecipeClass"; imported only when a recipe asks for it."""
VALIDATION = "validation/"
"""What the names of losses on held-out items begin with in the log."""
Kind = TypeVar("Kind", bound=Section)


class Optimizer(Section):
    """AdamW; weight decay falls on matrices only. `clip` bounds the global gradient norm (null: no bound)."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Rate = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0


class Logging(Section):
    """A line every `every` steps, a preview every `samples_every` (0: never), and who else is told."""

    every: Positive = 10
    samples_every: NotNegative = 0
    tensorboard: bool = True
    trackers: Annotated[tuple[Literal["wandb", "trackio"], ...], Field(strict=False)] = ()
    """Services that get the same numbers (`pip install 'unimm[trackers]'`)."""
    project: Annotated[str, Field(min_length=1)] = "unimm"
    """The project of theirs that the run belongs to."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """TFLOP/s of one device in the number format of training (H100, bfloat16: 989), of which `mfu` is the share."""


class Checkpointing(Section):
    """A checkpoint every `every` steps and at each stage's end; the newest `keep` stay, and the best."""

    every: Positive = 500
    keep: Positive = 2
    keep_best: NotNegative = 0
    """The best of each stage that stay too, and whose best is exported beside the last weights (0: none)."""
    metric: Annotated[str, Field(min_length=1)] = "loss"
    """What is best: a name of the log, such as text_loss, as its mean over the steps since the last checkpoint.

    In a recipe with `data.validation` it is by default `validation/loss`, as measured at the checkpoint.
    """
    mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest is best."""


class ValidationSection(Section, Generic[Kind]):
    """Items that are never trained on, whose losses are measured while a run goes on."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each source's items that is held out, by a hash of the item's file or key: the same in every run."""
    sources: dict[str, Kind] = Field(default_factory=dict)
    """Name -> data of its own to measure on, beside that share."""
    every: Positive = 100
    """Steps from one measurement to the next; there is one before the first step and at each stage's end too."""
    items: Positive = 128
    """Most items that are measured, spread evenly over what is held out."""

    @model_validator(mode="after")
    def _some(self) -> ValidationSection[Kind]:
        if not self.share and not self.sources:
            raise ValueError("nothing is held out; give a share, such as 0.1, or sources")
        return self


class Packing(Section):
    """Several samples in a row, none of which sees another."""

    length: Positive
    """Tokens that a row holds, and most that a sample may have; of sources, what is longer is cut or a bad item."""
    images: Positive | None = None
    """Images to understand that a row holds; null: any number. An item of a source with more is bad."""
    rows: Positive = 1
    """Rows in one forward on one device."""


def _warmup_kind(value: Any) -> str:
    return "dict[steps]" if isinstance(value, Mapping) else "steps[all]"


Warmup: TypeAlias = Annotated[
    Annotated[dict[str, NotNegative], Tag("dict[steps]")] | Annotated[NotNegative, Tag("steps[all]")],
    Discriminator(_warmup_kind),
]
"""Steps for all groups, or by group."""


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
    warmup: Warmup = 0
    """Steps over which the rates rise; where the stage has fewer, they rise over all of it. Also by group, as `lr`:
    those of groups not listed do not rise."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixture: dict[str, Rate] = Field(default_factory=dict)
    """Kind of data -> its share; the task says which kinds there are."""
    options: dict[str, Any] = Field(default_factory=dict)
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

    @field_validator("warmup")
    @classmethod
    def _of_groups(cls, value: int | dict[str, int], info: Any) -> int | dict[str, int]:
        rates = info.data.get("lr")
        for group in value if isinstance(value, dict) and rates is not None else ():
            if group not in rates:
                raise ValueError(f"{group} has no rate in lr, so none rises; expected of {', '.join(rates)}")
        return value

    def warmup_of(self, group: str) -> int:
        """Steps over which a group's rate rises, as given."""
        return self.warmup.get(group, 0) if isinstance(self.warmup, dict) else self.warmup

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
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged into the engine's configuration."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype (weights stay float32); auto: bfloat16 on CUDA, float32 on CPU."""

    _source: str = PrivateAttr(default="recipe")

    @model_validator(mode="before")
    @classmethod
    def _judged_by_validation(cls, recipe: Any) -> Any:
        """Compare checkpoints by the loss on what is held out, where something is and no metric is named."""
        data = recipe.get("data") if isinstance(recipe, Mapping) else None
        checkpoint = recipe.get("checkpoint", {}) if isinstance(recipe, Mapping) else None
        validates = isinstance(data, Mapping) and data.get("validation")
        if not validates or not isinstance(checkpoint, Mapping) or "metric" in checkpoint:
            return recipe
        return {**recipe, "checkpoint": {**checkpoint, "metric": f"{VALIDATION}loss"}}

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
    def samples(self) -> int:
        """Samples of all stages."""
        return sum(stage.steps * stage.batch for stage in self.stages)

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is kept out of the GPUs' memory."""
        section = self.deepspeed.get("zero_optimization", {}).get("offload_optimizer")
        return isinstance(section, dict) and section.get("device", "cpu") == "cpu"

    @property
    def validation(self) -> ValidationSection[Any] | None:
        """What is held out of training; None where nothing is."""
        return None

    @property
    def source(self) -> str:
        """The file that the recipe was read from, for messages."""
        return self._source

    def error(self, key: str, message: str) -> UserError:
        """A one-line error about a key of this recipe, for a task that finds one later."""
        return UserError(f"{self._source}: {key}: {message}")

    def say_unread(self, sources: Iterable[str]) -> None:
        """Say (`UserNote`) which sources no stage reads."""
        for name in sources:
            if not any(stage.mixture.get(name) or not stage.mixture for stage in self.stages):
                message = "no stage's mixture gives it a share, so it is never read"
                warnings.warn(str(self.error(f"data.sources.{name}", message)), UserNote, stacklevel=2)

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
    tiny widths and random weights; the run goes into a folder of its own. Sources of one's own are read as they are,
    but for those that a shipped recipe names for others to replace.

    Raises:
        UserError: one line naming the file and the key.
    """
    source = str(path)
    data = read_yaml(path, overrides)
    recipe_class = _recipe_class(data, source)
    _typed(recipe_class, data, source)  # mistakes in the recipe itself are named as ever
    data["output"] = f"{str(data['output']).rstrip('/')}-smoke"
    for stage in data["stages"]:
        warmup = stage.get("warmup", 0)
        short = (
            {name: min(steps, 1) for name, steps in warmup.items()}
            if isinstance(warmup, dict)
            else min(warmup, 1)
        )
        stage |= {"steps": 2, "batch": 2, "micro_batch": None, "warmup": short}
        if stage.get("pack"):
            stage |= {"pack": {"length": max(512, stage["pack"]["length"])}}
    data |= {"device": "cpu", "checkpoint": {"every": 2}, "logging": {"every": 1, "tensorboard": False}}
    _leave_out_stand_ins(data, Path(path))
    recipe_class.shrink(data)
    return _typed(recipe_class, data, source)


def _leave_out_stand_ins(data: dict[str, Any], path: Path) -> None:
    """Leave out the sources that a shipped recipe names as an example, as it names them, where there are none such."""
    if not path.resolve().is_relative_to(recipe_root().resolve()):
        return
    shipped = (read_yaml(path).get("data") or {}).get("sources") or {}
    for name, section in shipped.items():
        place = section.get("path")
        given = ((data.get("data") or {}).get("sources") or {}).get(name)
        if isinstance(given, dict) and given.get("path") == place and not Path(str(place)).exists():
            leave_out(data, name)
            say(f"{path}: data.sources.{name}: {place}: not here; built-in scenes stand in for it")


def leave_out(data: dict[str, Any], name: str) -> None:
    """Take a source out of a recipe, as read from its file, and out of its mixtures."""
    section = data["data"]
    del section["sources"][name]
    if not section["sources"]:
        del section["sources"]
        section.pop("validation", None)
    for stage in data["stages"]:
        (stage.get("mixture") or {}).pop(name, None)


def smoke_data(data: dict[str, Any], scenes: Mapping[str, float]) -> dict[str, Any]:
    """What `--smoke` keeps of a recipe's section of data: its sources, and a few of the items held out of them.

    Args:
        data: the recipe, as read from its file.
        scenes: the mixture of stages that have no data, put there in place.
    """
    section = data.get("data") or {}
    kept = {
        key: section[key]
        for key in ("sources", "max_bad_items", "validation")
        if section.get(key) is not None
    }
    if "validation" in kept:
        kept["validation"] = {**kept["validation"], "every": 2, "items": 4}
    own = kept.get("sources", {})
    for stage in data["stages"]:
        mixture = stage.get("mixture") or {}
        stage["mixture"] = mixture if any(mixture.values()) else {} if own else dict(scenes)
    return kept


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
