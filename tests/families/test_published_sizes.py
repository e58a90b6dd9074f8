"""The published sizes, read from their configurations alone: how many parameters they have, and tokens an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.families.published_configs import (
    LLAMA_11B,
    MOLMO_7B_D,
    NVLM_D_72B,
    PIXTRAL_12B,
    PUBLISHED,
    QWEN2_VL_7B,
    PublishedSize,
)
from unimm.families.model import key_map
from unimm.families.source import Checkpoint
from unimm.loading import describe
from unimm.models.modeling import UniMMModel
from unimm.processing.views import make_views

PICTURES = ((480, 640), (1080, 1920), (2000, 700), (100, 100))


def write(published: PublishedSize, folder: Path) -> Path:
    """A folder without weights."""
    (folder / published.file).write_text(json.dumps(published.document))
    if published.preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(published.preprocessor))
    published.text_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_parameters(published: PublishedSize, tmp_path: Path) -> None:
    """What `describe` says, and what files of the layout hold, tensor by tensor."""
    checkpoint = Checkpoint(write(published, tmp_path))
    described = describe(tmp_path)
    parts = described["parameters"]
    assert described["parameters_total"] == sum(parts.values()) == published.total
    assert parts["vision"] + parts["connector"] == published.vision
    with torch.device("meta"):
        ours = UniMMModel(checkpoint.config).state_dict()
    map_ = key_map(checkpoint.family, checkpoint.layout, checkpoint.config)
    files = {
        name: part.numel()
        for entry in map_.returned(ours)
        if entry.ours not in map_.tied
        for name, part in zip(
            entry.theirs, entry.op.to_theirs(ours[entry.ours], len(entry.theirs)), strict=True
        )
    }
    assert sum(files.values()) == published.total + published.stored


@pytest.mark.parametrize(
    ("published", "counts"),
    [
        (PIXTRAL_12B, (1230, 2340, 1536, 56)),
        (QWEN2_VL_7B, (391, 2691, 1775, 16)),
        (NVLM_D_72B, (1792, 768, 1024, 256)),
        (MOLMO_7B_D, (740, 1196, 1252, 316)),
        (LLAMA_11B, (1, 1, 1, 1)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_tokens_of_images(published: PublishedSize, counts: tuple[int, ...], tmp_path: Path) -> None:
    """Features, and the tokens at the ends of rows, of four sizes."""
    config = Checkpoint(write(published, tmp_path)).config
    views, layout = make_views(config), config.image_layout()
    assert views is not None
    own = {layout.feature, *(layout.picture.tokens().values() if layout.picture else ())} - {None}
    for (height, width), count in zip(PICTURES, counts, strict=True):
        parts = layout.understanding(*views.grid_of(height, width))
        tokens = [token for part in parts if not isinstance(part, str) for token in part]
        assert sum(token in own for token in tokens) == count


def test_what_a_mark_of_llama_stands_for(tmp_path: Path) -> None:
    """The arrangement of tiles of four sizes, and the features that text behind the mark sees."""
    config = Checkpoint(write(LLAMA_11B, tmp_path)).config
    views, seeing = make_views(config), config.seeing()
    assert views is not None
    grids = [views.grid_of(*size) for size in PICTURES]
    assert grids == [(1, 2), (2, 2), (3, 1), (1, 1)]
    assert [sum(seeing.tokens_of(grid)) for grid in grids] == [3202, 6404, 4803, 1601]
