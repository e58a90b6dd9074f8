"""How many of how many were right, and how sure one may be of the share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Score:
    """`right` of `count` samples."""

    right: int
    count: int

    @classmethod
    def of(cls, verdicts: Iterable[bool]) -> Score:
        """Count verdicts."""
        listed = list(verdicts)
        return cls(sum(listed), len(listed))

    @property
    def rate(self) -> float:
        """The share that was right; 0 of nothing."""
        return self.right / self.count if self.count else 0.0

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the rate (Wilson 1927), which stays within [0, 1] at the ends too."""
        if not self.count:
            return 0.0, 1.0
        n, share = self.count, self.rate
        centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def document(self) -> dict[str, Any]:
        """As plain numbers, for JSON."""
        low, high = self.interval()
        return {
            "rate": round(self.rate, 4),
            "right": self.right,
            "count": self.count,
            "low": round(low, 4),
            "high": round(high, 4),
        }
