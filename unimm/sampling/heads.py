"""One pass's inputs and choices: what each row reads, the heads where they are needed, and what is taken from them.

Shape suffixes: A rows, t new positions, C width, P places that are chosen at, K codes, V text tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimm.models.modeling import UniMMModel
from unimm.sampling.exact import Exact, ExactRow
from unimm.sampling.requests import Ticket, filters_of
from unimm.sampling.sampler import Filters, Sampled, guide, logits_error, sample
from unimm.sampling.slots import CodeSlot, Slot, TextSlot

SMALL_TABLE = 2**19  # numbers of an embedded code vocabulary up to which it is made once


class Feeds(NamedTuple):
    """What the rows of a pass read.

    Attributes:
        stream: [A, t, C].
        wanted: for each slot, the new positions whose hidden states it chooses from.
    """

    stream: Tensor
    wanted: list[list[int]]


@dataclasses.dataclass
class _Items:
    """What is to be embedded: texts or codes, and where in the stream each belongs."""

    ids: list[int] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)
    source: list[int] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    columns: list[int] = dataclasses.field(default_factory=list)

    def add(self, item: int, place: int, rows: list[int], column: int) -> None:
        """Add one that several rows read."""
        self.ids.append(item)
        self.places.append(place)
        for row in rows:
            self.source.append(len(self.ids) - 1)
            self.rows.append(row)
            self.columns.append(column)


class Heads:
    """Embeds what slots read and chooses what they take.

    Args:
        model: the unified model.
        exact: settles near ties; None: nothing does.
        on_accept: called with the window and the number of codes that a drawing gained.
    """

    def __init__(
        self, model: UniMMModel, exact: Exact | None, on_accept: Callable[[int, int], None] | None = None
    ) -> None:
        self.model, self.exact, self.on_accept = model, exact, on_accept
        # Properties that look through all weights.
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        generation = model.config.generation_config()
        self.codes = generation.codes if generation is not None else 0
        self.width: int = model.decoder.config.get_text_config().hidden_size
        self._embedded = self._embedded_codes()
        self.words: int = model.decoder.config.get_text_config().vocab_size

    @torch.inference_mode()
    def _embedded_codes(self) -> Tensor | None:
        """Return small code vocabularies embedded, [K, C], without the places in an image."""
        embedding = self.model.code_embedding
        if embedding is None or self.codes * self.width > SMALL_TABLE:
            return None
        table: Tensor = embedding.connector(embedding.table.weight)
        return table

    def _embed_codes(self, codes: Tensor, places: Tensor) -> Tensor:
        """Return [P, C] for codes at places of their images."""
        if self._embedded is None:
            return self.model.embed_codes(codes[:, None], start=places)[:, 0]
        learned = self.model.code_embedding.places  # type: ignore[union-attr]
        rows = self._embedded[codes]
        return rows if learned is None else rows + learned.weight[places]

    # --- what is read ---------------------------------------------------------------------------------------

    def feeds(self, slots: Sequence[Slot], window: int) -> Feeds:
        """Return what each row reads in the next pass."""
        texts, codes = _Items(), _Items()
        tails: list[tuple[int, Tensor]] = []
        wanted: list[list[int]] = []
        width = 0
        for slot in slots:
            rows = [line.row for line in slot.lines]
            tail = 1 if slot.lines[0].prompt is not None else 0
            if tail:
                tails += [(row, line.prompt[0]) for row, line in zip(rows, slot.lines, strict=True)]  # type: ignore[index]
            if isinstance(slot, CodeSlot):
                items, before = slot.feed(slot.draft(window))
                for column, (step, code, place) in enumerate(items, tail):
                    (texts if code < 0 else codes).add(step if code < 0 else code, place, rows, column)
                wanted.append([tail + count - 1 for count in before])
                width = max(width, tail + len(items))
            else:
                assert isinstance(slot, TextSlot)
                if not tail:
                    texts.add(slot.ids[-1], 0, rows, 0)
                wanted.append([0])
                width = max(width, 1)
        shape = (sum(len(slot.lines) for slot in slots), width, self.width)
        stream = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for row, tensor in tails:
            stream[row, 0] = tensor
        self._fill(stream, texts, lambda ids, places: self.model.get_input_embeddings()(ids))
        self._fill(stream, codes, self._embed_codes)
        return Feeds(stream, wanted)

    def _fill(self, stream: Tensor, items: _Items, embed: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Embed items and put them where they belong."""
        if items.ids:
            numbers = torch.tensor([items.ids, items.places], device=stream.device)
            where = torch.tensor([items.source, items.rows, items.columns], device=stream.device)
            stream[where[1], where[2]] = embed(numbers[0], numbers[1])[where[0]].to(stream.dtype)

    # --- what is chosen -------------------------------------------------------------------------------------

    def sample(self, slots: Sequence[Slot], feeds: Feeds, hidden: Tensor) -> None:
        """Give each slot what it takes from the hidden states [A, t, C]; what fails in one stays there."""
        groups: dict[Any, list[tuple[Any, list[int]]]] = defaultdict(list)
        for slot, wanted in zip(slots, feeds.wanted, strict=True):
            sampling = slot.ticket.request.sampling  # type: ignore[attr-defined]
            groups[sampling if isinstance(slot, CodeSlot) else sampling.filters].append((slot, wanted))
        for sampling, members in groups.items():
            if isinstance(members[0][0], CodeSlot):
                self._sample_codes(members, hidden, sampling)
            else:
                self._sample_tokens([slot for slot, _ in members], hidden, sampling)

    def _sample_codes(self, members: list[tuple[Any, list[int]]], hidden: Tensor, sampling: Any) -> None:
        """Choose the codes of drawings that are sampled alike."""
        filters, scale = filters_of(sampling), sampling.guidance_scale
        guided = len(members[0][0].lines) == 2
        kinds = range(1 + guided)  # those that follow the prompt, those that guidance steers away from
        rows = [slot.lines[kind].row for kind in kinds for slot, wanted in members for _ in wanted]
        columns = [column for _ in kinds for _, wanted in members for column in wanted]
        where = torch.tensor([rows, columns], device=hidden.device)
        logits = self.model.code_logits(hidden[where[0], where[1]]).float()
        conditional, unconditional = logits.chunk(2) if guided else (logits, None)
        error: Any = 0.0
        if self.exact is not None:
            error = logits_error(conditional, unconditional, scale)
        guided_logits = conditional if unconditional is None else guide(conditional, unconditional, scale)
        noise = (
            [one for slot, wanted in members for one in slot.noise(len(slot.codes), len(wanted))]
            if filters.temperature
            else []
        )
        choice = sample(guided_logits, _stacked(noise, hidden), filters, error)
        chosen, near = choice.chosen.tolist(), choice.near.tolist()
        start = 0
        for slot, wanted in members:
            part = slice(start, start + len(wanted))
            start = part.stop
            with failing_alone(slot.ticket):
                settled = self._settled(slot, chosen[part], near[part], filters)
                before = len(slot.codes)
                slot.accept(settled)
                if self.on_accept is not None:
                    self.on_accept(len(wanted), len(slot.codes) - before)

    def _settled(self, slot: CodeSlot, chosen: list[int], near: list[bool], filters: Filters) -> list[int]:
        """Return codes of a window, near ties among those that are certain settled."""
        for i, close in enumerate(near):
            if close:
                chosen[i] = self._exact_code(slot, chosen[:i], filters)
            if i >= len(slot.drafts) or slot.drafts[i] != chosen[i]:
                break
        return chosen

    def _exact_code(self, slot: CodeSlot, further: list[int], filters: Filters) -> int:
        """Return the code behind those of a drawing and some more."""
        assert self.exact is not None
        codes = slot.codes + further
        steps = slot.steps[: slot.places[len(codes)]]
        rows = [ExactRow(line, line.ids, steps, codes) for line in slot.lines]
        logits = [self.exact.code_logits(self.exact.hidden(row))[None] for row in rows]
        scale = slot.request.sampling.guidance_scale
        guided = logits[0] if len(rows) == 1 else guide(logits[0], logits[1], scale)
        noise = slot.noise(len(slot.codes), len(further) + 1)[-1:] if filters.temperature else []
        return int(sample(guided, _stacked(noise, guided), filters).chosen)

    def _sample_tokens(self, slots: Sequence[Any], hidden: Tensor, filters: Filters) -> None:
        """Choose the tokens of answers that are filtered alike."""
        rows = torch.tensor([slot.lines[0].row for slot in slots], device=hidden.device)
        logits: Tensor = self.model.decoder.get_output_embeddings()(hidden[rows, 0]).float()
        error = logits_error(logits, None, 1.0) if self.exact is not None else 0.0
        for row, slot in enumerate(slots):
            if not slot.plain:
                with failing_alone(slot.ticket):
                    logits[row] = slot.adjust(logits[row])
        noise = [slot.noise(len(slot.ids), 1)[0] for slot in slots] if filters.temperature else []
        choice: Sampled = sample(logits, _stacked(noise, hidden), filters, error)
        chosen, near = choice.chosen.tolist(), choice.near.tolist()
        for slot, token, close in zip(slots, chosen, near, strict=True):
            if not slot.ticket.done:
                with failing_alone(slot.ticket):
                    slot.accept(self._exact_token(slot, filters) if close else token)

    def _exact_token(self, slot: TextSlot, filters: Filters) -> int:
        """Return the next token of an answer."""
        assert self.exact is not None
        line = slot.lines[0]
        row = ExactRow(line, line.ids[: line.prompt_length] + slot.ids)
        logits = self.exact.text_logits(self.exact.hidden(row))
        noise = slot.noise(len(slot.ids), 1) if filters.temperature else []
        return int(sample(slot.adjust(logits)[None], _stacked(noise, logits), filters).chosen)


@contextlib.contextmanager
def failing_alone(ticket: Ticket) -> Iterator[None]:
    """Keep what goes wrong in one request, such as in its callback, from the others."""
    try:
        yield
    except Exception as error:
        ticket.error, ticket.finish_reason = error, "error"


def _stacked(noise: Sequence[Any], like: Tensor) -> Tensor | None:
    """Return noise [P, K] where logits are; None where there is none."""
    if not noise:
        return None
    kind = np.float64 if like.dtype == torch.float64 else np.float32
    return torch.from_numpy(np.stack(noise).astype(kind)).to(like.device)
