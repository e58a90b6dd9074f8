"""The survey's systems against the classes that published them: tokens, pixels, logits, answers, gradients, files."""

from __future__ import annotations

import dataclasses
import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import unimm
from tests.families.aria_checkpoints import ARIA
from tests.families.fuyu_checkpoints import FUYU
from tests.families.llama_vision_checkpoints import LLAMA_VISION
from tests.families.nvlm_checkpoints import NVLM
from tests.families.pixtral_checkpoints import PIXTRAL
from tests.families.qwen2_vl_checkpoints import QWEN2_VL, QWEN2_VL_TIED
from tests.families.survey import Oracle, Reference, picture
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.model import key_map
from unimm.families.source import Checkpoint
from unimm.models.inputs import Images, Rows
from unimm.pipeline import UniMM
from unimm.sampling.engine import Engine
from unimm.sampling.requests import TextRequest, TextSampling

REFERENCES = (PIXTRAL, QWEN2_VL, QWEN2_VL_TIED, ARIA, FUYU, NVLM, LLAMA_VISION)
QUESTIONS = ["what is in this image?", "a", "how many red apples are there?\nand these"]
SIZES = [(37, 91), (300, 133), (61, 60), (13, 200)]


@dataclasses.dataclass
class Case:
    """A checkpoint in one layout, as the reference and as ours."""

    reference: Reference
    layout: str
    folder: Path
    oracle: Oracle
    um: UniMM

    @property
    def images(self) -> list[list[Image.Image]]:
        """For the questions: none, one and three of odd sizes, or as many as a sample may have."""
        shown = [picture(*size) for size in SIZES]
        return [[], shown[:1], shown[1:][: self.reference.most_images]]


OWN_INPUTS = ("nvlm", "fuyu")  # InternVL's stack of tiles, and patches by the number of each in the stream
LAYOUTS = [(reference, layout) for reference in REFERENCES for layout in reference.layouts]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda pair: f"{pair[0].name}-{pair[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    reference, layout = request.param
    folder = tmp_path_factory.mktemp(reference.name) / layout
    oracle = reference.write(folder, layout)
    return Case(reference, layout, folder, oracle, unimm.load(folder, device="cpu"))


@pytest.fixture(scope="module")
def inputs(case: Case) -> dict[str, Tensor]:
    return case.oracle.inputs(QUESTIONS, case.images)


def test_tokens_and_padding_are_the_processors(case: Case, inputs: dict[str, Tensor]) -> None:
    ours = case.um.processor(QUESTIONS, case.images)
    assert torch.equal(ours["attention_mask"], inputs["attention_mask"])
    seen = inputs["attention_mask"].bool()  # a layout may name no token for padding
    assert torch.equal(ours["input_ids"][seen], inputs["input_ids"][seen])


@torch.no_grad()
def test_logits_padded_and_with_images(case: Case, inputs: dict[str, Tensor]) -> None:
    expected = case.oracle.logits(inputs)
    got = case.um.model(**case.um.processor(QUESTIONS, case.images)).logits
    seen = inputs["attention_mask"].bool()
    assert (got - expected)[seen].abs().max() < 1e-4
    assert expected[seen].std() > 0.1


@torch.no_grad()
def test_the_model_takes_what_the_references_processor_gives(case: Case, inputs: dict[str, Tensor]) -> None:
    if case.reference.name in OWN_INPUTS:
        pytest.skip("its processor gives what no other does")
    expected = case.oracle.logits(inputs)
    got = case.um.model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    assert (got - expected)[seen].abs().max() < 1e-4


