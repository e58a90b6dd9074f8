"""Answers: they run to an end token or as far as they may, and say which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unimm
from unimm.errors import UserError, UserNote
from unimm.pipeline import UniMM
from unimm.sampling.text import generate_answers

QUESTIONS = ["what?", "what is this red thing on a blue background?", "a red apple"]


@pytest.fixture
def um(tiny: Path) -> UniMM:
    """A tiny model that a test may change."""
    return unimm.load(tiny)


def rows(um: UniMM, most: int) -> list[list[int]]:
    """The tokens that the model says after each question alone, whatever they mean."""
    um.processor.end_tokens = []
    said = []
    for question in QUESTIONS:
        inputs = um.processor([question], [[]])
        ids = inputs["input_ids"]
        for _ in range(most):
            with torch.no_grad():
                ids = torch.cat([ids, um.model(ids).logits[:, -1:].argmax(-1)], 1)
        said.append(ids[0, -most:].tolist())
    return said


def test_answers_run_until_the_context_ends(um: UniMM) -> None:
    lengths = [len(um.processor.question_ids(question, 0)) for question in QUESTIONS]
    with pytest.warns(UserNote, match=r"^3 of 3 answers were cut where the context of 128 tokens ends$"):
        answers = um.answers(None, QUESTIONS)
    assert [answer.tokens for answer in answers] == [128 - length for length in lengths]
    assert all(answer.cut for answer in answers)


def test_a_bound_that_was_asked_for_needs_no_note(um: UniMM) -> None:
    answers = um.answers(None, QUESTIONS, max_new_tokens=70)
    assert [(answer.tokens, answer.cut) for answer in answers] == [(70, True)] * 3


def test_answers_are_what_the_model_says_step_by_step(um: UniMM) -> None:
    said = rows(um, 12)
    answers = um.answers(None, QUESTIONS, max_new_tokens=12)
    assert [answer.text for answer in answers] == um.processor.decode_text(said)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_every_end_token_ends_an_answer(um: UniMM, place: int) -> None:
    said = rows(um, 12)
    um.processor.end_tokens = [um.processor.eos, said[0][place]]
    first = [row.index(said[0][place]) if said[0][place] in row else None for row in said]
    answers = um.answers(None, QUESTIONS, max_new_tokens=12)
    for row, end, answer in zip(said, first, answers, strict=True):
        assert (answer.tokens, answer.cut) == ((12, True) if end is None else (end, False))
        assert answer.text == um.processor.decode_text([row[:end]])[0]
    assert first[0] is not None


def with_end_tokens(folder: Path, tokens: object) -> Path:
    """Give a checkpoint a generation config."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens, "do_sample": True}))
    return folder


@pytest.mark.parametrize("tokens", [[2, 40, 41], 40, [40]])
def test_end_tokens_of_the_generation_config_are_kept(um: UniMM, tmp_path: Path, tokens: object) -> None:
    um.save(tmp_path / "a")
    again = unimm.load(with_end_tokens(tmp_path / "a", tokens))
    expected = {um.processor.eos, *(tokens if isinstance(tokens, list) else [tokens])}
    assert set(again.processor.end_tokens) == expected
    again.save(tmp_path / "b")
    assert set(unimm.load(tmp_path / "b").processor.end_tokens) == expected
    again.save(tmp_path / "a")  # over the folder that has a generation config
    assert set(unimm.load(tmp_path / "a").processor.end_tokens) == expected


@pytest.mark.parametrize("tokens", [-1, 10**9, "2", [2, None], [[2]], True, 1.5, {"a": 1}])
def test_end_tokens_that_are_none_are_named(um: UniMM, tmp_path: Path, tokens: object) -> None:
    um.save(tmp_path / "a")
    with pytest.raises(
        UserError, match=r"generation_config.json: eos_token_id: expected a token from 0 to \d+"
    ):
        unimm.load(with_end_tokens(tmp_path / "a", tokens))


@pytest.mark.parametrize("most", [0, -3, 1.5, "8", True, [8], float("nan")])
def test_bounds_that_are_none_are_named(um: UniMM, most: object) -> None:
    for call in (um.caption, lambda image, m: um.ask(image, "what?", m)):
        with pytest.raises(UserError, match=r"^max_new_tokens: .*give a whole number of at least 1"):
            call(Image.new("RGB", (8, 8)), most)  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("most", [np.int64(3), torch.tensor(3)])
def test_bounds_of_numpy_and_torch(um: UniMM, most: object) -> None:
    assert um.answers(None, "what?", most)[0].tokens == 3  # type: ignore[arg-type]


def test_company_changes_no_answer(um: UniMM) -> None:
    alone = []
    with pytest.warns(UserNote):
        alone = [um.answers(None, question)[0] for question in QUESTIONS]
        together = um.answers(None, QUESTIONS)
    assert together == alone


def test_no_room_at_all_is_refused_before_it_is_asked(um: UniMM) -> None:
    words = "why? " * 100
    with pytest.raises(UserError, match=r"question: .*the context holds 128"):
        um.ask(None, words)


def test_fewest_tokens(um: UniMM) -> None:
    said = rows(um, 4)
    um.processor.end_tokens = [said[0][0]]
    inputs = um.processor([QUESTIONS[0]], [[]])
    assert generate_answers(um.model, um.processor, inputs, 4)[0].tokens == 0
    assert generate_answers(um.model, um.processor, inputs, 4, min_new_tokens=2)[0].tokens >= 2
