"""Gram matrices as every backend hands them over."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grams(NamedTuple):
    """Gram matrices of m minibatches of n samples, and what tells whether their samples differ.

    Attributes:
        values: (m, n, n) kernel values, float64; linear ones up to a shift of all samples by one vector.
        shift: (m,) norm of the vector that was taken off all samples, if `values` are linear, else None.
        spread: (m,) of other kernels: trace of the centred linear Gram matrix, see `traces`.
        size: (m,) of other kernels: trace of the linear Gram matrix.
    """

    values: Tensor
    shift: Tensor | None = None
    spread: Tensor | None = None
    size: Tensor | None = None

    def of_layer(self, number: int) -> Grams:
        """Those of one layer, where several are stacked in a dimension in front."""
        return Grams(*(None if stacked is None else stacked[number] for stacked in self))  # type: ignore[arg-type]

    def traces(self) -> tuple[Tensor, Tensor]:
        """(m,) traces of the centred linear Gram matrix and of the linear Gram matrix.

        The first is the sum of squared distances from the mean sample, the second of squared norms of the samples.
        Where a common vector was taken off, it is of the samples shifted plus of the vector: as good to tell whether
        samples differ at all. With another dimension in front, of so many layers at once: on an accelerator that
        saves a handful of launches a layer.
        """
        if self.shift is None:
            assert self.spread is not None
            assert self.size is not None
            return self.spread, self.size
        n = self.values.shape[-1]
        trace = self.values.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace - self.values.sum((-2, -1)) / n, trace + n * self.shift.square()
