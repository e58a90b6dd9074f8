"""Guidance, filters and random streams, against values worked out by hand."""

from __future__ import annotations

import math

import torch

from unimm.sampling.sampler import guide, pick, probabilities, streams


def test_guidance_moves_away_from_the_unconditional_row() -> None:
    conditional, unconditional = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    torch.testing.assert_close(guide(conditional, unconditional, 5.0), torch.tensor([[3.0, -2.0]]))
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)


def test_temperature_divides_logits() -> None:
    weights = probabilities(torch.tensor([[0.0, math.log(4.0)]]), temperature=2.0, top_k=None, top_p=None)
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 2 / 3]]))


def test_top_k_keeps_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    weights = probabilities(logits, 1.0, top_k=2, top_p=None)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))


def test_top_p_keeps_codes_until_the_mass_is_reached() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    weights = probabilities(logits, 1.0, top_k=None, top_p=0.65)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    first_only = probabilities(logits, 1.0, top_k=None, top_p=0.01)
    torch.testing.assert_close(first_only, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_pick_inverts_the_distribution() -> None:
    weights = torch.tensor([0.2, 0.0, 0.5, 0.3]).repeat(5, 1)
    chosen = pick(weights, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999999]))
    assert chosen.tolist() == [0, 0, 2, 2, 3]


def test_pick_never_takes_an_impossible_code() -> None:
    weights = torch.tensor([[0.3, 0.7, 0.0]])
    assert pick(weights, torch.tensor([1.0])).item() == 1


def test_pick_follows_the_weights() -> None:
    weights = torch.tensor([0.1, 0.2, 0.7])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(pick(weights.repeat(20_000, 1), uniform), minlength=3) / 20_000
    torch.testing.assert_close(counts, weights, atol=0.015, rtol=0)


def test_streams_belong_to_images() -> None:
    four = streams(7, 4, 16)
    torch.testing.assert_close(streams(7, 2, 16), four[:2], rtol=0, atol=0)
    assert len({tuple(row.tolist()) for row in four}) == 4
    listed = streams([7, 9], 2, 16)
    torch.testing.assert_close(listed[0], four[0], rtol=0, atol=0)  # (7, 0) either way
    torch.testing.assert_close(listed[1], streams([9], 1, 16)[0], rtol=0, atol=0)
    assert not torch.equal(streams(None, 1, 16), streams(None, 1, 16))
