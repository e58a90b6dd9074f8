"""Convolutional stems: what a patch of an image is embedded by before a vision transformer looks at it.

A small encoder that is trained from nothing learns from several times fewer images with one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from timm.layers.norm import LayerNorm2d
from timm.layers.std_conv import ScaledStdConv2d
from torch import nn

GELU_GAIN = 1.7015  # by which GELU keeps the variance of a normal input (Brock et al. 2021)


def levels(patch: int, channels: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the channels before and after each halving; those after a halving are half of the next one's."""
    count = patch.bit_length() - 1
    return itertools.pairwise([channels, *(width // 2 ** (count - 1 - level) for level in range(count))])


def conv_stem(patch: int, channels: int, width: int) -> nn.Sequential:
    """Return 3x3 convolutions that each halve an image, up to patches; normalised at each pixel over its channels.

    Args:
        patch: pixels a side of a patch, a power of 2.
        channels: of the image.
        width: of a patch afterwards.

    Source: Xiao et al. 2021, arXiv 2106.14881.
    """
    layers: list[nn.Module] = []
    for before, after in levels(patch, channels, width):
        layers += [nn.Conv2d(before, after, 3, 2, 1), LayerNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers)


def scaled_conv_stem(patch: int, channels: int, width: int) -> nn.Sequential:
    """Return two 3x3 convolutions for each halving of an image, their weights standardised, activations as they are.

    A norm at each pixel takes from strokes on an even ground what tells them from it; without any, a deep stack does
    not begin to learn. Standardised weights begin with the scale of the signal kept and need neither.

    Args:
        patch: pixels a side of a patch, a power of 2.
        channels: of the image.
        width: of a patch afterwards.

    Source: Brock et al. 2021, arXiv 2101.08692.
    """
    layers: list[nn.Module] = []
    for before, after in levels(patch, channels, width):
        for source, stride in ((before, 2), (after, 1)):
            layers += [ScaledStdConv2d(source, after, 3, stride, 1, gamma=GELU_GAIN), nn.GELU()]
    return nn.Sequential(*layers)


STEMS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    "conv": conv_stem,
    "scaled_conv": scaled_conv_stem,
}
