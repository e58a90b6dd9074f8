"""How many codes a drawing looks at in one pass.

A pass over a window of drafts tells what one-by-one drawing would choose at each place; the first is certain, and those
behind drafts that were right are certain as well (Jacobi decoding, Song et al. 2021, with the noise of each place
fixed). A wider window needs fewer passes, and each takes longer; which pays depends on the rows beside, on the model
and on the machine, so both are measured as drawing goes on.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import torch

from unimm.errors import UserError
from unimm.models.modeling import UniMMModel
from unimm.models.quantization import SHORT, is_quantised
from unimm.sampling.slots import CodeSlot, Slot

WIDEST = 32
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, WIDEST)
_REACH = 5.0  # codes of a window after which wider ones hardly gain, measured on the embedded model
_FIRST_GAIN = 1.2  # codes a pass beyond one, of a wide window, until it is known
_SLOW = 0.03  # weight of the newest pass in what is known of the gain
_DRIFT = 1.05  # by which a time that is not met again is forgotten
_PROBES = (8, 1, 4, 2, 16)  # windows of the first passes, which tell how time grows
_FEW_ROWS = 8  # rows up to which these are tried
_HALF_WINDOW = 8  # in 16 bits on a GPU, where a pass waits for weights


class _Timing:
    """Seconds of a pass by its positions, and codes that it gains, as last measured."""

    def __init__(self) -> None:
        self.measured: dict[int, float] = {}
        self.passes = 0
        self.gain = _FIRST_GAIN

    def add(self, positions: int, seconds: float) -> None:
        """Take a measurement; whatever else the machine does only makes it longer."""
        before = self.measured.get(positions)
        self.measured[positions] = seconds if before is None else min(seconds, before * _DRIFT)
        self.passes += 1

    def seconds(self, positions: int) -> float:
        """Return the seconds of a pass, between those that were measured or beyond."""
        known = sorted(self.measured)
        if positions in self.measured or len(known) == 1:
            base = self.measured.get(positions, 0.0) or self.measured[known[0]]
            return base * max(1.0, positions / known[0]) if positions not in self.measured else base
        after = min(max(bisect.bisect(known, positions), 1), len(known) - 1)
        left, right = known[after - 1], known[after]
        slope = (self.measured[right] - self.measured[left]) / (right - left)
        return max(self.measured[left] + slope * (positions - left), min(self.measured.values()))


_timings: dict[tuple[object, ...], _Timing] = {}


class Window:
    """Chooses the window of each pass.

    Args:
        model: what is run.
        fixed: a window for all passes; None: by the load.

    Raises:
        UserError: the window is no whole number from 1 to 32.
    """

    slack = WIDEST + 2  # positions behind a row's end that a pass may touch

    def __init__(self, model: UniMMModel, fixed: int | None = None) -> None:
        if fixed is not None and (
            not isinstance(fixed, int) or isinstance(fixed, bool) or not 1 <= fixed <= WIDEST
        ):
            raise UserError(f"window: {fixed!r}; give a whole number from 1 to {WIDEST}")
        self.fixed, self.widest = fixed, WIDEST
        if fixed is None and is_quantised(
            model
        ):  # whose near ties nothing settles, so that all passes have to be alike
            self.fixed = self.widest = SHORT - 1  # wider windows would leave the fast kernel
        if fixed is None and model.dtype in (torch.float16, torch.bfloat16):
            self.fixed = _HALF_WINDOW if model.device.type == "cuda" else 1
        config = model.decoder.config
        key = (config.hidden_size, config.num_hidden_layers, model.dtype, model.device.type, self.widest)
        self._timing = _timings.setdefault((*key, torch.get_num_threads()), _Timing())
        self._last: tuple[int, int] | None = None

    def choose(self, slots: Sequence[Slot]) -> int:
        """Return the window of the next pass over these slots."""
        drawings = [slot for slot in slots if isinstance(slot, CodeSlot)]
        if not drawings:
            self._last = None
            return 1
        rows = sum(len(slot.lines) for slot in slots)
        window = self.fixed or self._best(rows)
        self._last = rows, window
        return window

    def _best(self, rows: int) -> int:
        timing = self._timing
        allowed = [window for window in WINDOWS if window <= self.widest]
        if rows <= _FEW_ROWS and timing.passes < len(_PROBES):
            return min(_PROBES[timing.passes], self.widest)
        if not timing.measured:
            return 1
        return max(allowed, key=lambda window: self._advance(window) / timing.seconds(rows * window))

    def _advance(self, window: int) -> float:
        return 1 + self._timing.gain * (1 - math.exp((1 - window) / _REACH))

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Measure a pass."""
        start = time.perf_counter()
        yield
        if self._last is not None and self.fixed is None:
            rows, window = self._last
            self._timing.add(rows * window, time.perf_counter() - start)

    def accepted(self, window: int, codes: int) -> None:
        """Learn how many codes a drawing gained from a window."""
        if window > 1:
            share = 1 - math.exp((1 - window) / _REACH)
            self._timing.gain += _SLOW * (max(codes - 1, 0) / share - self._timing.gain)
