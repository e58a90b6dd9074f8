"""Declarative key maps: which tensor of a foreign checkpoint is which of ours, and how one becomes the other.

A map is a list of `Rule`s. Names are patterns in which `{i}` stands for a number, `{end}` for `weight` or
`bias`, and `{rest}` for anything. Shapes are checked by running the rules on tensors without data (`meta`), so
that every fault is known before a byte is read or written.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.models.weights import refuse

_HOLES = {"end": "weight|bias", "rest": ".+"}  # what a placeholder may stand for; any other is a number


@dataclasses.dataclass(frozen=True)
class Op:
    """A pair of functions that undo each other to the bit: foreign tensors to one of ours, and back.

    Attributes:
        to_ours: makes one of ours of theirs.
        to_theirs: makes so many of theirs of one of ours.
        rows: which rows of one of theirs are ours, where others of ours have the other rows; `to_theirs` leaves
            those 0.
        zeros: what of one of theirs no module here needs, and has to be 0.
        put_back: where ours are only a part of one of theirs: makes theirs of one of ours and of theirs as it was. It
            raises a `ValueError` if ours is of no such form any more.
        start: makes what stands in for theirs as it was, where a model has no source; None: there has to be one.
    """

    to_ours: Callable[[Sequence[Tensor]], Tensor]
    to_theirs: Callable[[Tensor, int], list[Tensor]]
    rows: slice | None = None
    zeros: Callable[[Tensor], Tensor] | None = None
    put_back: Callable[[Tensor, Tensor], Tensor] | None = None
    start: Callable[[Tensor], Tensor] | None = None


SAME = Op(lambda theirs: theirs[0], lambda ours, _: [ours])
STACK = Op(lambda theirs: torch.cat(list(theirs)), lambda ours, parts: list(ours.chunk(parts)))
"""Several matrices one above the other, as timm keeps query, key and value."""
SQUEEZE = Op(lambda theirs: theirs[0][:, :, 0, 0], lambda ours, _: [ours[:, :, None, None]])
"""A 1x1 convolution [O, I, 1, 1] that is a linear layer [O, I] here."""
LEAD = Op(lambda theirs: theirs[0][None], lambda ours, _: [ours[0]])
"""A tensor that has one more dimension here, of length 1, in front."""


def patches(*shape: int) -> Op:
    """Return what makes a linear layer [O, I] of a convolution of patches [O, *shape]."""
    return Op(lambda theirs: theirs[0].flatten(1), lambda ours, _: [ours.unflatten(1, shape)])


def rotary_halves(heads: int) -> Op:
    """Return what brings rotary pairs, which some have as neighbours, into the halves of each of so many heads."""

    def to_ours(theirs: Sequence[Tensor]) -> Tensor:
        rows: Tensor = theirs[0].unflatten(0, (heads, -1, 2))
        return rows.transpose(1, 2).flatten(0, 2)

    return Op(to_ours, lambda ours, _: [ours.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)])


def share(index: int, sizes: Sequence[int], zeros: int = 0) -> Op:
    """Return what makes one of ours of some rows of theirs, in which several of ours stand one above the other.

    Args:
        index: which of them it is.
        sizes: rows of each.
        zeros: rows of zeros that follow each.
    """
    start = sum(sizes[:index]) + index * zeros
    end = start + sizes[index]

    def to_theirs(ours: Tensor, _: int) -> list[Tensor]:
        whole = ours.new_zeros(sum(sizes) + len(sizes) * zeros, *ours.shape[1:])
        whole[start : start + len(ours)] = ours
        return [whole]

    return Op(
        lambda theirs: theirs[0][start:end],
        to_theirs,
        slice(start, end),
        (lambda theirs: theirs[end : end + zeros]) if zeros else None,
    )


def cut_rows(zeros: int, axis: int = 0) -> Op:
    """Return what takes away so many zeros at the end of an axis."""

    def to_theirs(ours: Tensor, _: int) -> list[Tensor]:
        shape = [zeros if number == axis else side for number, side in enumerate(ours.shape)]
        return [torch.cat([ours, ours.new_zeros(shape)], dim=axis)]

    def beyond(theirs: Tensor) -> Tensor:
        return theirs.narrow(axis, theirs.shape[axis] - zeros, zeros)

    return Op(
        lambda theirs: theirs[0].narrow(axis, 0, theirs[0].shape[axis] - zeros), to_theirs, None, beyond
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our tensor `ours` is made of their tensors `theirs`; all are patterns with the same placeholders."""

    ours: str
    theirs: str | tuple[str, ...]
    op: Op = SAME

    @property
    def sources(self) -> tuple[str, ...]:
        """Their patterns, always as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def under(rules: list[Rule], ours: str, theirs: str) -> list[Rule]:
    """The same rules for a part that sits inside a larger model, under these prefixes."""
    return [
        Rule(ours + rule.ours, tuple(theirs + source for source in rule.sources), rule.op) for rule in rules
    ]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our tensors and where it comes from."""

    ours: str
    theirs: tuple[str, ...]
    op: Op


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """The rules of one foreign layout.

    Attributes:
        rules: the first whose pattern fits decides.
        kept: patterns of their tensors that no module here needs (recomputable buffers, an unused branch);
            they are carried along and written back.
        constants: patterns of our tensors that they have none of, and the value that fills each.
        derived: rules for our tensors that start as one of theirs and are not written back.
        tied: our tensors that may be missing there, since they share the memory of another.
    """

    rules: tuple[Rule, ...]
    kept: tuple[str, ...] = ()
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
    derived: tuple[Rule, ...] = ()
    tied: tuple[str, ...] = ()

    def entry(self, name: str) -> Entry:
        """Return where our tensor `name` comes from.

        Raises:
            KeyError: no rule is for it, which is a fault of the map.
        """
        for rule in (*self.derived, *self.rules):
            holes = _match(rule.ours, name)
            if holes is not None:
                return Entry(name, tuple(_fill(pattern, holes) for pattern in rule.sources), rule.op)
        raise KeyError(name)

    def constant(self, name: str) -> float | None:
        """Return the value that fills our tensor `name`, None if it comes from theirs."""
        for pattern, value in self.constants.items():
            if _match(pattern, name) is not None:
                return value
        return None

    def returned(self, names: Iterable[str]) -> list[Entry]:
        """Return the entries of those of our tensors that are written back."""
        own = (*self.constants, *(rule.ours for rule in self.derived))
        return [self.entry(name) for name in names if not _any(own, name)]

    def plan(
        self,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        where: str,
    ) -> tuple[list[Entry], list[str]]:
        """Match our tensors with those of a checkpoint.

        Args:
            ours: names and shapes (tensors on the meta device) that the model needs.
            theirs: names and shapes that the checkpoint has.
            where: the checkpoint's path, for errors.

        Returns:
            An entry for each of our tensors that the checkpoint gives, and the names that are only carried along, those
            of which ours are a part among them.

        Raises:
            UserError: a line that names what is missing, surplus, of another shape or of another kind of
                numbers, and what was expected.
        """
        entries = []
        missing, misshapen, mistyped = [], [], []
        for name, wanted in ours.items():
            if self.constant(name) is not None:
                continue
            entry = self.entry(name)
            absent = [source for source in entry.theirs if source not in theirs]
            if absent:
                if name not in self.tied:
                    expected = entry.op.to_theirs(wanted, len(entry.theirs))[0].shape
                    missing += [f"{source} {list(expected)}" for source in absent]
                continue
            entries.append(entry)
            expected_parts = entry.op.to_theirs(wanted, len(entry.theirs))
            misshapen += [
                f"{source} is {list(theirs[source].shape)}, expected {list(part.shape)}"
                for source, part in zip(entry.theirs, expected_parts, strict=True)
                if theirs[source].shape != part.shape
            ]
            mistyped += [
                f"{source} is {str(theirs[source].dtype).removeprefix('torch.')}, expected {_kind(wanted)}"
                for source in entry.theirs
                if theirs[source].is_floating_point() != wanted.is_floating_point()
            ]
        # one of theirs may be asked for by several of ours
        missing, misshapen, mistyped = (
            list(dict.fromkeys(faults)) for faults in (missing, misshapen, mistyped)
        )
        used = {source for entry in entries for source in entry.theirs}
        partly = [entry.theirs[0] for entry in entries if entry.op.put_back is not None]
        kept = [name for name in theirs if name not in used and _any(self.kept, name)]
        surplus = [f"{n} {list(t.shape)}" for n, t in theirs.items() if n not in used and n not in kept]
        refuse(where, missing=missing, misshapen=misshapen, mistyped=mistyped, surplus=surplus)
        return entries, [*kept, *partly]


