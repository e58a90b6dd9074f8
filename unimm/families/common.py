"""What families of published models that understand images have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from unimm.errors import UserError
from unimm.families.source import Checkpoint
from unimm.families.templates import follow, processor_template, tokenizer_template
from unimm.models.turns import Turns

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNDRAWN = (1, 1)  # grid of drawings where nothing is drawn
CHATML = Turns(
    user="<|im_start|>user\n",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    bos="never",
)


def decoder_of(config: PreTrainedConfig, kind: Any, **changes: Any) -> dict[str, Any]:
    """Return a decoder's config as fields of another kind that has the same layers.

    Args:
        config: the published one.
        kind: the class of the other.
        **changes: fields that are not as there.
    """
    known = kind().to_dict().keys() - {"architectures", "transformers_version"}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    options = {**fields, "model_type": kind.model_type, **changes}
    return {name: value for name, value in options.items() if value is not None}


def special_token(tokenizer: PreTrainedTokenizerBase, token: str, where: Path) -> int:
    """Return the id of a special token.

    Raises:
        UserError: the text tokenizer has none of that name.
    """
    number = tokenizer.get_added_vocab().get(token)
    if number is None:
        raise UserError(f"{where}: the text tokenizer has no special token {token}")
    return int(number)


def followed(checkpoint: Checkpoint, base: Turns, placeholder: str) -> dict[str, Any]:
    """Return the turns of a checkpoint's chat template, or, where it has none, those of its family.

    Args:
        checkpoint: the checkpoint.
        base: the family's turns.
        placeholder: what a template writes for an image.

    Raises:
        UserError: the template cannot be followed.
    """
    template = processor_template(checkpoint) or tokenizer_template(checkpoint)
    if template is None:
        return vars(base)
    return vars(follow(template, base, checkpoint.text_tokenizer, placeholder))


def expect(where: str, section: str, given: Mapping[str, Any] | Any, **wanted: Any) -> None:
    """Check that fields of a config are as the parts here have them.

    Raises:
        UserError: a line that names the first that is not.
    """
    for name, value in wanted.items():
        found = given.get(name, value) if isinstance(given, Mapping) else getattr(given, name, value)
        if found != value:
            raise UserError(f"{where}: {section}.{name}: {found!r} is not supported, only {value!r}")
