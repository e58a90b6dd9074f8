"""How training and evaluation take tables: the section `data.tables` of a recipe, and their names in a mixture.

Nothing here draws a table, so a recipe that has none in its mixtures needs no more than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from unimm.data.tables.vocabulary import words_by_topic
from unimm.sections import NotNegative, Positive, Section, validate

TABLE_SOURCE = "tables"
"""The source in a mixture: tables to understand."""
TABLE_KINDS = ("understanding", "text")
"""What samples are made of tables; each alone is `tables/KIND` in a mixture."""
TABLE_NAMES = tuple(f"{TABLE_SOURCE}/{kind}" for kind in TABLE_KINDS)
TableSplit = Literal["train", "seen", "larger", "font"]
TABLE_SPLITS: tuple[TableSplit, ...] = ("train", "seen", "larger", "font")
"""`seen`: layouts and fonts as trained, other contents; `larger`: more columns or rows; `font`: fonts held out."""
MarkupName = Literal["markdown", "latex"]
NumberKind = Literal["integer", "decimal", "percent", "money"]
TableQuestionKind = Literal["cell", "row", "sum"]
TABLE_QUESTION_KINDS: tuple[TableQuestionKind, ...] = ("cell", "row", "sum")
SMALLEST_FONT = 8  # pixels; below, letters cannot be told apart


def _ordered(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"expected the least first, got {list(value)}")
    return value


def _unique(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) < len(value):
        raise ValueError(f"expected each once, got {list(value)}")
    return value


SizePair = Annotated[tuple[Positive, Positive], Field(strict=False)]
NumberRange = Annotated[SizePair, AfterValidator(_ordered)]
PageShare = Annotated[float, Field(ge=0, le=1)]
Markups = Annotated[tuple[MarkupName, ...], Field(strict=False), AfterValidator(_unique)]
Numbers = Annotated[tuple[NumberKind, ...], Field(strict=False), AfterValidator(_unique)]
Asked = Annotated[tuple[TableQuestionKind, ...], Field(strict=False), AfterValidator(_unique)]


@dataclass(frozen=True)
class TableLimits:
    """What tables may be; the fields of `TableSettings`, none of them open."""

    columns: tuple[int, int]
    rows: tuple[int, int]
    larger: tuple[int, int]
    least: tuple[int, int]
    most: tuple[int, int]
    larger_most: tuple[int, int]
    pages: float
    font_size: tuple[int, int]
    word_length: tuple[int, int]
    words: int | None
    digits: int
    numbers: tuple[NumberKind, ...]
    formats: tuple[MarkupName, ...]
    questions: int
    asked: tuple[TableQuestionKind, ...]
    degraded: bool


DIFFICULTIES: dict[str, TableLimits] = {
    "full": TableLimits(
        columns=(2, 6),
        rows=(2, 8),
        larger=(8, 12),
        least=(320, 200),
        most=(1200, 1600),
        larger_most=(1200, 1600),
        pages=0.15,
        font_size=(13, 36),
        word_length=(3, 9),
        words=None,
        digits=4,
        numbers=("integer", "decimal", "percent", "money"),
        formats=("markdown", "latex"),
        questions=3,
        asked=TABLE_QUESTION_KINDS,
        degraded=True,
    ),
    # What a model of a few million parameters can learn to read in an hour or two on two cores.
    "small": TableLimits(
        columns=(2, 4),
        rows=(2, 6),
        larger=(6, 8),
        least=(48, 32),
        most=(192, 160),
        larger_most=(272, 208),
        pages=0.0,
        font_size=(10, 12),
        word_length=(3, 5),
        words=16,
        digits=3,
        numbers=("integer",),
        formats=("markdown",),
        questions=2,
        asked=TABLE_QUESTION_KINDS,
        degraded=True,
    ),
}
"""Difficulty -> its limits."""


class TableChanges(Section):
    """Some of what `TableSettings` says, to be put in their place; alone it need not fit together."""

    difficulty: Literal["full", "small"] = "full"
    """full: 2 to 6 columns and 2 to 8 rows, images of 320 x 200 to 1,200 x 1,600 pixels; small: 2 to 4
    columns and 2 to 6 rows, images of 48 x 32 to 192 x 160."""
    columns: NumberRange | None = None
    """Fewest and most columns of tables to train on."""
    rows: NumberRange | None = None
    """Fewest and most rows, the heads of the columns among them."""
    larger: SizePair | None = None
    """Most columns and rows of the split `larger`."""
    least: SizePair | None = None
    """Width and height of the smallest image, in pixels."""
    most: SizePair | None = None
    """Width and height of the largest image."""
    larger_most: SizePair | None = None
    """The same of the split `larger`."""
    pages: PageShare | None = None
    """PageShare of images of any size up to the largest; the others are a little larger than their table."""
    font_size: NumberRange | None = None
    """Pixels of the smallest and the largest font."""
    word_length: NumberRange | None = None
    """Letters of the shortest and the longest word."""
    words: Positive | None = None
    """Words of a topic, the first ones."""
    digits: Annotated[int, Field(gt=0, le=9)] | None = None
    """Most digits of a number before its point."""
    numbers: Numbers | None = None
    """What numbers there are; none: words alone."""
    formats: Markups | None = None
    """What a table may be asked for as; none: only questions are asked."""
    questions: NotNegative | None = None
    """Questions that are asked of a table besides, as far as it has answers."""
    asked: Asked | None = None
    """Of which kinds."""
    degraded: bool | None = None
    """Whether images have noise, and JPEG's losses."""


