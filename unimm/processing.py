"""Words and pictures to model inputs and back: `UniMMProcessor`.

How turns are marked is a `Conversation`: unimm's own is `<bos><user>` images and text `<assistant>` answer
`<eos>`; a published checkpoint keeps its own words. A prompt for a drawing ends in the layout's begin token. Text
of the user is never read as a special token, whatever is typed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from unimm.configuration import UniMMConfig
from unimm.errors import UserError
from unimm.images import atomic_write, read_image, to_tensor, to_uint8
from unimm.layout import ImageLayout

CAPTION_REQUESTS = ("describe the picture", "what does the picture show?", "caption this")
"""Ways to ask for a caption in training; `UniMM.caption` uses the first."""
PROCESSOR_FILE = "processor_config.json"
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation that bring [0, 1] to [-1, 1]
MIN_SIDE = 14  # pixels that the short side of a very long picture keeps, as Janus has it


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The words around a user's turn; each is one of the tokenizer's special tokens or plain text.

    Attributes:
        user: what opens the user's turn.
        assistant: what closes it and asks for the answer.
        system: what is said first, if an answer in words is wanted; drawings get none.
        after_image: what follows each image.
        between_images: what comes before each image but the first.
    """

    user: str = "<user>"
    assistant: str = "<assistant>"
    system: str = ""
    after_image: str = ""
    between_images: str = ""

    @classmethod
    def deepseek(cls, user: str, assistant: str, system: str) -> Conversation:
        """Janus's turns, `user: text`, blank line, `assistant:` (`janus/utils/conversation.py`)."""
        opening = f"{system}\n\n" if system else ""
        return cls(f"{user}: ", f"\n\n{assistant}:", opening, after_image="\n", between_images="\n")


class UniMMProcessor:
    """Joins a text tokenizer with the image sizes and the layout of a model.

    Args:
        tokenizer: any fast tokenizer.
        layout: how images sit among the tokens.
        image_size: pixels a side of an image to understand, None if the model has no encoder.
        pad_value: grey level 0..255, or one for each channel, that pads an image to understand to a square.
        drawing_size: pixels a side of an image to generate, None if the model cannot draw.
        context: most positions of the stream.
        conversation: how turns are marked.
        mean: what is taken from each channel of an image to understand, in [0, 1].
        std: what it is divided by.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: ImageLayout,
        image_size: int | None,
        pad_value: int | Sequence[int],
        drawing_size: int | None,
        context: int,
        conversation: Conversation = Conversation(),
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.image_size = image_size
        self.pad_colour = (pad_value,) * 3 if isinstance(pad_value, int) else tuple(pad_value)
        self.drawing_size = drawing_size
        self.context = context
        self.pad, self.bos, self.eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.conversation = conversation
        self.mean, self.std = tuple(mean), tuple(std)

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
            Conversation(**(config.conversation or {})),
            vision.mean if vision else (0.5, 0.5, 0.5),
            vision.std if vision else (0.5, 0.5, 0.5),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: UniMMConfig) -> UniMMProcessor:
        """Load the tokenizer of a saved model."""
        return cls.from_config(config, read_tokenizer(folder))

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

    def ids(self, *parts: str | Sequence[int]) -> list[int]:
        """Return the tokens of a text given in parts: words of the conversation or the user, and tokens as they are.

        Neighbouring words are tokenised together, as they would be if the text were typed whole.
        """
        tokens: list[int] = []
        words = ""
        for part in parts:
            if isinstance(part, str):
                words += part
                continue
            tokens += [*self._plain(words), *part]
            words = ""
        return tokens + self._plain(words)

    def _plain(self, words: str) -> list[int]:
        return self.text_ids(words) if words else []

    def marks(self, words: str) -> list[str | Sequence[int]]:
        """Return words of the conversation in parts, the special tokens in them as tokens."""
        special = self.tokenizer.get_added_vocab()
        longest_first = sorted(special, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", words) if special else [words]
        return [[special[piece]] if piece in special else piece for piece in pieces if piece]

    def opening(self, images: int) -> list[str | Sequence[int]]:
        """Return what comes before a question, in parts: the system's words, the user's mark, the images."""
        turn = self.conversation
        picture = [self.layout.understanding_tokens(), *self.marks(turn.after_image)]
        pictures = [*picture, *[*self.marks(turn.between_images), *picture] * (images - 1)] if images else []
        return [[self.bos], *self.marks(turn.system), *self.marks(turn.user), *pictures]

    def question_ids(self, question: str, images: int = 1) -> list[int]:
        """Return a prompt for a text answer: the images first, then the question.

        Raises:
            UserError: the prompt leaves no room in the context for an answer.
        """
        ids = self.ids(*self.opening(images), question.strip(), *self.marks(self.conversation.assistant))
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
        turn = self.conversation
        ids = self.ids(
            [self.bos],
            *self.marks(turn.user),
            prompt.strip(),
            *self.marks(turn.assistant),
            [self.layout.begin],
        )
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
        squares = [letterbox(read_image(image), self.image_size, self.pad_colour) for image in images]
        pixels = to_tensor(np.stack([np.asarray(square) for square in squares]))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels + 1) / 2 - mean) / std if (self.mean, self.std) != HALVES else pixels

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


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a text tokenizer; that transformers does not know the model beside it is not worth a warning."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    finally:
        hf_logging.set_verbosity(level)
    return tokenizer


def letterbox(image: Image.Image, side: int, colour: tuple[int, ...]) -> Image.Image:
    """Return a picture brought to `side` pixels by its long side and padded (transformers' `JanusImageProcessor`)."""
    scale = side / max(image.size)
    width, height = (max(round(length * scale), MIN_SIDE) for length in image.size)
    square = Image.new("RGB", (max(width, height),) * 2, colour)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((square.width - width) // 2, (square.height - height) // 2))
    return square
