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

from unimm.models.inputs import Images
from unimm.processing.processor import CAPTION_REQUESTS
from unimm.sampling.decoder import Steps, make_steps
from unimm.sampling.engine import CodeSteps

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
    walks = []
    for um in (reference, other):
        rows = [um.processor.drawing_inputs(prompt) for prompt in prompts]
        walks.append(CodeSteps(um.model, um.processor, rows, grid, guidance_scale))
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(grid[0] * grid[1]):
        ours, theirs = (walk.logits() for walk in walks)
        found.append((ours.cpu(), theirs.cpu()))
        chosen = ours.argmax(-1)
        for walk in walks:
            walk.put(chosen.to(walk.model.device))
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
    runs: list[Steps] = []
    streams: list[Tensor] = []
    for um in (reference, other):
        asked = um.processor([CAPTION_REQUESTS[0]] * len(images), [[image] for image in images])
        inputs = dict(asked.to(um.model.device))
        mask, input_ids = inputs.pop("attention_mask"), inputs.pop("input_ids")
        streams.append(um.model.embed(input_ids, Images.from_inputs(inputs)).stream)
        runs.append(make_steps(um.model, mask, mask.shape[1] + tokens))
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(tokens):
        ours, theirs = (
            um.model.decoder.get_output_embeddings()(run(stream))
            for um, run, stream in zip((reference, other), runs, streams, strict=True)
        )
        found.append((ours.cpu(), theirs.cpu()))
        chosen = ours.argmax(-1)[:, None]
        streams = [um.model.get_input_embeddings()(chosen.to(um.model.device)) for um in (reference, other)]
    return LogitsEffect.of(*(torch.cat(logits) for logits in zip(*found, strict=True)))
