"""Drawing and captioning with Janus, by unimm and by transformers: the same random weights, in turn, in one run.

    python benchmarks/janus.py                     # about 7M parameters, 64 x 64 pixels, batches 1 and 4
    python benchmarks/janus.py --width 2048 --layers 24 --intermediate 5632 --batches 1 --rounds 1   # Janus-Pro-1B's
    python benchmarks/janus.py --width 2048 --layers 24 --intermediate 5632 --batches 1 --rounds 1 --quantize int8

Prints the median seconds of each and the ratio unimm / transformers; it first checks that greedy codes are equal. With
`--quantize` it compares unimm with int8 or int4 weights to unimm with float32 ones, in time, bytes and logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from unimm.data.text_tokenizer import train_text_tokenizer
from unimm.evaluation.logits import code_effect, text_effect
from unimm.models.configuration import SamplingConfig
from unimm.models.quantization import METHODS
from unimm.pipeline import UniMM
from unimm.sampling.drawing import draw_codes, drawing_requests
from unimm.sampling.engine import Engine
from unimm.sampling.memory import EngineLimits
from unimm.sampling.requests import TextRequest, TextSampling
from unimm.sampling.sampler import NoiseKey

PROMPTS = ("a red apple", "two stars on a blue background", "what a long prompt this is for a panda", "it")
ANSWER = 32  # tokens of a caption


def make_checkpoint(
    folder: Path, options: argparse.Namespace, texts: Sequence[str] = PROMPTS, tokens: int = 300
) -> JanusForConditionalGeneration:
    """Write a Janus with random weights in transformers' layout, with a text tokenizer of `texts`."""
    torch.manual_seed(0)
    trained = train_text_tokenizer(list(texts), tokens)
    names = {"bos_token": trained.bos_token, "eos_token": trained.eos_token, "pad_token": trained.pad_token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|User|>", "<|Assistant|>"]})
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    vocabulary = tokenizer.get_vocab()
    heads = max(options.width // 128, 4)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=max(len(tokenizer), options.vocabulary), hidden_size=options.width,
            intermediate_size=options.intermediate, num_hidden_layers=options.layers, num_attention_heads=heads,
            num_key_value_heads=heads, max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
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
    model: JanusForConditionalGeneration = JanusForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": vocabulary["<begin_of_image>"]},
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processing = {
        "use_default_system_prompt": False,
        "image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    }
    (folder / "processor_config.json").write_text(json.dumps(processing))
    return model


def compare(name: str, calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Time two calls in turn, after a warm-up call each; the ratio is the second's seconds over the first's."""
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for round_number in range(rounds + 1):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number:
                seconds[label].append(time.perf_counter() - start)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    first, second = medians.values()
    return {"what": name, **medians, "ratio": second / first}


def prompts_of(batch: int) -> list[str]:
    """Return prompts of different lengths."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(batch)]


def caption_inputs(um: UniMM, batch: int) -> Any:
    """Return the same question about an image, `batch` times."""
    return um.processor(["what"] * batch, [[Image.new("RGB", (64, 64), "red")]] * batch)


def make_engine(um: UniMM, window: int | None) -> Engine:
    """Return an engine that holds no prompts, so that each call reads its own."""
    return Engine(um.model, um.processor, EngineLimits(prefix_tokens=0), window)


def draw(um: UniMM, engine: Engine, prompts: list[str]) -> torch.Tensor:
    """Draw greedily, pixels included; return the codes [B, h, w]."""
    none: list[tuple[()]] = [()] * len(prompts)
    rows = (prompts, none, [NoiseKey(0)] * len(prompts))
    requests = drawing_requests(um.processor, *rows, SamplingConfig(5.0, 0.0), um.model.layout.grid)
    codes = draw_codes(engine, list(requests))
    um.decode_codes(codes)
    return codes


def caption(um: UniMM, engine: Engine, batch: int) -> None:
    """Answer the same question several times."""
    sampling = TextSampling(max_new_tokens=ANSWER, min_new_tokens=ANSWER)
    asked = um.processor.question("what", [Image.new("RGB", (64, 64), "red")])
    engine.run([TextRequest(*asked, sampling=sampling) for _ in range(batch)])


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare drawings of each batch size, then captions."""
    results = []
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        theirs = make_checkpoint(Path(place), options)
        ours = unimm.load(place, device="cpu")
        engine = make_engine(ours, options.window)
        for batch in options.batches:
            prompts = prompts_of(batch)
            rows = [ours.processor.drawing_ids(prompt) for prompt in prompts]
            ids, mask = ours.processor.pad_left(rows)

            def draw_theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> torch.Tensor:
                length = ids.shape[1] + 64
                codes: torch.Tensor = theirs.generate(
                    input_ids=ids, attention_mask=mask, generation_mode="image",  # type: ignore[arg-type]
                    guidance_scale=5.0, do_sample=False, max_length=length,
                )  # fmt: skip
                theirs.decode_image_tokens(codes)
                return codes

            def draw_ours(prompts: list[str] = prompts) -> torch.Tensor:
                return draw(ours, engine, prompts)

            assert torch.equal(draw_ours().flatten(1), draw_theirs()), "the two draw different codes"
            calls: dict[str, Callable[[], Any]] = {"transformers": draw_theirs, "unimm": draw_ours}
            results.append(compare(f"draw, batch {batch}", calls, options.rounds))
        for batch in options.batches:
            inputs = caption_inputs(ours, batch)

            def caption_theirs(inputs: Any = inputs) -> None:
                theirs.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)

            def caption_ours(batch: int = batch) -> None:
                caption(ours, engine, batch)

            calls = {"transformers": caption_theirs, "unimm": caption_ours}
            results.append(compare(f"caption, batch {batch}", calls, options.rounds))
    return results


def run_quantised(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare float32 and small weights: drawings of each batch size, captions, and the effect on the logits."""
    results = []
    with tempfile.TemporaryDirectory() as place:
        make_checkpoint(Path(place), options)
        whole, small = (
            unimm.load(place, device="cpu", dtype="float32", quantize=q) for q in (None, options.quantize)
        )
    models = {"float32": whole, options.quantize: small}
    engines = {name: make_engine(um, options.window) for name, um in models.items()}
    for name, um in models.items():
        tensors = (*um.model.decoder.parameters(), *um.model.decoder.buffers())
        print(f"{name}: decoder of {sum(tensor.nbytes for tensor in tensors) / 1e6:.1f} MB")
    for batch in options.batches:
        prompts = prompts_of(batch)
        drawing = {name: partial(draw, um, engines[name], prompts) for name, um in models.items()}
        results.append(compare(f"draw, batch {batch}", drawing, options.rounds))
    for batch in options.batches:
        captioning = {name: partial(caption, um, engines[name], batch) for name, um in models.items()}
        results.append(compare(f"caption, batch {batch}", captioning, options.rounds))
    codes = code_effect(whole, small, prompts_of(4))
    text = text_effect(whole, small, [Image.new("RGB", (64, 64), "red")], ANSWER)
    for name, effect in (("code logits, guidance 5", codes), ("text logits", text)):
        print(
            f"{name}: largest difference {effect.largest:.3g}, relative {effect.relative:.2%}, "
            f"same greedy choice {effect.same:.1%} of {effect.choices}"
        )
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
    parser.add_argument("--window", type=int, help="codes a pass looks at (default: by the load)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--quantize", choices=METHODS, help="small weights beside float32 ones, both by unimm"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = run_quantised(options) if options.quantize else run(options)
    print("".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print("".join(f"{v:>16}" if isinstance(v, str) else f"{v:>16.3f}" for v in row.values()))


if __name__ == "__main__":
    main()
