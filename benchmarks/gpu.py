"""Every figure of sampling that the docs leave open until a GPU has run it, in one go of a few minutes.

    python benchmarks/gpu.py                 # a Janus-Pro-1B of random weights in bfloat16, and the embedded model
    python benchmarks/gpu.py --json

Drawings and captions a second by batch, beside transformers on the same weights; passes and equality of windows in
float32; float32, bfloat16 and int8; memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from janus import make_checkpoint
from PIL import Image
from speculation import codes_of, draw, requests_of

import unimm
from unimm.data.emojiscenes.captions import held_out_prompts
from unimm.models.configuration import SamplingConfig
from unimm.pipeline import UniMM
from unimm.sampling.engine import Engine
from unimm.sampling.memory import EngineLimits
from unimm.sampling.requests import TextRequest, TextSampling

PRO_1B = {"width": 2048, "intermediate": 5632, "layers": 24, "vocabulary": 102400, "codes": 16384}
TOKENS = 64


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """Return the shortest time of a call, after one that is not measured."""
    best = float("inf")
    for round_number in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if round_number:
            best = min(best, time.perf_counter() - start)
    return best


def sampling(um: UniMM, batches: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Return drawings and generated tokens a second, and the largest memory."""
    found: dict[str, float] = {}
    torch.cuda.reset_peak_memory_stats()
    prompts = held_out_prompts(max(batches))
    asked = um.processor.question("what", [Image.new("RGB", (64, 64), "red")])
    words = TextSampling(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    for batch in batches:
        requests = requests_of(um, prompts[:batch], SamplingConfig())
        for window in (1, 8, None):
            elapsed = seconds(lambda: draw(um, requests, window, batch), rounds)  # noqa: B023
            found[f"drawings a second, batch {batch}, window {window or 'auto'}"] = batch / elapsed
        engine = Engine(um.model, um.processor, EngineLimits.of(um.model))
        questions = [TextRequest(*asked, sampling=words) for _ in range(batch)]
        elapsed = seconds(lambda: engine.run(questions), rounds)  # noqa: B023
        found[f"tokens a second, batch {batch}"] = batch * TOKENS / elapsed
    found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def beside_transformers(theirs: Any, um: UniMM, batch: int, rounds: int) -> float:
    """Return the time of a batch of drawings by that of transformers on the same weights."""
    rows = [um.processor.drawing_ids(prompt) for prompt in held_out_prompts(batch)]
    ids, mask = (tensor.to(um.device) for tensor in um.processor.pad_left(rows))
    length = ids.shape[1] + len(um.model.layout.drawing_steps())

    def by_theirs() -> None:
        theirs.generate(
            input_ids=ids, attention_mask=mask, generation_mode="image", guidance_scale=5.0, do_sample=False,
            max_length=length,
        )  # fmt: skip

    requests = requests_of(um, held_out_prompts(batch), SamplingConfig(5.0, 0.0))
    return seconds(lambda: draw(um, requests, 1, batch), rounds) / seconds(by_theirs, rounds)


def windows(um: UniMM, prompts: int = 64) -> dict[str, float]:
    """Return the share of codes that stay with each window, in float32."""
    requests = requests_of(um, held_out_prompts(prompts), SamplingConfig(5.0, 1.0))
    expected = codes_of(draw(um, requests, 1, 16))
    return {
        f"equal, window {window}, batch {batch}": (codes_of(draw(um, requests, window, batch)) == expected)
        .double()
        .mean()
        .item()
        for window in (4, 16)
        for batch in (1, 16)
    }


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    torch.set_grad_enabled(False)
    batches = tuple(options.batches)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    embedded = unimm.load(device="cuda", dtype="float32")
    report["embedded, float32"] = {**windows(embedded), **sampling(embedded, batches, options.rounds)}
    with tempfile.TemporaryDirectory() as place:
        theirs: Any = make_checkpoint(Path(place), argparse.Namespace(**PRO_1B))
        theirs = theirs.to("cuda", torch.bfloat16)
        for name, quantize in (("bfloat16", None), ("int8", "int8")):
            um = unimm.load(place, device="cuda", dtype="bfloat16", quantize=quantize)
            report[f"as Janus-Pro-1B, {name}"] = sampling(um, batches, options.rounds)
            if name == "bfloat16":
                ratio = beside_transformers(theirs, um, 1, options.rounds)
                report["as Janus-Pro-1B, bfloat16"]["drawing by transformers, batch 1"] = ratio
    print(json.dumps(report, indent=2) if options.json else "\n".join(f"{k}: {v}" for k, v in report.items()))


if __name__ == "__main__":
    main()
