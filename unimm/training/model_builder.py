"""What a unified model is assembled from for training: the `model` section of a recipe, its files and weights.

Either a whole model that `unimm.load` takes (`pretrained`), or its parts, each from nothing, from an earlier
run's export, or with published weights. `describe_model` needs no weights, so that a run can be planned without.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from unimm.console import no_progress
from unimm.data.tables.settings import TABLE_SOURCE
from unimm.data.tables.text import table_tokenizer
from unimm.errors import UserError, UserNote
from unimm.families.image_tokenizers import load_image_tokenizer
from unimm.files import open_regular, read_json, settled
from unimm.loading import load_whole
from unimm.locate import EMBEDDED, embedded_model, locate
from unimm.models.configuration import ImageTokenizerSizes, UniMMConfig, read_image_tokenizer
from unimm.models.former import VisionConfig
from unimm.models.lora import is_adapter
from unimm.models.modeling import UniMMModel
from unimm.models.weights import check_finite, refuse
from unimm.processing.processor import UniMMProcessor, read_tokenizer
from unimm.sections import read_dataclass
from unimm.training.sides import check_sides
from unimm.training.tokens import renew_tokens

if TYPE_CHECKING:
    from unimm.training.tasks.unified import UnifiedRecipe

IMAGE_TOKENS = ("<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<image>")


def read_vision(folder: Path, merge: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the vision section of a `UniMMConfig` and the encoder's weights, from a `siglip` export."""
    try:
        section = read_json(settled(folder) / "vision.json")
        weights = load_file(folder / "vision.safetensors")
    except (UserError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: no export of a siglip run ({error}); train the encoder first") from None
    return {**section, "merge": merge}, _tower(weights)


def _tower(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a timm encoder as those of a `VisionTower`; its pooling head serves the contrastive loss only."""
    return {f"model.{key}": value for key, value in weights.items() if not key.startswith("attn_pool.")}


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
        self.renewed: list[int] = []  # tokens whose rows `build` gave new values
        self.image_tokenizer: Any = None
        self._vision_weights: dict[str, Tensor] | None = None
        if self.section.pretrained is not None and not weights:
            with locate(self.section.pretrained, weights=False) as checkpoint:
                self.config, self.processor = checkpoint.config, checkpoint.processor
        elif self.section.pretrained is not None:
            um = load_whole(self.section.pretrained)
            self.config, self.processor, self._whole = um.model.config, um.processor, um.model
            self.image_tokenizer = copy.deepcopy(um.model.image_tokenizer)
        else:
            self._describe(weights)
        check_sides(recipe, self.processor)

    def _describe(self, weights: bool) -> None:
        """Say what the parts are, and read those that are not made by `build`."""
        vision: dict[str, Any] | None = None
        sizes: ImageTokenizerSizes | None = None
        if self.section.vision is not None:
            vision, self._vision_weights = self._vision(weights)
        if self.section.image_tokenizer is not None:
            sizes = self._image_tokenizer(weights)
        text_tokenizer = self._text_tokenizer(weights)
        if self.section.shared:
            assert sizes is not None
            self.config = self._shared(sizes, text_tokenizer)
        else:
            self.config = self._config(vision, sizes, text_tokenizer)
        self.processor = UniMMProcessor(self.config, text_tokenizer)

    def _vision(self, weights: bool) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        section = self.section
        if isinstance(section.vision, str):
            return read_vision(Path(section.vision), section.merge)
        assert section.vision is not None
        path = section.weights.get("vision") if weights else None
        if path is None:
            return {**section.vision, "merge": section.merge}, None
        file = settled(path)
        file = file / "model.safetensors" if file.is_dir() else file
        try:
            open_regular(file).close()
            found = load_file(file)
        except UserError as error:
            raise self.recipe.error("model.weights.vision", str(error)) from None
        except (OSError, SafetensorError) as error:
            raise self.recipe.error("model.weights.vision", f"{file}: not readable ({error})") from None
        return {**section.vision, "merge": section.merge}, _tower(found)

    def _image_tokenizer(self, weights: bool) -> ImageTokenizerSizes:
        section = self.section
        path = section.image_tokenizer
        if isinstance(path, dict):
            sizes: ImageTokenizerSizes = read_image_tokenizer(path)
            if not weights:
                return sizes
            path = section.weights.get("image_tokenizer")
            if path is None:
                self.image_tokenizer = nn.Module.eval(AutoModel.from_config(sizes))
                return sizes
        assert path is not None
        if path == EMBEDDED:
            whole: Any = load_whole(EMBEDDED).image_tokenizer
            self.image_tokenizer = whole.eval()
            return whole.config  # type: ignore[no-any-return]
        if not (settled(path).is_file() or (Path(path) / "config.json").exists()):
            message = f"{path} holds no image tokenizer; train it first"
            raise self.recipe.error("model.image_tokenizer", message)
        self.image_tokenizer = nn.Module.eval(load_image_tokenizer(path))
        return self.image_tokenizer.config  # type: ignore[no-any-return]

    def _text_tokenizer(self, weights: bool) -> PreTrainedTokenizerBase:
        section = self.section
        name = section.text_tokenizer or str(section.vision)
        if name == TABLE_SOURCE:
            return table_tokenizer(self.recipe.data.tables)
        folder = locate(name).folder if name == EMBEDDED else settled(name)
        if not folder.is_dir() and not weights:
            folder = embedded_model()  # the decoder's config knows the size of the right one
        if not folder.is_dir():
            raise self.recipe.error("model.text_tokenizer", f"{folder}: no such folder")
        text_tokenizer = read_tokenizer(folder)
        for token in IMAGE_TOKENS[:3] if section.understanding is None else ():
            if text_tokenizer.convert_tokens_to_ids(token) in (None, text_tokenizer.unk_token_id):
                raise self.recipe.error("model.text_tokenizer", f"{folder} has no token {token}")
        return text_tokenizer

    def _shared(self, sizes: ImageTokenizerSizes, text_tokenizer: PreTrainedTokenizerBase) -> UniMMConfig:
        """Describe a model whose codes, and what else an image needs, are tokens after those of the text tokenizer."""
        side, first = sizes.image_size // sizes.stride, len(text_tokenizer)
        begin, end, feature = (text_tokenizer.convert_tokens_to_ids(name) for name in IMAGE_TOKENS[:3])
        area = sizes.image_size**2
        decoder = dict(self.section.decoder or {})
        return UniMMConfig(
            decoder={
                **decoder,
                "vocab_size": max(first + 3 + sizes.codebook_size, decoder.get("vocab_size", 0)),
                **_special(text_tokenizer),
            },
            generation={
                "codes": sizes.codebook_size,
                "dim": getattr(sizes, "codebook_dim", 0),
                "image_size": sizes.image_size,
                "stride": sizes.stride,
                "shared": True,
            },
            views={"kind": "area", "least": area, "most": area, "stride": sizes.stride},
            encoder={"kind": "codes"},
            image_tokenizer=_plain(sizes),
            layout={
                "begin": begin,
                "end": end,
                "feature": feature,
                "code": first + 3,
                "grid": (side, side),
                "codes": sizes.codebook_size,
                "wrapper": first,
                "end_of_line": first + 1,
                "end_of_frame": first + 2,
            },
        )

    def _config(
        self,
        vision: dict[str, Any] | None,
        sizes: ImageTokenizerSizes | None,
        text_tokenizer: PreTrainedTokenizerBase,
    ) -> UniMMConfig:
        """Describe a model with an encoder, with codes of their own, or with both."""
        side = 1 if sizes is None else sizes.image_size // sizes.stride  # 1: nothing is drawn
        section = self.section
        image: dict[str, Any] = {}
        size, extra = len(text_tokenizer), 0
        if section.understanding is not None:  # before the vocabulary is counted
            image, extra = section.understanding.layout(text_tokenizer), section.understanding.extra_tokens
            if extra and (added := len(text_tokenizer) - size) > extra:
                message = f"expected at least {added}, the tokens that the text tokenizer lacks, got {extra}"
                raise self.recipe.error("model.understanding.extra_tokens", message)
        begin, end, feature, code = (text_tokenizer.convert_tokens_to_ids(name) for name in IMAGE_TOKENS)
        decoder = dict(section.decoder or {})
        vocabulary = max(size if extra else len(text_tokenizer), decoder.get("vocab_size", 0))
        if code is None or code == text_tokenizer.unk_token_id:  # an id beyond the text vocabulary will do
            code = vocabulary + extra
        seen: dict[str, Any] = {"connector": {"kind": "mlp", "depth": section.connector_depth}}
        if section.understanding is not None:
            seen = section.understanding.parts(text_tokenizer)
        elif vision is not None:
            seen |= read_dataclass(VisionConfig, vision, "", "vision").parts()
        return UniMMConfig(
            decoder={**decoder, "vocab_size": vocabulary, **_special(text_tokenizer)},
            **seen,
            extra_tokens=extra,
            generation=None if sizes is None else self._generation(sizes),
            image_tokenizer=None if sizes is None else _plain(sizes),
            layout={
                "begin": begin,
                "end": end,
                "feature": feature,
                "code": code,
                "grid": (side, side),
                **image,
            },
        )

    def _generation(self, sizes: Any) -> dict[str, Any]:
        """Describe codes of their own."""
        section = self.section
        return {
            "codes": sizes.codebook_size,
            "dim": sizes.codebook_dim,
            "image_size": sizes.image_size,
            "stride": sizes.stride,
            "places": section.learned_positions,
            "depth": section.code_depth,
            "head_width": section.code_head_width,
        }

    def build(self) -> UniMMModel:
        """The model: parts from nothing, or as they were trained."""
        if self.section.pretrained is not None:
            model = self._whole or load_whole(self.section.pretrained).model
            self._whole = None
        else:
            model = self._join()
        if self.section.initialize is not None:
            source = self.section.initialize
            self._take_over(model, embedded_model() if source == EMBEDDED else Path(source))
        if self.section.renew_tokens:
            self.renewed = self._renew(model)
        if self.section.sampling is not None:
            sampling = model.config.sampling_config().updated(**self.section.sampling.model_dump())
            model.config.sampling = dataclasses.asdict(sampling)
        return model

    def _renew(self, model: UniMMModel) -> list[int]:
        """Give tokens that were never trained new values, and say how many.

        Raises:
            UserError: adapters would hold the tokens' rows, and ZeRO 3 the shards of the table they lie in.
        """
        if self.recipe.lora is not None and self.recipe.zero_stage == 3:
            message = "does not go with lora and ZeRO stage 3; use stage 2, or leave one of them out"
            raise self.recipe.error("model.renew_tokens", message)
        text_tokenizer = self.processor.tokenizer
        # Special tokens stay: blanked prompts are spelt in one, and the stream is marked by others.
        special = {*text_tokenizer.all_special_ids, *text_tokenizer.get_added_vocab().values()}
        renewed = renew_tokens(model, special, self.recipe.seed)
        size = model.decoder.config.vocab_size
        note = f"model.renew_tokens: {len(renewed)} of {size} tokens were never trained; they start anew"
        warnings.warn(note, UserNote, stacklevel=3)
        return renewed

    def _join(self) -> UniMMModel:
        model = UniMMModel(self.config)
        if self._vision_weights is not None:
            assert model.vision is not None
            model.vision.load_state_dict(self._vision_weights)
        if model.image_tokenizer is not None:
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
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
                )
            model, report = loaded
            refuse(folder, missing=report["missing_keys"])
            check_finite(model, folder)
        except UserError as error:
            raise self.recipe.error("model.weights.decoder", str(error)) from None
        except (OSError, ValueError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0]
            raise self.recipe.error("model.weights.decoder", f"{folder}: {line}") from None
        found = model.state_dict()
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
        one, two = model.image_tokenizer, earlier.image_tokenizer
        if one is not None and two is not None and not _close(one.vectors, two.vectors):
            raise error(
                "model.initialize", f"{folder} has another image tokenizer than model.image_tokenizer"
            )
        ours, theirs = model.parts(), earlier.parts()
        for name in self.section.initialize_parts or ours:
            if name not in ours:
                raise error("model.initialize_parts", f"{name!r}: expected some of {', '.join(ours)}")
            if name not in theirs:
                message = f"{folder} has no {name}; name the parts to take in initialize_parts"
                raise error("model.initialize", message)
            wanted = {key: tensor.shape for key, tensor in ours[name].state_dict().items()}
            given = theirs[name].state_dict()
            if wanted != {key: tensor.shape for key, tensor in given.items()}:
                raise error("model.initialize", f"{folder} has another {name} than this recipe")
            ours[name].load_state_dict(given)


def _special(text_tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids that a decoder's config names."""
    return {f"{name}_token_id": getattr(text_tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def _plain(sizes: ImageTokenizerSizes) -> dict[str, Any]:
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
    """Return the recipe's model on the meta device: every shape, no weights.

    Raises:
        UserError: a part is missing, or the recipe asks for what the model lacks.
    """
    assembly = Assembly(recipe, weights=False)
    with torch.device("meta"):
        return UniMMModel(assembly.config)
