"""Models that are put together from parts alone: what each has to do, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

import unimm
from unimm.models.configuration import UniMMConfig
from unimm.models.inputs import Images, Rows
from unimm.models.modeling import UniMMModel
from unimm.models.parts import PART_KINDS
from unimm.pipeline import UniMM
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor

Pictures = Sequence[Image.Image]


def compose(parts: dict[str, Any], text_tokenizer: PreTrainedTokenizerBase, std: float = 0.2) -> UniMM:
    """A model of these fields of `UniMMConfig`, its weights random and large enough that parts matter.

    Embeddings are small: where they are the head too, every token would else be followed by itself.
    """
    config = UniMMConfig(**parts)
    model = UniMMModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scales = parameter.ndim == 1 and name.endswith("weight")  # the weights of norms
            size = std / 8 if "embed_tokens" in name else std
            parameter.copy_(1 + 0.1 * noise if scales else size * noise)
    return UniMM(model, UniMMProcessor(config, text_tokenizer))


@torch.no_grad()
def check_packed(um: UniMM, questions: Sequence[str], images: Sequence[Pictures]) -> None:
    """Check that samples in one row, each seeing only itself, and padded on the left, give what each gives alone."""
    asked = [um.processor.question(*pair) for pair in zip(questions, images, strict=True)]
    alone = [um.model(input_ids=torch.tensor([ids]), images=shown).logits[0] for ids, shown in asked]
    lengths = [len(ids) for ids, _ in asked]
    rows = Rows(
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        samples=torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None],
        branches=torch.zeros(1, sum(lengths), dtype=torch.int64),
    )
    together = Images.cat(shown for _, shown in asked)
    stream = torch.tensor([[token for ids, _ in asked for token in ids]])
    packed = um.model(input_ids=stream, images=together, rows=rows).logits[0]
    ids, mask = um.processor.pad_left([ids for ids, _ in asked])
    padded = um.model(input_ids=ids, attention_mask=mask, images=together).logits
    spread = max(one.abs().max().item() for one in alone)
    assert spread > 0.1
    for own, part, row in zip(alone, packed.split(lengths), padded, strict=True):
        assert (part - own).abs().max() < 1e-5 * spread
        assert (row[-len(own) :] - own).abs().max() < 1e-5 * spread


@torch.no_grad()
def check_captions(um: UniMM, images: Pictures, tokens: int = 6) -> None:
    """Check that captions, made together, are what whole passes give token by token, and are of their images."""
    captions = um.caption(list(images), max_new_tokens=tokens)
    expected, seen = [], set()
    for image in images:
        ids, shown = um.processor.question(CAPTION_REQUESTS[0], [image])
        made: list[int] = []
        while len(made) < tokens:
            logits = um.model(input_ids=torch.tensor([ids + made]), images=shown).logits[0, -1]
            made.append(int(logits.argmax()))
            if made[-1] in um.processor.end_tokens:
                made.pop()
                break
        seen |= set(made)
        expected.append(str(um.processor.tokenizer.decode(made, skip_special_tokens=True)).strip())
    assert captions == expected
    assert len(set(captions)) > 1 and len(seen) > 3


def check_saved(um: UniMM, folder: Path, images: Pictures) -> None:
    """Check that a folder of a model loads as the model."""
    um.save(folder)
    again = unimm.load(folder, device="cpu")
    ours, theirs = um.model.config, again.model.config
    assert [theirs.part(name) for name in PART_KINDS] == [ours.part(name) for name in PART_KINDS]
    assert theirs.decoder == ours.decoder and theirs.image_layout() == ours.image_layout()
    assert theirs.conversation == ours.conversation
    state = again.model.state_dict()
    assert state.keys() == um.model.state_dict().keys()
    assert all(torch.equal(state[name], own) for name, own in um.model.state_dict().items())
    assert again.caption(list(images), max_new_tokens=4) == um.caption(list(images), max_new_tokens=4)
