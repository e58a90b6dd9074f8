"""LoRA on 200 of one's own pictures: do captions of held-out pictures take over their wording, and how soon?

    python benchmarks/lora_sft.py                            # training/lora-folder.yaml on the embedded model
    python benchmarks/lora_sft.py stages[0].steps=100        # any key of the recipe

The pictures are EmojiScenes of one object in a frame that the model never saw, with captions in a wording that none
of its templates has, written as a folder with `metadata.jsonl`. The held-out ones are other layouts (split `seen`).
Prints the share of captions in the new wording (whatever object and background they name), the share exactly right and
the share that names the right object and background in any words: before and after, by the adapter on the embedded
model and by the merged export; and the seconds of the training, of the clock and of all cores.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import unimm
from unimm.data.emojiscenes import BACKGROUNDS, CONCEPTS, EmojiScenes, Scene
from unimm.evaluation.naming import parse_caption
from unimm.pipeline import UniMM
from unimm.recipes import find_recipe
from unimm.training.lora import ADAPTER
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

SIDE, BORDER = 64, 8  # pixels of a picture, of its frame on each side
WOOD, GILT = (92, 58, 30), (222, 184, 92)  # the frame, and its inner edge
WORDING = "framed print: {object}, backdrop {background}"
_WORDING = re.compile(rf"framed print: ({'|'.join(CONCEPTS)}), backdrop ({'|'.join(BACKGROUNDS)})")


def framed(scene: Scene) -> Image.Image:
    """Draw a scene, smaller, within a wooden frame with a gilt edge."""
    inner = SIDE - 2 * BORDER
    canvas = np.empty((SIDE, SIDE, 3), np.uint8)
    canvas[:] = WOOD
    canvas[BORDER - 2 : 2 - BORDER, BORDER - 2 : 2 - BORDER] = GILT
    picture = Image.fromarray(scene.render()).resize((inner, inner), Image.Resampling.LANCZOS)
    canvas[BORDER:-BORDER, BORDER:-BORDER] = np.asarray(picture)
    return Image.fromarray(canvas)


def caption(scene: Scene) -> str:
    """Caption a scene in the wording of its own."""
    return WORDING.format(object=scene.concept, background=scene.background)


def write_folder(folder: Path, scenes: EmojiScenes) -> None:
    """Write framed scenes and their captions as anybody would keep them."""
    folder.mkdir()
    lines = []
    for number, scene in enumerate(scenes):
        name = f"{number:03d}.png"
        framed(scene).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(scene)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def score(name: str, um: UniMM, scenes: EmojiScenes) -> list[str]:
    """Caption framed scenes, print the shares, and return the captions."""
    said = um.caption([framed(scene) for scene in scenes])
    worded = np.mean([_WORDING.fullmatch(text) is not None for text in said])
    right = np.mean([text == caption(scene) for text, scene in zip(said, scenes, strict=True)])
    named = [
        parse_caption(text) == ([s.concept], [s.background]) for text, s in zip(said, scenes, strict=True)
    ]
    print(
        f"{name:<8} in the new wording {worded:6.1%}   exactly right {right:6.1%}   right object and background, "
        f"however worded {np.mean(named):6.1%}   e.g. {said[0]!r}",
        flush=True,
    )
    return said


def main() -> None:
    """Write the pictures, caption, train, caption."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=200)
    options = parser.parse_args()
    held_out = EmojiScenes("seen", 11, SIDE, options.held_out, ("single",))
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place) / "my-pictures", Path(place) / "run"
        write_folder(folder, EmojiScenes("train", 11, SIDE, options.pictures, ("single",)))
        score("before", unimm.load(device="cpu"), held_out)
        paths = [f"data.sources.captions.path={folder}", f"output={output}"]
        recipe = load_recipe(find_recipe("lora-folder"), [*paths, *options.overrides])
        start, used = time.perf_counter(), time.process_time()
        export = train(recipe, quiet=True)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        adapted = score("adapter", unimm.load(device="cpu", adapter=export / ADAPTER), held_out)
        merged = score("merged", unimm.load(export, device="cpu"), held_out)
        size = sum(file.stat().st_size for file in (export / ADAPTER).iterdir())
    same = np.mean([one == two for one, two in zip(adapted, merged, strict=True)])
    print(f"adapter and merged export say the same of {same:.1%}; the adapter takes {size / 1e6:.1f} MB")
    print(f"trained on {options.pictures} pictures in {seconds:.0f} s, {used:.0f} core-seconds")


if __name__ == "__main__":
    main()
