"""A model that accelerate has placed, all on the CPU: its hooks change nothing, and wrong maps are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map

import unimm
from unimm.errors import UserError
from unimm.models.placing import over_gpus
from unimm.sampling.decoder import LlamaRunner
from unimm.sampling.runners import make_runner


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_placed_model_does_as_before(tiny: Path, device_map: Any) -> None:
    whole, placed = unimm.load(tiny, device="cpu"), unimm.load(tiny, device_map=device_map)
    assert type(make_runner(placed.model)) is not LlamaRunner
    codes = [um.draw_codes(["a red apple", "it"], seed=1) for um in (whole, placed)]
    assert torch.equal(*codes)
    image = torch.zeros(3, 32, 32)
    assert whole.caption(image, max_new_tokens=5) == placed.caption(image, max_new_tokens=5)


def test_every_weight_has_a_place_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unimm.load(device="cpu").model
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = over_gpus(model)
    check_device_map(model, places)
    assert [places[f"decoder.model.layers.{i}"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert {place for name, place in places.items() if ".layers." not in name} == {0}


@pytest.mark.parametrize("device_map", ["all", {}, {"vision": "cpu"}, {"": "disk"}])
def test_wrong_maps_are_one_line(tiny: Path, device_map: Any) -> None:
    with pytest.raises(UserError, match=r"^device_map: ") as caught:
        unimm.load(tiny, device_map=device_map)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^device: "):
        unimm.load(tiny, device="cpu", device_map="auto")
