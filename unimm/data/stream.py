"""From a `Record` to one row of the stream: which tokens are given and which are learnt.

The words around turns are the processor's own conversation, so that a model is trained on what it will be asked.
Pictures stand where the record has them. The assistant's texts, the end of each of its turns and its codes are
learnt; in an interleaved record the token that opens a picture is learnt too, so that the model knows when to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unimm.data.sources.record import Message, Picture, Record
from unimm.errors import UserError
from unimm.layout import Part
from unimm.processing import CAPTION_REQUESTS, Grid, UniMMProcessor

IGNORED = -100  # a label that no loss counts; `unimm.modeling` has the same


@dataclass
class Row:
    """One row: tokens and labels, and how many pictures of the record, in order, stand in it.

    Attributes:
        ids: tokens [T], with the layout's placeholders where pictures stand.
        labels: [T], `IGNORED` where nothing is learnt.
        seen: pictures to look at that are in the row.
        drawn: pictures to draw that are in the row.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    seen: int = 0
    drawn: int = 0


class RowBuilder:
    """Writes records into rows for one processor.

    Args:
        processor: whose conversation, tokenizer and layout are used.
        requests: what is asked of a picture that comes with a caption only; one is chosen by number.
    """

    def __init__(self, processor: UniMMProcessor, requests: Sequence[str] = CAPTION_REQUESTS) -> None:
        self.processor = processor
        self.requests = tuple(requests)
        closing = processor.marks(processor.conversation.assistant)
        last = closing[-1] if closing else ""
        # After "Assistant:" the answer begins with a space; after a special token or a line end it does not.
        self.lead = " " if isinstance(last, str) and last and not last[-1].isspace() else ""

    def build(
        self,
        record: Record,
        grids: Sequence[Grid],
        codes: Sequence[Tensor],
        request: int = 0,
        blank: bool = False,
    ) -> Row:
        """Write a record; turns that the context has no room for are left out from the end.

        Args:
            record: what to write.
            grids: rows and columns of each picture to look at, where a layout needs them.
            codes: int64 [h, w] of each picture to draw.
            request: which caption request is put in.
            blank: whether the words of a text-to-image prompt are blanked, for guidance.

        Raises:
            UserError: not even the first answer fits the context.
        """
        messages, context = list(record.messages), self.processor.context
        if record.kind == "text_to_image" and _is_prompt(messages):
            row = self._drawing(messages, codes[0], blank)
        else:
            row = self._write(messages, grids, codes, request)
        shorter = messages
        while len(row.ids) > context and (shorter := _without_last_turn(shorter)):
            row = self._write(shorter, grids, codes, request)
        if len(row.ids) <= context:
            return row
        if record.kind == "text" and len(messages) == 1:  # plain text is cut
            return Row(row.ids[:context], row.labels[:context])
        raise UserError(f"{len(row.ids)} tokens, the context holds {context}")

    def length(self, record: Record, grids: Sequence[Grid] = ()) -> int:
        """Tokens of the whole record, whether the context has room for them or not."""
        layout, messages = self.processor.layout, list(record.messages)
        codes = [torch.zeros(layout.grid, dtype=torch.long)] * len(record.pictures(draw=True))
        if record.kind == "text_to_image" and _is_prompt(messages):
            return len(self._drawing(messages, codes[0], False).ids)
        shown = list(grids) or [layout.grid] * len(record.pictures(draw=False))
        return len(self._write(messages, shown, codes, 0).ids)

    def _drawing(self, messages: Sequence[Message], codes: Tensor, blank: bool) -> Row:
        """A prompt and its drawing, exactly as `UniMM.draw` asks for one."""
        processor, grid = self.processor, (codes.shape[0], codes.shape[1])
        words = " ".join(part for part in messages[-2].parts if isinstance(part, str))
        prompt = processor.drawing_ids(words, grid)
        if blank:
            opening = processor.ids(*processor.layout.opening(*grid))
            prompt = [prompt[0], *[processor.pad] * (len(prompt) - 1 - len(opening)), *opening]
        tokens, labels = self._code_tokens(codes)
        return Row([*prompt, *tokens], [IGNORED] * len(prompt) + labels, drawn=1)

    def _code_tokens(self, codes: Tensor) -> tuple[list[int], list[int]]:
        """A picture's positions after its opening, and their labels; forced tokens are not learnt."""
        layout = self.processor.layout
        if layout.shared:
            tokens = layout.tokens(codes)
            learnt = torch.where(layout.code_positions(tokens), tokens, IGNORED)
            return tokens.tolist(), learnt.tolist()
        steps = layout.drawing_steps(codes.shape[0], codes.shape[1])
        left = iter(codes.flatten().tolist())
        return steps, [next(left) if step == layout.code else IGNORED for step in steps]

    def _write(
        self, messages: Sequence[Message], grids: Sequence[Grid], codes: Sequence[Tensor], request: int
    ) -> Row:
        """Any record, turn by turn."""
        processor, turn = self.processor, self.processor.conversation
        said = [part for m in messages if m.role == "assistant" for part in m.parts]
        mixed = any(isinstance(part, str) for part in said) and len({type(part) for part in said}) > 1
        row, pending = Row(), list[Part]([[processor.bos]])
        system = next((m for m in messages if m.role == "system"), None)
        asked = any(message.role == "user" for message in messages)
        if system is not None:
            pending += [" ".join(part for part in system.parts if isinstance(part, str)), "\n\n"]
        elif asked and any(isinstance(part, str) for part in said):
            pending += processor.marks(turn.system)
        for message in messages:
            if message.role == "user":
                pending += processor.marks(turn.user) + self._user(message, grids, row, request)
                pending += processor.marks(turn.assistant)
            elif message.role == "assistant":
                pending = self._assistant(message, codes, row, pending, mixed, self.lead if asked else "")
        return row

    def _user(self, message: Message, grids: Sequence[Grid], row: Row, request: int) -> list[Part]:
        """What a user's turn says, in parts; a picture without words gets a request."""
        processor, turn = self.processor, self.processor.conversation
        parts: list[Part] = []
        after_picture = False
        for part in message.parts:
            if isinstance(part, str):
                parts.append(part)
            else:
                parts += processor.marks(turn.between_images) if after_picture else []
                parts += [
                    *processor.layout.understanding(*grids[row.seen]),
                    *processor.marks(turn.after_image),
                ]
                row.seen += 1
            after_picture = isinstance(part, Picture)
        if not any(isinstance(part, str) for part in message.parts):
            parts.append(self.requests[request % len(self.requests)])
        return parts

    def _assistant(
        self,
        message: Message,
        codes: Sequence[Tensor],
        row: Row,
        pending: list[Part],
        mixed: bool,
        lead: str,
    ) -> list[Part]:
        """Write what was given so far and a turn of the assistant; gives what is still to be given after it."""
        processor, layout = self.processor, self.processor.layout
        for number, part in enumerate(message.parts):
            if isinstance(part, str):
                _given(row, processor.ids(*pending))
                _learnt(row, processor.text_ids((lead if number == 0 else "") + part))
                pending = []
                continue
            drawn = codes[row.drawn]
            opening = layout.opening(drawn.shape[0], drawn.shape[1])
            if mixed:
                _given(row, processor.ids(*pending))
                _learnt(row, processor.ids(*opening))
            else:
                _given(row, processor.ids(*pending, *opening))
            tokens, labels = self._code_tokens(drawn)
            row.ids += tokens
            row.labels += labels
            row.drawn += 1
            pending = [layout.closing()]
        _given(row, processor.ids(*pending))
        if mixed or isinstance(message.parts[-1], str):
            _learnt(row, [processor.eos])
        else:
            _given(row, [processor.eos])
        return []


def _given(row: Row, tokens: Sequence[int]) -> None:
    row.ids += tokens
    row.labels += [IGNORED] * len(tokens)


def _learnt(row: Row, tokens: Sequence[int]) -> None:
    row.ids += tokens
    row.labels += tokens


def _is_prompt(messages: Sequence[Message]) -> bool:
    """Whether a text-to-image record is one prompt and one drawing."""
    return [m.role for m in messages] == ["user", "assistant"] and len(messages[-1].parts) == 1


def _without_last_turn(messages: Sequence[Message]) -> list[Message]:
    """The messages up to the last answer but one; none if there is no other."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return list(messages[: answers[-2] + 1]) if len(answers) > 1 else []


def grids_of(processor: UniMMProcessor, sizes: Sequence[Sequence[int]]) -> list[Grid]:
    """Rows and columns of pictures of these heights and widths, where the layout lets size decide."""
    return [(int(height) // processor.stride, int(width) // processor.stride) for height, width in sizes]
