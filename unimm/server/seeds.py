"""Seeds of the answers or drawings of one request: whole numbers that follow one another, each good for one alone."""

from __future__ import annotations

import secrets

SEEDS = 2**64
RANDOM_SEEDS = 2**31  # those that are given out are short, and exact in every language


def consecutive_seeds(seed: int | None, count: int) -> list[int]:
    """Return a seed for each of several drawings: the seed that was asked for and those after it, or random ones."""
    first = secrets.randbelow(RANDOM_SEEDS) if seed is None else seed
    return [(first + number) % SEEDS for number in range(count)]
