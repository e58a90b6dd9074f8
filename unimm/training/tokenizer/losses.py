"""Losses of an image tokenizer: reconstruction, perceptual, adversarial, after LlamaGen (arXiv 2406.06525).

Every loss is a *sum over images* of a mean within the image; the caller divides by the images of the
whole step, so that accumulating micro-batches gives the gradient of the one large batch.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unimm.errors import UserError


def _per_image(error: Tensor) -> Tensor:
    """Sum over the batch of each image's mean."""
    return error.flatten(1).mean(1).sum()


def pixel_loss(output: Tensor, target: Tensor, l1: float, l2: float) -> Tensor:
    """Weighted absolute and squared error of pixels [B, 3, H, W]."""
    error = output - target
    loss = output.new_zeros(())
    if l1:
        loss = loss + l1 * _per_image(error.abs())
    if l2:
        loss = loss + l2 * _per_image(error.square())
    return loss


def edge_loss(output: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Absolute error of horizontal and vertical differences at `scales` resolutions, each half the last.

    Flat art on plain ground is known by its outlines, which pixel errors alone weigh little.
    """
    error = output - target  # differences are linear, so the error's differences are the differences' error
    loss = output.new_zeros(())
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        loss = loss + _per_image(error.diff(dim=-1).abs()) + _per_image(error.diff(dim=-2).abs())
    return loss / (2 * scales)


class PerceptualLoss(nn.Module):
    """Distance of unit-length features of a frozen network: LPIPS without its learned channel weights.

    Args:
        network: a timm model with weights: its name where a hub is reachable, or `local-dir:FOLDER`.
        layers: how many of its last feature levels (blocks of a transformer) are compared.
        pretrained: False gives random weights, to see whether a recipe runs.

    Raises:
        UserError: if timm cannot give the network or its intermediate features.
    """

    mean: Tensor
    std: Tensor
    network: Any  # a module, with what timm adds to it

    def __init__(self, network: str, layers: int = 4, pretrained: bool = True) -> None:
        super().__init__()
        import timm  # slow to import, and needed for this loss alone

        try:
            self.network = timm.create_model(network, pretrained=pretrained)
        except Exception as error:  # hub, file and key errors have no common base
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"perceptual network {network!r}: cannot be loaded ({reason})") from error
        if not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"perceptual network {network!r}: timm gives no intermediate features for it")
        self.network.requires_grad_(False).eval()
        self.layers = layers
        self.register_buffer("mean", torch.tensor(self.network.default_cfg["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(self.network.default_cfg["std"]).view(1, 3, 1, 1))

    def features(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return the last `layers` feature maps, each [B, C, h, w], of pixels [B, 3, H, W] in [-1, 1]."""
        size = self.network.default_cfg["input_size"][-2:]
        if getattr(self.network, "patch_embed", None) is not None and tuple(pixels.shape[-2:]) != tuple(size):
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        normal = ((pixels + 1) / 2 - self.mean) / self.std
        maps: list[Tensor] = self.network.forward_intermediates(normal, intermediates_only=True)  # NCHW
        return maps[-self.layers :]

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the summed distance of two batches of pixels [B, 3, H, W] in [-1, 1]."""
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(output), wanted, strict=True)
        errors = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1) for a, b in pairs]
        return torch.stack([_per_image(error) for error in errors]).mean()


LPIPS = "lpips:"  # begins the name of a network of the package lpips
LPIPS_NETWORKS = ("vgg", "alex", "squeeze")


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924) by the package lpips, with its learned channel weights.

    Args:
        network: one of `LPIPS_NETWORKS`; LlamaGen, like VQGAN, has "vgg".
        pretrained: False gives random weights, to see whether a recipe runs.

    Raises:
        UserError: the package, or the weights of its network, are not available.
    """

    def __init__(self, network: str, pretrained: bool = True) -> None:
        super().__init__()
        if network not in LPIPS_NETWORKS:
            known = ", ".join(LPIPS + name for name in LPIPS_NETWORKS)
            raise UserError(f"perceptual network {LPIPS + network!r}: expected one of {known}")
        try:
            import lpips
        except ImportError:
            way = "install it with: pip install 'unimm[lpips]'"
            raise UserError(
                f"perceptual network {LPIPS + network!r}: needs the package lpips; {way}"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it calls torchvision by an older name of an argument
                self.distance = lpips.LPIPS(
                    net=network, pretrained=pretrained, pnet_rand=not pretrained, verbose=False
                )
        except (OSError, RuntimeError) as error:  # no network, or a download that was cut short
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            folder = f"{torch.hub.get_dir()}/checkpoints"
            raise UserError(
                f"perceptual network {LPIPS + network!r}: torchvision's ImageNet weights of it cannot be had "
                f"({reason}); put its file into {folder}, name a timm network (local-dir:FOLDER), or set "
                "loss.perceptual.network to null"
            ) from error
        self.requires_grad_(False).eval()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the summed distance of two batches of pixels [B, 3, H, W] in [-1, 1]."""
        distances: Tensor = self.distance(output, target)
        return distances.sum()


def make_perceptual(network: str, layers: int, pretrained: bool) -> nn.Module:
    """Return the perceptual loss that a recipe names.

    Raises:
        UserError: the network is not available.
    """
    if network.startswith(LPIPS):
        return Lpips(network.removeprefix(LPIPS), pretrained)
    return PerceptualLoss(network, layers, pretrained)


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): one realness score for each patch, [B, 1, h, w].

    Group normalisation stands in for batch normalisation: it keeps no running statistics, so the same pass
    serves real and reconstructed images and any micro-batch size.

    Args:
        channels: of the first level; each has twice those of the one before, up to eight times.
        levels: that halve the grid.
        full: one more level that does not, and a last kernel of 4, as in the paper (patches of 70 pixels at 3
            levels).
    """

    def __init__(self, channels: int = 32, levels: int = 3, full: bool = False) -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(levels + full)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (before, after) in enumerate(itertools.pairwise(widths), 1):
            stride = 2 if level < levels else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4 if full else 3, 1, 1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):  # pix2pix's initialisation
                nn.init.normal_(layer.weight, 0.0, 0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> Tensor:
        """Score pixels [B, 3, H, W]; above zero is real."""
        scores: Tensor = self.layers(pixels)
        return scores


def discriminator_loss(discriminator: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """Hinge loss that teaches the discriminator; the reconstruction gets no gradient."""
    scores = discriminator(torch.cat([target, output.detach()]))
    real, fake = scores.chunk(2)
    return 0.5 * (_per_image(F.relu(1 - real)) + _per_image(F.relu(1 + fake)))


def generator_loss(discriminator: nn.Module, output: Tensor) -> Tensor:
    """Hinge loss that teaches the tokenizer; the discriminator's weights get no gradient.

    With the weights detached both players fit into one backward pass and one optimizer.
    """
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    scores: Tensor = functional_call(discriminator, weights, (output,))
    return -_per_image(scores)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Scale at which both losses pull equally on the last layer (VQGAN, arXiv 2012.09841), at most 1e4."""
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    weight: Tensor = wanted.norm() / (given.norm() + 1e-4)
    return weight.clamp(0.0, 1e4).detach()
