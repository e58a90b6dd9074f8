"""What another number format does to a model: its logits beside those of the reference, along the same stream.

Both models go through the stream step by step, as in use, and both are given what the reference chose, so that
one different choice is counted once and does not lead the two apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.models.inputs import Images
from unimm.processing.processor import CAPTION_REQUESTS
from unimm.sampling.cache import RowCache, RowsAt
from unimm.sampling.runners import make_runner
from unimm.sampling.sampler import guide

if TYPE_CHECKING:
    from unimm.images import ImageInput
    from unimm.pipeline import UniMM


@dataclasses.dataclass(frozen=True)
class LogitsEffect:
    """How far logits are from the reference's.

    Attributes:
        choices: rows of logits that were compared.
        largest: the largest absolute difference of any logit.
        relative: norm of all differences by the norm of the reference's logits, each row's mean taken out (a
            constant changes no choice).
        same: share of rows whose largest logit is at the same place.
    """

    choices: int
    largest: float
    relative: float
    same: float

    @classmethod
    def of(cls, reference: Tensor, other: Tensor) -> LogitsEffect:
        """Compare logits [P, V]."""
        reference, other = reference.double(), other.double()
        centred = [logits - logits.mean(-1, keepdim=True) for logits in (reference, other)]
        return cls(
            len(reference),
            (reference - other).abs().max().item(),
            ((centred[0] - centred[1]).norm() / centred[0].norm()).item(),
            (reference.argmax(-1) == other.argmax(-1)).double().mean().item(),
        )


@torch.inference_mode()
def code_effect(
    reference: UniMM, other: UniMM, prompts: Sequence[str], guidance_scale: float = 5.0
) -> LogitsEffect:
    """Compare the guided logits of drawings, along the reference's greedy codes.

    Args:
        reference: the model as it is.
        other: the same model in another number format.
        prompts: what is drawn; all in one batch.
        guidance_scale: 1 compares the logits as they come from the head.
    """
    grid = reference.model.layout.grid
    walks = [_Walk(um, _drawn_rows(um, prompts, grid, guidance_scale)) for um in (reference, other)]
    found: list[tuple[Tensor, Tensor]] = []
    for step in reference.model.layout.drawing_steps(*grid):
        if step != reference.model.layout.code:
            for walk in walks:
                walk.put_tokens(torch.full((walk.rows,), step))
            continue
        ours, theirs = (walk.code_logits(guidance_scale) for walk in walks)
        found.append((ours, theirs))
        chosen = ours.argmax(-1)
        for walk in walks:
            walk.put_codes(chosen.repeat(walk.rows // len(prompts)), len(found) - 1)
    return LogitsEffect.of(*(torch.cat(logits) for logits in zip(*found, strict=True)))


@torch.inference_mode()
def text_effect(
    reference: UniMM, other: UniMM, images: Sequence[ImageInput], tokens: int = 16
) -> LogitsEffect:
    """Compare the text logits of captions, along the reference's greedy tokens.

    Args:
        reference: the model as it is.
        other: the same model in another number format.
        images: what is captioned; all in one batch.
        tokens: of each caption, whether it would have ended or not.
    """
    walks = []
    for um in (reference, other):
        asked = [um.processor.question(CAPTION_REQUESTS[0], [image]) for image in images]
        walks.append(_Walk(um, [_stream(um, ids, seen) for ids, seen in asked]))
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(tokens):
        ours, theirs = (walk.text_logits() for walk in walks)
        found.append((ours, theirs))
        for walk in walks:
            walk.put_tokens(ours.argmax(-1))
    return LogitsEffect.of(*(torch.cat(logits) for logits in zip(*found, strict=True)))


class _Walk:
    """One model along rows that it does not choose itself.

    Args:
        um: the model.
        streams: of each row's prompt, [T, C].
    """

    def __init__(self, um: UniMM, streams: list[Tensor]) -> None:
        self.model, self.rows = um.model, len(streams)
        self.runner = make_runner(um.model)
        self.cache = RowCache(self.runner.layers_count)
        self.cache.reserve(self.rows, um.processor.context)
        self.filled = [len(stream) - 1 for stream in streams]
        self.next = torch.stack([stream[-1:] for stream in streams])
        self._last: Tensor | None = None
        if width := max(self.filled):
            padded = [F.pad(stream[:-1], (0, 0, 0, width - len(stream) + 1)) for stream in streams]
            at = RowsAt(0, [0] * self.rows, width, um.device)
            self.runner(self.cache, at, torch.stack(padded))

    def code_logits(self, scale: float) -> Tensor:
        """Return the guided logits [B, K] of the next codes."""
        logits: Tensor = self.model.code_logits(self._hidden()).cpu()
        if scale == 1.0:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        guided: Tensor = guide(conditional, unconditional, scale)
        return guided

    def text_logits(self) -> Tensor:
        """Return the logits [B, V] of the next tokens."""
        logits: Tensor = self.model.decoder.get_output_embeddings()(self._hidden())
        return logits.cpu()

    def put_codes(self, codes: Tensor, place: int) -> None:
        """Go on with codes [A] at a place of their images."""
        self._read()
        self.next = self.model.embed_codes(codes.to(self.model.device)[:, None], start=place)

    def put_tokens(self, tokens: Tensor) -> None:
        """Go on with tokens [A]."""
        self._read()
        self.next = self.model.get_input_embeddings()(tokens.to(self.model.device)[:, None])

    def _hidden(self) -> Tensor:
        """Run what is next, once; the hidden states [A, C]."""
        if self._last is None:
            at = RowsAt(0, self.filled, 1, self.model.device)
            self._last = self.runner(self.cache, at, self.next)[:, 0]
        return self._last

    def _read(self) -> None:
        """Count what is next as read."""
        self._hidden()
        self._last = None
        self.filled = [filled + 1 for filled in self.filled]


def _drawn_rows(um: UniMM, prompts: Sequence[str], grid: tuple[int, int], scale: float) -> list[Tensor]:
    """Return the streams of prompts for drawings, and behind them those that guidance steers away from."""
    rows = [um.processor.drawing_ids(prompt, grid) for prompt in prompts]
    if scale != 1.0:
        rows += [um.processor.unconditional_ids(row, grid) for row in rows]
    return [_stream(um, row) for row in rows]


def _stream(um: UniMM, ids: list[int], images: Images | None = None) -> Tensor:
    seen = None if images is None else images.to(um.device)
    stream: Tensor = um.model.embed(torch.tensor([ids], device=um.device), seen).stream[0]
    return stream