def translated(
    entries: Sequence[Entry], ours: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Return their names and tensors, entry by entry; one that has rows of several of ours, once it has all of them.

    Args:
        entries: of one layout, as `KeyMap.returned` gives them.
        ours: our tensors by name; each is asked for once.
        kept: theirs as they were, of which ours are a part.

    Raises:
        UserError: one of ours cannot be given back.
    """
    left = Counter(entry.theirs[0] for entry in entries if entry.op.rows is not None)
    wholes: dict[str, Tensor] = {}
    for entry in entries:
        if entry.op.put_back is not None:
            yield entry.theirs[0], _put_back(entry, ours[entry.ours], kept)
            continue
        parts = entry.op.to_theirs(ours[entry.ours], len(entry.theirs))
        if (rows := entry.op.rows) is None:
            yield from zip(entry.theirs, parts, strict=True)
            continue
        name = entry.theirs[0]
        whole = wholes.setdefault(name, parts[0])
        whole[rows] = parts[0][rows]
        left[name] -= 1
        if not left[name]:
            yield name, wholes.pop(name)


def _put_back(entry: Entry, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """One of theirs of which ours is a part."""
    (name,) = entry.theirs
    if name not in kept:
        raise UserError(f"{entry.ours}: is a part of {name}, which was not kept; convert the source again")
    assert entry.op.put_back is not None
    try:
        return entry.op.put_back(tensor, kept[name])
    except ValueError as error:
        raise UserError(f"{entry.ours}: cannot be written as {name}: {error}") from None


def _kind(tensor: Tensor) -> str:
    """What numbers a tensor holds."""
    return "floating point" if tensor.is_floating_point() else "integers"


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(_match(pattern, name) is not None for pattern in patterns)


def _match(pattern: str, name: str) -> dict[str, str] | None:
    """Return what the placeholders of a pattern stand for in a name, None if it does not fit."""
    found = _expression(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression; a map matches each of its few with every tensor of a model."""
    expression = ""
    seen: set[str] = set()
    for index, part in enumerate(re.split(r"\{(\w+)\}", pattern)):
        if index % 2 == 0:
            expression += re.escape(part)
        elif part in seen:
            expression += f"(?P={part})"
        else:
            seen.add(part)
            expression += f"(?P<{part}>{_HOLES.get(part, '[0-9]+')})"
    return re.compile(expression)


def _fill(pattern: str, holes: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda hole: holes[hole[1]], pattern)


def llama_layer(ours: str, theirs: str, names: tuple[str, str, str, str], query: Op, key: Op) -> list[Rule]:
    """Return the rules of a layer that is Llama's, as Meta and Mistral name its weights.

    Args:
        ours: what our names begin with.
        theirs: what the checkpoint's names begin with.
        names: ours of the attention, with its dot where it is a module of its own, of the MLP and of the two norms.
        query: how the product of queries is translated.
        key: how that of keys is.
    """
    attention, mlp, before, between = names
    products = {
        "q_proj": ("wq", query),
        "k_proj": ("wk", key),
        "v_proj": ("wv", SAME),
        "o_proj": ("wo", SAME),
    }
    return [
        *(
            Rule(f"{ours}.{attention}{own}.weight", f"{theirs}.attention.{other}.weight", op)
            for own, (other, op) in products.items()
        ),
        *(
            Rule(f"{ours}.{mlp}.{own}.weight", f"{theirs}.feed_forward.{other}.weight")
            for own, other in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
        ),
        Rule(f"{ours}.{before}.weight", f"{theirs}.attention_norm.weight"),
        Rule(f"{ours}.{between}.weight", f"{theirs}.ffn_norm.weight"),
    ]
