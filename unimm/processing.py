"""Words and pictures to model inputs and back: `UniMMProcessor`.

How turns are marked is a `Conversation`: unimm's own is `<bos><user>` images and text `<assistant>` answer
`<eos>`; a published checkpoint keeps its own words. A prompt for a drawing ends in the layout's begin token. Text
of the user is never read as a special token, whatever is typed.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from unimm.layout import ImageLayout, Part

Grid = tuple[int, int]
"""Rows and columns of codes."""
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
        bare_drawings: whether a prompt for a drawing stands alone, without the marks of a turn.
        praise: what is added to every prompt for a drawing (Emu3's quality words).
        negative: what guidance steers away from; None: the prompt with its words blanked, as in Janus.
    """

    user: str = "<user>"
    assistant: str = "<assistant>"
    system: str = ""
    after_image: str = ""
    between_images: str = ""
    bare_drawings: bool = False
    praise: str = ""
    negative: str | None = None

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
        area: least and most pixels of an image that is understood by its codes; None: an encoder understands.
        stride: pixels a side that one code stands for.
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
        area: Sequence[int] | None = None,
        stride: int = 1,
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
        self.area, self.stride = area, stride

    @classmethod
    def from_config(cls, config: UniMMConfig, tokenizer: PreTrainedTokenizerBase) -> UniMMProcessor:
        """Make the processor that a model of this configuration needs."""
        vision, generation = config.vision_config(), config.generation_config()
        pictures = vision or generation  # what understands: the encoder, or else the codes
        return cls(
            tokenizer,
            ImageLayout(**config.layout),
            vision.image_size if vision else None,
            vision.pad_value if vision else 127,
            generation.image_size if generation else None,
            config.decoder_config().max_position_embeddings,
            Conversation(**(config.conversation or {})),
            pictures.mean if pictures else HALVES[0],
            pictures.std if pictures else HALVES[1],
            generation.area if generation else None,
            generation.stride if generation else 1,
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

    def ids(self, *parts: Part) -> list[int]:
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

    def marks(self, words: str) -> list[Part]:
        """Return words of the conversation in parts, the special tokens in them as tokens."""
        special = self.tokenizer.get_added_vocab()
        longest_first = sorted(special, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", words) if special else [words]
        return [[special[piece]] if piece in special else piece for piece in pieces if piece]

    def opening(self, images: Sequence[Grid]) -> list[Part]:
        """Return what comes before a question, in parts: the system's words, the user's mark, the images."""
        turn = self.conversation
        return [[self.bos], *self.marks(turn.system), *self.marks(turn.user), *self.pictures(images)]

    def pictures(self, images: Sequence[Grid]) -> list[Part]:
        """Return the images of a prompt in parts, as they stand before its words."""
        turn = self.conversation
        parts: list[Part] = []
        for number, grid in enumerate(images):
            before = self.marks(turn.between_images) if number else []
            parts += [*before, *self.layout.understanding(*grid), *self.marks(turn.after_image)]
        return parts

    def question_ids(self, question: str, images: int | Sequence[Grid] = 1) -> list[int]:
        """Return a prompt for a text answer: the images first, then the question.

        Args:
            question: the user's words.
            images: how many images, or the (rows, columns) of each where their sizes differ.

        Raises:
            UserError: the prompt leaves no room in the context for an answer.
        """
        grids = [self.layout.grid] * images if isinstance(images, int) else images
        ids = self.ids(*self.opening(grids), question.strip(), *self.marks(self.conversation.assistant))
        if len(ids) >= self.context:
            raise UserError(
                f"question: {len(ids)} tokens with its images, the context holds {self.context}; shorten it"
            )
        return ids

    def drawing_ids(self, prompt: str, grid: Grid | None = None, images: Sequence[Grid] = ()) -> list[int]:
        """Return a prompt for a drawing of this grid of codes, up to its first code.

        Args:
            prompt: the user's words.
            grid: (rows, columns) of the drawing's codes, by default the layout's.
            images: (rows, columns) of each image that comes before the words, as in a question.

        Raises:
            UserError: the prompt is empty or leaves too little room in the context.
        """
        if not prompt.strip():
            raise UserError("prompt: empty; say what to draw")
        praised = prompt.strip() + self.conversation.praise
        return self._drawing_ids(praised, grid or self.layout.grid, images)

    def _drawing_ids(self, prompt: str, grid: Grid, images: Sequence[Grid] = ()) -> list[int]:
        turn, steps = self.conversation, len(self.layout.drawing_steps(*grid))
        asked: list[Part] = [*self.pictures(images), prompt]
        if not turn.bare_drawings:
            asked = [*self.marks(turn.user), *asked, *self.marks(turn.assistant)]
        ids = self.ids([self.bos], *asked, *self.layout.opening(*grid))
        if len(ids) + steps > self.context:
            room = self.context - steps
            what, way = (" with its images", "; shorten it or give fewer") if images else ("", "; shorten it")
            raise UserError(f"prompt: {len(ids)} tokens{what}, a drawing leaves room for {room}{way}")
        return ids

    def drawing_inputs(
        self, prompt: str, images: Sequence[str | Path | Image.Image] = (), grid: Grid | None = None
    ) -> BatchFeature:
        """Return one prompt for a drawing, with the images that come before its words: ids [1, T] and pixels.

        Raises:
            UserError: the prompt cannot be drawn, an image cannot be read, or the model cannot look at it.
        """
        seen, grids = self._seen(images)
        ids = self.drawing_ids(prompt, grid, grids)
        return BatchFeature({"input_ids": torch.tensor([ids]), **seen})

    def unconditional_ids(self, prompt_ids: Sequence[int], grid: Grid | None = None) -> list[int]:
        """Return what guidance steers away from: a prompt of its own, or this one with all but its ends made pad."""
        if self.conversation.negative is not None:
            return self._drawing_ids(self.conversation.negative, grid or self.layout.grid)
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
        """Return images to understand, float [N, 3, S, S]: long side to S, padded, mean and deviation taken out."""
        if self.image_size is None:
            raise UserError("images: this model has no understanding encoder")
        side = self.image_size
        return self._normal([letterbox(read_image(image), side, self.pad_colour) for image in images])

    def _normal(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pictures of one size as float [N, 3, H, W] with mean and deviation taken out."""
        pixels = to_tensor(np.stack([np.asarray(image) for image in images]))
        if (self.mean, self.std) == HALVES:
            return pixels
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels + 1) / 2 - mean) / std

    def sized_pixels(self, images: Sequence[str | Path | Image.Image]) -> tuple[Tensor, Tensor]:
        """Return images to understand by their codes, each at its own size.

        Returns:
            Float [N, 3, H, W], padded with 0 on the right and below to the largest, and int64 [N, 2]: the height
            and width of each, which are multiples of the stride and of an area within the model's limits.
        """
        if self.area is None:
            raise UserError("images: this model was not made to look at pictures")
        resized = []
        for image in images:
            picture = read_image(image)
            height, width = area_size(picture.height, picture.width, self.stride, *self.area)
            resized.append(picture.resize((width, height), Image.Resampling.BICUBIC))
        sizes = [(picture.height, picture.width) for picture in resized]
        pixels = torch.zeros(len(resized), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
        for i, (picture, (height, width)) in enumerate(zip(resized, sizes, strict=True)):
            pixels[i, :, :height, :width] = self._normal([picture])[0]
        return pixels, torch.tensor(sizes)

    def drawing_pixels(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Return images to tokenise, float [M, 3, S, S] in [-1, 1]: short side to S, cropped."""
        if self.drawing_size is None:
            raise UserError("images: this model has no image tokenizer")
        return square_pixels(images, self.drawing_size)

    def canvas(self, size: int | None = None, keep_ratio: bool = False) -> Canvas:
        """Return what pictures to learn drawing are brought to.

        Args:
            size: pixels a side; None: the model's own.
            keep_ratio: see `Canvas`.

        Raises:
            UserError: the model has no image tokenizer, or draws one size only, or the size does not fit its codes.
        """
        own = self.drawing_size
        if own is None:
            raise UserError("images: this model has no image tokenizer")
        if not self.layout.shared and (keep_ratio or size not in (None, own)):
            raise UserError(f"size: this model draws {own}x{own} only; leave out size and ratio")
        return Canvas(size or own, self.stride, keep_ratio)

    def __call__(
        self, questions: Sequence[str], images: Sequence[Sequence[str | Path | Image.Image]]
    ) -> BatchFeature:
        """Return a batch of questions, each with its own images, padded on the left."""
        seen, grids = self._seen([picture for pictures in images for picture in pictures])
        left = iter(grids)
        rows = [
            self.question_ids(text, [next(left) for _ in pictures])
            for text, pictures in zip(questions, images, strict=True)
        ]
        input_ids, attention_mask = self.pad_left(rows)
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **seen})

    def _seen(self, images: Sequence[str | Path | Image.Image]) -> tuple[dict[str, Tensor], list[Grid]]:
        """Return images to understand as the model takes them, and the (rows, columns) of each in the stream."""
        if not images:
            return {}, []
        if not self.layout.shared:
            return {"pixel_values": self.pixels(images)}, [self.layout.grid] * len(images)
        pixels, sizes = self.sized_pixels(images)
        grids = [(height // self.stride, width // self.stride) for height, width in sizes.tolist()]
        return {"pixel_values": pixels, "image_sizes": sizes}, grids

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


def square_pixels(images: Sequence[str | Path | Image.Image], side: int) -> Tensor:
    """Return pictures to tokenise, float [M, 3, side, side] in [-1, 1]: short side to `side`, cropped."""
    squares = [ImageOps.fit(read_image(image), (side, side), Image.Resampling.BICUBIC) for image in images]
    return to_tensor(np.stack([np.asarray(square) for square in squares]))


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What pictures to learn drawing are brought to.

    Attributes:
        side: pixels.
        stride: pixels a side of a code.
        keep_ratio: pictures keep their ratio, in an area of `side` squared at most, their sides multiples of
            `stride` (Emu3, `prepare_data.py`: `smart_resize`); else they are squares, cropped from the middle.

    Raises:
        UserError: the side is no multiple of the stride.
    """

    side: int
    stride: int
    keep_ratio: bool = False

    def __post_init__(self) -> None:
        if self.side % self.stride:
            near = max(round(self.side / self.stride), 1) * self.stride
            raise UserError(f"size: {self.side}; give a multiple of {self.stride}, such as {near}")

    def pixels(self, image: str | Path | Image.Image) -> Tensor:
        """Return a picture to tokenise, float [3, H, W] in [-1, 1].

        Raises:
            UserError: it cannot be read, or one side is more than 200 times the other.
        """
        if not self.keep_ratio:
            return square_pixels([image], self.side)[0]
        picture = read_image(image)
        check_ratio(picture.height, picture.width)
        scale = self.side / math.sqrt(picture.height * picture.width) / self.stride
        width, height = (max(int(length * scale), 1) * self.stride for length in picture.size)
        return to_tensor(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))

    def __str__(self) -> str:
        """What stored codes are marked by."""
        return f"{self.side} of any ratio" if self.keep_ratio else str(self.side)


def check_ratio(height: int, width: int) -> None:
    """Refuse a picture that is all but a line.

    Raises:
        UserError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(
            f"image: {width} x {height} pixels, more than 200 times longer than wide; crop it first"
        )


def area_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the height and width, multiples of `factor`, that keep a picture's ratio within an area.

    Source: Emu3 `image_processing_emu3visionvq.py` (`smart_resize`, from Qwen2-VL).

    Raises:
        UserError: one side is more than 200 times the other.
    """
    check_ratio(height, width)
    rounded = [round(side / factor) * factor for side in (height, width)]
    scale = 1.0
    if rounded[0] * rounded[1] > most:
        scale = math.sqrt(height * width / most)
        rounded = [max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)]
    elif rounded[0] * rounded[1] < least:
        scale = math.sqrt(least / (height * width))
        rounded = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return rounded[0], rounded[1]
