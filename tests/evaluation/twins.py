"""Small data sets of our own in the formats of the published ones: EmojiScenes asked as POPE, MMBench and others."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unimm.data.emojiscenes.scenes import CONCEPTS, EmojiScenes, Scene, with_article

COUNT = 12


def scenes(count: int = COUNT, *kinds: str) -> list[Scene]:
    """Held-out scenes."""
    source = EmojiScenes("seen", 1, kinds=kinds or ("single",))  # type: ignore[arg-type]
    return [source[index] for index in range(count)]


def png(scene: Scene) -> bytes:
    """The bytes of a scene as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(scene.render()).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, listed: list[Scene]) -> list[str]:
    """Write scenes as files; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"scene_{number:03}.png" for number in range(len(listed))]
    for name, scene in zip(names, listed, strict=True):
        (folder / name).write_bytes(png(scene))
    return names


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def presence(scene: Scene, number: int) -> tuple[str, str]:
    """A question whether an object is there, and its answer; yes and no take turns."""
    other = next(name for name in CONCEPTS[number:] + CONCEPTS if name != scene.concept)
    named, answer = (scene.concept, "yes") if number % 2 else (other, "no")
    return f"is there {with_article(named)}?", answer


def pope(folder: Path, count: int = COUNT) -> list[Path]:
    """POPE: JSON lines under the name .json, and a folder of images."""
    listed = scenes(count)
    names = write_images(folder / "images", listed)
    rows = []
    for number, (scene, name) in enumerate(zip(listed, names, strict=True), 1):
        text, label = presence(scene, number)
        rows.append({"question_id": number, "image": name, "text": text, "label": label})
    return [write_lines(folder / "coco_pope_random.json", rows)]


def mme(folder: Path) -> list[Path]:
    """MME: Parquet with two questions about every image."""
    rows = []
    for number, scene in enumerate(scenes()):
        for answer in ("Yes", "No"):
            named = (
                scene.concept
                if answer == "Yes"
                else CONCEPTS[(CONCEPTS.index(scene.concept) + 1) % len(CONCEPTS)]
            )
            rows.append({
                "question_id": f"{number}.png", "image": {"bytes": png(scene), "path": f"{number}.png"},
                "question": f"is there {with_article(named)}?", "answer": answer,
                "category": "existence" if number % 2 else "code_reasoning",
            })  # fmt: skip
    return [write_parquet(folder / "test-00000.parquet", rows)]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write Parquet."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def mmbench(folder: Path, rotations: bool = True) -> list[Path]:
    """MMBench: TSV with base64 images, a question's rotations naming the first by its index."""
    rows = []
    for number, scene in enumerate(scenes()):
        choices = [scene.concept, *(name for name in CONCEPTS if name != scene.concept)][: 2 + number % 3]
        for turn in range(len(choices) if rotations else 1):
            turned = choices[turn:] + choices[:turn]
            image = base64.b64encode(png(scene)).decode() if turn == 0 else str(number)
            rows.append({
                "index": number + 1_000_000 * turn, "question": "what is in the picture?", "hint": "",
                **dict(zip("ABCD", turned + [""] * 4, strict=False)), "answer": "ABCD"[turned.index(scene.concept)],
                "category": f"finegrained-{number % 2}", "l2-category": "perception", "image": image, "split": "dev",
            })  # fmt: skip
    path = folder / "MMBench_DEV_EN.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return [path]


def seedbench(folder: Path) -> list[Path]:
    """SEED-Bench: JSON with a list of questions, some of videos."""
    listed = scenes()
    names = write_images(folder / "images", listed)
    questions = [
        {
            "question_id": str(number), "question": "what color is the background?", "data_type": "image",
            "choice_a": scene.background, "choice_b": "silver", "choice_c": "gold", "choice_d": "white",
            "answer": "A", "data_id": name, "question_type_id": 1 + number % 2,
        }
        for number, (scene, name) in enumerate(zip(listed, names, strict=True))
    ]  # fmt: skip
    questions.append({**questions[0], "question_id": "v", "data_type": "video"})
    path = folder / "SEED-Bench.json"
    path.write_text(json.dumps({"questions": questions}))
    return [path]


