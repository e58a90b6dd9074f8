"""Mistral's `tekken.json` against tiktoken, which the original reads it with."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unimm.errors import UserError
from unimm.families.tekken import read_tekken
from unimm.processing.processor import read_tokenizer

UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "A red apple, and two RedApples on a blue background; is it 12.5 or 3?  No:\n\n\tneither.",
    "Ein Bär fährt über die Straße. L'été, où êtes-vous ? ¿Qué hay aquí, señor?",
    "Красное яблоко лежит на синем столе. Ένα κόκκινο μήλο.",
    "赤いりんごが青い背景の上にあります。红苹果在蓝色背景上。빨간 사과가 있습니다.",
    "تفاحة حمراء على خلفية زرقاء. תפוח אדום. नीली पृष्ठभूमि पर लाल सेब। แอปเปิ้ลสีแดง",
    "🐼 👩‍👩‍👧 🏳️‍🌈 café cafe\u0301 naïve\r\n   x = [IMG](a, b) // ==== aaaaaaaaaaaaaaa\u00a0\u2003end",
]
WORDS, SPARE, SPECIAL = 560, 40, 30  # words in use, words beyond them, special tokens
NAMED = {
    "<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[IMG]": 10, "<pad>": 11, "[IMG_BREAK]": 12,
    "[IMG_END]": 13, "[TOOL_CONTENT]": 19, "<SPECIAL_20>": 20, "<SPECIAL_29>": 29,
}  # fmt: skip
Document = dict[str, Any]


def trained_words() -> list[bytes]:
    """The bytes, then words in the order in which a trainer joined their pairs."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS + SPARE, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    byte = {character: number for number, character in bytes_to_unicode().items()}
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [bytes(byte[character] for character in word) for word, _ in ordered]
    return [*(bytes([number]) for number in range(256)), *(word for word in words if len(word) > 1)]


@pytest.fixture(scope="module")
def words() -> list[bytes]:
    words = trained_words()
    assert len(words) == len(set(words)) == WORDS + SPARE
    return words


@pytest.fixture(scope="module")
def document(words: list[bytes]) -> Document:
    """A file of version 3, as beside Pixtral: no special tokens in it, and more words than are in use."""
    vocab = []
    for rank, word in enumerate(words):
        text = word.decode(errors="ignore") or None
        vocab.append({"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": text})
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": WORDS + SPARE,
            "default_vocab_size": WORDS + SPECIAL,
            "default_num_special_tokens": SPECIAL,
            "version": "v3",
        },
        "vocab": vocab,
        "image": {"image_patch_size": 16, "max_image_size": 1024},
    }


@pytest.fixture(scope="module")
def original(words: list[bytes]) -> tiktoken.Encoding:
    ranks = {word: rank for rank, word in enumerate(words[:WORDS])}
    return tiktoken.Encoding("tekken", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def read(folder: Path, document: Document) -> PreTrainedTokenizerFast:
    (folder / "tekken.json").write_text(json.dumps(document), encoding="utf-8")
    return read_tekken(folder / "tekken.json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, document: Document) -> PreTrainedTokenizerFast:
    return read(tmp_path_factory.mktemp("tekken"), document)


def check(tokenizer: PreTrainedTokenizerFast, original: tiktoken.Encoding, text: str) -> None:
    expected = [rank + SPECIAL for rank in original.encode(text, disallowed_special=())]
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ids == expected
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_tiktokens(
    tokenizer: PreTrainedTokenizerFast, original: tiktoken.Encoding, text: str
) -> None:
    check(tokenizer, original, text)
    check(tokenizer, original, text[::-1])
    learnt = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert len(learnt) < len(text.encode()) / 2  # words of more than a byte are met


def test_each_word_has_its_id(
    tokenizer: PreTrainedTokenizerFast, original: tiktoken.Encoding, words: list[bytes]
) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(WORDS + SPECIAL))
    whole = [word.decode() for word in words[:WORDS] if word.decode(errors="ignore").encode() == word]
    assert len(whole) > 250
    for text in whole:
        check(tokenizer, original, text)
    beyond = next(word.decode() for word in words[WORDS:] if word.isascii())
    assert len(tokenizer.encode(beyond, add_special_tokens=False)) > 1  # a word that is not in use


@settings(max_examples=400)
@given(text=st.text(st.sampled_from("".join(TEXTS)), max_size=60) | st.text(max_size=30))
def test_ids_of_any_text_are_tiktokens(
    tokenizer: PreTrainedTokenizerFast, original: tiktoken.Encoding, text: str
) -> None:
    check(tokenizer, original, text)


def test_special_tokens_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in NAMED} == NAMED
    roles = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert roles == (0, 1, 2, 11)
    prompt = "[INST][IMG][IMG][IMG_BREAK][IMG][IMG][IMG_END]what is this?[/INST]"
    ids = tokenizer.encode(prompt)
    assert ids[:8] == [1, 3, 10, 10, 12, 10, 10, 13] and ids[-1] == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what is this?"
    assert tokenizer.decode(ids) == "<s>" + prompt


def test_typed_special_tokens_stay_text(
    tokenizer: PreTrainedTokenizerFast, original: tiktoken.Encoding
) -> None:
    for text in ("<s>", "[IMG]", " [INST] <SPECIAL_20></s>", "".join(NAMED)):
        check(tokenizer, original, text)


