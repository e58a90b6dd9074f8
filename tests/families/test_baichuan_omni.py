"""Baichuan-Omni's image side: 1.0 by its parts, 1.5 against Qwen2-VL's tower and merger, small models of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from tests.families.composed import check_captions, check_packed, check_saved, compose
from tests.families.survey import picture
from unimm.data.text_tokenizer import train_text_tokenizer
from unimm.families import baichuan_omni
from unimm.models.configuration import UniMMConfig
from unimm.models.inputs import Images
from unimm.models.modeling import UniMMModel
from unimm.models.parts import PART_KINDS, read_part
from unimm.models.quantization import count_weights
from unimm.models.reducers import build_reducer
from unimm.models.seeing import Seen
from unimm.processing.views import make_views
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe
from unimm.training.understanding import tiny_understanding

SHOWN = [picture(37, 91), picture(200, 64), picture(61, 60)]
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def text_tokenizer() -> PreTrainedTokenizerFast:
    return train_text_tokenizer(["a red apple on a blue background", "what is this?"], 300)


def tokens_of(text_tokenizer: PreTrainedTokenizerFast) -> tuple[int, int, int, int]:
    """The vocabulary, and the tokens around an image and of a feature."""
    names = ("<begin_of_image>", "<end_of_image>", "<image_placeholder>")
    begin, end, feature = (text_tokenizer.get_vocab()[name] for name in names)
    return len(text_tokenizer), begin, end, feature


# --- 1.0 ----------------------------------------------------------------------------------------------------


def test_a_tile_has_182_tokens() -> None:
    """Means of two by two of 27 x 27 features: the last row is left out, the last column is not."""
    config = UniMMConfig(**baichuan_omni.parts(1000, 1, 2, 3))
    seeing = config.seeing()
    assert seeing.tile == baichuan_omni.CELLS and seeing.tile[0] * seeing.tile[1] == 182
    features = torch.randn(2, 27 * 27, 5)
    tokens = build_reducer(seeing, 5)(features, Seen([(27, 27)] * 2, [(1, 1)]))
    raster = features.view(2, 27, 27, 5)
    assert tokens.shape == (2, 182, 5)
    for token, (row, column) in ((0, (0, 0)), (13, (0, 26)), (14, (2, 0)), (181, (24, 26))):
        own = raster[:, row : row + 2, column : column + 2].flatten(1, 2)
        assert torch.allclose(tokens[:, token], own.mean(1), atol=1e-6)
    moved = features.clone()
    moved.view(2, 27, 27, 5)[:, 26] += 1
    assert torch.equal(build_reducer(seeing, 5)(moved, Seen([(27, 27)] * 2, [(1, 1)])), tokens)


def test_the_whole_is_first_and_every_view_has_its_tokens() -> None:
    config = UniMMConfig(**baichuan_omni.parts(1000, 1, 2, 3))
    views, layout = make_views(config), config.image_layout()
    assert views is not None
    for size, tiles in (((384, 384), 1), ((400, 700), 4), ((1152, 384), 3), ((4000, 3900), 9)):
        grid = views.grid_of(*size)
        assert grid[0] * grid[1] == tiles
        parts = [part for part in layout.understanding(*grid) if not isinstance(part, str)]
        tokens = [token for part in parts for token in part]
        assert tokens == [1, *[3] * 182 * (tiles + 1), 2]
    images = views.prepare([picture(90, 60)])
    assert images.pixels is not None and images.views is not None and images.views.tolist() == [2]


def test_parameters_of_1_0() -> None:
    with torch.device("meta"):
        parts = UniMMModel(UniMMConfig(**baichuan_omni.parts(125696, 1, 2, 3))).parts()
        siglip = SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
            patch_size=14, vision_use_head=False,
        )  # fmt: skip
        encoder = SiglipVisionModel(siglip)
    sizes = {name: count_weights(part) for name, part in parts.items()}
    assert sizes["vision"] == count_weights(encoder) == 412_987_248
    assert sizes["connector"] == 1152 * 4096 + 4096 + 4096**2 + 4096
    assert sizes["decoder"] == 7_505_973_248  # Baichuan 2 7B


def test_the_recipe_is_the_same_model(text_tokenizer: PreTrainedTokenizerFast) -> None:
    recipe: Any = load_recipe(find_recipe("baichuan-omni-7b"))
    fields = baichuan_omni.parts(125696, 1, 2, 3)
    described = recipe.model.understanding.parts(text_tokenizer)
    for name in ("views", "encoder", "reducer", "connector"):
        assert read_part(name, described[name]) == read_part(name, fields[name])
    decoder = fields["decoder"]
    assert {name: recipe.model.decoder[name] for name in decoder} == decoder


def test_a_small_1_0(text_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokens = tokens_of(text_tokenizer)
    fields = baichuan_omni.parts(*tokens)
    small = tiny_understanding({name: fields[name] for name in PART_KINDS if name in fields})
    # an odd number of features a side, as the published one has
    kwargs = {**small["encoder"]["kwargs"], "img_size": 40}
    small["views"] |= {"tile": 40}
    small["encoder"] |= {"tokens": 25, "kwargs": kwargs}
    seen = {name: small[name] for name in ("views", "encoder", "reducer", "connector")}
    layout = baichuan_omni.layout(*tokens, cells=(2, 3))
    um = compose(
        {**fields, **seen, "decoder": {**fields["decoder"], **DECODER}, "layout": layout}, text_tokenizer
    )
    check_packed(um, ["what is this?", "a", "what are these?"], [SHOWN[:1], [], SHOWN[1:]])
    check_captions(um, SHOWN)
    check_saved(um, tmp_path / "model", SHOWN)


# --- 1.5 ----------------------------------------------------------------------------------------------------


def test_parameters_of_1_5() -> None:
    """Qwen2-VL 7B's encoder and merger, and Qwen2.5 7B."""
    with torch.device("meta"):
        parts = UniMMModel(UniMMConfig(**baichuan_omni.parts_15())).parts()
    sizes = {name: count_weights(part) for name, part in parts.items()}
    assert sizes["vision"] + sizes["connector"] == 675_759_104
    assert sizes["decoder"] == 7_615_616_512


