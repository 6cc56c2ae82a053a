"""Colours of CKA values without matplotlib, for the page and the notebook."""

from __future__ import annotations

import math

#: matplotlib's viridis at 0, 1/8 ... 1. Straight lines in between are close enough.
VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def colour(value: float) -> str:
    """The HTML colour of a CKA value from 0 to 1, grey for NaN.

    Example:
        >>> colour(0.0), colour(0.5), colour(float("nan"))
        ('#440154', '#21908d', '#d9d9d9')
    """
    if math.isnan(value):
        return "#d9d9d9"
    place = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    below = min(int(place), len(VIRIDIS) - 2)
    mixed = (
        round(low + (high - low) * (place - below))
        for low, high in zip(VIRIDIS[below], VIRIDIS[below + 1], strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)
