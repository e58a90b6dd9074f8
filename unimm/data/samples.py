"""From a `Record` to a training sample, tokens and tensors: the one way that training and `unimm data check` share.

A record that cannot become a sample is a `BadRecord` with a reason here and nowhere else, so what the check calls
good is what training can use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.models.inputs import Images
from unimm.models.layout import Grid, ImageGrid
from unimm.processing.conversation import ImageSlot
from unimm.processing.messages import BadRecord, ImagePart, Message, Record
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor, grids_of
from unimm.processing.rows import Row
from unimm.processing.views import TargetSize

Sample = dict[str, Any]
Encode = Callable[[Tensor], Tensor]  # pixels [3, H, W] in [-1, 1] to codes int64 [h, w]


class SampleBuilder:
    """Makes samples of records for one model.

    Args:
        processor: of the model.
        target_size: what images to draw are brought to; None where the model cannot draw.
        encode: gives the codes of such an image.
        requests: what is asked of an image that has only a caption.
        context: most tokens of a sample; None: what the model holds.
        images: most images to look at of a sample; None: any number.
    """

    def __init__(
        self,
        processor: UniMMProcessor,
        target_size: TargetSize | None,
        encode: Encode,
        requests: Sequence[str] = CAPTION_REQUESTS,
        context: int | None = None,
        images: int | None = None,
    ) -> None:
        self.processor, self.target_size, self.encode, self.images = (
            processor,
            target_size,
            encode,
            images,
        )
        self.requests = tuple(requests)
        self.context = processor.context if context is None else min(context, processor.context)

    def build(
        self,
        record: Record,
        location: str,
        codes: Callable[[], Sequence[Tensor]] | None = None,
        request: int = 0,
        drop_prompt: bool = False,
    ) -> Sample:
        """The sample of a record.

        Args:
            record: what to make it of.
            location: what the record's source is called.
            codes: gives the stored codes [h, w] of its images to draw; None: they are its own, or made now.
            request: which caption request, and which version of the record, is taken.
            drop_prompt: whether the prompt of a text-to-image record is replaced by what guidance steers away from.

        Returns:
            `ids`, `labels`, `positions` and `branches`, int64 [T]; `whole`, its tokens before turns were left out;
            `images`, those that stand in it.

        Raises:
            BadRecord: it cannot be used.
        """
        try:
            return self._build(record, codes, request, drop_prompt)
        except BadRecord:
            raise
        except UserError as error:
            raise BadRecord(record.key, location, str(error)) from None

    def _build(
        self, record: Record, stored: Callable[[], Sequence[Tensor]] | None, request: int, drop_prompt: bool
    ) -> Sample:
        codes = self._codes(record, stored)
        shown = self._shown(record.images(draw=False))
        row = self.row(record, grids_of(shown), codes, request)
        if drop_prompt and record.kind == "text_to_image" and row.drawn == 1:
            row = self.processor.conversation.drop_prompt(row, _size(codes[0]))
        if self.images is not None and row.seen > self.images:
            raise UserError(f"{row.seen} images, a row holds {self.images}")
        images = shown.first(row.seen)
        images.codes = self.processor.drawn(codes[: row.drawn]).codes
        return {**row.arrays(), "whole": row.whole, "images": images}

    def row(
        self, record: Record, grids: Sequence[ImageGrid], codes: Sequence[Tensor], request: int = 0
    ) -> Row:
        """Write a record; turns that the context has no room for are left out from the end.

        Whether a record can be used does not depend on `request`: where the wording that it falls on is too long,
        the next one is taken.

        Args:
            record: what to write.
            grids: rows and columns of each image to look at.
            codes: int64 [h, w] of each image to draw.
            request: which caption request, and which version of the record, is taken.

        Raises:
            UserError: not even the first answer fits the context.
        """
        requests = len(self.requests)
        tries = record.versions * (requests if _wants_request(record.messages) else 1)
        refused: UserError | None = None
        for number in range(request, request + tries):
            version = record.version(number // requests if tries > record.versions else number)
            try:
                return self._fitted(self._requested(version.messages, number), grids, codes)
            except UserError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _requested(self, messages: Sequence[Message], number: int) -> list[Message]:
        """Messages up to the last answer, a request put in where the user shows images without words."""
        asked = self.requests[number % len(self.requests)]
        answered = _answered(messages)
        return [
            Message("user", (*message.parts, asked)) if _lacks_words(answered, place) else message
            for place, message in enumerate(answered)
        ]

    def _fitted(
        self, messages: Sequence[Message], grids: Sequence[ImageGrid], codes: Sequence[Tensor]
    ) -> Row:
        """Messages as a row that fits the context; what is left out is counted in `whole`."""
        conversation = self.processor.conversation
        row = conversation.write(messages, _slots(messages, grids, codes))
        length, shorter = row.whole, messages
        while len(row.ids) > self.context and (shorter := _without_last_turn(shorter)):
            row = conversation.write(shorter, _slots(shorter, grids, codes))
        row.whole = length
        if len(row.ids) <= self.context:
            return row
        if len(messages) == 1 and not (row.seen or row.drawn):  # plain text is cut
            return Row(row.ids[: self.context], row.labels[: self.context], whole=length)
        raise UserError(f"{length} tokens, the context holds {self.context}")

    def _shown(self, images: Sequence[ImagePart]) -> Images:
        """Images to look at as the model takes them."""
        processor = self.processor
        if not images or not all(image.featured for image in images):
            return processor.look([image.image() for image in images])
        return processor.stored_features([image.features() for image in images])

    def _codes(self, record: Record, stored: Callable[[], Sequence[Tensor]] | None) -> Sequence[Tensor]:
        """Codes of a record's images to draw: its own, the stored ones, or made now."""
        drawn = record.images(draw=True)
        if not drawn:
            return []
        if self.target_size is None:
            raise UserError("an image to draw, but this model cannot draw")
        if all(image.encoded for image in drawn):
            codes: Sequence[Tensor] = [torch.from_numpy(image.codes()) for image in drawn]
        elif stored is not None:
            codes = stored()
        else:
            codes = [self.encode(self.target_size.pixels(image.image())) for image in drawn]
        for one in codes:
            self._check_codes(one)
        return codes

    def _check_codes(self, codes: Tensor) -> None:
        """Refuse stored codes [h, w] that the model does not have, or not in this number."""
        layout, known = self.processor.layout, self.processor.codes
        if not codes.numel() or (not layout.sized and tuple(codes.shape) != tuple(layout.grid)):
            raise UserError(f"image codes of {list(codes.shape)}, the model draws {list(layout.grid)}")
        least, most = int(codes.min()), int(codes.max())
        if least < 0 or (known is not None and most >= known):
            raise UserError(f"image codes of {least} to {most}, the model has 0 to {(known or 0) - 1}")


