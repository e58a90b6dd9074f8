"""Chat: turns and images as the writer has them, options, streams, given forms."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import RepetitionPenaltyLogitsProcessor

import unimm
from tests.families.janus_checkpoints import janus
from unimm.errors import UserError, UserNote
from unimm.pipeline import UniMM
from unimm.processing.messages import SHOWN, Message
from unimm.sampling.requests import TextRequest, TextSampling
from unimm.sampling.slots import TextSlot

RED = Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def um(tmp_path_factory: pytest.TempPathFactory) -> UniMM:
    """A Janus with an embedded context, whose answers differ with what is asked."""
    folder = tmp_path_factory.mktemp("chat")
    janus(folder)
    return unimm.load(folder, device="cpu")


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(*parts: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def test_one_question_is_asked_as_ask_does(um: UniMM) -> None:
    expected = um.ask(RED, "what is it?", 8)
    assert um.chat([user(RED, "what is it?")], 8) == expected
    as_openai = {"type": "image_url", "image_url": {"url": data_url(RED)}}
    message = {"role": "user", "content": [as_openai, {"type": "text", "text": "what is it?"}]}
    assert um.chat([message], 8) == expected
    assert um.chat([{"role": "user", "content": "what is it?"}], 8) == um.ask(None, "what is it?", 8)


def test_turns_are_written_by_the_one_writer(um: UniMM) -> None:
    messages = [
        {"role": "system", "content": "be short"},
        user(RED, "what is it?"),
        {"role": "assistant", "content": "a red apple"},
        user("and this?", Image.new("RGB", (32, 32), "blue")),
    ]
    ids, seen = um.processor.chat(messages)
    written = [
        Message("system", ("be short",)),
        Message("user", (SHOWN, "what is it?")),
        Message("assistant", ("a red apple",)),
        Message("user", ("and this?", SHOWN)),
    ]
    assert ids == um.processor.conversation.ask(written, [um.processor.image_grid] * 2)
    assert len(seen) == 2


def test_pieces_are_the_answer(um: UniMM) -> None:
    messages = [user(RED, "what is it?")]
    pieces = list(um.chat(messages, 12, stream=True))
    assert len(pieces) > 2 and "".join(pieces).strip() == um.chat(messages, 12)
    stream = um.chat(messages, 12, stream=True)
    assert next(stream) == pieces[0]
    stream.close()  # type: ignore[attr-defined]
    assert um.engine.running == um.engine.waiting == 0


def test_a_second_turn_starts_behind_the_first(um: UniMM) -> None:
    messages: list[dict[str, Any]] = [user(RED, "what is it?")]
    answer = um.chat(messages, 6)
    messages += [{"role": "assistant", "content": answer}, user("why?")]
    ids, seen = um.processor.chat(messages)
    engine = um.engine
    held, _ = engine.prefixes.find(engine._known_by(unimm_request(ids, seen)))
    assert held >= len(um.processor.chat(messages[:1])[0]) - 1
    assert um.chat(messages, 6) == unimm.pipeline.UniMM(um.model, um.processor).chat(messages, 6)


def unimm_request(ids: list[int], seen: Any) -> Any:
    return TextRequest(ids, seen)


def test_what_ends_an_answer(um: UniMM) -> None:
    whole = um.ask(None, "what is it?", 12)
    assert len(whole) > 6
    stop = whole[4:6]
    assert um.ask(None, "what is it?", 12, stop=stop) == whole[: whole.index(stop)].strip()
    assert um.ask(None, "what is it?", 12, stop=["never there", stop]) == whole[: whole.index(stop)].strip()
    pieces = list(um.chat([user("what is it?")], 12, stream=True, stop=stop))
    assert "".join(pieces).strip() == whole[: whole.index(stop)].strip()  # nothing of the stop gets out
    with pytest.warns(UserNote, match="cut where the context"):
        list(um.chat([user("what is it?")], stream=True))


def test_a_stop_that_is_not_met_changes_nothing(um: UniMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an answer ends within a character, the half of it is shown or not by what ended it alone."""
    tokenizer = um.processor.tokenizer
    letter, half = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "é"))
    assert tokenizer.decode(half[:1]) == "\N{REPLACEMENT CHARACTER}"
    end = um.processor.end_tokens[0]
    take = TextSlot.accept
    for said in ([*letter, half[0], end], [*letter, *half, end]):
        tokens = iter(said * 2)
        monkeypatch.setattr(TextSlot, "accept", lambda slot, _, tokens=tokens: take(slot, next(tokens)))
        answers = [um.ask(None, "what?", 8, **options) for options in ({}, {"stop": "b"})]
        assert answers[0] == answers[1] == tokenizer.decode(said[:-1])


def test_sampled_answers_are_those_of_their_seed(um: UniMM) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95}
    one = [um.ask(None, "what?", 10, seed=seed, **options) for seed in range(6)]
    assert len(set(one)) > 3
    assert [um.ask(None, "what?", 10, seed=seed, **options) for seed in range(6)] == one
    assert um.ask(None, ["what?"] * 6, 10, seed=list(range(6)), **options) == one
    assert um.ask(None, "what?", 10, temperature=1.0, top_k=1, seed=3) == um.ask(None, "what?", 10)


