"""How good an image tokenizer is on each split: PSNR, SSIM, use and perplexity of the codes, and sheets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from unimm.console import no_progress
from unimm.data.emojiscenes.scenes import EmojiScenes, Split
from unimm.errors import UserError
from unimm.files import atomic_write, settled
from unimm.images import save_image, to_tensor
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.outputs import check_output, document_has, is_image_file
from unimm.processing.views import square_pixels
from unimm.training.recipe import load_recipe
from unimm.training.tokenizer.images import ImageFiles
from unimm.training.tokenizer.metrics import codebook_use, comparison, psnr, ssim
from unimm.training.tokenizer.task import TokenizerRecipe

RECONSTRUCTION_BATCH = 50  # images in a forward pass
SHEET = 48  # images on a sheet


def load_trained_tokenizer(folder: str | Path) -> ImageTokenizer:
    """Load a trained tokenizer in eval mode.

    Raises:
        UserError: the folder has no tokenizer, or its weights are missing, damaged or do not fit.
    """
    folder = settled(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} here; train the tokenizer first, or name its folder")
    try:
        with no_progress():
            model: ImageTokenizer = ImageTokenizer.from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors have errors of their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason})") from error
    model.eval()
    return model


def scene_batches(split: Split, samples: int, seed: int, size: int) -> Iterator[Tensor]:
    """Yield the first scenes of a split as pixels float [B, 3, H, W] in [-1, 1]."""
    scenes = EmojiScenes(split, seed=seed, size=size, length=samples)
    for start in range(0, samples, RECONSTRUCTION_BATCH):
        stop = min(start + RECONSTRUCTION_BATCH, samples)
        yield to_tensor(np.stack([scenes[index].render() for index in range(start, stop)]))


def evaluate_split(
    tokenizer: ImageTokenizer, split: Split, samples: int, seed: int, sheet: Path | None = None
) -> dict[str, float]:
    """Reconstruct scenes of a split: `samples` of them, which ones `seed` decides; see `evaluate_pixels`."""
    return evaluate_pixels(tokenizer, scene_batches(split, samples, seed, tokenizer.config.image_size), sheet)


def image_batches(location: str, samples: int, size: int) -> Iterator[Tensor]:
    """Yield up to `samples` images of one's own, spread over their place, as pixels [B, 3, H, W] in [-1, 1]."""
    files = ImageFiles(location)
    indices = np.unique(np.linspace(0, len(files) - 1, samples).astype(int)).tolist()
    for start in range(0, len(indices), RECONSTRUCTION_BATCH):
        yield square_pixels([files[index] for index in indices[start : start + RECONSTRUCTION_BATCH]], size)


def evaluate_pixels(
    tokenizer: ImageTokenizer, images: Iterable[Tensor], sheet: Path | None = None
) -> dict[str, float]:
    """Reconstruct images.

    Args:
        tokenizer: in eval mode, on any device.
        images: batches of pixels [B, 3, H, W] in [-1, 1].
        sheet: where to write the first of them over their reconstructions.

    Returns:
        samples; psnr in dB (mean over images); ssim (mean); codebook_use (share of codes that occur);
        perplexity (effective number of codes).
    """
    device = tokenizer.device
    counts = torch.zeros(tokenizer.config.codebook_size, dtype=torch.long)
    ratios: list[Tensor] = []
    similarities: list[Tensor] = []
    shown: list[tuple[Tensor, Tensor]] = []
    for pixels in images:
        codes = tokenizer.encode(pixels.to(device))
        output = tokenizer.decode(codes).cpu()
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        ratios.append(psnr(output, pixels))
        similarities.append(ssim(output, pixels))
        if len(shown) * RECONSTRUCTION_BATCH < SHEET:
            shown.append((pixels, output))
    if sheet is not None:
        originals, outputs = (torch.cat(parts)[:SHEET] for parts in zip(*shown, strict=True))
        save_image(comparison(originals, outputs), sheet)
    used, perplexity = codebook_use(counts)
    return {
        "samples": sum(map(len, ratios)),
        "psnr": torch.cat(ratios).mean().item(),
        "ssim": torch.cat(similarities).mean().item(),
        "codebook_use": used,
        "perplexity": perplexity,
    }


def evaluate_tokenizer(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Evaluate the tokenizer that a training recipe made, as its section `evaluation` says.

    Writes `metrics.json` and one sheet of originals over reconstructions for each split.

    Args:
        path: the recipe's file.
        overrides: `key=value` settings.

    Returns:
        tokenizer: its folder; parameters; codebook_size; codes of an image; and for each split what
        `evaluate_split` gives.

    Raises:
        UserError: the recipe is wrong or of another task, or there is no trained tokenizer.
    """
    recipe = load_recipe(path, list(overrides))
    if not isinstance(recipe, TokenizerRecipe):
        raise UserError(f"{path}: task: expected tokenizer, got {recipe.task}")
    settings = recipe.evaluation
    source = Path(settings.tokenizer or Path(recipe.output, "export"))
    folder = Path(settings.output or Path(recipe.output, "evaluation"))
    sheets = [folder / f"{split}.png" for split in get_args(Split) if split in settings.splits]
    if settings.images is not None:
        sheets.append(folder / "images.png")
        if folder.resolve() == Path(settings.images).resolve():
            raise recipe.error(
                "evaluation.output", f"{folder}: the images that are read are there; name another"
            )
    for sheet in sheets:
        check_output(sheet, "an image", is_image_file)
    check_output(folder / "metrics.json", "earlier figures", document_has("tokenizer", "codebook_size"))
    tokenizer = load_trained_tokenizer(source)
    device = "cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(tokenizer, device)  # transformers' own `to` only adds checks, and hides the type
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "tokenizer": str(source),
        "parameters": tokenizer.num_parameters(),
        "codebook_size": tokenizer.config.codebook_size,
        "codes": tokenizer.config.grid_size**2,
    }
    for split in get_args(Split):
        if split in settings.splits:
            sheet = folder / f"{split}.png"
            result[split] = evaluate_split(tokenizer, split, settings.samples, settings.seed, sheet)
    if settings.images is not None:
        own = image_batches(settings.images, settings.samples, tokenizer.config.image_size)
        result["images"] = evaluate_pixels(tokenizer, own, folder / "images.png")
    with atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
