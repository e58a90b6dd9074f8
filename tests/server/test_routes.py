"""OpenAI's routes by OpenAI's own client: what comes back is what the model gives by itself, bit for bit."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import unimm
from tests.server.serving import Client, data_url, image_of, serving, shows
from unimm.errors import UserNote
from unimm.pipeline import UniMM
from unimm.server.drawings import EMPTY

PROMPT = "a rocket on a purple background"


@pytest.fixture(scope="module")
def api(client: Client) -> openai.OpenAI:
    return client.openai()


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


# --- chat -------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_chat(api: openai.OpenAI, um: UniMM, scenes: list[Image.Image]) -> None:
    messages: Any = [shows(scenes[0], "what is in the picture?")]
    answer = api.chat.completions.create(model="embedded", messages=messages)
    assert answer.choices[0].message.content == um.chat(messages) != ""
    assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
    ids, _ = um.processor.chat(messages)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens
    said = {"role": "assistant", "content": answer.choices[0].message.content}
    messages += [said, {"role": "user", "content": "what color is the background?"}]
    second = api.chat.completions.create(model="embedded", messages=messages)
    assert second.choices[0].message.content == um.chat(messages)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 11, "top_p": 0.9}, {"max_tokens": 2}])
def test_pieces_make_up_the_answer(
    api: openai.OpenAI, scenes: list[Image.Image], options: dict[str, Any]
) -> None:
    messages: Any = [shows(scenes[1], "describe the picture")]
    whole = api.chat.completions.create(model="embedded", messages=messages, **options)
    usage = {"include_usage": True}
    chunks = list(
        api.chat.completions.create(
            model="embedded", messages=messages, stream=True, stream_options=usage, **options
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage is not None and whole.usage is not None and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 3 and all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_have_seeds_that_follow(api: openai.OpenAI, um: UniMM) -> None:
    messages: Any = [{"role": "user", "content": "what is a star?"}]
    options: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
    answer = api.chat.completions.create(model="embedded", messages=messages, n=3, seed=5, **options)
    expected = [um.chat(messages, max_new_tokens=12, temperature=1.5, seed=5 + i) for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == expected and len(set(expected)) > 1
    stream = api.chat.completions.create(
        model="embedded", messages=messages, n=3, seed=5, stream=True, **options
    )
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_options_of_answers_are_heeded(api: openai.OpenAI, um: UniMM, scenes: list[Image.Image]) -> None:
    messages: Any = [shows(scenes[2], "describe the picture")]
    whole = um.chat(messages)
    word = whole.split()[-1]
    stopped = api.chat.completions.create(model="embedded", messages=messages, stop=word).choices[0]
    assert (
        stopped.message.content == um.chat(messages, stop=word) != whole and stopped.finish_reason == "stop"
    )
    cut = api.chat.completions.create(model="embedded", messages=messages, max_completion_tokens=1).choices[0]
    assert cut.finish_reason == "length"
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    answer = api.chat.completions.create(model="embedded", messages=messages, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["a"] in ("x", "y")
    body = {"regex": "(red|blue) [0-9]{2}", "top_k": 5, "repetition_penalty": 1.2}
    answer = api.chat.completions.create(model="embedded", messages=messages, extra_body=body)
    assert re.fullmatch("(red|blue) [0-9]{2}", answer.choices[0].message.content or "")


def test_fields_of_clients_that_change_nothing_are_taken(api: openai.OpenAI, um: UniMM) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "what is a star?"}], "name": "ann"}
    ]
    answer = api.chat.completions.create(
        model="embedded", messages=messages, user="ann", logprobs=False, frequency_penalty=0, presence_penalty=0.0,
        tools=[], metadata={"a": "b"}, store=False, response_format={"type": "text"},
    )  # fmt: skip
    assert answer.choices[0].message.content == um.chat([{"role": "user", "content": "what is a star?"}])


# --- drawings ---------------------------------------------------------------------------------------------------


def test_each_image_is_drawn_again_by_its_seed(api: openai.OpenAI, um: UniMM) -> None:
    drawn = api.images.generate(model="embedded", prompt=PROMPT, n=3, extra_body={"seed": 2**64 - 2})
    assert drawn.data is not None and drawn.size == "64x64" and drawn.output_format == "png"
    seeds = [getattr(image, "seed") for image in drawn.data]  # noqa: B009  (no field of the client's)
    assert seeds == [2**64 - 2, 2**64 - 1, 0]
    for image, seed in zip(drawn.data, seeds, strict=True):
        assert same(image_of(image.b64_json or ""), um.draw(PROMPT, seed=seed)[0])
    assert drawn.usage is not None and drawn.usage.output_tokens == 3 * 64
    unseeded = api.images.generate(model="embedded", prompt=PROMPT)
    assert unseeded.data is not None
    again = um.draw(PROMPT, seed=getattr(unseeded.data[0], "seed"))[0]  # noqa: B009
    assert same(image_of(unseeded.data[0].b64_json or ""), again)


def test_rows_come_as_they_are_drawn(api: openai.OpenAI, um: UniMM) -> None:
    (image,), codes = um.draw(PROMPT, seed=7, return_codes=True)
    events = list(api.images.generate(model="embedded", prompt=PROMPT, stream=True, extra_body={"seed": 7}))
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 7
    for rows, event in enumerate(partial, start=1):
        shown = image_of(event.b64_json)
        assert shown.size == (64, 64) and event.partial_image_index == rows - 1
        assert same(shown.crop((0, 0, 64, 8 * rows)), um.decode_codes(codes[:, :rows])[0])
        assert (np.asarray(shown.crop((0, 8 * rows, 64, 64))) == EMPTY).all()
    assert last.type == "image_generation.completed" and same(image_of(last.b64_json), image)
    assert last.usage.output_tokens == 64 and last.seed == 7


@pytest.mark.parametrize(("count", "rows"), [(0, []), (1, [4]), (3, [2, 4, 6]), (50, list(range(1, 8)))])
def test_fewer_rows_are_spread(client: Client, count: int, rows: list[int]) -> None:
    body = {"prompt": PROMPT, "stream": True, "partial_images": count, "seed": 1}
    answer = client.post("/v1/images/generations", **body)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [
        json.loads(line[6:]) for line in answer.content.decode().splitlines() if line.startswith("data: ")
    ]
    assert [event["rows_drawn"] for event in events[:-1]] == rows
    assert events[-1]["type"] == "image_generation.completed"


def test_several_streams_of_one_request_do_not_mix(api: openai.OpenAI, um: UniMM) -> None:
    expected = [um.draw(PROMPT, seed=3 + i)[0] for i in range(3)]
    found: dict[int, Image.Image] = {}
    rows: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for event in api.images.generate(
        model="embedded", prompt=PROMPT, n=3, stream=True, extra_body={"seed": 3}
    ):
        if event.type == "image_generation.completed":
            found[event.index] = image_of(event.b64_json)
        else:
            rows[event.index].append(event.rows_drawn)
    assert all(same(found[i], expected[i]) for i in range(3))
    assert set(map(tuple, rows.values())) == {tuple(range(1, 8))}


def test_options_of_drawings_are_heeded(api: openai.OpenAI, um: UniMM) -> None:
    options = {"guidance_scale": 1.0, "temperature": 0.9, "top_k": 50, "top_p": 0.95}
    drawn = api.images.generate(
        model="embedded", prompt=PROMPT, size="64x64", extra_body={"seed": 4, **options}
    )
    assert drawn.data is not None
    assert same(image_of(drawn.data[0].b64_json or ""), um.draw(PROMPT, seed=4, **options)[0])
    plain, away = (
        api.images.generate(model="embedded", prompt=PROMPT, extra_body={"seed": 4, **more})
        for more in ({}, {"negative_prompt": "a purple background"})
    )
    assert plain.data is not None and away.data is not None
    assert plain.data[0].b64_json != away.data[0].b64_json


def test_formats_and_urls(api: openai.OpenAI, client: Client) -> None:
    for form in ("jpeg", "webp"):
        body = {"prompt": "a star", "output_format": form, "output_compression": 80, "seed": 1}
        document = client.post("/v1/images/generations", **body).document
        opened = Image.open(io.BytesIO(base64.b64decode(document["data"][0]["b64_json"])))
        assert opened.format == form.upper() and document["output_format"] == form
    drawn = api.images.generate(
        model="embedded", prompt="a star", response_format="url", extra_body={"seed": 1}
    )
    assert drawn.data is not None and drawn.data[0].b64_json is None
    assert (drawn.data[0].url or "").startswith("data:image/png;base64,")


def test_edits_of_forms_and_json(
    api: openai.OpenAI, client: Client, um: UniMM, scenes: list[Image.Image]
) -> None:
    with pytest.warns(UserNote):
        expected = um.draw("two stars", images=[[scenes[0], scenes[1]]], seed=9)[0]
    files = []
    for scene in scenes[:2]:
        buffer = io.BytesIO()
        scene.save(buffer, "png")
        files.append(("a.png", buffer.getvalue(), "image/png"))
    edited = api.images.edit(model="embedded", image=files, prompt="two stars", extra_body={"seed": 9})
    assert edited.data is not None and same(image_of(edited.data[0].b64_json or ""), expected)
    assert edited.usage is not None and edited.usage.input_tokens_details.image_tokens > 0
    named = [{"image_url": data_url(scene)} for scene in scenes[:2]]
    document = client.post("/v1/images/edits", images=named, prompt="two stars", seed=9).document
    assert document["data"][0]["b64_json"] == edited.data[0].b64_json
    *partial, last = api.images.edit(
        model="embedded", image=files[0], prompt="two stars", stream=True, partial_images=2
    )
    assert [event.type for event in partial] == ["image_edit.partial_image"] * 2
    assert last.type == "image_edit.completed"


# --- the rest ---------------------------------------------------------------------------------------------------


def test_models_say_what_they_take_and_give(api: openai.OpenAI) -> None:
    (model,) = api.models.list().data
    assert model.id == "embedded" and api.models.retrieve("embedded") == model
    assert model.input_modalities == model.output_modalities == ["text", "image"]  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other/model")


def test_errors_are_those_that_the_client_knows(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.images.generate(model="embedded", prompt="a", extra_body={"guidence_scale": 3})
    assert refused.value.param == "guidence_scale" and "did you mean" in str(refused.value)
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        api.images.generate(model="gpt-image-1", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError):
        url = {"url": "data:image/png;base64,aGVsbG8="}
        part: Any = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "what?"}]
        api.chat.completions.create(model="embedded", messages=[{"role": "user", "content": part}])


def test_the_api_is_described_without_anything_from_elsewhere(client: Client) -> None:
    document = client.request("GET", "/openapi.json").document
    assert {"/v1/chat/completions", "/v1/images/edits", "/health"} <= document["paths"].keys()
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert {"ChatRequest", "ImageRequest", "EditRequest"} <= names <= document["components"]["schemas"].keys()
    page = client.request("GET", "/docs")
    text = page.content.decode()
    assert "guidance_scale" in text and "<script" not in text
    assert not re.search(r"(src|href)=.?(https?:)?//", text)
    assert "script-src" not in page.headers["Content-Security-Policy"]
    assert b"/docs" in client.request("GET", "/").content


def test_metrics_count(client: Client) -> None:
    before = {name: client.metric(name) for name in ("unimm_tokens_total", "unimm_codes_total")}
    client.post("/v1/images/generations", prompt="a star")
    client.post("/v1/chat/completions", messages=[{"role": "user", "content": "what is a star?"}])
    assert client.metric("unimm_codes_total") == before["unimm_codes_total"] + 64
    assert client.metric("unimm_tokens_total") > before["unimm_tokens_total"]
    assert client.metric("unimm_codes_per_second") > 0
    for name in (
        "unimm_first_row_seconds_count",
        "unimm_first_token_seconds_count",
        "process_resident_memory_bytes",
    ):
        assert client.metric(name) > 0
    assert client.metric("unimm_requests_running") == client.metric("unimm_requests_waiting") == 0
    assert client.metric("unimm_cache_bytes") == 0


def test_models_that_only_look_or_only_draw_say_so(scenes: list[Image.Image]) -> None:
    with serving(unimm.load(device="cpu", parts="understand")) as client:
        (model,) = client.request("GET", "/v1/models").document["data"]
        assert (model["input_modalities"], model["output_modalities"]) == (["text", "image"], ["text"])
        assert client.post("/v1/images/generations", prompt="a").status == 422
        assert client.post("/v1/chat/completions", messages=[shows(scenes[0], "what?")]).status == 200
    with serving(unimm.load(device="cpu", parts="draw")) as client:
        (model,) = client.request("GET", "/v1/models").document["data"]
        assert (model["input_modalities"], model["output_modalities"]) == (["text"], ["text", "image"])
        assert client.post("/v1/images/generations", prompt="a").status == 200
        named = [{"image_url": data_url(scenes[0])}]
        for answer in (
            client.post("/v1/chat/completions", messages=[shows(scenes[0], "what?")]),
            client.post("/v1/images/edits", prompt="a", images=named),
        ):
            assert answer.status in (400, 422) and "image" in answer.document["error"]["message"]
