"""Log-probabilities of answers: the right head at the right positions, whatever else is in the batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.models import losses
from unimm.models.inputs import Images
from unimm.models.layout import IGNORED
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.preferences.data import read_preferences
from unimm.preferences.losses import LossOptions, Pairs, objective
from unimm.preferences.samples import PairSamples, collate, score_batch
from unimm.training.task import Batch


@pytest.fixture(scope="module")
def samples(pairs_file: Path, tiny_model: UniMM) -> PairSamples:
    return PairSamples(read_preferences(pairs_file), tiny_model.processor, tiny_model.model)


@pytest.fixture(scope="module")
def exact(tiny_model: UniMM) -> UniMMModel:
    """The tiny model in float64, where equal means equal."""
    return copy.deepcopy(tiny_model.model).double()


def batch_of(samples: PairSamples, indices: range | list[int], packed: bool = True) -> Batch:
    return collate([samples[index] for index in indices], samples.processor, packed)


@torch.no_grad()
def by_hand(model: UniMMModel, sample: dict[str, Any], side: str) -> tuple[float, float]:
    """Log-probability and entropy of one answer, alone in its row, from the head's own logits."""
    prompt, answer = sample["prompt"], sample[side]
    codes = answer["codes"][None] if "codes" in answer else None
    ids = answer["row"].ids
    stream = model.embed(torch.tensor([ids]), Images(sample["images"].pixels, codes=codes)).stream
    hidden = model.decode(stream).last_hidden_state[0, len(prompt) - 1 : -1]
    head = model.decoder.get_output_embeddings() if codes is None else model.code_logits
    predicted = head(hidden).log_softmax(-1)
    labels = codes.flatten() if codes is not None else torch.tensor(ids[len(prompt) :])
    log_probs = predicted[torch.arange(len(labels)), labels].sum()
    return log_probs.item(), -(predicted.exp() * predicted).sum().item()


def test_scores_by_hand(samples: PairSamples, exact: UniMMModel) -> None:
    batch = batch_of(samples, range(8))
    with torch.no_grad():
        scores = score_batch(exact, batch)
    for index in range(8):
        for number, side in enumerate(("chosen", "rejected")):
            place = number * 8 + index
            expected = by_hand(exact, samples[index], side)
            assert (scores.log_probs[place].item(), scores.entropy[place].item()) == pytest.approx(
                expected, abs=1e-9
            )
            assert scores.length[place].item() == len(samples[index][side]["row"].ids) - len(
                samples[index]["prompt"]
            )


def left_padded(batch: Batch, pad: int) -> Batch:
    """The same rows filled up on the left, with a plain mask and no positions."""
    reals = (batch["labels"] != IGNORED).flip(1).int().argmax(1)  # what stands after the last label
    ids, labels, answers = (batch[name].clone() for name in ("input_ids", "labels", "answers"))
    mask = torch.zeros_like(ids)
    for row, tail in enumerate(reals.tolist()):
        for tensor in (ids, labels, answers):
            tensor[row] = tensor[row].roll(tail)
        ids[row, :tail], labels[row, :tail], mask[row, tail:] = pad, IGNORED, 1
    moved = {key: value for key, value in batch.items() if key != "position_ids"}
    return {**moved, "input_ids": ids, "labels": labels, "answers": answers, "attention_mask": mask}


def test_packed_padded_or_alone_is_the_same(samples: PairSamples, exact: UniMMModel) -> None:
    rows = batch_of(samples, range(8), packed=False)
    assert len(rows["input_ids"]) == 2 * len(batch_of(samples, range(8))["input_ids"])
    with torch.no_grad():
        packed = score_batch(exact, batch_of(samples, range(8))).log_probs
        apart = score_batch(exact, rows).log_probs
        left = score_batch(exact, left_padded(rows, samples.processor.pad)).log_probs
        alone = [score_batch(exact, batch_of(samples, [index])).log_probs for index in range(8)]
    for other in (apart, left, torch.stack(alone).T.flatten()):
        torch.testing.assert_close(other, packed, rtol=0, atol=1e-9)


def test_float32_is_near_enough(samples: PairSamples, tiny_model: UniMM, exact: UniMMModel) -> None:
    model = tiny_model.model
    with torch.no_grad():
        packed = score_batch(model, batch_of(samples, range(8))).log_probs
        apart = score_batch(model, batch_of(samples, range(8), packed=False)).log_probs
        truth = score_batch(exact, batch_of(samples, range(8))).log_probs
    torch.testing.assert_close(0.1 * apart, 0.1 * packed, rtol=0, atol=2e-6)
    torch.testing.assert_close(0.1 * packed, 0.1 * truth, rtol=0, atol=2e-6)


