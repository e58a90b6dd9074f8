"""The user's object: `UniMM` captions, answers and draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.console import ProgressCallback, no_progress
from unimm.devices import choose_device, choose_dtype
from unimm.errors import UserError, UserNote
from unimm.folders import write_folder
from unimm.images import as_size, read_image
from unimm.models.image_tokenizers.movq import MoVQTokenizer
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.models.modeling import UniMMModel
from unimm.models.quantization import is_quantised
from unimm.processing.places import FUYU_OPEN, Coordinates, fuyu_words, read_places
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor
from unimm.processing.views import FitViews
from unimm.sampling.arguments import (
    ImageInputs,
    check_text,
    grid_of,
    images_of,
    images_of_each,
    is_shown,
    listed,
)
from unimm.sampling.drawing import DrawingOrder
from unimm.sampling.engine import Engine
from unimm.sampling.memory import EngineLimits
from unimm.sampling.requests import TextOptions, TextRequest, TextSampling, filters_of
from unimm.sampling.sampler import SamplingOptions, noise_keys
from unimm.sampling.text import Answer

if TYPE_CHECKING:
    from unimm.images import ImageInput

IMAGES_NOTE = (
    "images: published models and our recipes learn to draw from words alone; expect little of images"
)


class UniMM:
    """A unified model with its processor.

    Attributes:
        model: the `UniMMModel`, in eval mode.
        processor: words and images to inputs and back.

    Args:
        image_tokenizer: for a model that has none of its own, as a frozen copy of another.

    Raises:
        UserError: the batch size is no whole number of at least 1.
    """

    def __init__(
        self,
        model: UniMMModel,
        processor: UniMMProcessor,
        batch_size: int = 64,
        image_tokenizer: nn.Module | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self._tokenizer = image_tokenizer
        self._engine: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engine out of copies, which make one of their own."""
        return {**self.__dict__, "_engine": None}

    @property
    def engine(self) -> Engine:
        """What runs requests (`unimm.sampling.engine.Engine`); made anew when the model's weights have changed."""
        engine, limits = self._engine, EngineLimits.of(self.model, 2 * self.batch_size)
        if engine is None or not engine.serves(self.model, self.processor, limits.max_rows):
            engine = self._engine = Engine(self.model, self.processor, limits)
        return engine

    @property
    def batch_size(self) -> int:
        """Most prompts (for drawings) or questions that go through the model at once."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"batch_size: {size!r}; give a whole number of at least 1")
        self._batch_size = size

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the model's weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> UniMM:
        """Move the model to a device, to a number format, or both; returns itself.

        Args:
            device: as `load` takes it.
            dtype: as `load` takes it.

        Raises:
            UserError: there is no such device or format, or the weights are int8 or int4.
        """
        if isinstance(device, torch.dtype):  # as in torch: to(torch.bfloat16)
            device, dtype = None, device
        place = self.device if device is None else choose_device(str(device))
        if dtype is not None and is_quantised(self.model):
            raise UserError(
                f"dtype: a model with {self.model.config.quantization['method']} weights keeps its own; load it anew"
            )
        kind = self.dtype if dtype is None else choose_dtype(dtype, place)
        for part in (self.model, self._tokenizer):
            if part is not None:
                nn.Module.to(part, device=place, dtype=None if dtype is None else kind)
        return self

    @property
    def image_tokenizer(self) -> ImageTokenizer | MoVQTokenizer | None:
        """What turns images into codes and back; None where the model only understands."""
        tokenizer = self._tokenizer if self._tokenizer is not None else self.model.image_tokenizer
        assert tokenizer is None or isinstance(tokenizer, ImageTokenizer | MoVQTokenizer)
        return tokenizer

    def decode_codes(self, codes: Tensor) -> list[Image.Image]:
        """Return the images of codes, int64 [B, h, w].

        Raises:
            UserError: there is no image tokenizer.
        """
        if self.image_tokenizer is None:
            raise UserError("codes: this model has no image tokenizer; load one that draws")
        return self.processor.to_images(self.image_tokenizer.decode(codes)) if len(codes) else []

    @overload
    def caption(  # type: ignore[overload-overlap]
        self, images: ImageInput, max_new_tokens: int | None = None, **options: Unpack[TextOptions]
    ) -> str: ...
    @overload
    def caption(
        self, images: Iterable[ImageInput], max_new_tokens: int | None = None, **options: Unpack[TextOptions]
    ) -> list[str]: ...
    def caption(
        self, images: Any, max_new_tokens: int | None = None, **options: Unpack[TextOptions]
    ) -> str | list[str]:
        """Say what images show.

        Args:
            images: an image, as a path, PIL image, array, tensor, bytes, file object or data URL
                (`unimm.images.read_image`), or several of them in a list or any iterable.
            max_new_tokens: most tokens of a caption; by default what the context has room for.
            **options: `temperature` (0, the default, takes the likeliest token), `top_k`, `top_p`,
                `repetition_penalty`, `stop` (words that end an answer), `seed`, and `json_schema` or `regex`, which
                an answer follows.

        Returns:
            A text for one image, else a list of texts.

        Raises:
            UserError: an image cannot be read, or the model understands none.
        """
        shown = [images] if is_shown(images) else listed(images, "images")
        requests = [CAPTION_REQUESTS[0]] * len(shown)
        texts = [answer.text for answer in self.answers(shown, requests, max_new_tokens, **options)]
        return texts[0] if is_shown(images) else texts

    @overload
    def ask(
        self,
        images: ImageInput | None,
        questions: str,
        max_new_tokens: int | None = None,
        **options: Unpack[TextOptions],
    ) -> str: ...
    @overload
    def ask(
        self,
        images: ImageInputs,
        questions: str | Iterable[str],
        max_new_tokens: int | None = None,
        **options: Unpack[TextOptions],
    ) -> str | list[str]: ...
    def ask(
        self,
        images: Any,
        questions: Any,
        max_new_tokens: int | None = None,
        **options: Unpack[TextOptions],
    ) -> str | list[str]:
        """Answer questions, with images or without, all in one batch.

        Args:
            images: one image (see `caption`), None, or one entry for each question: an image, several, or None.
            questions: one question, or several.
            max_new_tokens: most tokens of an answer; by default what the context has room for.
            **options: `temperature` (0, the default, takes the likeliest token), `top_k`, `top_p`,
                `repetition_penalty`, `stop` (words that end an answer), `seed`, and `json_schema` or `regex`, which
                an answer follows.

        Returns:
            A text for one question about one image or none, else a list of texts. One question goes to every
            image of a list, and one image serves every question of a list.

        Raises:
            UserError: an image cannot be read, the model understands none, a question is empty or too long, or the
                numbers do not match.
        """
        texts = [answer.text for answer in self.answers(images, questions, max_new_tokens, **options)]
        return texts[0] if isinstance(questions, str) and (images is None or is_shown(images)) else texts

    def answers(
        self,
        images: ImageInputs,
        questions: str | Iterable[str],
        max_new_tokens: int | None = None,
        **options: Unpack[TextOptions],
    ) -> list[Answer]:
        """Answer questions as `ask` does, and say what became of each: its length, and whether it was cut.

        Raises:
            UserError: as `ask`.
        """
        sampling = TextSampling.of(options, max_new_tokens)
        asked: list[Any] = [questions] if isinstance(questions, str) else listed(questions, "questions")
        if images is None or is_shown(images):
            shown: list[Any] = [images] * len(asked)
        else:
            shown = listed(images, "images")
        asked = asked * len(shown) if isinstance(questions, str) else asked
        if len(shown) != len(asked):
            raise UserError(f"questions: {len(asked)} questions for {len(shown)} images; give one for each")
        for question in asked:
            check_text(question, "question", "ask something")
        entries = [images_of(entry) for entry in shown]
        if any(entries):
            self.processor.check_understands()
        keys = noise_keys(options.get("seed"), len(asked))
        engine = self.engine
        requests = (
            TextRequest(*self.processor.question(text, own), key, sampling=sampling)
            for text, own, key in zip(asked, entries, keys, strict=True)
        )
        answers = [Answer.of(ticket) for ticket in engine.run(requests, self.batch_size)]
        engine.release()
        self._note_cuts(answers, sampling)
        return answers

    @overload
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        max_new_tokens: int | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[TextOptions],
    ) -> str: ...
    @overload
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        max_new_tokens: int | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[TextOptions],
    ) -> Iterator[str]: ...
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        max_new_tokens: int | None = None,
        *,
        stream: bool = False,
        **options: Unpack[TextOptions],
    ) -> str | Iterator[str]:
        """Answer a conversation of any number of turns; what a turn shares with one before is not read again.

        Args:
            messages: `{"role": …, "content": …}` as the OpenAI client has them: `system` (the first, if any), `user`
                and `assistant`, the last the user's; content is a text or a list of parts, `text`, `image_url` or
                `image` (`unimm.processing.chat.read_chat`).
            max_new_tokens: as for `ask`.
            stream: whether pieces of the answer are handed out as soon as they are known.
            **options: as for `ask`.

        Returns:
            The answer, or an iterator of its pieces, which may be left at any time.

        Raises:
            UserError: the messages are none, an image cannot be read, or an option makes no sense.
        """
        sampling = TextSampling.of(options, max_new_tokens)
        ids, seen = self.processor.chat(messages)
        key = noise_keys(options.get("seed"), 1)[0]
        request = TextRequest(ids, seen, key, sampling=sampling, remember=True)
        if stream:
            return self._pieces(request)
        answers = [Answer.of(self.engine.run([request])[0])]
        self._note_cuts(answers, sampling)
        return answers[0].text

    def places(self, answer: Answer, image: ImageInput) -> list[Coordinates]:
        """Return the points and boxes that an answer names, in pixels of the image that was asked about.

        Args:
            answer: of `answers`.
            image: the image, as `ask` takes it.

        Raises:
            UserError: the image cannot be read.
        """
        tokenizer, ids = self.processor.tokenizer, list(answer.ids)
        tokens = tokenizer.convert_ids_to_tokens(ids)
        apart = any(token in FUYU_OPEN for token in tokens)  # numbers that are tokens, with nothing between
        text = fuyu_words(tokens) if apart else str(tokenizer.decode(ids, skip_special_tokens=False))
        size, views = read_image(image).size, self.processor.views
        shown = views.shown_size(*size[::-1])[::-1] if isinstance(views, FitViews) else None
        return read_places(text, size, shown=shown)

    def _pieces(self, request: TextRequest) -> Iterator[str]:
        """Yield the pieces of an answer."""
        pieces: list[str] = []
        request.on_text = pieces.append
        engine = self.engine
        ticket = engine.submit(request)
        try:
            while not ticket.done:
                engine.step()
                yield from pieces
                pieces.clear()
            if ticket.error is not None:
                raise ticket.error
            self._note_cuts([Answer.of(ticket)], request.sampling)
        finally:
            engine.cancel(ticket)
            engine.step()

    def _note_cuts(self, answers: Sequence[Answer], sampling: TextSampling) -> None:
        """Say which answers were cut, where nobody asked for a bound."""
        cut = sum(answer.cut for answer in answers)
        if cut and sampling.max_new_tokens is None:
            note = f"{cut} of {len(answers)} answers were cut where the context of {self.processor.context} tokens ends"
            warnings.warn(note, UserNote, stacklevel=4)

    def draw(
        self,
        prompts: str | Iterable[str],
        n: int = 1,
        *,
        seed: Any = None,
        size: Any = None,
        images: ImageInputs = None,
        return_codes: bool = False,
        on_progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Any:
        """Draw images.

        Args:
            prompts: a text, or a list of texts of any lengths.
            n: drawings of each prompt; they follow one another in the result.
            seed: a number, giving image i the stream of (seed, i), or one number for each image, giving it the
                stream of (seed[i], 0); the same prompt and stream give the same image in any batch. Numbers and
                arrays of NumPy and torch will do.
            size: (width, height) in pixels, or "64x64"; the model's own if left out.
            images: an image that goes with every prompt, or one entry for each prompt: an image, a list of
                images, or None. They stand before the prompt's words, as `ask` puts them. Guidance steers away
                from what it always does, and from the images too: from the prompt with all but its first and
                last token blanked, features included (Janus), or from the negative prompt alone (Emu3).
            return_codes: also return the codes.
            on_progress: called with codes done and codes in all.
            **sampling: `guidance_scale` (how hard to follow the prompt; 1 is no guidance), `temperature` (0 takes the
                likeliest code at every step), `top_k` (keep the k likeliest codes; 0 keeps all) and `top_p` (keep the
                likeliest codes of this mass; 1 keeps all); what is left out is as the model has it
                (`um.model.config.sampling_config()`).

        Returns:
            A list of PIL images; with `return_codes` also their codes, int64 [B, h, w].

        Raises:
            UserError: the model does not draw, a prompt is empty or too long, an image cannot be read, the model
                cannot look at images, or an option makes no sense.
        """
        order = self._order(prompts, n, images, size, seed, sampling)
        parts = list(self._codes(order, on_progress))
        drawings = [image for part in parts for image in self.decode_codes(part)]
        return (drawings, order.joined(parts)) if return_codes else drawings

    def draw_codes(
        self,
        prompts: str | Iterable[str],
        n: int = 1,
        *,
        seed: Any = None,
        size: Any = None,
        images: ImageInputs = None,
        on_progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Tensor:
        """Draw as `draw` does, which explains the arguments, up to the codes, for when nobody looks.

        Returns:
            int64 [B, h, w].

        Raises:
            UserError: as `draw`.
        """
        order = self._order(prompts, n, images, size, seed, sampling)
        return order.joined(list(self._codes(order, on_progress)))

    def draw_batches(
        self,
        prompts: str | Iterable[str],
        n: int = 1,
        *,
        seed: Any = None,
        size: Any = None,
        images: ImageInputs = None,
        on_progress: ProgressCallback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[list[Image.Image]]:
        """Draw as `draw` does, which explains the arguments, and hand out each batch as soon as it is done.

        Yields:
            Up to `batch_size` images, in the order of `draw`.

        Raises:
            UserError: as `draw`, before the first is drawn.
        """
        order = self._order(prompts, n, images, size, seed, sampling)
        return (self.decode_codes(part) for part in self._codes(order, on_progress))

    def _order(
        self,
        prompts: str | Iterable[str],
        n: int,
        images: ImageInputs,
        size: Any,
        seed: Any,
        options: SamplingOptions,
    ) -> DrawingOrder:
        """Check all that is asked for before the first image is drawn; what options leave out is the model's own."""
        self.processor.check_draws("prompts")
        sampling = self.model.config.sampling_config().updated(**options)
        filters_of(sampling)
        if not isinstance(n, int) or n < 1:
            raise UserError(f"n: {n}; give 1 or more")
        texts = [prompts] if isinstance(prompts, str) else listed(prompts, "prompts")
        for text in texts:
            check_text(text, "prompt", "say what to draw")
        shown = images_of_each(images, len(texts))
        grid = grid_of(self.model, self.processor, as_size(size))
        keys = noise_keys(seed, len(texts) * n)
        for text, own in zip(texts, shown, strict=True):
            self.processor.drawing_inputs(text, own, grid)
        if any(shown):
            warnings.warn(IMAGES_NOTE, UserNote, stacklevel=3)
        texts = [text for text in texts for _ in range(n)]
        shown = [own for own in shown for _ in range(n)]
        return DrawingOrder(texts, shown, keys, grid, sampling)

    def _codes(self, order: DrawingOrder, on_progress: ProgressCallback | None) -> Iterator[Tensor]:
        """Yield the codes [B, h, w] of each batch of drawings."""
        engine = self.engine
        yield from order.run(engine, self.batch_size, on_progress)
        engine.release()

    def save(self, folder: str | Path) -> None:
        """Write everything to a folder: safetensors, `config.json` and the processor's files.

        The files are written beside the folder first, so that an old one stays whole if the disk fills up.

        Raises:
            UserError: the folder cannot be written.
        """

        def write(target: Path) -> None:
            with no_progress():
                self.model.save_pretrained(target)
            self.processor.save_pretrained(target)

        write_folder(Path(folder), write)
