"""What unimm knows of a published architecture: `Family`, and `FAMILIES`, which finds it by its `model_type`.

A family is a module of this folder that holds one object, `FAMILY`, and one line of `REGISTRY`. It is imported when a
checkpoint of its kind is opened; this module imports neither a family nor torch.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from unimm.errors import UserError
from unimm.families.namesakes import namesake

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from unimm.families.keymap import KeyMap
    from unimm.families.source import Checkpoint
    from unimm.models.configuration import UniMMConfig
    from unimm.processing.processor import UniMMProcessor

PARAMS_FILE = "params.json"  # of an original layout, in the place of config.json
LAYOUTS = ("unimm", "transformers", "original")
OWN = "unimm"  # of these, ours


@dataclasses.dataclass(frozen=True)
class SeparateImageTokenizer:
    """An image tokenizer that a layout has in a folder, and on the hub in a repository, of its own.

    Attributes:
        prefix: what its tensors' names begin with here.
        folder: its name, in the model's folder or beside it.
        hub_id: the repository that it is fetched from.
        model_type: of its `config.json`.
    """

    prefix: str
    folder: str
    hub_id: str
    model_type: str

    def find(self, folder: Path) -> Path | None:
        """Return its folder, in a model's or beside it; None if it is in neither."""
        places = (folder / self.folder, folder.parent / self.folder)
        return next((place for place in places if place.is_dir()), None)


