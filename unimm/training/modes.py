"""How a model computes in training: its attention, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unimm.models.modeling import UniMMModel


@contextmanager
def plain_attention(model: UniMMModel) -> Iterator[None]:
    """Within, the decoder attends through SDPA: FlexAttention is for training, on rows of one length."""
    before = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.decoder.set_attn_implementation(before)


def set_gradient_checkpointing(model: UniMMModel, wanted: bool) -> None:
    """Switch gradient checkpointing of the decoder and the understanding encoder on or off."""
    if wanted:
        model.decoder.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.decoder.activation_checkpointing_disable()
    if model.vision is not None:
        model.vision.checkpoint(wanted)
