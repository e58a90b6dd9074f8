"""A model whose images and drawings have rows and columns in its positions samples what one pass over all gives."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import unimm
from unimm.models.attention import find_blocks, raster_positions
from unimm.models.inputs import Images
from unimm.pipeline import UniMM
from unimm.recipes import find_recipe
from unimm.training.recipe import smoke_recipe
from unimm.training.trainer import train


@pytest.fixture(scope="module")
def um(tmp_path_factory: pytest.TempPathFactory) -> UniMM:
    """The recipe that draws beside Qwen2-VL's way of seeing, on tiny parts with larger weights than it starts with."""
    folder = tmp_path_factory.mktemp("draws")
    recipe = smoke_recipe(find_recipe("qwen2-vl-draws"), [f"output={folder / 'run'}"])
    um = unimm.load(train(recipe, quiet=True), "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in um.model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return um


def test_positions_by_hand() -> None:
    """Two tokens, an image of 2 x 3, one token, an image of 1 x 2, one token; a branch that sees the first alone."""
    placeholders = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0]]).bool()
    blocks = find_blocks(placeholders, [(2, 3), (1, 2)])
    counted = torch.arange(13)[None]
    visible = torch.ones(1, 13, 13, dtype=torch.bool).tril()
    visible[0, 12, 9:11] = False  # the last does not see the second image
    time, row, column = raster_positions(counted, blocks, visible)[:, 0].tolist()
    # the first image begins at 2 and is 3 wide, so that what follows goes on at 5; the second begins at 6
    assert time == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8, 9]
    assert row == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 8, 9]
    assert column == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_drawings_are_what_one_pass_over_all_codes_gives(um: UniMM, guidance: float) -> None:
    prompt = "a red apple"
    _, codes = um.draw([prompt], guidance_scale=guidance, temperature=0, return_codes=True)
    assert len(codes.unique()) > 3
    model, layout = um.model, um.processor.layout
    ids = um.processor.drawing_ids(prompt)
    rows = [ids] if guidance == 1 else [ids, um.processor.unconditional_ids(ids)]
    steps = layout.drawing_steps(*codes.shape[1:])
    logits = []
    for row in rows:
        tokens = torch.tensor([row + steps])
        embedded = model.embed(tokens, Images(codes=codes))
        assert embedded.positions is not None
        drawn = embedded.positions[:, 0, len(row) :]
        assert drawn[1].max() - drawn[1].min() == codes.shape[1] - 1  # rows
        assert drawn[2].max() - drawn[2].min() == codes.shape[2] - 1  # columns
        hidden = model.decode(embedded.stream, position_ids=embedded.positions).last_hidden_state
        logits.append(model.code_logits(hidden[0, len(row) - 1 : -1]))
    found = logits[0] if len(rows) == 1 else logits[1] + guidance * (logits[0] - logits[1])
    assert torch.equal(found.argmax(-1), codes.flatten())


@torch.no_grad()
def test_answers_do_not_depend_on_who_is_beside(um: UniMM) -> None:
    """Images of unlike sizes in one batch, and a second question that begins where the first did."""
    images = [Image.new("RGB", size, colour) for size, colour in (((64, 64), "red"), ((30, 61), "blue"))]
    questions = ["what is it?", "which colour?"]
    together = um.ask(images, questions, max_new_tokens=6)
    alone = [um.ask(*pair, max_new_tokens=6) for pair in zip(images, questions, strict=True)]
    assert together == alone
    assert um.ask(images[0], ["what is it?", "is it red?"], max_new_tokens=6)[0] == alone[0]


@torch.no_grad()
def test_answers_are_what_passes_over_all_tokens_give(um: UniMM) -> None:
    image = Image.new("RGB", (48, 70), "green")
    ids, seen = um.processor.question("what is it?", [image])
    answer = um.chat(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}],
            }
        ],
        max_new_tokens=5,
    )
    tokens: list[int] = []
    for _ in range(5):
        logits = um.model(input_ids=torch.tensor([ids + tokens]), images=seen).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in um.processor.end_tokens:
            break
    assert answer == um.processor.decode_text([tokens])[0]
