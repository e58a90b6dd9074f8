"""Time of `unimm eval` beside the engine's own: what journal, scoring and the result file cost.

    python benchmarks/answers.py                 # 1,000 questions about EmojiScenes in POPE's format

Both load the embedded model and read the images from their files; the answers are compared. Rounds take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

import unimm
from unimm.console import print_json, print_table
from unimm.data.emojiscenes.concepts import with_article
from unimm.data.emojiscenes.scenes import CONCEPTS, EmojiScenes
from unimm.evaluation.benchmark import Benchmark, RunOptions
from unimm.evaluation.protocol import find_protocol, load_protocol
from unimm.sampling.requests import TextRequest, TextSampling
from unimm.sampling.sampler import noise_keys

PROTOCOL = "pope"


def write_questions(folder: Path, count: int) -> Path:
    """Write scenes and a question about each in POPE's format; return the file of questions."""
    source = EmojiScenes("seen", 1, kinds=("single",))
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        scene = source[number]
        name = f"scene-{number}.png"
        Image.fromarray(scene.render()).save(folder / "images" / name)
        asked = scene.concept if number % 2 else CONCEPTS[number % len(CONCEPTS)]
        label = "yes" if asked == scene.concept else "no"
        text = f"is there {with_article(asked)}?"
        lines.append({"question_id": number, "image": name, "text": text, "label": label})
    path = folder / "coco_pope_random.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def benchmark(questions: Path, output: Path) -> Benchmark:
    """Return the run of `unimm eval`."""
    found = find_protocol(PROTOCOL)
    assert found is not None
    protocol = load_protocol(found, ["data.sha256={}"])
    options = RunOptions(
        data=[str(questions)], images=questions.parent / "images", output=output, device="cpu"
    )
    return Benchmark(protocol, options)


def by_engine(items: list[Any], how: Any) -> list[str]:
    """Load the model and answer the items by its engine alone."""
    um = unimm.load(device="cpu")
    sampling = TextSampling.of({"temperature": how.temperature, "top_p": how.top_p}, how.max_new_tokens)
    keys = noise_keys([how.seed + item.index for item in items], len(items))
    requests = (
        TextRequest(
            *um.processor.question(item.prompt, [image.read() for image in item.images]),
            key,
            sampling=sampling,
        )
        for item, key in zip(items, keys, strict=True)
    )
    return [str(ticket.text) for ticket in um.engine.run(requests, um.batch_size)]


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Return seconds of both, by medians, and the median of their ratios."""
    questions = write_questions(folder, count)
    first = benchmark(questions, folder / "items")
    items, how = list(first.items()), first.protocol.answer
    by_engine(items[:64], how)  # what is compiled or cached once
    whole, alone = [], []
    for number in range(rounds):
        start = time.perf_counter()
        answers = by_engine(items, how)
        alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        document = benchmark(questions, folder / f"out-{number}").run()
        whole.append(time.perf_counter() - start)
        assert document is not None
        said = {line["key"]: line["answer"] for line in document["items"]}
        if [said[item.key] for item in items] != answers:
            raise SystemExit("the answers differ")
    return {
        "questions": count,
        "eval, s": round(statistics.median(whole), 2),
        "engine, s": round(statistics.median(alone), 2),
        "eval by engine": round(statistics.median(a / b for a, b in zip(whole, alone, strict=True)), 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.questions, options.rounds)
    if options.json:
        print_json(found)
    else:
        print_table(("", ""), list(found.items()))


if __name__ == "__main__":
    main()
