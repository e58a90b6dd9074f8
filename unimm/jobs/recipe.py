"""The recipe of a batch job: a YAML file that says what is read, what the model does with it, and what is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from unimm.data.sources import Reading
from unimm.devices import DTYPES
from unimm.errors import UserError
from unimm.images import as_size
from unimm.sampling.requests import TextSampling
from unimm.sections import NotNegative, Positive, Rate, Section, near, read_yaml, show, validate

Name = Annotated[str, Field(min_length=1)]
OutputFormat = Literal["jsonl", "parquet", "webdataset"]


class JobSource(Section):
    """Where the items are and how they are read (`unimm.data.sources`)."""

    path: Name | Annotated[list[Name], Field(min_length=1)]
    """A file, a folder or a pattern of files; or a list of tars or Parquet files."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Our name of a column (image, text, question ...) -> the source's; an empty one says that there is none."""
    images: str | None = None
    """Folder that the names of images are relative to; null: where the source lies."""
    split: str | None = None
    """Which split, where names of files or a Hugging Face folder say that there are several; null: train."""
    allow_outside: bool = False
    """Whether the data may name files outside its folder, and links may lead out of it."""

    def reading(self) -> Reading:
        """How the source is to be read: nothing is learnt from it, so images need no words."""
        return Reading("image_to_text", dict(self.fields), self.images, self.split, self.allow_outside, False)


class JobOutput(Section):
    """What is written, and where."""

    folder: Name
    format: OutputFormat = "jsonl"
    """JSONL (drawings as PNG files below `images/`), Parquet or webdataset tars, which hold images themselves."""
    shard: Positive = 1000
    """Items of a file."""
    images: bool = True
    """Whether Parquet and tars hold the images that were looked at too, so that they can be trained on."""


class RaySection(Section):
    """How a job is spread by Ray Data; for `engine: ray`."""

    workers: Positive = 1
    """Copies of the model that work at once."""
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    """Cores of each; a whole number is also its number of threads."""
    gpus: Rate = 0
    """GPUs of each; a fraction lets several share one."""
    address: str | None = None
    """Of a cluster, such as auto or ray://head:10001; null: Ray is started on this machine, and ended after."""


class TextJobOptions(Section):
    """How answers are sampled, as keywords of `UniMM.ask`."""

    max_new_tokens: Positive | None = None
    temperature: Rate = 0.0
    top_k: NotNegative | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    stop: list[Name] = Field(default_factory=list)
    json_schema: dict[str, Any] | None = None
    """A JSON schema that answers follow."""
    regex: str | None = None
    """A regular expression that answers match."""

    def sampling(self) -> TextSampling:
        """The options as the engine takes them.

        Raises:
            UserError: one of them makes no sense.
        """
        given = {
            name: getattr(self, name)
            for name in (
                "temperature", "top_k", "top_p", "repetition_penalty", "stop", "json_schema", "regex",
            )
        }  # fmt: skip
        return TextSampling.of(given, self.max_new_tokens)  # type: ignore[arg-type]


class CaptionOptions(TextJobOptions):
    """How captions are asked for."""

    request: Name | None = None
    """The words; null: those of `UniMM.caption`."""


class AskOptions(TextJobOptions):
    """What is asked, and how answers are sampled."""

    question: Name | None = None
    """Asked of the images of every item; null: each item has its own question or conversation."""


class DrawOptions(Section):
    """How drawings are sampled, as keywords of `UniMM.draw`; null: as the model has it."""

    n: Annotated[int, Field(ge=1, le=1000)] = 1
    """Drawings of an item."""
    size: str | None = None
    """Width and height in pixels, as 64x64."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    temperature: Rate | None = None
    top_k: NotNegative | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str | None) -> str | None:
        try:
            as_size(size)
        except UserError as error:
            raise ValueError(str(error).removeprefix("size: ")) from None
        return size

    def sampling(self) -> dict[str, Any]:
        """The keywords that are set."""
        names = ("guidance_scale", "temperature", "top_k", "top_p")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class JobRecipe(Section):
    """What every job says."""

    source: JobSource
    model: str | None = None
    """Folder or hub id; null or "embedded": the embedded model."""
    output: JobOutput
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Item i has the seed `seed + i` (of drawings: `seed + i * n` and those after it)."""
    batch_size: Positive = 64
    """Answers or drawings that run at once."""
    device: str = "auto"
    dtype: str = "auto"
    quantize: Literal["int8", "int4"] | None = None
    engine: Literal["local", "ray"] = "local"
    """Where it runs: in this process, or by Ray (`pip install 'unimm[ray]'`)."""
    ray: RaySection = RaySection()
    _file: str = PrivateAttr(default="recipe")

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, dtype: str) -> str:
        known = ["auto", *DTYPES]
        if dtype not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {show(dtype)}{near(dtype, known)}")
        return dtype

    @property
    def per_item(self) -> int:
        """Results of an item."""
        return 1

    def error(self, key: str, message: str) -> UserError:
        """A line about one of the recipe's keys."""
        return UserError(f"{self._file}: {key}: {message}")


class CaptionRecipe(JobRecipe):
    """Captions of images."""

    task: Literal["caption"]
    options: CaptionOptions = CaptionOptions()


class AskRecipe(JobRecipe):
    """Answers to questions, with images or without."""

    task: Literal["ask"]
    options: AskOptions = AskOptions()


class DrawRecipe(JobRecipe):
    """Drawings of prompts."""

    task: Literal["draw"]
    options: DrawOptions = DrawOptions()

    @property
    def per_item(self) -> int:
        """Results of an item."""
        return self.options.n


AnyJob = CaptionRecipe | AskRecipe | DrawRecipe
JOB_TASKS: dict[str, type[AnyJob]] = {"caption": CaptionRecipe, "ask": AskRecipe, "draw": DrawRecipe}


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> AnyJob:
    """Read the recipe of a job.

    Args:
        path: the YAML file.
        overrides: `a.b=c`, as for training recipes.

    Raises:
        UserError: one line naming the file and the key.
    """
    return job_of(read_yaml(path, overrides), str(path))


def job_of(data: dict[str, Any], file: str) -> AnyJob:
    """The job that a mapping describes.

    Args:
        data: what a YAML file holds.
        file: what errors call it.

    Raises:
        UserError: one line naming the file and the key.
    """
    task = data.get("task")
    if not isinstance(task, str) or task not in JOB_TASKS:
        raise UserError(
            f"{file}: task: expected one of {', '.join(JOB_TASKS)}, got {show(task)}{near(task, JOB_TASKS)}"
        )
    recipe = validate(JOB_TASKS[task], data, file)
    recipe._file = file
    if isinstance(recipe, CaptionRecipe | AskRecipe):
        try:
            recipe.options.sampling()
        except UserError as error:
            raise recipe.error("options", str(error)) from None
    return recipe
