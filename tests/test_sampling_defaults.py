"""A model draws by its own guidance, temperature, top-k and top-p, unless it is told otherwise."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import unimm
from tests.training.test_records import recipe_file
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.models.configuration import SamplingConfig, UniMMConfig
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

OWN = {"guidance_scale": 2.0, "temperature": 0.5, "top_k": 3, "top_p": 0.8}
BAD: list[tuple[str, Any]] = [
    *(("guidance_scale", value) for value in (math.nan, math.inf, "5", True, [5], {}, 10**400)),
    *(("temperature", value) for value in (-1.0, math.nan, -math.inf, "hot", False)),
    *(("top_k", value) for value in (-1, 2.5, "many", True, math.nan)),
    *(("top_p", value) for value in (0.0, 1.5, -0.1, math.nan, "all", True)),
]


def with_own(tiny: Path, folder: Path, sampling: Any) -> Path:
    """The tiny model with a section `sampling` in its configuration."""
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sampling": sampling}))
    return folder


def codes(um: unimm.UniMM, **options: Any) -> torch.Tensor:
    drawn: torch.Tensor = um.draw_codes(["a red apple", "what"], n=2, seed=5, **options)
    return drawn


@pytest.fixture(scope="module")
def own(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_own(tiny, tmp_path_factory.mktemp("own") / "model", OWN)


def test_drawing_follows_the_models_own(own: Path, tiny_model: unimm.UniMM) -> None:
    assert torch.equal(codes(unimm.load(own)), codes(tiny_model, **OWN))
    assert not torch.equal(codes(unimm.load(own)), codes(tiny_model))
    assert torch.equal(codes(tiny_model), codes(tiny_model, guidance_scale=5.0, temperature=1.0))


@pytest.mark.parametrize(
    "said",
    [{"temperature": 0}, {"guidance_scale": 1.0}, {"top_k": 9}, {"top_p": 0.3}, {"top_k": 0, "top_p": 1}],
)
def test_what_is_said_comes_first(own: Path, tiny_model: unimm.UniMM, said: dict[str, Any]) -> None:
    assert torch.equal(codes(unimm.load(own), **said), codes(tiny_model, **{**OWN, **said}))


def test_no_limit_can_be_said(own: Path, tiny_model: unimm.UniMM) -> None:
    plain = {"guidance_scale": 5.0, "temperature": 1.0}
    assert torch.equal(codes(unimm.load(own), **plain, top_k=0, top_p=1.0), codes(tiny_model))


def test_numbers_of_numpy_will_do(tiny_model: unimm.UniMM) -> None:
    said = {
        "guidance_scale": np.float32(2),
        "temperature": np.float64(0.5),
        "top_k": np.int64(3),
        "top_p": np.float32(0.5),
    }
    assert torch.equal(
        codes(tiny_model, **said), codes(tiny_model, **{name: x.item() for name, x in said.items()})
    )


def test_saved_and_loaded(own: Path, tmp_path: Path) -> None:
    unimm.load(own).save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["sampling"] == OWN
    assert unimm.load(tmp_path / "again").model.config.sampling_config() == SamplingConfig(**OWN)


def test_the_embedded_model_has_its_own() -> None:
    assert unimm.load(device="cpu").model.config.sampling_config() == SamplingConfig(2.0, 0.5)


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:16])
def test_what_cannot_be_is_named_on_every_way(
    tiny: Path, tiny_model: unimm.UniMM, tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(UserError, match=rf"^{name}: .*; give "):
        codes(tiny_model, **{name: value})
    with pytest.raises(UserError, match=rf"config\.json: (sampling\.{name}: |not readable as JSON)"):
        unimm.load(with_own(tiny, tmp_path / "bad", {name: value}))


@pytest.mark.parametrize("sampling", [5, "hot", [1], {"guidance": 2}])
def test_a_section_of_something_else_is_named(tiny: Path, tmp_path: Path, sampling: Any) -> None:
    with pytest.raises(
        UserError, match=r"config\.json: sampling(\.guidance)?: (expected a mapping|unknown key)"
    ):
        unimm.load(with_own(tiny, tmp_path / "bad", sampling))


@given(
    st.dictionaries(
        st.sampled_from([*OWN, "k"]), st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    )
)
def test_any_section_is_read_or_refused(section: dict[str, Any]) -> None:
    try:
        made = UniMMConfig(sampling=section).sampling_config()
    except UserError as error:
        assert str(error).startswith("sampling.")
    else:
        assert made.temperature >= 0 and math.isfinite(made.guidance_scale)
        assert made.top_k is None or made.top_k >= 1
        assert made.top_p is None or 0 < made.top_p <= 1


def test_the_command_follows_it_too(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for said in ([], ["--top-k", "0", "--temperature", "1"]):
        arguments = [
            "draw",
            "a red apple",
            "--model",
            str(own),
            "--seed",
            "5",
            "-o",
            str(tmp_path / f"{len(said)}"),
        ]
        assert main([*arguments, "--json", *said]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        options = {"top_k": 0, "temperature": 1.0} if said else {}
        wanted = unimm.load(own).draw("a red apple", seed=5, **options)[0]
        with Image.open(row["image"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(wanted))


@pytest.mark.parametrize("said", [[], ["--top-k", "0", "--top-p", "1", "--temperature", "1"]])
def test_candidates_write_down_how_they_were_drawn(own: Path, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    path = tmp_path / "c.jsonl"
    arguments = [
        "preferences",
        "draw",
        str(tmp_path / "prompts.txt"),
        "-o",
        str(path),
        "-n",
        "2",
        "--model",
        str(own),
    ]
    assert main([*arguments, *said]) == 0
    row = json.loads(path.read_text().splitlines()[0])
    wanted = {**OWN, **({"top_k": None, "top_p": 1.0, "temperature": 1.0} if said else {})}
    assert {name: row["settings"][name] for name in OWN} == wanted
    options = {**wanted, "top_k": wanted["top_k"] or 0}
    drawn = unimm.load(own).draw_codes("a red apple", n=2, seed=[0, 1], **options)
    assert [one["codes"] for one in row["candidates"]] == drawn.tolist()


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (None, OWN),
        ({"guidance_scale": 1.5}, {**OWN, "guidance_scale": 1.5}),
        ({"temperature": 0, "top_k": 0}, {**OWN, "temperature": 0, "top_k": None}),
    ],
)
def test_a_run_hands_it_on_or_writes_its_own(own: Path, tmp_path: Path, said: Any, wanted: Any) -> None:
    (tmp_path / "words.jsonl").write_text('{"text": "a red apple"}\n')
    sources = {"words": {"path": str(tmp_path / "words.jsonl")}}
    model = {"pretrained": str(own), **({"sampling": said} if said else {})}
    path = recipe_file(tmp_path, own, sources, model=model, stage={"steps": 1})
    export = train(load_recipe(path), quiet=True)
    assert dataclasses.asdict(unimm.load(export).model.config.sampling_config()) == wanted


@pytest.mark.parametrize(
    ("key", "value"), [("guidance_scale", 0), ("temperature", -1), ("top_k", -1), ("top_p", 2), ("topk", 3)]
)
def test_a_recipes_mistake_is_named(own: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = recipe_file(tmp_path, own, {}, model={"pretrained": str(own), "sampling": {key: value}})
    with pytest.raises(UserError, match=rf"recipe\.yaml: model\.sampling\.{key}: "):
        load_recipe(path)