def small_15(tokens: tuple[int, int, int, int]) -> dict[str, Any]:
    """The published make in small shapes."""
    fields = baichuan_omni.parts_15()
    vocabulary, begin, end, feature = tokens
    layout = {**fields["layout"], "begin": begin, "end": end, "feature": feature, "code": vocabulary}
    return {
        **fields,
        "decoder": {**fields["decoder"], **DECODER, "vocab_size": vocabulary},
        "views": {**fields["views"], "most": 70 * 70},
        "encoder": {**fields["encoder"], "width": 32, "depth": 2, "heads": 2},
        "connector": {**fields["connector"], "width": 128},
        "layout": layout,
    }


@torch.no_grad()
def test_features_of_1_5_are_qwen2_vls(text_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its bridge is Qwen2-VL's merger: a norm of each feature, four joined, two layers with GELU between."""
    um = compose(small_15(tokens_of(text_tokenizer)), text_tokenizer)
    tower = Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(depth=2, embed_dim=32, num_heads=2, mlp_ratio=4, hidden_size=32, patch_size=14)
    ).eval()
    state = {}
    for name, tensor in um.model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "vision":
            rest = rest.removeprefix("model.").replace("embeds.proj.", "patch_embed.proj.")
            state[rest] = tensor.unflatten(1, (3, 2, 14, 14)) if rest == "patch_embed.proj.weight" else tensor
        elif part == "connector":
            state[rest.replace("norm.", "merger.ln_q.").replace("layers.", "merger.mlp.")] = tensor
    tower.load_state_dict(state)
    image = picture(91, 60)
    images: Images = um.processor.look([image])
    assert images.pixels is not None and images.grids is not None
    rows, columns = images.grids[0].tolist()
    patches = images.pixels[0, :, : 28 * rows, : 28 * columns].unsqueeze(1).expand(-1, 2, -1, -1)
    cells = patches.reshape(3, 2, rows, 2, 14, columns, 2, 14).permute(2, 5, 3, 6, 0, 1, 4, 7)
    found = tower(cells.reshape(rows * columns * 4, -1), grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]]))
    ids, shown = um.processor.question("what is this?", [image])
    stream = um.model.embed(torch.tensor([ids]), images=shown).stream
    places = torch.tensor(ids) == um.processor.layout.feature
    expected = found.pooler_output if hasattr(found, "pooler_output") else found
    assert (stream[0, places] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_positions_of_1_5_are_counted(text_tokenizer: PreTrainedTokenizerFast) -> None:
    config = UniMMConfig(**baichuan_omni.parts_15())
    assert config.positions_config().kind == "counted"
    um = compose(small_15(tokens_of(text_tokenizer)), text_tokenizer)
    text = str(um.processor.tokenizer.decode(um.processor.question("what is this?", SHOWN[:1])[0]))
    assert text.startswith("<C_Q><begin_of_image><image_placeholder>") and text.endswith("what is this?<C_A>")


def test_a_small_1_5(text_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    um = compose(small_15(tokens_of(text_tokenizer)), text_tokenizer)
    check_packed(um, ["what is this?", "a", "what are these?"], [SHOWN[:1], [], SHOWN[1:]])
    check_captions(um, SHOWN)
    check_saved(um, tmp_path / "model", SHOWN)
