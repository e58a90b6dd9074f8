"""Molmo: overlapping crops, features of two layers pooled by attention and added to their placeholders' embeddings.

The decoder is Qwen2 (7B-D, 72B), OLMo 2 (7B-O) or OLMoE (MolmoE-1B, `molmo_experts`), as the config says. It says
nothing of the vision tower, whose sizes are those of the published code; where `vision_backbone` and `vit_layers` are
there, under the names of the training configuration, these decide. Several images of a question have their features at
their own places; the published code, made for one, puts all at the first image's.

Sources: Deitke et al. 2024 (arXiv 2409.17146); allenai/molmo `olmo/` and the code published with Molmo-7B-D-0924.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Olmo2Config, PreTrainedConfig, Qwen2Config

from unimm.errors import UserError
from unimm.families.common import CLIP_MEAN, CLIP_STD, UNDRAWN, decoder_of, special_token
from unimm.families.family import Family
from unimm.families.keymap import LEAD, STACK, KeyMap, Op, Rule, share
from unimm.families.molmo_documents import Crops, Document, ExpertDocument, has_experts
from unimm.families.molmo_experts import expert_decoder, expert_rules
from unimm.families.source import Checkpoint, normalisation
from unimm.models.configuration import UniMMConfig
from unimm.models.parts import AttendReducerConfig
from unimm.models.turns import Turns
from unimm.sections import validate

ENCODER = "vit_large_patch14_clip_quickgelu_336"
NEW_TOKENS = 128  # rows of the embedding that the head lacks
POOL = 2  # features a side of the window that makes a token
TURNS = Turns(user=" User: ", assistant=" Assistant:", images_before=True)
TOKENS = {"begin": "<im_start>", "end": "<im_end>", "row_end": "<im_col>"}
FEATURE = "<im_patch>"


class Molmo(Family):
    """One layout, that of the publisher's own code."""

    name, title = "molmo", "Molmo"
    needs = ("encoder", "views")

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration."""
        where = str(checkpoint.path)
        kind = ExpertDocument if has_experts(checkpoint.document) else Document
        document: Any = validate(kind, checkpoint.document, where)
        tower, layers = document.vision_backbone, _layers(document, where)
        side, patch = tower.image_default_input_size[0], tower.image_patch_size
        width, tokenizer = tower.image_emb_dim, checkpoint.text_tokenizer
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ends = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
        decoder = (expert_decoder if kind is ExpertDocument else _decoder)(document, where, ends)
        return {
            "decoder": decoder,
            "extra_tokens": NEW_TOKENS,
            "views": (views := _views(checkpoint, document)),
            "encoder": {
                "kind": "timm",
                "name": ENCODER,
                "tokens": (side // patch) ** 2,
                "width": width * len(layers),
                "kwargs": {
                    "img_size": side,
                    "patch_size": patch,
                    "embed_dim": width,
                    "depth": tower.image_num_layers,
                    "num_heads": tower.image_num_heads,
                    "mlp_ratio": tower.image_mlp_dim / width,
                },
                "layers": layers,
            },
            "reducer": {
                "kind": "attend",
                "side": POOL,
                "width": width,
                "heads": tower.image_num_heads,
                "padding": True,
            },
            "connector": {
                "kind": "mlp",
                "gated": True,
                "width": document.intermediate_size // 2,
                "bias": False,
                "act": "silu",
            },
            "layout": {
                "begin": None,
                "end": None,
                "feature": special_token(tokenizer, FEATURE, checkpoint.folder),
                "code": decoder["vocab_size"] + NEW_TOKENS,  # which is no token
                "grid": UNDRAWN,
                "picture": _picture(checkpoint, side // patch // POOL, views["overlap"] // (patch * POOL)),
            },
            "tie_word_embeddings": False,
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of the published processor, which does not ask the chat template.

        That has neither the space before the first turn nor the end of an answer, and no images.
        """
        return vars(TURNS)

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map of the published layout."""
        reducer = config.reducer_config()
        assert isinstance(reducer, AttendReducerConfig)
        backbone, pooling = "model.vision_backbone.", "model.vision_backbone.image_pooling_2d."
        names = {"q": "wq", "k": "wk", "v": "wv", "output": "wo"}
        gated = {"gate": "w1", "down": "w2", "up": "w3"}
        return KeyMap(
            rules=(
                *_tower(f"{backbone}image_vit.", config),
                *([Rule("connector.reducer.padding", f"{backbone}pad_embed")] if reducer.padding else []),
                *(
                    Rule(f"connector.reducer.{ours}.{{end}}", f"{pooling}{theirs}.{{end}}")
                    for ours, theirs in names.items()
                ),
                *(
                    Rule(f"connector.layers.{ours}.weight", f"{backbone}image_projector.{theirs}.weight")
                    for ours, theirs in gated.items()
                ),
                *_text(config),
            )
        )

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model has this reducer."""
        return bool(config.reducer.get("kind") == "attend")