def test_the_loss_of_both_sides_in_one_row_one_forward_or_two(
    samples: PairSamples, tiny_model: UniMM
) -> None:
    rows = batch_of(samples, range(8), packed=False)

    def side(number: int) -> Batch:
        """The rows of one side, with their codes and images; all answers keep their numbers."""
        images = rows["images"]
        own = Images(images.pixels.chunk(2)[number], codes=images.codes.chunk(2)[number])
        half = {name: value.chunk(2)[number] for name, value in rows.items() if isinstance(value, Tensor)}
        return {**half, "modality": rows["modality"], "images": own}

    def loss(scores: Tensor) -> float:
        chosen, rejected = scores.view(2, -1)
        reference = torch.linspace(-30, -10, 8, dtype=torch.float64)
        lengths = torch.ones(8)
        return (
            objective(
                Pairs(chosen, rejected, reference, reference - 3, lengths, lengths),
                {"sigmoid": 1.0},
                LossOptions(0.1),
            )
            .mean()
            .item()
        )

    with torch.no_grad():
        packed = score_batch(tiny_model.model, batch_of(samples, range(8))).log_probs
        apart = score_batch(tiny_model.model, rows).log_probs
        sides = [score_batch(tiny_model.model, side(number)).log_probs for number in (0, 1)]
    assert (sides[0][8:] == 0).all() and (sides[1][:8] == 0).all()
    for other in (apart, sides[0] + sides[1]):
        assert loss(other) == pytest.approx(loss(packed), abs=1e-6)


def test_chunks_change_nothing(
    samples: PairSamples, exact: UniMMModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value_and_gradient() -> tuple[Tensor, Tensor]:
        exact.zero_grad()
        scores = score_batch(exact, batch_of(samples, range(8))).log_probs
        (scores * torch.arange(16)).sum().backward()
        gradient = exact.get_input_embeddings().weight.grad
        assert gradient is not None
        return scores.detach(), gradient.clone()

    whole = value_and_gradient()
    monkeypatch.setattr(losses, "LOSS_CHUNK", 7)
    for ours, theirs in zip(value_and_gradient(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_each_head_runs_once_over_all_that_fit_into_a_chunk(samples: PairSamples, exact: UniMMModel) -> None:
    seen: list[int] = []
    heads = (exact.code_head, exact.decoder.get_output_embeddings())
    hooks = [
        head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        for head in heads
        if head is not None
    ]
    with torch.no_grad():
        scores = score_batch(exact, batch_of(samples, range(8)))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 and sum(seen) == scores.length.sum()


def test_a_gradient_reaches_only_the_head_that_answers(samples: PairSamples, exact: UniMMModel) -> None:
    exact.zero_grad()
    score_batch(exact, batch_of(samples, [1, 3])).log_probs.sum().backward()  # texts
    assert exact.code_head is not None and exact.code_head[0].weight.grad is None
    score_batch(exact, batch_of(samples, [0])).log_probs.sum().backward()
    assert exact.code_head[0].weight.grad is not None
    exact.zero_grad()


def test_files_become_the_codes_of_the_tokenizer(samples: PairSamples, tiny_model: UniMM) -> None:
    pixels = tiny_model.processor.drawing_pixels([blob.path for blob in samples.preferences[4].files()])
    codes = tiny_model.image_tokenizer.encode(pixels)
    assert torch.equal(samples[4]["chosen"]["codes"], codes[0])
    assert torch.equal(samples[4]["rejected"]["codes"], codes[1])


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "a", "chosen": {"codes": [[0] * 4] * 4}, "rejected": {"codes": [[32] * 4] * 4}},
         "pairs.jsonl:1: rejected: code 32; this model's codes are 0 to 31"),
        ({"prompt": "a", "chosen": {"codes": [[0] * 3] * 4}, "rejected": {"codes": [[1] * 4] * 4}},
         "pairs.jsonl:1: chosen: 4 x 3 codes; this model draws 4 x 4"),
        ({"prompt": "a", "chosen": {"image": "a.png"}, "rejected": {"image": "copy.png"}},
         "pairs.jsonl:1: chosen and rejected are the same codes"),
        ({"prompt": "a", "chosen": "yes", "rejected": "no " * 200}, "rejected: .* tokens with its prompt"),
        ({"prompt": "word " * 200, "chosen": "yes", "rejected": "no"}, "pairs.jsonl:1: question: .* shorten it"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_take(
    pairs_file: Path, tmp_path: Path, tiny_model: UniMM, row: dict[str, Any], line: str
) -> None:
    import json

    for name in ("a.png", "copy.png"):
        (tmp_path / name).write_bytes((pairs_file.parent / "a.png").read_bytes())
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=line):
        _ = PairSamples(read_preferences(path), tiny_model.processor, tiny_model.model)[0]
