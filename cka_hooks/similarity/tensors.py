"""CKA of tensors in hand, and as a loss: all samples at once, without a model or a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cka_hooks.arrays import Features, as_features
from cka_hooks.errors import NonFiniteError, OptionError, SampleCountError, TooFewSamplesError
from cka_hooks.features import memory_order
from cka_hooks.hsic import CENTRING_NOISE, MIN_SAMPLES, Estimator, centre, features_differ, pack, resolution
from cka_hooks.options import Options, whole
from cka_hooks.precision import accumulation_device, without_gradients
from cka_hooks.similarity.kernels import Kernel, as_kernel

# If less than this share of a squared trace is left of a layer's own HSIC, the formula in feature space has
# cancelled, as with outlying samples. With up to this many samples, the n x n matrix, which does not cancel, is used
# instead.
_CANCELLED = 1e-9
_GRAM_IS_CHEAP = 8192


def cka(
    x: Features,
    y: Features,
    *,
    kernel: str | Callable[[Tensor], Tensor] = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: Estimator = "unbiased",
    subset: int | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Centered kernel alignment of two sets of features of the same samples (Kornblith et al. 2019).

    Args:
        x: (n, ...) features of n samples, a tensor or an array. Dimensions after the first are flattened.
        y: (n, ...) features of the same samples in the same order, any number of them.
        kernel: as in :func:`cka_matrix`, like all options here.

    Returns:
        HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)); NaN if the samples of x or of y do not differ.

    Raises:
        SampleCountError, TooFewSamplesError, NonFiniteError, OptionError: see :func:`cka_matrix`.

    Example:
        >>> import torch, cka_hooks
        >>> x = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
        >>> round(cka_hooks.cka(x, 3 * x.flip(1) + 1), 6)
        1.0
    """
    options = locals()
    return float(cka_matrix([options.pop("x")], [options.pop("y")], **options))


