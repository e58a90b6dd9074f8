"""Janus drawn and captioned by unimm and by transformers: the same random weights, one after the other, one run.

    python benchmarks/janus.py                     # about 7M parameters, 64 x 64 pixels, batches 1 and 4
    python benchmarks/janus.py --width 2048 --layers 24 --intermediate 5632 --batches 1 --rounds 1   # Janus-Pro-1B's

Prints the median seconds of each and the ratio unimm / transformers; greedy codes are checked to be equal first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import unimm
from unimm.data.text import train_text_tokenizer
from unimm.sampling.text import generate_text

PROMPTS = ("a red apple", "two stars on a blue background", "what a long prompt this is for a panda", "it")
ANSWER = 32  # tokens of a caption


def make_checkpoint(folder: Path, options: argparse.Namespace) -> JanusForConditionalGeneration:
    """Write a Janus of random weights in transformers' layout."""
    torch.manual_seed(0)
    trained = train_text_tokenizer(list(PROMPTS), 300)
    names = {"bos_token": trained.bos_token, "eos_token": trained.eos_token, "pad_token": trained.pad_token}
    words = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **names)
    words.add_special_tokens({"additional_special_tokens": ["<|User|>", "<|Assistant|>"]})
    bos = (words.bos_token, words.bos_token_id)
    words.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    vocabulary = words.get_vocab()
    heads = max(options.width // 128, 4)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=max(len(words), options.vocabulary), hidden_size=options.width,
            intermediate_size=options.intermediate, num_hidden_layers=options.layers, num_attention_heads=heads,
            num_key_value_heads=heads, max_position_embeddings=1024, bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        ),
        vision_config={
            "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "image_size": 64, "patch_size": 8,
            "projection_dim": options.width, "num_image_tokens": 64,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": options.codes, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 1, 2, 2], "num_res_blocks": 1, "projection_dim": options.width,
            "image_token_embed_dim": options.width,
        },
        image_token_id=vocabulary["<image_placeholder>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        generation_kwargs={"boi_token_id": vocabulary["<begin_of_image>"]},
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processing = {
        "use_default_system_prompt": False,
        "image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    }
    (folder / "processor_config.json").write_text(json.dumps(processing))
    (folder / "chat_template.jinja").write_text("<|User|> <|Assistant|>")
    return model


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Time both in turn, after one unmeasured call each."""
    seconds: dict[str, list[float]] = {"unimm": [], "transformers": []}
    for round_number in range(rounds + 1):
        for label, call in (("transformers", theirs), ("unimm", ours)):
            start = time.perf_counter()
            call()
            if round_number:
                seconds[label].append(time.perf_counter() - start)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    return {"what": name, **medians, "ratio": medians["unimm"] / medians["transformers"]}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare drawings of each batch size, then captions."""
    results = []
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        theirs = make_checkpoint(Path(place), options)
        ours = unimm.load(place, device="cpu")
        for batch in options.batches:
            prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
            rows = [ours.processor.drawing_ids(prompt) for prompt in prompts]
            ids, mask = ours.processor.pad_left(rows)

            def draw_theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> torch.Tensor:
                length = ids.shape[1] + 64
                codes = theirs.generate(
                    input_ids=ids, attention_mask=mask, generation_mode="image", guidance_scale=5.0,
                    do_sample=False, max_length=length,
                )  # fmt: skip
                theirs.decode_image_tokens(codes)
                return codes

            def draw_ours(prompts: list[str] = prompts) -> torch.Tensor:
                codes: torch.Tensor = ours.draw(prompts, temperature=0, return_codes=True)[1]
                return codes

            assert torch.equal(draw_ours().flatten(1), draw_theirs()), "the two draw different codes"
            results.append(compare(f"draw, batch {batch}", draw_ours, draw_theirs, options.rounds))
        for batch in options.batches:
            inputs = ours.processor(["what"] * batch, [[Image.new("RGB", (64, 64), "red")]] * batch)

            def caption_theirs(inputs: Any = inputs) -> None:
                theirs.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)

            def caption_ours(inputs: Any = inputs) -> None:
                generate_text(ours.model, ours.processor, inputs, ANSWER, min_new_tokens=ANSWER)

            results.append(compare(f"caption, batch {batch}", caption_ours, caption_theirs, options.rounds))
    return results


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'':<20}{'unimm s':>10}{'transformers s':>16}{'ratio':>8}")
    for row in run(options):
        print(f"{row['what']:<20}{row['unimm']:>10.3f}{row['transformers']:>16.3f}{row['ratio']:>8.2f}")


if __name__ == "__main__":
    main()
