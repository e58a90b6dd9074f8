"""A protocol: everything a published score depends on, in one file of the package (`unimm/evaluation/benchmarks/`).

The data with its checksum, the prompt word for word, how answers or drawings are made and from which seeds, who judges,
and which version of which scoring rule counts. Two scores with the same protocol, model and data may be compared; a
value that is overridden makes another protocol, and the result says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unimm.errors import UserError
from unimm.evaluation.made import MadeData
from unimm.sections import FieldError, NotNegative, Positive, Section, near, read_yaml, validate

PROTOCOL_TASK = "protocol"
FOLDER = Path(str(resources.files("unimm"))) / "evaluation" / "benchmarks"
_FIELD = re.compile(r"\{(\w+)\}")
NotEmpty = Annotated[str, Field(min_length=1)]


class DataFormat(Section):
    """The data set as it is published."""

    source: NotEmpty
    """Where it is published, for people."""
    split: NotEmpty
    made: MadeData | None = None
    """Data that the package makes; there are no files then."""
    sha256: dict[str, str] = Field(default={})
    """Name of a published file -> its checksum; empty where no copy was at hand when the protocol was written."""
    fields: dict[str, str | list[str]]
    """Our name of a field -> the column, several of which the first that is there is taken, or `{column}` templates."""
    columns: list[str] = Field(default=[])
    """Of files without a header: names of their columns."""
    join: str | None = None
    """The column by which the rows of several JSON files are one row, as VQAv2's questions and annotations."""
    where: dict[str, str] = Field(default={})
    """Column -> the value that rows of this split have."""
    options: list[str] = Field(default=[])
    """The columns of choices, in order; an empty or missing one ends them."""
    key: NotEmpty = "id"
    """The field that names an item."""
    group: str | None = None
    """The column whose equal values in successive rows make one item; the item has all its rows under `rows`."""
    skip: NotNegative = 0
    """Rows at the beginning that are no data."""
    circular: bool = False
    """Whether questions whose choices the file does not rotate are asked once for every rotation."""


class AnswerSection(Section):
    """How an answer is made."""

    by: Literal["generation", "likelihood"] = "generation"
    """`likelihood` takes the choice that the model finds likeliest; nothing is generated."""
    choices: Literal["letters", "texts"] = "letters"
    """What `likelihood` compares: A, B, … or the words of the choices."""
    normalise: Literal["sum", "mean"] = "sum"
    """Whether log-probabilities of a choice's tokens are added up or averaged."""
    max_new_tokens: Positive = 16
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: NotNegative = 0
    """Item i of the data has the noise of (seed + i)."""


class DrawingRecipe(Section):
    """How drawings are made; what is null is as the model has it."""

    samples: Positive = 1
    """Drawings of each prompt."""
    seed: NotNegative = 0
    """Drawing k of prompt i has the noise of (seed + i * samples + k)."""
    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_k: NotNegative | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    size: str | None = None
    """WIDTHxHEIGHT in pixels."""
    layout: Literal["geneval", "geneval2", "dpg", "wise", "t2i-compbench", "flat"]
    """The folders and names of the official code."""


class JudgeChoice(Section):
    """Who judges."""

    kind: Literal["none", "file", "url", "model", "emojiscenes", "clip"] = "none"
    model: str | None = None
    """The judge's name: of the model behind a URL, or a folder or hub id."""
    version: str | None = None
    """What a URL calls the model in its answers; another version ends the run."""
    url: str | None = None
    prompt: str | None = None
    """What the judge is asked, word for word."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds an answer may take."""
    retries: NotNegative = 3
    reference: str | None = None
    """Folder of real images that drawings are compared with."""


class ScorerChoice(Section):
    """The rule that counts."""

    name: NotEmpty
    version: Positive = 1
    """Of our code; it rises whenever a score may change."""
    rule: str | None = None
    """Where a data set has several rules in use, which."""


class EvaluationProtocol(Section):
    """One protocol."""

    task: Literal["protocol"]
    name: NotEmpty
    version: Positive = 1
    title: NotEmpty
    paper: NotEmpty
    data: DataFormat
    prompts: dict[str, str] = Field(default={})
    """`default`, and by which items differ: `open` (no choices), `hint` (the item has one); `{field}` is filled in."""
    answer: AnswerSection | None = None
    drawing: DrawingRecipe | None = None
    judge: JudgeChoice = JudgeChoice()
    scorer: ScorerChoice
    notes: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _check(self) -> EvaluationProtocol:
        if (self.answer is None) == (self.drawing is None):
            raise FieldError("answer: give either answer or drawing, which say what the model does")
        if "default" not in self.prompts:
            raise FieldError("prompts.default: missing")
        for name, prompt in self.prompts.items():
            for field in _FIELD.findall(prompt):
                if field not in self.data.fields and field not in ("options",):
                    raise FieldError(
                        f"prompts.{name}: {{{field}}} is no field{near(field, self.data.fields)}"
                    )
        return self

    def fingerprint(self) -> str:
        """SHA-256 of all that it says."""
        text = json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def fill_prompt(template: str, fields: dict[str, Any]) -> str:
    """A prompt with its `{fields}` filled in; what fields hold is not looked at again."""
    return _FIELD.sub(lambda match: str(fields.get(match[1], "")), template)


def list_protocols() -> dict[str, Path]:
    """Name -> file of every protocol in the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_protocol(name_or_path: str) -> Path | None:
    """The file of a protocol: one of the package by its name, or a YAML file with `task: protocol`; else None."""
    known = list_protocols()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path if read_yaml(path).get("task") == PROTOCOL_TASK else None
    return None


def load_protocol(path: str | Path, overrides: Iterable[str] = ()) -> EvaluationProtocol:
    """Read a protocol.

    Args:
        path: the YAML file.
        overrides: `a.b=c`, as for recipes; they make another protocol.

    Raises:
        UserError: one line naming the file and the key.
    """
    return validate(EvaluationProtocol, read_yaml(path, overrides), str(path))


def held_protocol(document: Any, source: str) -> EvaluationProtocol:
    """The protocol that a result holds.

    Raises:
        UserError: it is none.
    """
    if not isinstance(document, dict):
        raise UserError(f"{source}: protocol: expected a mapping")
    return validate(EvaluationProtocol, document, source, "protocol")