def _layers(document: Document | ExpertDocument, where: str) -> tuple[int, ...]:
    """The blocks whose states are joined, counted from 0."""
    depth = document.vision_backbone.image_num_layers
    found = tuple(layer + depth if layer < 0 else layer for layer in document.vit_layers)
    if not all(0 <= layer < depth for layer in found):
        raise UserError(f"{where}: vit_layers: {list(document.vit_layers)} are not all of {depth} layers")
    return found


def _decoder(document: Document, where: str, ends: Mapping[str, int | None]) -> dict[str, Any]:
    """The decoder as fields of transformers' config; `ends` are its special tokens."""
    kinds = (document.norm_after, document.attention_layer_norm, document.qkv_bias)
    known: dict[Any, type[PreTrainedConfig]] = {
        (False, False, True): Qwen2Config,
        (True, True, False): Olmo2Config,
    }
    if kinds not in known:
        raise UserError(
            f"{where}: norm_after, attention_layer_norm, qkv_bias: {kinds} is not supported; Qwen2's are False, False, "
            "True, and OLMo 2's True, True, False"
        )
    kind: Any = known[kinds]
    config = kind(
        vocab_size=document.embedding_size or document.vocab_size,
        hidden_size=document.hidden_size,
        intermediate_size=document.intermediate_size // 2,
        num_hidden_layers=document.num_hidden_layers,
        num_attention_heads=document.num_attention_heads,
        num_key_value_heads=document.num_key_value_heads or document.num_attention_heads,
        max_position_embeddings=document.max_position_embeddings,
        rms_norm_eps=document.layer_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": document.rope_theta},
        tie_word_embeddings=False,
        **ends,
    )
    return decoder_of(config, kind)


def _picture(checkpoint: Checkpoint, side: int, overlap: int) -> dict[str, Any]:
    """What stands around the features of an image, of tiles of so many tokens a side."""
    ends = {
        name: special_token(checkpoint.text_tokenizer, token, checkpoint.folder)
        for name, token in TOKENS.items()
    }
    tiles = {"tile": (side, side), "whole_at": "first", "joint": True, "overlap": overlap}
    return {**ends, **tiles, "add": True}


def _views(checkpoint: Checkpoint, document: Document | ExpertDocument) -> dict[str, Any]:
    """How an image is cut; sizes that the processor says are those of the tower."""
    options, path = checkpoint.image_options()
    crops, tower = validate(Crops, options, str(path)), document.vision_backbone
    size, patch = tower.image_default_input_size, tower.image_patch_size
    for name, given, wanted in (
        ("base_image_input_size", crops.base_image_input_size or size, (size[0],) * 2),
        ("image_patch_size", crops.image_patch_size or patch, patch),
        ("overlap_margins", crops.overlap_margins, (crops.overlap_margins[0],) * 2),
    ):
        if given != wanted:
            raise UserError(f"{path}: {name}: {given!r} is not supported, only {wanted!r}")
    return {
        "kind": "canvas",
        "tile": size[0],
        "most": crops.max_crops,
        "choose": "scale",
        "place": "centre",
        "whole": "first",
        "whole_place": "centre",
        "overlap": crops.overlap_margins[0] * patch,
        "resample": "bilinear",
        "precise": True,
        **normalisation({"image_mean": CLIP_MEAN, "image_std": CLIP_STD, **options}, path, {}),
    }


