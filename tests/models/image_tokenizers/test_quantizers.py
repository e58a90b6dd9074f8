"""Every kind of quantiser: its codes, its loss by hand, saving, and a place in a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from unimm.models.image_tokenizers.quantizers import (
    LearnedCodebook,
    LinearCodebook,
    LookupFreeQuantizer,
    VectorSettings,
    make_quantizer,
    read_settings,
)
from unimm.models.image_tokenizers.vq import ImageTokenizer, ImageTokenizerConfig
from unimm.training.tokenizer.metrics import RecentCodes

KINDS: dict[str, dict[str, Any]] = {
    "average": {"kind": "vq", "codebook_size": 12, "codebook_dim": 4, "kmeans_init": False},
    "gradient": {"kind": "vq", "codebook_size": 12, "codebook_dim": 4, "codebook_training": "gradient"},
    "fsq": {"kind": "fsq", "levels": [5, 4, 3]},
    "lfq": {"kind": "lfq", "codebook_size": 16},
    "simvq": {"kind": "simvq", "codebook_size": 12, "codebook_dim": 4},
}


def tokenizer(kind: str) -> ImageTokenizer:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "block_out_channels": [8, 8], "latent_channels": 8}
    return ImageTokenizer(ImageTokenizerConfig(**sizes, quantizer=KINDS[kind])).eval()


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_codes_go_out_and_come_back(kind: str) -> None:
    quantizer = make_quantizer(read_settings(KINDS[kind])).eval()
    size, dim = quantizer.vectors.shape
    settings = read_settings(KINDS[kind])
    assert (size, dim) == (settings.codebook_size, settings.codebook_dim)
    every = torch.arange(size).view(1, 1, size)
    seen = quantizer.lookup(every)
    assert seen.shape == (1, dim, 1, size)
    latents = torch.atanh(seen.clamp(-0.99, 0.99)) if kind == "fsq" else seen
    assert torch.equal(quantizer.codes(latents), every)
    quantized, codes, loss = quantizer(latents)
    assert torch.equal(codes, every) and loss.isfinite()
    torch.testing.assert_close(quantized, seen, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_in_training_agrees_with_encoding_and_moves_every_weight(kind: str) -> None:
    model = tokenizer(kind)
    codes = model.encode(images())
    assert codes.shape == (3, 4, 4) and codes.dtype == torch.int64
    output = model.train()(images())
    assert torch.equal(output.codes, codes) and output.pixels.shape == (3, 3, 16, 16)
    (output.pixels.square().mean() + output.commitment).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0 or "bias" in name, name
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.encode(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    blended = model(images(), blend=0.0)
    torch.testing.assert_close(blended.pixels, model.pixels(model.quantize.plain(model.latents(images()))))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_codes_and_trains_on(kind: str, tmp_path: Path) -> None:
    model = tokenizer(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, ImageTokenizer) and type(loaded.quantize) is type(model.quantize)
    assert loaded.config.quantizer == model.config.quantizer
    codes = model.encode(images())
    assert torch.equal(loaded.encode(images()), codes)
    # not to the bit for simvq: a product of matrices depends on where they lie in memory
    tolerance = 1e-5 if kind == "simvq" else 0.0
    torch.testing.assert_close(loaded.decode(codes), model.decode(codes), atol=tolerance, rtol=0)
    assert loaded.train()(images()).commitment.isfinite()
    with torch.device("meta"):
        assert tokenizer(kind).vectors.shape == model.vectors.shape


def test_earlier_configurations_mean_what_they_meant() -> None:
    earlier = ImageTokenizerConfig(codebook_size=32, codebook_dim=4, codebook_decay=0.9)
    assert earlier.quantizer_settings == VectorSettings(
        codebook_size=32, codebook_dim=4, codebook_decay=0.9, dead_code_threshold=0.0, kmeans_init=False
    )
    assert (earlier.codebook_size, earlier.codebook_dim) == (32, 4)
    with pytest.raises(ValueError, match=r"quantizer\.levels\[0\]: expected more than 2, got 2"):
        ImageTokenizerConfig(quantizer={"kind": "fsq", "levels": [2]})


def test_loss_of_the_learned_codebook_by_hand() -> None:
    """LlamaGen's: mean of (code - latent)² with weight 1 for the code and beta for the latent."""
    torch.manual_seed(0)
    quantizer = LearnedCodebook(VectorSettings(codebook_size=6, codebook_dim=3, commitment_weight=0.25))
    latents = torch.randn(2, 3, 2, 2, requires_grad=True)
    quantized, codes, loss = quantizer(latents)
    directions = F.normalize(latents.detach(), dim=1).movedim(1, -1)
    vectors = F.normalize(quantizer.vectors.detach(), dim=-1)
    wanted = torch.cdist(directions.reshape(-1, 3), vectors).argmin(-1).view(2, 2, 2)
    assert torch.equal(codes, wanted)
    error = (vectors[wanted] - directions).square().mean()
    torch.testing.assert_close(loss.detach(), 1.25 * error)
    code_part, latent_part = torch.autograd.grad(loss, [quantizer.vectors, latents])
    assert code_part.abs().sum() > 0 and latent_part.abs().sum() > 0
    (through,) = torch.autograd.grad(quantizer(latents)[0].sum(), latents)
    (plain,) = torch.autograd.grad(F.normalize(latents, dim=1).sum(), latents)
    torch.testing.assert_close(through, plain)  # straight through
    assert quantized.shape == latents.shape


def test_entropy_loss_of_lookup_free_codes_by_hand() -> None:
    """Two bits, far apart: each choice is sure (entropy 0), all four are used (entropy log 4)."""
    settings = read_settings({"kind": "lfq", "codebook_size": 4, "commitment_weight": 0.0})
    quantizer = make_quantizer(settings).train()
    assert isinstance(quantizer, LookupFreeQuantizer)
    latents = quantizer.vectors.T.reshape(1, 2, 2, 2)
    assert quantizer(latents)[2].item() == pytest.approx(-0.1 * torch.tensor(4.0).log().item(), abs=1e-3)
    same = torch.ones(1, 2, 2, 2)
    assert quantizer(same)[2].item() == pytest.approx(0.0, abs=1e-3)


def test_simvq_moves_all_codes_by_one_layer() -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer(read_settings(KINDS["simvq"])).train()
    assert isinstance(quantizer, LinearCodebook)
    before = quantizer.vectors.detach().clone()
    frozen = quantizer.frozen_codebook.clone()
    latents = torch.randn(1, 4, 1, 1)  # one code is chosen
    torch.optim.SGD(quantizer.parameters(), lr=1.0).zero_grad()
    quantizer(latents)[2].backward()
    with torch.no_grad():
        for weight in quantizer.parameters():
            weight -= weight.grad
    assert torch.equal(quantizer.frozen_codebook, frozen)
    assert ((quantizer.vectors - before).abs().sum(1) > 0).all()


def test_recent_codes_are_counted_in_a_window() -> None:
    recent = RecentCodes(4, window=16)
    use, perplexity = recent.add(torch.zeros(1, 2, 2, dtype=torch.long))
    assert (use.item(), perplexity.item()) == (0.25, pytest.approx(1.0))
    use, perplexity = recent.add(torch.ones(1, 2, 2, dtype=torch.long))
    assert (use.item(), perplexity.item()) == (0.5, pytest.approx(2.0))
    use, perplexity = recent.add(torch.full((4, 2, 2), 3))
    assert (use.item(), perplexity.item()) == (0.25, pytest.approx(1.0))
