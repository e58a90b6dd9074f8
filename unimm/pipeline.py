"""The user's object: `UniMM` captions, answers and draws; `load` makes one from a folder, a hub id or the package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.errors import UserError, UserNote
from unimm.interop.convert import load_foreign, read_config, read_processor, recognise
from unimm.interop.source import check_weights
from unimm.modeling import UniMMModel
from unimm.processing import CAPTION_REQUESTS, UniMMProcessor
from unimm.quantization import check_method, is_quantised
from unimm.sampling.choose import check_options, streams
from unimm.sampling.images import sample_codes
from unimm.sampling.text import generate_text
from unimm.saving import no_progress, write_folder
from unimm.tokenizers.model import ImageTokenizer
from unimm.tokenizers.movq import MoVQTokenizer

Picture: TypeAlias = "str | Path | Image.Image"
EMBEDDED = "embedded"  # folder of the model that ships with the package
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress: TypeAlias = Callable[[int, int], None]
Pictures: TypeAlias = "Picture | Sequence[Picture | Sequence[Picture] | None] | None"
"""What goes with prompts for drawings: one picture for all, or for each prompt a picture, several, or None."""
PICTURES_NOTE = (
    "images: published models and our recipes learn to draw from words alone; expect little of pictures"
)


class UniMM:
    """A unified model with its processor.

    Attributes:
        model: the `UniMMModel`, in eval mode.
        processor: words and pictures to inputs and back.
        batch_size: most prompts (for drawings) or questions that go through the model at once.

    Args:
        image_tokenizer: for a model that has none of its own, as a frozen copy of another.
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

    @property
    def image_tokenizer(self) -> ImageTokenizer | MoVQTokenizer:
        """What turns pictures into codes and back.

        Raises:
            ValueError: the model cannot draw.
        """
        tokenizer = self._tokenizer if self._tokenizer is not None else self.model.image_tokenizer
        if tokenizer is None:
            raise ValueError("this model has no image tokenizer, so it cannot draw")
        assert isinstance(tokenizer, ImageTokenizer | MoVQTokenizer)
        return tokenizer

    @overload
    def caption(self, images: Picture) -> str: ...  # type: ignore[overload-overlap]  # a str is a sequence of str
    @overload
    def caption(self, images: Sequence[Picture]) -> list[str]: ...
    def caption(self, images: Picture | Sequence[Picture]) -> str | list[str]:
        """Say what pictures show.

        Args:
            images: a PIL image or a path, or a list of them.

        Returns:
            A text, or a list of texts for a list.

        Raises:
            UserError: a picture cannot be read.
        """
        if isinstance(images, str | Path | Image.Image):
            return self._answer([CAPTION_REQUESTS[0]], [[images]])[0]
        return self._answer([CAPTION_REQUESTS[0]] * len(images), [[image] for image in images])

    @overload
    def ask(self, images: Picture, questions: str) -> str: ...
    @overload
    def ask(
        self, images: Picture | Sequence[Picture | Sequence[Picture]], questions: str | Sequence[str]
    ) -> str | list[str]: ...
    def ask(
        self, images: Picture | Sequence[Picture | Sequence[Picture]], questions: str | Sequence[str]
    ) -> str | list[str]:
        """Answer questions about pictures, all in one batch.

        Args:
            images: one picture, or one entry for each question; an entry may be a list of several pictures.
            questions: one question, or a list.

        Returns:
            A text for one question about one picture, else a list of texts. One question goes to every picture
            of a list, and one picture serves every question of a list.

        Raises:
            UserError: a picture cannot be read, a question is empty or too long, or the numbers do not match.
        """
        one_picture, one_question = isinstance(images, str | Path | Image.Image), isinstance(questions, str)
        asked: list[str] = [questions] if isinstance(questions, str) else list(questions)
        shown: list[Any] = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        if one_picture:
            shown = shown * len(asked)
        elif one_question:
            asked = asked * len(shown)
        if len(shown) != len(asked):
            raise UserError(f"questions: {len(asked)} questions for {len(shown)} images; give one for each")
        if any(not question.strip() for question in asked):
            raise UserError("question: empty; ask something")
        entries = [[entry] if isinstance(entry, str | Path | Image.Image) else list(entry) for entry in shown]
        answers = self._answer(asked, entries)
        return answers[0] if one_picture and one_question else answers

    def _answer(self, questions: Sequence[str], images: Sequence[Sequence[Picture]]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(questions), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = self.processor(questions[part], images[part])
            answers += generate_text(self.model, self.processor, inputs)
        return answers

    def draw(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        return_codes: bool = False,
        on_progress: Progress | None = None,
        images: Pictures = None,
        output_type: Literal["pil", "codes"] = "pil",
    ) -> Any:
        """Draw pictures.

        Args:
            prompts: a text, or a list of texts of any lengths.
            n: drawings of each prompt; they follow one another in the result.
            guidance_scale: how hard to follow the prompt; 1 is no guidance.
            temperature: 0 takes the likeliest code at every step.
            top_k: keep the k likeliest codes.
            top_p: keep the likeliest codes of this mass.
            seed: a number, giving image i the stream of (seed, i), or one number for each image, giving it the
                stream of (seed[i], 0); the same prompt and stream give the same image in any batch.
            size: (width, height) in pixels; the model's own if left out.
            return_codes: also return the codes.
            on_progress: called with codes done and codes in all.
            images: a picture that goes with every prompt, or one entry for each prompt: a picture, a list of
                pictures, or None. They stand before the prompt's words, as `ask` puts them. Guidance steers away
                from what it always does, and from the pictures too: from the prompt with all but its first and
                last token blanked, features included (Janus), or from the negative prompt alone (Emu3).
            output_type: `codes` leaves it at the codes, for when nobody looks.

        Returns:
            A list of PIL images; with `return_codes` also their codes, int64 [B, h, w]; of `codes` these alone.

        Raises:
            UserError: a prompt is empty or too long, a picture cannot be read, the model cannot look at pictures,
                or an option makes no sense.
        """
        check_options(guidance_scale, temperature, top_k, top_p)
        if output_type not in (known := ("pil", "codes")):
            raise UserError(f"output_type: {output_type!r}; give one of {', '.join(known)}")
        if n < 1:
            raise UserError(f"n: {n}; give 1 or more")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        shown = _entries(images, len(texts))
        tokenizer, grid = self.image_tokenizer, self._grid(size)
        for text, pictures in zip(texts, shown, strict=True):  # all are checked before the first is drawn
            self.processor.drawing_inputs(text, pictures, grid)
        if any(shown):
            warnings.warn(PICTURES_NOTE, UserNote, stacklevel=2)
        texts = [text for text in texts for _ in range(n)]
        shown = [pictures for pictures in shown for _ in range(n)]
        options = (guidance_scale, temperature, top_k, top_p)
        uniforms = streams(seed, len(texts), grid[0] * grid[1])
        drawn = self._sample(texts, shown, uniforms, grid, options, on_progress)
        if output_type == "codes":
            return drawn
        drawings = [
            image for part in drawn.split(self.batch_size) for image in self._pictures(tokenizer, part)
        ]
        return (drawings, drawn) if return_codes else drawings

    def _sample(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Picture]],
        uniforms: Tensor,
        grid: tuple[int, int],
        options: tuple[float, float, int | None, float | None],
        on_progress: Progress | None,
    ) -> Tensor:
        """Codes [B, h, w] of a drawing of each text with its pictures; options as `check_options` takes them."""
        steps = grid[0] * grid[1]
        codes = [torch.empty((0, *grid), dtype=torch.long, device=self.model.device)]
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            rows, report = texts[part], None
            if on_progress is not None:
                report = _reporter(on_progress, start * steps, len(rows), len(texts) * steps)
            drawn = sample_codes(
                self.model,
                self.processor,
                rows,
                uniforms[part],
                *options,
                grid=grid,
                on_step=report,
                images=images[part],
            )
            codes.append(drawn)
        return torch.cat(codes)

    def _pictures(self, tokenizer: ImageTokenizer | MoVQTokenizer, codes: Tensor) -> list[Image.Image]:
        return self.processor.to_images(tokenizer.decode(codes)) if len(codes) else []

    def _grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Return rows and columns of codes for a size in pixels."""
        rows, columns = self.model.layout.grid
        if size is None:
            return rows, columns
        stride = self.image_tokenizer.stride
        width, height = size
        own = f"{columns * stride}x{rows * stride}"
        if size == (columns * stride, rows * stride):
            return rows, columns
        generation = self.model.config.generation_config()
        if generation is not None and generation.places:
            raise UserError(f"size: {width}x{height}; this model draws {own} only")
        if min(size) < stride or width % stride or height % stride:
            raise UserError(f"size: {width}x{height}; give multiples of {stride}, such as {own}")
        if not self.model.layout.shared:
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


def _entries(images: Pictures, prompts: int) -> list[list[Picture]]:
    """Return the pictures of each prompt."""
    if images is None or isinstance(images, str | Path | Image.Image):
        return [[] if images is None else [images]] * prompts
    if len(images) != prompts:
        raise UserError(f"images: {len(images)} entries for {prompts} prompts; give one for each, or None")
    entries: list[Picture | Sequence[Picture]] = [[] if entry is None else entry for entry in images]
    return [[entry] if isinstance(entry, str | Path | Image.Image) else list(entry) for entry in entries]


def _reporter(report: Progress, done: int, images: int, total: int) -> Callable[[int], None]:
    return lambda step: report(done + step * images, total)


def embedded_model() -> Path:
    """Return the folder of the model that ships with the package."""
    folder = Path(str(resources.files("unimm"))) / "assets" / EMBEDDED
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: the embedded model is missing; reinstall unimm, or name a model")
    return folder


def resolve(source: str | os.PathLike[str] | None) -> Path:
    """Return the local folder of a source: the embedded model, a folder, or a hub id (downloaded).

    Raises:
        UserError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    if source is None:
        return embedded_model()
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source}: a file, not a model folder; name the folder that holds config.json")
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"{source}: no such folder; give a model folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source}: no such folder, and not to be had from the hub ({reason})") from None