def _tower(theirs: str, config: UniMMConfig) -> list[Rule]:
    """Rules of the vision tower, in timm's names."""
    patch = (config.encoder or {})["kwargs"]["patch_size"]
    inner, outer = "vision.model.blocks.{i}", f"{theirs}transformer.resblocks.{{i}}"
    names = {"attn.proj": "attention.wo", "norm1": "attention_norm", "norm2": "ffn_norm",
             "mlp.fc1": "feed_forward.w1", "mlp.fc2": "feed_forward.w2"}  # fmt: skip
    fused = tuple(f"{outer}.attention.{name}.{{end}}" for name in ("wq", "wk", "wv"))
    return [
        Rule("vision.model.cls_token", f"{theirs}class_embedding", LEADS),
        Rule("vision.model.pos_embed", f"{theirs}positional_embedding", LEAD),
        Rule("vision.model.patch_embed.proj.weight", f"{theirs}patch_embedding.weight", pixels(patch)),
        Rule("vision.model.norm_pre.{end}", f"{theirs}pre_ln.{{end}}"),
        Rule(f"{inner}.attn.qkv.{{end}}", fused, STACK),
        *(Rule(f"{inner}.{ours}.{{end}}", f"{outer}.{name}.{{end}}") for ours, name in names.items()),
    ]


def _text(config: UniMMConfig) -> list[Rule]:
    """Rules of the decoder, whose projections are fused."""
    decoder: Any = config.decoder_config()
    rows = [
        Rule("decoder.model.embed_tokens.weight", "model.transformer.wte.embedding"),
        Rule("extra_embedding.weight", "model.transformer.wte.new_embedding"),
        Rule("decoder.model.norm.weight", "model.transformer.ln_f.weight"),
    ]
    if decoder.model_type == "olmoe":
        return [*expert_rules(decoder), *rows]
    inner, outer = "decoder.model.layers.{i}", "model.transformer.blocks.{i}"
    head = decoder.hidden_size // decoder.num_attention_heads
    keys = head * decoder.num_key_value_heads
    attention, forward = [decoder.hidden_size, keys, keys], [decoder.intermediate_size] * 2
    # OLMo 2 has its norms behind each branch
    before = decoder.model_type == "qwen2"
    first = "input_layernorm" if before else "post_attention_layernorm"
    second = "post_attention_layernorm" if before else "post_feedforward_layernorm"
    names = {"self_attn.o_proj": "attn_out", "mlp.down_proj": "ff_out", "self_attn.q_norm": "q_norm",
             "self_attn.k_norm": "k_norm", first: "attn_norm", second: "ff_norm"}  # fmt: skip
    return [
        *(
            Rule(
                f"{inner}.self_attn.{name}_proj.{{end}}", f"{outer}.att_proj.{{end}}", share(index, attention)
            )
            for index, name in enumerate("qkv")
        ),
        *(
            Rule(f"{inner}.mlp.{name}_proj.weight", f"{outer}.ff_proj.weight", share(index, forward))
            for index, name in enumerate(("up", "gate"))
        ),
        *(Rule(f"{inner}.{ours}.weight", f"{outer}.{name}.weight") for ours, name in names.items()),
        Rule("decoder.lm_head.weight", "model.transformer.ff_out.weight"),
        *rows,
    ]


LEADS = Op(lambda theirs: theirs[0][None, None], lambda ours, _: [ours[0, 0]])
"""A tensor that has two more dimensions here, of length 1, in front."""


def pixels(patch: int) -> Op:
    """Return what makes a convolution of a linear layer of patches, whose numbers lie by row, column and channel."""
    return Op(
        lambda theirs: theirs[0].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2),
        lambda ours, _: [ours.permute(0, 2, 3, 1).flatten(1)],
    )


FAMILY = Molmo()