def test_the_penalty_is_that_of_transformers(um: UniMM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(um.processor, "end_tokens", [])
    ids, seen = um.processor.question("it is", [RED])
    sampling = TextSampling.of({"repetition_penalty": 1.7}, 16)
    written = um.engine.run([TextRequest(ids, seen, sampling=sampling)])[0].ids
    stream = um.model.embed(torch.tensor([ids]), seen).stream
    penalty, row = RepetitionPenaltyLogitsProcessor(1.7), torch.tensor([ids])
    expected = []
    for _ in range(16):
        with torch.no_grad():
            hidden = um.model.decode(stream).last_hidden_state[:, -1]
            logits = um.model.decoder.get_output_embeddings()(hidden)
        expected.append(int(penalty(row, logits).argmax()))
        row = torch.cat([row, torch.tensor([expected[-1:]])], 1)
        stream = torch.cat([stream, um.model.get_input_embeddings()(row[:, -1:])], 1)
    assert written == expected
    assert written != um.engine.run([TextRequest(ids, seen, sampling=TextSampling(max_new_tokens=16))])[0].ids


# --- given forms ------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["apple", "star"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_a_schema(um: UniMM, temperature: float) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        answers = um.ask(
            None, ["what?", "it is", "a red"], 60, json_schema=schema, temperature=temperature, seed=1
        )
        for answer in map(json.loads, answers):
            assert (
                set(answer) == {"name", "n"}
                and answer["name"] in ("apple", "star")
                and 0 <= answer["n"] <= 99
            )


def test_answers_match_an_expression(um: UniMM) -> None:
    answers = um.answers(None, ["what?", "it is"], 30, regex="(yes|no), [0-9]{3}", temperature=1.0, seed=2)
    for answer in answers:
        assert answer.text[:3] in ("yes", "no,") and answer.text[-3:].isdecimal()
        assert answer.finish_reason == "stop"


def test_a_form_binds_its_own_answer_only(um: UniMM) -> None:
    free = TextSampling(max_new_tokens=8)
    bound = TextSampling.of({"regex": "[0-9]{4}"}, 8)
    requests = [
        TextRequest(*um.processor.question("what is it?"), sampling=sampling) for sampling in (free, bound)
    ]
    texts = [ticket.text for ticket in um.engine.run(requests)]
    assert texts[0] == um.ask(None, "what is it?", 8) and texts[1].isdecimal() and len(texts[1]) == 4


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ("hello", r"^messages: expected a list of messages, got str$"),
        ([], r"^messages: end with what the user says$"),
        ([{"role": "assistant", "content": "a"}], r"^messages: end with what the user says$"),
        ([{"role": "bot", "content": "a"}], r"^messages\[0\].role: 'bot'; use system, user or assistant$"),
        ([user("a"), {"role": "system", "content": "b"}], r"^messages\[1\].role: 'system'; only the first"),
        ([{"role": "user"}], r"^messages\[0\].content: expected a text or a list of parts$"),
        ([{"role": "user", "content": " "}], r"^messages\[0\].content: empty; say something$"),
        (
            [{"role": "user", "content": [{"type": "audio"}]}],
            r"^messages\[0\].content\[0\].type: 'audio'; use text,",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}],
            r"^messages\[0\].content\[0\].image_url.url: expected a data: URL or a path$",
        ),
        (
            [user("a"), {"role": "assistant", "content": user(RED)["content"]}, user("b")],
            r"^messages\[1\].content: an image in a turn of the assistant; images stand in the user's$",
        ),
        (["a"], r"^messages\[0\]: expected a mapping with role and content, got str$"),
    ],
)
def test_messages_that_are_none(um: UniMM, messages: Any, wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        um.chat(messages)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"temperature": -1.0}, r"^temperature: -1.0; give"),
        ({"temperature": 1e-40}, r"^temperature: 1e-40; give 0 \(greedy\) or a number from 0.0001 to 10000$"),
        ({"top_p": 0.0}, r"^top_p: 0.0; give"),
        ({"top_k": -1}, r"^top_k: -1; give"),
        ({"repetition_penalty": 0}, r"^repetition_penalty: 0; give a number from 0.01 to 100"),
        ({"stop": ""}, r"^stop: ''; give up to 16 texts"),
        ({"stop": ["a"] * 17}, r"^stop: .*; give up to 16 texts"),
        ({"seed": -1}, r"^seed: negative"),
        ({"regex": "("}, r"^regex: .*unclosed group"),
        ({"json_schema": {"type": "nonsense"}}, r"^json_schema: Invalid type: nonsense"),
        ({"json_schema": "{"}, r"^json_schema: "),
        ({"json_schema": {}, "regex": "a"}, r"^regex: goes without json_schema; give one of them$"),
    ],
)
def test_options_that_make_no_sense(um: UniMM, options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        um.ask(None, "what?", **options)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"temperature": 1e-40}, r"^temperature: 1e-40; give 0 \(greedy\) or"),
        ({"guidance_scale": 1e38}, r"^guidance_scale: 1e\+38; give a number of at most 1000"),
    ],
)
def test_drawings_that_float32_cannot_compute(um: UniMM, options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        um.draw("a", **options)


def test_options_that_are_unknown(um: UniMM) -> None:
    with pytest.raises(TypeError, match="'temprature'"):
        um.ask(None, "what?", temprature=1.0)  # type: ignore[call-arg]


def test_a_schema_is_a_file_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    from unimm.cli.main import main

    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["yes", "no"]}))
    assert main(["ask", "what?", "--model", str(tiny), "--json-schema", str(tmp_path / "schema.json")]) == 0
    assert main(["ask", "what?", "--model", str(tiny), "--json-schema", str(tmp_path / "none.json")]) == 2
