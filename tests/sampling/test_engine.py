"""The engine: what a request gets does not depend on its company, on windows, on how it was interrupted or shared."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unimm
from tests.families.emu3_checkpoints import emu3
from tests.families.janus_checkpoints import janus
from unimm.errors import UserError
from unimm.models.configuration import SamplingConfig
from unimm.pipeline import UniMM
from unimm.sampling import engine as engine_module
from unimm.sampling.drawing import drawing_requests
from unimm.sampling.engine import Engine
from unimm.sampling.memory import EngineLimits
from unimm.sampling.requests import DrawingRequest, Request, TextRequest, TextSampling, Ticket
from unimm.sampling.sampler import Filters, NoiseKey

PROMPTS = ["a red apple", "what", "a blue background on it", "it is", "a blue apple"]
QUESTIONS = ["what?", "what is this red thing on a blue background?", "it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    janus(folder / "janus")
    emu3(folder / "emu3")
    return folder


def image(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def drawings(um: UniMM, sampling: SamplingConfig, prompts: list[str] = PROMPTS) -> list[DrawingRequest]:
    keys = [NoiseKey(5, i) for i in range(len(prompts))]
    grid = (3, 5) if um.model.layout.sized else um.model.layout.grid
    return list(drawing_requests(um.processor, prompts, [()] * len(prompts), keys, sampling, grid))


def answers(um: UniMM, most: int = 12, temperature: float = 0.0) -> list[TextRequest]:
    sampling = TextSampling(Filters(temperature), most)
    return [
        TextRequest(*um.processor.question(text, [image(i)]), NoiseKey(i), sampling=sampling)
        for i, text in enumerate(QUESTIONS)
    ]


def outcome(ticket: Ticket) -> Any:
    """What a request got."""
    assert ticket.finish_reason in ("stop", "length")
    return tuple(ticket.ids) if ticket.codes is None else tuple(ticket.codes.flatten().tolist())


def alone(um: UniMM, make: Callable[[], list[Any]], window: int | None = 1) -> list[Any]:
    """What each request gets from an engine of its own."""
    return [outcome(Engine(um.model, um.processor, window=window).run([one])[0]) for one in make()]


SAMPLINGS = [
    SamplingConfig(5.0, 1.0),
    SamplingConfig(2.0, 0.5),
    SamplingConfig(1.0, 1.0),
    SamplingConfig(2.0, 1.0, top_k=5),
    SamplingConfig(3.0, 1.0, top_p=0.9),
    SamplingConfig(3.0, 0.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("source", [None, "janus", "emu3"])
def test_no_window_changes_a_drawing(folder: Path, source: str | None, sampling: SamplingConfig) -> None:
    um = unimm.load(source and folder / source, device="cpu")
    one_by_one = Engine(um.model, um.processor, window=1).run(drawings(um, sampling)[:3])
    expected = [outcome(ticket) for ticket in one_by_one]
    assert len(set(expected)) == 3 and one_by_one[0].passes == len(expected[0])
    for window in (4, 16, None):
        tickets = Engine(um.model, um.processor, window=window).run(drawings(um, sampling)[:3])
        assert [outcome(ticket) for ticket in tickets] == expected
        assert window is None or all(ticket.passes <= len(expected[0]) for ticket in tickets)
    assert tickets[0].passes > 0
    assert alone(um, lambda: drawings(um, sampling)[:3], 4) == expected


def test_drafts_save_passes() -> None:
    um = unimm.load(device="cpu")
    tickets = Engine(um.model, um.processor, window=16).run(drawings(um, SamplingConfig(2.0, 0.5)))
    assert sum(ticket.passes for ticket in tickets) / len(tickets) < 40  # of 64


@pytest.mark.parametrize("seed", range(3))
def test_joining_at_any_step_changes_nothing(tiny_model: UniMM, seed: int) -> None:
    um, rng = tiny_model, random.Random(seed)

    def make() -> list[Request]:
        return [
            *drawings(um, SamplingConfig(5.0, 1.0)),
            *drawings(um, SamplingConfig(1.0, 1.0, top_k=9)),
            *answers(um),
            *answers(um, 20, 0.9),
        ]

    expected = alone(um, make)
    assert len(set(expected)) > 10
    limits = EngineLimits(max_rows=rng.choice([2, 5, 40]), prompt_piece=rng.choice([3, 50]), least_piece=2)
    engine = Engine(um.model, um.processor, limits, rng.choice([None, 3]))
    requests = make()
    order = list(range(len(requests)))
    rng.shuffle(order)
    tickets: dict[int, Ticket] = {}
    while len(tickets) < len(requests) or any(not ticket.done for ticket in tickets.values()):
        for _ in range(rng.choice([0, 0, 1, 4])):
            if order:
                number = order.pop()
                tickets[number] = engine.submit(requests[number])
        engine.step()
    assert [outcome(tickets[i]) for i in range(len(requests))] == expected


def test_greedy_answers_are_those_of_transformers(folder: Path) -> None:
    um = unimm.load(folder / "janus", device="cpu")
    tickets = um.engine.run(answers(um, 16))
    for request, ticket in zip(answers(um, 16), tickets, strict=True):
        stream = um.model.embed(torch.tensor([request.ids]), request.images).stream
        expected = um.model.decoder.generate(
            inputs_embeds=stream,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=um.processor.end_tokens,
            pad_token_id=um.processor.pad,
        )
        written = expected[0].tolist()
        end = next((i for i, token in enumerate(written) if token in um.processor.end_tokens), None)
        assert ticket.ids == written[:end]


# --- cancelling, failing ----------------------------------------------------------------------------------------


def test_a_thousand_requests_with_cancellations_leave_nothing(tiny_model: UniMM) -> None:
    um, rng = tiny_model, random.Random(0)
    makers: list[Callable[[], Request]] = []
    for i in range(len(PROMPTS)):
        makers.append(lambda i=i: drawings(um, SamplingConfig(5.0, 1.0))[i])  # type: ignore[misc]
        makers.append(lambda i=i: drawings(um, SamplingConfig(1.0, 1.0))[i])  # type: ignore[misc]
    for i in range(len(QUESTIONS)):
        makers.append(lambda i=i: answers(um)[i])  # type: ignore[misc]
    made = [make() for make in makers]
    expected = [outcome(Engine(um.model, um.processor).run([request])[0]) for request in made]
    engine = Engine(um.model, um.processor, EngineLimits(max_rows=12, max_tokens=2_000, prefix_tokens=300))
    running: list[tuple[int, Ticket]] = []
    finished = cancelled = submitted = 0
    while submitted < 1_000 or running:
        while submitted < 1_000 and len(running) < 30:
            kind = rng.randrange(len(makers))
            running.append((kind, engine.submit(made[kind])))
            submitted += 1
        if rng.random() < 0.3:
            engine.cancel(rng.choice(running)[1])
        engine.step()
        assert engine.cache.rows * engine.cache.length <= 2_000 and engine.prefixes.tokens <= 300
        for kind, ticket in [one for one in running if one[1].done]:
            running.remove((kind, ticket))
            if ticket.finish_reason == "cancelled":
                cancelled += 1
            else:
                finished += 1
                assert outcome(ticket) == expected[kind]
    assert cancelled > 50 and finished > 500 and finished + cancelled == 1_000
    assert engine.running == engine.waiting == 0 and not engine._preempted and not engine._cancelled
    engine.release()
    assert engine.cache.nbytes == 0


def test_tickets_hold_no_slots(tiny_model: UniMM) -> None:
    engine = Engine(tiny_model.model, tiny_model.processor)
    ticket = engine.submit(answers(tiny_model, 3)[0])
    engine.step()
    slot = weakref.ref(engine._slots[0])
    while engine.step():
        pass
    gc.collect()
    assert ticket.done and slot() is None


def test_what_fails_in_one_stays_there(tiny_model: UniMM) -> None:
    um = tiny_model
    expected = alone(um, lambda: drawings(um, SamplingConfig(5.0, 1.0)))
    requests = drawings(um, SamplingConfig(5.0, 1.0))

    def fail(codes: list[int]) -> None:
        if len(codes) > 5:
            raise RuntimeError("of the caller")

    requests[1].on_codes = fail
    engine = Engine(um.model, um.processor)
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    assert tickets[1].finish_reason == "error" and str(tickets[1].error) == "of the caller"
    others = [ticket for ticket in tickets if ticket is not tickets[1]]
    assert [outcome(ticket) for ticket in others] == expected[:1] + expected[2:]
    requests = drawings(um, SamplingConfig(5.0, 1.0))
    requests[1].on_codes = fail
    with pytest.raises(RuntimeError, match="of the caller"):
        engine.run(requests)
    assert engine.running == engine.waiting == 0


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.5, 1.0])
def test_answers_of_unknown_length_give_way_to_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Three answers that all run to the end of the context, in a cache that holds one of them, or one and a half."""
    monkeypatch.setattr(engine_module, "GROWTH", 16)
    um = unimm.load(folder / "janus", device="cpu")
    um.processor.end_tokens = []

    def make() -> list[TextRequest]:
        return [TextRequest(*um.processor.question(text), NoiseKey(i)) for i, text in enumerate(QUESTIONS)]

    expected = alone(um, make)
    room = um.processor.context
    assert {len(one) for one in expected} == {room - len(one.ids) for one in make()}
    engine = Engine(um.model, um.processor, EngineLimits(max_tokens=int(share * (room + 40))))
    tickets = [engine.submit(request) for request in make()]
    together = 0
    while engine.step():
        together = max(together, engine.running)
        assert engine.cache.rows * engine.cache.length <= engine.limits.max_tokens
    assert [outcome(ticket) for ticket in tickets] == expected
    assert together > 1 or share == 1.0


