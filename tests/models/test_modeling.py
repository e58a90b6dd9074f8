"""The unified model against its parts: what each head sees, what the losses count, what padding must not change."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from unimm.models import losses
from unimm.models.inputs import Images
from unimm.models.layout import IGNORED
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM


def start_alone() -> None:
    """Make this process a group of one."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def drawing_batch(um: UniMM) -> dict[str, torch.Tensor]:
    """Two rows: a caption and a drawing; a question about an image, padded on the right."""
    processor, generator = um.processor, torch.Generator().manual_seed(0)
    codes = torch.randint(32, (1, 4, 4), generator=generator)
    drawing = processor.drawing_ids("a red apple") + processor.layout.drawing_steps()
    question = [*processor.question_ids("what is this?"), *processor.text_ids("a red apple"), processor.eos]
    length = max(len(drawing), len(question))
    ids = torch.full((2, length), processor.pad)
    ids[0, : len(drawing)], ids[1, : len(question)] = torch.tensor(drawing), torch.tensor(question)
    labels = torch.full_like(ids, IGNORED)
    labels[0, len(drawing) - 16 : len(drawing)] = codes.flatten()
    answer = len(processor.question_ids("what is this?"))
    labels[1, answer : len(question)] = ids[1, answer : len(question)]
    pixels = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_codes": codes}


def test_text_logits_are_the_decoders_own(tiny_model: UniMM) -> None:
    model = tiny_model.model
    ids = torch.tensor([tiny_model.processor.text_ids("a red apple on a blue background")])
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, model.decoder(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_losses_by_hand(tiny_model: UniMM) -> None:
    model, batch = tiny_model.model, drawing_batch(tiny_model)
    with torch.no_grad():
        output = model(**batch)
        stream = model.embed(
            batch["input_ids"], Images(batch["pixel_values"], codes=batch["image_codes"])
        ).stream
        hidden = model.decode(stream).last_hidden_state
        counted = batch["labels"][1] != IGNORED
        text_logits = model.decoder.lm_head(hidden[1, :-1][counted[1:]])
        start = int((batch["labels"][0] != IGNORED).nonzero()[0])
        code_logits = model.code_logits(
            hidden[0, start - 1 : start + 15]
        )  # each place predicts the next code
    codes = F.cross_entropy(code_logits, batch["image_codes"].flatten(), reduction="sum")
    text = F.cross_entropy(text_logits, batch["labels"][1][counted], reduction="sum")
    torch.testing.assert_close(output.code_loss, codes)
    torch.testing.assert_close(output.text_loss, text)
    assert (output.code_count, output.text_count) == (16, int(counted.sum()))
    torch.testing.assert_close(output.loss, (codes + text) / (16 + counted.sum()))
    assert output.logits is None


def test_chunked_loss_equals_whole(tiny_model: UniMM, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model.model, drawing_batch(tiny_model)

    def gradients(chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(losses, "LOSS_CHUNK", chunk)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert model.code_head is not None
        return loss.detach(), model.code_head[2].weight.grad.clone()

    for whole, chunked in zip(gradients(4096), gradients(3), strict=True):
        torch.testing.assert_close(chunked, whole)
    model.zero_grad(set_to_none=True)


def test_empty_chunks_change_no_loss() -> None:
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(4, 7), torch.randn(5, 4), torch.randint(7, (5,))
    found = []
    for count in (1, 3):
        head.zero_grad()
        losses.summed_loss(head, hidden, targets, count).backward()
        assert head.weight.grad is not None
        found.append(head.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_in_lockstep_every_part_runs_and_nothing_changes(tiny_model: UniMM) -> None:
    """Text alone reaches no other part, but each has a gradient, of 0."""
    start_alone()
    model, ids = tiny_model.model, torch.arange(20, 30)[None]
    model.zero_grad(set_to_none=True)
    plain = model(input_ids=ids, labels=ids).text_loss
    output = model(input_ids=ids, labels=ids, lockstep=True)
    (output.text_loss + output.code_loss).backward()
    torch.testing.assert_close(output.text_loss, plain, rtol=0, atol=0)
    for name, part in model.parts().items():
        for key, weight in part.named_parameters():
            if "attn_pool" not in key:
                assert weight.grad is not None, (name, key)
                assert name == "decoder" or not weight.grad.any()
    model.zero_grad(set_to_none=True)


def test_left_padding_changes_no_logits(tiny_model: UniMM) -> None:
    model, processor = tiny_model.model, tiny_model.processor
    short, long = processor.question_ids("what?"), processor.question_ids("what is this red apple on?")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids, mask = processor.pad_left([short, long])
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        alone = model(input_ids=torch.tensor([short]), pixel_values=pixels[:1]).logits
    torch.testing.assert_close(both[0, -len(short) :], alone[0], rtol=1e-5, atol=1e-5)


def test_images_must_fill_their_places(tiny_model: UniMM) -> None:
    model, batch = tiny_model.model, drawing_batch(tiny_model)
    with pytest.raises(ValueError, match="images: codes: 32 given, but the tokens have room for 16"):
        model(**{**batch, "image_codes": batch["image_codes"].repeat(2, 1, 1)})
    with pytest.raises(ValueError, match="images: features: 8 given"):
        model(**{**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})


def test_the_image_tokenizer_never_trains(tiny_model: UniMM) -> None:
    model = tiny_model.model
    model.train()
    assert model.training and not any(module.training for module in model.image_tokenizer.modules())
    model(**drawing_batch(tiny_model)).loss.backward()
    assert all(parameter.grad is None for parameter in model.image_tokenizer.parameters())
    assert any(parameter.grad is not None for parameter in model.code_head.parameters())
    model.zero_grad(set_to_none=True)
    model.eval()


def test_parts_cover_all_but_the_tokenizer(tiny_model: UniMM) -> None:
    model = tiny_model.model
    parts = {id(p) for part in model.parts().values() for p in part.parameters()}
    tokenizer = {id(p) for p in model.image_tokenizer.parameters()}
    assert parts | tokenizer == {id(p) for p in model.parameters()} and not parts & tokenizer


def test_auto_classes_load_a_saved_model(tiny_model: UniMM, tmp_path: object) -> None:
    from transformers import AutoConfig, AutoModel

    tiny_model.save(str(tmp_path))
    assert AutoConfig.from_pretrained(str(tmp_path)).model_type == "unimm"
    again = AutoModel.from_pretrained(str(tmp_path))
    assert isinstance(again, UniMMModel)
    for (name, ours), theirs in zip(
        tiny_model.model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
