"""The references themselves: what a comparison with them takes for granted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import FuyuImageProcessor, FuyuProcessor

from tests.families import nvlm_checkpoints
from tests.families.aria_checkpoints import ARIA, sized
from tests.families.fuyu_checkpoints import FUYU
from tests.families.nvlm_checkpoints import NVLM
from tests.families.pixtral_checkpoints import PIXTRAL
from tests.families.qwen2_vl_checkpoints import QWEN2_VL, QWEN2_VL_TIED
from tests.families.survey import Oracle, Reference, picture, turn_of

REFERENCES = (PIXTRAL, QWEN2_VL, QWEN2_VL_TIED, NVLM, FUYU, ARIA)
READABLE = tuple(reference for reference in REFERENCES if "transformers" in reference.layouts)
TEMPLATED = tuple(reference for reference in REFERENCES if reference is not FUYU)  # which has none published
QUESTIONS = ["what is in this image?", "a", "how many red apples are there?\nand these"]
SIZES = [(37, 91), (300, 133), (61, 60), (13, 200)]
Written = tuple[Reference, Oracle, Path]


@pytest.fixture(scope="module", params=REFERENCES, ids=lambda reference: reference.name)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp(request.param.name)
    return request.param, request.param.write_all(folder), folder


def images(reference: Reference) -> list[list[Image.Image]]:
    """For the questions: none, one and three of odd sizes (or as many as a sample may have)."""
    shown = [picture(*size) for size in SIZES]
    return [[], shown[:1], shown[1:][: reference.most_images]]


@pytest.fixture(scope="module")
def inputs(written: Written) -> dict[str, torch.Tensor]:
    reference, oracle, _ = written
    return oracle.inputs(QUESTIONS, images(reference))


def test_a_padded_batch_equals_its_rows_alone(written: Written, inputs: dict[str, torch.Tensor]) -> None:
    reference, oracle, _ = written
    together = oracle.logits(inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3 and max(lengths) == inputs["input_ids"].shape[1]
    assert bool((inputs["attention_mask"].diff(dim=1) >= 0).all())  # all padding stands on the left
    for row, (question, own) in enumerate(zip(QUESTIONS, images(reference), strict=True)):
        alone = oracle.logits(oracle.inputs([question], [own]))[0]
        assert alone.std() > 0.1
        assert len(alone) == lengths[row]
        assert (together[row, -len(alone) :] - alone).abs().max() < 1e-4


def test_images_are_seen(written: Written) -> None:
    """Another image of the same size moves the logits of the answer, and so does the order of two."""
    reference, oracle, _ = written
    one, other = picture(64, 52), picture(64, 52, seed=1)
    first = oracle.logits(oracle.inputs(QUESTIONS[:1], [[one]]))[0, -1]
    assert (oracle.logits(oracle.inputs(QUESTIONS[:1], [[other]]))[0, -1] - first).abs().max() > 1e-2
    if reference.most_images > 1:
        ways = [oracle.logits(oracle.inputs(["a"], [way]))[0, -1] for way in ([one, other], [other, one])]
        assert (ways[0] - ways[1]).abs().max() > 1e-2


def test_a_cache_changes_no_greedy_token(written: Written, inputs: dict[str, torch.Tensor]) -> None:
    _, oracle, _ = written
    made = oracle.greedy(inputs, 5)
    assert made.shape == (3, 5)
    assert torch.equal(made, oracle.greedy(inputs, 5, cache=False))
    assert torch.equal(made[:, 0], oracle.logits(inputs)[:, -1].argmax(-1))


@pytest.mark.parametrize("written", READABLE, indirect=True, ids=lambda reference: reference.name)
def test_saved_and_loaded_it_gives_the_same(written: Written, inputs: dict[str, torch.Tensor]) -> None:
    reference, oracle, folder = written
    again = oracle.reloaded(folder / "transformers")
    same = again.inputs(QUESTIONS, images(reference))
    assert same.keys() == inputs.keys()
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)
    assert torch.equal(again.logits(same), oracle.logits(inputs))


def test_the_same_weights_at_every_call(written: Written) -> None:
    reference, oracle, _ = written
    again = reference.make().model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in oracle.model.state_dict().items())


def test_loss_and_gradients(written: Written, inputs: dict[str, torch.Tensor]) -> None:
    """The loss is the model's own, and every part named moves it."""
    reference, oracle, _ = written
    loss, gradients = oracle.loss_and_gradients(inputs, reference.trained)
    labels = oracle.labels(inputs)
    oracle.reset()
    assert (oracle.model(**inputs, labels=labels).loss - loss).abs() < 1e-5
    assert tuple(gradients) == reference.trained
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients.values())
    assert bool((labels == -100).any()) and not set(labels.unique().tolist()) & set(oracle.placeholders)


