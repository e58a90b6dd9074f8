"""The files of a text tokenizer, checked before and after a library reads them; what it cannot read is one line.

Of `tokenizer.json` the library checks the form, and here is checked what it would do to a text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from unimm.errors import UserError
from unimm.files import open_regular, read_json, read_optional
from unimm.models.configs import Published, Text, without_code
from unimm.models.decoders import DECODERS
from unimm.sections import Foreign, near, show, validate

CONFIG_FILE, FILE = "tokenizer_config.json", "tokenizer.json"
TABLES = ("special_tokens_map.json", "added_tokens.json")
VOCABULARIES = (
    "vocab.json",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# What transformers' processors would cut every prompt to, and pad it to, unasked
LENGTH_BOUNDS = ("max_length", "truncation", "truncation_strategy", "stride", "padding", "pad_to_multiple_of")
MAX_GROWTH = 2**12  # times that a normaliser may lengthen a text
_GENERIC = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_NAMES = {name for kind in (*DECODERS, "janus", "emu3") if (name := TOKENIZER_MAPPING_NAMES.get(kind))}
CLASSES = frozenset(
    {*_GENERIC, *(name.removesuffix("Fast") + end for name in _NAMES for end in ("", "Fast"))}
)


def _class(name: str) -> str:
    if name not in CLASSES:
        raise ValueError(f"no tokenizer is of the class {show(name)}{near(name, CLASSES)}")
    return name


class Added(Foreign):
    """A token beside those of the vocabulary."""

    content: Text
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = False


Token = Text | Added
Tokens = list[Token] | dict[str, Token]


class SpecialTokens(Published):
    """`special_tokens_map.json`, and the same keys elsewhere."""

    bos_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    sep_token: Token | None = None
    pad_token: Token | None = None
    cls_token: Token | None = None
    mask_token: Token | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: Tokens | None = None


class TokenizerConfig(SpecialTokens):
    """`tokenizer_config.json`; code that it names for a processor is not its own, and ours stands in its place."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        code = data.get("auto_map") if isinstance(data, Mapping) else None
        return without_code(data, isinstance(code, Mapping) and code.keys() == {"AutoProcessor"})

    tokenizer_class: Annotated[Text, AfterValidator(_class)] | None = None
    model_max_length: Annotated[float, Field(gt=0)] | None = None
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    added_tokens_decoder: dict[str, Added] = Field(default_factory=dict)
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    legacy: bool | None = None
    split_special_tokens: bool | None = None
    use_default_system_prompt: bool | None = None


