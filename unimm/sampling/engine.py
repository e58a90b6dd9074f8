"""The engine: answers and drawings in one batch, over one decoder, one cache and one step.

Requests wait in the order they came and join as soon as their rows fit; each step reads a piece of the prompts that are
new, then runs every other row over its own next positions. What a request gets does not depend on its company: rows
see nothing of each other, noise belongs to a place of a request, and near ties are settled in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch

from unimm.errors import UserError
from unimm.models.fusion import Looking
from unimm.models.inputs import Images, digests
from unimm.models.modeling import UniMMModel
from unimm.models.seeing import seen_of
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.cache import PrefixCache, RowCache, RowsAt
from unimm.sampling.exact import Exact
from unimm.sampling.heads import Heads, failing_alone
from unimm.sampling.looking import HeldMemories, looking_of
from unimm.sampling.memory import EngineLimits
from unimm.sampling.requests import DrawingRequest, Request, TextRequest, Ticket
from unimm.sampling.runners import make_runner
from unimm.sampling.slots import CodeSlot, Slot, SlotRow, TextSlot, next_positions
from unimm.sampling.speculative import Window
from unimm.sampling.staleness import WeightsNow

GROWTH = 128  # positions by which the room of an answer of unknown length grows at least
IMAGES_HELD = 16  # images whose codes are held for the next question about them


class Engine:
    """Runs requests of one model; one thread may step it, any may submit and cancel.

    Args:
        model: the unified model, in eval mode.
        processor: its processor.
        limits: rows and positions that the cache may hold; None: by the memory there is.
        window: codes that a drawing looks at in one pass; None: by the load. The drawing is the same with any in
            float32; in 16 bits it is the same with the same window.
    """

    def __init__(
        self,
        model: UniMMModel,
        processor: UniMMProcessor,
        limits: EngineLimits | None = None,
        window: int | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.device: torch.device = model.device
        self.limits = limits or EngineLimits.of(model)
        self.runner = make_runner(model)
        self.cache = RowCache(self.runner.layers_count)
        self.prefixes = PrefixCache(self.limits.prefix_tokens)
        self.window = Window(model, window)
        self._exact = Exact(model) if Exact.runs(model) else None
        self._heads = Heads(model, self._exact, self.window.accepted)
        self._waiting: deque[Ticket] = deque()
        self._slots: list[Slot] = []  # in the order of their rows
        self._preempted: dict[Ticket, TextSlot] = {}
        self._cancelled: set[Ticket] = set()
        self._image_tokens: OrderedDict[str, list[int]] = OrderedDict()
        self._memories = (
            None if model.fusion is None else HeldMemories(model.fusion, self.limits.prefix_tokens)
        )
        self._lock = threading.Lock()
        self._weights = WeightsNow(model)

    def serves(self, model: UniMMModel, processor: UniMMProcessor, max_rows: int) -> bool:
        """Whether the engine is for this model as it is now: small weights are copied when it is made."""
        return (
            self.model is model
            and self.processor is processor
            and self.limits.max_rows == max_rows
            and self._weights.unchanged()
        )

    # --- from any thread ------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Take a request, which runs with the next steps.

        Raises:
            UserError: it would not fit if it were alone.
        """
        needed, rows = self._length(request), self._rows(request)
        if rows > self.limits.max_rows or needed * rows > self.limits.max_tokens:
            room = f"{self.limits.max_rows} rows and {self.limits.max_tokens} positions"
            raise UserError(
                f"request: {rows} rows of {needed} positions, the engine has {room}; raise max_tokens"
            )
        ticket = Ticket(request, prompt_tokens=len(request.ids), known_by=self._known_by(request))
        with self._lock:
            self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Have a request end with the next step; nothing happens if it is done."""
        with self._lock:
            self._cancelled.add(ticket)

    @property
    def waiting(self) -> int:
        """Requests that have not joined yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have rows."""
        return len(self._slots)

    # --- from one thread ------------------------------------------------------------------------------------

    def run(self, requests: Iterable[Request], together: int | None = None) -> list[Ticket]:
        """Run requests to their end.

        Args:
            requests: taken one by one as there is room for them.
            together: most that wait or run at once; None: all.

        Raises:
            UserError: one of them would not fit if it were alone.
            BaseException: what went wrong in one of them; what Ctrl-C raises. The others are cancelled.
        """
        left, tickets, open_ = iter(requests), [], deque[Ticket]()
        more = True
        try:
            while more or open_:
                while more and (together is None or len(open_) < together):
                    request = next(left, None)
                    if request is None:
                        more = False
                        break
                    tickets.append(self.submit(request))
                    open_.append(tickets[-1])
                self.step()
                for ticket in [ticket for ticket in open_ if ticket.done]:
                    open_.remove(ticket)
                    if ticket.error is not None:
                        raise ticket.error
                    ticket.request = dataclasses.replace(ticket.request, images=None)  # pixels are large
        except BaseException:
            for ticket in open_:
                self.cancel(ticket)
            self._leave()
            raise
        return tickets

    @torch.inference_mode()
    def step(self) -> bool:
        """Run one step; whether there is more to do."""
        self._leave()
        self._join()
        self._read_prompts()
        self._advance()
        self._leave()
        return bool(self._slots or self._waiting)

    def release(self) -> None:
        """Give the memory of the rows back, where none is running; prefixes stay."""
        if not self._slots:
            self.cache.release()

    # --- joining and leaving --------------------------------------------------------------------------------

    @staticmethod
    def _rows(request: Request) -> int:
        return 1 + (isinstance(request, DrawingRequest) and request.unconditional is not None)

    def _length(self, request: Request, written: int = 0) -> int:
        """Positions that each row of a request needs: all of a drawing's, an answer's for its next tokens."""
        if isinstance(request, DrawingRequest):
            longest = max(len(request.ids), len(request.unconditional or ()))
            return longest + len(self.model.layout.drawing_steps(*request.grid)) + self.window.slack
        assert isinstance(request, TextRequest)
        most = request.sampling.max_new_tokens
        room = self.processor.context - len(request.ids)
        room = room if most is None else min(room, most)
        return len(request.ids) + min(room, written + max(GROWTH, written)) + self.window.slack

    def _leave(self) -> None:
        """Free the rows of what is done or cancelled."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            for ticket in cancelled:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._preempted.pop(ticket, None)
                if not ticket.done:
                    ticket.finish_reason = "cancelled"
        self._drop_done()

    def _drop_done(self) -> None:
        if any(slot.ticket.done for slot in self._slots):
            for slot in self._slots:
                self._remember(slot)
            self._slots = [slot for slot in self._slots if not slot.ticket.done]
            self._arrange()

    def _remember(self, slot: Slot) -> None:
        """Hold what an answer that is done has read, and its words, where a next turn may begin so."""
        ticket, line = slot.ticket, slot.lines[0]
        ended = ticket.done and ticket.error is None and slot.ready
        if ended and isinstance(ticket.request, TextRequest) and ticket.request.remember:
            tokens = (*ticket.known_by, *ticket.ids)[: line.filled]
            self.prefixes.keep(tokens, self.cache.read(line.row, len(tokens)))

    def _arrange(self) -> None:
        """Bring the rows that run to the front of the cache: those that go on, those that wait, those that read."""
        groups: tuple[list[SlotRow], ...] = ([], [], [])
        for slot in self._slots:
            groups[2 if not slot.ready else 1 if slot.stalled else 0].extend(slot.lines)
        at = {line.row: line for group in groups for line in group}
        first = 0
        for group in groups:
            own = range(first, first + len(group))
            free = iter(set(own) - {line.row for line in group})  # who is in place stays
            for line in group:
                if line.row not in own:
                    self._move(line, next(free), at)
            first = own.stop

    def _move(self, line: SlotRow, row: int, at: dict[int, SlotRow]) -> None:
        """Give a line another row, and whoever has that its own."""
        other = at.pop(row, None)
        self.cache.swap(row, line.row, max(line.filled, other.filled if other else 0))
        at.pop(line.row)
        if other is not None:
            other.row = line.row
            at[other.row] = other
        line.row = row
        at[row] = line

    def _join(self) -> None:
        """Let waiting requests in, first come first served, while they fit."""
        joined: list[Slot] = []
        while True:
            with self._lock:
                if not self._waiting or not self._may_join(self._waiting[0]):
                    break
                ticket = self._waiting.popleft()
            with failing_alone(ticket):
                self._slots.append(self._begin(ticket))
                joined.append(self._slots[-1])
        if not joined:
            return
        self._reserve()
        features = self._encode([slot.lines[0] for slot in joined])
        for slot in joined:
            with failing_alone(slot.ticket):
                for line in slot.lines:
                    self._start(line, features.get(id(line)))
                    if isinstance(slot, CodeSlot):
                        line.draw_at(slot.request.grid)
                slot.ticket.cached_tokens = slot.lines[0].filled
        self._drop_done()

    def _encode(self, lines: Sequence[SlotRow]) -> dict[int, Images]:
        """Return the images of new rows as features, where those of several rows are encoded together."""
        members = [
            (line, line.images)
            for line in lines
            if line.images is not None
            and line.images.features is None
            and self.prefixes.find(line.tokens)[1] is None
        ]
        found: dict[int, Images] = {}
        if len(members) < 2:
            return found
        with contextlib.suppress(Exception):  # whose it is shows where each is encoded alone
            together = Images.cat(images for _, images in members)
            assert together is not None
            given = self.model.as_features(together)
            start = 0
            for line, images in members:
                found[id(line)] = given.part(start, start + len(images))
                start += len(images)
        return found

    def _may_join(self, ticket: Ticket) -> bool:
        """Whether a request fits, and is not better off with what another is just reading."""
        if not self._slots:  # alone it does, see `submit`
            return True
        rows = sum(len(slot.lines) for slot in self._slots) + self._rows(ticket.request)
        if not self._fit(rows, self._length(ticket.request, len(ticket.ids))):
            return False
        prompt = (*ticket.known_by, *ticket.ids)
        if len(prompt) > self.limits.prefix_tokens:
            return True
        return not any(slot.lines[0].tokens == prompt for slot in self._slots if not slot.ready)

    def _fit(self, rows: int, length: int) -> bool:
        length = max([length, *(line.reserved for slot in self._slots for line in slot.lines)])
        return rows <= self.limits.max_rows and rows * length <= self.limits.max_tokens

    def _begin(self, ticket: Ticket) -> Slot:
        """Give a request its rows, which begin with what is known of its prompt."""
        request = ticket.request
        ids, images = self._resolved(request)
        first = sum(len(slot.lines) for slot in self._slots)
        lines = [SlotRow(ids + ticket.ids, len(ids), images, (*ticket.known_by, *ticket.ids))]
        if isinstance(request, DrawingRequest) and request.unconditional is not None:
            away = request.unconditional
            lines.append(SlotRow(away, len(away), None, tuple(away)))
        reserved = min(self._length(request, len(ticket.ids)), self.limits.max_tokens // len(lines))
        for row, line in enumerate(lines, first):
            line.row, line.reserved = row, reserved
        if isinstance(request, DrawingRequest):
            return CodeSlot(ticket, lines, self.model.layout, self._heads.codes)
        if (begun := self._preempted.pop(ticket, None)) is not None:
            begun.lines, begun.stalled = lines, False
            return begun
        return TextSlot(ticket, lines, self.processor, self._heads.words)

    def _reserve(self) -> None:
        """Let the cache be as large as its rows may become."""
        lines = [line for slot in self._slots for line in slot.lines]
        length = max(line.reserved for line in lines)
        self.cache.reserve(len(lines), length, self.limits.max_tokens)

    def _start(self, line: SlotRow, images: Images | None) -> None:
        """Let a row begin with what is held of its prompt, and give it the stream of the rest.

        Args:
            line: the row.
            images: what it sees, as features, where these have been computed.
        """
        model = self.model
        input_ids = torch.tensor([line.ids], device=self.device)
        placeholders = model.layout.feature_positions(input_ids)
        length, prefix = self.prefixes.find(line.tokens)
        if prefix is not None and bool(placeholders[0, length:].any()):
            length, prefix = 0, None  # an image has to be encoded in any case
        if prefix is not None and self._memories is not None and line.images is not None:
            line.memory = self._memories.again(model, line.tokens, input_ids, line.images)
            length, prefix = (0, None) if line.memory is None else (length, prefix)
        if prefix is None and line.images is not None:
            embedded = model.embed(input_ids, images or line.images)
            line.places = None if embedded.positions is None else embedded.positions[:, 0]
            if self._memories is not None and embedded.memory is not None:
                line.memory = self._memories.keep(line.tokens, embedded.memory)
        else:
            embedded = model.embed(input_ids.masked_fill(placeholders, self.processor.pad))
            if embedded.positions is not None:
                seen = Images() if line.images is None else line.images
                line.places = model.place(input_ids, seen, embedded.positions[0])[:, 0]
        if prefix is not None:
            self.cache.put(line.row, prefix, length)
        line.filled, line.prompt, line.started = length, embedded.stream[0, length:], True

    def _looking(self, lines: Sequence[SlotRow], at: RowsAt) -> Looking | None:
        """Return what rows look at in a pass."""
        return looking_of(self.model.fusion, [line.memory for line in lines], at.positions)

    def _resolved(self, request: Request) -> tuple[list[int], Images | None]:
        """Return a prompt's tokens and images as the decoder takes them: images seen by their codes are tokens."""
        if request.images is None or not len(request.images):
            return request.ids, None
        images = request.images.to(self.device)
        if not self.model.sees_codes:
            return request.ids, images
        seen = "".join(digests(images))
        if seen not in self._image_tokens:
            ids = torch.tensor([request.ids], device=self.device)
            found = self.model.put_tokens(ids, images)
            self._image_tokens[seen] = found[self.model.layout.feature_positions(ids)].tolist()
            while len(self._image_tokens) > IMAGES_HELD:
                self._image_tokens.popitem(last=False)
        tokens = iter(self._image_tokens[seen])
        feature = self.model.layout.feature
        return [next(tokens) if token == feature else token for token in request.ids], None

    def _known_by(self, request: Request) -> tuple[Hashable, ...]:
        """Return the tokens of a prompt, with what images hold in the place of their placeholders."""
        images = request.images or Images()
        seen = iter(self._placeholders(images))
        tokens: list[Hashable] = []
        for token in request.ids:
            holds = token in self.model.layout.placeholders
            found: Hashable = next(seen, None) if holds else token
            if found is None:
                raise UserError(f"images: {len(images)} given, but the prompt has room for more")
            tokens.append(found)
        if next(seen, None) is not None:
            raise UserError(f"images: {len(images)} given, but the prompt has no room for all of them")
        return tuple(tokens)

    def _placeholders(self, images: Images) -> Iterator[str]:
        """Return what each placeholder of images holds."""
        model = self.model
        grids = seen_of(model.seeing, images, model.layout).grids if len(images) else ()
        for told, (rows, columns) in zip(digests(images) if len(images) else (), grids, strict=True):
            yield from itertools.repeat(told, model.layout.features(rows, columns))

    # --- one step -------------------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Read a piece of each prompt that is new."""
        if all(slot.ready for slot in self._slots):
            return
        self._arrange()
        lines = _by_rows(slot for slot in self._slots if not slot.ready)
        piece = max(self.limits.least_piece, self.limits.prompt_piece // len(lines))
        # no row may be filled up with rubbish beyond the cache's end
        room = self.cache.length - max(line.filled for line in lines)
        width = min(piece, room, max(line.unread - 1 for line in lines))
        stream = torch.stack([line.next(width) for line in lines])
        at = RowsAt(lines[0].row, [line.filled for line in lines], width, self.device)
        self.runner(self.cache, at, stream, next_positions(lines, width), self._looking(lines, at))
        for line in lines:
            if line.read(width):
                self.prefixes.keep(line.tokens[: line.filled], self.cache.read(line.row, line.filled))
        self._arrange()

    def _advance(self) -> None:
        """Run every row that is ready over its next positions, and give each slot what was chosen."""
        for slot in self._slots:
            slot.stalled = slot.ready and not self._has_room(slot)
        if all(slot.stalled or not slot.ready for slot in self._slots):
            self._make_way()
            return
        self._arrange()
        slots = [slot for slot in self._slots if slot.ready and not slot.stalled]
        window = self.window.choose(slots)
        with self.window.timed():
            feeds = self._heads.feeds(slots, window)
            lines, width = _by_rows(slots), feeds.stream.shape[1]
            at = RowsAt(0, [line.filled for line in lines], width, self.device)
            places, looking = next_positions(lines, width), self._looking(lines, at)
            hidden = self.runner(self.cache, at, feeds.stream, places, looking)
            self._heads.sample(slots, feeds, hidden)

    def _has_room(self, slot: Slot) -> bool:
        """Whether a slot may take its next positions; an answer gets more room where there is any."""
        line = slot.lines[0]
        if isinstance(slot, CodeSlot) or line.filled + line.unread + self.window.slack < line.reserved:
            return True
        length = self._length(slot.ticket.request, len(slot.ticket.ids))
        if length > line.reserved:
            if not self._fit(sum(len(other.lines) for other in self._slots), length):
                return False
            line.reserved = length
            self._reserve()
        return True

    def _make_way(self) -> None:
        """Where all answers wait for room, let the first go on: those that came last start anew when there is room."""
        stalled = [slot for slot in self._slots if slot.stalled]
        while stalled and not self._has_room(stalled[0]):
            last = stalled.pop()
            assert isinstance(last, TextSlot)
            self._slots.remove(last)
            if not stalled:
                last.finish("length")  # alone, and yet without room
                return
            self._preempted[last.ticket] = last
            with self._lock:
                self._waiting.appendleft(last.ticket)


def _by_rows(slots: Iterable[Slot]) -> list[SlotRow]:
    """Return the rows of slots in the order of the cache."""
    return sorted((line for slot in slots for line in slot.lines), key=lambda line: line.row)
