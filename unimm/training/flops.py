"""How many floating-point operations training a unified model takes: one count, for plans and for logs.

Two for each weight and token forward, two backward where gradients pass, two more for the weights' own gradients
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Attention counts the pairs that see each other. Of experts those
count that a token is sent to, and those that all share. Activations that are computed a second time do not count, nor
does the image tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from unimm.models.experts import idle_weights
from unimm.models.fusion_parts import CrossFusionConfig
from unimm.models.modeling import UniMMModel
from unimm.models.parts import (
    EncoderConfig,
    NaflexEncoderConfig,
    TiledEncoderConfig,
    TimmEncoderConfig,
    TransformersEncoderConfig,
)

BEFORE_DECODER = {
    "decoder",
    "connector",
    "code_embedding",
    "vision",
    "fusion",
    "lora",
}  # gradients pass the decoder to these
MEMORY_SIDE, HEADS = {"connector", "vision"}, {"code_head"}


@dataclass(frozen=True)
class Counts:
    """What goes through the model, summed over samples.

    Attributes:
        tokens: positions of the decoder, padding left out.
        pairs: of a position and one that it sees, itself among them.
        words: positions whose text loss counts.
        codes: positions whose code loss counts.
        features: that the understanding encoder makes.
        feature_pairs: of two features that see each other there.
        memory: rows that are looked at by cross-attention.
        looking: positions of the decoder that see any of them.
        looks: pairs of such a position and a row that it sees.
    """

    tokens: float
    pairs: float
    words: float
    codes: float
    features: float = 0
    feature_pairs: float = 0
    memory: float = 0
    looking: float = 0
    looks: float = 0


class Operations:
    """The operations of a step, forward and backward.

    Args:
        model: whole (ZeRO 3 leaves no weights to count), or on the meta device.
        trained: groups of weights that a stage trains.
    """

    def __init__(self, model: UniMMModel, trained: Collection[str]) -> None:
        config, encoder = model.config.decoder_config(), model.config.encoder_config()
        head: Any = model.decoder.get_output_embeddings()
        table: Any = model.get_input_embeddings()
        groups = set(trained)
        passes = bool(groups & BEFORE_DECODER)
        learns = "decoder" in groups
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or 0) or config.hidden_size
        decoder = model.decoder.get_decoder()
        body = weights_of(decoder) - table.weight.numel() - idle_weights(decoder)
        code_head = head if model.code_head is None else model.code_head
        passed = passes * _share_passed(model, groups)
        self.token = body * (2 + 2 * passed + 2 * learns)
        # queries by keys, and by values
        self.pair = 4 * config.num_hidden_layers * width * (1 + 2 * passed)
        self.word = weights_of(head) * (4 + 2 * learns)
        self.code = weights_of(code_head) * (4 + 2 * bool(groups & {"decoder", "code_head"}))
        self.feature = self.feature_pair = 0
        if model.vision is not None:
            times = 3 if "vision" in groups else 1
            self.feature = 2 * weights_of(model.vision) * times
            self.feature_pair = 4 * encoder_depth(encoder) * times
        self.memory = self.looking = self.look = 0
        if model.fusion is not None:
            every: list[Any] = list(model.fusion.blocks.values())
            reads = sum(weights_of(layer) for block in every for layer in (block.k_proj, block.v_proj))
            times = 2 + 2 * passes + 2 * ("fusion" in groups)
            self.memory, self.looking = reads * times, (weights_of(model.fusion) - reads) * times
            self.look = 4 * len(every) * width * (3 if passes else 1)

    def of(self, counts: Counts) -> float:
        """Operations on what is counted."""
        return float(
            counts.tokens * self.token
            + counts.pairs * self.pair
            + counts.words * self.word
            + counts.codes * self.code
            + counts.features * self.feature
            + counts.feature_pairs * self.feature_pair
            + counts.memory * self.memory
            + counts.looking * self.looking
            + counts.looks * self.look
        )


def _share_passed(model: UniMMModel, groups: set[str]) -> float:
    """Share of the decoder's layers that gradients pass: of a memory alone, those behind its first block."""
    fusion = model.config.fusion_part()
    if not isinstance(fusion, CrossFusionConfig) or groups - {"fusion", *MEMORY_SIDE, *HEADS}:
        return 1.0
    return 1 - float(fusion.layers[0] / model.config.decoder_config().num_hidden_layers)


def encoder_depth(encoder: EncoderConfig | None) -> int:
    """Return the blocks of an encoder times their width, which a pair of features costs; 0 for one of no blocks."""
    if isinstance(encoder, NaflexEncoderConfig):
        return encoder.depth * encoder.width
    if isinstance(encoder, TiledEncoderConfig):
        return (encoder.depth + encoder.global_depth) * encoder.hidden
    if isinstance(encoder, TimmEncoderConfig):
        width = encoder.kwargs.get("embed_dim", encoder.width // max(len(encoder.layers), 1))
        return int((encoder.kwargs.get("depth") or 0) * width)
    if isinstance(encoder, TransformersEncoderConfig):
        return int(encoder.kwargs.get("num_hidden_layers", 0) * encoder.width)
    return 0


def weights_of(module: nn.Module) -> int:
    """Weights of a module and of all in it."""
    return sum(parameter.numel() for parameter in module.parameters())