class TableSettings(TableChanges):
    """Which tables; what is null is as the difficulty has it."""

    @model_validator(mode="after")
    def _sensible(self) -> TableSettings:
        limits = self.limits()
        most = limits.columns[1], limits.rows[1]
        if limits.larger[0] <= most[0] and limits.larger[1] <= most[1]:
            raise ValueError(
                f"larger: expected more columns or rows than {list(most)}, got {list(limits.larger)}"
            )
        for key, size in (("most", limits.most), ("larger_most", limits.larger_most)):
            for name, least, pixels in zip(("width", "height"), limits.least, size, strict=True):
                if least > pixels:
                    raise ValueError(
                        f"{key}: expected a {name} of at least {least}, as least has it, got {pixels}"
                    )
        if not words_by_topic(limits.word_length):
            raise ValueError(
                f"word_length: no word has {limits.word_length[0]} to {limits.word_length[1]} letters"
            )
        if limits.font_size[0] < SMALLEST_FONT:
            raise ValueError(f"font_size: expected at least {SMALLEST_FONT}, got {limits.font_size[0]}")
        if not limits.formats and not (limits.questions and limits.asked):
            raise ValueError("formats: none, and no questions either; give one of markdown, latex")
        return self

    def limits(self) -> TableLimits:
        """Return what tables may be, with the difficulty's own in the place of what is null."""
        base = DIFFICULTIES[self.difficulty]
        given = {name: getattr(self, name) for name in vars(base)}
        return TableLimits(**{name: vars(base)[name] if one is None else one for name, one in given.items()})

    def changed_by(self, other: TableChanges, source: str = "", key: str = "tables") -> TableSettings:
        """These settings, with those that `other` names in place of their own.

        Args:
            other: what is different.
            source: the file that it stands in, for messages.
            key: where in it.

        Raises:
            UserError: they do not fit together.
        """
        both: tuple[TableChanges, TableChanges] = (self, other)
        named = {name: getattr(one, name) for one in both for name in one.model_fields_set}
        return validate(TableSettings, named, source, key)


def expand_tables(mixture: Mapping[str, float]) -> dict[str, float]:
    """Return a mixture with `tables` written as the kind of sample that it stands for."""
    found: dict[str, float] = {}
    for name, share in mixture.items():
        name = TABLE_NAMES[0] if name == TABLE_SOURCE else name
        found[name] = found.get(name, 0.0) + share
    return found
