"""The form in which every backend returns Gram matrices."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grams(NamedTuple):
    """Gram matrices of m minibatches of n samples, and numbers that show whether the samples differ.

    Attributes:
        values: (m, n, n) kernel values, float64. Linear ones are up to a shift of all samples by one vector.
        shift: (m,) norm of the vector that was subtracted from all samples if `values` are linear, else None.
        spread: (m,) for other kernels, the trace of the centred linear Gram matrix, see `traces`.
        size: (m,) for other kernels, the trace of the linear Gram matrix.
    """

    values: Tensor
    shift: Tensor | None = None
    spread: Tensor | None = None
    size: Tensor | None = None

    def of_layers(self, which: int | slice) -> Grams:
        """The matrices of one layer or of several, if those of more are stacked in a leading dimension."""
        return Grams(*(None if stacked is None else stacked[which] for stacked in self))  # type: ignore[arg-type]

    def traces(self) -> tuple[Tensor, Tensor]:
        """(m,) traces of the centred linear Gram matrix and of the linear Gram matrix.

        The first is the sum of squared distances from the mean sample, the second the sum of squared norms of the
        samples. If a common vector was subtracted, the second is that of the shifted samples plus that of the vector,
        which shows just as well whether samples differ at all. With another leading dimension, this covers many
        layers at once, which saves a handful of launches per layer on an accelerator.
        """
        if self.shift is None:
            assert self.spread is not None
            assert self.size is not None
            return self.spread, self.size
        n = self.values.shape[-1]
        trace = self.values.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace - self.values.sum((-2, -1)) / n, trace + n * self.shift.square()
