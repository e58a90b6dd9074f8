"""The encoder of all tiles at once against transformers' class, whose inner states are taken a layer early here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from tests.families.survey import randomise
from unimm.models.parts import TiledEncoderConfig
from unimm.models.tiled import TiledTower, tile_ratios

GRIDS = [(1, 3), (2, 2), (1, 1), (4, 1), (2, 1)]
CONFIG = TiledEncoderConfig(
    image_size=28, patch=4, hidden=36, depth=4, global_depth=2, heads=3, mlp_width=56, layers=(1, 2, 3)
)
BLOCK = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    "attention_gate": "gate_attn", "mlp_gate": "gate_ffn",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
}  # fmt: skip
NAMES = {
    "patch_embed.weight": "patch_embedding.weight",
    "class_token": "class_embedding",
    "places.positions": "gated_positional_embedding.embedding",
    "places.table": "gated_positional_embedding.tile_embedding.weight",
    "places.gate": "gated_positional_embedding.gate",
    "before.table": "pre_tile_positional_embedding.embedding.weight",
    "before.gate": "pre_tile_positional_embedding.gate",
    "after.table": "post_tile_positional_embedding.embedding.weight",
    "after.gate": "post_tile_positional_embedding.gate",
    "norm_before": "layernorm_pre",
    "norm_after": "layernorm_post",
    "blocks": "transformer.layers",
    "global_blocks": "global_transformer.layers",
}


def their_name(name: str) -> str:
    first, _, rest = name.partition(".")
    if first in ("blocks", "global_blocks"):
        number, part, *end = rest.split(".")
        return ".".join([NAMES[first], number, BLOCK[part], *end])
    return NAMES.get(name) or f"{NAMES[first]}.{rest}"


@pytest.fixture(scope="module")
def theirs() -> MllamaVisionModel:
    """Random tables, as fine-tuning leaves them: absent tiles have vectors too, and arrangements share none."""
    config = MllamaVisionConfig(
        hidden_size=36, intermediate_size=56, num_hidden_layers=4, num_global_layers=2, attention_heads=3,
        image_size=28, patch_size=4, vision_output_dim=36 * 4, intermediate_layers_indices=[0, 1, 2],
    )  # fmt: skip
    model = MllamaVisionModel(config).eval()
    randomise(model)
    return model


@pytest.fixture
def ours(theirs: MllamaVisionModel) -> TiledTower:
    tower, given = TiledTower(CONFIG), theirs.state_dict()
    wanted = tower.state_dict()
    assert {their_name(name) for name in wanted} == given.keys()
    tower.load_state_dict({name: given[their_name(name)].view_as(own) for name, own in wanted.items()})
    return tower.eval()


@pytest.fixture(scope="module")
def tiles() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows * columns, 3, 28, 28, generator=generator) for rows, columns in GRIDS]


def expected(model: MllamaVisionModel, tiles: list[Tensor]) -> Tensor:
    pixels, mask = torch.zeros(1, len(tiles), 4, 3, 28, 28), torch.zeros(1, len(tiles), 4, dtype=torch.int64)
    for number, own in enumerate(tiles):
        pixels[0, number, : len(own)], mask[0, number, : len(own)] = own, 1
    ids = torch.tensor([[tile_ratios(4).index(grid) + 1 for grid in GRIDS]])
    features = model(pixels, ids, mask).last_hidden_state[0]
    return torch.cat([one[: len(own)] for one, own in zip(features, tiles, strict=True)])


@torch.no_grad()
def test_features_are_the_references(
    theirs: MllamaVisionModel, ours: TiledTower, tiles: list[Tensor]
) -> None:
    got = ours(torch.cat(tiles), tiles=torch.tensor(GRIDS))
    wanted = expected(theirs, tiles)
    assert got.shape == (14, CONFIG.tokens, CONFIG.width) == (14, 50, 144)
    assert (got - wanted).abs().max() < 1e-5 and wanted.std() > 1


@torch.no_grad()
def test_an_image_is_seen_alone_as_in_a_batch(ours: TiledTower, tiles: list[Tensor]) -> None:
    together = ours(torch.cat(tiles), tiles=torch.tensor(GRIDS)).split([len(own) for own in tiles])
    for own, grid, wanted in zip(tiles, GRIDS, together, strict=True):
        assert (ours(own, tiles=torch.tensor([grid])) - wanted).abs().max() < 1e-5
    assert torch.equal(ours(tiles[2]), ours(tiles[2], tiles=torch.tensor([[1, 1]])))


@torch.no_grad()
def test_the_arrangement_and_the_gates_matter(ours: TiledTower, tiles: list[Tensor]) -> None:
    wide, high = (ours(tiles[4], tiles=torch.tensor([grid])) for grid in ((1, 2), (2, 1)))
    assert (wide - high).abs().max() > 0.1
    for gate in (ours.before.gate, ours.places.gate, ours.after.gate):
        gate.zero_()
    wide, high = (ours(tiles[4], tiles=torch.tensor([grid])) for grid in ((1, 2), (2, 1)))
    assert torch.equal(wide, high)


def test_gradients_are_the_references_with_and_without_checkpoints(
    theirs: MllamaVisionModel, ours: TiledTower, tiles: list[Tensor]
) -> None:
    weights = torch.linspace(-1, 1, CONFIG.width)
    names = [name for name, _ in ours.named_parameters()]
    parameters: dict[str, Any] = dict(theirs.named_parameters())
    loss = (expected(theirs, tiles) * weights).sum()
    wanted = torch.autograd.grad(loss, [parameters[their_name(name)] for name in names])
    for again in (False, True):
        ours.checkpoint(again)
        got = torch.autograd.grad(
            (ours(torch.cat(tiles), tiles=torch.tensor(GRIDS)) * weights).sum(), list(ours.parameters())
        )
        for name, own, other in zip(names, got, wanted, strict=True):
            largest = other.abs().max()
            assert largest > 0 and (own - other.view_as(own)).abs().max() < 1e-4 * max(largest, 1), name


@pytest.mark.parametrize(
    ("grids", "line"),
    [
        ([(1, 2)], "3 tiles given, but their grids have 2"),
        ([(1, 5)], "1 x 5 tiles; the encoder takes 4"),
        ([(2, 3)], "2 x 3 tiles; the encoder takes 4"),
    ],
)
def test_tiles_that_do_not_fit_are_a_line(grids: list[tuple[int, int]], line: str) -> None:
    with pytest.raises(ValueError, match=f"^images: {line}$"):
        TiledTower(CONFIG)(torch.zeros(3, 3, 28, 28), tiles=torch.tensor(grids))
