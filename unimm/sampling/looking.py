"""What the rows of an engine look at by cross-attention: keys and values are computed once, when a row begins.

Shape suffixes: A rows, t new positions, T positions of a prompt, S rows of the memory, C width, G key heads, D head
width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from unimm.models.fusion import CrossBlock, Fusion, Looking, Memory
from unimm.models.inputs import Images
from unimm.models.memory import who_looks
from unimm.models.modeling import UniMMModel
from unimm.models.seeing import seen_of

BlockKeys: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Keys and values [1, G, S, D] of each block."""


class RowMemory:
    """What one row looks at.

    Args:
        keys: of the memory; rows that share them are computed together.
        visible: bool [T, S], what the positions of its prompt see; what comes behind sees what the last one does.
    """

    def __init__(self, keys: BlockKeys, visible: Tensor) -> None:
        self.keys, self.visible = keys, visible

    def seen(self, positions: Tensor) -> Tensor:
        """Return what positions [t] of the row see: bool [t, S]."""
        return self.visible[positions.clamp(max=len(self.visible) - 1)]


class RowMemories:
    """What the rows of one pass look at; see `unimm.models.fusion.Attended`.

    Args:
        rows: the memory of each row; None: nothing.
        positions: [A, t], of what is read.
    """

    def __init__(self, rows: Sequence[RowMemory | None], positions: Tensor) -> None:
        self.groups: list[tuple[list[int], BlockKeys, Tensor]] = []
        members: OrderedDict[int, list[int]] = OrderedDict()
        for number, row in enumerate(rows):
            if row is not None:
                members.setdefault(id(row.keys), []).append(number)
        for numbers in members.values():
            own = [(rows[number], positions[number]) for number in numbers]
            visible = torch.stack([row.seen(places) for row, places in own if row is not None])
            first = rows[numbers[0]]
            assert first is not None
            self.groups.append((numbers, first.keys, visible))

    def through(self, name: str, block: CrossBlock, stream: Tensor) -> Tensor:
        """Return the stream [A, t, C] behind a block."""
        behind = stream.clone()
        for numbers, held, visible in self.groups:
            keys, values = (part.expand(len(numbers), -1, -1, -1) for part in held[name])
            behind[numbers] = block(stream[numbers], keys, values, visible)
        return behind


def looking_of(fusion: Fusion | None, rows: Sequence[RowMemory | None], positions: Tensor) -> Looking | None:
    """Return what a pass looks at; None where no row looks at anything."""
    if fusion is None or not any(row is not None for row in rows):
        return None
    return Looking(fusion, RowMemories(rows, positions))


class HeldMemories:
    """Keys and values of images that were looked at, least recently used out first.

    Args:
        fusion: whose blocks look.
        most: rows of memories that are held.
    """

    def __init__(self, fusion: Fusion, most: int) -> None:
        self.fusion, self.most = fusion, most
        self._held: OrderedDict[tuple[Hashable, ...], BlockKeys] = OrderedDict()

    def again(
        self, model: UniMMModel, tokens: Sequence[Hashable], input_ids: Tensor, images: Images
    ) -> RowMemory | None:
        """Return the memory of a row whose images were looked at before; None where it is not held.

        Args:
            model: the unified model.
            tokens: of the row, with what images hold in the place of their placeholders.
            input_ids: [1, T], of the row.
            images: that it sees.
        """
        assert model.remembering is not None
        known = _images_of(tokens)
        if known not in self._held:
            return None
        self._held.move_to_end(known)
        looks = who_looks(input_ids.shape[1], None, None, input_ids.device)
        grids = seen_of(model.seeing, images, model.layout).grids
        plan = model.remembering.plan(model.layout.feature_positions(input_ids), grids, looks)
        return None if plan is None else RowMemory(self._held[known], plan.visible[0])

    def keep(self, tokens: Sequence[Hashable], memory: Memory) -> RowMemory:
        """Return the memory [1, S, C] of a row with its keys and values, which are held.

        Args:
            tokens: see `again`.
            memory: of the row alone.
        """
        known = _images_of(tokens)
        keys = self._held.setdefault(known, self.fusion.read(memory.states))
        self._held.move_to_end(known)
        while sum(map(_rows, self._held.values())) > self.most:
            self._held.popitem(last=False)
        return RowMemory(keys, memory.visible[0])


def _images_of(tokens: Sequence[Hashable]) -> tuple[Hashable, ...]:
    """What images hold, among the tokens of a row."""
    return tuple(token for token in tokens if isinstance(token, str))


def _rows(keys: BlockKeys) -> int:
    return next(iter(keys.values()))[0].shape[2]
