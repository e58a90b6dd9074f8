"""Models loaded in part: what is left does as before, its rest is not read, and what needs the rest is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import unimm
from tests.families import emu3_checkpoints
from unimm.errors import UserError
from unimm.families.tensors import WeightFiles

RED = Image.new("RGB", (32, 32), "red")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_what_is_left_does_as_before(
    tiny: Path, quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = unimm.load(tiny, device="cpu", quantize=quantize)
    read: list[str] = []
    given = WeightFiles.__getitem__
    monkeypatch.setattr(WeightFiles, "__getitem__", lambda self, name: read.append(name) or given(self, name))
    sees = unimm.load(tiny, device="cpu", quantize=quantize, parts="understand")
    assert read and not [name for name in read if name.startswith(("code_", "image_tokenizer."))]
    read.clear()
    draws = unimm.load(tiny, device="cpu", quantize=quantize, parts="draw")
    assert read and not [name for name in read if name.startswith(("vision.", "connector."))]
    assert sees.caption(RED, max_new_tokens=5) == whole.caption(RED, max_new_tokens=5)
    codes = [um.draw_codes("a red apple", seed=1) for um in (draws, whole)]
    assert torch.equal(*codes)
    with pytest.raises(UserError, match=r"^prompts: the model was loaded without what draws"):
        sees.draw("a red apple")
    with pytest.raises(UserError, match=r"^images: the model was loaded without its encoder"):
        draws.caption(RED)


def test_it_is_not_saved(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^parts: a model loaded with 'draw' cannot be saved"):
        unimm.load(tiny, parts="draw").save(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_sides_that_are_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^parts: 'some'; use all, understand, draw$"):
        unimm.load(tiny, parts="some")
    emu3_checkpoints.emu3(tmp_path / "emu3")
    with pytest.raises(UserError, match=r"^parts: 'draw', but this model sees images as it draws them"):
        unimm.load(tmp_path / "emu3", parts="draw")