def asked(kind: str) -> Iterator[tuple[int, Scene, str, str]]:
    """Questions of a kind about scenes, with their answers."""
    for number, scene in enumerate(scenes()):
        question = next(one for one in scene.questions() if one.kind == kind)
        yield number, scene, question.question, question.answer


def gqa(folder: Path) -> list[Path]:
    """GQA: a JSON object of questions by id."""
    write_images(folder / "images", scenes())
    found = {
        f"2{number:03}": {"imageId": f"scene_{number:03}", "question": question, "answer": answer}
        for number, _, question, answer in asked("background")
    }
    path = folder / "testdev_balanced_questions.json"
    path.write_text(json.dumps(found))
    for image in (folder / "images").glob("*.png"):
        Image.open(image).convert("RGB").save(image.with_suffix(".jpg"), quality=95)
    return [path]


def vqav2(folder: Path) -> list[Path]:
    """VQAv2: questions and annotations in two files, ten answers each."""
    questions, annotations = [], []
    (folder / "images").mkdir()
    for number, scene, question, answer in asked("count"):
        questions.append({"question_id": 10 + 1_000_000 * number, "image_id": number, "question": question})
        said = [answer] * (3 + number % 8) + ["many", "a few", "none"] * 3
        annotations.append({
            "question_id": 10 + 1_000_000 * number, "image_id": number, "answer_type": "number",
            "answers": [{"answer": one, "answer_id": place} for place, one in enumerate(said[:10], 1)],
        })  # fmt: skip
        image = folder / "images" / f"COCO_val2014_{number:012}.jpg"
        Image.fromarray(scene.render()).save(image, quality=95)
    paths = [folder / "v2_questions.json", folder / "v2_annotations.json"]
    paths[0].write_text(json.dumps({"questions": questions}))
    paths[1].write_text(json.dumps({"annotations": annotations}))
    return paths


def textvqa(folder: Path) -> list[Path]:
    """TextVQA: JSON with a list under data."""
    listed = scenes()
    names = write_images(folder / "images", listed)
    data = [
        {"question_id": number, "question": question, "answers": [answer] * 10, "image": names[number]}
        for number, _, question, answer in asked("what")
    ]
    path = folder / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"data": data}))
    return [path]


def docvqa(folder: Path) -> list[Path]:
    """DocVQA: Parquet with several right answers."""
    rows = [
        {
            "questionId": str(number), "question": question, "answers": [answer, answer.upper()],
            "image": {"bytes": png(scene), "path": None},
        }
        for number, scene, question, answer in asked("category")
    ]  # fmt: skip
    return [write_parquet(folder / "validation.parquet", rows)]


def chartqa(folder: Path) -> list[Path]:
    """ChartQA: JSON without ids, images by name."""
    names = write_images(folder / "images", scenes())
    rows = [
        {"imgname": names[number], "query": question, "label": answer}
        for number, _, question, answer in asked("count")
    ]
    path = folder / "test_human.json"
    path.write_text(json.dumps(rows))
    return [path]


def mmmu(folder: Path) -> list[Path]:
    """MMMU: Parquet with choices as a Python list in a text, several images, and open questions."""
    rows = []
    for number, scene in enumerate(scenes()):
        options = [scene.background, "silver", "gold"] if number % 3 else []
        image = {"bytes": png(scene), "path": None}
        rows.append({
            "id": f"validation_Art_{number}", "question": "<image 1> what color is the background?",
            "options": repr(options), "answer": "A" if options else scene.background, "image_1": image,
            "image_2": image if number == 1 else None, "subfield": "Painting", "question_type": "multiple-choice",
        })  # fmt: skip
    return [write_parquet(folder / "validation.parquet", rows)]


def mmvet(folder: Path) -> list[Path]:
    """MM-Vet: a JSON object of questions by id."""
    names = write_images(folder / "images", scenes())
    found = {
        f"v1_{number}": {
            "imagename": names[number], "question": question, "answer": answer,
            "capability": ["rec", "know"] if number % 2 else ["rec"],
        }
        for number, _, question, answer in asked("what")
    }  # fmt: skip
    path = folder / "mm-vet.json"
    path.write_text(json.dumps(found))
    return [path]


def captions(folder: Path) -> list[Path]:
    """COCO captions: Parquet with the captions of people."""
    rows = [
        {"question_id": str(number), "image": {"bytes": png(scene), "path": None}, "answer": scene.captions()}
        for number, scene in enumerate(scenes())
    ]
    return [write_parquet(folder / "val.parquet", rows)]


