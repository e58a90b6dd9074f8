"""Text answers: transformers' own generation over the unified model's stream."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BatchFeature

from unimm.modeling import UniMMModel
from unimm.processing import UniMMProcessor


@torch.inference_mode()
def generate_text(
    model: UniMMModel,
    processor: UniMMProcessor,
    inputs: BatchFeature,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
) -> list[str]:
    """Answer a left-padded batch greedily.

    Args:
        model: the unified model.
        processor: its processor.
        inputs: what the processor returns for questions and images.
        max_new_tokens: most tokens of an answer; cut where the context ends.
        min_new_tokens: fewest.
    """
    inputs = inputs.to(model.device)
    stream = model.embed(
        inputs["input_ids"], inputs.get("pixel_values"), image_sizes=inputs.get("image_sizes")
    )
    ids: Tensor = model.decoder.generate(
        inputs_embeds=stream,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, processor.context - stream.shape[1]),
        min_new_tokens=min_new_tokens,
        do_sample=False,
        eos_token_id=processor.eos,
        pad_token_id=processor.pad,
    )
    return processor.decode_text(ids)
