"""Molmo against what its authors' code gave for the same small weights, images and prompts."""

from __future__ import annotations

import dataclasses
import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import unimm
from tests.families import molmo_reference as molmo
from tests.families.survey import picture
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.model import key_map
from unimm.families.molmo_documents import ExpertDocument
from unimm.families.molmo_experts import expert_decoder
from unimm.families.source import Checkpoint
from unimm.models.decoders import decoder_config
from unimm.models.inputs import Images, Rows
from unimm.models.seeing import seen_of
from unimm.pipeline import UniMM
from unimm.processing.canvas import ALL, PARTLY
from unimm.processing.messages import SHOWN, Message
from unimm.processing.processor import grids_of
from unimm.processing.views import CanvasViews
from unimm.sampling.engine import Engine
from unimm.sampling.requests import TextRequest, TextSampling
from unimm.sections import validate

RECORDED, DESCRIPTION = molmo.recorded(), molmo.description()
QUESTION, CASES = DESCRIPTION["question"], DESCRIPTION["cases"]


def image(name: str, kind: str = "images") -> Image.Image:
    return picture(*DESCRIPTION[kind][name]["size"])


@dataclasses.dataclass
class Case:
    """A checkpoint of one decoder."""

    kind: str
    folder: Path
    um: UniMM

    def asked(self, case: str) -> tuple[list[int], Images]:
        """The prompt of a case: ids, and what the model sees."""
        return self.um.processor.question(QUESTION, [image(name) for name in CASES[case]])

    def recorded(self, name: str) -> Tensor:
        return RECORDED[f"{self.kind}.{name}"]