def test_special_tokens_of_the_file(tmp_path: Path, document: Document, original: tiktoken.Encoding) -> None:
    document = copy.deepcopy(document)
    document["config"]["version"] = "v11"
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]"]
    document["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ][::-1]
    tokenizer = read(tmp_path, document)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "[THINK]", "<SPECIAL_6>"]) == [0, 5, 6]
    assert tokenizer.pad_token is None  # the file names none
    check(tokenizer, original, TEXTS[0])


def test_saved_and_read_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, original: tiktoken.Encoding
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again: Any = read_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and again.pad_token_id == 11
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) != []
        check(again, original, text)


# --- files that are none ------------------------------------------------------------------------------------

Damage = Callable[[Document], object]
Case = tuple[Damage, str]


def put(*place: str | int, value: Any) -> Damage:
    def damage(document: Document) -> None:
        node: Any = document
        for step in place[:-1]:
            node = node[step]
        node[place[-1]] = value

    return damage


def specials(*names: str) -> Damage:
    return put("special_tokens", value=[{"rank": rank, "token_str": name} for rank, name in enumerate(names)])


def encoded(word: bytes) -> str:
    return base64.b64encode(word).decode()


BAD: dict[str, Case] = {
    "no config": (lambda document: document.pop("config"), "config: missing"),
    "no words": (lambda document: document.pop("vocab"), "vocab: missing"),
    "no pattern": (lambda document: document["config"].pop("pattern"), "config.pattern: missing"),
    "a broken pattern": (put("config", "pattern", value="("), "config.pattern: no regular expression .*"),
    "an empty pattern": (put("config", "pattern", value=""), "config.pattern: expected at least 1.*"),
    "a pattern that leaves special tokens whole": (
        put("config", "pattern", value=r"\S+|\s+"),
        'config.pattern: leaves "<unk>" whole, so that texts could hold it',
    ),
    "a version of another form": (
        put("config", "version", value="three"),
        'config.version: expected a version such as "v3", got "three"',
    ),
    "a version that has them in the file": (
        put("config", "version", value="v13"),
        "special_tokens: missing, which version v13 does not leave out",
    ),
    "a size that is no number": (
        put("config", "default_vocab_size", value="590"),
        'config.default_vocab_size: expected an integer, got "590"',
    ),
    "more ids than words": (
        put("config", "default_vocab_size", value=631),
        "config.default_vocab_size: expected 30 special tokens and 256 to 600 words, got 631",
    ),
    "fewer ids than bytes": (
        put("config", "default_vocab_size", value=285),
        "config.default_vocab_size: expected 30 special tokens and 256 to 600 words, got 285",
    ),
    "fewer ids than special tokens": (
        put("config", "default_num_special_tokens", value=19),
        "config.default_num_special_tokens: expected at least 20, which are named, got 19",
    ),
    "a word that is no object": (put("vocab", 5, value="x"), 'vocab.5.: expected a mapping, got "x"'),
    "a word without bytes": (
        put("vocab", 400, "token_bytes", value=None),
        "vocab.400..token_bytes: expected a string, got null",
    ),
    "another rank": (put("vocab", 300, "rank", value=301), "vocab.300..rank: expected 300, got 301"),
    "no base64": (
        put("vocab", 300, "token_bytes", value="a$=="),
        "vocab.300..token_bytes: expected base64.*",
    ),
    "another byte": (
        put("vocab", 65, "token_bytes", value=encoded(b"B")),
        'vocab.65..token_bytes: expected the byte 65 alone, got "Qg=="',
    ),
    "an empty word": (put("vocab", 300, "token_bytes", value=""), "vocab.300..token_bytes: is empty"),
    "a word twice": (
        put("vocab", 300, "token_bytes", value=encoded(b"A")),
        "vocab.300..token_bytes: is the same as an earlier word",
    ),
    "a word like a special token": (
        put("vocab", 300, "token_bytes", value=encoded(b"[IMG]")),
        r'vocab.300.: is written as the special token "\[IMG\]" is',
    ),
    "special tokens without one": (
        put("special_tokens", value=[{"rank": 0, "token_str": "<s>"}, {"rank": 2, "token_str": "</s>"}]),
        "special_tokens: expected the ranks 0 to 1, got no 1",
    ),
    "a special token twice": (specials("<s>", "</s>", "<s>"), 'special_tokens: "<s>" is there twice'),
    "a special token that fills": (
        specials("<s>", "</s>", "<SPECIAL_3>"),
        'special_tokens: "<SPECIAL_3>" is there twice',
    ),
    "no begin": (specials("</s>"), "special_tokens: has no <s>"),
    "no end": (specials("<s>"), "special_tokens: has no </s>"),
    "a nameless special token": (
        specials("<s>", "</s>", ""),
        "special_tokens.2..token_str: expected at least 1.*",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_in_a_line(tmp_path: Path, document: Document, case: str) -> None:
    damage, line = BAD[case]
    document = copy.deepcopy(document)
    damage(document)
    with pytest.raises(UserError) as caught:
        read(tmp_path, document)
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'tekken.json'))}: {line}", str(caught.value))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "not readable as JSON"),
        (b"[]", "holds a list; expected an object"),
        (b"\xff\xfe", "not a text file in UTF-8"),
        (b'{"config": 1e999}', "config: expected a finite number"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    ],
)
def test_a_damaged_file_is_named_in_a_line(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "tekken.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_tekken(path)
    assert str(caught.value).startswith(f"{path}: {line}") and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tekken\.json: not found$"):
        read_tekken(tmp_path / "tekken.json")
