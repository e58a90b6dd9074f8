"""Losses: values worked out by hand, what gets a gradient and what does not, and sums that add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unimm.errors import UserError
from unimm.training.tokenizer import losses


def images(count: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pixel_loss_by_hand() -> None:
    output, target = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 3, 4, 4)
    # each of two images: 3 * 0.5 + 2 * 0.25
    assert losses.pixel_loss(output, target, l1=3.0, l2=2.0).item() == pytest.approx(2 * (1.5 + 0.5))
    assert losses.pixel_loss(output, target, l1=0.0, l2=0.0).item() == 0


def test_edge_loss_sees_edges_and_not_brightness() -> None:
    target = images()
    assert losses.edge_loss(target + 0.25, target).item() == pytest.approx(0, abs=1e-5)
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1.0  # one vertical edge of height 1 among 7 differences
    assert losses.edge_loss(step, torch.zeros_like(step), scales=1).item() == pytest.approx((1 / 7) / 2)


@pytest.mark.parametrize("name", ["pixels", "edges", "generator", "discriminator"])
def test_losses_add_up_over_images(name: str) -> None:
    """The loss of a batch is the sum of its images' losses, as accumulation needs."""
    torch.manual_seed(0)
    judge = losses.PatchDiscriminator(8, 2)
    loss = {
        "pixels": lambda a, b: losses.pixel_loss(a, b, 1.0, 2.0),
        "edges": losses.edge_loss,
        "generator": lambda a, b: losses.generator_loss(judge, a),
        "discriminator": lambda a, b: losses.discriminator_loss(judge, a, b),
    }[name]
    output, target = images(seed=1), images(seed=2)
    parts = [loss(a[None], b[None]) for a, b in zip(output, target, strict=True)]
    assert loss(output, target).item() == pytest.approx(sum(part.item() for part in parts), rel=1e-4)


def test_each_player_gets_only_its_own_gradient() -> None:
    judge = losses.PatchDiscriminator(8, 2)
    output = images().requires_grad_()
    losses.generator_loss(judge, output).backward()
    assert output.grad is not None and output.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in judge.parameters())
    output.grad = None
    losses.discriminator_loss(judge, output, images(seed=2)).backward()
    assert output.grad is None
    assert all(weight.grad is not None for weight in judge.parameters())


def test_the_players_pull_in_opposite_directions() -> None:
    """Its loss teaches the discriminator to distinguish two; the generator's then raises a fake's score."""
    torch.manual_seed(0)
    judge = losses.PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    real, fake = images(seed=1) * 0.2 + 0.5, images(seed=2) * 0.2 - 0.5
    for _ in range(30):
        optimizer.zero_grad()
        losses.discriminator_loss(judge, fake, real).backward()
        optimizer.step()
    assert losses.discriminator_loss(judge, fake, real).item() < 0.1
    moving = fake.clone().requires_grad_()
    before = judge(moving).mean()
    losses.generator_loss(judge, moving).backward()
    assert moving.grad is not None
    assert judge(moving - 100 * moving.grad).mean() > before


def test_adaptive_weight_evens_out_the_gradients() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    ratio = losses.adaptive_weight((6 * weight).sum(), (2 * weight).sum(), weight)
    assert ratio.item() == pytest.approx(3.0, rel=1e-3)
    assert losses.adaptive_weight((6 * weight).sum(), (0 * weight).sum(), weight).item() == 1e4


def test_perceptual_loss_of_a_network_in_a_folder(tmp_path: Path) -> None:
    import json

    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=2)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    settings = {"num_classes": 2, "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "num_classes": 2, "pretrained_cfg": settings})
    )
    loss = losses.PerceptualLoss(f"local-dir:{tmp_path}", layers=3)
    assert not any(weight.requires_grad for weight in loss.parameters())
    target = images(2, 32)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)
    output = (target + 0.3 * images(2, 32, seed=5)).requires_grad_()
    distance = loss(output, target)
    distance.backward()
    assert distance.item() > 0 and output.grad is not None and output.grad.abs().sum() > 0
    assert loss(output.detach() * 0.5 + target * 0.5, target) < distance


def test_a_perceptual_network_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="perceptual network 'local-dir:"):
        losses.PerceptualLoss(f"local-dir:{tmp_path / 'none'}")


def test_lpips_with_random_weights_is_a_distance() -> None:
    torch.manual_seed(0)
    loss = losses.make_perceptual("lpips:squeeze", 4, pretrained=False)
    assert isinstance(loss, losses.Lpips) and not any(weight.requires_grad for weight in loss.parameters())
    target = images(2, 64)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)
    output = (target + 0.3 * images(2, 64, seed=5)).requires_grad_()
    distance = loss(output, target)
    distance.backward()
    assert output.grad is not None and output.grad.abs().sum() > 0
    parts = [loss(a[None], b[None]).item() for a, b in zip(output.detach(), target, strict=True)]
    assert distance.item() == pytest.approx(sum(parts), rel=1e-4)


def test_lpips_without_weights_or_package_says_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys
    from urllib.error import URLError

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        UserError, match=rf"lpips:squeeze'.*no network.*put its file into {tmp_path}"
    ) as caught:
        losses.make_perceptual("lpips:squeeze", 4, pretrained=True)
    assert "\n" not in str(caught.value) and "to null" in str(caught.value)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"needs the package lpips; .*unimm\[lpips\]"):
        losses.Lpips("vgg")


def test_the_full_discriminator_has_the_papers_layers() -> None:
    judge = losses.PatchDiscriminator(64, 3, full=True)
    convolutions = [layer for layer in judge.layers if isinstance(layer, nn.Conv2d)]
    shapes = [(layer.out_channels, layer.kernel_size[0], layer.stride[0]) for layer in convolutions]
    assert shapes == [(64, 4, 2), (128, 4, 2), (256, 4, 2), (512, 4, 1), (1, 4, 1)]
    assert judge(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)  # pix2pix's grid
    assert losses.PatchDiscriminator(8, 2)(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 4, 4)
