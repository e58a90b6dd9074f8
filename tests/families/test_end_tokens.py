"""The tokens that end an answer, as the generation config names them, go with a checkpoint through every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.families.convert import convert


def name_end_tokens(folder: Path, tokens: list[int]) -> None:
    """Name the tokens in a checkpoint's generation config, whatever else it holds."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "eos_token_id": tokens}))


@pytest.mark.parametrize("family", ["janus", "emu3"])
@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_end_tokens_go_with_a_checkpoint(tmp_path: Path, family: str, layout: str) -> None:
    module = janus_checkpoints if family == "janus" else emu3_checkpoints
    source = tmp_path / "transformers"
    model = getattr(module, family)(source)
    if layout == "original":
        source = tmp_path / "original"
        module.original(source, model)
    eos = unimm.load(source, device="cpu").processor.eos
    name_end_tokens(source, [eos, 5, 6])
    assert unimm.load(source, device="cpu").processor.end_tokens == [eos, 5, 6]
    other = "original" if layout == "transformers" else "transformers"
    for to in ("unimm", other):
        convert(source, tmp_path / to / "new", to)
        assert unimm.load(tmp_path / to / "new", device="cpu").processor.end_tokens == [eos, 5, 6]
    convert(tmp_path / "unimm" / "new", tmp_path / "back", layout)
    assert unimm.load(tmp_path / "back", device="cpu").processor.end_tokens == [eos, 5, 6]
    written = (
        tmp_path / (other if other == "transformers" else "back") / ("new" if other == "transformers" else "")
    )
    assert GenerationConfig.from_pretrained(written).eos_token_id == [eos, 5, 6]  # as others read it