def test_tokens_and_pixels(written: Written, inputs: dict[str, torch.Tensor]) -> None:
    reference, oracle, _ = written
    shown = images(reference)
    rows = oracle.tokens(QUESTIONS, shown)
    assert [len(row) for row in rows] == inputs["attention_mask"].sum(1).tolist()
    assert all(row == inputs["input_ids"][n, -len(row) :].tolist() for n, row in enumerate(rows))
    marks = [sum(row.count(mark) for mark in oracle.placeholders) for row in rows]
    assert marks[0] == 0 and marks[1] > 0 and marks[2] > 0
    got = oracle.pixels([image for own in shown for image in own])
    assert torch.equal(torch.as_tensor(got["pixel_values"]), inputs["pixel_values"])


@pytest.mark.parametrize("written", TEMPLATED, indirect=True, ids=lambda reference: reference.name)
def test_a_conversation_of_several_turns(written: Written) -> None:
    """A question's tokens stand at the head of those of its conversation: what was open is answered and goes on."""
    _, oracle, _ = written
    asked = turn_of(1, "a")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red apples"}]}
    first, second = picture(37, 91), picture(61, 60)
    (whole,) = oracle.conversations([[*asked, answer, *turn_of(1, "what?")]], [[first, second]])[
        "input_ids"
    ].tolist()
    (begun,) = oracle.tokens(["a"], [[first]])
    assert whole[: len(begun)] == begun
    said = str(oracle.tokenizer.decode(whole[len(begun) :]))
    assert said.startswith("red apples") and "what?" in said
    (closed,) = oracle.conversations([[*asked, answer]], [[first]], answered=True)["input_ids"].tolist()
    assert oracle.eos_token_id in closed[len(begun) :] and whole[: len(closed)] == closed


def test_every_vocabulary_is_odd_and_larger_than_the_tokenizer(written: Written) -> None:
    _, oracle, _ = written
    rows = oracle.model.get_output_embeddings().weight.shape[0]
    assert rows % 2 == 1 and rows > len(oracle.tokenizer)