def load(
    source: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> UniMM:
    """Load a model.

    Args:
        source: None for the model that ships with the package, else a folder or a hub id.
        device: "auto" takes CUDA, then MPS, then the CPU.
        dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        quantize: "int8" gives the decoder's linear layers and large heads int8 weights (`unimm.quantization`),
            a quarter of float32's memory; on CPUs small batches are faster too. The model cannot be saved then.
        adapter: folder of a peft adapter of that model, which is merged into its weights.

    Raises:
        UserError: the source is missing, broken, or not a unimm model; the adapter is, or is of another model; or
            an option is of no known name.
    """
    check_method(quantize)
    folder = resolve(source)
    place = choose_device(device)
    model, processor = _read(folder, choose_dtype(dtype, place))
    if adapter is not None:
        model = _with_adapter(model, Path(adapter))
    if quantize is not None:  # before it moves: the device then never holds the whole weights
        model.quantise()
    return UniMM(nn.Module.to(model, place), processor)


def _with_adapter(model: UniMMModel, folder: Path) -> UniMMModel:
    """Return a model with a peft adapter merged into its weights."""
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds no adapter (adapter_config.json is missing)")
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("adapter: needs peft; install it with: pip install 'unimm[lora]'") from None
    try:
        merged: UniMMModel = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: not an adapter of this model ({line})") from None
    return merged


def _read(folder: Path, dtype: torch.dtype) -> tuple[UniMMModel, UniMMProcessor]:
    """Read a checkpoint of any layout into memory."""
    if recognise(folder)[0] != "unimm":
        return load_foreign(folder, dtype)
    check_weights(folder)
    config = read_config(folder)
    with no_progress():
        model = UniMMModel.from_pretrained(folder, config=config, dtype=dtype)
    return model, UniMMProcessor.from_pretrained(folder, config)


def load_processor(source: str | os.PathLike[str] | None = None) -> UniMMProcessor:
    """Load a model's processor alone; its weights are not read.

    Args:
        source: what `load` takes.

    Raises:
        UserError: the source is missing or broken.
    """
    folder = resolve(source)
    return read_processor(folder, read_config(folder))


def choose_device(device: str) -> torch.device:
    """Return the device that a name means.

    Raises:
        UserError: torch knows no such device, or it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise UserError(f"device: {device!r} is not to be had here; use auto, cpu, cuda or mps") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number format that a name means on a device.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def describe(source: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Say what a model is, from its configuration alone; no weights are read.

    Returns:
        Family, parts with their parameters, context, image sizes and what the model can do.
    """
    folder = resolve(source)
    family, layout = recognise(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = UniMMModel(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    if model.image_tokenizer is not None:
        parts["image_tokenizer"] = sum(p.numel() for p in model.image_tokenizer.parameters())
        if isinstance(model.image_tokenizer, ImageTokenizer):  # its codebook may be a buffer
            parts["image_tokenizer"] += model.image_tokenizer.quantize.stored
    vision, generation = config.vision_config(), config.generation_config()
    decoder = config.decoder_config()
    area = "any size, {} to {} pixels".format(*generation.area) if generation and generation.area else None
    return {
        "source": str(folder if source is not None else "embedded"),
        "family": family,
        "layout": layout,
        "decoder": decoder.model_type,
        "parameters": parts,
        "parameters_total": sum(parts.values()),
        "context": decoder.max_position_embeddings,
        "understands": f"{vision.image_size}x{vision.image_size}" if vision else area,
        "draws": f"{generation.image_size}x{generation.image_size}" if generation else None,
        "can": [*(["caption", "ask"] if vision or area else []), *(["draw"] if generation else [])],
    }
