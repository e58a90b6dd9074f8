"""Keys and values of the rows that are being generated, and of prefixes that may be asked for again.

All rows share one pair of tensors a layer, so that any run of them is a view. A row's positions begin at 0; what lies
behind its length is rubbish that nothing looks at. Shape suffixes: R rows, G key heads, L positions, D head width.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

MOST_PREFIXES = 64  # that are held: each is compared with every new prompt
Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values [G, L, D] of each layer, for the first positions of a row."""


class RowCache:
    """The cache of an engine: grows with its rows, up to what they were allowed.

    Args:
        layers: of the decoder.
    """

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.rows = self.length = 0

    def reserve(self, rows: int, length: int, most: int | None = None) -> None:
        """Make room for so many rows of so many positions; what is there stays.

        Args:
            rows: that are used.
            length: positions that they may take.
            most: positions of all rows together from which room that is not used is given back.
        """
        wanted = max(rows, self.rows), max(length, self.length)
        if most is not None and wanted[0] * wanted[1] > most:
            wanted = rows, length
        if wanted != (self.rows, self.length):
            self.rows, self.length = wanted
            for stack in (self.keys, self.values):
                stack[:] = [None if held is None else self._resized(held) for held in stack]

    def release(self) -> None:
        """Give all memory back."""
        self.keys, self.values = [None] * len(self.keys), [None] * len(self.values)
        self.rows = self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)

    def write(self, layer: int, at: RowsAt, keys_AGtD: Tensor, values_AGtD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new positions; return those that may be looked at, as views [A, G, end, D]."""
        found = []
        for stack, new in ((self.keys, keys_AGtD), (self.values, values_AGtD)):
            held = stack[layer]
            if held is None:
                shape = (self.rows, new.shape[1], self.length, new.shape[3])
                held = stack[layer] = new.new_zeros(shape)
            rows = held[at.first : at.first + at.count]
            if at.start is not None:
                rows[:, :, at.start : at.start + new.shape[2]] = new
            else:
                index = at.positions.to(new.device)[:, None, :, None].expand(
                    -1, new.shape[1], -1, new.shape[3]
                )
                rows.scatter_(2, index, new)
            found.append(rows[:, :, : at.end])
        return found[0], found[1]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two rows of at most so many positions."""
        for held in (*self.keys, *self.values):
            if held is not None and one != other:
                kept = held[one, :, :length].clone()
                held[one, :, :length] = held[other, :, :length]
                held[other, :, :length] = kept

    def read(self, row: int, length: int) -> Prefix:
        """Return a copy of a row's first positions."""
        return [
            (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for keys, values in zip(self.keys, self.values, strict=True)
            if keys is not None and values is not None
        ]

    def put(self, row: int, prefix: Prefix, length: int) -> None:
        """Let a row begin with the first positions of a prefix."""
        for layer, pair in enumerate(prefix):
            for stack, part in zip((self.keys, self.values), pair, strict=True):
                held = stack[layer]
                if held is None:
                    held = stack[layer] = part.new_zeros(self.rows, part.shape[0], self.length, part.shape[2])
                held[row, :, :length] = part[:, :length]

    def _resized(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.rows, old.shape[1], self.length, old.shape[3])
        rows, length = min(self.rows, old.shape[0]), min(self.length, old.shape[2])
        new[:rows, :, :length] = old[:rows, :, :length]
        return new


class RowsAt:
    """Where the new positions of a run of rows lie.

    Args:
        first: number of the first row.
        starts: filled positions of each row.
        width: new positions; rows that have fewer are filled up with rubbish behind their own.

    Attributes:
        start: where all begin; None where they differ.
        positions: int64 [A, width].
        end: positions that any of them may look at.
    """

    def __init__(self, first: int, starts: Sequence[int], width: int, device: torch.device) -> None:
        self.first, self.count, self.width = first, len(starts), width
        self.start = starts[0] if min(starts) == max(starts) else None
        self.end = max(starts) + width
        own = torch.tensor(list(starts), device=device)
        self.positions = own[:, None] + torch.arange(width, device=device)

    def seen(self, window: int | None = None) -> Tensor | None:
        """Return where new positions may look: bool [A, 1, width, end], None for everywhere.

        Args:
            window: how far back, where a layer slides.
        """
        if self.start is not None and self.width == 1 and (window is None or window >= self.end):
            return None
        keys = torch.arange(self.end, device=self.positions.device)
        seen = keys <= self.positions[:, None, :, None]
        if window is not None:
            seen &= keys > self.positions[:, None, :, None] - window
        return seen


class _LayerView(CacheLayerMixin):
    """One layer of a `RowCache` as transformers' decoders use it, for one pass."""

    is_sliding = False

    def __init__(self, cache: RowCache, layer: int, at: RowsAt) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.layer, self.at = cache, layer, at

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The row cache makes its tensors itself."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values; return all that may be looked at."""
        return self.cache.write(self.layer, self.at, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there are, and where they begin."""
        return self.at.end, 0

    def get_seq_length(self) -> int:
        """Return the filled positions."""
        return self.at.end - self.at.width

    def get_max_length(self) -> int:
        """There is none that a pass could meet."""
        return -1


def cache_view(cache: RowCache, at: RowsAt) -> Cache:
    """Return a run of rows as the cache of one pass of a transformers decoder."""
    return Cache(layers=[_LayerView(cache, layer, at) for layer in range(len(cache.keys))])


@dataclasses.dataclass
class _Entry:
    tokens: tuple[Hashable, ...]
    prefix: Prefix


class PrefixCache:
    """Prefixes that were read, least recently used out first.

    A prefix is known by its tokens, in which an image's placeholders are replaced by what it holds, so that a second
    question about one image begins where the first did.

    Args:
        max_tokens: positions that are held in all; 0 holds none.
        shortest: positions from which a shared beginning is worth a copy.
    """

    def __init__(self, max_tokens: int, shortest: int = 8) -> None:
        self.max_tokens, self.shortest = max_tokens, shortest
        self._entries: OrderedDict[tuple[Hashable, ...], _Entry] = OrderedDict()
        self.tokens = 0

    def find(self, tokens: Sequence[Hashable]) -> tuple[int, Prefix | None]:
        """Return the longest beginning of a row that is held, at most all but its last position, and its length."""
        best, found = 0, None
        for entry in self._entries.values():
            length = _shared(entry.tokens, tokens)
            if length > best:
                best, found = length, entry
        best = min(best, len(tokens) - 1)
        if found is None or best < self.shortest:
            return 0, None
        self._entries.move_to_end(found.tokens)
        return best, found.prefix

    def keep(self, tokens: Sequence[Hashable], prefix: Prefix) -> None:
        """Hold a prefix; one that another begins with gives way to it."""
        key = tuple(tokens)
        if len(key) > self.max_tokens or len(key) < self.shortest:
            return
        for other in [o for o in self._entries if len(o) <= len(key) and key[: len(o)] == o]:
            self._drop(other)
        self._entries[key] = _Entry(key, prefix)
        self.tokens += len(key)
        while self.tokens > self.max_tokens or len(self._entries) > MOST_PREFIXES:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self.tokens = 0

    def _drop(self, key: tuple[Hashable, ...]) -> None:
        self.tokens -= len(self._entries.pop(key).tokens)


def _shared(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many tokens two rows begin with alike."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