@pytest.fixture(scope="module", params=molmo.KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("molmo") / str(request.param)
    molmo.write(folder, request.param)
    return Case(request.param, folder, unimm.load(folder, device="cpu"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("molmo") / "only"
    molmo.write(folder, "qwen")
    return Case("qwen", folder, unimm.load(folder, device="cpu"))


def patches(pixels: Tensor, side: int) -> Tensor:
    """Views as the authors have them: [views, patches, row column channel]."""
    views, _, height, width = pixels.shape
    cells = pixels.view(views, 3, height // side, side, width // side, side)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(views, -1, 3 * side**2)


def kinds_of(masks: Tensor) -> Tensor:
    """Kinds of padding of the authors' shares of each patch that are no padding."""
    found = torch.full(masks.shape, PARTLY, dtype=torch.uint8)
    found[masks == 0], found[masks == 1] = ALL, 0
    return found


# --- images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DESCRIPTION["images"])
def test_pixels_and_padding(name: str, qwen: Case) -> None:
    seen = qwen.um.processor.look([image(name)])
    assert seen.pixels is not None and seen.padding is not None
    assert grids_of(seen) == [tuple(DESCRIPTION["images"][name]["grid"])]
    expected = RECORDED[f"processor.{name}.pixels"]
    got = patches(seen.pixels, molmo.PATCH)
    assert (got.flatten()[:: DESCRIPTION["stride"]] - expected).abs().max() < 1e-6
    assert torch.equal(seen.padding, kinds_of(RECORDED[f"processor.{name}.image_masks"]))
    assert bool((seen.padding[-1] == PARTLY).all())  # published, whatever the last crop shows
    if name == "small":
        assert (got[0] - RECORDED["processor.small.whole"]).abs().max() < 1e-6
    ids = qwen.um.processor.ids(*qwen.um.processor.layout.understanding(*grids_of(seen)[0]))
    assert ids == RECORDED[f"processor.{name}.tokens"].tolist()


@pytest.mark.parametrize("name", DESCRIPTION["published"])
def test_pixels_of_the_published_geometry(name: str, qwen: Case) -> None:
    views: Any = qwen.um.processor.views
    rule = dataclasses.replace(views.rule, tile=336, most=12, overlap=56)
    seen = CanvasViews(views.mean, views.std, rule, 14).prepare([image(name, "published")])
    assert seen.pixels is not None and seen.padding is not None
    assert grids_of(seen) == [tuple(DESCRIPTION["published"][name]["grid"])]
    at = RECORDED[f"published.{name}.places"].long()
    got = patches(seen.pixels, 14).flatten()[at]
    assert (got - RECORDED[f"published.{name}.pixels"]).abs().max() < 2e-6
    sums = RECORDED[f"published.{name}.mask_sums"]
    whole, some = (seen.padding == 0).sum(1), (seen.padding != ALL).sum(1)
    assert bool(((whole <= sums) & (sums <= some))[:-1].all()) and sums[-1] == -576


@torch.no_grad()
def test_features_of_the_tower_and_their_padding(qwen: Case) -> None:
    model: Any = qwen.um.model
    seen = qwen.um.processor.look([image("upright")])
    assert seen.pixels is not None and seen.padding is not None
    features = model.vision(seen.pixels)
    views = DESCRIPTION["views"]["upright"]
    assert (features[views, ::9] - RECORDED["qwen.tower.upright"]).abs().max() < 1e-5
    marks = torch.cat([torch.zeros(1, features.shape[-1]), model.connector.reducer.padding])
    padded = features + marks[seen.padding.long()]
    assert (padded[views, ::9] - RECORDED["qwen.padded.upright"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", DESCRIPTION["views"])
@torch.no_grad()
def test_features_after_the_connector(name: str, qwen: Case) -> None:
    """Each token's, by where the authors' code puts it; of margins that another crop has there is none."""
    model: Any = qwen.um.model
    seen = qwen.um.processor.look([image(name)])
    tokens = model.connector(model.vision(seen.pixels), seen_of(model.seeing, seen, qwen.um.processor.layout))
    places = RECORDED[f"processor.{name}.image_input_idx"].long()
    order = {place: rank for rank, place in enumerate(sorted(places[places >= 0].tolist()))}
    assert len(order) == len(tokens)
    for own, view in zip(RECORDED[f"qwen.features.{name}"], DESCRIPTION["views"][name], strict=True):
        held = places[view] >= 0
        got = tokens[[order[place] for place in places[view][held].tolist()]]
        assert (got - own[held]).abs().max() < 1e-5


# --- the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_tokens_and_logits(name: str, case: Case) -> None:
    ids, images = case.asked(name)
    assert ids == case.recorded(f"{name}.input_ids").tolist()
    logits = case.um.model(input_ids=torch.tensor([ids]), images=images).logits[0]
    assert (logits[-6:] - case.recorded(f"{name}.last")).abs().max() < 1e-5
    assert (logits[:, :: DESCRIPTION["columns"]] - case.recorded(f"{name}.columns")).abs().max() < 1e-5
    assert (logits.logsumexp(-1) - case.recorded(f"{name}.logsumexp")).abs().max() < 1e-5
    if name == "three":  # the authors' own places, all at the first image, are another model's answer
        assert (logits[-6:] - case.recorded("three.as_given.last")).abs().max() > 0.5


def test_greedy_answers(case: Case) -> None:
    engine = Engine(case.um.model, case.um.processor)
    sampling = TextSampling(max_new_tokens=5)
    answers = list(engine.run(TextRequest(*case.asked(name), sampling=sampling) for name in CASES))
    assert [answer.ids for answer in answers] == [case.recorded(f"{name}.greedy").tolist() for name in CASES]


def test_loss_and_gradients(case: Case) -> None:
    um = case.um
    seen = um.processor.look([image("upright")])
    messages = [Message("user", (SHOWN, QUESTION)), Message("assistant", (DESCRIPTION["answer"],))]
    row = um.processor.conversation.write(messages, grids_of(seen))
    targets, counted = case.recorded("loss.target_ids"), case.recorded("loss.loss_masks") > 0
    assert row.ids[:-1] == case.recorded("loss.input_ids").tolist()
    labels = torch.tensor(row.labels)
    assert torch.equal(labels[1:] >= 0, counted)
    assert torch.equal(labels[1:][counted], targets[counted].long())
    um.model.zero_grad()
    output = um.model(input_ids=torch.tensor([row.ids]), images=seen, labels=labels[None])
    output.loss.backward()
    assert abs(output.loss.item() - case.recorded("loss.value").item()) < 1e-5
    gradients = _theirs(case)
    um.model.zero_grad()
    recorded = molmo.recorded(f"{case.kind}.loss.gradient")
    assert len(recorded) >= len(DESCRIPTION["gradients"])
    for name, expected in recorded.items():
        got = gradients[name]
        rows = f"{case.kind}.loss.rows.{name}"
        got = got[RECORDED[rows].long()] if rows in RECORDED else got[: len(expected)]
        assert expected.abs().max() > 1e-4, name
        assert (got - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max().item()), name


def _theirs(case: Case) -> dict[str, Tensor]:
    """Gradients by the published names."""
    checkpoint = Checkpoint(case.folder)
    map_ = key_map(checkpoint.family, checkpoint.layout, checkpoint.config)
    found: dict[str, Tensor] = {}
    for ours, parameter in case.um.model.named_parameters():
        if parameter.grad is None:  # of the last block, which no feature is from
            assert "vision.model.blocks.4." in ours
            continue
        entry = map_.entry(ours)
        for name, part in zip(
            entry.theirs, entry.op.to_theirs(parameter.grad, len(entry.theirs)), strict=True
        ):
            found[name] = found[name] + part if name in found else part  # rows of one of theirs
    return found


@torch.no_grad()
def test_packed_equals_alone_and_padded(case: Case) -> None:
    um = case.um
    asked = [case.asked(name) for name in CASES]
    alone = [um.model(input_ids=torch.tensor([ids]), images=images).logits[0] for ids, images in asked]
    lengths = [len(ids) for ids, _ in asked]
    rows = Rows(
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        samples=torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None],
        branches=torch.zeros(1, sum(lengths), dtype=torch.int64),
    )
    together = Images.cat(images for _, images in asked)
    joined = torch.tensor([[token for ids, _ in asked for token in ids]])
    packed = um.model(input_ids=joined, images=together, rows=rows).logits[0]
    ids, mask = um.processor.pad_left([ids for ids, _ in asked])
    padded = um.model(input_ids=ids, attention_mask=mask, images=together).logits
    for own, part, row in zip(alone, packed.split(lengths), padded, strict=True):
        assert (part - own).abs().max() < 1e-4
        assert (row[-len(own) :] - own).abs().max() < 1e-4


@torch.no_grad()
def test_keyword_inputs_and_features_stand_in_for_pixels(qwen: Case) -> None:
    um = qwen.um
    ids, images = qwen.asked("three")
    expected = um.model(input_ids=torch.tensor([ids]), images=images).logits
    batch = um.processor([QUESTION], [[image(name) for name in CASES["three"]]])
    assert torch.equal(um.model(**batch).logits, expected)
    given = um.model.as_features(images)
    mixed = Images.cat([given.part(0, 1), images.part(1, 2), given.part(2, 3)])
    assert mixed is not None and images.padding is not None and mixed.padding is not None
    assert torch.equal(mixed.padding, images.padding)
    stored = [
        um.processor.store_features(
            one.features.numpy(),
            grids_of(one)[0],
            one.padding.flatten().numpy(),
        )
        for one in (given.part(place, place + 1) for place in range(3))
    ]
    for other in (given, mixed, um.processor.stored_features(stored)):
        got = um.model(input_ids=torch.tensor([ids]), images=other).logits
        assert (got - expected).abs().max() < 1e-4


def test_parts_without_an_image_run_in_lockstep(qwen: Case) -> None:
    """On views that stand for none: nothing is added, and every parameter of the connector has a gradient."""
    model: Any = qwen.um.model
    ids = torch.tensor([qwen.asked("none")[0]])
    model.zero_grad()
    stream = model.embed(ids, None, lockstep=True).stream
    assert torch.equal(stream, model.embed(ids).stream)
    stream.sum().backward()
    assert all(parameter.grad is not None for parameter in model.connector.parameters())
    model.zero_grad()


# --- conversations ------------------------------------------------------------------------------------------


def test_a_conversation_of_turns(qwen: Case) -> None:
    asked, answer, again, last = DESCRIPTION["conversation"]
    messages = [
        Message("user", (SHOWN, asked)),
        Message("assistant", (answer,)),
        Message("user", (again,)),
        Message("assistant", (last,)),
    ]
    row = qwen.um.processor.conversation.write(messages, [(1, 1)])
    assert row.ids[:-1] == RECORDED["qwen.conversation.input_ids"].tolist()
    counted = RECORDED["qwen.conversation.loss_masks"] > 0
    assert [label >= 0 for label in row.labels[1:]] == counted.tolist()


def test_an_image_within_the_words(qwen: Case) -> None:
    before, after = DESCRIPTION["inside"].split("<|image|>")
    message = Message("user", (before, SHOWN, after))
    assert (
        qwen.um.processor.conversation.ask([message], [(1, 1)]) == RECORDED["qwen.inside.input_ids"].tolist()
    )


def test_images_of_later_turns_stand_before_them(qwen: Case) -> None:
    processor = qwen.um.processor
    messages = [
        Message("user", ("what?",)),
        Message("assistant", ("red",)),
        Message("user", (SHOWN, SHOWN, "and")),
    ]
    text = processor.tokenizer.decode(processor.conversation.ask(messages, [(1, 1)] * 2))
    shown = processor.tokenizer.decode(processor.ids(*processor.layout.understanding(1, 1)))
    assert text == f"<|endoftext|> User: what? Assistant: red<|endoftext|>{shown * 2} User: and Assistant:"


# --- files and faults ---------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_files_come_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    convert(case.folder, tmp_path / "ours", "unimm")
    again = unimm.load(tmp_path / "ours", device="cpu")
    own, other = case.um.model.state_dict(), again.model.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    ids, images = again.processor.question(QUESTION, [image("upright")])
    assert ids == case.recorded("one.input_ids").tolist() and images.padding is not None
    convert(tmp_path / "ours", tmp_path / "back", "original")
    before, after = weights(case.folder), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    files = {path.name for path in case.folder.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == files
    small = [name for name in files if not name.endswith(".safetensors")]
    assert filecmp.cmpfiles(case.folder, tmp_path / "back", small, shallow=False)[0] == small


def test_a_line_for_images_that_do_not_fit(qwen: Case) -> None:
    um = qwen.um
    ids, images = qwen.asked("one")
    for cut in (ids[: len(ids) // 2], [*ids, um.processor.layout.feature]):
        with pytest.raises(ValueError, match=r"^images: .*room"):
            um.model(input_ids=torch.tensor([cut]), images=images)
    bare = dataclasses.replace(images, padding=None)
    with pytest.raises(ValueError, match=r"^images: padding: none, but there are 7 views"):
        um.model(input_ids=torch.tensor([ids]), images=bare)
    with pytest.raises(UserError, match=r"^image: 1 x 4000 pixels, .* has no pixel across"):
        um.processor.look([picture(1, 4000)])


PUBLISHED_EXPERTS = {
    "d_model": 2048, "n_layers": 16, "n_heads": 16, "embedding_size": 50304, "vocab_size": 50280,
    "moe_num_experts": 64, "moe_top_k": 8, "max_sequence_length": 4096,
}  # fmt: skip


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "line"),
    [
        ("config", {"moe_num_experts": 64}, r"config\.json: d_model: missing"),
        ("config", {"norm_after": True}, r"config\.json: norm_after, .* \(True, False, True\) is not"),
        ("config", {"vit_layers": [-2, -6]}, r"config\.json: vit_layers: \[-2, -6\] are not all of 5 layers"),
        ("config", {"layer_norm_type": "default"}, r"config\.json: layer_norm_type: "),
        (
            "preprocessor_config",
            {"image_patch_size": 5},
            r"preprocessor_config\.json: image_patch_size: 5 is",
        ),
        ("preprocessor_config", {"overlap_margins": [2, 4]}, r"overlap_margins: \(2, 4\) is not supported"),
        ("preprocessor_config", {"overlap_margins": [3, 3]}, r"views\.overlap: expected a multiple of 8 "),
        (
            "tokenizer_config",
            {"auto_map": {"AutoTokenizer": ["tokenization_molmo.Molmo", None]}},
            r"tokenizer_config\.json: auto_map: code of a checkpoint is never run",
        ),
    ],
)
def test_a_line_for_what_is_not_supported(
    file: str, changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    molmo.write(tmp_path / "hub")
    edit(tmp_path / "hub" / f"{file}.json", **changes)
    with pytest.raises(UserError, match=line):
        unimm.load(tmp_path / "hub", device="cpu")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"moe_top_k": 7}, r"config\.json: moe_top_k: 7 of 6 experts"),
        ({"moe_shared_expert": True}, r"config\.json: moe_shared_expert: "),
        ({"rope_impl": "cockatoo"}, r"config\.json: rope_impl: expected one of llama"),
        ({"image_pooling_2d": "stack"}, r"config\.json: image_pooling_2d: expected one of attention-meanq"),
    ],
)
def test_a_line_for_experts_that_are_not_supported(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    molmo.write(tmp_path / "hub", "experts")
    edit(tmp_path / "hub" / "config.json", **changes)
    with pytest.raises(UserError, match=line):
        unimm.load(tmp_path / "hub", device="cpu")


def test_the_published_molmoe_has_its_parameters() -> None:
    """7.2 billion of them, of which a token passes 1.5 (arXiv 2409.17146)."""
    published = {**molmo.CONFIGS["experts"], **PUBLISHED_EXPERTS}
    document = validate(ExpertDocument, published, "config.json")
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(
            decoder_config(expert_decoder(document, "config.json", {}))
        )
    experts = 3 * 2048 * 1024 * 16
    whole = sum(parameter.numel() for parameter in decoder.parameters())
    assert whole == 6_919_161_856  # OLMoE-1B-7B's
    assert whole - (64 - 8) * experts == 1_282_017_280


def test_a_processor_that_the_tokenizer_names_is_ours(tmp_path: Path) -> None:
    molmo.write(tmp_path / "hub")
    edit(tmp_path / "hub" / "tokenizer_config.json", auto_map={"AutoProcessor": "preprocessing_molmo.Molmo"})
    ids, _ = unimm.load(tmp_path / "hub", device="cpu").processor.question(QUESTION)
    assert ids == RECORDED["qwen.none.input_ids"].tolist()