def test_pixtral_turns_neighbouring_pairs_in_the_original_layout(tmp_path: Path) -> None:
    """Queries and keys of the original weights, turned as complex numbers, meet as transformers' halves do."""
    oracle = PIXTRAL.write(tmp_path, "original")
    ours, theirs = load_file(tmp_path / "consolidated.safetensors"), oracle.model.state_dict()
    places = torch.arange(7.0)
    for name, layer, heads, kv_heads, theta in (
        ("layers.1.attention.", "model.language_model.layers.1.self_attn.", 6, 2, 2e5),
        ("vision_encoder.transformer.layers.1.attention.", "model.vision_tower.transformer.layers.1.attention.",
         3, 3, 5e3),
    ):  # fmt: skip
        states = torch.randn(7, ours[f"{name}wq.weight"].shape[1])
        width = ours[f"{name}wq.weight"].shape[0] // heads
        angles = torch.outer(places, theta ** (-torch.arange(0, width, 2) / width))  # [T, width / 2]
        met = []
        for weights, keys in ((ours, (f"{name}wq.weight", f"{name}wk.weight")),
                              (theirs, (f"{layer}q_proj.weight", f"{layer}k_proj.weight"))):  # fmt: skip
            turned = []
            for key, count in zip(keys, (heads, kv_heads), strict=True):
                split = F.linear(states, weights[key]).unflatten(-1, (count, width)).transpose(0, 1)
                if weights is ours:
                    pairs = torch.view_as_complex(split.unflatten(-1, (-1, 2)).contiguous())
                else:
                    pairs = torch.complex(*split.chunk(2, dim=-1))
                turned.append(pairs * torch.polar(torch.ones_like(angles), angles))
            queries, seen = turned[0], turned[1].repeat_interleave(heads // kv_heads, dim=0)
            met.append((queries @ seen.conj().transpose(1, 2)).real)
        assert (met[0] - met[1]).abs().max() < 1e-4 * met[0].abs().max()
        assert not torch.equal(ours[f"{name}wq.weight"], theirs[f"{layer}q_proj.weight"])


@pytest.mark.parametrize("reference", [QWEN2_VL, QWEN2_VL_TIED, FUYU], ids=lambda reference: reference.name)
def test_transformers_reads_the_published_config(reference: Reference, tmp_path: Path) -> None:
    oracle = reference.write_all(tmp_path)
    again = oracle.reloaded(tmp_path / "hub")
    shown = [[picture(37, 91)]]
    expected = oracle.inputs(["a"], shown)
    got = again.inputs(["a"], shown)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert torch.equal(again.logits(got), oracle.logits(expected))


@torch.no_grad()
def test_the_published_weights_of_nvlm_give_the_same_features(tmp_path: Path) -> None:
    """The published arithmetic, with its dummy heads, over what the folder holds."""
    oracle = NVLM.write(tmp_path)
    weights = load_file(tmp_path / "model-00001-of-00002.safetensors")
    weights |= load_file(tmp_path / "model-00002-of-00002.safetensors")
    pixels = oracle.pixels([picture(37, 91), picture(64, 52)])["pixel_values"]
    rows = weights["vision_model.embeddings.patch_embedding.weight"]
    states = F.conv2d(pixels, rows, weights["vision_model.embeddings.patch_embedding.bias"], stride=5)
    states = states.flatten(2).transpose(1, 2)
    first = weights["vision_model.embeddings.class_embedding"].expand(len(states), -1, -1)
    states = torch.cat([first, states], dim=1) + weights["vision_model.embeddings.position_embedding"]
    for number in range(3):
        prefix = f"vision_model.encoder.layers.{number}."
        layer = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        states = states + layer["ls1"] * _published_attention(_normed(states, layer["norm1.weight"]), layer)
        hidden = F.gelu(
            F.linear(_normed(states, layer["norm2.weight"]), layer["mlp.fc1.weight"], layer["mlp.fc1.bias"])
        )
        states = states + layer["ls2"] * F.linear(hidden, layer["mlp.fc2.weight"], layer["mlp.fc2.bias"])
    grid = states[:, 1:].unflatten(1, (3, 2, 3, 2))  # [views, rows, 2, columns, 2, width]
    joined = grid.transpose(2, 3).flatten(3).flatten(1, 2)  # [views, 9, 4 * width]
    joined = F.layer_norm(joined, joined.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"])
    got = F.linear(F.gelu(F.linear(joined, weights["mlp1.1.weight"])), weights["mlp1.3.weight"])
    model: Any = oracle.model
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    assert (got - expected).abs().max() < 1e-4 and expected.std() > 0.1


def _normed(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def _published_attention(states: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ten heads of 16, of which three are real; the norms divide by the width of those."""
    parts = F.linear(states, layer["attn.qkv.weight"]).chunk(3, dim=-1)
    queries, keys = (
        part
        * torch.rsqrt(part[..., :48].pow(2).mean(-1, keepdim=True) + 1e-6)
        * layer[f"attn.{name}_norm.weight"]
        for part, name in zip(parts[:2], "qk", strict=True)
    )
    split = [
        part.unflatten(-1, (3 + nvlm_checkpoints.DUMMY, 16)).transpose(1, 2)
        for part in (queries, keys, parts[2])
    ]
    met = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    return F.linear(met, layer["attn.proj.weight"], layer["attn.proj.bias"])


def test_the_words_of_an_image_of_nvlm() -> None:
    """Tags before each tile, the whole image last, and alone where one tile is all."""
    oracle = NVLM.make()
    for size, views in (((32, 30), 1), ((64, 60), 5), ((90, 30), 4), ((61, 91), 7)):
        (row,) = oracle.tokens(["a"], [[picture(*size)]])
        tags = [f"<tile_{number}>" for number in range(1, views)] + ["<tile_global_thumbnail>"]
        words = "".join(tag + "<|vision_pad|>" * 9 for tag in tags)
        expected = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<Image>{words}</Image>\na<|im_end|>\n<|im_start|>assistant\n"
        )
        assert oracle.tokenizer.decode(row) == expected
        assert len(oracle.pixels([picture(*size)])["pixel_values"]) == views


def test_the_words_of_fuyu_are_its_processors() -> None:
    """Ids as transformers' processor gives them with its other backend, pixels but for the resizing."""
    oracle = FUYU.make()
    questions, shown = ["what is in this image?", "a"], [[picture(37, 91)], [picture(64, 31)]]
    ours = oracle.inputs(questions, shown)
    images = json.loads(oracle.processor.image_processor.to_json_string())
    processor = FuyuProcessor(FuyuImageProcessor(**images), oracle.tokenizer)
    texts = oracle.texts(questions, shown)
    flat = [image for own in shown for image in own]
    theirs = processor(text=texts, images=flat, return_legacy_image_output=False)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 0.02


def test_fuyu_writes_coordinates_as_tokens() -> None:
    """Halved, scaled to the resized image, each a token; the tall image is shrunk from 91 rows to 42."""
    oracle = FUYU.make()
    (row,) = oracle.tokens(["a <box>10, 20, 81.5, 36</box> and <point>8, 90</point>"], [[picture(37, 91)]])
    words = oracle.tokenizer.convert_ids_to_tokens(row)
    begin = words.index("<0x00>")
    assert words[begin : begin + 6] == ["<0x00>", "2", "5", "19", "8", "<0x01>"]
    begin = words.index("<0x02>")
    assert words[begin : begin + 4] == ["<0x02>", "2", "21", "<0x03>"]
    assert words[-2:] == ["\n", "<0x04>"]


def test_aria_at_both_sides() -> None:
    """A smaller side has fewer tokens and the first of the queries; padding of the image is masked."""
    oracle = ARIA.make()
    shown = [[picture(37, 91)], [picture(300, 133)]]
    for side, tokens, patches in ((490, 5, 7), (980, 11, 14)):
        ours = sized(oracle, side)
        inputs = ours.inputs(["a", "what is this?"], shown)
        assert inputs["pixel_values"].shape == (2, 3, side, side)
        assert (inputs["input_ids"] == ours.placeholders[0]).sum(1).tolist() == [tokens, tokens]
        before = ours.logits(inputs)
        seen = inputs["pixel_mask"].unfold(1, 70, 70).unfold(2, 70, 70).any(-1).any(-1)
        assert seen.shape == (2, patches, patches) and not bool(seen.all())
        padding = ~seen.repeat_interleave(70, 1).repeat_interleave(70, 2)
        inputs["pixel_values"] = inputs["pixel_values"].masked_fill(padding[:, None], 3.0)
        assert (ours.logits(inputs) - before).abs().max() < 1e-4


def test_the_original_names_of_aria(tmp_path: Path) -> None:
    """Those that transformers writes, but for the tower's prefix, its last norm, and the projector's norms."""
    ARIA.write_all(tmp_path)
    theirs = load_file(tmp_path / "transformers" / "model.safetensors")
    original = load_file(tmp_path / "original" / "model.safetensors")
    expected = {}
    for name, tensor in theirs.items():
        if "post_layernorm" in name:
            continue
        for new, old in (
            ("vision_tower.", "vision_tower.vision_model."),
            ("cross_attn.layer_norm_kv.", "cross_attn.ln_kv."),
            ("multi_modal_projector.layer_norm.", "multi_modal_projector.ln_ffn."),
            ("multi_modal_projector.feed_forward.", "multi_modal_projector.ffn."),
        ):
            name = name.replace(new, old)
        expected[name] = tensor
    assert original.keys() == expected.keys()
    assert all(torch.equal(original[name], tensor) for name, tensor in expected.items())