def load_tokenizer(folder: Path, config: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load a text tokenizer from its files, of which none is run.

    Args:
        folder: holds them.
        config: the `config.json` beside them, where it has been read.

    Raises:
        UserError: a line that names the file, and the key where it is known.
    """
    _check_files(folder)
    options = read_optional(folder / CONFIG_FILE)
    validate(TokenizerConfig, options, str(folder / CONFIG_FILE))
    validate(SpecialTokens, read_optional(folder / TABLES[0]), str(folder / TABLES[0]))
    for token, number in read_optional(folder / TABLES[1]).items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise UserError(f"{folder / TABLES[1]}: {token}: expected the id of a token, got {show(number)}")
    try:
        # The type alone of the model beside it matters, and none of what its config says.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=_beside(folder, config), trust_remote_code=False
        )
    except BaseException as error:  # the libraries raise every kind
        if not _is_fault(error):
            raise
        raise UserError(_fault(folder, error)) from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder / CONFIG_FILE}: no fast tokenizer; give the folder a {FILE}")
    _check_growth(tokenizer, folder / FILE)
    return without_bounds(tokenizer)


def without_bounds(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Let go of the length that texts were cut and padded to, in training say; it would be written with the rest."""
    words: Any = tokenizer
    words.backend_tokenizer.no_truncation()
    words.backend_tokenizer.no_padding()
    for name in LENGTH_BOUNDS:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def complete(tokenizer: PreTrainedTokenizerBase, decoder: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Give a tokenizer the begin, end and pad tokens that it does not name: the decoder's, or for pad its end token."""
    for name in ("bos", "eos", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is not None:
            continue
        number = decoder.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
        elif name == "pad":  # as in Janus's own processor
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_files(folder: Path) -> None:
    """Check that a vocabulary is there, and that its files can be opened."""
    found = [folder / name for name in (FILE, *VOCABULARIES) if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder / FILE}: not found; the folder holds no text tokenizer")
    for path in found:
        if path.suffix == ".json":
            read_json(path)
        else:
            open_regular(path).close()


def _fault(folder: Path, error: BaseException) -> str:
    """The line that names the file which a library could not read."""
    where = folder / CONFIG_FILE
    if (folder / FILE).exists():
        try:
            Tokenizer.from_file(str(folder / FILE))
        except BaseException as fault:
            if not _is_fault(fault):
                raise
            where, error = folder / FILE, fault
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{where}: no tokenizer that can be read ({reason})"


def _is_fault(error: BaseException) -> bool:
    """Whether an error is of what was read; the library panics with what is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _beside(folder: Path, config: Mapping[str, Any] | None) -> PreTrainedConfig:
    """A config of the same type as the model's in the folder, as it is by default."""
    kind: Any = (read_optional(folder / "config.json") if config is None else config).get("model_type")
    # transformers knows tokenizers of some models that it has no config of
    known = isinstance(kind, str) and kind in TOKENIZER_MAPPING_NAMES and kind in CONFIG_MAPPING
    default: PreTrainedConfig = CONFIG_MAPPING[kind]() if known else PreTrainedConfig()
    return default


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, where: Path, begins: bool = True) -> None:
    """Check that all tokens have a row in the decoder's table, and that texts have a first and a last one.

    Args:
        tokenizer: the text tokenizer.
        size: rows of the table.
        where: the checkpoint, for errors.
        begins: whether texts have a first one.

    Raises:
        UserError: a token is beyond the table, or none begins or ends a text.
    """
    for name in ("bos", "eos") if begins else ("eos",):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise UserError(f"{where / CONFIG_FILE}: {name}_token: missing, or none of the tokenizer's")
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= size:
        raise UserError(
            f"{where / FILE}: {show(token)} has the id {number}, the decoder's vocabulary holds {size}"
        )


def check_placeholders(
    tokenizer: PreTrainedTokenizerBase, placeholders: dict[str, int], turns: Iterable[str], where: Path
) -> None:
    """Check that nothing else in a prompt is the token that stands for an image's feature or code.

    Args:
        tokenizer: the text tokenizer.
        placeholders: those tokens, by their names in the layout.
        turns: the words around a user's, which may hold special tokens.
        where: the checkpoint, for errors.

    Raises:
        UserError: a token of a text or of the turns is one of them.
    """
    special = set(tokenizer.get_added_vocab().values())
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for name, token in placeholders.items():
        word = str(tokenizer.convert_ids_to_tokens(token)) if token < len(tokenizer) else None
        if word and (token not in special or token in ends or any(word in turn for turn in turns)):
            raise UserError(
                f"{where / 'config.json'}: layout.{name}: token {token} is {show(word)}, which texts hold too"
            )


def _check_growth(tokenizer: PreTrainedTokenizerBase, where: Path) -> None:
    """Refuse what would make a long text of a short one, over and over."""
    words: Any = tokenizer
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        step = getattr(words.backend_tokenizer, part)
        growth = 1.0 if step is None else math.prod(_growths(json.loads(step.__getstate__())))
        if growth > MAX_GROWTH:
            raise UserError(f"{where}: {part}: lengthens texts more than {MAX_GROWTH} times")


def _growths(state: Any) -> Iterator[float]:
    """By how much each step, at any depth, may lengthen a text."""
    if isinstance(state, dict):
        for key in ("content", "prepend", "replacement"):
            if isinstance(state.get(key), str):
                yield max(len(state[key]), 1)
        for value in state.values():
            yield from _growths(value)
    elif isinstance(state, list):
        for value in state:
            yield from _growths(value)
