"""Drawing several codes in one pass: whether the images stay what they were, in how many passes, in what time.

    python benchmarks/speculation.py                       # 50 prompts, every setting
    python benchmarks/speculation.py --prompts 200 --json  # what docs/results/speed.md has
    python benchmarks/speculation.py --source janus        # a small random Janus with 16,384 codes

For each setting of guidance, temperature and filters, every prompt is drawn one code after the other; then with windows
of 4, 16 and the automatic one, alone, in batches of 3 and 16, and joining a running batch at a random step. `equal` is
the share of codes that stay; `passes` the mean number of passes of a drawing, by window; `time` the ratio to
one-by-one drawing, measured in turn, alone and in batches of 16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from janus import make_checkpoint

import unimm
from unimm.data.emojiscenes.captions import held_out_prompts
from unimm.models.configuration import SamplingConfig
from unimm.pipeline import UniMM
from unimm.sampling.drawing import drawing_requests
from unimm.sampling.engine import Engine
from unimm.sampling.requests import DrawingRequest, Ticket
from unimm.sampling.sampler import NoiseKey

GUIDANCE = (1.0, 2.0, 5.0)
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "T 0.5": {"temperature": 0.5},
    "T 1": {"temperature": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
WINDOWS = (4, 16, 32, None)
TIMED = 12  # prompts that are timed


def requests_of(um: UniMM, prompts: Sequence[str], sampling: SamplingConfig) -> list[DrawingRequest]:
    """Return one drawing of each prompt."""
    keys = [NoiseKey(0, i) for i in range(len(prompts))]
    none: list[tuple[()]] = [()] * len(prompts)
    return list(drawing_requests(um.processor, prompts, none, keys, sampling, um.model.layout.grid))


def draw(um: UniMM, requests: Sequence[DrawingRequest], window: int | None, together: int) -> list[Ticket]:
    """Draw in batches of so many."""
    engine = Engine(um.model, um.processor, window=window)
    starts = range(0, len(requests), together)
    return [ticket for start in starts for ticket in engine.run(requests[start : start + together])]


def join(um: UniMM, requests: Sequence[DrawingRequest], window: int | None) -> list[Ticket]:
    """Draw all with one engine, each joining at a random step."""
    engine, rng = Engine(um.model, um.processor, window=window), random.Random(0)
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        for _ in range(rng.randrange(12)):
            engine.step()
    while engine.step():
        pass
    return tickets


def codes_of(tickets: Sequence[Ticket]) -> torch.Tensor:
    """Return the codes [B, h, w]."""
    return torch.stack([ticket.codes for ticket in tickets if ticket.codes is not None])


def measure(um: UniMM, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, Any]:
    """Draw all prompts of one setting in every way."""
    requests = requests_of(um, prompts, sampling)
    expected = codes_of(draw(um, requests, 1, 1))
    equal: list[float] = []
    passes: dict[str, float] = {}
    for window in (1, *WINDOWS):
        for together in (1, 3, 16):
            tickets = draw(um, requests, window, together)
            equal.append((codes_of(tickets) == expected).double().mean().item())
            if together == 1:
                passes[str(window or "auto")] = statistics.fmean(ticket.passes for ticket in tickets)
        equal.append((codes_of(join(um, requests, window)) == expected).double().mean().item())
    return {"equal": min(equal), "passes": passes, "time": times(um, requests[:TIMED])}


def times(um: UniMM, requests: Sequence[DrawingRequest]) -> dict[str, float]:
    """Time the automatic window and one-by-one drawing in turn; ratios of medians."""
    engines = {window: Engine(um.model, um.processor, window=window) for window in (1, None)}
    batch = [request for request, _ in zip(itertools.cycle(requests), range(16), strict=False)]
    found = {}
    for name, groups in (("alone", [[request] for request in requests]), ("batch of 16", [batch] * 5)):
        seconds: dict[int | None, list[float]] = {window: [] for window in engines}
        for group in groups:
            for window, engine in engines.items():
                engine.prefixes.clear()
                start = time.perf_counter()
                engine.run(group)
                seconds[window].append(time.perf_counter() - start)
        found[name] = statistics.median(seconds[None][1:]) / statistics.median(seconds[1][1:])
    return found


def settings() -> Iterator[tuple[str, SamplingConfig]]:
    """Yield every setting with its name."""
    for scale, (name, filters) in itertools.product(GUIDANCE, FILTERS.items()):
        yield f"guidance {scale:g}, {name}", SamplingConfig(scale, **filters)


def main() -> None:
    """Print one line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts")
    parser.add_argument("--source", help="a model's folder, or janus (default: the embedded model)")
    parser.add_argument("--only", metavar="TEXT", default="", help="settings whose name has this")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as place:
        source = options.source
        if source == "janus":
            small = argparse.Namespace(width=256, intermediate=768, layers=4, vocabulary=2000, codes=16384)
            make_checkpoint(Path(place), small)
            source = place
        um = unimm.load(source, device="cpu", dtype="float32")
        prompts = held_out_prompts(options.prompts)
        rows = {}
        for name, sampling in settings():
            if options.only not in name:
                continue
            rows[name] = row = measure(um, prompts, sampling)
            passes = ", ".join(f"{window}: {count:.1f}" for window, count in row["passes"].items())
            ratios = ", ".join(f"{what} {ratio:.2f}" for what, ratio in row["time"].items())
            line = f"{name}: equal {row['equal']:.4%}; passes {passes}; time {ratios}"
            print(line, file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(
            json.dumps(
                {"prompts": len(prompts), "threads": torch.get_num_threads(), "settings": rows}, indent=2
            )
        )


if __name__ == "__main__":
    main()
