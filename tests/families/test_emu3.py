"""Emu3 checkpoints, from both published layouts, against transformers: logits, codes, images, tokens."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Emu3ForConditionalGeneration, Emu3Processor
from transformers.convert_slow_tokenizer import TikTokenConverter

import unimm
from tests.families.emu3_checkpoints import emu3, original
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.emu3 import NEGATIVE, POSITIVE
from unimm.families.emu3_text_tokenizer import FIRST_TOKENS, read_text_tokenizer
from unimm.loading import describe
from unimm.pipeline import UniMM
from unimm.sampling.text import generate_text

ROWS, COLUMNS = 3, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emu3")
    original(folder / "original", emu3(folder / "transformers"))
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Emu3ForConditionalGeneration:
    return Emu3ForConditionalGeneration.from_pretrained(folder / "transformers").eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Emu3Processor:
    processor = Emu3Processor.from_pretrained(folder / "transformers")
    processor.downsample_ratio = 4  # fixed at 8 in its code, whatever the tokenizer
    return processor


@pytest.fixture(scope="module", params=["transformers", "original"])
def ours(folder: Path, request: pytest.FixtureRequest) -> UniMM:
    return unimm.load(folder / request.param, device="cpu")


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(31, 17), (90, 40), (20, 24), (33, 33), *rng.integers(8, 150, (46, 2)).tolist()]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:count]]


def _asked(
    processor: Emu3Processor, questions: list[str], shown: list[list[Image.Image]]
) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of questions with images."""
    conversations = [
        [
            {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
            {
                "role": "user",
                "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": question}],
            },
        ]
        for question, images in zip(questions, shown, strict=True)
    ]
    texts = [
        processor.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations
    ]
    flat = [image for images in shown for image in images]
    return processor(text=texts, images=flat, padding=True, padding_side="left", return_tensors="pt")


def _alone(theirs: Emu3ForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs with their images already as tokens, each encoded at its own size; theirs would encode the padding."""
    images = zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True)
    tokens = [
        theirs.model.get_image_tokens(pixels[None, :, :height, :width], torch.tensor([[height, width]]))
        for pixels, (height, width) in images
    ]
    places = inputs["input_ids"] == theirs.config.image_token_id
    ids = inputs["input_ids"].masked_scatter(places, torch.cat(tokens).long())
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"]}


@torch.no_grad()
def test_logits_and_answers_about_images(
    folder: Path, theirs: Emu3ForConditionalGeneration, processor: Emu3Processor
) -> None:
    ours = unimm.load(folder / "transformers", device="cpu")
    questions, shown = ["what is this?", "a red apple", "it"], [images(1), images(2), images(3)[2:]]
    inputs = _asked(processor, questions, shown)
    mine = ours.processor(questions, shown)
    for name in ("input_ids", "attention_mask", "image_sizes"):
        assert torch.equal(mine[name], inputs[name]), name
    seen = inputs["attention_mask"].bool()
    inputs = _alone(theirs, inputs)
    got, expected = ours.model(**mine).logits, theirs(**inputs).logits
    assert (got - expected)[seen].abs().max() < 1e-4 and expected[seen].std() > 0.1
    written = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[:, mine["input_ids"].shape[1] :]
    answers = generate_text(ours.model, ours.processor, mine, max_new_tokens=12)
    assert answers == [t.strip() for t in processor.tokenizer.batch_decode(written, skip_special_tokens=True)]


def test_the_layouts_hold_the_same_model(folder: Path) -> None:
    one, two = (unimm.load(folder / layout, device="cpu") for layout in ("transformers", "original"))
    states = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (
        one.model.config.decoder_config().rope_parameters == two.model.config.decoder_config().rope_parameters
    )

    def asked(um: UniMM, question: str) -> list[int]:
        # where codes will stand, each layout has a placeholder of its own
        ids = um.processor.question_ids(question, [(3, 4)])
        return [-1 if number == um.processor.layout.feature else number for number in ids]

    # the original puts a full stop after the question
    assert asked(one, "a red apple.") == asked(two, "a red apple")


def test_pixels_are_those_of_the_processor(ours: UniMM, processor: Emu3Processor) -> None:
    for image in images(50):
        expected = processor.image_processor(image, return_tensors="pt")
        seen = ours.processor.look([image])
        pixels, sizes = seen.pixels, seen.sizes
        assert torch.equal(sizes, expected["image_sizes"])
        deviation = torch.tensor([0.5, 0.5, 0.6]).view(3, 1, 1)
        assert ((pixels - expected["pixel_values"]) * deviation).abs().max() <= 1 / 255 + 1e-6


def _only_images(
    rows: int, columns: int, start: int, processor: Emu3Processor
) -> Callable[[int, torch.Tensor], list[int]]:
    """The tokens that transformers' generation may write next, as its documentation has it."""
    vocabulary = processor.tokenizer.get_vocab()
    codes = [number for token, number in vocabulary.items() if token.startswith("<|visual token")]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        written = len(ids) - start
        if written >= rows * (columns + 1):
            return [vocabulary["<|extra_204|>"]]
        return [vocabulary["<|extra_200|>"]] if written % (columns + 1) == columns else codes

    return allowed


def test_greedy_drawings_are_equal_code_for_code(
    ours: UniMM, theirs: Emu3ForConditionalGeneration, processor: Emu3Processor
) -> None:
    prompts = ["a red apple", "a blue background on it", "what"]
    options = {
        "return_for_image_generation": True,
        "ratio": f"{COLUMNS}:{ROWS}",
        "image_area": 16 * ROWS * COLUMNS,
    }
    options |= {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = processor(text=[prompt + POSITIVE for prompt in prompts], **options)
    negative = processor(text=[NEGATIVE] * 3, **options)
    mine = [ours.processor.drawing_ids(prompt, (ROWS, COLUMNS)) for prompt in prompts]
    assert torch.equal(inputs["input_ids"], ours.processor.pad_left(mine)[0])
    assert negative["input_ids"][0].tolist() == ours.processor.unconditional_ids(mine[0], (ROWS, COLUMNS))
    start = inputs["input_ids"].shape[1]
    written = theirs.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        guidance_scale=3.0,
        max_new_tokens=ROWS * (COLUMNS + 1) + 1,
        do_sample=False,
        prefix_allowed_tokens_fn=_only_images(ROWS, COLUMNS, start, processor),
    )[:, start:]
    rows = written[:, : ROWS * (COLUMNS + 1)].view(3, ROWS, COLUMNS + 1)
    expected = rows[..., :-1] - ours.model.layout.code
    size = (COLUMNS * 4, ROWS * 4)
    images, codes = ours.draw(prompts, guidance_scale=3.0, temperature=0, size=size, return_codes=True)
    assert torch.equal(codes, expected) and len(codes.unique()) > 3
    assert images[0].size == size
    alone = ours.draw(prompts[1], guidance_scale=3.0, temperature=0, size=size, return_codes=True)[1]
    assert torch.equal(alone[0], codes[1])


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_there_and_back_keeps_every_bit(folder: Path, tmp_path: Path, layout: str) -> None:
    convert(folder / layout, tmp_path / "ours", "unimm")
    again, straight = (unimm.load(path, device="cpu") for path in (tmp_path / "ours", folder / layout))
    assert all(map(torch.equal, again.model.state_dict().values(), straight.model.state_dict().values()))
    convert(tmp_path / "ours", tmp_path / "back", layout)
    places = [".", "Emu3-VisionTokenizer"] if layout == "original" else ["."]
    for place in places:
        before, after = (
            load_file(path / place / "model.safetensors") for path in (folder / layout, tmp_path / "back")
        )
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        small = list((folder / layout / place).glob("*.json"))
        assert small and all(
            (tmp_path / "back" / place / f.name).read_bytes() == f.read_bytes() for f in small
        )


def test_the_original_tokenizer_is_read_from_its_own_files(tmp_path: Path) -> None:
    merges = [b"re", b"ed", b" a", b"pp", b"le", b"pple", b" apple", b"red", b"\n\n", b"12", "é".encode()]
    ranks = {token: rank for rank, token in enumerate([bytes([number]) for number in range(256)] + merges)}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "emu3.tiktoken").write_text("".join(lines))
    (tmp_path / "emu3_vision_tokens.txt").write_text("<|image token|>\n<|visual token 000000|>\n")
    text_tokenizer = read_text_tokenizer(tmp_path)
    special = {token: len(ranks) + i for i, token in enumerate((*FIRST_TOKENS, "<|image token|>"))}
    default = TikTokenConverter().pattern.replace(r"\p{N}{1,3}", r"\p{N}")
    reference = tiktoken.Encoding("Emu3", pat_str=default, mergeable_ranks=ranks, special_tokens=special)
    for text in ("a red apple", "don't  4*12\n\nCafe\u0301 apple<|image token|>red", "🐼 漢字"):
        expected = reference.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert text_tokenizer.encode(text, add_special_tokens=False) == expected
    assert text_tokenizer.bos_token_id == special["<|extra_203|>"] and text_tokenizer.pad_token_id == len(
        ranks
    )


