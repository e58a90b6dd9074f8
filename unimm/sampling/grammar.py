"""Answers of a given form: a JSON schema or a regular expression decides which tokens may come next.

The work is llguidance's (extra `structured`); here its masks meet the engine's logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unimm.errors import UserError

TRIED = 4  # tokens after which a grammar has shown what its steps cost
MAX_STATES = 5_000  # of the lexer of a grammar that is tried; those that people write have some hundred
_tokenizers: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def read_grammar(json_schema: Any, regex: Any) -> str | None:
    """Return the grammar of an option; None where there is none.

    Args:
        json_schema: a schema as a mapping or as JSON text; `{}` is any JSON.
        regex: a regular expression in Rust's syntax, which the whole answer matches.

    Raises:
        UserError: both are given, one is none, or llguidance is missing.
    """
    if json_schema is None and regex is None:
        return None
    if json_schema is not None and regex is not None:
        raise UserError("regex: goes without json_schema; give one of them")
    matcher, name = _llguidance().LLMatcher, "regex" if json_schema is None else "json_schema"
    try:
        if json_schema is not None:
            text = json_schema if isinstance(json_schema, str) else json.dumps(_mapping(json_schema))
            # a weak model would fill its answer with spaces where JSON allows any
            grammar = matcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        else:
            if not isinstance(regex, str):
                raise UserError(f"regex: {regex!r}; give a text")
            grammar = matcher.grammar_from_regex(regex)
        wrong = matcher.validate_grammar(grammar)
    except (ValueError, TypeError) as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{name}: {' '.join(wrong.split())[:200]}")
    return str(grammar)


def try_grammar(grammar: str, tokenizer: PreTrainedTokenizerBase, ends: list[int], vocabulary: int) -> None:
    """Take the first steps of a grammar of a stranger, within bounds, before it holds up others.

    Args:
        grammar: from `read_grammar`.
        tokenizer: the model's, or a copy.
        ends: tokens that end an answer.
        vocabulary: how many text tokens there are.

    Raises:
        UserError: its steps cost too much, or nothing follows it.
    """
    tried = Grammar(grammar, tokenizer, ends, vocabulary, bounded=True)
    for _ in range(TRIED):
        allowed = tried.allowed().nonzero().flatten()
        if not len(allowed):
            raise UserError("json_schema or regex: nothing follows it; give one that an answer can have")
        if tried.take(int(allowed[len(allowed) // 2])):
            return


class Grammar:
    """What an answer may still become.

    Args:
        grammar: from `read_grammar`.
        tokenizer: the model's.
        ends: tokens that end an answer.
        vocabulary: how many text tokens there are.
        bounded: whether what it may cost has tighter bounds than llguidance's own.
    """

    def __init__(
        self,
        grammar: str,
        tokenizer: PreTrainedTokenizerBase,
        ends: list[int],
        vocabulary: int,
        bounded: bool = False,
    ) -> None:
        known = _tokenizers.setdefault(tokenizer, {})
        key = (vocabulary, *ends)
        if key not in known:
            from llguidance.hf import from_tokenizer

            fast: Any = tokenizer
            known[key] = from_tokenizer(fast, n_vocab=vocabulary, eos_token=list(ends))
        limits = _llguidance().LLParserLimits(max_lexer_states=MAX_STATES) if bounded else None
        self._matcher = _llguidance().LLMatcher(known[key], grammar, log_level=0, limits=limits)

    def allowed(self) -> Tensor:
        """Return which tokens may come next: bool [V]."""
        mask = bytearray(self._matcher.compute_bitmask())
        self._check()
        words = torch.frombuffer(mask, dtype=torch.int32)
        return (words[:, None] >> torch.arange(32) & 1).bool().flatten()

    def take(self, token: int) -> bool:
        """Take a token; whether nothing can follow.

        Raises:
            UserError: the grammar is too large to be followed.
        """
        taken = self._matcher.consume_token(token)
        self._check()
        if not taken:
            raise RuntimeError("a token that the grammar does not allow")
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            line = self._matcher.get_error().partition("\n")[0][:200]
            raise UserError(f"json_schema or regex: too large to be followed ({line}); give a smaller one")


def _mapping(schema: Any) -> Any:
    if not isinstance(schema, Mapping | bool):
        raise UserError(f"json_schema: {schema!r}; give a mapping or JSON text")
    return schema


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("json_schema and regex need llguidance: pip install 'unimm[structured]'") from None
    return llguidance
