"""What Emu3 sees in an image does not depend on the images beside it: codes and answers, asked and trained on."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import unimm
from tests.families.emu3_checkpoints import emu3
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.models.inputs import Images
from unimm.pipeline import UniMM

SIZES = [(40, 24), (24, 40), (90, 30), (33, 33), (40, 24), (16, 64)]  # width, height; two are alike


@pytest.fixture(scope="module")
def um(tmp_path_factory: pytest.TempPathFactory) -> UniMM:
    folder = tmp_path_factory.mktemp("emu3")
    emu3(folder)
    return unimm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    scenes = EmojiScenes("train", size=96)
    return [Image.fromarray(scenes[number].render()).resize(size) for number, size in enumerate(SIZES)]


def alone(um: UniMM, image: Image.Image) -> Tensor:
    """The tokens of an image that nothing is beside."""
    pixels = um.processor.look([image]).pixels
    return um.model.layout.tokens(um.image_tokenizer.encode(pixels)[0])


def embedded(um: UniMM, tokens: list[Tensor]) -> Tensor:
    return um.model.get_input_embeddings()(torch.cat(tokens))


@torch.no_grad()
@pytest.mark.parametrize("chosen", [[0, 1], [3, 2, 1], [0, 4, 1], [5, 5], [0, 1, 2, 3, 4, 5]])
def test_images_of_one_question_keep_their_codes(
    um: UniMM, images: list[Image.Image], chosen: list[int]
) -> None:
    shown = [images[number] for number in chosen]
    inputs = um.processor(["what is this?"], [shown])
    placed = inputs["input_ids"] == um.model.layout.feature
    stream = um.model.embed(inputs["input_ids"], Images(inputs["pixel_values"], inputs["image_sizes"])).stream
    assert torch.equal(stream[placed], embedded(um, [alone(um, image) for image in shown]))


@torch.no_grad()
@pytest.mark.parametrize("fill", [0.0, 1.0, float("nan")])
def test_what_pads_an_image_is_never_seen(um: UniMM, images: list[Image.Image], fill: float) -> None:
    inputs = um.processor(["what?", "a red apple"], [images[:1], images[1:3]])
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        image[:, height:], image[:, :, width:] = fill, fill
    wider = F.pad(pixels, (0, 12, 0, 20), value=fill)  # a processor may pad further than it must
    placed = inputs["input_ids"] == um.model.layout.feature
    expected = embedded(um, [alone(um, image) for image in images[:3]])
    for given in (pixels, wider):
        assert torch.equal(um.model.embed(inputs["input_ids"], Images(given, sizes)).stream[placed], expected)


def test_answers_of_a_batch_are_those_one_by_one(um: UniMM, images: list[Image.Image]) -> None:
    entries = [images[0], images[1:3], images[3], [images[4], images[5], images[0]]]
    questions = ["what is this?", "it", "a red apple", "what?"]
    together = um.ask(entries, questions, 64)
    assert together == [um.ask([e], [q], 64)[0] for e, q in zip(entries, questions, strict=True)]
    assert len(set(together)) > 1


def test_the_loss_of_a_batch_is_that_of_its_rows(um: UniMM, images: list[Image.Image]) -> None:
    inputs = um.processor(["what is this?", "it", "a red apple"], [[image] for image in images[:3]])
    batch = dict(inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
    with torch.no_grad():
        whole = um.model(**batch)
        rows = [
            um.model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}) for row in range(3)
        ]
    assert whole.text_count == sum(row.text_count for row in rows)
    torch.testing.assert_close(whole.text_loss, sum(row.text_loss for row in rows), rtol=1e-5, atol=1e-4)


def test_sizes_that_do_not_fit_are_named(um: UniMM, images: list[Image.Image]) -> None:
    inputs = um.processor(["what?"], [images[:2]])
    with pytest.raises(ValueError, match="not a multiple of 4"):
        um.model.embed(inputs["input_ids"], Images(inputs["pixel_values"], torch.tensor([[6, 8], [16, 24]])))
    with pytest.raises(ValueError, match="images: 1 sizes for 2 images"):
        um.model.embed(inputs["input_ids"], Images(inputs["pixel_values"], inputs["image_sizes"][:1]))
