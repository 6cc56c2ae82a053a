"""Kernels by name, from features to Gram matrices. To add one, write a function here and name it in `KERNELS`.

HSIC with the linear, the RBF and the distance kernel does not change if all samples are shifted, so these start from
`linear_grams`, which subtracts a common vector. All others get the raw features, widened to float64. The arguments of
a kernel's function are its options, under the same names in `cka`, `compare` and `CKAAccumulator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from cka_hooks.errors import OptionError
from cka_hooks.hsic import centre
from cka_hooks.options import Options
from cka_hooks.precision import accumulation_device, exactly
from cka_hooks.similarity.products.choose import linear_grams
from cka_hooks.similarity.products.reference import Grams

# Takes (m * n, P, C) features and m, returns m Gram matrices.
Kernel = Callable[[Tensor, int], Grams]
# Share of |x|^2 + |y|^2 that may be left over in float64 where x equals y.
_ROUNDING = 16 * torch.finfo(torch.float64).eps
# Share of |x|^2 + |y|^2: a squared distance that float32 rounding alone cannot have made.
_NEARLY_SAME = 1e-5
# Distances from float32 products are kept if rounding per sample is at most this share of the U-centred norm.
# Measured: errors in CKA are below it.
_ROOT_NOISE = 5e-7


# Not frozen: torch.compile of PyTorch 2.6 does not follow how a frozen one is made.
@dataclass
class OfLinear:
    """A kernel whose Gram matrices follow from linear ones of samples that are all shifted by one vector.

    Attributes:
        values: makes (..., n, n) kernel values from linear ones; None for the linear kernel.
    """

    values: Callable[[Tensor], Tensor] | None = None

    def __call__(self, features: Tensor, minibatches: int) -> Grams:
        """See `Kernel`."""
        return self.of_linear(linear_grams(features, minibatches))

    def of_linear(self, linear: Grams) -> Grams:
        """(..., m, n, n) matrices of any number of layers at once, from linear ones."""
        return linear if self.values is None else Grams(self.values(linear.values), None, *linear.traces())


def rbf(bandwidth: float | None = None, sigma: float | None = None) -> Kernel:
    """exp(-D / (2 s^2)) with s^2 = bandwidth^2 * median(D), or s = `sigma` in the features' units.

    D are the squared distances of all n * n pairs of a minibatch, zeros included. The median of an even count is the
    mean of the middle two (Kornblith et al. 2019, published demo). If the median is 0, the kernel is its limit: 1 for
    equal samples, else 0. The default bandwidth is 1.
    """
    if bandwidth is not None and sigma is not None:
        raise OptionError(
            "bandwidth= (a multiple of the median distance) and sigma= (in the features' units) exclude each other"
        )

    def values(linear: Tensor) -> Tensor:
        squares = _squared_distances(linear)
        if sigma is not None:
            return torch.exp(squares / (-2 * sigma**2))
        variance = (bandwidth or 1.0) ** 2 * _median(squares)[..., None, None]
        some = variance > 0
        wide = torch.exp(squares / (-2 * torch.where(some, variance, 1)))
        return torch.where(some, wide, (squares == 0).to(wide))

    return OfLinear(values)


def distance() -> Kernel:
    """-|x - y|: unbiased CKA is then the bias-corrected distance correlation (Székely & Rizzo 2013, 2014).

    The root doubles the number of digits that cancel in |x|^2 + |y|^2 - 2 <x, y>, so samples that are nearly equal
    need products in float64. A CPU makes these if the distances show the need, an accelerator always, because looking
    would mean waiting.
    """

    def grams(features: Tensor, minibatches: int) -> Grams:
        on_cpu = features.device.type == "cpu"
        linear = linear_grams(features, minibatches, None if on_cpu else torch.float64)
        squares = _squared_distances(linear.values)
        values = _roots(squares)
        if on_cpu and features.dtype is not torch.float64 and not _are_precise(values, squares, linear.values):
            linear = linear_grams(features, minibatches, torch.float64)
            values = _roots(_squared_distances(linear.values))
        return Grams(values, None, *linear.traces())

    return grams


def _roots(squares: Tensor) -> Tensor:
    same = squares == 0
    # The root has no gradient at 0.
    return torch.where(same, 0, -torch.where(same, 1, squares).sqrt())


def _are_precise(values: Tensor, squares: Tensor, linear: Tensor) -> bool:
    """Whether rounding in float32 Gram matrices stays small in the roots of the squared distances made from them.

    An error of eps (|x|^2 + |y|^2) in D is an error of eps (|x|^2 + |y|^2) / (2 sqrt(D)) in the root. Its sign is
    random, so it averages out over pairs of samples unless it is as large as D.
    """
    both = _norms(linear)
    apart = squares + both.diagonal(dim1=-2, dim2=-1).diag_embed()
    if bool((apart < _NEARLY_SAME * both).any()):
        return False
    noise = torch.where(both > 0, both.square() / apart, 0).sum((-2, -1)) * (torch.finfo(torch.float32).eps / 2) ** 2
    spread = centre(values).square().sum((-2, -1))
    return bool((noise <= (_ROOT_NOISE * values.shape[-1]) ** 2 * spread).all())


def _norms(linear: Tensor) -> Tensor:
    """|x|^2 + |y|^2 for all pairs of samples."""
    norms = linear.diagonal(dim1=-2, dim2=-1)
    return norms.unsqueeze(-1) + norms.unsqueeze(-2)


def _squared_distances(linear: Tensor) -> Tensor:
    """(m, n, n) squared distances from linear Gram matrices; 0 where float64 rounding could have made the value."""
    both = _norms(linear)
    squares = both - 2 * linear
    return torch.where(squares <= _ROUNDING * both, 0, squares)


def _median(distances: Tensor) -> Tensor:
    """(...) medians of symmetric (..., n, n) with zero diagonal, from the n (n - 1) / 2 values below the diagonal."""
    n = distances.shape[-1]
    rows, columns = torch.tril_indices(n, n, -1, device=distances.device)
    below = distances.flatten(-2)[..., rows * n + columns]

    def ranked(rank: int) -> Tensor:
        # In sorted order, the n zeros of the diagonal come first, then every other value twice.
        if rank <= n:
            return below.new_zeros(below.shape[:-1])
        place = (rank - n + 1) // 2
        # A GPU has no `kthvalue` where PyTorch has to be deterministic.
        is_exact = torch.are_deterministic_algorithms_enabled()
        return below.sort(-1).values[..., place - 1] if is_exact else below.kthvalue(place, dim=-1).values

    return (ranked((n * n + 1) // 2) + ranked(n * n // 2 + 1)) / 2


def on_raw_features(function: Callable[[Tensor], Tensor]) -> Kernel:
    """A kernel from a function (n, d) -> (n, n) of the raw features in float64."""

    def grams(features: Tensor, minibatches: int) -> Grams:
        device = accumulation_device(features.device)
        rows = features.flatten(1).to(device, torch.float64).unflatten(0, (minibatches, -1))
        values = torch.stack([_checked(exactly(device, function, group), group) for group in rows])
        centred = rows - rows.mean(1, keepdim=True)
        spread, size = centred.square().sum((1, 2)), rows.square().sum((1, 2))
        return Grams(values.to(device, torch.float64), None, spread, size)

    return grams


def _checked(values: Any, group: Tensor) -> Tensor:
    n = len(group)
    if not isinstance(values, Tensor) or values.shape != (n, n):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise OptionError(
            f"the kernel turned features of shape {tuple(group.shape)} into {found}: "
            f"it must return a tensor of shape ({n}, {n})"
        )
    return values


def cosine() -> Kernel:
    """<x, y> / (|x| |y|), or 0 if a sample is 0."""

    def values(x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        unit = x / torch.where(norms > 0, norms, 1)
        return unit @ unit.mT

    return on_raw_features(values)


def polynomial(degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> Kernel:
    """(gamma <x, y> + coef0)^degree, gamma = 1 / d unless given (scikit-learn's convention)."""
    return on_raw_features(lambda x: ((1 / x.shape[1] if gamma is None else gamma) * (x @ x.mT) + coef0) ** degree)


def linear() -> Kernel:
    """<x, y>."""
    return OfLinear()


KERNELS: dict[str, Callable[..., Kernel]] = {
    function.__name__: function for function in (linear, rbf, distance, cosine, polynomial)
}


def as_kernel(options: Options) -> Kernel:
    """The kernel that is named in the options, or made of a callable (n, d) -> (n, n), with its own options.

    Raises:
        OptionError: the name is unknown, or an option is not in the signature of the kernel's function.
    """
    kernel = options.kernel
    given = {name: value for name in ("bandwidth", "sigma") if (value := getattr(options, name)) is not None}
    if not callable(kernel) and not (isinstance(kernel, str) and kernel in KERNELS):
        raise OptionError(
            f"kernel={kernel!r} is unknown: use one of {', '.join(map(repr, KERNELS))}, "
            "or a callable (n, d) -> (n, n)"
        )
    for name, value in given.items():
        owners = [known for known, make in KERNELS.items() if name in signature(make).parameters]
        if kernel not in owners:
            raise OptionError(
                f"{name}={value!r} belongs to {' and '.join(f'kernel={owner!r}' for owner in owners)}, "
                f"and kernel is {kernel!r}"
            )
    return on_raw_features(kernel) if callable(kernel) else KERNELS[kernel](**given)
