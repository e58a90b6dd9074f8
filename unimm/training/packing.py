"""Which samples share a row: best-fit decreasing, within a budget of tokens and of images."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(
    lengths: Sequence[int], images: Sequence[int], length: int, max_images: int | None = None
) -> list[list[int]]:
    """Share out samples over rows.

    The sample that takes the largest share of either budget comes first, and each goes to the row with the least
    room for tokens that it fits; with sizes that vary as captions and conversations do, few rows more than the
    fewest possible are needed (Johnson 1973).

    Args:
        lengths: tokens of each sample, none above `length`.
        images: images of each sample, none above `max_images`.
        length: tokens that a row holds.
        max_images: images that a row holds; None: any number.

    Returns:
        The indices of each row's samples, in their given order; rows in the order of their first.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    shown: list[int] = []

    def share(index: int) -> float:
        return max(lengths[index] / length, images[index] / max_images if max_images else 0.0)

    for index in sorted(range(len(lengths)), key=lambda i: (-share(i), i)):  # the largest first
        fitting = [
            row
            for row in range(len(rows))
            if room[row] >= lengths[index]
            and (max_images is None or shown[row] + images[index] <= max_images)
        ]
        if fitting:  # the fullest, which leaves the others their room
            chosen = min(fitting, key=lambda row: room[row])
        else:
            chosen = len(rows)
            rows.append([])
            room.append(length)
            shown.append(0)
        rows[chosen].append(index)
        room[chosen] -= lengths[index]
        shown[chosen] += images[index]
    return sorted(sorted(row) for row in rows)
