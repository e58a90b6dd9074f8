"""Words and pictures to model inputs and back: `UniMMProcessor`.

A conversation is `<bos><user>` images and text `<assistant>` answer `<eos>`. A prompt for a drawing ends in the
layout's begin token. Text of the user is never read as a special token, whatever is typed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase

from unimm.configuration import UniMMConfig
from unimm.errors import UserError
from unimm.images import atomic_write, read_image, to_tensor, to_uint8
from unimm.layout import ImageLayout

CAPTION_REQUESTS = ("describe the picture", "what does the picture show?", "caption this")
"""Ways to ask for a caption in training; `UniMM.caption` uses the first."""
PROCESSOR_FILE = "processor_config.json"


class UniMMProcessor:
    """Joins a text tokenizer with the image sizes and the layout of a model.

    Args:
        tokenizer: any fast tokenizer with the tokens `<user>` and `<assistant>`.
        layout: how images sit among the tokens.
        image_size: pixels a side of an image to understand, None if the model has no encoder.
        pad_value: grey level 0..255 that pads an image to understand to a square.
        drawing_size: pixels a side of an image to generate, None if the model cannot draw.
        context: most positions of the stream.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: ImageLayout,
        image_size: int | None,
        pad_value: int,
        drawing_size: int | None,
        context: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.image_size = image_size
        self.pad_value = pad_value
        self.drawing_size = drawing_size
        self.context = context
        self.pad, self.bos, self.eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        vocabulary = tokenizer.get_vocab()
        self.user, self.assistant = vocabulary["<user>"], vocabulary["<assistant>"]

    @classmethod
    def from_config(cls, config: UniMMConfig, tokenizer: PreTrainedTokenizerBase) -> UniMMProcessor:
        """Make the processor that a model of this configuration needs."""
        vision, generation = config.vision_config(), config.generation_config()
        return cls(
            tokenizer,
            ImageLayout(**config.layout),
            vision.image_size if vision else None,
            vision.pad_value if vision else 127,
            generation.image_size if generation else None,
            config.decoder_config().max_position_embeddings,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: UniMMConfig) -> UniMMProcessor:
        """Load the tokenizer of a saved model."""
        return cls.from_config(config, AutoTokenizer.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and a note of the sizes (which themselves live in `config.json`)."""
        self.tokenizer.save_pretrained(folder)
        sizes = {
            "processor_class": "UniMMProcessor",
            "image_size": self.image_size,
            "drawing_size": self.drawing_size,
        }
        with atomic_write(Path(folder) / PROCESSOR_FILE) as temporary:
            temporary.write_text(json.dumps(sizes, indent=2) + "\n")

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of plain text; what looks like a special token is spelled out."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def question_ids(self, question: str, images: int = 1) -> list[int]:
        """Return a prompt for a text answer: the images first, then the question.

        Raises:
            UserError: the prompt leaves no room in the context for an answer.
        """
        pictures = self.layout.understanding_tokens() * images
        ids = [self.bos, self.user, *pictures, *self.text_ids(question), self.assistant]
        if len(ids) >= self.context:
            raise UserError(
                f"question: {len(ids)} tokens with its images, the context holds {self.context}; shorten it"
            )
        return ids

    def drawing_ids(self, prompt: str, codes: int) -> list[int]:
        """Return a prompt for a drawing of `codes` steps, up to and with the begin token.

        Raises:
            UserError: the prompt is empty or leaves too little room in the context.
        """
        if not prompt.strip():
            raise UserError("prompt: empty; say what to draw")
        ids = [self.bos, self.user, *self.text_ids(prompt), self.assistant, self.layout.begin]
        if len(ids) + codes > self.context:
            room = self.context - codes
            raise UserError(f"prompt: {len(ids)} tokens, a drawing leaves room for {room}; shorten it")
        return ids

    def unconditional_ids(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the prompt without its content, as Janus guides: all but the first and last become pad."""
        return [prompt_ids[0], *[self.pad] * (len(prompt_ids) - 2), prompt_ids[-1]]

    def pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return input ids and attention mask [B, T] of prompts of different lengths."""
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self.pad)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, longest - len(row) :] = torch.tensor(row)
            attention_mask[i, longest - len(row) :] = 1
        return input_ids, attention_mask

    def pixels(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Return images to understand, float [N, 3, S, S] in [-1, 1]: long side to S, padded with grey."""
        if self.image_size is None:
            raise UserError("images: this model has no understanding encoder")
        size, grey = (self.image_size, self.image_size), (self.pad_value,) * 3
        squares = [
            ImageOps.pad(read_image(image), size, Image.Resampling.BICUBIC, color=grey) for image in images
        ]
        return to_tensor(np.stack([np.asarray(square) for square in squares]))

    def drawing_pixels(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Return images to tokenise, float [M, 3, S, S] in [-1, 1]: short side to S, cropped."""
        if self.drawing_size is None:
            raise UserError("images: this model has no image tokenizer")
        size = (self.drawing_size, self.drawing_size)
        squares = [ImageOps.fit(read_image(image), size, Image.Resampling.BICUBIC) for image in images]
        return to_tensor(np.stack([np.asarray(square) for square in squares]))

    def __call__(
        self, questions: Sequence[str], images: Sequence[Sequence[str | Path | Image.Image]]
    ) -> BatchFeature:
        """Return a batch of questions, each with its own images, padded on the left."""
        rows = [
            self.question_ids(text, len(pictures)) for text, pictures in zip(questions, images, strict=True)
        ]
        input_ids, attention_mask = self.pad_left(rows)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        flat = [picture for pictures in images for picture in pictures]
        if flat:
            inputs["pixel_values"] = self.pixels(flat)
        return BatchFeature(inputs)

    def decode_text(self, ids: Tensor) -> list[str]:
        """Return the text of generated rows [B, T]."""
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def to_images(self, pixels: Tensor) -> list[Image.Image]:
        """Return pictures of float pixels [B, 3, H, W] in [-1, 1]."""
        return [Image.fromarray(array) for array in to_uint8(pixels)]
