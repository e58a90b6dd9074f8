"""Molmo's recorded numbers, and what a comparison with them takes for granted: the same weights, images and tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.families import molmo_reference as molmo
from tests.families.survey import picture

DESCRIPTION = molmo.description()
# geometry of the images recorded: side of a view and margin, in patches
GEOMETRIES = {"processor": (molmo.CROP // molmo.PATCH, molmo.MARGIN), "published": (24, 4)}
RECORDED = molmo.recorded()
PLACED = [name for name in RECORDED if name.split(".")[0] in GEOMETRIES and name.endswith("image_input_idx")]


def digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module", params=molmo.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("molmo") / str(request.param)
    molmo.write(path, request.param)
    return path


def test_the_weights_are_those_recorded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    expected = DESCRIPTION["weights"][folder.name]
    assert len(weights) == expected["tensors"]
    joined = np.concatenate([weights[name].numpy().reshape(-1) for name in sorted(weights)])
    assert joined.size == expected["numbers"] and digest(joined) == expected["digest"]


def test_the_images_are_those_recorded() -> None:
    for image in [*DESCRIPTION["images"].values(), *DESCRIPTION["published"].values()]:
        assert digest(picture(*image["size"])) == image["digest"], image


def test_the_tokens_are_those_recorded(folder: Path) -> None:
    """A text without an image: its beginning is the end token, and a space stands before the first role."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f" User: {DESCRIPTION['question']} Assistant:"
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    assert ids == RECORDED[f"{folder.name}.none.input_ids"].tolist()
    chat = [{"role": "user", "content": DESCRIPTION["question"]}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert f" {written}" == text
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert tokenizer.convert_tokens_to_ids(list(molmo.IMAGE_TOKENS)) == list(
        range(vocabulary, vocabulary + 5)
    )


@pytest.mark.parametrize("name", PLACED)
def test_the_windows_of_each_token(name: str) -> None:
    """The feature that the code puts at a token is pooled from the patches that `windows` names for it."""
    kind, image, _ = name.split(".")
    side, margin = GEOMETRIES[kind]
    table = molmo.windows(DESCRIPTION[{"processor": "images"}.get(kind, kind)][image]["grid"], side, margin)
    places = RECORDED[name].numpy()
    view, pooled = np.nonzero(places >= 0)  # pooled features by view, each the window of four patches
    top, left = pooled // (side // 2) * 2, pooled % (side // 2) * 2
    corner = (view * side + top) * side + left
    made_of = np.stack([corner, corner + 1, corner + side, corner + side + 1], 1)
    assert np.array_equal(made_of[places[view, pooled].argsort()], table)


def test_the_tokens_around_an_image() -> None:
    """Both runs have a start, rows that each end with a column token, and an end."""
    start, end, patch, column = range(304, 308)
    side = molmo.CROP // molmo.PATCH // 2

    def run(rows: int, columns: int) -> list[int]:
        return [start, *([patch] * columns + [column]) * rows, end]

    for name, image in DESCRIPTION["images"].items():
        tokens = run(side, side) + run(*(3 * count + 2 for count in image["grid"]))
        assert RECORDED[f"processor.{name}.tokens"].tolist() == tokens, name
        places = RECORDED[f"processor.{name}.image_input_idx"]
        at = [index for index, token in enumerate(tokens) if token == patch]
        assert sorted(places[places >= 0].tolist()) == at


def test_the_recorded_numbers_are_whole() -> None:
    for name, tensor in RECORDED.items():
        assert bool(tensor.isfinite().all()) and tensor.numel() > 0, name
    for kind in molmo.KINDS:
        for case in DESCRIPTION["cases"]:
            last = RECORDED[f"{kind}.{case}.last"]
            assert int(last[-1].argmax()) == int(RECORDED[f"{kind}.{case}.greedy"][0])
            assert last.shape == (6, molmo.CONFIGS[kind]["embedding_size"]) and last.std() > 0.5
            columns = RECORDED[f"{kind}.{case}.columns"]
            assert bool((columns[-6:] == last[:, :: DESCRIPTION["columns"]]).all())
            assert (last.logsumexp(-1) - RECORDED[f"{kind}.{case}.logsumexp"][-6:]).abs().max() < 1e-5
