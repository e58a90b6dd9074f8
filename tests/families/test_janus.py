"""Janus checkpoints, from both published layouts, against transformers: logits, features, codes, images, tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

import unimm
from tests.families.janus_checkpoints import SIDE, janus, original
from unimm.families.convert import convert
from unimm.models.seeing import Seen
from unimm.pipeline import UniMM
from unimm.sampling.text import generate_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("janus")
    original(folder / "original", janus(folder / "transformers"))
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(folder / "transformers").eval()


@pytest.fixture(scope="module", params=["transformers", "original"])
def ours(folder: Path, request: pytest.FixtureRequest) -> UniMM:
    return unimm.load(folder / request.param, device="cpu")


def make_images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(31, 17), (90, 40), (20, 64), (33, 33), (200, 3), *rng.integers(3, 150, (45, 2)).tolist()]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:count]]


@torch.no_grad()
def test_text_logits_padded_and_with_images(ours: UniMM, theirs: JanusForConditionalGeneration) -> None:
    inputs = ours.processor(
        ["what is this? it is a red apple", "what", "a"], [make_images(2), make_images(1), []]
    )
    got = ours.model(**inputs).logits
    expected = theirs(**inputs).logits
    seen = inputs["attention_mask"].bool()
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 3
    assert (got - expected)[seen].abs().max() < 1e-4
    assert expected[seen].std() > 0.1


@torch.no_grad()
def test_encoder_features(ours: UniMM, theirs: JanusForConditionalGeneration) -> None:
    pixels = ours.processor.look(make_images(3)).pixels
    expected = theirs.model.vision_model(pixels).last_hidden_state
    assert (ours.model.vision(pixels) - expected).abs().max() < 1e-4
    projected = theirs.model.aligner(expected)
    seen = Seen([(4, 4)] * 3, [(4, 4)] * 3)
    assert (ours.model.connector(ours.model.vision(pixels), seen) - projected).abs().max() < 1e-4


@torch.no_grad()
def test_decoding_codes(ours: UniMM, theirs: JanusForConditionalGeneration) -> None:
    codes = torch.randint(70, (3, 4, 4))
    expected = theirs.model.vqmodel.decode(codes.flatten(1))
    assert (ours.image_tokenizer.decode(codes) - expected.clamp(-1, 1)).abs().max() < 1e-4


@torch.no_grad()
def test_encoding_follows_the_normalised_rule(ours: UniMM, theirs: JanusForConditionalGeneration) -> None:
    pixels = torch.rand(4, 3, SIDE, SIDE) * 2 - 1
    vq = theirs.model.vqmodel
    latents = vq.quant_conv(vq.encoder(pixels)).movedim(1, -1)  # [B, h, w, D]
    apart = F.normalize(latents, dim=-1).unsqueeze(-2) - F.normalize(vq.quantize.embedding.weight, dim=-1)
    expected = apart.square().sum(-1).argmin(-1)
    assert torch.equal(ours.image_tokenizer.encode(pixels), expected)
    plain = vq.encode(pixels).image_tokens.view(expected.shape)  # compares lengths too
    assert (plain == expected).float().mean() < 0.9


def test_greedy_drawings_are_equal_code_for_code(
    ours: UniMM, theirs: JanusForConditionalGeneration, folder: Path
) -> None:
    prompts = ["a red apple", "a blue background on it", "what"]
    processor = JanusProcessor.from_pretrained(folder / "transformers")
    texts = [f"<|User|>: {prompt}\n\n<|Assistant|>:" for prompt in prompts]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    assert torch.equal(
        inputs["input_ids"],
        ours.processor.pad_left([ours.processor.drawing_ids(prompt) for prompt in prompts])[0],
    )
    expected = theirs.generate(**inputs, generation_mode="image", guidance_scale=5.0, do_sample=False)
    _, codes = ours.draw(prompts, guidance_scale=5.0, temperature=0, return_codes=True)
    assert torch.equal(codes.flatten(1), expected)
    assert len(set(map(tuple, expected.tolist()))) == 3


def test_greedy_answers_and_tokens_are_equal(
    ours: UniMM, theirs: JanusForConditionalGeneration, folder: Path
) -> None:
    processor = JanusProcessor.from_pretrained(folder / "transformers")
    shown = [make_images(1), make_images(2), make_images(3)[2:]]
    questions = ["what is this?", "a red apple", "it"]
    messages = [
        [
            {
                "role": "user",
                "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": question}],
            }
        ]
        for question, images in zip(questions, shown, strict=True)
    ]
    texts = [
        processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        for message in messages
    ]
    inputs = processor(text=texts, images=shown, padding=True, return_tensors="pt")
    mine = ours.processor(questions, shown)
    assert torch.equal(mine["input_ids"], inputs["input_ids"])
    assert torch.equal(mine["attention_mask"], inputs["attention_mask"])
    inputs["pixel_values"] = mine["pixel_values"]  # the processor resizes through torchvision, not PIL
    expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[:, mine["input_ids"].shape[1] :]
    got = generate_text(ours.model, ours.processor, mine, max_new_tokens=12)
    assert got == [
        text.strip() for text in processor.tokenizer.batch_decode(expected, skip_special_tokens=True)
    ]


def test_pixels_of_odd_images_are_those_of_the_pil_processor(ours: UniMM, folder: Path) -> None:
    reference = JanusImageProcessorPil.from_pretrained(folder / "transformers")
    shown = make_images(50)
    expected = torch.cat([reference(image, return_tensors="pt")["pixel_values"] for image in shown])
    deviation = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    assert ((ours.processor.look(shown).pixels - expected) * deviation).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_there_and_back_keeps_every_bit(folder: Path, tmp_path: Path, layout: str) -> None:
    convert(folder / layout, tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", layout)
    before, after = (_all(path) for path in (folder / layout, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    small = [p for p in (folder / layout).iterdir() if p.suffix == ".json" and "index" not in p.name]
    assert len(small) >= 3
    assert all((tmp_path / "back" / p.name).read_bytes() == p.read_bytes() for p in small)
    again = unimm.load(tmp_path / "ours", device="cpu")
    straight = unimm.load(folder / layout, device="cpu")
    for one, two in zip(again.model.state_dict().values(), straight.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def _all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