# --- drawing --------------------------------------------------------------------------------------------------


def scene_prompts(count: int) -> Iterator[tuple[list[Any], str, Scene]]:
    """What names a scene, its plainest caption, and the scene."""
    kinds = ("single", "count")
    for number in range(count):
        kind = kinds[number % 2]
        scene = EmojiScenes("seen", 1, kinds=(kind,))[number]  # type: ignore[arg-type]
        yield ["seen", 1, kind, number], scene.captions()[0], scene


def geneval(folder: Path) -> list[Path]:
    """GenEval: a line of metadata for each prompt."""
    tags = {"count": "counting", "single": "single_object"}
    rows = [
        {"tag": tags[named[2]], "include": [], "prompt": prompt, "scene": named}
        for named, prompt, _ in scene_prompts(6)
    ]
    return [write_lines(folder / "evaluation_metadata.jsonl", rows)]


def geneval2(folder: Path) -> list[Path]:
    """GenEval 2: prompts with a question for each atom."""
    rows = [
        {
            "prompt": prompt, "atom_count": 3, "skills": ["count", "object"],
            "vqa_list": [["How many objects are there?", "one"], [f"is there {with_article(scene.concept)}?", "Yes"]],
        }
        for _, prompt, scene in scene_prompts(5)
        if len(scene.objects) == 1
    ]  # fmt: skip
    return [write_lines(folder / "geneval2_data.jsonl", rows)]


def dpg(folder: Path) -> list[Path]:
    """DPG-Bench: CSV with a row for each question, the first no data."""
    names = (
        "item_id",
        "text",
        "keywords",
        "proposition_id",
        "dependency",
        "category_broad",
        "category_detailed",
    )
    names = (*names, "tuple", "question_natural_language")
    rows = [["first", "t", "", 1, "0", "", "", "entity - whole (x)", "is it?"]]
    for number, (_, prompt, scene) in enumerate(scene_prompts(3)):
        about = f"is there {with_article(scene.concept)}?"
        rows += [
            [f"item{number}", prompt, "", 1, "0", "", "", "entity - whole (x)", about],
            [
                f"item{number}",
                prompt,
                "",
                2,
                "1",
                "",
                "",
                "global - (y)",
                f"is the background {scene.background}?",
            ],
        ]
    path = folder / "dpg_bench.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return [path]


def wise(folder: Path) -> list[Path]:
    """WISE: a JSON list of prompts with explanations."""
    rows = [
        {
            "Prompt": prompt,
            "Explanation": "as it says",
            "Category": "x",
            "Subcategory": "y",
            "prompt_id": number,
        }
        for number, (_, prompt, _) in zip((1, 401, 568, 701, 801, 901), scene_prompts(6), strict=True)
    ]
    path = folder / "wise.json"
    path.write_text(json.dumps(rows))
    return [path]


def compbench(folder: Path) -> list[Path]:
    """T2I-CompBench: a prompt a line."""
    path = folder / "color_val.txt"
    path.write_text("".join(f'{prompt}, "plain"\n' for _, prompt, _ in scene_prompts(3)))
    return [path]


def mjhq(folder: Path) -> list[Path]:
    """MJHQ-30K: a JSON object of prompts by the name of their picture."""
    found = {
        f"pic{number}": {"category": "people", "prompt": prompt, "scene": named}
        for number, (named, prompt, _) in enumerate(scene_prompts(6))
    }
    path = folder / "meta_data.json"
    path.write_text(json.dumps(found))
    return [path]


DRAWN_TWINS: dict[str, Callable[[Path], list[Path]]] = {
    "geneval": geneval, "geneval2": geneval2, "dpg": dpg, "wise": wise, "t2i-compbench": compbench, "mjhq": mjhq,
    "clipscore": compbench,
}  # fmt: skip
TWINS: dict[str, Callable[[Path], list[Path]]] = {
    "pope": pope, "mme": mme, "mmbench": mmbench, "seedbench": seedbench, "gqa": gqa, "vqav2": vqav2,
    "textvqa": textvqa, "docvqa": docvqa, "chartqa": chartqa, "mmmu": mmmu, "mmvet": mmvet, "coco-captions": captions,
}  # fmt: skip
