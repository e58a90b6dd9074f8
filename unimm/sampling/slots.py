"""A request that runs: its rows of the cache, what they read next, and what is chosen from what comes out.

A slot has one row, or two with guidance: the second reads what guidance steers away from, then the same codes. What a
row reads in a pass is what is certain and not yet in the cache, then, in a drawing, drafts of the codes behind it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn import functional as F

from unimm.models.inputs import Images
from unimm.models.layout import ImageLayout
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.grammar import Grammar
from unimm.sampling.looking import RowMemory
from unimm.sampling.requests import DrawingRequest, FinishReason, TextRequest, Ticket
from unimm.sampling.sampler import NoiseKind, gumbel


class SlotRow:
    """One row of the cache.

    Args:
        ids: of its prompt, and of what has been generated before, if it starts anew.
        prompt_length: tokens of the prompt among them.
        images: what it sees.
        tokens: the prompt with what images hold in their places, by which its beginning is known again.

    Attributes:
        row: its number in the cache.
        reserved: positions that it may take.
        filled: positions that are certain and in the cache.
        started: whether it has been given its beginning.
        prompt: the stream of the prompt [t, C] behind `filled`, until it has been read.
        places: positions of time, row and column [3, t] of what the row reads, from its first token on, where images
            have these; what lies behind counts on.
        memory: what it looks at by cross-attention.
    """

    def __init__(
        self, ids: list[int], prompt_length: int, images: Images | None, tokens: tuple[Hashable, ...]
    ) -> None:
        self.ids, self.prompt_length, self.images, self.tokens = ids, prompt_length, images, tokens
        self.row = -1
        self.started = False
        self.reserved = self.filled = 0
        self.prompt: Tensor | None = None
        self.places: Tensor | None = None
        self.memory: RowMemory | None = None

    def positions(self, first: int, count: int) -> Tensor:
        """Return the positions [3, count] from one of the row's on, where images have positions of their own."""
        assert self.places is not None
        known = self.places[:, first : first + count]
        behind = torch.arange(known.shape[1], count, device=known.device) + first - self.places.shape[1]
        counted = self.places.max() + 1 + behind
        return torch.cat([known, counted.expand(3, -1)], dim=1)

    def draw_at(self, grid: tuple[int, int]) -> None:
        """Give the codes of a drawing, which follow the prompt, their rows and columns."""
        if self.places is not None:
            rows, columns = grid
            order = torch.arange(rows * columns, device=self.places.device)
            codes = torch.stack([torch.zeros_like(order), order // columns, order % columns])
            self.places = torch.cat([self.places, self.places.max() + 1 + codes], dim=1)

    @property
    def unread(self) -> int:
        """Positions of the prompt that are not in the cache."""
        return 0 if self.prompt is None else len(self.prompt)

    def next(self, width: int) -> Tensor:
        """Return so many positions of the prompt [width, C], without its last, filled up with zeros."""
        assert self.prompt is not None
        part = self.prompt[: min(width, len(self.prompt) - 1)]
        return F.pad(part, (0, 0, 0, width - len(part)))

    def read(self, width: int) -> bool:
        """Count what `next` gave as read; whether that was the last of it."""
        assert self.prompt is not None
        count = min(width, len(self.prompt) - 1)
        self.filled += count
        self.prompt = self.prompt[count:]
        return count > 0 and len(self.prompt) == 1


def next_positions(lines: Sequence[SlotRow], width: int) -> Tensor | None:
    """Return the positions [3, A, width] of what rows read next; None where they are counted."""
    if all(line.places is None for line in lines):
        return None
    return torch.stack([line.positions(line.filled, width) for line in lines], dim=1)


class Slot:
    """What all requests have.

    Args:
        ticket: of the request.
        lines: one, or two with guidance.
        vocabulary: size of what it chooses from.

    Attributes:
        stalled: whether it waits for room.
    """

    def __init__(self, ticket: Ticket, lines: list[SlotRow], vocabulary: int) -> None:
        self.ticket, self.lines, self.vocabulary = ticket, lines, vocabulary
        self.stalled = False
        self._noise: dict[int, Any] = {}

    @property
    def ready(self) -> bool:
        """Whether all of its prompt but the last position has been read."""
        return all(line.started and line.unread <= 1 for line in self.lines)

    def noise(self, first: int, count: int) -> list[Any]:
        """Return the noise of places from `first` on; what a refused draft leaves is used again."""
        self._noise = {place: noise for place, noise in self._noise.items() if place >= first}
        kind: NoiseKind = "code" if isinstance(self, CodeSlot) else "token"
        for place in range(first, first + count):
            if place not in self._noise:
                self._noise[place] = gumbel(self.ticket.request.key, place, self.vocabulary, kind)
        return [self._noise[place] for place in range(first, first + count)]


class CodeSlot(Slot):
    """A drawing.

    Attributes:
        codes: those that are certain.
        drafts: guesses of the codes behind them.
        steps: the tokens of the drawing, see `ImageLayout.drawing_steps`.
        fed: steps that are in the cache.
    """

    def __init__(self, ticket: Ticket, lines: list[SlotRow], layout: ImageLayout, vocabulary: int) -> None:
        super().__init__(ticket, lines, vocabulary)
        request = ticket.request
        assert isinstance(request, DrawingRequest)
        self.request, self.code = request, layout.code
        self.steps = layout.drawing_steps(*request.grid)
        self.places = [i for i, step in enumerate(self.steps) if step == layout.code]  # the step of each code
        self.codes: list[int] = []
        self.drafts: list[int] = []
        self.fed = 0

    def draft(self, window: int) -> int:
        """Have drafts for a window of so many codes; return how many codes the window has."""
        window = min(window, len(self.places) - len(self.codes))
        columns = self.request.grid[1]
        while len(self.drafts) < window - 1:
            known = len(self.codes) + len(self.drafts)
            # the code above, or the one before: nearly any guess is as good, it is replaced a few times
            place = known - columns if known >= columns else known - 1
            self.drafts.append(self._known(place) if place >= 0 else 0)
        del self.drafts[max(window - 1, 0) :]
        return window

    def _known(self, place: int) -> int:
        done = len(self.codes)
        return self.codes[place] if place < done else self.drafts[place - done]

    def feed(self, window: int) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Return what is read for a window of codes.

        Returns:
            The tokens behind the cache as (step, code or -1, place of the code); and, for each code of the window, how
            many of these come before it.
        """
        done, items = len(self.codes), []
        place = bisect_left(self.places, self.fed)
        for step in self.steps[self.fed : self.places[done + window - 1]]:
            if step == self.code:
                items.append((step, self._known(place), place))
                place += 1
            else:
                items.append((step, -1, 0))
        return items, [self.places[done + i] - self.fed for i in range(window)]

    def accept(self, chosen: list[int]) -> None:
        """Take codes of a window that are certain, and what lies behind them as the next drafts.

        Args:
            chosen: for each place of the window; all up to `certain` are what one-by-one drawing would choose.
        """
        certain = self.agreed(chosen)
        self.codes += chosen[:certain]
        self.drafts = chosen[certain:]
        # What was read for certain: all steps up to the last code that a draft had right.
        read = self.places[len(self.codes) - 1]
        for line in self.lines:
            line.filled += read - self.fed + line.unread
            line.prompt = None
        self.fed = read
        self.ticket.passes += 1
        if self.request.on_codes is not None:
            self.request.on_codes(self.codes)
        if len(self.codes) == len(self.places):
            self.ticket.codes = torch.tensor(self.codes).view(self.request.grid)
            self.ticket.finish_reason = "stop"

    def agreed(self, chosen: list[int]) -> int:
        """Return how many codes of a window are certain: the first, and those behind drafts that were right."""
        certain = 1
        while certain < len(chosen) and self.drafts[certain - 1] == chosen[certain - 1]:
            certain += 1
        return certain


class TextSlot(Slot):
    """An answer in words.

    Args:
        ticket: of the request.
        lines: its one row.
        processor: of the model.
        vocabulary: how many text tokens there are.
    """

    def __init__(
        self, ticket: Ticket, lines: list[SlotRow], processor: UniMMProcessor, vocabulary: int
    ) -> None:
        super().__init__(ticket, lines, vocabulary)
        request = ticket.request
        assert isinstance(request, TextRequest)
        self.request, self.tokenizer, self.ends = request, processor.tokenizer, processor.end_tokens
        room = processor.context - len(request.ids)
        most = request.sampling.max_new_tokens
        self.room = room if most is None else min(room, most)
        self.ids = ticket.ids
        self.pieces = ""  # the text so far, of which `sent` characters have been handed out
        self.sent = 0
        self.met_stop = False  # whether it ends with a stop, not with an end token
        streams = request.on_text is not None or bool(request.sampling.stop)
        grammar = request.sampling.grammar
        self.grammar = (
            Grammar(grammar, self.tokenizer, self.ends, vocabulary) if grammar is not None else None
        )
        self._stream = DecodeStream(skip_special_tokens=True) if streams else None

    def adjust(self, logits: Tensor) -> Tensor:
        """Return logits [V] after the repetition penalty, and without an end where it is too early for one."""
        sampling = self.request.sampling
        if sampling.repetition_penalty != 1.0:
            before = torch.tensor(sorted({*self.request.ids, *self.ids}), device=logits.device)
            before = before[before < len(logits)]
            had = logits[before]
            logits = logits.clone()
            logits[before] = torch.where(
                had > 0, had / sampling.repetition_penalty, had * sampling.repetition_penalty
            )
        if len(self.ids) < sampling.min_new_tokens:
            logits = logits.clone()
            logits[self.ends] = -torch.inf
        if self.grammar is not None:
            allowed = self.grammar.allowed()[: len(logits)].to(logits.device)
            logits = logits.masked_fill(~F.pad(allowed, (0, len(logits) - len(allowed))), -torch.inf)
        return logits

    @property
    def plain(self) -> bool:
        """Whether logits are taken as they are."""
        sampling = self.request.sampling
        early = len(self.ids) < sampling.min_new_tokens
        return sampling.repetition_penalty == 1.0 and not early and self.grammar is None

    def accept(self, token: int) -> None:
        """Take the next token."""
        line = self.lines[0]
        line.filled += line.unread if line.prompt is not None else 1
        line.prompt = None
        self.ticket.passes += 1
        if token in self.ends:
            self.finish("stop")
            return
        self.ids.append(token)
        complete = self.grammar is not None and self.grammar.take(token)
        self.met_stop = self._stream is not None and self._say(token)
        if self.met_stop or complete:
            self.finish("stop")
        elif len(self.ids) >= self.room:
            self.finish("length")

    def _say(self, token: int) -> bool:
        """Add a token's words to the text; whether they complete a stop."""
        assert self._stream is not None
        self.pieces += self._stream.step(self.tokenizer.backend_tokenizer, token) or ""
        stops = self.request.sampling.stop
        found = [place for place in (self.pieces.find(stop, self.sent) for stop in stops) if place >= 0]
        if found:
            self.pieces = self.pieces[: min(found)]
        # The beginning of a stop is held back until it is known not to be one.
        held = 0 if found else max((_overlap(self.pieces, stop) for stop in stops), default=0)
        self._send(len(self.pieces) - held)
        return bool(found)

    def _send(self, end: int) -> None:
        piece = self.pieces[self.sent : end]
        if self.request.on_text is not None and piece:
            self.request.on_text(piece)
        self.sent = max(self.sent, end)

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        ticket = self.ticket
        whole = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if self._stream is not None:
            if not self.met_stop and whole.startswith(self.pieces):  # half a character may be left
                self.pieces = whole
            self._send(len(self.pieces))
        ticket.text = (self.pieces if self.met_stop else whole).strip()
        ticket.finish_reason = reason


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text could be the beginning of a stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
