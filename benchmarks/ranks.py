"""1,024 ranks with 8 workers each on 100,000 shards: is every sample read once, and how fast does a rank resume?

    python benchmarks/ranks.py
    python benchmarks/ranks.py --ranks 64 --shards 5000      # a quick look

No data: the tars are sparse files, and the index beside them says how many samples each has. All the rest is the
package's own: `TarShards` finds shard and sample, `RecordSamples` shuffles, `mix` interleaves, `read_step` divides.
Every rank's steps are read (by its workers in turn, each with a source of its own), and every sample is counted. Prints
samples read twice or lost in each epoch of each source, the largest deviation of a source's share in any 1,000 samples,
what a checkpoint holds of the place in the data, and how long a rank takes to resume from the middle.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unimm.data.samples import SampleBuilder
from unimm.data.sources import Reading
from unimm.data.sources.tar_scan import BLOCK
from unimm.data.sources.tars import MANY, TarCounts, TarShards
from unimm.loading import load_processor
from unimm.training.batches import mix, read_step
from unimm.training.recipe import Stage
from unimm.training.records import BadItems, RecordSamples

SHARES = {"talks": 5, "words": 1, "art": 4}
SHARD_SHARES = {"talks": 0.5, "words": 0.1, "art": 0.4}  # of the shards
SAMPLES = (1, 4)  # in a shard: min and max
EACH = 8  # samples of a rank in a step


class Places(RecordSamples):
    """The samples of a source, of which only the place is read: source, shard and sample within it."""

    def sample(self, index: int, request: int, drop_prompt: bool) -> dict[str, Any]:
        """Where a record lies."""
        assert isinstance(self.source, TarShards)
        return {"place": (list(SHARES).index(self.name), *self.source.locate(index))}


class Counting:
    """The part of a task that reading a step needs."""

    def length(self, sample: dict[str, Any]) -> int:
        """The same for all."""
        return 1

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Places [B, 3]."""
        return {"places": torch.tensor([sample["place"] for sample in samples])}

    def targets(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        """Samples."""
        return {"samples": len(batch["places"])}


def write_shards(folder: Path, shards: int) -> None:
    """Write sparse tars of each source and the index of what they would hold."""
    rng = np.random.default_rng(0)
    for name, share in SHARD_SHARES.items():
        place = folder / name
        place.mkdir()
        counts = TarCounts(place / "tars.index")
        for number in range(max(round(shards * share), MANY)):
            tar = place / f"{number:06d}.tar"
            samples = int(rng.integers(*SAMPLES, endpoint=True))
            with tar.open("wb") as file:
                file.truncate(samples * BLOCK)  # sparse, as long as that many headers
            state = tar.stat()
            counts.known[tar.name] = (samples, state.st_size, state.st_mtime_ns)
        counts.changed = True
        counts.save()


def open_mixture(folder: Path, tars: dict[str, list[Path]]) -> tuple[Any, dict[str, TarShards]]:
    """Open all sources, as one rank does."""
    sources = {name: TarShards(paths, Reading(), name) for name, paths in tars.items()}
    bad, processor = BadItems(folder / "bad-items.jsonl", 0, "ranks.py"), load_processor()
    builder = SampleBuilder(processor, processor.target_size(), lambda pixels: pixels)
    samples: dict[str, Any] = {
        name: Places(name, source, builder, None, bad, 7, 0.1) for name, source in sources.items()
    }
    return mix(samples, SHARES, 7, shuffle=False), sources


def read_all(mixed: list[Any], stage: Stage, ranks: int) -> NDArray[np.int64]:
    """Places [S, ranks, EACH, 3] of every sample of every step; step s is read by worker s % 8 of each rank."""
    task: Any = Counting()
    found = np.empty((stage.steps, ranks, EACH, 3), np.int64)
    for step in range(stage.steps):
        for rank in range(ranks):
            batches = read_step(task, mixed[step % len(mixed)], stage, step, rank, ranks).micro_batches
            found[step, rank] = torch.cat([batch["places"] for batch in batches]).numpy()
    return found


def count_epochs(places: NDArray[np.int64], sources: dict[str, TarShards]) -> None:
    """Print, for each source, how often its samples were read in each of its epochs."""
    for number, (name, source) in enumerate(sources.items()):
        mine = places[places[:, 0] == number]
        starts = np.concatenate([[0], source.ends[:-1]])
        order = starts[mine[:, 1]] + mine[:, 2]
        total = len(source)
        whole = len(order) // total
        epochs = [np.bincount(order[e * total : (e + 1) * total], minlength=total) for e in range(whole)]
        rest = np.bincount(order[whole * total :], minlength=total)
        twice = sum(int((epoch > 1).sum()) for epoch in [*epochs, rest])
        lost = sum(int((epoch == 0).sum()) for epoch in epochs)
        print(
            f"{name:<8}{len(source.paths):>8} shards {total:>9,} samples {len(order) / total:7.2f} epochs read: "
            f"{twice} twice in one, {lost} lost in a whole one"
        )


def largest_deviation(places: NDArray[np.int64], window: int = 1000) -> float:
    """Largest deviation of a source's share from the mixture's, in any `window` samples in a row."""
    total, largest = sum(SHARES.values()), 0.0
    for number, share in enumerate(SHARES.values()):
        before = np.concatenate([[0], np.cumsum(places[:, 0] == number)])
        found = (before[window:] - before[:-window]) / window
        largest = max(largest, float(np.abs(found - share / total).max()))
    return largest


def main() -> None:
    """Make shards, read, count, seek."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--shards", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, options.shards)
        tars = {name: sorted((folder / name).glob("*.tar")) for name in SHARES}
        start = time.perf_counter()
        first, sources = open_mixture(folder, tars)
        opened = time.perf_counter() - start
        samples = sum(map(len, sources.values()))
        batch = options.ranks * EACH
        stage = Stage(
            name="s", steps=-(-samples * 11 // 10 // batch), batch=batch, micro_batch=EACH, lr={"w": 1.0}
        )
        workers = [first, *(open_mixture(folder, tars)[0] for _ in range(options.workers - 1))]
        start = time.perf_counter()
        places = read_all(workers, stage, options.ranks)
        seconds = time.perf_counter() - start
        print(f"{options.ranks} ranks x {options.workers} workers, {stage.steps} steps of {batch} samples")
        # The order of the mixture is that of step, then rank.
        count_epochs(places.reshape(-1, 3), sources)
        print(
            f"shares deviate by at most {largest_deviation(places.reshape(-1, 3)):.2%} in any 1,000 samples"
        )
        print(f"{places.size // 3 / seconds:,.0f} samples found a second; opening took {opened:.2f} s")
        middle = stage.steps // 2
        state = json.dumps({"stage": 0, "stage_step": middle, "step": middle})
        start, used = time.perf_counter(), time.process_time()
        again, _ = open_mixture(folder, tars)
        alone = read_step(Counting(), again, stage, middle, 0, options.ranks)  # type: ignore[arg-type]
        one, used = time.perf_counter() - start, time.process_time() - used
        resumed = read_all_of_step(again, stage, middle, options.ranks)
        every = time.perf_counter() - start
        same = np.array_equal(resumed, places[middle]) and len(alone.micro_batches) == 1
        print(f"place in the data: {len(state)} bytes ({state})")
        print(
            f"from it, one rank has its next samples in {one:.2f} s ({used:.2f} core-seconds), "
            f"all {options.ranks} in {every:.2f} s; same: {same}"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def read_all_of_step(mixed: Any, stage: Stage, step: int, ranks: int) -> NDArray[np.int64]:
    """Places [ranks, EACH, 3] of one step."""
    task: Any = Counting()
    batches = [read_step(task, mixed, stage, step, rank, ranks).micro_batches[0] for rank in range(ranks)]
    return torch.stack([batch["places"] for batch in batches]).numpy()


if __name__ == "__main__":
    main()
