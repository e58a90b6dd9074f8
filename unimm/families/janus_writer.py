"""Writes models in Janus's layouts: the files beside the weights, of the original repository and of transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, JanusConfig, JanusImageProcessor, JanusProcessor

from unimm.errors import UserError
from unimm.families.family import Writer
from unimm.families.generation_config import sampling_options
from unimm.families.source import PREPROCESSOR_FILE
from unimm.families.written_template import chat_template
from unimm.files import read_json, write_json
from unimm.models.configuration import UniMMConfig
from unimm.models.parts import (
    ImageGenerationConfig,
    JoinReducerConfig,
    MlpConnectorConfig,
    SquareViewsConfig,
    TimmEncoderConfig,
)
from unimm.models.turns import ASK, START, USER_IMAGE, USER_TEXT, Turns
from unimm.processing.processor import (
    GENERATION_FILE,
    PROCESSOR_FILE,
    UniMMProcessor,
    read_tokenizer,
)
from unimm.processing.views import MIN_SIDE

SAMPLING = {
    "guidance_scale": 5.0,
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
}  # of Janus's generation_inference.py
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {"patch": 16, "width": 1024, "depth": 24, "heads": 16, "ratio": 4.0}
}
# special tokens that the grammar needs, as every published tokenizer names them
IMAGE_BEGIN, IMAGE_END, FEATURE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
# The original's formats of turns, by name: the roles of user and assistant.
FORMATS = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}


class JanusWriter(Writer):
    """Janus's layouts hold one encoder, one quantiser and the connectors between."""

    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """Check that nothing is beyond what Janus's own code has, turns included."""
        generation = config.generation_config()
        assert generation is not None  # which the family needs
        options = config.image_tokenizer or {}
        foreign = {
            "reducer.side": config.reducer_config() != JoinReducerConfig(),
            "connector": config.connector_config() != MlpConnectorConfig(config.connector_depth()),
            "generation.places": generation.places,
            "image_tokenizer.linear_shortcut": options.get("linear_shortcut", False),
            "image_tokenizer.latent_norm": options.get("latent_norm", False),
            "image_tokenizer.patch_size": options.get("patch_size", 1) != 1,
        }
        if found := [name for name, present in foreign.items() if present]:
            raise UserError(f"--to: Janus's layouts have no place for this model's {', '.join(found)}")
        if layout == "original" and _format(processor.turns) is None:
            raise UserError(
                "--to: Janus's original layout writes turns as deepseek or deepseek_old, this model does not"
            )

    def write(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """Write the files beside the weights."""
        processor.tokenizer.chat_template = None  # the processor's files say it, where it is needed
        processor.tokenizer.save_pretrained(folder)
        if layout == "original":
            _write_original(config, processor, folder)
            if options := sampling_options(config, SAMPLING):
                write_json(folder / GENERATION_FILE, {"generation_kwargs": options})
        else:
            _write_transformers(config, processor, folder)


def _format(turn: Turns) -> str | None:
    """The original's name for the format in which a model asks, if it has one."""

    def asks(turn: Turns) -> list[str]:
        pairs = itertools.pairwise((START, USER_IMAGE, USER_IMAGE, USER_TEXT, ASK))
        joins = [turn.join(left, right, same=left != START and right != ASK).words for left, right in pairs]
        return [turn.join(START, USER_TEXT).words, *joins]

    return next(
        (name for name, roles in FORMATS.items() if asks(turn) == asks(Turns.deepseek(*roles, ""))),
        None,
    )


def _parts(config: UniMMConfig) -> tuple[SquareViewsConfig, TimmEncoderConfig, ImageGenerationConfig]:
    """The parts that the family needs."""
    views, encoder, generation = config.views_config(), config.encoder_config(), config.generation_config()
    assert isinstance(views, SquareViewsConfig) and isinstance(encoder, TimmEncoderConfig)
    assert generation is not None
    return views, encoder, generation


def _write_original(config: UniMMConfig, processor: UniMMProcessor, folder: Path) -> None:
    views, encoder, generation = _parts(config)
    width, depth = config.decoder_config().hidden_size, config.connector_depth()
    sizes = encoder.kwargs
    found = {"patch": sizes["patch_size"], "width": encoder.width, "depth": sizes["depth"]}
    named = [name for name, tower in TOWERS.items() if found.items() <= tower.items()]
    tower = {"image_size": views.image_size, "select_feature": "same", "select_layer": -1}
    tower["model_name"] = named[0] if named else f"siglip_patch{found['patch']}_{views.image_size}"
    if not named:
        tower["num_heads"] = sizes["num_heads"]  # the original knows no other tower than its own

    def connector(depth: int, width_in: int) -> dict[str, Any]:
        sizes = {"depth": depth, "input_dim": width_in, "n_embed": width, "projector_type": "mlp_gelu"}
        return {"cls": "MlpProjector", "model_type": "aligner", "params": sizes}

    head = {"image_token_embed": generation.head_width or width, "image_token_size": generation.codes}
    document = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "language_config": {**config.decoder, "architectures": None},
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": tower},
        "aligner_config": connector(depth, encoder.width),
        "gen_aligner_config": connector(generation.depth or depth, generation.dim),
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {**head, "n_embed": width},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": generation.codes, "n_embed": generation.dim},
        },
    }
    write_json(folder / "config.json", document)
    mean, std = list(views.mean), list(views.std)
    images = {"image_size": views.image_size, "image_mean": mean, "image_std": std, "min_size": MIN_SIDE}
    write_json(folder / PREPROCESSOR_FILE, {"image_processor_type": "VLMImageProcessor", **images})
    write_json(
        folder / PROCESSOR_FILE,
        {
            "processor_class": "VLChatProcessor",
            "sft_format": _format(processor.turns),
            "image_tag": FEATURE,
            "num_image_tokens": encoder.tokens,
            "add_special_token": False,
            "mask_prompt": False,
        },
    )


