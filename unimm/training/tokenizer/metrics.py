"""How faithful reconstructions are and how well a codebook is used."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.images import to_uint8

IMAGE_GAP = 2  # white pixels between images of a sheet


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB.

    Args:
        output: float [B, 3, H, W]; clamped to [-1, 1].
        target: float [B, 3, H, W] in [-1, 1].

    Returns:
        float [B], at most 100.
    """
    mse = (output.clamp(-1, 1) - target).square().flatten(1).mean(1) / 4  # the peak is 1 - (-1) = 2
    return -10 * torch.log10(mse.clamp_min(1e-10))


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): 11-pixel Gaussian window, mean over channels.

    Args:
        output: float [B, 3, H, W], both sides above 5; clamped to [-1, 1].
        target: float [B, 3, H, W] in [-1, 1].

    Returns:
        float [B], at most 1.
    """
    reach = torch.arange(-5, 6, dtype=target.dtype, device=target.device)
    line = torch.exp(-(reach**2) / (2 * 1.5**2))
    line = line / line.sum()
    window = torch.outer(line, line).expand(target.shape[1], 1, 11, 11)
    a, b = output.clamp(-1, 1), target
    moments = F.pad(torch.cat([a, b, a * a, b * b, a * b]), (5, 5, 5, 5), mode="reflect")
    mean_a, mean_b, aa, bb, ab = F.conv2d(moments, window, groups=target.shape[1]).chunk(5)
    small_1, small_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of the values is 2
    light = (2 * mean_a * mean_b + small_1) / (mean_a**2 + mean_b**2 + small_1)
    shape = (2 * (ab - mean_a * mean_b) + small_2) / (aa - mean_a**2 + bb - mean_b**2 + small_2)
    return (light * shape).flatten(1).mean(1)


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Return the share of codes that occur, and the perplexity of their distribution.

    Args:
        counts: how often each code occurred, [codebook_size].
    """
    shares = counts.double() / counts.sum().clamp_min(1)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


class RecentCodes(nn.Module):
    """Use of a codebook over the latest codes of all processes, as LlamaGen logs it; nothing learns from it.

    Args:
        codebook_size: number of codes.
        window: how many codes back are counted; at least four for each code of the codebook, so that full use
            can be told.
    """

    seen: Tensor

    def __init__(self, codebook_size: int, window: int = 65_536) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        # -1: nothing yet. Not saved: a resumed run counts anew.
        codes = torch.full((max(window, 4 * codebook_size),), -1, dtype=torch.int32)
        self.register_buffer("seen", codes, persistent=False)

    @torch.no_grad()
    def add(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Count codes [B, h, w]; give the share of codes in use and their perplexity, as scalars."""
        new = codes.flatten().to(torch.int32)
        distributed = torch.distributed
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            parts = [torch.empty_like(new) for _ in range(distributed.get_world_size())]
            distributed.all_gather(parts, new)
            new = torch.cat(parts)
        self.seen = torch.cat([self.seen, new])[-len(self.seen) :]
        counts = torch.bincount(self.seen + 1, minlength=self.codebook_size + 1)[1:]
        shares = counts / counts.sum().clamp_min(1)
        entropy = -torch.xlogy(shares, shares).sum()
        return (counts > 0).float().mean(), entropy.exp()


def comparison(originals: Tensor, outputs: Tensor, columns: int = 12) -> Image.Image:
    """Lay out images [B, 3, H, W] in rows, each row of originals over the row of their reconstructions."""
    tops, bottoms = to_uint8(originals), to_uint8(outputs)  # [B, H, W, 3]
    count, height, width = tops.shape[:3]
    rows = -(-count // columns)
    pair = 2 * height + 2 * IMAGE_GAP
    sheet = Image.new(
        "RGB",
        (
            min(count, columns) * (width + IMAGE_GAP) - IMAGE_GAP,
            rows * (pair + IMAGE_GAP) - IMAGE_GAP,
        ),
        "white",
    )
    for number, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
        x, y = number % columns * (width + IMAGE_GAP), number // columns * (pair + IMAGE_GAP)
        sheet.paste(Image.fromarray(top), (x, y))
        sheet.paste(Image.fromarray(bottom), (x, y + height + IMAGE_GAP))
    return sheet
