"""Fine-tuning on images of things that the model does not know: does it name them, does it draw them?

    python benchmarks/finetune.py                                    # training/finetune-folder.yaml on 60 images
    python benchmarks/finetune.py --images 1000 --things 50
    python benchmarks/finetune.py --recipe lora-folder
    python benchmarks/finetune.py stages[0].steps=100 model.renew_tokens=false     # any key of the recipe

The images are single objects of the EmojiScenes artwork that no scene has, on its plain backgrounds, captioned in a
wording that no scene has, written as a folder with `metadata.jsonl`. The held-out ones are other layouts of the same
things. Prints how many captions name the thing, of images trained on and held out, and in how many drawings of the
held-out captions the background and the thing are right, with the model's own sampling options and at guidance 5;
before training and after. The thing is judged by a probe on frozen features, half of whose images went through the
image tokenizer. Needs the extra `eval`, and `lora` for lora-folder.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import unimm
from unimm.console import print_table
from unimm.data.emojiscenes.concepts import ARTWORK_FAMILIES, BACKGROUNDS, with_article
from unimm.data.emojiscenes.scenes import CANVAS, LATTICE, Placed, Scene
from unimm.evaluation.emojiscenes.drawing import reconstruct
from unimm.evaluation.emojiscenes.judge import Judge, fit_probe
from unimm.evaluation.emojiscenes.pixels import Box, background_name, cut_out, find_objects
from unimm.evaluation.recipe import JudgeSection
from unimm.images import Pixels
from unimm.pipeline import UniMM
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedRecipe
from unimm.training.trainer import train

SIDES = (32, 40, 48)  # pixels of an object
RENDERS = 40  # of each thing that the judge is fitted on
THINGS = (
    "elephant", "snail", "banana", "pizza", "castle", "tractor", "violin", "camera", "hammer", "volcano",
    "tiger", "camel", "rooster", "dolphin", "spider", "rose", "tomato", "bread", "sushi", "cookie",
    "candy", "church", "tent", "fountain", "ambulance", "taxi", "motorcycle", "helicopter", "thermometer", "tornado",
    "rainbow", "baseball", "basketball", "glasses", "dress", "handbag", "backpack", "lipstick", "ring", "megaphone",
    "radio", "saxophone", "trumpet", "laptop", "television", "candle", "scroll", "envelope", "scissors", "microscope",
)  # fmt: skip
COLUMNS = ("", "named", "held out", "background", "thing", "background, 5", "thing, 5")
PLAIN = {"guidance_scale": 5.0, "temperature": 1.0}
Row: TypeAlias = tuple[str, ...]
WORDING = "a sticker of {a_thing}, {background} behind it"


def make_scenes(things: Sequence[str], count: int, seed: int) -> list[Scene]:
    """Scenes of one thing each, every thing as often as every other."""
    rng = np.random.default_rng(seed)
    scenes = []
    for number in range(count):
        side = int(rng.choice(SIDES))
        x, y = (int(rng.integers(4, CANVAS - side - 3) // LATTICE * LATTICE) for _ in range(2))
        placed = Placed(things[number % len(things)], x, y, side)
        family, background = (str(rng.choice(list(names))) for names in (ARTWORK_FAMILIES, BACKGROUNDS))
        scenes.append(Scene("single", family, background, (placed,)))
    return scenes


def caption(scene: Scene) -> str:
    """Caption a scene in a wording that no scene has."""
    return WORDING.format(a_thing=with_article(scene.concept), background=scene.background)


def write_folder(folder: Path, scenes: Sequence[Scene]) -> None:
    """Write scenes and their captions as a folder of images with `metadata.jsonl`."""
    folder.mkdir(parents=True)
    lines = []
    for number, scene in enumerate(scenes):
        name = f"{number:04d}.png"
        Image.fromarray(scene.render()).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(scene)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


class ThingJudge(Judge):
    """Names the things by a probe fitted on renders of them, half of them reconstructed by the image tokenizer."""

    def __init__(self, things: Sequence[str], um: UniMM) -> None:
        self.things, self.um = list(things), um
        super().__init__(JudgeSection(renders=RENDERS * len(things)))

    def _fit(self) -> tuple[Tensor, Tensor]:
        scenes = make_scenes(self.things, self.section.renders, seed=2)
        np.random.default_rng(2).shuffle(scenes)
        labels = torch.tensor([self.things.index(scene.concept) for scene in scenes])
        images = [scene.render() for scene in scenes]
        images[1::2] = reconstruct(self.um, images[1::2])
        crops = [self._crop(image) for image in images]
        return fit_probe(self.features(crops), labels, len(self.things), self.section.decay)

    def _crop(self, image: Pixels) -> Pixels:
        boxes = find_objects(image)
        return cut_out(image, boxes[0] if boxes else Box(0, 0, CANVAS, CANVAS), self.section.side)

    def right(self, scenes: Sequence[Scene], images: Sequence[Pixels]) -> tuple[int, int]:
        """In how many images of scenes the background is right, and in how many the thing is."""
        grounds = sum(background_name(p) == s.background for p, s in zip(images, scenes, strict=True))
        found = [(scene, find_objects(image)) for scene, image in zip(scenes, images, strict=True)]
        seen = [(s, p, boxes[0]) for (s, boxes), p in zip(found, images, strict=True) if boxes]
        if not seen:
            return grounds, 0
        best = self.scores([p for _, p, _ in seen], [box for _, _, box in seen]).argmax(1).tolist()
        return grounds, sum(self.things[i] == s.concept for i, (s, _, _) in zip(best, seen, strict=True))


def named(um: UniMM, scenes: Sequence[Scene]) -> tuple[int, str]:
    """How many captions name the thing that is shown and no other, and the first caption."""
    known = re.compile(rf"\b({'|'.join(THINGS)})\b")
    said = um.caption([Image.fromarray(scene.render()) for scene in scenes])
    return sum(set(known.findall(text)) == {s.concept} for text, s in zip(said, scenes, strict=True)), said[0]


def drawn(um: UniMM, scenes: Sequence[Scene], **options: Any) -> list[Pixels]:
    """A drawing of each scene's caption."""
    drawings = um.draw([caption(scene) for scene in scenes], seed=3, **options)
    return [np.asarray(drawing.convert("RGB")) for drawing in drawings]


