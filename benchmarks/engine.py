"""Requests that join a running batch, prefixes that are read once, and the time of a generated token.

    python benchmarks/engine.py          # the embedded model, and a small random Janus beside transformers
    python benchmarks/engine.py --json

`joining`: 96 requests (captions, answers, drawings) arrive at random at 0.8 of what the engine can do; beside it,
batches of what has arrived, each run to its end. `prefix`: a second question about an image, by the
first's time. `words`: seconds of a generated token by transformers' on the same weights, prompt and encoder taken out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from janus import caption_inputs, make_checkpoint
from PIL import Image
from transformers.utils import logging

import unimm
from unimm.data.emojiscenes.captions import held_out_prompts
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.pipeline import UniMM
from unimm.sampling.drawing import drawing_requests
from unimm.sampling.engine import Engine
from unimm.sampling.memory import EngineLimits
from unimm.sampling.requests import Request, TextRequest, TextSampling, Ticket
from unimm.sampling.sampler import NoiseKey

REQUESTS, LOAD = 96, 0.8
TOKENS = 40
QUESTIONS = ("what is this?", "what is the background?", "how many are there?")


def mixed_requests(um: UniMM) -> list[Request]:
    """Return captions, answers and drawings in turn."""
    scenes = EmojiScenes("seen", 7, 64, REQUESTS, ("single",))
    images = [Image.fromarray(scenes[i].render()) for i in range(REQUESTS)]
    prompts, grid = held_out_prompts(REQUESTS), um.model.layout.grid
    keys = [NoiseKey(0, i) for i in range(REQUESTS)]
    none: list[tuple[()]] = [()] * REQUESTS
    drawings = list(
        drawing_requests(um.processor, prompts, none, keys, um.model.config.sampling_config(), grid)
    )
    sampling = TextSampling(max_new_tokens=TOKENS)
    made: list[Request] = []
    for i in range(REQUESTS):
        text = "describe the picture" if i % 3 == 0 else QUESTIONS[i % len(QUESTIONS)]
        asked = um.processor.question(text, [images[i]])
        made.append(drawings[i] if i % 3 == 2 else TextRequest(*asked, sampling=sampling))
    return made


def fresh_engine(um: UniMM) -> Engine:
    """Return an engine that holds nothing yet."""
    return Engine(um.model, um.processor, EngineLimits.of(um.model))


def serve_joining(engine: Engine, requests: Sequence[Request], arrivals: Sequence[float]) -> list[float]:
    """Submit each request when it arrives; return the seconds from arrival to end."""
    start, ended = time.perf_counter(), [0.0] * len(requests)
    tickets: dict[int, Ticket] = {}
    submitted = 0
    while submitted < len(requests) or tickets:
        now = time.perf_counter() - start
        while submitted < len(requests) and arrivals[submitted] <= now:
            tickets[submitted] = engine.submit(requests[submitted])
            submitted += 1
        if not tickets:
            time.sleep(max(arrivals[submitted] - now, 0))
            continue
        engine.step()
        now = time.perf_counter() - start
        for number in [number for number, ticket in tickets.items() if ticket.done]:
            del tickets[number]
            ended[number] = now
    return ended


def serve_batches(engine: Engine, requests: Sequence[Request], arrivals: Sequence[float]) -> list[float]:
    """Run what has arrived to its end, then what has arrived meanwhile."""
    start, ended = time.perf_counter(), [0.0] * len(requests)
    done = 0
    while done < len(requests):
        now = time.perf_counter() - start
        arrived = sum(arrival <= now for arrival in arrivals)
        if arrived == done:
            time.sleep(max(arrivals[done] - now, 0))
            continue
        engine.run(requests[done:arrived])
        ended[done:arrived] = [time.perf_counter() - start] * (arrived - done)
        done = arrived
    return ended


def joining(um: UniMM) -> dict[str, float]:
    """Compare both ways of serving the same arrivals."""
    requests = mixed_requests(um)
    fresh_engine(um).run(requests[:12])  # what is measured once in a process
    start = time.perf_counter()
    fresh_engine(um).run(requests)
    capacity = len(requests) / (time.perf_counter() - start)
    rng, now = random.Random(0), 0.0
    arrivals = []
    for _ in requests:
        now += rng.expovariate(LOAD * capacity)
        arrivals.append(now)
    found: dict[str, float] = {"capacity": capacity}
    for name, serve in (("joining", serve_joining), ("batches", serve_batches)):
        ended = serve(fresh_engine(um), requests, arrivals)
        found[f"{name} throughput"] = len(requests) / max(ended)
        found[f"{name} latency"] = statistics.fmean(e - a for e, a in zip(ended, arrivals, strict=True))
    found["throughput"] = found["joining throughput"] / found["batches throughput"]
    found["latency"] = found["joining latency"] / found["batches latency"]
    return found


def prefix(um: UniMM, rounds: int = 12) -> dict[str, Any]:
    """Time the first and the second question about an image, and compare the second's answer."""
    firsts, seconds, same = [], [], []
    scenes = EmojiScenes("seen", 7, 64, rounds, ("single",))
    engine, sampling = fresh_engine(um), TextSampling(max_new_tokens=1)
    for i in range(rounds):
        image = Image.fromarray(scenes[i].render())
        one, other = (
            TextRequest(*um.processor.question(text, [image]), sampling=sampling) for text in QUESTIONS[:2]
        )
        times = []
        for request in (one, other):
            start = time.perf_counter()
            ticket = engine.run([request])[0]
            times.append(time.perf_counter() - start)
        firsts.append(times[0])
        seconds.append(times[1])
        same.append(ticket.ids == fresh_engine(um).run([other])[0].ids)
    return {"second by first": statistics.median(seconds) / statistics.median(firsts), "same": all(same)}