def test_greedy_answers_are_equal(case: Case, inputs: dict[str, Tensor]) -> None:
    expected = case.oracle.greedy(inputs, 6)
    asked = [case.um.processor.question(*pair) for pair in zip(QUESTIONS, case.images, strict=True)]
    sampling = TextSampling(max_new_tokens=6)
    engine = Engine(case.um.model, case.um.processor)
    answers = engine.run(TextRequest(ids, images, sampling=sampling) for ids, images in asked)
    ends = set(case.um.processor.end_tokens)
    for row, answer in zip(expected.tolist(), answers, strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        assert stop > 1
        assert answer.ids == row[:stop]


def test_loss_and_gradients_are_equal(case: Case, inputs: dict[str, Tensor]) -> None:
    um, oracle = case.um, case.oracle
    labels = oracle.labels(inputs)
    labels[inputs["attention_mask"].cumsum(1) == 1] = -100  # which padding would predict
    expected, theirs = oracle.loss_and_gradients(inputs, case.reference.trained, labels)
    um.model.zero_grad()
    output = um.model(**um.processor(QUESTIONS, case.images), labels=labels)
    output.loss.backward()
    assert abs(output.loss.item() - expected.item()) < 1e-4
    compared = 0
    for ours, gradient in _as_ours(case, theirs):
        assert (um.model.get_parameter(ours).grad - gradient).abs().max() < 1e-4 * max(
            1.0, gradient.abs().max().item()
        )
        compared += 1
    assert compared >= 3
    um.model.zero_grad()


def _as_ours(case: Case, theirs: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Gradients by our names: a file's tensor is known as the parameter that it is equal to."""
    checkpoint = Checkpoint(case.folder)
    saved = _weights(case.folder) or dict(checkpoint.tensors)
    map_ = key_map(checkpoint.family, checkpoint.layout, checkpoint.config)
    parameters = dict(case.oracle.model.named_parameters())
    found = []
    for ours, _ in case.um.model.named_parameters():
        if map_.constant(ours) is not None:
            continue
        entry = map_.entry(ours)
        if len(entry.theirs) > 1 or entry.theirs[0] not in saved:
            continue
        file = saved[entry.theirs[0]]
        for name, gradient in theirs.items():
            if torch.equal(parameters[name], entry.op.to_ours([file])):
                found.append((ours, gradient))
            elif torch.equal(parameters[name], file):
                found.append((ours, entry.op.to_ours([gradient])))
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of all weight files of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _slices(folder: Path) -> dict[str, Tensor]:
    """The tensors of files that each hold a slice of every one, by file and name."""
    return {
        f"{path.name}:{name}": tensor
        for path in folder.glob("*.pth")
        for name, tensor in torch.load(path, weights_only=True).items()
    }


@torch.no_grad()
def test_packed_equals_alone_and_padded(case: Case) -> None:
    """Samples in one row, each seeing only itself, and samples padded on the left, give what each gives alone."""
    um = case.um
    asked = [um.processor.question(*pair) for pair in zip(QUESTIONS, case.images, strict=True)]
    alone = [um.model(input_ids=torch.tensor([ids]), images=images).logits[0] for ids, images in asked]
    lengths = [len(ids) for ids, _ in asked]
    rows = Rows(
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        samples=torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None],
        branches=torch.zeros(1, sum(lengths), dtype=torch.int64),
    )
    together = Images.cat(images for _, images in asked)
    packed = um.model(
        input_ids=torch.tensor([[token for ids, _ in asked for token in ids]]), images=together, rows=rows
    ).logits[0]
    ids, mask = um.processor.pad_left([ids for ids, _ in asked])
    padded = um.model(input_ids=ids, attention_mask=mask, images=together).logits
    spread = max(one.abs().max().item() for one in alone)
    for own, part, row in zip(alone, packed.split(lengths), padded, strict=True):
        assert (part - own).abs().max() < 1e-5 * spread
        assert (row[-len(own) :] - own).abs().max() < 1e-5 * spread


@torch.no_grad()
def test_features_stand_in_for_pixels(case: Case) -> None:
    um = case.um
    ids, images = um.processor.question(QUESTIONS[2], case.images[2])
    expected = um.model(input_ids=torch.tensor([ids]), images=images).logits
    given = um.model.as_features(images)
    assert given.pixels is None and len(given) == len(images)
    assert torch.allclose(um.model(input_ids=torch.tensor([ids]), images=given).logits, expected, atol=1e-5)
    if len(images) > 1:
        mixed = Images.cat([given.part(0, 1), images.part(1, len(images))])
        assert mixed is not None
        got = um.model(input_ids=torch.tensor([ids]), images=mixed).logits
        assert torch.allclose(got, expected, atol=1e-4)


def test_files_come_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    convert(case.folder, tmp_path / "ours", "unimm")
    again = unimm.load(tmp_path / "ours", device="cpu")
    for (name, own), (_, other) in zip(
        case.um.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert torch.equal(own, other), name
    layout = Checkpoint(case.folder).layout
    convert(tmp_path / "ours", tmp_path / "back", layout)
    before, after = (_weights(path) or _slices(path) for path in (case.folder, tmp_path / "back"))
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[key], after[key]) for key in before)
    written, back = (
        {
            path.name: path
            for path in folder.iterdir()
            if not path.match("*.safetensors*") and path.suffix != ".pth"
        }
        for folder in (case.folder, tmp_path / "back")
    )
    assert back.keys() == written.keys()
    assert all(filecmp.cmp(path, back[name], shallow=False) for name, path in written.items())


def test_a_line_for_what_does_not_fit(case: Case) -> None:
    um = case.um
    ids, images = um.processor.question("a", case.images[1])
    feature = um.processor.layout.feature
    for cut in (ids[: len(ids) - 1 - ids[::-1].index(feature)], [*ids, feature]):
        with pytest.raises(ValueError, match=r"images: .*(room|prompt)"):
            um.model(input_ids=torch.tensor([cut]), images=images)
    with pytest.raises((UserError, ValueError), match="images: "):
        um.model(input_ids=torch.tensor([ids]))


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
@torch.no_grad()
def test_an_image_that_is_all_but_a_line_is_seen_or_refused_in_one(case: Case, size: tuple[int, int]) -> None:
    try:
        ids, images = case.um.processor.question("a", [picture(*size)])
    except UserError as error:
        assert str(error).startswith("image: ") and "\n" not in str(error)
        return
    assert bool(case.um.model(input_ids=torch.tensor([ids]), images=images).logits.isfinite().all())


def test_a_conversation_of_turns(case: Case) -> None:
    """Two turns with images give what the reference's template and processor give."""
    oracle: Any = case.oracle
    if oracle.processor.chat_template is None:
        pytest.skip("no chat template is published")
    one, other = picture(64, 52), picture(30, 70)
    many = case.reference.most_images > 1
    shown = [one, other] if many else [one]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red apple"}]},
        {
            "role": "user",
            "content": [*([{"type": "image"}] if many else []), {"type": "text", "text": "and now"}],
        },
    ]
    text = oracle.processor.apply_chat_template(turns, add_generation_prompt=True)
    expected = oracle.inputs_of([text], [shown])["input_ids"][0].tolist()
    images = iter(shown)
    ours = [
        {
            "role": turn["role"],
            "content": [
                part if part["type"] == "text" else {"type": "image", "image": next(images)}
                for part in turn["content"]
            ],
        }
        for turn in turns
    ]
    assert case.um.processor.chat(ours)[0] == expected
