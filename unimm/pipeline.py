"""The user's object: `UniMM` captions, answers and draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, Unpack, overload

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.console import ProgressCallback, no_progress
from unimm.devices import choose_device, choose_dtype
from unimm.errors import UserError, UserNote
from unimm.folders import write_folder
from unimm.images import as_size, is_image
from unimm.models.configuration import SamplingConfig
from unimm.models.image_tokenizers.movq import MoVQTokenizer
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.models.modeling import UniMMModel
from unimm.models.quantization import is_quantised
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor
from unimm.sampling.drawing import draw_codes, drawing_requests
from unimm.sampling.engine import Engine
from unimm.sampling.memory import EngineLimits
from unimm.sampling.requests import TextOptions, TextRequest, TextSampling, filters_of
from unimm.sampling.sampler import NoiseKey, SamplingOptions, noise_keys
from unimm.sampling.text import Answer

if TYPE_CHECKING:
    from unimm.images import ImageInput

ImageInputs: TypeAlias = "ImageInput | Iterable[ImageInput | Iterable[ImageInput] | None] | None"
"""What goes with questions or prompts: one picture for all, or for each a picture, several, or None."""
PICTURES_NOTE = (
    "images: published models and our recipes learn to draw from words alone; expect little of pictures"
)


class _Order(NamedTuple):
    """What is to be drawn: a text and its pictures for each image, whose noise each has, and how to sample."""

    texts: list[str]
    images: list[list[ImageInput]]
    keys: list[NoiseKey]
    grid: tuple[int, int]
    sampling: SamplingConfig


class UniMM:
    """A unified model with its processor.

    Attributes:
        model: the `UniMMModel`, in eval mode.
        processor: words and pictures to inputs and back.

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
            UserError: there is no such device or format, or the weights are int8, which have none.
        """
        if isinstance(device, torch.dtype):  # as in torch: to(torch.bfloat16)
            device, dtype = None, device
        place = self.device if device is None else choose_device(str(device))
        if dtype is not None and is_quantised(self.model):
            raise UserError("dtype: a model with int8 weights keeps its own; load it anew with the other")
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
        """Say what pictures show.

        Args:
            images: a picture, as a path, PIL image, array, tensor, bytes, file object or data URL
                (`unimm.images.read_image`), or several of them in a list or any iterable.
            max_new_tokens: most tokens of a caption; by default what the context has room for.
            **options: `temperature` (0, the default, takes the likeliest token), `top_k`, `top_p`,
                `repetition_penalty`, `stop` (words that end an answer) and `seed`.

        Returns:
            A text for one picture, else a list of texts.

        Raises:
            UserError: a picture cannot be read, or the model understands none.
        """
        shown = [images] if is_image(images) else _listed(images, "images")
        requests = [CAPTION_REQUESTS[0]] * len(shown)
        texts = [answer.text for answer in self.answers(shown, requests, max_new_tokens, **options)]
        return texts[0] if is_image(images) else texts

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
        """Answer questions, with pictures or without, all in one batch.

        Args:
            images: one picture (see `caption`), None, or one entry for each question: a picture, several, or None.
            questions: one question, or several.
            max_new_tokens: most tokens of an answer; by default what the context has room for.
            **options: `temperature` (0, the default, takes the likeliest token), `top_k`, `top_p`,
                `repetition_penalty`, `stop` (words that end an answer) and `seed`.

        Returns:
            A text for one question about one picture or none, else a list of texts. One question goes to every
            picture of a list, and one picture serves every question of a list.

        Raises:
            UserError: a picture cannot be read, the model understands none, a question is empty or too long, or the
                numbers do not match.
        """
        texts = [answer.text for answer in self.answers(images, questions, max_new_tokens, **options)]
        return texts[0] if isinstance(questions, str) and (images is None or is_image(images)) else texts

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
        asked: list[Any] = [questions] if isinstance(questions, str) else _listed(questions, "questions")
        if images is None or is_image(images):
            shown: list[Any] = [images] * len(asked)
        else:
            shown = _listed(images, "images")
        asked = asked * len(shown) if isinstance(questions, str) else asked
        if len(shown) != len(asked):
            raise UserError(f"questions: {len(asked)} questions for {len(shown)} images; give one for each")
        for question in asked:
            _check_text(question, "question", "ask something")
        entries = [_entry(entry) for entry in shown]
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
        cut = sum(answer.cut for answer in answers)
        if cut and sampling.max_new_tokens is None:  # else it is what was asked for
            note = f"{cut} of {len(answers)} answers were cut where the context of {self.processor.context} tokens ends"
            warnings.warn(note, UserNote, stacklevel=3)
        return answers

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
        """Draw pictures.

        Args:
            prompts: a text, or a list of texts of any lengths.
            n: drawings of each prompt; they follow one another in the result.
            seed: a number, giving image i the stream of (seed, i), or one number for each image, giving it the
                stream of (seed[i], 0); the same prompt and stream give the same image in any batch. Numbers and
                arrays of NumPy and torch will do.
            size: (width, height) in pixels, or "64x64"; the model's own if left out.
            images: a picture that goes with every prompt, or one entry for each prompt: a picture, a list of
                pictures, or None. They stand before the prompt's words, as `ask` puts them. Guidance steers away
                from what it always does, and from the pictures too: from the prompt with all but its first and
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
            UserError: the model does not draw, a prompt is empty or too long, a picture cannot be read, the model
                cannot look at pictures, or an option makes no sense.
        """
        order = self._order(prompts, n, images, size, seed, sampling)
        parts = list(self._codes(order, on_progress))
        drawings = [image for part in parts for image in self.decode_codes(part)]
        return (drawings, _joined(parts, order.grid)) if return_codes else drawings

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
        return _joined(list(self._codes(order, on_progress)), order.grid)

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
    ) -> _Order:
        """Check all that is asked for before the first image is drawn; what options leave out is the model's own."""
        self.processor.check_draws("prompts")
        sampling = self.model.config.sampling_config().updated(**options)
        filters_of(sampling)
        if not isinstance(n, int) or n < 1:
            raise UserError(f"n: {n}; give 1 or more")
        texts = [prompts] if isinstance(prompts, str) else _listed(prompts, "prompts")
        for text in texts:
            _check_text(text, "prompt", "say what to draw")
        shown = _entries(images, len(texts))
        grid = self._grid(as_size(size))
        keys = noise_keys(seed, len(texts) * n)
        for text, pictures in zip(texts, shown, strict=True):
            self.processor.drawing_inputs(text, pictures, grid)
        if any(shown):
            warnings.warn(PICTURES_NOTE, UserNote, stacklevel=3)
        texts = [text for text in texts for _ in range(n)]
        shown = [pictures for pictures in shown for _ in range(n)]
        return _Order(texts, shown, keys, grid, sampling)

    def _codes(self, order: _Order, on_progress: ProgressCallback | None) -> Iterator[Tensor]:
        """Yield the codes [B, h, w] of each batch of drawings."""
        each, total = order.grid[0] * order.grid[1], len(order.texts)
        engine = self.engine
        for start in range(0, total, self.batch_size):
            part, report = slice(start, start + self.batch_size), None
            if on_progress is not None:
                report = _reporter(on_progress, start * each, total * each)
            requests = drawing_requests(
                self.processor,
                order.texts[part],
                order.images[part],
                order.keys[part],
                order.sampling,
                order.grid,
            )
            yield draw_codes(engine, list(requests), report)
        engine.release()

    def _grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Return rows and columns of codes for a size in pixels."""
        rows, columns = self.model.layout.grid
        if size is None:
            return rows, columns
        stride = self.processor.stride
        width, height = size
        own = f"{columns * stride}x{rows * stride}"
        if size == (columns * stride, rows * stride):
            return rows, columns
        generation = self.model.config.generation_config()
        if generation is not None and generation.places:
            raise UserError(f"size: {width}x{height}; this model draws {own} only")
        if min(size) < stride or width % stride or height % stride:
            raise UserError(f"size: {width}x{height}; give multiples of {stride}, such as {own}")
        if not self.model.layout.sized:
            note = f"size: {width}x{height} is outside what this model was trained on ({own})"
            warnings.warn(note, UserNote, stacklevel=3)
        return height // stride, width // stride

    def save(self, folder: str | Path) -> None:
        """Write everything to a folder: safetensors, `config.json` and the processor's files.

        The files are written beside the folder first, so that an old one stays whole if the disk fills up.

        Raises:
            UserError: the folder cannot be written, or the weights are int8.
        """
        if is_quantised(self.model):
            raise UserError(
                "quantize: a model with int8 weights cannot be saved; load it without, and save that"
            )

        def write(target: Path) -> None:
            with no_progress():
                self.model.save_pretrained(target)
            self.processor.save_pretrained(target)

        write_folder(Path(folder), write)


def _listed(values: Any, name: str) -> list[Any]:
    """Return several values as a list.

    Raises:
        UserError: they are not several.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise UserError(f"{name}: expected one or a list of them, got {type(values).__name__}")
    return list(values)


def _check_text(text: Any, name: str, wanted: str) -> None:
    """Refuse what is no text, or empty."""
    if not isinstance(text, str):
        raise UserError(f"{name}: expected a text, got {type(text).__name__}")
    if not text.strip():
        raise UserError(f"{name}: empty; {wanted}")


def _entry(entry: Any) -> list[ImageInput]:
    """Return the pictures that go with one question or prompt."""
    if entry is None:
        return []
    return [entry] if is_image(entry) else _listed(entry, "images")


def _entries(images: ImageInputs, prompts: int) -> list[list[ImageInput]]:
    """Return the pictures of each prompt."""
    if images is None or is_image(images):
        return [_entry(images)] * prompts
    entries = _listed(images, "images")
    if len(entries) != prompts:
        raise UserError(f"images: {len(entries)} entries for {prompts} prompts; give one for each, or None")
    return [_entry(entry) for entry in entries]


def _joined(parts: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Return the codes [B, h, w] of all batches."""
    return torch.cat(list(parts)) if parts else torch.empty((0, *grid), dtype=torch.long)


def _reporter(report: ProgressCallback, before: int, total: int) -> Callable[[int], None]:
    return lambda done: report(before + done, total)