def cka_matrix(
    xs: Iterable[Features],
    ys: Iterable[Features] | None = None,
    *,
    kernel: str | Callable[[Tensor], Tensor] = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: Estimator = "unbiased",
    subset: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CKA of every pair of several sets of features of the same samples.

    If there are fewer features than samples, the linear kernel works in feature space and makes no n x n matrix.

    Args:
        xs: tensors or arrays (n, ...), floating point, the same n samples in each.
        ys: the tensors for the columns; None pairs `xs` with themselves.
        kernel: a name in `cka_hooks.similarity.kernels.KERNELS` ("linear", "rbf", "distance", ...), or a callable
            (n, d) -> (n, n) on raw float64 features.
        bandwidth: for "rbf", a multiple of the root of the median squared distance; default 1.
        sigma: for "rbf", a width in the features' units, instead of `bandwidth`.
        estimator: "unbiased" (Song et al. 2012) or "biased" (Gretton et al. 2005).
        subset: use only this many samples, drawn without replacement, the same for every tensor.
        generator: the generator to draw them with; None for torch's global one on the CPU.

    Returns:
        (len(xs), len(ys)) float64 on the CPU; NaN if the samples of a tensor do not differ.

    Raises:
        SampleCountError: tensors have different numbers of samples.
        TooFewSamplesError: there are fewer than 4 samples.
        NonFiniteError: a tensor has NaN or infinity; the error names its position.
        OptionError: an option has an invalid value.

    Example:
        >>> import torch, cka_hooks
        >>> x = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
        >>> cka_hooks.cka_matrix([x, x[:, :5]], [x]).shape
        torch.Size([2, 1])
    """
    gram = as_kernel(Options(kernel=kernel, bandwidth=bandwidth, sigma=sigma, estimator=estimator))
    rows = _several(xs, "xs")
    columns = [] if ys is None else _several(ys, "ys")
    tensors = [as_features(value, f"tensor {i}") for i, value in enumerate([*rows, *columns])]
    _check_counts(tensors)
    for i, tensor in enumerate(tensors):
        # PyTorch computes almost nothing in one-byte floats.
        if not bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all()):
            raise NonFiniteError(f"tensor {i} has NaN or infinity in it", {str(i): 0}, None)
    subset = whole("subset", subset, MIN_SAMPLES, len(tensors[0]))
    with without_gradients():
        if subset is not None:
            where = "cpu" if generator is None else generator.device
            chosen = torch.randperm(len(tensors[0]), generator=generator, device=where)[:subset]
            tensors = [tensor[chosen.to(tensor.device)] for tensor in tensors]
        sides = [_Side(tensor.detach(), gram, estimator, kernel == "linear") for tensor in tensors]
        others = sides if ys is None else sides[len(rows) :]
        out = torch.empty(len(rows), len(others), dtype=torch.float64, device="cpu")
        for i, row in enumerate(sides[: len(rows)]):
            for j, column in enumerate(others):
                # Compared with itself, it is symmetric.
                out[i, j] = out[j, i] if others is sides and j < i else row.cka(column)
    return out


def cka_loss(
    x: Features,
    y: Features,
    *,
    kernel: str | Callable[[Tensor], Tensor] = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: Estimator = "unbiased",
) -> Tensor:
    """1 - CKA of two sets of features of the same samples, to be minimised; differentiable in both.

    The value is 1 - :func:`cka_hooks.cka`. Everything is computed in float64, also inside autocast, and nothing waits
    for the device. With the unbiased estimator, unrelated features are at 1 on average, whatever their widths and
    however few the samples. Single values scatter around 1 and may be above it.

    CKA is undefined if the samples of one side do not differ, or if its estimate of HSIC(x, x) is not above 0. (That
    estimate is a sum of squares, never below 0. It is 0, for example, if one sample differs and all others are
    equal.) The loss is then 1, and its gradients are 0 on both sides. Features with NaN or infinity make it NaN.

    Args:
        x: (n, ...) features of n samples, 4 or more. Dimensions after the first are flattened.
        y: (n, ...) features of the same samples in the same order, any number of them. Detach those of a teacher.
        kernel: as in :func:`cka_hooks.cka_matrix`, like all options here. A callable has to be differentiable.

    Returns:
        A scalar on the device of `x`: float64 if one side is, else float32.

    Raises:
        SampleCountError: x and y have different numbers of samples.
        TooFewSamplesError: there are fewer than 4 samples, as in the last batch of a loader without ``drop_last``.
        OptionError: an option has an invalid value, or features are not floating-point numbers.

    Example:
        >>> import torch, cka_hooks
        >>> generator = torch.Generator().manual_seed(0)
        >>> teacher, student = torch.randn(2, 32, 10, generator=generator)
        >>> loss = cka_hooks.cka_loss(student.requires_grad_(), teacher)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([32, 10])
    """
    gram = as_kernel(Options(kernel=kernel, bandwidth=bandwidth, sigma=sigma, estimator=estimator))
    sides = as_features(x, "x"), as_features(y, "y")
    _check_counts(sides)
    (mine, defined), (theirs, also) = (_unit(side, gram, estimator) for side in sides)
    value = 1 - (mine * theirs.to(mine.device)).sum() * (defined & also.to(defined.device))
    dtypes = [side.dtype for side in sides]
    return value.to(sides[0].device, torch.float64 if torch.float64 in dtypes else torch.float32)


def _several(xs: Any, name: str) -> list[Any]:
    """The entries of a list. Iterating a tensor would give its samples, and iterating a mapping its keys."""
    if isinstance(xs, Mapping):
        raise OptionError(f"{name} is a mapping: cka_matrix takes a list of tensors, such as list({name}.values())")
    if hasattr(xs, "shape") or isinstance(xs, str) or not isinstance(xs, Iterable):
        found = f"{type(xs).__name__} {tuple(xs.shape)}" if hasattr(xs, "shape") else type(xs).__name__
        raise OptionError(
            f"{name} is one {found}, and cka_matrix takes lists of tensors: write cka_hooks.cka(x, y) for the CKA of "
            "two tensors, cka_matrix([x], [y]) for it as a matrix, cka_matrix(list(xs)) for a stack of tensors"
        )
    return list(xs)


def _check_counts(tensors: Sequence[Tensor]) -> None:
    """Raise :class:`SampleCountError` or :class:`TooFewSamplesError` unless all have the same samples, 4 or more."""
    counts = [len(tensor) for tensor in tensors]
    if len(set(counts)) > 1:
        raise SampleCountError(
            f"the tensors have {counts} samples in dimension 0: CKA compares the same samples in the same order"
        )
    if not counts or counts[0] < MIN_SAMPLES:
        raise TooFewSamplesError(
            f"CKA needs at least {MIN_SAMPLES} samples in dimension 0, found {counts[0] if counts else 'no tensor'}"
        )


class _Side:
    """One tensor: in feature space if it is narrow and the kernel linear, else as a centred Gram matrix."""

    def __init__(self, tensor: Tensor, kernel: Kernel, estimator: Estimator, is_linear: bool) -> None:
        self._rows = memory_order(tensor)
        self._kernel = kernel
        self._estimator = estimator
        self.features: Tensor | None = None
        if is_linear and self._rows[0].numel() < len(self._rows):
            wide = self._rows.flatten(1).to(accumulation_device(tensor.device), torch.float64)
            self.features = wide - wide.mean(0)
            # Once more: the rounding of a large mean is a common vector, too.
            self.features -= self.features.mean(0)
            spread, size = float(self.features.square().sum()), float(wide.square().sum())
            self.own = _feature_space_hsic(self.features, self.features, estimator)
            rounding = _CANCELLED * spread**2
            if self.own * len(wide) <= rounding and len(wide) <= _GRAM_IS_CHEAP:
                self.features = None
        if self.features is None:
            packed, spread, size, rounding = self.gram
            self.own = float(packed.square().sum())
        differ = spread > resolution(tensor.dtype) * size or bool(features_differ(self._rows, tensor.dtype))
        self.degenerate = not (differ and self.own * len(self._rows) > rounding)

    @cached_property
    def gram(self) -> tuple[Tensor, float, float, float]:
        """The packed matrix, its `Grams.traces`, and the part of its squared norm that rounding may have made."""
        grams = self._kernel(self._rows, 1)
        packed = pack(centre(grams.values[0], self._estimator), self._estimator)
        spread, size = grams.traces()
        return packed, float(spread), float(size), CENTRING_NOISE * float(grams.values.square().sum())

    def cka(self, other: _Side) -> float:
        if self.degenerate or other.degenerate:
            return float("nan")
        if self is other:
            return 1.0
        if self.features is not None and other.features is not None:
            hsic = _feature_space_hsic(self.features, other.features.to(self.features.device), self._estimator)
        else:
            hsic = float(self.gram[0] @ other.gram[0].to(self.gram[0].device))
        return float(hsic / (self.own * other.own) ** 0.5)


def _feature_space_hsic(x: Tensor, y: Tensor, estimator: Estimator) -> float:
    """w_n * HSIC of centred (n, d) features without an n x n matrix, w_n as in :func:`cka_hooks.hsic.pack`.

    <K, L> = |X'Y|^2 (Kornblith et al. 2019, eq. 3). With zero diagonals, since K1 = 0 before they are zeroed:
    tr(KL) = |X'Y|^2 - k'l, K1 = -k, with k and l the squared norms of the samples (Song et al. 2012, eq. 5).
    """
    n = len(x)
    inner = float((x.mT @ y).square().sum())
    if estimator == "biased":
        return inner / (n - 1)
    k, el = x.square().sum(1), y.square().sum(1)
    both = float(k @ el)
    return (inner - both + float(k.sum() * el.sum()) / ((n - 1) * (n - 2)) - 2 / (n - 2) * both) / n


def _unit(features: Tensor, kernel: Kernel, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """The centred Gram matrix (n, n) divided by its norm, and whether that is defined."""
    rows = memory_order(features)
    grams = kernel(rows.to(accumulation_device(rows.device), torch.float64), 1)
    centred = centre(grams.values[0], estimator)
    square, (spread, size) = centred.square().sum(), grams.traces()
    noise = CENTRING_NOISE * grams.values.square().sum()
    differ = (spread[0] > resolution(features.dtype) * size[0]) | features_differ(rows, features.dtype)
    defined = (square > noise) & differ
    return centred * torch.where(defined, square, 1).rsqrt(), defined
