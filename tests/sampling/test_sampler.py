"""Guidance, filters, choices and noise, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unimm.errors import UserError
from unimm.sampling.sampler import (
    Filters,
    NoiseKey,
    guide,
    gumbel,
    logits_error,
    noise_keys,
    probabilities,
    sample,
)

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


def test_guidance_moves_away_from_the_unconditional_row() -> None:
    conditional, unconditional = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    torch.testing.assert_close(guide(conditional, unconditional, 5.0), torch.tensor([[3.0, -2.0]]))
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)


def test_temperature_divides_logits() -> None:
    weights = probabilities(torch.tensor([[0.0, math.log(4.0)]]), temperature=2.0, top_k=None, top_p=None)
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 2 / 3]]))


def test_top_k_keeps_the_likeliest() -> None:
    weights = probabilities(LOGITS, 1.0, top_k=2, top_p=None)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))


def test_top_p_keeps_codes_until_the_mass_is_reached() -> None:
    weights = probabilities(LOGITS, 1.0, top_k=None, top_p=0.65)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    first_only = probabilities(LOGITS, 1.0, top_k=None, top_p=0.01)
    torch.testing.assert_close(first_only, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_top_p_is_a_share_of_what_top_k_keeps() -> None:
    weights = probabilities(LOGITS, 1.0, top_k=3, top_p=0.4)  # 4/9 of the mass is the first's
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("filters", [Filters(), Filters(2.0), Filters(1.0, top_k=3), Filters(1.0, None, 0.8)])
def test_choices_follow_the_distribution(filters: Filters) -> None:
    expected = probabilities(LOGITS, filters.temperature, filters.top_k, filters.top_p)[0]
    noise = torch.from_numpy(np.stack([gumbel(NoiseKey(3), place, 4) for place in range(20_000)]))
    chosen = sample(LOGITS.expand(20_000, 4), noise, filters).chosen
    counts = torch.bincount(chosen, minlength=4) / 20_000
    torch.testing.assert_close(counts, expected, atol=0.012, rtol=0)
    assert (counts[expected == 0] == 0).all()


def test_no_temperature_takes_the_likeliest() -> None:
    assert sample(LOGITS, None, Filters(0.0)).chosen.tolist() == [1]


def test_noise_is_that_of_its_place() -> None:
    noise = gumbel(NoiseKey(7, 2), 5, 100)
    assert np.array_equal(noise, gumbel(NoiseKey(7, 2), 5, 100))
    assert np.array_equal(noise[:10], gumbel(NoiseKey(7, 2), 5, 10))  # whatever the vocabulary
    others = [
        gumbel(NoiseKey(8, 2), 5, 100),
        gumbel(NoiseKey(7, 3), 5, 100),
        gumbel(NoiseKey(7, 2), 6, 100),
        gumbel(NoiseKey(7, 2), 5, 100, "token"),
    ]
    assert all(abs(np.corrcoef(noise, other)[0, 1]) < 0.4 and not (noise == other).any() for other in others)


def test_noise_is_gumbels() -> None:
    noise = gumbel(NoiseKey(2**64 - 1, 2**40), 10**6, 200_000)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.57722) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.03


def test_noise_stays_what_it_was() -> None:
    """The same seed draws the same image with every version: the generator's bits are fixed by its authors."""
    expected = [1.1087265, 0.1182036, -1.1229605]
    np.testing.assert_allclose(gumbel(NoiseKey(1, 2), 3, 3), expected, atol=1e-6)


def test_keys_belong_to_images() -> None:
    assert noise_keys(7, 2) == [(7, 0), (7, 1)]
    assert noise_keys([7, 9], 2) == [(7, 0), (9, 0)]
    assert noise_keys(None, 1) != noise_keys(None, 1)
    assert noise_keys(np.array([1, 2]), 2) == [(1, 0), (2, 0)]
    with pytest.raises(UserError, match=r"^seed: 1 seeds for 2 images"):
        noise_keys([1], 2)


# --- near ties ------------------------------------------------------------------------------------------------


def near(logits: list[float], filters: Filters, noise: list[float] | None = None) -> bool:
    given = torch.tensor([noise or [0.0] * len(logits)])
    return bool(sample(torch.tensor([logits]), given, filters, torch.tensor([[0.01]])).near)


def test_two_that_are_close_are_near() -> None:
    assert near([1.0, 1.019, 0.0], Filters())
    assert not near([1.0, 1.03, 0.0], Filters())
    assert near([1.0, 1.03, 0.0], Filters(), [0.02, 0.0, 0.0])  # what counts is with noise
    assert not near([1.0, 1.019, 0.0], Filters(), [0.0, 0.1, 0.0])
    assert near([1.0, 1.03, 0.0], Filters(2.0), [0.01, 0.0, 0.0])  # differences shrink, and so does the error
    assert near([1.0, 1.019, 0.0], Filters(0.0))


def test_a_filter_that_nearly_keeps_another_is_near() -> None:
    two = Filters(1.0, top_k=2)
    assert near([3.0, 1.0, 1.01], two, [0.0, 5.0, 0.0])  # the second is only just out, and would win
    assert near([3.0, 1.01, 1.0], two, [0.0, 5.0, 0.0])  # only just in, and wins
    assert not near([3.0, 1.01, 1.0], two)  # neither decides
    assert not near([3.0, 2.0, 1.0], two, [0.0, 5.0, 0.0])


def test_a_mass_that_is_nearly_reached_is_near() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).tolist()
    assert near(logits, Filters(1.0, None, 0.5001), [0.0, 9.0, 0.0])
    assert near(logits, Filters(1.0, None, 0.4999), [0.0, 9.0, 0.0])
    assert not near(logits, Filters(1.0, None, 0.6), [0.0, 9.0, 0.0])
    assert not near(logits, Filters(1.0, None, 0.5001))


def test_one_that_alone_is_kept_is_sure() -> None:
    assert not near([3.0, 1.0, 0.0], Filters(1.0, top_k=1), [0.0, 9.0, 9.0])
    assert near([3.0, 3.01, 0.0], Filters(1.0, top_k=1), [9.0, 0.0, 0.0])


def test_whatever_the_error_does_a_sure_choice_stays() -> None:
    """Random logits, random filters, and random errors within the bound: what is not near does not change."""
    rng = torch.Generator().manual_seed(0)
    sure = 0
    for round_ in range(300):
        logits = torch.randn(8, 12, generator=rng) * 3
        noise = torch.from_numpy(np.stack([gumbel(NoiseKey(round_), place, 12) for place in range(8)]))
        filters = Filters(0.7, (None, 1, 3, 6)[round_ % 4], (None, 0.3, 0.9)[round_ % 3])
        size = 10.0 ** -(1 + round_ % 4)
        choice = sample(logits, noise, filters, torch.full((8, 1), size))
        for _ in range(10):
            moved = logits + (torch.rand(8, 12, generator=rng) * 2 - 1) * size
            same = sample(moved, noise, filters).chosen == choice.chosen
            assert (same | choice.near).all()
        sure += int((~choice.near).sum())
    assert sure > 1_000


def test_the_error_grows_with_logits_and_guidance() -> None:
    one, two = torch.tensor([[8.0, -2.0]]), torch.tensor([[4.0, 1.0]])
    plain, guided = logits_error(one, None, 1.0), logits_error(one, two, 5.0)
    assert guided / plain == (5 * 8 + 4 * 4) / 8
