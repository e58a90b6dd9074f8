"""Words and images to model inputs and back: `UniMMProcessor`.

It joins a `Conversation`, which writes what is said as tokens, with `Views`, which bring images to what the model sees.
A prompt for a drawing ends in the layout's begin token. Text of the user is never read as a special token, whatever is
typed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from unimm.errors import UserError
from unimm.files import atomic_write, write_json
from unimm.images import read_image, to_uint8
from unimm.models.configuration import UniMMConfig
from unimm.models.inputs import Images
from unimm.models.layout import Grid, ImageGrid, LayoutPart
from unimm.models.parts import CodesEncoderConfig
from unimm.models.turns import Turns
from unimm.processing.chat import read_chat
from unimm.processing.conversation import Conversation
from unimm.processing.messages import SHOWN, ImagePart, Message
from unimm.processing.places import has_tags, tags_as_places
from unimm.processing.tokenizer_files import load_tokenizer
from unimm.processing.views import AreaViews, FitViews, SquareViews, TargetSize, make_views, square_pixels
from unimm.sections import read_dataclass
from unimm.videos import Video

if TYPE_CHECKING:
    from unimm.images import ImageInput

CAPTION_REQUESTS = ("describe the picture", "what does the picture show?", "caption this")
"""Ways to ask for a caption in training; `UniMM.caption` uses the first."""
PROCESSOR_FILE = "processor_config.json"
GENERATION_FILE = "generation_config.json"


class UniMMProcessor:
    """Joins a text tokenizer with the image sizes and the layout of a model.

    Args:
        config: of the model.
        tokenizer: any fast tokenizer.

    Attributes:
        layout: how images sit among the tokens.
        turns: what stands around what is said.
        conversation: writes messages as tokens.
        views: what images to understand are brought to; None where the model understands none.
        sees_codes: whether images are understood by their codes.
        drawing_size: pixels a side of an image to generate, None if the model cannot draw.
        stride: pixels a side that one code stands for.
        codes: size of the codebook, where there is one.
        seeing: the parts that an image to understand goes through.
        feature_width: channels of a feature after the encoder, where there is one.
        end_tokens: those that end an answer.
    """

    def __init__(self, config: UniMMConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        encoder, generation = config.encoder_config(), config.generation_config()
        self.tokenizer = tokenizer
        self.layout = config.image_layout()
        self.turns = read_dataclass(Turns, config.conversation or {}, "", "conversation")
        context = config.decoder_config().max_position_embeddings
        self.conversation = Conversation(self.turns, tokenizer, self.layout, context)
        self.loaded_parts = "all"
        self.views = make_views(config)
        self.sees_codes = isinstance(encoder, CodesEncoderConfig)
        self.drawing_size = generation.image_size if generation else None
        self.stride = generation.stride if generation else 1
        self.codes = generation.codes if generation else None
        self.seeing = config.seeing()
        self.feature_width = (
            None if encoder is None or isinstance(encoder, CodesEncoderConfig) else encoder.width
        )
        self.pad, self.bos, self.eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        end = self.turns.end
        ends = [tokenizer.convert_tokens_to_ids(end) if end else None, self.eos]
        self.end_tokens: list[int] = list(dict.fromkeys(token for token in ends if token is not None))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and a note of the sizes (which themselves live in `config.json`)."""
        self.tokenizer.chat_template = self.turns.template  # which one of its own might contradict
        self.tokenizer.save_pretrained(folder)
        sizes = {
            "processor_class": "UniMMProcessor",
            "image_size": self.image_size,
            "drawing_size": self.drawing_size,
        }
        with atomic_write(Path(folder) / PROCESSOR_FILE) as temporary:
            temporary.write_text(json.dumps(sizes, indent=2) + "\n")
        self.write_end_tokens(Path(folder))

    def write_end_tokens(self, folder: Path) -> None:
        """Write a generation config that names the end tokens, where there is none and the tokenizer names fewer."""
        path = folder / GENERATION_FILE
        if self.end_tokens != [self.eos] and not path.exists():
            write_json(path, {"eos_token_id": self.end_tokens})

    def end_answers_at(self, tokens: Iterable[int]) -> None:
        """Let answers end at these tokens too, which a checkpoint's generation config names."""
        self.end_tokens += [token for token in dict.fromkeys(tokens) if token not in self.end_tokens]

    @property
    def context(self) -> int:
        """Most positions of the stream."""
        return self.conversation.context

    # --- words ------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of plain text; see `Conversation.text_ids`."""
        return self.conversation.text_ids(text)

    def ids(self, *parts: LayoutPart) -> list[int]:
        """Return the tokens of a text given in parts; see `Conversation.ids`."""
        return self.conversation.ids(*parts)

    def question_ids(self, question: str, images: int | Sequence[ImageGrid] = 1) -> list[int]:
        """Return a prompt for a text answer: the images first, then the question.

        Args:
            question: the user's words.
            images: how many images, or the (rows, columns) of each where their sizes differ.

        Raises:
            UserError: the prompt leaves no room in the context for an answer.
        """
        grids = [self.image_grid] * images if isinstance(images, int) else images
        message = Message("user", (*[SHOWN] * len(grids), question.strip()))
        return self.conversation.ask([message], grids)

    def drawing_ids(
        self, prompt: str, grid: Grid | None = None, images: Sequence[ImageGrid] = ()
    ) -> list[int]:
        """Return a prompt for a drawing of this grid of codes, up to its first code.

        Args:
            prompt: the user's words.
            grid: (rows, columns) of the drawing's codes, by default the layout's.
            images: (rows, columns) of each image that comes before the words, as in a question.

        Raises:
            UserError: the prompt is empty or leaves too little room in the context.
        """
        rows, columns = grid or self.layout.grid
        if rows * columns >= self.context:
            what = f"size: {columns * self.stride}x{rows * self.stride} takes {rows * columns} codes"
            raise UserError(f"{what}, the context holds {self.context}; give a smaller one")
        return self.conversation.ask_to_draw(prompt, (rows, columns), images)

    def unconditional_ids(self, prompt_ids: Sequence[int], grid: Grid | None = None) -> list[int]:
        """Return what guidance steers away from; see `Conversation.unconditional`."""
        return self.conversation.unconditional(prompt_ids, grid or self.layout.grid)

    # --- images -----------------------------------------------------------------------------------------------

    @property
    def image_size(self) -> int | None:
        """Pixels a side of an image to understand; None where it may have any, or there is none."""
        return self.views.side if isinstance(self.views, SquareViews) else None

    @property
    def image_grid(self) -> Grid:
        """Rows and columns in the stream of an image to understand of which nothing is known."""
        return self.layout.grid if self.views is None else self.views.grid

    def limit_views(self, limits: Mapping[str, int]) -> None:
        """Bring images to understand to other limits than the model's own; see `Views.limited`.

        Raises:
            UserError: the model understands no images, or has no such limit.
        """
        self.check_understands()
        assert self.views is not None
        self.views = self.views.limited(limits)

    def leave_out(self, parts: str) -> None:
        """Work for a model that was loaded in part: "understand" cannot draw, "draw" cannot look at images."""
        self.loaded_parts = parts
        if parts == "understand":
            self.drawing_size = None
        elif parts == "draw":
            self.views = None

    def check_understands(self) -> None:
        """Refuse images to understand where the model understands none.

        Raises:
            UserError: it does not.
        """
        if self.loaded_parts == "draw":
            raise UserError("images: the model was loaded without its encoder; load it with parts='all'")
        if self.views is None:
            raise UserError("images: this model understands no images")

    def check_understands_videos(self) -> None:
        """Refuse videos where the model understands none; raises as `check_understands`."""
        self.check_understands()
        if not (isinstance(self.views, AreaViews) and self.views.frames):
            raise UserError("video: this model understands images only; give some frames as images")

    def check_draws(self, key: str) -> None:
        """Refuse what only a model that can draw has a use for.

        Args:
            key: what was given, for the error.

        Raises:
            UserError: it cannot.
        """
        if self.loaded_parts == "understand":
            raise UserError(f"{key}: the model was loaded without what draws; load it with parts='all'")
        if self.drawing_size is None:
            raise UserError(f"{key}: this model cannot draw")

    def look(self, images: Sequence[ImageInput | Video]) -> Images:
        """Return images and videos to understand as the model takes them.

        Raises:
            UserError: one cannot be read, or the model understands no images, or no videos.
        """
        if not images:
            return Images()
        self.check_understands()
        assert self.views is not None
        if any(isinstance(image, Video) for image in images):
            self.check_understands_videos()
        return self.views.prepare(images)  # type: ignore[arg-type]  # videos where they are understood

    def store_features(
        self, features: NDArray[Any], grid: ImageGrid, padding: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Return the features [n, width] of an image as they are stored.

        Where images have unlike many, a row in front says the grid that the image has in the stream. Where the model
        asks which features are of padding, a column behind says it.

        Args:
            features: of the image.
            grid: rows and columns that it has in the stream.
            padding: [n], as `Images` has it.
        """
        if isinstance(self.views, SquareViews):
            return features
        if padding is not None:
            features = np.concatenate([features, padding[:, None].astype(features.dtype)], axis=1)
        front = np.zeros((1, features.shape[1]), features.dtype)
        front[0, :2] = grid[:2]
        return np.concatenate([front, features])

    def stored_features(self, stored: Sequence[NDArray[Any]]) -> Images:
        """Return images of which features were stored.

        Raises:
            UserError: they are of another encoder, or none that this model's views have.
        """
        if self.feature_width is None:
            raise UserError("features of an encoder, but this model has none")
        square = isinstance(self.views, SquareViews)
        width = self.feature_width + self.seeing.marks_padding
        features = [torch.from_numpy(one if square else one[1:]) for one in stored]
        grids: list[Grid] = [
            self.image_grid if square else (int(one[0, 0]), int(one[0, 1])) for one in stored
        ]
        for one, grid in zip(features, grids, strict=True):
            wanted = self.seeing.counted(grid) if min(grid) > 0 else 0
            if one.shape[1] != width or wanted not in (None, len(one)):
                count = "n" if wanted is None or not square else wanted
                raise UserError(f"features of {list(one.shape)}, the model takes [{count}, {width}]")
        if square:
            return Images(features=torch.stack(features), grids=torch.tensor(grids))
        lengths = torch.tensor([len(one) for one in features])
        joined, padding = torch.cat(features), None
        if self.seeing.marks_padding:
            assert self.seeing.side is not None
            joined, padding = joined[:, :-1], joined[:, -1].to(torch.uint8).view(-1, self.seeing.side**2)
        return Images(features=joined, lengths=lengths, grids=torch.tensor(grids), padding=padding)

    def drawn(self, codes: Sequence[Tensor]) -> Images:
        """Return images to generate, of codes [h, w] each, as the model takes them beside its tokens."""
        if not codes or self.layout.shared:  # which are tokens themselves
            return Images()
        return Images(codes=torch.stack(list(codes)))

    def drawing_pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """Return images to tokenise, float [M, 3, S, S] in [-1, 1]: short side to S, cropped."""
        if self.drawing_size is None:
            raise UserError("images: this model has no image tokenizer")
        return square_pixels(images, self.drawing_size)

    def target_size(self, size: int | None = None, keep_ratio: bool = False) -> TargetSize:
        """Return what images to learn drawing are brought to.

        Args:
            size: pixels a side; None: the model's own.
            keep_ratio: see `TargetSize`.

        Raises:
            UserError: the model has no image tokenizer, or draws one size only, or the size does not fit its codes.
        """
        own = self.drawing_size
        if own is None:
            raise UserError("images: this model has no image tokenizer")
        if not self.layout.sized and (keep_ratio or size not in (None, own)):
            raise UserError(f"size: this model draws {own}x{own} only; leave out size and ratio")
        return TargetSize(size or own, self.stride, keep_ratio)

    # --- inputs -----------------------------------------------------------------------------------------------

    def __call__(
        self, questions: Sequence[str], images: Sequence[Sequence[ImageInput | Video]]
    ) -> BatchFeature:
        """Return a batch of questions, each with its own images, padded on the left."""
        seen = self.look([image for own in images for image in own])
        left = iter(grids_of(seen))
        rows = [
            self.question_ids(self._placed(text, own), [next(left) for _ in own])
            for text, own in zip(questions, images, strict=True)
        ]
        input_ids, attention_mask = self.pad_left(rows)
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **seen.inputs()})

    def question(self, text: str, images: Sequence[ImageInput | Video] = ()) -> tuple[list[int], Images]:
        """Return one question with its images: its tokens, and what the model sees.

        Raises:
            UserError: an image cannot be read, the model understands none, or the question is too long.
        """
        seen = self.look(images)
        return self.question_ids(self._placed(text, images), grids_of(seen)), seen

    def chat(self, messages: Any) -> tuple[list[int], Images]:
        """Return a conversation up to where an answer begins: its tokens, and what the model sees.

        Args:
            messages: as `unimm.processing.chat.read_chat` takes them.

        Raises:
            UserError: they are none, an image cannot be read, or the context has no room for an answer.
        """
        read, shown = read_chat(messages)
        seen = self.look(shown)
        return self.conversation.ask(self._all_placed(read, shown), grids_of(seen)), seen

    def _all_placed(self, messages: Sequence[Message], images: Sequence[ImageInput | Video]) -> list[Message]:
        """Write the places in each text: of the last image before it, or of the first of all."""
        before, placed = 0, []
        for message in messages:
            parts: list[str | ImagePart] = []
            for part in message.parts:
                before += not isinstance(part, str)
                of = images[max(before - 1, 0) :][:1]
                parts.append(self._placed(part, of) if isinstance(part, str) else part)
            placed.append(replace(message, parts=tuple(parts)))
        return placed

    def _placed(self, text: str, images: Sequence[ImageInput | Video]) -> str:
        """A text whose boxes and points, of the last of its images, are written as the model has them."""
        if self.conversation.turns.places == "words" or not images or not has_tags(text):
            return text
        assert isinstance(self.views, FitViews)
        image = images[-1]
        assert not isinstance(image, Video)
        size = read_image(image).size
        return tags_as_places(text, size, self.views.shown_size(*size[::-1])[::-1])

    def drawing_inputs(
        self, prompt: str, images: Sequence[ImageInput | Video] = (), grid: Grid | None = None
    ) -> BatchFeature:
        """Return one prompt for a drawing, with the images that come before its words: ids [1, T] and pixels.

        Raises:
            UserError: the prompt cannot be drawn, an image cannot be read, or the model cannot look at it.
        """
        seen = self.look(images)
        ids = self.drawing_ids(prompt, grid, grids_of(seen))
        return BatchFeature({"input_ids": torch.tensor([ids]), **seen.inputs()})

    def pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return input ids and attention mask [B, T] of prompts of different lengths."""
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self.pad)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, longest - len(row) :] = torch.tensor(row)
            attention_mask[i, longest - len(row) :] = 1
        return input_ids, attention_mask

    def decode_text(self, ids: Tensor | list[list[int]]) -> list[str]:
        """Return the text of generated rows [B, T]."""
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def to_images(self, pixels: Tensor) -> list[Image.Image]:
        """Return images of float pixels [B, 3, H, W] in [-1, 1]."""
        return [Image.fromarray(array) for array in to_uint8(pixels)]


def grids_of(images: Images) -> list[ImageGrid]:
    """Return the rows and columns of each image to understand, and of a video its times."""
    if images.grids is None:
        return []
    return [
        (rows, columns, times) if times else (rows, columns)
        for (rows, columns), times in zip(images.grids.tolist(), images.each_times(), strict=True)
    ]


def read_tokenizer(folder: str | Path, config: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load a text tokenizer; that transformers does not know the model beside it is not worth a warning.

    Args:
        folder: holds its files.
        config: the `config.json` beside them, where it has been read.

    Raises:
        UserError: it cannot be read.
    """
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        return load_tokenizer(Path(folder), config)
    finally:
        hf_logging.set_verbosity(level)