def measure(
    name: str, um: UniMM, trained: Sequence[Scene], held_out: Sequence[Scene], judge: ThingJudge
) -> Row:
    """A row of the table."""
    names = [named(um, scenes) for scenes in (trained, held_out)]
    print(f"{name}: {names[1][0]} of {len(held_out)}, such as {names[1][1]!r}", flush=True)
    right = [judge.right(held_out, drawn(um, held_out, **options)) for options in ({}, PLAIN)]
    shares = [(count, len(scenes)) for (count, _), scenes in zip(names, (trained, held_out), strict=True)]
    shares += [(count, len(held_out)) for pair in right for count in pair]
    return (name, *(f"{count}/{total}" for count, total in shares))


def ceiling(um: UniMM, held_out: Sequence[Scene], judge: ThingJudge) -> str:
    """What the judge says of the images themselves, and of their reconstructions by the image tokenizer."""
    images = [scene.render() for scene in held_out]
    found = [judge.right(held_out, shown) for shown in (images, reconstruct(um, images))]
    words = [f"{ground}/{len(held_out)} and {thing}/{len(held_out)}" for ground, thing in found]
    return f"background and thing in the images themselves {words[0]}, reconstructed {words[1]}"


def main() -> None:
    """Write the images, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--recipe", default="finetune-folder")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--things", type=int, default=10, help=f"at most {len(THINGS)}")
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--keep", metavar="FOLDER", help="where images and run stay; a run there is resumed")
    options = parser.parse_intermixed_args()
    things = THINGS[: options.things]
    trained, held_out = make_scenes(things, options.images, 0), make_scenes(things, options.held_out, 1)
    before = unimm.load(device="cpu")
    judge = ThingJudge(things, before)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(options.keep or temporary)
        images = place / "images"
        if not images.exists():
            write_folder(images, trained)
        recipe = load_recipe(find_recipe(options.recipe), options.overrides)
        assert isinstance(recipe, UnifiedRecipe), f"{options.recipe}: not a recipe of the task unified"
        paths = [f"data.sources.{name}.path={images}" for name in recipe.data.sources]
        paths.append("data.validation=null")  # all are trained on: what is held out here is drawn anew
        recipe = load_recipe(find_recipe(options.recipe), [*paths, f"output={place}/run", *options.overrides])
        start, used = time.perf_counter(), time.process_time()
        export = train(recipe, quiet=True)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        after = unimm.load(export, device="cpu")
    shown = trained[: options.held_out]
    rows = [measure(name, um, shown, held_out, judge) for name, um in (("before", before), ("after", after))]
    print_table(COLUMNS, rows, f"{options.recipe}, {options.images} images of {len(things)} things")
    print(ceiling(after, held_out, judge))
    print(f"trained in {seconds:.0f} s, {used:.0f} core-seconds")


if __name__ == "__main__":
    main()