def test_a_missing_vision_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "original").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="put Emu3-VisionTokenizer in that folder or beside it"):
        unimm.load(tmp_path)


def test_what_it_is_without_its_weights(folder: Path) -> None:
    described = describe(folder / "transformers")
    assert (described["family"], described["layout"]) == ("emu3", "transformers")
    assert described["can"] == ["caption", "ask", "chat", "draw"]


def test_published_sizes_from_the_config_alone(tmp_path: Path) -> None:
    """Emu3-Chat's and its vision tokenizer's own sizes; the tokens are as many, the words are not."""
    config = {
        "model_type": "Emu3", "vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    codes = {
        "model_type": "Emu3VisionVQ", "ch": 256, "ch_mult": [1, 2, 2, 4], "z_channels": 4, "embed_dim": 4,
        "codebook_size": 32768, "num_res_blocks": 2, "double_z": False, "attn_resolutions": [3],
        "temporal_downsample_factor": 4,
    }  # fmt: skip
    (tmp_path / "Emu3-VisionTokenizer").mkdir()
    (tmp_path / "Emu3-VisionTokenizer" / "config.json").write_text(json.dumps(codes))
    (tmp_path / "config.json").write_text(json.dumps(config))
    letters = (base64.b64encode(bytes([number])).decode() for number in range(256))
    (tmp_path / "emu3.tiktoken").write_text("".join(f"{one} {rank}\n" for rank, one in enumerate(letters)))
    named = ["<|image token|>", "<|image start|>", "<|image end|>"]
    named += [f"<|visual token {code:06d}|>" for code in range(32768)]
    (tmp_path / "emu3_vision_tokens.txt").write_text("\n".join(named))
    described = describe(tmp_path)
    assert (described["family"], described["layout"]) == ("emu3", "original")
    assert round(described["parameters"]["decoder"] / 1e9, 3) == 8.492  # published as 8.49B
    assert (
        round(described["parameters"]["image_tokenizer"] * 4 / 1e9, 2) == 1.08
    )  # GB of its file, in float32
    assert described["draws"] == "720x720" and described["context"] == 131072
