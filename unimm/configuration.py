"""What a unified model is made of: `UniMMConfig`, a description of each part that a part is built from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The understanding encoder and how its features enter the stream.

    Attributes:
        name: architecture, as timm names it.
        kwargs: what `unimm.vision.create_encoder` takes besides the name (image size, width, depth, ...).
        image_size: pixels a side of the square that a picture is brought to.
        tokens: features an image has after the encoder (the square of the patches a side).
        width: channels of a feature.
        merge: neighbouring features joined into one, a side; 2 leaves a quarter of the tokens.
        pad_value: grey level (0..255), or one for each channel, that pads a picture to a square.
        mean: what is taken from each colour channel in [0, 1], and
        std: what it is then divided by; the defaults give [-1, 1].
    """

    name: str
    image_size: int
    tokens: int
    width: int
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    merge: int = 1
    pad_value: int | Sequence[int] = 127
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    @property
    def length(self) -> int:
        """Tokens an image takes in the stream."""
        return self.tokens // self.merge**2


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The code side: its vocabulary and the layers that join it to the decoder.

    Attributes:
        codes: size of the code vocabulary (the image tokenizer's codebook).
        dim: dimension of a code embedding before its connector.
        image_size: pixels a side of a drawing.
        stride: pixels a side that one code stands for.
        places: whether a code's place in the grid is embedded too (Janus leaves that to the decoder).
        depth: linear layers of the code connector; None: as many as `connector_depth`.
        head_width: width between the two layers of the code head; None: the decoder's.
        shared: whether codes are tokens of the text vocabulary (Emu3); there are then no layers of their own.
        area: least and most pixels of a picture that is understood by its codes; None: it is not.
        mean: what is taken from each colour channel, in [0, 1], of such a picture, and
        std: what it is then divided by.
    """

    codes: int
    dim: int
    image_size: int
    stride: int
    places: bool = False
    depth: int | None = None
    head_width: int | None = None
    shared: bool = False
    area: Sequence[int] | None = None
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    @property
    def grid(self) -> int:
        """Codes a side of a drawing."""
        return self.image_size // self.stride


class UniMMConfig(PreTrainedConfig):
    """Parts of a `UniMMModel`, each as the plain dictionary that goes into `config.json`.

    Args:
        decoder: config of any transformers causal language model (`{"model_type": "llama", ...}`).
        vision: fields of `VisionConfig`, or None for a model that cannot look at pictures.
        generation: fields of `GenerationConfig`, or None for a model that cannot draw.
        image_tokenizer: config of the image tokenizer, by its `model_type`; needed with `generation`.
        layout: fields of `ImageLayout`: the token ids around and inside an image.
        connector_depth: linear layers of each connector, with a GELU between.
        conversation: fields of `unimm.processing.Conversation`, or None for unimm's own.
    """

    model_type = "unimm"

    def __init__(
        self,
        decoder: dict[str, Any] | PreTrainedConfig | None = None,
        vision: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
        image_tokenizer: dict[str, Any] | None = None,
        layout: dict[str, Any] | None = None,
        connector_depth: int = 2,
        conversation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(decoder, PreTrainedConfig):
            decoder = decoder.to_dict()
        self.decoder = decoder or {"model_type": "llama"}
        self.vision = vision
        self.generation = generation
        self.image_tokenizer = image_tokenizer
        self.layout = layout or {}
        self.connector_depth = connector_depth
        self.conversation = conversation
        if generation is not None and image_tokenizer is None:
            raise ValueError(
                "image_tokenizer: missing, though `generation` is given; add the tokenizer's config"
            )
        super().__init__(**kwargs)

    def decoder_config(self) -> PreTrainedConfig:
        """Return the decoder's own config object."""
        options = dict(self.decoder)
        return AutoConfig.for_model(options.pop("model_type"), **options)

    def vision_config(self) -> VisionConfig | None:
        """Return the typed description of the understanding encoder."""
        return None if self.vision is None else VisionConfig(**self.vision)

    def generation_config(self) -> GenerationConfig | None:
        """Return the typed description of the code side."""
        return None if self.generation is None else GenerationConfig(**self.generation)


AutoConfig.register(UniMMConfig.model_type, UniMMConfig)
