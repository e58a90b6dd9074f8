"""MM1.5, of which nothing was released: its parts against the code of others, and a small model of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from tests.families.composed import check_captions, check_packed, check_saved, compose
from tests.families.survey import picture
from unimm.data.text_tokenizer import train_text_tokenizer
from unimm.errors import UserError
from unimm.families import mm1
from unimm.models.configuration import UniMMConfig
from unimm.models.connectors import Connector
from unimm.models.modeling import UniMMModel
from unimm.models.parts import PART_KINDS, MlpConnectorConfig, TimmEncoderConfig, read_part
from unimm.models.quantization import count_weights
from unimm.models.reducers import build_reducer
from unimm.models.seeing import Seeing, Seen
from unimm.models.vision import VisionTower
from unimm.processing.views import make_views
from unimm.recipes import find_recipe
from unimm.training.recipe import load_recipe
from unimm.training.understanding import tiny_understanding

HONEYBEE = json.loads((Path(__file__).parent / "fixtures" / "honeybee.json").read_text())
SHOWN = [picture(37, 91), picture(200, 64), picture(61, 60)]


@pytest.fixture(scope="module")
def text_tokenizer() -> PreTrainedTokenizerFast:
    return train_text_tokenizer(["a red apple on a blue background", "what is this?"], 300)


# --- the C-Abstractor ---------------------------------------------------------------------------------------


def their_name(ours: str) -> str:
    """Honeybee's name of a parameter of ours."""
    for own, theirs in (("reducer.before", "net.0"), ("reducer.after", "net.2"), ("layers", "readout")):
        if ours.startswith(own + "."):
            return theirs + ours.removeprefix(own)
    return {"reducer.positions": "pos_emb"}[ours]


@pytest.mark.parametrize(
    "case", HONEYBEE["cases"], ids=lambda case: f"{case['features']} to {case['cells'] ** 2}"
)
def test_the_abstractor_is_honeybees(case: dict[str, Any]) -> None:
    side = round(case["features"] ** 0.5)
    seeing = _seeing(side, case)
    connector = Connector(
        MlpConnectorConfig(depth=2, act="silu"),
        build_reducer(seeing, case["width"]),
        case["width"],
        case["out"],
    ).double()
    generator = torch.Generator().manual_seed(case["seed"])
    parameters = sorted((their_name(name), parameter) for name, parameter in connector.named_parameters())
    assert len(parameters) == case["names"]
    assert sum(parameter.numel() for _, parameter in parameters) == case["parameters"]
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            scales = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if scales else 0.3 * noise)
        features = torch.randn(case["views"], case["features"], case["width"], generator=generator).double()
        got = connector.eval()(features, Seen([(side, side)] * case["views"], [(1, 1)] * case["views"]))
    expected = torch.tensor(case["output"], dtype=torch.float64)
    assert got.shape == expected.shape and expected.std() > 0.4
    assert (got - expected).abs().max() < 2e-6  # six decimals were kept


def _seeing(side: int, case: dict[str, Any]) -> Seeing:
    reducer = {
        "kind": "abstract",
        "side": case["cells"],
        "width": case["hidden"],
        "depth": case["depth"],
        "positions": case["positions"],
    }
    encoder = {**mm1.encoder(), "tokens": side**2, "width": case["width"]}
    return Seeing(
        read_part("views", mm1.views()), read_part("encoder", encoder), read_part("reducer", reducer)
    )


@pytest.mark.parametrize(("width", "millions"), [(2048, 23.8), (2560, 26.7), (4096, 38.5)])
def test_weights_of_the_abstractor(width: int, millions: float) -> None:
    fields = mm1.parts("3B", 1000, 7)
    seeing = Seeing(*(read_part(name, fields[name]) for name in ("views", "encoder", "reducer")))
    with torch.device("meta"):
        reducer = build_reducer(seeing, 1280)
        connector = Connector(read_part("connector", fields["connector"]), reducer, 1280, width)
    positions = 48 * 48 * 1280
    assert round((count_weights(connector) - positions) / 1e6, 1) == millions


# --- CLIP's encoder -----------------------------------------------------------------------------------------


