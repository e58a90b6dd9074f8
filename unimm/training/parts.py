"""What a unified model is assembled from for training: the `model` section of a recipe, its files and weights.

Either a whole model that `unimm.load` takes (`pretrained`), or its parts, each from nothing, from an earlier
run's export, or with published weights. `describe_model` needs no weights, so that a run can be planned without.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from unimm.configuration import UniMMConfig
from unimm.errors import UserError
from unimm.interop.image_tokenizers import load_image_tokenizer
from unimm.modeling import UniMMModel
from unimm.pipeline import UniMM, embedded_model, load
from unimm.processing import UniMMProcessor, read_tokenizer
from unimm.saving import no_progress
from unimm.sections import Positive, Section
from unimm.tokenizers.model import ImageTokenizerConfig
from unimm.tokenizers.movq import MoVQConfig
from unimm.training.lora import is_adapter

if TYPE_CHECKING:
    from unimm.training.unified import UnifiedRecipe

ALL_PARTS = ("decoder", "vision", "connector", "code_embedding", "code_head")
MARKS = ("<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<image>")
EMBEDDED = "embedded"
Sizes: TypeAlias = ImageTokenizerConfig | MoVQConfig
SIZES: dict[str, type[Sizes]] = {"unimm_vq": ImageTokenizerConfig, "unimm_movq": MoVQConfig}


class ModelSection(Section):
    """The model: a whole one (`pretrained`), or a decoder and two encoders that are joined by new connectors."""

    pretrained: str | None = None
    """A whole model: what `unimm.load` takes, or "embedded"; the other keys but `initialize` have no meaning then."""
    decoder: dict[str, Any] | None = None
    """Config of a transformers causal language model."""
    vision: str | dict[str, Any] | None = None
    """The export of a `siglip` run, or the fields of a `VisionConfig`."""
    image_tokenizer: str | dict[str, Any] | None = None
    """A folder or file that holds an image tokenizer, or the fields of its config (`model_type: unimm_vq`)."""
    text_tokenizer: str | None = None
    """A folder; "embedded" for that of the embedded model; null: that of the `siglip` run."""
    weights: dict[Literal["decoder", "vision", "image_tokenizer"], str] = Field(default_factory=dict)
    """Published weights to start parts from that are described by their fields."""
    shared: bool = False
    """Codes are tokens of the text vocabulary, as Emu3 has them; there is no understanding encoder then."""
    merge: Positive = 2
    connector_depth: Positive = 2
    places: bool = True
    code_depth: Positive | None = None
    """Layers of the code connector; null: `connector_depth`."""
    code_head_width: Positive | None = None
    """Width between the two layers of the code head; null: the decoder's."""
    initialize: str | None = None
    """Folder of an earlier export, on the same codes, to start from; null: from nothing."""
    initialize_parts: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ALL_PARTS
    """Which parts come from there; the others start as in any run."""

    @model_validator(mode="after")
    def _complete(self) -> ModelSection:
        if self.pretrained is None:
            for name in ("decoder", "image_tokenizer", *(() if self.shared else ("vision",))):
                if getattr(self, name) is None:
                    raise ValueError(f"{name}: missing; give all parts, or a whole model as pretrained")
            if self.shared and self.vision is not None:
                raise ValueError("vision: a model whose codes are tokens understands by them; remove it")
        if self.pretrained is None and not isinstance(self.vision, str) and self.text_tokenizer is None:
            raise ValueError("text_tokenizer: missing; give a folder that holds one")
        return self


