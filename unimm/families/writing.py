"""What the writers of families that understand images have in common.

Configurations and processors are made by transformers' own classes. What was written is read again before it is given
away: a model that a layout cannot say comes back another, and is refused in a line.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedTokenizerBase

from unimm.errors import UserError
from unimm.families.family import Writer
from unimm.families.source import PREPROCESSOR_FILE, Checkpoint
from unimm.families.written_template import chat_template
from unimm.files import read_json, write_json
from unimm.models.configuration import UniMMConfig
from unimm.models.encoders import foreign_config
from unimm.models.parts import AreaViewsConfig, TransformersEncoderConfig
from unimm.processing.messages import SHOWN, Message
from unimm.processing.processor import UniMMProcessor, read_tokenizer
from unimm.sections import show

PARTS = ("views", "encoder", "reducer", "connector", "fusion", "positions")
_UNSAID = (
    "dtype",
    "transformers_version",
    "architectures",
    "use_cache",
    "_name_or_path",
)  # of no consequence


class UnderstandingWriter(Writer):
    """Writes models that understand images and draw none.

    Attributes:
        title: the family's name in sentences.
        extra_tokens: how many rows its embedding has that the head lacks.
    """

    title: ClassVar[str]
    extra_tokens: ClassVar[int] = 0
    keys: ClassVar[Mapping[str, str] | None] = {}

    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """Check that nothing is beyond what these layouts have at all."""
        foreign = {
            "generation": config.generation is not None,
            "image_tokenizer": config.image_tokenizer is not None,
            "extra_tokens": config.extra_tokens != self.extra_tokens,
        }
        if found := [name for name, present in foreign.items() if present]:
            raise UserError(f"--to: {self.title}'s layouts have no place for this model's {', '.join(found)}")

    def write(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """Write the files beside the weights, and read them again."""
        self.write_files(config, processor, folder, layout)
        with Checkpoint(folder) as checkpoint:
            _compare(config, processor, checkpoint, self.title)

    @abstractmethod
    def write_files(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """Write the files beside the weights; arguments as those of `write`."""


def token_name(processor: UniMMProcessor, token: int | None) -> str:
    """Return how a token is written; "" for none."""
    return "" if token is None else str(processor.tokenizer.convert_ids_to_tokens(token))


def template_of(processor: UniMMProcessor, placeholder: str) -> str:
    """Return the chat template of a processor: its own, or one that writes its turns, the begin token before them."""
    template = chat_template(processor, placeholder, "\n\n", images_first=False)
    turns = processor.turns
    return (
        template if turns.template is not None or turns.bos != "first" else "{{- bos_token -}}\n" + template
    )


def write_tokenizer(
    processor: UniMMProcessor, folder: Path, names: dict[str, str], template: str | None = None
) -> PreTrainedTokenizerBase:
    """Write a text tokenizer, and return it as transformers reads it.

    Args:
        processor: whose.
        folder: where to.
        names: of tokens that transformers' processor asks it for, such as `image_token`.
        template: what stands beside it; None: nothing does.
    """
    processor.tokenizer.chat_template = None
    processor.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    more: dict[str, Any] = {"extra_special_tokens": names} if names else {}
    if template is not None:
        more["chat_template"] = template
    if more:
        write_json(path, read_json(path) | more)
    return read_tokenizer(folder)


def write_generation(processor: UniMMProcessor, folder: Path) -> None:
    """Write where answers end."""
    ends = processor.end_tokens
    GenerationConfig(
        bos_token_id=processor.bos,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=processor.pad,
    ).save_pretrained(folder)


def write_images(folder: Path, kind: str, processor: str, options: dict[str, Any]) -> None:
    """Write the options of an image processor as published folders have them."""
    write_json(
        folder / PREPROCESSOR_FILE, {"image_processor_type": kind, "processor_class": processor, **options}
    )


def needs_token(processor: UniMMProcessor, token: int | None, wanted: str, title: str) -> None:
    """Refuse a model whose text tokenizer calls a token otherwise than a layout does.

    Raises:
        UserError: it does.
    """
    if token is not None and (name := token_name(processor, token)) != wanted:
        raise UserError(
            f"--to: {title}'s layouts call {wanted} what this model's text tokenizer calls {name}"
        )


def _compare(config: UniMMConfig, processor: UniMMProcessor, again: Checkpoint, title: str) -> None:
    """Refuse what was not read again as it was written."""
    read = again.config
    for name in PARTS:
        if _said(config.part(name)) != _said(read.part(name)):
            raise UserError(
                f"--to: {title}'s layouts have no place for this model's {name}: {config.part(name)}"
            )
    ours, theirs = _decoder(config), _decoder(read)
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"--to: {title}'s layouts have no place for this model's decoder.{name}: {show(ours.get(name))}"
            )
    if _conversations(processor) != _conversations(again.processor):
        raise UserError(f"--to: {title}'s layouts cannot say how this model's conversations are written")


def _said(part: Any) -> Any:
    """A part with what it is by default, as far as that changes anything."""
    if isinstance(part, TransformersEncoderConfig):
        fields = foreign_config(part.name, part.kwargs).to_dict()
        return {name: value for name, value in fields.items() if name not in _UNSAID}
    if isinstance(part, AreaViewsConfig):
        return dataclasses.replace(
            part, frame_least=part.frame_least or part.least, frame_most=part.frame_most or part.most
        )
    return part


def _decoder(config: UniMMConfig) -> dict[str, Any]:
    fields = config.decoder_config().to_dict()
    unsaid = (*_UNSAID, "bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: value for name, value in fields.items() if name not in unsaid and value is not None}
    found["rope_parameters"] = {
        name: value for name, value in found["rope_parameters"].items() if name != "type"
    }
    return found


def _conversations(processor: UniMMProcessor) -> list[list[int]]:
    """The tokens of some conversations."""
    grid = processor.image_grid
    shown, asked = Message("user", (SHOWN, "what is it?")), Message("user", ("and now",))
    chats = [[shown], [asked], [shown, Message("assistant", ("an apple",)), asked]]
    return [
        processor.conversation.write(chat, [grid] * (chat[0] is shown), learn=False).ids for chat in chats
    ]
