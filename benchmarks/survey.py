"""Captions by the survey's systems: our time beside transformers', on the same small random weights, in one run."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

import unimm
from unimm.sampling.engine import Engine
from unimm.sampling.requests import TextRequest, TextSampling

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the references stand with the tests

from tests.families.aria_checkpoints import ARIA
from tests.families.fuyu_checkpoints import FUYU
from tests.families.nvlm_checkpoints import NVLM
from tests.families.pixtral_checkpoints import PIXTRAL
from tests.families.qwen2_vl_checkpoints import QWEN2_VL
from tests.families.survey import Reference, picture

REFERENCES = {one.name: one for one in (PIXTRAL, QWEN2_VL, NVLM, ARIA, FUYU)}
SIZES = [(91, 60), (60, 133), (64, 64), (120, 50)]  # pixels of the images of a batch
TOKENS = 24  # of a caption


def compare(reference: Reference, batch: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of both, as medians of paired rounds, and whether the words are the same."""
    with tempfile.TemporaryDirectory() as folder:
        oracle = reference.write(Path(folder))
        um = unimm.load(folder, device="cpu")
    um.processor.end_tokens = []  # both write all tokens, whichever they are
    questions = ["what is in this image?"] * batch
    images = [[picture(*SIZES[i])] for i in range(batch)]
    options = GenerationConfig(max_new_tokens=TOKENS, do_sample=False)
    engine = Engine(um.model, um.processor)
    sampling = TextSampling(max_new_tokens=TOKENS)

    def theirs() -> Any:
        oracle.reset()
        inputs = oracle.inputs(questions, images)
        generate: Any = oracle.model.generate
        return generate(**inputs, generation_config=options)[:, inputs["input_ids"].shape[1] :].tolist()

    def ours() -> Any:
        engine.prefixes.clear()  # each round reads its images anew
        asked = [um.processor.question(*pair) for pair in zip(questions, images, strict=True)]
        tickets = engine.run(TextRequest(ids, seen, sampling=sampling) for ids, seen in asked)
        return [ticket.ids for ticket in tickets]

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    with torch.inference_mode():
        expected, got = theirs(), ours()
        for _ in range(rounds):
            for name, run in (("theirs", theirs), ("ours", ours)):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    ratios = [own / other for own, other in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "system": reference.name,
        "batch": batch,
        "ours": statistics.median(times["ours"]),
        "transformers": statistics.median(times["theirs"]),
        "ratio": statistics.median(ratios),
        "same": expected == got,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="paired measurements of each")
    parser.add_argument("--only", choices=REFERENCES, help="one system")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    logging.set_verbosity_error()
    rows = [
        compare(reference, batch, options.rounds)
        for name, reference in REFERENCES.items()
        if options.only in (None, name)
        for batch in (1, 4)
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        same = "the same words" if row["same"] else "other words"
        print(
            f"{row['system']:9} batch {row['batch']}: {1e3 * row['ours']:6.1f} ms, transformers "
            f"{1e3 * row['transformers']:6.1f} ms, ratio {row['ratio']:.2f}, {same}"
        )


if __name__ == "__main__":
    main()
