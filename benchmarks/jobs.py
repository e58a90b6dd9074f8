"""Kill a batch job with SIGKILL again and again, and compare its files with those of one that nobody disturbed.

    python benchmarks/jobs.py                                  # 2,000 drawings of the embedded model, killed five times
    python benchmarks/jobs.py --items 200 --kills 3 engine=ray ray.workers=2

Prints drawings a second, how often it was killed and after how many items, and whether every byte is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from unimm.data.sources import open_source

SHARD = 250


def main() -> None:
    """Run the job twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/jobs"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the job that is killed")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    prompts = options.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in scenes(options.items)))
    calm, killed = options.folder / "calm", options.folder / "killed"
    start = time.perf_counter()
    assert job(prompts, calm, []).wait() == 0
    seconds = time.perf_counter() - start
    print(f"undisturbed: {options.items} drawings in {seconds:.0f} s, {options.items / seconds:.1f} a second")
    moments = sorted(random.Random(options.seed).sample(range(1, options.items), options.kills))
    start = time.perf_counter()
    for moment in moments:
        running = job(prompts, killed, options.overrides)
        while items_done(killed) < moment:
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        print(f"killed after {items_done(killed)} items", flush=True)
    assert job(prompts, killed, options.overrides).wait() == 0
    print(f"killed {options.kills} times: {time.perf_counter() - start:.0f} s")
    compare(calm, killed, options.items)


def scenes(count: int) -> list[str]:
    """Prompts, different from one another as far as there are so many."""
    from unimm.data.emojiscenes.scenes import EmojiScenes

    source = EmojiScenes("seen", 3, 64, 4 * count, ("single", "pair"))
    found: dict[str, None] = {}
    for scene in source:
        found.setdefault(scene.captions()[0])
        if len(found) == count:
            break
    listed = list(found)
    return [listed[place % len(listed)] for place in range(count)]


def job(prompts: Path, folder: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """Start the job in a process group of its own."""
    command = [sys.executable, "-m", "unimm", "sample", "sampling/draw.yaml", f"source.path={prompts}"]
    command += [f"output.folder={folder}", f"output.shard={SHARD}", "device=cpu", *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def items_done(folder: Path) -> int:
    """Items that are written down, in shards or in lines of work."""
    done = SHARD * len(list(folder.glob("*.tar")))
    for path in (folder / ".work").glob("*.jsonl"):
        if not (folder / f"{path.stem}.tar").exists():
            try:
                done += path.read_bytes().count(b"\n")
            except FileNotFoundError:  # its shard has just been written
                done += SHARD
    return done


def compare(calm: Path, killed: Path, items: int) -> None:
    """Say whether two folders are the same, and that each item is there once."""
    ours, theirs = ({path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
                     if path.is_file()} for folder in (calm, killed))  # fmt: skip
    source = open_source(killed)
    keys = Counter(source[index].key for index in range(len(source)))
    print(f"items: {len(source)}, each once: {len(keys) == items == len(source)}")
    print(f"files: {len(ours)}, {sum(map(len, ours.values())) / 2**20:.1f} MiB, the same: {ours == theirs}")
    if ours != theirs or len(keys) != items:
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
