"""How a published checkpoint draws by itself comes along: the family's own, its files', and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import unimm
from tests.families.both_families import LAYOUTS, write_checkpoints
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.source import Checkpoint
from unimm.processing.processor import GENERATION_FILE

PUBLISHED: dict[str, dict[str, Any]] = {
    "janus": {"guidance_scale": 5.0, "temperature": 1.0, "top_k": None, "top_p": None},
    "emu3": {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 2048, "top_p": None},
}
OWN = {"guidance_scale": 2.0, "temperature": 0.5, "top_k": None, "top_p": 0.9}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random checkpoints of both families in both layouts."""
    return write_checkpoints(tmp_path_factory.mktemp("published"))


def sampling(folder: Path) -> dict[str, Any]:
    return dataclasses.asdict(Checkpoint(folder).config.sampling_config())


@pytest.fixture
def said(checkpoints: Path, request: pytest.FixtureRequest):
    """Put a generation config into a checkpoint, for a test."""
    path = checkpoints / request.node.callspec.params["layout"] / GENERATION_FILE
    before = path.read_text() if path.exists() else None

    def put(**keys: Any) -> Path:
        path.write_text(json.dumps(json.loads(before or "{}") | keys))
        return path

    yield put
    path.unlink(missing_ok=True)
    if before is not None:
        path.write_text(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_family_draws_as_it_was_published(checkpoints: Path, layout: str) -> None:
    assert sampling(checkpoints / layout) == PUBLISHED[layout.partition("/")[0]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"temperature": 0.7, "top_p": 0.95}, {"temperature": 0.7, "top_p": 0.95}),
        ({"top_k": 100, "guidance_scale": 2}, {"top_k": 100, "guidance_scale": 2}),
        ({"top_k": 0}, {"top_k": None}),
        ({"temperature": None, "top_k": None, "guidance_scale": None}, {}),
        ({"generation_kwargs": {"sampling": {"guidance_scale": 1.5}}}, {"guidance_scale": 1.5}),
        ({"generation_kwargs": {"boi_token_id": 3}}, {}),
        ({"generation_kwargs": "none"}, {}),
        ({"temperature": 0.7, "generation_kwargs": {"sampling": {"temperature": 0.1}}}, {"temperature": 0.1}),
    ],
)
def test_a_checkpoint_may_say_otherwise(checkpoints: Path, said, layout: str, keys: Any, wanted: Any) -> None:
    said(**keys)
    assert sampling(checkpoints / layout) == PUBLISHED[layout.partition("/")[0]] | wanted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": -1}, "temperature: expected at least 0, got -1"),
        ({"temperature": "hot"}, 'temperature: expected a number, got "hot"'),
        ({"guidance_scale": [5]}, "guidance_scale: expected a number"),
        ({"top_k": 2.5}, "top_k: expected an integer, got 2.5"),
        ({"top_p": 7}, "top_p: expected at most 1, got 7"),
        ({"generation_kwargs": {"sampling": {"top_k": True}}}, "top_k: expected an integer, got true"),
        ({"generation_kwargs": {"sampling": {"topk": 3}}}, 'topk: unknown key; did you mean "top_k"'),
    ],
)
def test_what_cannot_be_is_named(checkpoints: Path, said, layout: str, keys: Any, message: str) -> None:
    path = said(**keys)
    with pytest.raises(UserError, match=rf"^{path}: {message}"):
        _ = Checkpoint(checkpoints / layout).config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", ["transformers", "original"])
def test_a_models_own_survives_other_layouts(checkpoints: Path, tmp_path: Path, layout: str, to: str) -> None:
    um = unimm.load(checkpoints / layout, device="cpu")
    um.model.config.sampling = OWN
    um.save(tmp_path / "own")
    assert sampling(tmp_path / "own") == OWN
    convert(tmp_path / "own", tmp_path / "there", to)
    assert sampling(tmp_path / "there") == OWN
    convert(tmp_path / "there", tmp_path / "back", "unimm")
    assert sampling(tmp_path / "back") == OWN
    GenerationConfig.from_pretrained(tmp_path / "there").validate()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_as_published_is_not_written(checkpoints: Path, tmp_path: Path, layout: str) -> None:
    convert(checkpoints / layout, tmp_path / "own", "unimm")
    convert(tmp_path / "own", tmp_path / "there", "transformers")
    written = json.loads((tmp_path / "there" / GENERATION_FILE).read_text())
    assert "sampling" not in written.get("generation_kwargs", {})
    assert sampling(tmp_path / "there") == PUBLISHED[layout.partition("/")[0]]