def read_vision(folder: Path, merge: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the vision section of a `UniMMConfig` and the encoder's weights, from a `siglip` export."""
    try:
        section = dict(json.loads((folder / "vision.json").read_text()))
        weights = load_file(folder / "vision.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no export of a siglip run ({error}); train the encoder first") from None
    return {**section, "merge": merge}, _tower(weights)


def _tower(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a timm encoder as those of a `VisionTower`; its pooling head serves the contrastive loss only."""
    return {f"model.{key}": value for key, value in weights.items() if not key.startswith("attn_pool.")}


def _load(source: str) -> UniMM:
    """Load a whole model to go on from."""
    return load(None if source == EMBEDDED else source, device="cpu", dtype="float32")


class Assembly:
    """The description, the tokenizers and the weights of the model of a recipe.

    Args:
        recipe: whose `model` section to follow.
        weights: read weights too; without, only what `describe_model` needs.

    Raises:
        UserError: a file is missing or is something else.
    """

    def __init__(self, recipe: UnifiedRecipe, weights: bool = True) -> None:
        self.recipe, self.section = recipe, recipe.model
        self._whole: UniMMModel | None = None
        self.image_tokenizer: Any = None
        if self.section.pretrained is not None:
            um = _load(self.section.pretrained)
            self.config, self.processor, self._whole = um.model.config, um.processor, um.model
            if um.model.image_tokenizer is None:
                message = f"{self.section.pretrained} has no image tokenizer; this task trains drawing"
                raise recipe.error("model.pretrained", message)
            self.image_tokenizer = copy.deepcopy(um.model.image_tokenizer)
            return
        vision: dict[str, Any] | None = None
        self._vision_weights: dict[str, Tensor] | None = None
        if not self.section.shared:
            vision, self._vision_weights = self._vision(weights)
        sizes = self._image_tokenizer(weights)
        words = self._words(weights)
        self.config = self._shared(sizes, words) if vision is None else self._config(vision, sizes, words)
        self.processor = UniMMProcessor.from_config(self.config, words)

    def _vision(self, weights: bool) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        section = self.section
        if isinstance(section.vision, str):
            return read_vision(Path(section.vision), section.merge)
        assert section.vision is not None
        path = section.weights.get("vision") if weights else None
        if path is None:
            return {**section.vision, "merge": section.merge}, None
        file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise self.recipe.error("model.weights.vision", f"{file}: not readable ({error})") from None
        return {**section.vision, "merge": section.merge}, _tower(found)

    def _image_tokenizer(self, weights: bool) -> Sizes:
        section = self.section
        path = section.image_tokenizer
        if isinstance(path, dict):
            options = {"model_type": "unimm_vq", **path}
            kind = options.pop("model_type")
            if kind not in SIZES:
                message = f"expected one of {', '.join(SIZES)}, got {kind!r}"
                raise self.recipe.error("model.image_tokenizer.model_type", message)
            sizes: Sizes = SIZES[kind](**options)
            if not weights:
                return sizes
            path = section.weights.get("image_tokenizer")
            if path is None:
                self.image_tokenizer = nn.Module.eval(AutoModel.from_config(sizes))
                return sizes
        assert path is not None
        if not (Path(path).is_file() or (Path(path) / "config.json").exists()):
            message = f"{path} holds no image tokenizer; train it first"
            raise self.recipe.error("model.image_tokenizer", message)
        self.image_tokenizer = nn.Module.eval(load_image_tokenizer(path))
        return self.image_tokenizer.config  # type: ignore[no-any-return]

    def _words(self, weights: bool) -> PreTrainedTokenizerBase:
        section = self.section
        name = section.text_tokenizer or str(section.vision)
        folder = embedded_model() if name == EMBEDDED else Path(name)
        if not folder.is_dir() and not weights:
            folder = embedded_model()  # the decoder's config knows the size of the right one
        if not folder.is_dir():
            raise self.recipe.error("model.text_tokenizer", f"{folder}: no such folder")
        words = read_tokenizer(folder)
        for mark in MARKS[:3]:
            if words.convert_tokens_to_ids(mark) in (None, words.unk_token_id):
                raise self.recipe.error("model.text_tokenizer", f"{folder} has no token {mark}")
        return words

    def _shared(self, sizes: Sizes, words: PreTrainedTokenizerBase) -> UniMMConfig:
        """Describe a model whose codes, and what else an image needs, are tokens after those of the words."""
        side, first = sizes.image_size // sizes.stride, len(words)
        begin, end, feature = (words.convert_tokens_to_ids(name) for name in MARKS[:3])
        area = (sizes.image_size**2,) * 2
        decoder = dict(self.section.decoder or {})
        return UniMMConfig(
            decoder={
                **decoder,
                "vocab_size": max(first + 3 + sizes.codebook_size, decoder.get("vocab_size", 0)),
                **_special(words),
            },
            generation={
                "codes": sizes.codebook_size,
                "dim": getattr(sizes, "codebook_dim", 0),
                "image_size": sizes.image_size,
                "stride": sizes.stride,
                "shared": True,
                "area": area,
            },
            image_tokenizer=_plain(sizes),
            layout={
                "begin": begin,
                "end": end,
                "feature": feature,
                "code": first + 3,
                "features": 0,
                "grid": (side, side),
                "codes": sizes.codebook_size,
                "wrapper": first,
                "end_of_line": first + 1,
                "end_of_frame": first + 2,
            },
        )

    def _config(self, vision: dict[str, Any], sizes: Sizes, words: PreTrainedTokenizerBase) -> UniMMConfig:
        section, side = self.section, sizes.image_size // sizes.stride
        begin, end, feature, code = (words.convert_tokens_to_ids(name) for name in MARKS)
        decoder = dict(section.decoder or {})
        vocabulary = max(len(words), decoder.get("vocab_size", 0))
        if code is None or code == words.unk_token_id:  # an id beyond the text vocabulary will do
            code = vocabulary
        return UniMMConfig(
            decoder={**decoder, "vocab_size": vocabulary, **_special(words)},
            vision=vision,
            generation={
                "codes": sizes.codebook_size,
                "dim": sizes.codebook_dim,
                "image_size": sizes.image_size,
                "stride": sizes.stride,
                "places": section.places,
                "depth": section.code_depth,
                "head_width": section.code_head_width,
            },
            image_tokenizer=_plain(sizes),
            layout={
                "begin": begin,
                "end": end,
                "feature": feature,
                "code": code,
                "features": vision["tokens"] // vision["merge"] ** 2,
                "grid": (side, side),
            },
            connector_depth=section.connector_depth,
        )

    def build(self) -> UniMMModel:
        """The model: parts from nothing, or as they were trained."""
        if self.section.pretrained is not None:
            model = self._whole or _load(self.section.pretrained).model
            self._whole = None
        else:
            model = self._join()
        if self.section.initialize is not None:
            self._take_over(model, Path(self.section.initialize))
        return model

    def _join(self) -> UniMMModel:
        model = UniMMModel(self.config)
        assert model.image_tokenizer is not None and self.image_tokenizer is not None
        if self._vision_weights is not None:
            assert model.vision is not None
            model.vision.load_state_dict(self._vision_weights)
        model.image_tokenizer.load_state_dict(self.image_tokenizer.state_dict())
        if model.code_embedding is not None:  # codes start out as far apart as the tokenizer has them
            table = model.code_embedding.table.weight
            with torch.no_grad():
                table.copy_(self.image_tokenizer.vectors)
        if (folder := self.section.weights.get("decoder")) is not None:
            self._load_decoder(model.decoder, folder)
        return model

    def _load_decoder(self, decoder: nn.Module, folder: str) -> None:
        """Copy a language model's weights; rows of a larger vocabulary keep their random start."""
        try:
            with no_progress():
                found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise self.recipe.error("model.weights.decoder", f"{folder}: {line}") from None
        with torch.no_grad():
            for name, ours in decoder.state_dict().items():
                theirs = found.get(name)
                if theirs is None or theirs.shape[1:] != ours.shape[1:] or len(theirs) > len(ours):
                    shape = "nothing" if theirs is None else list(theirs.shape)
                    message = f"{folder}: {name}: expected {list(ours.shape)}, found {shape}"
                    raise self.recipe.error("model.weights.decoder", message)
                ours[: len(theirs)].copy_(theirs)

    def _take_over(self, model: UniMMModel, folder: Path) -> None:
        """Copy parts of an earlier export, once it is known that they fit and speak of the same codes."""
        error = self.recipe.error
        if not (folder / "config.json").exists():
            raise error("model.initialize", f"{folder} holds no exported model")
        earlier = UniMMModel.from_pretrained(folder, dtype=torch.float32)
        assert model.image_tokenizer is not None
        tokenizer = earlier.image_tokenizer
        if tokenizer is None or not _close(model.image_tokenizer.vectors, tokenizer.vectors):
            raise error(
                "model.initialize", f"{folder} has another image tokenizer than model.image_tokenizer"
            )
        ours, theirs = model.parts(), earlier.parts()
        for name in self.section.initialize_parts:
            if name not in ours:
                raise error("model.initialize_parts", f"{name!r}: expected some of {', '.join(ours)}")
            wanted = {key: tensor.shape for key, tensor in ours[name].state_dict().items()}
            given = theirs[name].state_dict() if name in theirs else {}
            if wanted != {key: tensor.shape for key, tensor in given.items()}:
                raise error("model.initialize", f"{folder} has another {name} than this recipe")
            ours[name].load_state_dict(given)


def _special(words: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids that a decoder's config names."""
    return {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def _plain(sizes: Sizes) -> dict[str, Any]:
    """An image tokenizer's config as plain values."""
    return {key: value for key, value in sizes.to_dict().items() if key != "_name_or_path"}


def _close(one: Tensor, two: Tensor) -> bool:
    """Whether two codebooks are the same but for the rounding of an export to 16 bits."""
    return one.shape == two.shape and torch.allclose(one, two, atol=1e-2)


def model_groups(model: UniMMModel, adapters: bool) -> dict[str, list[nn.Parameter]]:
    """Return what a stage's `lr` may name: one group for each part, and one for all adapters where there are any."""
    groups = {
        name: [weight for key, weight in part.named_parameters() if not is_adapter(key)]
        for name, part in model.parts().items()
    }
    if adapters:
        groups["lora"] = [weight for key, weight in model.named_parameters() if is_adapter(key)]
    return groups


def describe_model(recipe: UnifiedRecipe) -> UniMMModel:
    """Return the recipe's model on the meta device: every shape, no weights."""
    if recipe.model.pretrained is not None:
        whole: UniMMModel = _load(recipe.model.pretrained).model
        return whole
    assembly = Assembly(recipe, weights=False)
    with torch.device("meta"):
        return UniMMModel(assembly.config)


def tiny_model(section: dict[str, Any]) -> dict[str, Any]:
    """A `model` section of the same make as this one, of tiny parts with random weights."""
    decoder = section.get("decoder") or {"model_type": "llama"}
    tiny: dict[str, Any] = {
        "decoder": {
            "model_type": decoder.get("model_type", "llama"),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
        },
        "image_tokenizer": {
            "image_size": 64,
            "patch_size": 4,
            "block_out_channels": [8, 16],
            "norm_num_groups": 4,
            "latent_channels": 8,
            "codebook_size": 32,
            "codebook_dim": 4,
        },
        "text_tokenizer": EMBEDDED,
    }
    if section.get("shared"):
        return {**tiny, "shared": True}
    width = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    sizes = {"image_size": 64, "tokens": 64, "width": 16, "kwargs": width}
    return {**tiny, "vision": {"name": "vit_base_patch16_siglip_224", **sizes}}
