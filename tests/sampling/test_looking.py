"""A model that looks at a memory samples what one pass over all gives, in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import unimm
from unimm.models.inputs import Images
from unimm.pipeline import UniMM
from unimm.recipes import find_recipe
from unimm.sampling.decoder import LlamaRunner, Runner
from unimm.sampling.looking import HeldMemories
from unimm.training.recipe import smoke_recipe
from unimm.training.trainer import train

COLOURS = ("red", "blue", "green", "white")
RECIPES = {"image": "llama-vision-draws", "tile": "nvlm-x-72b", "both": "nvlm-h-72b"}


@pytest.fixture(scope="module", params=RECIPES)
def um(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UniMM:
    """A recipe on tiny parts, with larger weights than it starts with and open gates."""
    folder = tmp_path_factory.mktemp("looks")
    um = unimm.load(
        train(smoke_recipe(find_recipe(RECIPES[request.param]), [f"output={folder / 'run'}"]), quiet=True),
        "cpu",
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in um.model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.8)
            elif parameter.ndim > 1 and name.startswith(("decoder.", "fusion.", "connector.")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return um


def image(colour: str, size: tuple[int, int] = (150, 70)) -> Image.Image:
    """Two colours, of a size that takes several tiles where there are any."""
    drawn = Image.new("RGB", size, colour)
    drawn.paste("black", (0, 0, size[0] // 3, size[1] // 2))
    return drawn


@torch.no_grad()
def greedy(um: UniMM, images: list[Image.Image], question: str, count: int) -> list[int]:
    """The likeliest tokens, each by one pass over all that is before it."""
    ids, seen = um.processor.question(question, images)
    for _ in range(count):
        logits = um.model(torch.tensor([ids]), images=seen).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids[-count:]


def answer(um: UniMM, images: list[Image.Image], question: str, count: int) -> str:
    answers = um.ask([images], question, max_new_tokens=count)
    assert isinstance(answers, list)
    return answers[0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_are_what_one_pass_over_all_gives(um: UniMM, count: int) -> None:
    images = [image(colour, (150 - 30 * number, 70)) for number, colour in enumerate(COLOURS[:count])]
    wanted = greedy(um, images, "what is it?", 6)
    if um.processor.eos in wanted:
        wanted = wanted[: wanted.index(um.processor.eos)]
    assert (
        answer(um, images, "what is it?", 6)
        == um.processor.tokenizer.decode(wanted, skip_special_tokens=True).strip()
    )


def test_answers_do_not_depend_on_who_is_beside(um: UniMM) -> None:
    """Memories of unlike lengths in one batch, a row without one, and one image in two rows."""
    shown: list[Any] = [[image("red")], [image("blue", (64, 64)), image("red")], [], [image("red")]]
    questions = ["what is it?", "which colour?", "a red apple", "is it red?"]
    together = um.ask(shown, questions, max_new_tokens=8)
    um.engine.prefixes.clear()
    alone = [
        um.ask([one], [question], max_new_tokens=8)[0] for one, question in zip(shown, questions, strict=True)
    ]
    assert together == alone


def test_a_second_question_reads_the_image_once(um: UniMM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = image("green")
    um.engine.prefixes.clear()
    first = answer(um, [seen], "what is it?", 5)
    fresh = answer(um, [seen], "is it red?", 5)
    held = um.engine._memories
    assert isinstance(held, HeldMemories)
    encoded: list[int] = []
    forward = type(um.model.vision).forward
    monkeypatch.setattr(
        type(um.model.vision),
        "forward",
        lambda *args, **options: (encoded.append(1), forward(*args, **options))[1],
    )
    assert answer(um, [seen], "is it red?", 5) == fresh
    assert answer(um, [seen], "what is it?", 5) == first
    assert not encoded
    held._held.clear()  # without it the image is looked at again, and the answer stays
    assert answer(um, [seen], "is it red?", 5) == fresh
    assert encoded


def test_held_memories_have_a_bound(um: UniMM) -> None:
    assert um.model.fusion is not None
    held = HeldMemories(um.model.fusion, 200)
    for colour in COLOURS:
        ids, images = um.processor.question("what is it?", [image(colour)])
        memory = um.model.embed(torch.tensor([ids]), images).memory
        assert memory is not None
        assert held.keep((colour,), memory).seen(torch.tensor([0, 10**6])).shape[0] == 2
        assert sum(next(iter(keys.values()))[0].shape[2] for keys in held._held.values()) <= 200


@torch.no_grad()
def test_both_ways_of_running_a_decoder_look_alike(um: UniMM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(um.engine.runner) is LlamaRunner
    images = [image("red"), image("white", (64, 90))]
    wanted = answer(um, images, "how many are there?", 8)
    other = UniMM(um.model, um.processor)
    monkeypatch.setattr(
        "unimm.sampling.engine.make_runner", lambda model: Runner(model.decoder.get_decoder())
    )
    assert type(other.engine.runner) is Runner
    assert answer(other, images, "how many are there?", 8) == wanted


@pytest.mark.filterwarnings("ignore:images. published models")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_drawings_of_a_model_that_looks(um: UniMM, guidance: float) -> None:
    """Codes are those of one pass over all; the row that guidance steers away from has no memory."""
    if um.model.config.generation is None:
        pytest.skip("this system does not draw")
    shown = image("red")
    _, codes = um.draw(
        ["a red apple"], images=[shown], guidance_scale=guidance, temperature=0, return_codes=True
    )
    inputs = dict(um.processor.drawing_inputs("a red apple", [shown]))
    ids, seen = inputs.pop("input_ids")[0].tolist(), Images.from_inputs(inputs)
    away = um.processor.unconditional_ids(ids)
    steps = um.processor.layout.drawing_steps(*codes.shape[1:])
    logits = []
    for row, images in ((ids, seen), (away, Images())):
        given = Images.cat([images or Images(), Images(codes=codes)])
        embedded = um.model.embed(torch.tensor([row + steps]), given)
        assert (embedded.memory is None) == (row is away)
        hidden = um.model.decode(embedded.stream, embedded.memory).last_hidden_state
        logits.append(um.model.code_logits(hidden[0, len(row) - 1 : -1]))
    guided = logits[1] + guidance * (logits[0] - logits[1])
    assert torch.equal(guided.argmax(-1), codes.flatten())
    plain = um.draw(["a red apple"], guidance_scale=guidance, temperature=0, return_codes=True)[1]
    assert not torch.equal(plain, codes)
