"""Models that only understand, or only draw: kept by our own layout, refused by layouts that have no place for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.models.configuration import UniMMConfig
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.processing.processor import UniMMProcessor

CASES = {
    "janus/understands": "generation",
    "janus/draws": "encoder",
    "janus/neither": "encoder, generation",
    "emu3/draws": "views",
}
"""Each model, and what Janus's and Emu3's layouts would need besides."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of our own layout with parts taken away."""
    folder = tmp_path_factory.mktemp("checkpoints")
    janus_checkpoints.janus(folder / "source" / "janus")
    emu3_checkpoints.emu3(folder / "source" / "emu3")
    for name in CASES:
        um = unimm.load(folder / "source" / name.split("/")[0], "cpu")
        without(um, name.split("/")[1]).save(folder / name)
    return folder


def without(um: UniMM, kind: str) -> UniMM:
    """A model without what the kind has no use for; the weights that are left are the same."""
    fields: dict[str, Any] = copy.deepcopy(um.model.config.to_dict())
    if kind in ("understands", "neither"):
        fields |= {"generation": None, "image_tokenizer": None}
    if kind in ("draws", "neither"):
        fields |= {"views": None, "encoder": None}
    config = UniMMConfig(**fields)
    model = UniMMModel(config)
    state = um.model.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return UniMM(nn.Module.eval(model), UniMMProcessor(config, um.processor.tokenizer))


@pytest.mark.parametrize("to", ["transformers", "original"])
@pytest.mark.parametrize(("name", "missing"), CASES.items())
def test_a_layout_without_a_place_is_a_line(
    folders: Path, tmp_path: Path, name: str, missing: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family = name.split("/")[0].capitalize()
    line = f"--to: {family}'s layouts need {missing}, which this model does not have"
    with pytest.raises(UserError) as caught:
        convert(folders / name, tmp_path / "out", to)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert main(["convert", str(folders / name), str(tmp_path / "out"), "--to", to]) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["transformers", "original"])
def test_so_it_is_where_the_sources_files_are_beside_it(folders: Path, tmp_path: Path, to: str) -> None:
    """A converted folder goes back by them; a model that has lost a part since does not."""
    convert(folders / "source/janus", tmp_path / "ours", "unimm")
    um = without(unimm.load(tmp_path / "ours", "cpu"), "understands")
    um.model.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="Janus's layouts need generation, which this model does not have"):
        convert(tmp_path / "ours", tmp_path / "out", to)


@pytest.mark.parametrize("name", CASES)
def test_our_own_layout_keeps_it(folders: Path, tmp_path: Path, name: str) -> None:
    convert(folders / name, tmp_path / "out", "unimm")
    one, two = (unimm.load(place, "cpu") for place in (folders / name, tmp_path / "out"))
    before, after = one.model.state_dict(), two.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    image = Image.new("RGB", (32, 32), "red")
    if name.endswith("understands"):
        asked = [um.ask(image, "what is this?", max_new_tokens=4) for um in (one, two)]
        assert asked[0] == asked[1]
    elif name.endswith("draws"):
        size = (16, 16) if name.startswith("emu3") else None
        drawn = [um.draw("a red apple", seed=0, size=size) for um in (one, two)]
        assert list(drawn[0][0].getdata()) == list(drawn[1][0].getdata())
        with pytest.raises(UserError):
            two.ask(image, "what is this?")