def blank_codes(target_size: TargetSize) -> Encode:
    """An encoder that only says how many codes an image has; all of them are 0."""
    return lambda pixels: torch.zeros(
        pixels.shape[1] // target_size.stride, pixels.shape[2] // target_size.stride, dtype=torch.int64
    )


def _size(codes: Tensor) -> Grid:
    return int(codes.shape[0]), int(codes.shape[1])


def _slots(
    messages: Sequence[Message], grids: Sequence[ImageGrid], codes: Sequence[Tensor]
) -> list[ImageSlot]:
    """What is known of each image of messages, in their order; there may be more than they have."""
    seen, drawn = iter(grids), iter(codes)
    images = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
    return [next(drawn) if image.draw else next(seen) for image in images]


def _lacks_words(messages: Sequence[Message], place: int) -> bool:
    """Whether a message is a user's images without words, to which words answer."""
    message, answer = messages[place], messages[place + 1] if place + 1 < len(messages) else None
    if message.role != "user" or any(isinstance(part, str) for part in message.parts):
        return False
    return answer is not None and any(isinstance(part, str) for part in answer.parts)


def _wants_request(messages: Sequence[Message]) -> bool:
    return any(_lacks_words(messages, place) for place in range(len(messages)))


def _answered(messages: Sequence[Message]) -> list[Message]:
    """The messages up to the last answer: a turn of the user that nobody answers teaches nothing."""
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    return list(messages[: last + 1])


def _without_last_turn(messages: Sequence[Message]) -> list[Message]:
    """The messages up to the last answer but one; none if there is no other."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return list(messages[: answers[-2] + 1]) if len(answers) > 1 else []
