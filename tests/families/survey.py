"""One base for the reference side of the survey's systems: small checkpoints, and what transformers makes of them.

A system's file has a `Reference`. It builds a model with random weights by transformers' own classes, writes it in
each published layout, and hands back an `Oracle`, which answers for chats of images and a question what the
reference's processor (with the PIL image backend) and the reference's model give. Nothing here imports unimm, so
both sides of a comparison share no code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

Inputs = dict[str, Tensor]
Pictures = Sequence[Image.Image]
TEXTS = (
    "what is in this image? a red apple on a blue background",
    "what are these? two apples, and a You are a helpful assistant.\n\n",
    "how many red apples are there? there are 3 of 12.5 user assistant system tile Picture 1: ",
)
# the splitting of words that the published byte-level tokenizers begin with, without their rules for rare scripts
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
)


@dataclass
class Oracle:
    """What the reference gives for a checkpoint. Subclasses mend what their system's classes do wrong.

    Attributes:
        model: by transformers' class, in float32 and eval mode.
        processor: by transformers' class, with the PIL image backend.
        placeholders: ids of tokens that image features replace; they are no targets of the loss.
        drops: names that the tokenizer gives and the model does not take.
        eos_token_id: ends an answer; written to `generation_config.json`, though `greedy` ignores it.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    placeholders: tuple[int, ...]
    eos_token_id: int
    drops: tuple[str, ...] = ("token_type_ids",)
    image_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.eval()
        # without an end token, so that greedy answers have the length asked for
        self.model.generation_config = GenerationConfig(pad_token_id=self.tokenizer.pad_token_id)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer: PreTrainedTokenizerFast = self.processor.tokenizer
        return tokenizer

    def texts(self, questions: Sequence[str], images: Sequence[Pictures]) -> list[str]:
        """One user's turn each, its images before its question, by the chat template; open for the answer."""
        chats = [turn_of(len(own), question) for question, own in zip(questions, images, strict=True)]
        return [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]

    def conversations(
        self, chats: Sequence[list[dict[str, Any]]], images: Sequence[Pictures], answered: bool = False
    ) -> Inputs:
        """Like `inputs`, for messages as chat templates take them; `answered` chats are not opened for more."""
        write = self.processor.apply_chat_template
        return self.inputs_of([write(chat, add_generation_prompt=not answered) for chat in chats], images)

    def inputs(self, questions: Sequence[str], images: Sequence[Pictures]) -> Inputs:
        """What the model takes for these chats, left-padded: input_ids int64 [B, T] and what goes with them."""
        return self.inputs_of(self.texts(questions, images), images)

    def inputs_of(self, texts: Sequence[str], images: Sequence[Pictures]) -> Inputs:
        """Like `inputs`, for texts that a chat template has written, with one mark where each image stands."""
        flat = [image for own in images for image in own]
        got = self.processor(
            text=list(texts),
            images=flat or None,
            images_kwargs=dict(self.image_options) if flat else {},
            text_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
            return_tensors="pt",
        )
        return {name: value for name, value in got.items() if name not in self.drops}

    def tokens(self, questions: Sequence[str], images: Sequence[Pictures]) -> list[list[int]]:
        """The ids of each chat, without padding."""
        got = self.inputs(questions, images)
        rows = zip(got["input_ids"], got["attention_mask"], strict=True)
        return [row[seen.bool()].tolist() for row, seen in rows]

    def pixels(self, images: Pictures) -> Inputs:
        """What the image processor alone gives."""
        return dict(self.processor.image_processor(list(images), return_tensors="pt", **self.image_options))

    @torch.no_grad()
    def logits(self, inputs: Inputs) -> Tensor:
        """float32 [B, T, V]; those at padding mean nothing."""
        logits: Tensor = self.forward(inputs).logits
        return logits

    @torch.no_grad()
    def greedy(self, inputs: Inputs, tokens: int, cache: bool = True) -> Tensor:
        """int64 [B, tokens]: the likeliest continuation, an end token being a token like any other."""
        self.reset()
        options = GenerationConfig(max_new_tokens=tokens, do_sample=False, use_cache=cache)
        generate: Any = self.model.generate
        made: Tensor = generate(**inputs, generation_config=options)
        return made[:, inputs["input_ids"].shape[1] :]

    def loss_and_gradients(
        self, inputs: Inputs, names: Sequence[str], labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of the next token over `labels` [B, T], and its gradients by parameter name.

        Without labels all are targets but padding and image features; -100 marks what is none.
        """
        labels = self.labels(inputs) if labels is None else labels
        logits = self.forward(inputs).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        parameters = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        return loss.detach(), dict(zip(names, gradients, strict=True))

    def labels(self, inputs: Inputs) -> Tensor:
        """int64 [B, T]: the ids, -100 at padding and at image features."""
        ids = inputs["input_ids"]
        unlabelled = inputs["attention_mask"] == 0
        for placeholder in self.placeholders:
            unlabelled = unlabelled | (ids == placeholder)
        return ids.masked_fill(unlabelled, -100)

    def forward(self, inputs: Inputs) -> Any:
        """One forward pass, with nothing left in the model by earlier ones."""
        self.reset()
        return self.model(**inputs)

    def reset(self) -> None:
        """Clear what the model's class keeps from one call to the next (nothing, where it is right)."""

    def save(self, folder: Path) -> None:
        """Write the layout of transformers, with the end token that `greedy` ignores."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        # a second time, where the published checkpoints have it
        self.processor.image_processor.save_pretrained(folder)
        ends = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.eos_token_id}
        GenerationConfig(pad_token_id=self.tokenizer.pad_token_id, **ends).save_pretrained(folder)

    def reloaded(self, folder: Path) -> Oracle:
        """The same oracle with the weights of a folder that `save` has written."""
        model = type(self.model).from_pretrained(folder, dtype=torch.float32)
        processor = type(self.processor).from_pretrained(folder)
        # asked for the PIL backend, the processor would want it of its video processor too, which has none
        images = type(self.processor.image_processor).from_pretrained(folder)
        processor.image_processor = images
        again = copy.copy(self)
        again.model, again.processor = model, processor
        again.__post_init__()
        return again


@dataclass(frozen=True)
class Reference:
    """A system of the survey.

    Attributes:
        name: of the system, for the names of tests.
        make: builds the model and the processor, in memory; the same weights at every call.
        layouts: published layout -> what writes a folder of it; "transformers" where its classes have one.
        trained: names of parameters, one or two of each part, for comparing gradients.
        most_images: images that one sample may have.
    """

    name: str
    make: Callable[[], Oracle]
    layouts: Mapping[str, Callable[[Oracle, Path], object]]
    trained: tuple[str, ...]
    most_images: int = 3

    def write(self, folder: Path, layout: str | None = None) -> Oracle:
        """Write a checkpoint in one layout (the first named, if none is) and return what it should give."""
        oracle = self.make()
        folder.mkdir(parents=True, exist_ok=True)
        self.layouts[layout or next(iter(self.layouts))](oracle, folder)
        return oracle

    def write_all(self, folder: Path) -> Oracle:
        """Write every layout, each to the folder of its name within `folder`."""
        oracle = self.make()
        for layout, write in self.layouts.items():
            (folder / layout).mkdir(parents=True, exist_ok=True)
            write(oracle, folder / layout)
        return oracle


def turn_of(images: int, question: str) -> list[dict[str, Any]]:
    """A conversation of one user's message: some images, then a question."""
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of noise over a gradient: every pixel differs, and so do its corners after any resizing."""
    rng = np.random.default_rng([seed, width, height])
    slope = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    noise = rng.integers(0, 76, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))


def randomise(model: PreTrainedModel, seed: int = 0, std: float = 0.2) -> None:
    """Random weights everywhere: biases and norms start at 0 and 1, where a swapped one would not be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scales = parameter.ndim == 1 and name.endswith("weight")  # the weights of norms
            parameter.copy_(1 + 0.1 * noise if scales else std * noise)


def byte_tokenizer(
    first: Sequence[str], last: Sequence[str], names: Mapping[str, str], vocab: int = 320
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with special tokens at its first ids and at its last.

    `names` has bos_token, eos_token, pad_token and unk_token, as far as the system has them, and the names under
    which the system's processor looks for its image tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(first), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in last])
    usual = ("bos_token", "eos_token", "pad_token", "unk_token")
    own = {name: token for name, token in names.items() if name not in usual}
    plain = {name: token for name, token in names.items() if name in usual}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=own, **plain)


def odd_vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of a vocabulary that is odd, and larger than what the tokenizer knows."""
    rows = len(tokenizer) + 4
    return rows + 1 - rows % 2
