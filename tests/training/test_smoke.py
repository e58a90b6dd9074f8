"""`--smoke` reads the user's own sources: what is wrong with them it finds, and what is right it trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data import forms
from tests.training.test_records import recipe_file
from tests.training.tokenizer.test_validation import overrides
from unimm.data.encode import EncodingJob, encode_source
from unimm.data.sources import Reading
from unimm.errors import UserError
from unimm.recipes import find_recipe
from unimm.training.recipe import smoke_recipe
from unimm.training.trainer import train


def test_sources_are_trained_on_with_what_is_held_out_of_them(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "a red apple " * 300}) + "\n")
    sources: dict[str, Any] = {
        "drawings": {"path": str(forms.image_folder(tmp_path / "data", 8)), "pairs": "text_to_image"},
        "talks": {"path": str(forms.llava(tmp_path / "llava", 6))},
        "words": {"path": str(tmp_path / "words.jsonl")},
    }
    mixture = dict.fromkeys(sources, 1) | {"emojiscenes/understanding": 1}
    path = recipe_file(tmp_path, tiny, sources, stage={"mixture": mixture, "batch": 8})
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "a blue star"}) + "\n")
    own = f"data.validation={{sources: {{more: {{path: '{tmp_path}/more.jsonl'}}}}, every: 100}}"
    recipe = smoke_recipe(path, [own])
    assert recipe.stages[0].mixture == mixture
    train(recipe, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run-smoke/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert not (tmp_path / "run-smoke/bad-items.jsonl").exists()
    assert {"epoch/drawings", "epoch/talks", "epoch/words"} <= lines[1].keys()


@pytest.mark.parametrize("kind", ["missing", "broken", "bad items"])
def test_what_is_wrong_with_a_source_is_found(tiny: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "data"
    if kind == "broken":
        (forms.shards(place, 6) / "001.tar").write_bytes(b"no tar" * 100)
    elif kind == "bad items":
        forms.image_folder(place, 3)
        for image in place.glob("*.png"):
            image.write_bytes(b"no image")
    path = recipe_file(tmp_path, tiny, {"mine": {"path": str(place)}})
    line = {"missing": r"data\.sources\.mine: .*data: no such file", "broken": r"data\.sources\.mine: .*001\.tar",
            "bad items": r"max_bad_items: 1 items cannot be used"}[kind]  # fmt: skip
    with pytest.raises(UserError, match=line):
        train(smoke_recipe(path, ["data.max_bad_items=0"]), quiet=True)


def test_what_a_shipped_recipe_names_for_others_to_replace_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_recipe("finetune-folder")
    recipe = smoke_recipe(shipped)
    assert recipe.stages[0].mixture == {"emojiscenes": 1} and recipe.validation is None
    assert "data.sources.captions: my-images: not here" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"data\.sources\.captions: your-images: no such file"):
        train(smoke_recipe(shipped, ["data.sources.captions.path=your-images"]), quiet=True)
    (tmp_path / "mine.yaml").write_text(shipped.read_text())
    with pytest.raises(UserError, match=r"data\.sources\.captions: my-images: no such file"):
        train(smoke_recipe(tmp_path / "mine.yaml"), quiet=True)


def test_encoded_sources_are_opened_and_left_out(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    folder = forms.image_folder(tmp_path / "data", 4)
    encode_source(EncodingJob(str(folder), tmp_path / "tars", str(tiny), Reading("text_to_image")))
    sources = {"coded": {"path": str(tmp_path / "tars")}, "plain": {"path": str(folder)}}
    recipe = smoke_recipe(recipe_file(tmp_path, tiny, sources))
    assert recipe.stages[0].mixture == {"plain": 1}
    assert "data.sources.coded: 4 items, encoded by other parts" in capfd.readouterr().err


def test_codes_of_many_images_are_made_as_they_are_needed(tiny: Path, tmp_path: Path) -> None:
    """Not all ahead: a run of a few samples reads no more than these."""
    source = {"mine": {"path": str(forms.image_folder(tmp_path / "data", 42)), "pairs": "text_to_image"}}
    train(smoke_recipe(recipe_file(tmp_path, tiny, source)), quiet=True)
    assert not (tmp_path / "run-smoke/codes").exists()


def test_images_of_a_tokenizer_are_read(tmp_path: Path) -> None:
    data = forms.image_folder(tmp_path / "data", 6)
    recipe = find_recipe("emojiscenes-tiny")
    train(smoke_recipe(recipe, overrides(tmp_path / "run", str(data))), quiet=True)
    with pytest.raises(UserError, match=r"data\.sources\.mine\.path: .*none: no such"):
        train(smoke_recipe(recipe, overrides(tmp_path / "other", str(tmp_path / "none"))), quiet=True)
