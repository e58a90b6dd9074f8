"""What transformers 5.24 gets wrong in the survey's systems, and the references mend.

A test here asserts that the fault is still there: once it fails, the fault is mended upstream, and what the file of
the system's checkpoints does about it can go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import InternVLForConditionalGeneration, PixtralVisionConfig, Qwen2VLProcessor

from tests.families.nvlm_checkpoints import NVLM
from tests.families.qwen2_vl_checkpoints import QWEN2_VL
from tests.families.survey import picture


def test_qwen2_vl_needs_the_types_of_its_tokens() -> None:
    """Without `mm_token_type_ids` no picture has positions of its own: the class counts them as text, or raises."""
    oracle = QWEN2_VL.make()
    inputs = oracle.inputs(["a"], [[picture(37, 91)]])
    expected = oracle.logits(inputs)
    inputs.pop("mm_token_type_ids")
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        oracle.logits(inputs)
    assert expected.isfinite().all()


@torch.no_grad()
def test_qwen2_vl_keeps_positions_from_call_to_call() -> None:
    """How far positions run behind tokens is left in the module; embedded text of another batch size fails on it."""
    oracle = QWEN2_VL.make()
    text = oracle.inputs(["what is in this image?"], [[]])
    embedded = oracle.model.get_input_embeddings()(text["input_ids"])
    inputs = {"inputs_embeds": embedded, "attention_mask": text["attention_mask"]}
    first = oracle.forward(inputs).logits
    oracle.logits(oracle.inputs(["a", "what"], [[picture(37, 91)], []]))
    assert oracle.model.model.rope_deltas is not None
    with pytest.raises(RuntimeError, match="reshape"):
        oracle.model(**inputs)
    assert torch.equal(oracle.forward(inputs).logits, first)


def test_qwen2_vl_cannot_be_loaded_with_the_pil_backend(tmp_path: Path) -> None:
    """The backend is asked of the video processor too, which has no such form."""
    QWEN2_VL.write(tmp_path)
    with pytest.raises(ImportError, match="pil"):
        Qwen2VLProcessor.from_pretrained(tmp_path, backend="pil")


def test_pixtral_has_another_activation_than_published() -> None:
    """The published towers say silu; the class's default, taken where a config says nothing, is another."""
    assert PixtralVisionConfig().hidden_act == "gelu"


def test_internvl_has_another_connector_than_nvlm() -> None:
    """Its class makes the projector as wide inside as the decoder's states, with biases."""
    oracle = NVLM.make()
    config: Any = oracle.model.config
    theirs = InternVLForConditionalGeneration(config).model.multi_modal_projector
    ours = oracle.model.model.multi_modal_projector
    assert theirs.linear_1.weight.shape == (72, 192) and theirs.linear_1.bias is not None
    assert ours.linear_1.weight.shape == (88, 192) and ours.linear_1.bias is None
