"""What transformers 5.24 gets wrong in the survey's systems, and the references mend.

A test here asserts that the fault is still there: once it fails, the fault is mended upstream, and what the file of
the system's checkpoints does about it can go.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AriaProcessor,
    FuyuImageProcessor,
    FuyuProcessor,
    InternVLForConditionalGeneration,
    MllamaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2VLProcessor,
)
from transformers.models.fuyu import processing_fuyu as fuyu

from tests.families.aria_checkpoints import ARIA
from tests.families.fuyu_checkpoints import FUYU
from tests.families.llama_vision_checkpoints import CROSSING, ENTERING, LLAMA_VISION
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


def test_fuyu_cuts_no_patches_with_the_pil_backend() -> None:
    oracle = FUYU.make()
    with pytest.raises(TypeError):
        oracle.processor(text=["what\n"], images=[picture(37, 91)], return_legacy_image_output=False)


def test_fuyu_drops_coordinates() -> None:
    """They are worked out, and the text without them is what gets written."""
    processor = fuyu_processor()
    ids = processor.tokenizer.get_vocab()
    texts, shown = ["a <box>10, 20, 80, 36</box>\n"], [picture(37, 91)]
    (row,) = processor(text=texts, images=shown, return_legacy_image_output=False)["input_ids"].tolist()
    assert ids["<0x00>"] not in row and ids["<0x01>"] not in row


def test_fuyu_would_write_numbers_with_nothing_between() -> None:
    assert fuyu.transform_coordinates(["a <box>10, 20, 80, 36</box>"], [torch.tensor([1.0])]) == [
        "a <0x00>5104018<0x01>"
    ]


def test_fuyu_opens_no_answer_to_a_question_without_image() -> None:
    processor = fuyu_processor()
    ids = processor.tokenizer.get_vocab()
    assert ids["<0x04>"] not in processor(text=["what\n"])["input_ids"][0]
    shown = {"images": [picture(37, 91)], "return_legacy_image_output": False}
    assert processor(text=["what\n"], **shown)["input_ids"][0, -1] == ids["<0x04>"]


def test_fuyu_takes_one_image_a_sample() -> None:
    """Two of one sample are taken for those of two."""
    processor = fuyu_processor()
    shown = [[picture(37, 91), picture(64, 31)]]
    with pytest.raises(ValueError):
        processor(text=["what\n"], images=shown, return_legacy_image_output=False)


def test_aria_counts_the_most_crops_for_every_image() -> None:
    """Split into two and into four crops, both images get the tokens of four."""
    oracle = ARIA.make()
    options = {"max_image_size": 490, "split_image": True}
    shown = [picture(200, 100), picture(1600, 200)]
    crops = [len(oracle.processor.image_processor([image], **options)["pixel_values"]) for image in shown]
    assert crops == [2, 4]
    made = oracle.processor(text=["<|img|>a<|img|>"], images=shown, images_kwargs=options)
    assert made["input_ids"][0].count(oracle.placeholders[0]) == 2 * 4 * 5 != sum(crops) * 5


def test_aria_ignores_the_side_in_its_folder(tmp_path: Path) -> None:
    """The processor's own default is laid over what `preprocessor_config.json` says."""
    oracle = ARIA.make()
    oracle.processor.image_processor.max_image_size = 490
    oracle.save(tmp_path)
    processor = AriaProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.max_image_size == 490
    made = processor(text=["<|img|>a"], images=[picture(64, 52)], return_tensors="pt")
    assert made["pixel_values"].shape[-1] == 980


@torch.no_grad()
def test_mllama_joins_states_that_leave_layers() -> None:
    """Meta's code joins those that enter layers 3, 7, 15, 23 and 30, as transformers did at first."""
    vision: Any = MllamaForConditionalGeneration(LLAMA_VISION.make().model.config).eval().model.vision_model
    states: list[torch.Tensor] = []
    for layer in vision.transformer.layers:
        layer.register_forward_hook(lambda _, args, output: states.append(output))
    mask = torch.ones(1, 1, 4, dtype=torch.int64)
    pixels = torch.randn(1, 1, 4, 3, 28, 28)
    found = vision(pixels, torch.tensor([[6]]), mask).last_hidden_state
    inner = found[0, 0, 0, :, 36:].unflatten(-1, (36, -1))
    for place, layer in enumerate(ENTERING):
        assert torch.equal(inner[..., place], states[layer][0, : inner.shape[0]])


@torch.no_grad()
def test_mllama_shows_an_image_to_the_text_before_it() -> None:
    """Where a text sees nothing its attention is the mean of all, and is added; its MLP is taken away."""
    mended = LLAMA_VISION.make()
    oracle: Any = mended.model
    plain = MllamaForConditionalGeneration(oracle.config).eval()
    plain.load_state_dict(oracle.state_dict())
    moved = {}
    for name, model in (("mended", oracle), ("plain", plain)):
        logits = []
        for seed in (0, 1):
            image = picture(37, 91, seed)
            inputs = mended.inputs_of(["what is this? <|image|>"], [[image]])
            mark = inputs["input_ids"][0].tolist().index(mended.placeholders[0])
            logits.append(model(**inputs).logits[0, : mark + 1])
        moved[name] = (logits[0] - logits[1]).abs().amax(-1)
    assert moved["plain"][:-1].min() > 0.01
    assert not moved["mended"][:-1].any() and moved["mended"][-1] > 0.01


def test_mllama_is_causal_where_it_has_no_mask() -> None:
    """Attention that says nothing of itself is taken for causal; neither the encoder's nor the blocks' is."""
    model: Any = LLAMA_VISION.make().model
    attention = model.model.vision_model.transformer.layers[0].self_attn
    crossing = model.model.language_model.layers[CROSSING[0]].cross_attn
    assert not hasattr(attention, "is_causal") and not hasattr(crossing, "is_causal")


def fuyu_processor() -> FuyuProcessor:
    """The processor with its other backend, which cuts patches."""
    oracle = FUYU.make()
    images = json.loads(oracle.processor.image_processor.to_json_string())
    return FuyuProcessor(FuyuImageProcessor(**images), oracle.tokenizer)