def _write_transformers(config: UniMMConfig, processor: UniMMProcessor, folder: Path) -> None:
    views, encoder, generation = _parts(config)
    sizes, codes, depth = encoder.kwargs, config.image_tokenizer or {}, config.connector_depth()
    width, first = config.decoder_config().hidden_size, codes["block_out_channels"][0]
    written = JanusConfig(
        text_config=config.decoder,
        vision_config={
            "hidden_size": encoder.width,
            "num_hidden_layers": sizes["depth"],
            "num_attention_heads": sizes["num_heads"],
            "image_size": views.image_size,
            "patch_size": sizes["patch_size"],
            "mlp_ratio": sizes["mlp_ratio"],
            "projection_dim": width,
            "num_image_tokens": encoder.tokens,
            "depth": depth,
        },
        vq_config={
            "embed_dim": codes["codebook_dim"],
            "num_embeddings": codes["codebook_size"],
            "latent_channels": codes["latent_channels"],
            "base_channels": first,
            "channel_multiplier": [channels // first for channels in codes["block_out_channels"]],
            "num_res_blocks": codes["layers_per_block"],
            "projection_dim": generation.head_width or width,
            "num_hidden_layers": generation.depth or depth,
            "image_token_embed_dim": width,
        },
        image_token_id=processor.layout.feature,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["JanusForConditionalGeneration"],
    )
    written.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=processor.bos,
        eos_token_id=processor.end_tokens[0] if len(processor.end_tokens) == 1 else processor.end_tokens,
        pad_token_id=processor.pad,
        generation_kwargs={"boi_token_id": processor.layout.begin, **sampling_options(config, SAMPLING)},
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    names = {"image_token": FEATURE, "boi_token": IMAGE_BEGIN, "eoi_token": IMAGE_END}
    write_json(path, read_json(path) | {"extra_special_tokens": names})
    size = {"height": views.image_size, "width": views.image_size}
    images = JanusImageProcessor(size=size, image_mean=list(views.mean), image_std=list(views.std))
    JanusProcessor(
        images,
        read_tokenizer(folder),
        chat_template=chat_template(processor, FEATURE, "\n\n", images_first=False),
        use_default_system_prompt=bool(processor.turns.system),
        num_image_tokens=encoder.tokens,
    ).save_pretrained(folder)
