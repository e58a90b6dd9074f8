"""DPO with a precomputed reference and with a frozen copy: pairs a second on the same steps, in turn.

    python benchmarks/dpo.py                     # drawings, captions, drawings with adapters
    python benchmarks/dpo.py drawings --rounds 9
    python benchmarks/dpo.py drawings adapters --width 2048 --pairs 130 --rounds 3 --steps 1  # as wide as Janus-Pro-1B

Both train the embedded model, or one with random weights and a decoder of the width given, on the same pairs, in the
recipes' batches: 64 codes after their prompt, or an image with two captions; all weights of the decoder, or adapters
(LoRA) in it. One reads the reference's log-probabilities, precomputed before the first step (those seconds are printed
apart, since they are spent once for all epochs); the other runs a frozen copy in every step. Every step checks that the
two losses agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import unimm
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.images import to_tensor
from unimm.models.modeling import UniMMModel
from unimm.preferences.dpo import PreferenceRecipe
from unimm.recipes import find_recipe
from unimm.training.batches import read_ahead
from unimm.training.engine import TrainingEngine, freeze, start_distributed
from unimm.training.recipe import load_recipe

WORKLOADS = {
    "drawings": ("training/dpo-embedded", []),
    "captions": ("training/dpo-captions", []),
    "adapters": ("training/dpo-embedded", ["lora={r: 16, alpha: 32}", "stages[0].lr={lora: 2.0e-4}"]),
}
MODES = ("precomputed", "copy")
CPU = torch.device("cpu")


def write_model(folder: Path, width: int, layers: int) -> None:
    """Write a model with random weights: the embedded one's config, but for the size of its decoder."""
    um = unimm.load(device="cpu")
    config = copy.deepcopy(um.model.config)
    heads = max(width // 128, 1)
    config.decoder |= {
        "hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads,
    }  # fmt: skip
    torch.manual_seed(0)
    UniMMModel(config).save_pretrained(folder)
    um.processor.save_pretrained(folder)


def write_pairs(folder: Path, workload: str, count: int) -> Path:
    """Write pairs: of a caption, its scene's codes and those of another; or of an image, two of its captions."""
    scenes = EmojiScenes("train", 2000)
    lines: list[dict[str, Any]] = []
    if workload != "captions":
        images = np.stack([scenes[index].render() for index in range(count + 1)])
        tokenizer = unimm.load(device="cpu").image_tokenizer
        assert tokenizer is not None
        with torch.no_grad():
            codes = tokenizer.encode(to_tensor(images)).tolist()
        for index in range(count):
            sides = {"chosen": {"codes": codes[index]}, "rejected": {"codes": codes[index + 1]}}
            lines.append({"prompt": scenes[index].captions()[0], **sides})
    else:
        for index in range(count):
            name = f"{index:04d}.png"
            Image.fromarray(scenes[index].render()).save(folder / name)
            short, *_, long = sorted(scenes[index].captions(), key=len)
            content = [{"image": name}, {"text": "describe the picture"}]
            lines.append(
                {"prompt": [{"role": "user", "content": content}], "chosen": short, "rejected": long}
            )
    file = folder / f"{workload}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


class Side:
    """Training against one kind of reference."""

    def __init__(self, workload: str, mode: str, file: Path, model: Path | None, stack: ExitStack) -> None:
        path, overrides = WORKLOADS[workload]
        mine = [f"data.file={file}", f"output={file.parent / mode}", f"reference={{mode: {mode}}}"]
        mine += [] if model is None else [f"model={model}"]
        recipe = load_recipe(find_recipe(path), [*mine, *overrides, "device=cpu", "stages[0].steps=100000"])
        assert isinstance(recipe, PreferenceRecipe)
        stage, task = recipe.stages[0], recipe.build_task()
        torch.manual_seed(recipe.seed)  # adapters start at random
        module = task.build()
        groups = task.groups(module)
        freeze(recipe, 0, groups, module)
        start = time.perf_counter()
        source = task.dataset(stage, recipe.seed)
        self.prepared = time.perf_counter() - start
        self.batch = stage.batch
        self.engine = TrainingEngine(recipe, 0, task, module, groups, CPU)
        self.steps = stack.enter_context(read_ahead(task, source, stage, 0))
        self.seconds: list[float] = []

    def round(self, steps: int) -> list[float]:
        """Take a few steps; gives their losses."""
        start, losses = time.perf_counter(), []
        for _ in range(steps):
            batch = next(self.steps)
            losses.append(float(self.engine.step(batch.micro_batches, batch.totals, 0, 1.0).loss))
        self.seconds.append(time.perf_counter() - start)
        return losses


def compare(workload: str, pairs: int, rounds: int, steps: int, model: Path | None) -> None:
    """Let both kinds of reference take turns on the same pairs, and print the results."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = write_pairs(folder, workload, pairs)
        start_distributed(CPU)
        sides = [Side(workload, mode, file, model, stack) for mode in MODES]
        for number in range(rounds + 1):
            first, second = (side.round(steps if number else 1) for side in sides)
            assert np.allclose(first, second, atol=1e-4), f"not the same losses: {first}, {second}"
    for mode, side in zip(MODES, sides, strict=True):
        speed = side.batch * steps / statistics.median(side.seconds[1:])
        once = f", {side.prepared:.1f} s once for {pairs} pairs" if mode == "precomputed" else ""
        print(f"  {mode:<12}{speed:7.1f} pairs/s{once}")
    ratios = [copy / ours for ours, copy in zip(*(side.seconds[1:] for side in sides), strict=True)]
    print(f"{workload}: precomputed trains {statistics.median(ratios):.2f} times as many pairs a second "
          f"({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)")  # fmt: skip


def main() -> None:
    """Compare each workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, help="of the decoder, in a model with random weights")
    parser.add_argument("--layers", type=int, default=2, help="of that decoder, with --width")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        model = None if options.width is None else Path(place)
        if model is not None:
            write_model(model, options.width, options.layers)
        for workload in options.workloads or WORKLOADS:
            compare(workload, options.pairs, options.rounds, options.steps, model)


if __name__ == "__main__":
    main()