class Writer(ABC):
    """Writes models that do not come from a layout of its family into it; the weights apart, which need a key map.

    Attributes:
        keys: by layout, the set of names that tensors get, where a layout has had several; None: that of the source.
    """

    keys: ClassVar[Mapping[str, str] | None] = None

    @abstractmethod
    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """Check that a layout has a place for all that a model has.

        Args:
            config: the model.
            processor: its processor.
            layout: `original` or `transformers`.
            where: the model's folder, for errors.

        Raises:
            UserError: a line that names what there is no place for.
        """

    @abstractmethod
    def write(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """Write the files beside the weights: configuration, text tokenizer, processor, generation config.

        Args:
            config: a model that `check` let pass.
            processor: its processor.
            folder: where to write; a separate image tokenizer's folder is there in it.
            layout: `original` or `transformers`.
        """

    def tensors(self, config: UniMMConfig, layout: str) -> dict[str, Tensor]:
        """Return what a layout's weights have beyond a model of ours, and nothing looks at."""
        return {}


class Family(ABC):
    """A published architecture: how its checkpoints are read as models of ours, and, where it can, written.

    Only reading is needed. A family without a `writer` is still written back into a layout that a checkpoint came
    from, by the files that a conversion keeps; into another it is refused in a line.

    Attributes:
        name: what `unimm info` calls it.
        title: its name in sentences.
        sampling: fields of `SamplingConfig`, how its models draw where a checkpoint does not say; empty: as its
            configuration says, or it draws nothing.
        needs: keys of `UniMMConfig` that a model must have to be written in its layouts, such as `generation`.
        image_tokenizers: by layout, the image tokenizer that the layout has apart.
        weight_files: by layout, the one file that it has weights in, where that is not as transformers has it.
        shard_axes: by layout, the axis that a tensor is cut along, by its name, where files hold slices
            (`unimm.families.shards`); None: it is whole in each.
        writer: writes models of other layouts; None: there is no such thing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    sampling: ClassVar[Mapping[str, Any]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    image_tokenizers: ClassVar[Mapping[str, SeparateImageTokenizer]] = {}
    weight_files: ClassVar[Mapping[str, str]] = {}
    shard_axes: ClassVar[Mapping[str, Callable[[str], int | None]]] = {}
    writer: ClassVar[Writer | None] = None

    @abstractmethod
    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what a checkpoint is made of, as fields of `UniMMConfig`, without `conversation` and `sampling`.

        Raises:
            UserError: a line that names the file and field that is missing or not supported.
        """

    @abstractmethod
    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the turns that a checkpoint was trained on: by its chat template, or else its family's own way.

        Args:
            checkpoint: the checkpoint.
            parts: what `parts` returned.

        Returns:
            Fields of `Turns`, None for unimm's own.

        Raises:
            UserError: its template cannot be followed, or a file that names its turns is wrong.
        """

    @abstractmethod
    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map between the tensors of a layout and ours, for a model of this configuration."""

    def text_tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """Build a checkpoint's text tokenizer, by default from the files that transformers knows.

        Raises:
            UserError: they cannot be read.
        """
        from unimm.processing.processor import read_tokenizer

        return read_tokenizer(checkpoint.folder, checkpoint.document)

    def layout_of(self, document: Mapping[str, Any]) -> str | None:
        """Return the layout that a `config.json` is in; None where its `model_type` alone says it."""
        return None

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model of ours is of this architecture, so that its layouts are the ones to write it in."""
        return False

    def missing(self, config: UniMMConfig) -> list[str]:
        """Return which of `needs` a model does not have; what lies in one that is missing is not named too."""
        found: list[str] = []
        for key in self.needs:
            section, _, field = key.partition(".")
            value = getattr(config, section)
            if section not in found and (not value if not field else (value or {}).get(field) is None):
                found.append(key)
        return found


@dataclasses.dataclass(frozen=True)
class Registered:
    """A family that can be imported.

    Attributes:
        module: its module in this folder, which holds it as `FAMILY`.
        models: its models' names, in sentences.
        layouts: the layout that each `model_type` of a `config.json` stands for.
        image_tokenizer: the `model_type` of an image tokenizer that it publishes apart.
    """

    module: str
    models: str
    layouts: Mapping[str, str]
    image_tokenizer: str | None = None

    def family(self) -> Family:
        """Import the family."""
        family: Family = import_module(f"unimm.families.{self.module}").FAMILY
        return family


REGISTRY = (
    Registered("own", "unimm", {"unimm": OWN}),
    Registered("janus", "Janus, Janus-Pro", {"janus": "transformers", "multi_modality": "original"}),
    Registered("emu3", "Emu3", {"emu3": "transformers", "Emu3": "original"}, "Emu3VisionVQ"),
    Registered("pixtral", "Pixtral", {"llava": "transformers", "pixtral_params": "original"}),
    Registered("qwen2_vl", "Qwen2-VL", {"qwen2_vl": "transformers"}),
    Registered("aria", "Aria", {"aria": "transformers"}),
    Registered("fuyu", "Fuyu", {"fuyu": "transformers"}),
    Registered("nvlm", "NVLM-D", {"NVLM_D": "original"}),
    Registered("molmo", "Molmo", {"molmo": "original"}),
    Registered("llama_vision", "Llama 3.2 Vision", {"mllama": "transformers", "mllama_params": "original"}),
)
PARAMS_KINDS = {"vision_chunk_size": "mllama_params", "vision_encoder": "pixtral_params"}
"""Key of a `params.json`, which says no `model_type`: the kind that it stands for."""
FAMILIES = {kind: registered for registered in REGISTRY for kind in registered.layouts}
"""By `model_type`."""


def recognise(document: Mapping[str, Any], where: Path) -> tuple[Family, str]:
    """Return the family that a `config.json` is of, and its layout (one of `LAYOUTS`).

    Args:
        document: what stands in it.
        where: the file, for errors.

    Raises:
        UserError: it is of a kind that is not supported.
    """
    kind = document.get("model_type")
    if kind is None and where.name == PARAMS_FILE:
        kind = next((own for key, own in PARAMS_KINDS.items() if key in document), None)
    if (other := namesake(document)) is not None:
        *names, last = (registered.models for registered in REGISTRY[1:])
        known = f"{', '.join(names)} and {last} are"
        raise UserError(f"{where}: a checkpoint of {other}, which is not supported; {known}")
    if isinstance(kind, str) and kind in (registered.image_tokenizer for registered in REGISTRY):
        raise UserError(f"{where}: an image tokenizer alone; name the model that it belongs to")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type: {kind!r} is not supported; known are {known}")
    family = FAMILIES[kind].family()
    return family, family.layout_of(document) or FAMILIES[kind].layouts[kind]


def family_of(config: UniMMConfig) -> Family:
    """Return the family whose layouts a model of ours may be written in: its own, or one that it fits.

    Raises:
        UserError: there is none.
    """
    # Janus and Emu3 hold whatever draws as they do: those that are told by their encoders come first
    for registered in sorted(REGISTRY, key=lambda one: one.module in ("janus", "emu3")):
        family = registered.family()
        if config.family == family.name or (config.family is None and family.holds(config)):
            return family
    raise UserError("--to: this model is of no published architecture; the layout unimm holds it")