def words(options: argparse.Namespace, batches: Sequence[int]) -> dict[str, float]:
    """Compare the time of a generated token with transformers'."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        theirs = make_checkpoint(Path(place), options)
        ours = unimm.load(place, device="cpu")
        for batch in batches:
            inputs = caption_inputs(ours, batch)
            asked = ours.processor.question("what", [Image.new("RGB", (64, 64), "red")])
            engine = Engine(ours.model, ours.processor, EngineLimits(prefix_tokens=0))

            def by_theirs(tokens: int, inputs: Any = inputs) -> None:
                theirs.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

            def by_ours(tokens: int, engine: Engine = engine, asked: Any = asked, batch: int = batch) -> None:
                ids, seen = asked
                sampling = TextSampling(max_new_tokens=tokens, min_new_tokens=tokens)
                engine.run([TextRequest(ids, seen, sampling=sampling) for _ in range(batch)])

            their_token, our_token = token_times([by_theirs, by_ours])
            found[f"batch {batch}"] = our_token / their_token
    return found


def token_times(calls: Sequence[Callable[[int], None]], rounds: int = 9) -> list[float]:
    """Return the seconds of a token by each call, measured in turn: of all tokens less those of the first."""
    seconds: dict[tuple[int, int], list[float]] = {}
    for round_number in range(rounds + 1):
        for number, call in enumerate(calls):
            for tokens in (1, TOKENS):
                start = time.perf_counter()
                call(tokens)
                if round_number:
                    seconds.setdefault((number, tokens), []).append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [(medians[i, TOKENS] - medians[i, 1]) / (TOKENS - 1) for i in range(len(calls))]


def main() -> None:
    """Print each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true", help="words at Janus-Pro-1B's width, four layers")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    um = unimm.load(device="cpu", dtype="float32")
    small = argparse.Namespace(width=256, intermediate=688, layers=6, vocabulary=1024, codes=1024)
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "joining": joining(um),
        "prefix": prefix(um),
        "words": words(small, (1, 8)),
    }
    if options.wide:
        wide = argparse.Namespace(width=2048, intermediate=5632, layers=4, vocabulary=102400, codes=16384)
        report["words, wide"] = words(wide, (1,))
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        figures = value.items() if isinstance(value, dict) else [("", value)]
        print(
            f"{name}:",
            ", ".join(f"{label} {f:.3g}" if isinstance(f, float) else f"{label} {f}" for label, f in figures),
        )


if __name__ == "__main__":
    main()
