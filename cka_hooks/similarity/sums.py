"""The additive state of a minibatch CKA run: what minibatches add to, and what adds up across processes.

CKA_ij = S_ij / sqrt(S_ii S_jj) with S_ij = sum_b h_ij,b and h_ij,b = w_b HSIC(K_i,b, K_j,b) is a ratio of
sums over minibatches. Its standard error follows from the spread of the linearised terms
e_ij,b = u_ij,b - CKA_ij / 2 (u_ii,b + u_jj,b), u_ij,b = h_ij,b / sqrt(S_ii S_jj), (delta method; Cochran 1977,
Sampling Techniques, ch. 6), and needs only the second moments kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cka_hooks.errors import OptionError

# `bad` of a layer that was finite in every minibatch.
NEVER = torch.iinfo(torch.int64).max


@dataclass
class Sums:
    """Sums over minibatches b for L layers, float64, on the device of the activations.

    Attributes:
        moments: (4, L, L): sums of h_ij, of h_ij^2, of h_ij h_ii and of h_ii h_jj.
        spread: (L,) sum of the traces of the centred linear Gram matrices.
        size: (L,) sum of the traces of the linear Gram matrices.
        bad: (L,) int64, number of the first minibatch in which the layer was not finite, or NEVER.
        peak: (L,) the largest part of S_ii that one sample has.
        peak_sample: (L,) int64, the position of that sample in the run.
    """

    moments: Tensor
    spread: Tensor
    size: Tensor
    bad: Tensor
    peak: Tensor
    peak_sample: Tensor

    @classmethod
    def zeros(cls, layers: int, device: torch.device) -> Sums:
        """The sums of no minibatch."""

        def vector() -> Tensor:
            return torch.zeros(layers, dtype=torch.float64, device=device)

        return cls(
            moments=torch.zeros(4, layers, layers, dtype=torch.float64, device=device),
            spread=vector(),
            size=vector(),
            bad=torch.full((layers,), NEVER, dtype=torch.int64, device=device),
            peak=vector(),
            peak_sample=torch.zeros(layers, dtype=torch.int64, device=device),
        )

    def check(self, layers: int) -> None:
        """Raise :class:`OptionError` unless these are the sums of so many layers."""
        blank = Sums.zeros(layers, torch.device("cpu"))
        for field in fields(self):
            tensor, like = getattr(self, field.name), getattr(blank, field.name)
            if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise OptionError(f"the sums {field.name!r} are not {tuple(like.shape)} {like.dtype}")

    def add_pairs(self, hsic: Tensor) -> None:
        """Add the (m, L, L) weighted HSICs of m minibatches."""
        own = hsic.diagonal(dim1=-2, dim2=-1)
        self.moments[0] += hsic.sum(0)
        self.moments[1] += hsic.square().sum(0)
        self.moments[2] += (hsic * own.unsqueeze(-1)).sum(0)
        self.moments[3] += own.mT @ own

    def add_layers(
        self,
        rows: slice,
        spread: Tensor,
        size: Tensor,
        finite: Tensor,
        parts: Tensor,
        minibatch: int,
        sample: int,
    ) -> None:
        """Add what concerns single layers, for the layers in `rows`.

        Args:
            rows: which layers, l of them.
            spread: (l, m) traces of the centred Gram matrices of m minibatches.
            size: (l, m) traces of the Gram matrices.
            finite: (l, m) bool, whether the layer was finite.
            parts: (l, m, n) parts of the layer's own HSIC that each sample has.
            minibatch: number of the first of these minibatches.
            sample: position of the first of these samples.
        """
        self.spread[rows] += torch.where(finite, spread, 0).sum(1)
        self.size[rows] += torch.where(finite, size, 0).sum(1)
        numbers = torch.arange(minibatch, minibatch + finite.shape[1], device=finite.device)
        first = torch.where(finite, NEVER, numbers).amin(1)
        self.bad[rows] = torch.minimum(self.bad[rows], first)
        self._raise_peak(rows, *parts.flatten(1).max(1), sample)

    def _raise_peak(self, rows: slice, part: Tensor, position: Tensor, offset: int) -> None:
        higher = part > self.peak[rows]
        self.peak_sample[rows] = torch.where(higher, position + offset, self.peak_sample[rows])
        self.peak[rows] = torch.where(higher, part, self.peak[rows])

    def add(self, other: Sums, minibatches: int, samples: int) -> None:
        """Add sums whose minibatches come after the `minibatches` and `samples` in these."""
        self.moments += other.moments
        self.spread += other.spread
        self.size += other.size
        later = torch.where(other.bad == NEVER, NEVER, other.bad + minibatches)
        self.bad = torch.minimum(self.bad, later)
        self._raise_peak(slice(None), other.peak, other.peak_sample, samples)

    def at(self, positions: Sequence[int], layers: int) -> Sums:
        """The same sums with layer i moved to `positions[i]` among `layers`, zeros elsewhere."""
        index = torch.tensor(positions, dtype=torch.int64, device=self.moments.device)
        moved = Sums.zeros(layers, self.moments.device)
        moved.moments[:, index[:, None], index] = self.moments
        for field in fields(self):
            if field.name != "moments":
                getattr(moved, field.name)[index] = getattr(self, field.name)
        return moved

    def to(self, device: torch.device | str) -> Sums:
        """A copy on another device (the same tensors where they are there already)."""
        return Sums(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def cka(self) -> Tensor:
        """(L, L) S_ij / sqrt(S_ii S_jj), NaN for a layer whose S_ii is not positive, 1 on the diagonal."""
        root = self._roots()
        cka = self.moments[0] / (root.unsqueeze(1) * root)
        return cka.diagonal_scatter(torch.where(root.isnan(), root, 1.0))

    def stderr(self, minibatches: int, minibatches_per_pass: int) -> Tensor:
        """(L, L) standard errors of `cka`: sqrt(B / (B - 1) sum_b e_ij,b^2), NaN below 3 minibatches.

        Further passes over the same samples are not independent of the first: the variance between
        minibatches is divided by the number in one pass, B1. The errors e of each pass sum to nearly the
        same, so that what varies is B1 - 1 of them a pass: sqrt(B / (B1 - 1) sum_b e_ij,b^2).
        """
        root = self._roots()
        if minibatches_per_pass < 3:
            return torch.full_like(self.moments[0], torch.nan)
        scale = root.unsqueeze(1) * root
        cka = self.moments[0] / scale
        # Divided one root at a time: products of four of them leave the range of float64 too early.
        squares = self.moments[1] / scale / scale
        cross = self.moments[2] / scale / root.square().unsqueeze(1)
        own = self.moments[3] / root.square().unsqueeze(1) / root.square()
        own_squares = own.diagonal()
        total = squares - cka * (cross + cross.mT)
        total += cka.square() / 4 * (own_squares.unsqueeze(1) + own_squares + 2 * own)
        factor = minibatches / (minibatches_per_pass - 1)
        # Symmetric but for the order of roundings: made so to the bit.
        stderr = ((total + total.mT).clamp_min(0) / 2 * factor).sqrt()
        return stderr.diagonal_scatter(torch.where(root.isnan(), root, 0.0))

    def influence(self, passes: float = 1.0) -> Tensor:
        """(L,) the largest share that one sample has in a layer's own HSIC, of which each pass adds one part."""
        return (self.peak * passes / self._roots().square()).clamp_max(1.0)

    def _roots(self) -> Tensor:
        own = self.moments[0].diagonal()
        return torch.where(own > 0, own, torch.nan).sqrt()