def test_what_never_fits_is_refused(tiny_model: UniMM) -> None:
    engine = Engine(tiny_model.model, tiny_model.processor, EngineLimits(max_rows=1))
    with pytest.raises(UserError, match=r"^request: 2 rows of \d+ positions, the engine has 1 rows and"):
        engine.submit(drawings(tiny_model, SamplingConfig(5.0, 1.0))[0])
    engine = Engine(tiny_model.model, tiny_model.processor, EngineLimits(max_tokens=60))
    with pytest.raises(UserError, match=r"the engine has 128 rows and 60 positions; raise max_tokens$"):
        engine.submit(drawings(tiny_model, SamplingConfig(5.0, 1.0))[0])


@pytest.mark.parametrize("window", [0, 33, True, "wide", 1.5])
def test_windows_that_are_none(tiny_model: UniMM, window: Any) -> None:
    with pytest.raises(UserError, match=r"^window: .*; give a whole number from 1 to 32$"):
        Engine(tiny_model.model, tiny_model.processor, window=window)


@pytest.mark.parametrize("name", ["max_rows", "max_tokens", "prompt_piece"])
def test_limits_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: 0; give a whole number of at least 1$"):
        EngineLimits(**{name: 0})


# --- shared prefixes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["janus", "emu3"])
def test_a_second_question_about_an_image_starts_behind_it(folder: Path, source: str) -> None:
    um = unimm.load(folder / source, device="cpu")
    one, other = image(1), image(2)

    def ask(engine: Engine, text: str, shown: Image.Image) -> Ticket:
        sampling = TextSampling(max_new_tokens=8)
        return engine.run([TextRequest(*um.processor.question(text, [shown]), sampling=sampling)])[0]

    engine = Engine(um.model, um.processor)
    first = ask(engine, "what is it?", one)
    second = ask(engine, "a red apple?", one)
    third = ask(engine, "a red apple?", other)
    features = um.processor.question("it", [one])[0].count(um.model.layout.feature)
    assert first.cached_tokens == 0 and second.cached_tokens >= features and third.cached_tokens < features
    for ticket, text, shown in ((second, "a red apple?", one), (third, "a red apple?", other)):
        assert ticket.ids == ask(Engine(um.model, um.processor), text, shown).ids
    assert second.ids != third.ids


def test_the_drawings_of_one_prompt_share_its_reading(tiny_model: UniMM) -> None:
    um = tiny_model
    requests = drawings(um, SamplingConfig(5.0, 1.0), [PROMPTS[2]] * 4)
    tickets = Engine(um.model, um.processor).run(requests)
    assert [ticket.cached_tokens for ticket in tickets] == [0, *[len(requests[0].ids) - 1] * 3]
    assert [outcome(ticket) for ticket in tickets] == alone(
        um, lambda: drawings(um, SamplingConfig(5.0, 1.0), [PROMPTS[2]] * 4)
    )


def test_changed_weights_are_seen(tiny: Path) -> None:
    um = unimm.load(tiny)
    before = um.engine
    assert um.engine is before
    codes = um.draw(PROMPTS[0], temperature=0, return_codes=True)[1]
    with torch.no_grad():
        um.model.decoder.get_decoder().layers[0].mlp.up_proj.weight.data.normal_()
    assert um.engine is not before
    assert not torch.equal(um.draw(PROMPTS[0], temperature=0, return_codes=True)[1], codes)
