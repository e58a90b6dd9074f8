"""The same EmojiScenes scenes written in every form that data comes in; each function gives the path to open."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.data.emojiscenes.scenes import EmojiScenes, Scene

SCENES = EmojiScenes("train", seed=11, length=1000)


def encoded(scene: Scene, form: str = "PNG") -> bytes:
    """The image of a scene as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(scene.render()).save(buffer, form)
    return buffer.getvalue()


def caption(scene: Scene) -> str:
    return scene.captions()[0]


def image_list(folder: Path, count: int) -> Path:
    """An image folder with metadata.jsonl."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        (folder / "images" / f"{i}.png").write_bytes(encoded(SCENES[i]))
        lines.append(json.dumps({"file_name": f"images/{i}.png", "text": caption(SCENES[i])}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def image_folder(folder: Path, count: int) -> Path:
    """Images with a text file beside each."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(encoded(SCENES[i]))
        (folder / f"{i:03d}.txt").write_text(caption(SCENES[i]) + "\n")
    return folder


def llava(folder: Path, count: int, name: str = "llava.json") -> Path:
    """LLaVA conversations of two turns; every third shows two images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        shown = [i, i + 1] if i % 3 == 0 else [i]
        for number in shown:
            (folder / f"{number}.png").write_bytes(encoded(SCENES[number]))
        questions = SCENES[i].questions()
        turns = []
        for number, asked in enumerate(questions[:2]):
            marks = "<image>\n" * len(shown) if number == 0 else ""
            turns.append({"from": "human", "value": marks + asked.question})
            turns.append({"from": "gpt", "value": asked.answer})
        names = [f"{number}.png" for number in shown]
        rows.append(
            {"id": f"scene-{i}", "image": names if len(names) > 1 else names[0], "conversations": turns}
        )
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shards(folder: Path, count: int, each: int = 3) -> Path:
    """webdataset tars of images and captions."""
    for first in range(0, count, each):
        files: dict[str, bytes] = {}
        for i in range(first, min(first + each, count)):
            files[f"{i:05d}.png"] = encoded(SCENES[i])
            files[f"{i:05d}.txt"] = caption(SCENES[i]).encode()
        write_tar(folder / f"{first // each:03d}.tar", files)
    return folder


def rows(count: int) -> list[dict[str, Any]]:
    """Rows with images as Hugging Face stores them."""
    return [
        {
            "id": f"row-{i}",
            "image": {"bytes": encoded(SCENES[i]), "path": f"{i}.png"},
            "text": caption(SCENES[i]),
        }
        for i in range(count)
    ]


def parquet(folder: Path, count: int) -> Path:
    """Two Parquet files of small row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows(count))
    half = count // 2
    pq.write_table(table.slice(0, half), folder / "train-0.parquet", row_group_size=2)
    pq.write_table(table.slice(half), folder / "train-1.parquet", row_group_size=2)
    return folder


def saved(folder: Path, count: int) -> Path:
    """A `datasets` folder with an Image column."""
    import datasets

    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "text": datasets.Value("string")}
    )
    datasets.Dataset.from_list(rows(count), features=features).save_to_disk(str(folder))
    return folder


PAIRS: dict[str, Callable[[Path, int], Path]] = {
    "list": image_list,
    "folder": image_folder,
    "tars": shards,
    "parquet": parquet,
    "datasets": saved,
}
"""Every form of images with captions."""
