"""Images that are understood by their codes: the tokens of these in the place of placeholders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unimm.models.inputs import Images
from unimm.models.layout import ImageLayout


def put_tokens(tokenizer: Any, layout: ImageLayout, input_ids: Tensor, images: Images) -> Tensor:
    """Fill the placeholders of images with the tokens of their codes.

    Args:
        tokenizer: the image tokenizer; None: there is none.
        layout: how images sit among the tokens.
        input_ids: [B, T].
        images: as pixels, in the number format of the tokenizer.

    Raises:
        ValueError: they do not fit the placeholders, or there is no image tokenizer.
    """
    assert images.pixels is not None
    if tokenizer is None:
        raise ValueError("images: this model has no image tokenizer")
    tokens = _image_tokens(tokenizer, layout, images.pixels, images.sizes)
    mask = layout.feature_positions(input_ids)
    if int(mask.sum()) != len(tokens):
        raise ValueError(f"images: {len(tokens)} tokens, but there is room for {int(mask.sum())}")
    return input_ids.masked_scatter(mask, tokens)


def _image_tokens(tokenizer: Any, layout: ImageLayout, pixels: Tensor, sizes: Tensor | None) -> Tensor:
    """Return the tokens [P] of images [N, 3, H, W], each cut to its size [N, 2] and encoded alone.

    What an encoder sees reaches far, so an image that is padded to a larger one has other codes. Images of one size
    would differ in the last bits of their latents, enough to turn a code now and then.
    """
    cuts = [list(pixels.shape[-2:])] * len(pixels) if sizes is None else sizes.tolist()
    if len(cuts) != len(pixels):
        raise ValueError(f"images: {len(cuts)} sizes for {len(pixels)} images; give one for each")
    tokens = []
    for image, (height, width) in zip(pixels, cuts, strict=True):
        cut = image[None, :, :height, :width].contiguous()
        tokens.append(layout.tokens(tokenizer.encode(cut)[0]))
    return torch.cat(tokens)
