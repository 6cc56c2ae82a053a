"""Compute what the errors of a result imply: confidence intervals, differences of two entries, adjusted p-values.

This file works on tensors only. ``result`` knows the labels, and which entries are meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from cka_hooks.errors import OptionError
from cka_hooks.null import null_tail


@dataclass(frozen=True)
class Difference:
    """The difference between two CKA values of one run, with a standard error that accounts for their correlation.

    Attributes:
        value: first CKA value minus the second.
        stderr: standard error of ``value``; NaN with fewer than 3 minibatches.
        degrees_of_freedom: degrees of freedom of the Student t distribution that :meth:`interval` uses.
    """

    value: float
    stderr: float
    degrees_of_freedom: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference: ``(low, high)``, NaN if the standard error is.

        Raises:
            OptionError: ``level`` is not between 0 and 1.

        Example:
            >>> low, high = Difference(0.25, 0.05, degrees_of_freedom=19).interval(0.95)
            >>> f"{low:.3f} {high:.3f}"
            '0.145 0.355'
        """
        half = t_quantile(level, self.degrees_of_freedom) * self.stderr
        return self.value - half, self.value + half


def t_quantile(level: float, degrees_of_freedom: int) -> float:
    """Half the width, in standard errors, of an interval that holds the true value with probability ``level``."""
    if not (isinstance(level, (int, float)) and 0 < level < 1):
        raise OptionError(f"level is {level!r}: expected a number between 0 and 1, such as 0.95")
    return float(stdtrit(degrees_of_freedom, (1 + level) / 2))


def paired_difference(
    hsic: Tensor, first: tuple[int, int], second: tuple[int, int], degrees_of_freedom: int
) -> Difference:
    """CKA of the pair ``first`` minus CKA of the pair ``second``, from the HSIC of every minibatch.

    Args:
        hsic: (B, L, L) weighted HSIC of each minibatch and pair, float64.
        first: positions of two layers.
        second: positions of two layers.
        degrees_of_freedom: minibatches of one pass minus 1.
    """
    value, errors = _linearised(hsic, *first)
    other, other_errors = _linearised(hsic, *second)
    # Passes over the same samples are not independent: only the minibatches of one pass count.
    variance = len(errors) / max(degrees_of_freedom, 1) * float((errors - other_errors).square().sum())
    stderr = math.sqrt(variance) if degrees_of_freedom >= 2 else math.nan
    return Difference(value - other, stderr, degrees_of_freedom)


def _linearised(hsic: Tensor, i: int, j: int) -> tuple[float, Tensor]:
    """CKA of a pair, and each minibatch's contribution to its error to first order: float, (B,)."""
    own = hsic[:, [i, j], [i, j]]
    total = own.sum(0)
    total = total.masked_fill(~(total > 0), math.nan)
    cross = hsic[:, i, j] / total.sqrt().prod()
    theta = cross.sum()
    return float(theta), cross - theta / 2 * (own / total).sum(1)


def adjusted(
    alone: Tensor, rows: Sequence[str], columns: Sequence[str], permuted: Tensor | None, null: Sequence[Tensor]
) -> Tensor:
    """Adjust p-values for the number of pairs.

    With permutations, count how often the smallest p-value of a permutation is as small, among all pairs except those
    with smaller p-values of their own (Westfall & Young 1993, step-down minP). Without, multiply the smallest p-value
    of m pairs by m, the next one by m - 1, and so on (Holm 1979).

    Args:
        alone: (R, C) p-values of the single entries, NaN where there is none.
        rows: R labels.
        columns: C labels. A pair that occurs twice counts once, and a layer with itself does not count.
        permuted: (B, R, C) values in B permutations.
        null: (R, C) variance and skewness of such values.

    Returns:
        (R, C) adjusted p-values. Entries of a layer with itself are unchanged.

    Example:
        >>> alone = torch.tensor([[0.01, 0.04, 0.3]], dtype=torch.float64)
        >>> [round(p, 3) for p in adjusted(alone, "a", "bcd", None, ())[0].tolist()]
        [0.03, 0.08, 0.3]
    """
    entries: dict[frozenset[str], list[tuple[int, int]]] = {}
    for at, other in alone.isfinite().nonzero().tolist():
        if rows[at] != columns[other]:
            entries.setdefault(frozenset((rows[at], columns[other])), []).append((at, other))
    if not entries:
        return alone
    pairs = sorted(entries.values(), key=lambda places: float(alone[places[0]]))
    i, j = torch.tensor([places[0] for places in pairs], device="cpu").unbind(1)
    ordered = alone[i, j]
    if permuted is None:
        each = ordered * torch.arange(len(pairs), 0, -1, device="cpu")
    else:
        p = null_tail(*(it[..., i, j] for it in (permuted, *null)))
        smallest = p.flip(1).cummin(1).values.flip(1)
        each = (1 + (smallest <= ordered).sum(0)) / (1 + len(smallest))
    found = alone.clone()
    for places, value in zip(pairs, each.clamp_max(1).cummax(0).values.tolist(), strict=True):
        for place in places:
            found[place] = value
    return found
