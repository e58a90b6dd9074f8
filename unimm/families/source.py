"""A checkpoint's folder, opened once: `Checkpoint`, which everything that reads a model is handed.

Each of its files is read when it is first asked for, and not again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unimm.errors import UserError
from unimm.families.documents import ImageOptions
from unimm.families.family import PARAMS_FILE, Family, SeparateImageTokenizer, recognise
from unimm.families.generation_config import read_end_tokens, read_sampling
from unimm.families.shards import ShardedFiles, sharded_files
from unimm.families.tensors import NoWeightsError, WeightFiles, weight_files
from unimm.files import read_json, read_optional, settled
from unimm.models.configuration import UniMMConfig
from unimm.processing.processor import GENERATION_FILE, PROCESSOR_FILE, UniMMProcessor
from unimm.processing.tokenizer_files import check_placeholders, check_vocabulary, complete
from unimm.sections import FieldError, validate

MODEL_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
HALF = (0.5, 0.5, 0.5)


class Checkpoint:
    """A checkpoint of any layout; a context manager where its tensors are read, since `.bin` files stay mapped.

    Args:
        folder: holds `config.json`, or an original layout's `params.json`.
        image_tokenizer: the folder of a separate image tokenizer, if it is neither in `folder` nor beside it.

    Attributes:
        folder: the folder.
        image_tokenizer: as given, until what is apart is looked for.
        given_shapes: its tensors on the meta device, where they are known though the weights are not here.
        path: its `config.json` or `params.json`.

    Raises:
        UserError: by everything that reads a file, if it is missing, broken or not supported.
    """

    def __init__(self, folder: Path, image_tokenizer: Path | None = None) -> None:
        self.folder = settled(folder)
        self.image_tokenizer = image_tokenizer
        self.path = self.folder / MODEL_FILE
        if not self.path.exists() and (self.folder / PARAMS_FILE).exists():
            self.path = self.folder / PARAMS_FILE
        self.given_shapes: Mapping[str, Tensor] | None = None
        self._documents: dict[Path, dict[str, Any]] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        if "tensors" in self.__dict__:  # they were asked for
            self.tensors.__exit__()

    # --- what it is -----------------------------------------------------------------------------------------

    @cached_property
    def document(self) -> dict[str, Any]:
        """What stands in its `config.json` or `params.json`."""
        return read_json(self.path)

    @cached_property
    def _recognised(self) -> tuple[Family, str]:
        return recognise(self.document, self.path)

    @property
    def family(self) -> Family:
        """The family that it is of."""
        return self._recognised[0]

    @property
    def layout(self) -> str:
        """The layout that it is in, one of `LAYOUTS`."""
        return self._recognised[1]

    # --- its folders and files ------------------------------------------------------------------------------

    @property
    def separate(self) -> SeparateImageTokenizer | None:
        """What its layout has apart."""
        return self.family.image_tokenizers.get(self.layout)

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Its folder and those of what is apart, by the prefix that their tensors' names get."""
        found = {"": self.folder}
        if (separate := self.separate) is None:
            return found
        place = self.image_tokenizer or separate.find(self.folder)
        if place is None:
            raise UserError(
                f"{self.folder}: {self.family.title}'s {self.layout} layout needs its vision tokenizer; put "
                f"{separate.folder} in that folder or beside it, or name its folder or hub id (image_tokenizer=, "
                "--image-tokenizer)"
            )
        found[separate.prefix] = place
        path = place / MODEL_FILE
        self._documents[path] = read_json(path)
        if (kind := self._documents[path].get("model_type")) != separate.model_type:
            raise UserError(
                f"{path}: model_type: {kind!r}; the vision tokenizer of {self.family.title} is "
                f"{separate.model_type!r}"
            )
        return found

    def json(self, name: str, prefix: str = "") -> dict[str, Any]:
        """Return a small JSON file beside its weights, an empty object if there is none; no one may change it.

        Args:
            name: the file.
            prefix: of the folder that it is in, one of `folders`.
        """
        if name == MODEL_FILE and not prefix:
            return self.document
        path = (self.folders[prefix] if prefix else self.folder) / name
        if path not in self._documents:
            self._documents[path] = read_optional(path)
        return self._documents[path]

    def image_options(self, key: str | None = None) -> tuple[dict[str, Any], Path]:
        """Return how images to understand are prepared, and the file that says so.

        Args:
            key: what the right document has, where some folders have one of these files for another purpose.

        Returns:
            The options of `preprocessor_config.json`, or those of the image processor in `processor_config.json`, or
            none; what is null is left out. The first of `folders` that has them decides.
        """
        for prefix, folder in self.folders.items():
            inner = self.json(PROCESSOR_FILE, prefix).get("image_processor")
            found = (
                (folder / PREPROCESSOR_FILE, "", self.json(PREPROCESSOR_FILE, prefix)),
                (folder / PROCESSOR_FILE, "image_processor", inner),
            )
            for path, within, options in found:
                if options and (not isinstance(options, dict) or key is None or key in options):
                    validate(ImageOptions, options, str(path), within)
                    return {name: value for name, value in options.items() if value is not None}, path
        return {}, self.folder / PREPROCESSOR_FILE

    # --- its weights ----------------------------------------------------------------------------------------

    @cached_property
    def own_weight_files(self) -> list[Path]:
        """The files of weights in its own folder."""
        if self.layout in self.family.shard_axes and (found := sharded_files(self.folder)):
            return found
        return weight_files(self.folder)

    @cached_property
    def tensors(self) -> WeightFiles | ShardedFiles:
        """Its tensors, until the block that it is the manager of ends."""
        axis = self.family.shard_axes.get(self.layout)
        if axis is not None and sharded_files(self.folder):
            return ShardedFiles(self.own_weight_files, axis)
        files = {
            prefix: weight_files(place) if prefix else self.own_weight_files
            for prefix, place in self.folders.items()
        }
        return WeightFiles(files)

    @cached_property
    def shapes(self) -> Mapping[str, Tensor]:
        """Its tensors on the meta device; none where there are no weights."""
        if self.given_shapes is not None:
            return self.given_shapes
        try:
            return self.tensors.shapes
        except NoWeightsError:
            return {}

    # --- as ours --------------------------------------------------------------------------------------------

    @cached_property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """Its text tokenizer."""
        return self.family.text_tokenizer(self)

    @cached_property
    def config(self) -> UniMMConfig:
        """Our configuration of it."""
        family = self.family
        try:
            parts = family.parts(self)
            parts["conversation"] = family.conversation(self, parts)
            if family.sampling:
                path = self.folder / GENERATION_FILE
                parts["sampling"] = read_sampling(self.json(GENERATION_FILE), family.sampling, path)
            config = UniMMConfig(**{"family": family.name, **parts} if family.name != "unimm" else parts)
        except FieldError as error:
            raise UserError(f"{self.path}: {error}") from None
        except UserError:
            raise
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            # a field of the wrong kind
            raise UserError(f"{self.path}: {' '.join(str(error).split())}") from None
        return config

    @cached_property
    def processor(self) -> UniMMProcessor:
        """Our processor of it, on its own text tokenizer."""
        config = self.config
        text_tokenizer = complete(self.text_tokenizer, config.decoder)
        begins = (config.conversation or {}).get("bos") != "never"
        check_vocabulary(text_tokenizer, config.vocabulary, self.folder, begins)
        processor = UniMMProcessor(config, text_tokenizer)
        if not (layout := processor.layout).shared:
            placeholders = {"feature": layout.feature, "code": layout.code}
            placeholders |= {} if layout.video is None else {"video": layout.video}
            check_placeholders(text_tokenizer, placeholders, processor.turns.words(), self.folder)
        path = self.folder / GENERATION_FILE
        processor.end_answers_at(read_end_tokens(self.json(GENERATION_FILE), len(text_tokenizer), path))
        return processor


def normalisation(options: Mapping[str, Any], where: Path, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean and deviation, one for each channel, that bring pixels of [0, 1] to a model's input.

    They may be given as one for all channels. Rescaling by another factor than 1/255, or not at all, and normalising
    or not, all come to these two.

    Args:
        options: what `Checkpoint.image_options` returned.
        where: the file that they are from.
        fixed: options that are always as here, by their names; others are not supported.

    Raises:
        UserError: an option is of a value that is not supported; the line names the file and the option.
    """
    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise UserError(f"{where}: {name}: {options[name]!r} is not supported, only {value!r}")
    factor = options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1.0
    scale = 1.0 if math.isclose(255 * factor, 1) else 255 * factor  # from [0, 1] to what is normalised
    given = (options.get(f"image_{name}") for name in ("mean", "std"))
    mean, std = ((value,) * 3 if isinstance(value, int | float) else tuple(value or HALF) for value in given)
    if not options.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return {"mean": tuple(value / scale for value in mean), "std": tuple(value / scale for value in std)}
