"""The held-out items of a recipe's own sources: which are measured, in which batches, and whether training has them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, overload

from unimm.data.sources import BadRecord, Record
from unimm.data.split import COMPARED_ITEMS, shared_items
from unimm.errors import UserNote
from unimm.training.recipe import VALIDATION

if TYPE_CHECKING:
    from unimm.data.samples import Sample
    from unimm.training.recipe import Packing, Stage
    from unimm.training.records import Records
    from unimm.training.task import Batch

PREVIEWED = 64  # items trained on that previews choose from, where none is held out
Place = tuple[str, int]  # a source and the index of an item in it


class Items:
    """Items of a recipe's sources; the same in every process, whatever the random state.

    Args:
        records: all sources.
        indices: which records of each source are chosen from.
        mixture: the stage's; a source has as large a part here as it has there.
        items: most items.
        pack: the stage's, whose rows the items have to fit.

    Attributes:
        places: the items that can be used.
        lengths: tokens of each.
    """

    def __init__(
        self,
        records: Records,
        indices: Mapping[str, Sequence[int]],
        mixture: Mapping[str, float],
        items: int = PREVIEWED,
        pack: Packing | None = None,
    ) -> None:
        self.records, self.makers = records, records.makers(indices, pack)
        weights = {name: mixture[name] for name in self.makers if mixture.get(name)}
        mean = sum(weights.values()) / len(weights) if weights else 1.0
        weights |= {name: mean for name in self.makers if name.startswith(VALIDATION)}
        sizes = {name: len(indices[name]) for name in weights}
        self.places: list[Place] = []
        self.lengths: list[int] = []
        for name, count in share_out(items, sizes, weights).items():
            for index in spread(indices[name], count):
                try:
                    self.lengths.append(len(self.sample((name, index))["ids"]))
                except BadRecord as error:
                    records.bad.add(name, error)
                else:
                    self.places.append((name, index))

    def sample(self, place: Place) -> Sample:
        """The sample of an item: always with the same request, its prompt never blanked.

        Raises:
            BadRecord: it cannot be used.
        """
        name, index = place
        return self.makers[name].sample(index, index, False)

    def record(self, place: Place) -> Record:
        """The item itself."""
        return self.records.sources[place[0]][place[1]]


class HeldOut(Items):
    """The held-out items that a stage is measured on; for the arguments see `Items`."""

    def __init__(
        self, records: Records, mixture: Mapping[str, float], items: int, pack: Packing | None = None
    ) -> None:
        super().__init__(records, records.held, mixture, items, pack)

    def batches(self, stage: Stage, collate: Callable[[list[Sample]], Batch]) -> Sequence[Batch]:
        """Micro-batches as large as the stage's, of items of like length, read when they are indexed."""
        order = sorted(range(len(self.places)), key=lambda i: (self.lengths[i], self.places[i]))
        groups: list[list[int]] = []
        for number in order:
            most = stage.micro if stage.pack is None else stage.pack.length // self.lengths[number]
            if not groups or len(groups[-1]) >= most:
                groups.append([])
            groups[-1].append(number)
        return _Batches(self, [[self.places[i] for i in group] for group in groups], collate)

    def say_what_is_shared(self) -> None:
        """Say (`UserNote`) that items which are trained on are held out too, by their content."""
        pairs = shared_items(self._trained(), map(self.record, self.places))
        if pairs:
            ours, theirs = pairs[0]
            warnings.warn(
                f"data.validation: {len(pairs)} of the items trained on are held out too, such as {ours}, which is "
                f"the same as {theirs}; losses on them look better than they are",
                UserNote,
                stacklevel=2,
            )

    def _trained(self) -> Iterator[Record]:
        """Records that are trained on, evenly spread over all sources."""
        each = max(1, COMPARED_ITEMS // max(1, len(self.records.trained)))
        for name, indices in self.records.trained.items():
            for index in spread(indices, min(each, len(indices))):
                with suppress(BadRecord):
                    yield self.records.sources[name][index]


class _Batches(Sequence["Batch"]):
    """Micro-batches that are read when they are asked for."""

    def __init__(
        self, items: HeldOut, groups: Sequence[Sequence[Place]], collate: Callable[[list[Sample]], Batch]
    ) -> None:
        self.items, self.groups, self.collate = items, groups, collate

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return _Batches(self.items, self.groups[index], self.collate)
        return self.collate([self.items.sample(place) for place in self.groups[index]])


def share_out(items: int, sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """How many held-out items of each source are measured: as the mixture weighs them, one at least.

    Args:
        items: most in all, where there are not more sources.
        sizes: items that each source holds out.
        weights: of each source, above 0.
    """
    total = sum(weights.values())
    return {name: min(sizes[name], max(1, int(items * weight / total))) for name, weight in weights.items()}


def spread(indices: Sequence[int], count: int) -> list[int]:
    """`count` of some indices, evenly spread over them."""
    return [int(indices[place * len(indices) // count]) for place in range(count)]