def as_ours(name: str) -> str:
    """Our name of one of `CLIPVisionModel`'s parameters that has a tensor of its own there."""
    embeddings = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    }
    if name in embeddings:
        return embeddings[name]
    for theirs, ours in (
        ("pre_layrnorm", "norm_pre"), ("post_layernorm", "norm"), ("encoder.layers", "blocks"),
        ("self_attn.out_proj", "attn.proj"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def clip_weights(clip: CLIPVisionModel, side: int) -> dict[str, Tensor]:
    """The weights of a CLIP of transformers as those of our tower, positions interpolated."""
    state = {name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".self_attn." in name and ".out_proj." not in name:
            if ".q_proj." in name:
                parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[as_ours(name).replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "position_ids" not in name:
            found[as_ours(name)] = tensor
    found["cls_token"] = found["cls_token"].view(1, 1, -1)
    found["pos_embed"] = mm1.interpolated(found["pos_embed"], side)[None]
    return found


@pytest.mark.parametrize("side", [4, 7, 3])
@torch.no_grad()
def test_the_encoder_is_clips_at_an_interpolated_size(side: int) -> None:
    """ViT-H's way of doing things, narrow and shallow, trained at 4 x 4 patches and run at others."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=4 * 14,
        patch_size=14, hidden_act="quick_gelu",
    )  # fmt: skip
    clip = CLIPVisionModel(config).eval()
    for parameter in clip.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.ndim == 1))
    kwargs = {**mm1.encoder()["kwargs"], "img_size": side * 14, "embed_dim": 32, "depth": 3, "num_heads": 4}
    tower = VisionTower(TimmEncoderConfig(mm1.encoder()["name"], side**2, 32, kwargs)).eval()
    tower.model.load_state_dict(clip_weights(clip, side))
    pixels = torch.randn(2, 3, side * 14, side * 14)
    states = clip(pixels, interpolate_pos_encoding=True).last_hidden_state
    expected = getattr(clip, "vision_model", clip).post_layernorm(states)[:, 1:]
    assert (tower(pixels) - expected).abs().max() < 1e-4 and expected.std() > 0.1


def test_the_encoder_has_vit_h_weights() -> None:
    with torch.device("meta"):
        tower = VisionTower(read_part("encoder", mm1.encoder()))
        config = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
            image_size=672, patch_size=14,
        )  # fmt: skip
        clip = CLIPVisionModel(config)
    assert count_weights(tower) == count_weights(clip) == 633_387_520


# --- the sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "billions"),
    [("1B", 1.2), ("3B", 3.2), ("7B", 7.0), ("30B", 33.0), ("1B-MoE", 26.6), ("3B-MoE", 69.8)],
)
def test_sizes(size: str, billions: float) -> None:
    config = UniMMConfig(**mm1.parts(size, 128256, 128255))
    with torch.device("meta"):
        model = UniMMModel(config)
    assert round(count_weights(model.parts()["decoder"]) / 1e9, 1) == billions


def test_experts_are_in_every_second_layer() -> None:
    config: Any = UniMMConfig(**mm1.parts("1B-MoE", 1000, 7)).decoder_config()
    with torch.device("meta"):
        model: Any = UniMMModel(UniMMConfig(**mm1.parts("1B-MoE", 1000, 7))).decoder
    experts = [hasattr(layer.mlp, "experts") for layer in model.get_decoder().layers]
    assert experts == [False, True] * (config.num_hidden_layers // 2)
    assert config.num_experts == 64 and config.num_experts_per_tok == 2


def test_a_size_that_is_none_is_a_line() -> None:
    with pytest.raises(UserError, match="size: '5B'; one of 1B, 3B, 7B, 30B, 1B-MoE, 3B-MoE"):
        mm1.parts("5B", 1000, 7)


def test_tokens_of_images() -> None:
    config = UniMMConfig(**mm1.parts("3B", 1000, 7))
    wide = UniMMConfig(**mm1.parts("3B", 1000, 7, mm1.MOST_AT_INFERENCE))
    views, wider, layout = make_views(config), make_views(wide), config.image_layout()
    assert views is not None and wider is not None
    sizes = ((480, 640), (1080, 1920), (2000, 700), (100, 100))
    assert [layout.features(*views.grid_of(*size)) for size in sizes] == [1008, 1296, 1296, 720]
    assert views.grid_of(4000, 4000) == (3, 3) and wider.grid_of(4000, 4000) == (4, 4)


def test_the_recipe_is_the_same_model(text_tokenizer: PreTrainedTokenizerFast) -> None:
    recipe: Any = load_recipe(find_recipe("mm1.5-3b"))
    fields = mm1.parts("3B", 128256, 7)
    described = recipe.model.understanding.parts(text_tokenizer)
    for name in ("views", "encoder", "reducer", "connector"):
        assert read_part(name, described[name]) == read_part(name, fields[name])
    decoder = fields["decoder"]
    assert {name: recipe.model.decoder[name] for name in decoder} == decoder


# --- all of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["3B", "3B-MoE"])
def test_a_small_model(size: str, text_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    vocabulary = len(text_tokenizer)
    feature = text_tokenizer.get_vocab()["<image_placeholder>"]
    fields = mm1.parts(size, vocabulary, feature)
    small = tiny_understanding({name: fields[name] for name in PART_KINDS if name in fields})
    cells = small["reducer"]["side"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    if size in mm1.EXPERTS:
        sizes |= {"moe_intermediate_size": 48, "num_experts": 4}
    seen = {name: small[name] for name in ("views", "encoder", "reducer", "connector")}
    um = compose(
        {**fields, **seen, "decoder": {**fields["decoder"], **sizes},
         "layout": mm1.layout(vocabulary, feature, cells)},
        text_tokenizer,
    )  # fmt: skip
    check_packed(um, ["what is this?", "a", "what are these?"], [SHOWN[:1], [], SHOWN[1:]])
    check_captions(um, SHOWN)
    check_saved(um, tmp_path / "model", SHOWN)
