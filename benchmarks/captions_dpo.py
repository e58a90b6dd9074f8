"""DPO on text: short, plain captions are preferred to long ones; how long are captions then, and how often right?

    python benchmarks/captions_dpo.py                        # training/dpo-captions.yaml on the embedded model
    python benchmarks/captions_dpo.py stages[0].steps=50     # any key of the recipe

Every pair is a training scene with its shortest caption as the chosen one and a longer one as the rejected one. Prints,
on held-out scenes, the mean number of words before, after, and of the chosen captions; and the share of single objects
named correctly.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

import unimm
from unimm.data.emojiscenes.scenes import EmojiScenes, Scene
from unimm.evaluation.emojiscenes.naming import evaluate_naming
from unimm.evaluation.recipe import Naming
from unimm.pipeline import UniMM
from unimm.processing.processor import CAPTION_REQUESTS
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

SEED, HELD_OUT_SEED = 2000, 1  # scenes to train on, scenes to measure on


def words(text: str) -> int:
    """How many words a caption has."""
    return len(text.split())


def plainest(scene: Scene) -> str:
    """The shortest of a scene's captions."""
    return min(scene.captions(), key=words)


def write_pairs(folder: Path, count: int) -> Path:
    """Write scenes and pairs of their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes, rng = EmojiScenes("train", SEED), np.random.default_rng(SEED)
    lines = []
    for index in range(count):
        scene, name = scenes[index], f"{index:04d}.png"
        Image.fromarray(scene.render()).save(folder / name)
        chosen = plainest(scene)
        longer = [caption for caption in scene.captions() if words(caption) > words(chosen)]
        request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
        prompt = [{"role": "user", "content": [{"image": name}, {"text": request}]}]
        pair = {"prompt": prompt, "chosen": chosen, "rejected": longer[rng.integers(len(longer))]}
        lines.append(json.dumps(pair) + "\n")
    file = folder / "pairs.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def measure(name: str, um: UniMM, samples: int) -> float:
    """Print the mean length of captions and the share of objects named correctly; return the length."""
    scenes = EmojiScenes("seen", HELD_OUT_SEED, length=samples)
    said = um.caption([Image.fromarray(scene.render()) for scene in scenes])
    length = float(np.mean([words(text) for text in said]))
    naming = evaluate_naming(um, Naming(samples=samples, splits=["seen", "composed"]), HELD_OUT_SEED)
    rates = "   ".join(f"{split} {figures['both']['rate']:.1%}" for split, figures in naming.items())
    print(
        f"{name:<8} {length:.2f} words a caption   named correctly: {rates} ({samples} each)   e.g. {said[0]!r}"
    )
    return length


def main() -> None:
    """Write the pairs, measure, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/captions"))
    options = parser.parse_args()
    file = write_pairs(options.folder, options.pairs)
    path = find_recipe("training/dpo-captions")
    recipe = load_recipe(
        path, [f"data.file={file}", f"output={options.folder / 'training'}", *options.overrides]
    )
    measure("before", unimm.load(), options.samples)
    start = time.monotonic()
    export = train(recipe)
    seconds = time.monotonic() - start
    length = measure("after", unimm.load(str(export)), options.samples)
    wanted = np.mean(
        [words(plainest(scene)) for scene in EmojiScenes("seen", HELD_OUT_SEED, length=options.samples)]
    )
    print(
        f"preferred {wanted:.2f} words: captions are {length / wanted - 1:+.1%} of that; {seconds:.0f} s of training"
    )


if __name__ == "__main__":
    main()
