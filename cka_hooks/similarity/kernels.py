"""Kernels: features to Gram matrices by name. To add one, write a function here and name it in `KERNELS`.

The linear and the RBF kernel do not change when all samples are shifted, so they get features less a common
vector in float32. All others get the raw features, widened to float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cka_hooks.errors import OptionError
from cka_hooks.precision import accumulation_device, exactly
from cka_hooks.similarity.products.choose import linear_grams
from cka_hooks.similarity.products.grams import Grams

# (m * n, P, C) features and m -> m Gram matrices.
Kernel = Callable[[Tensor, int], Grams]


def rbf(bandwidth: float = 1.0, sigma: float | None = None) -> Kernel:
    """exp(-D / (2 s^2)) with s^2 = bandwidth^2 * median(D), or s = `sigma` in the features' units.

    D are the squared distances of all n * n pairs of a minibatch, zeros included, and the median of an even
    count the mean of the middle two (Kornblith et al. 2019, published demo). Where the median is 0 the
    kernel is its limit: 1 for equal samples, else 0.
    """

    def grams(features: Tensor, minibatches: int) -> Grams:
        linear = linear_grams(features, minibatches)
        spread, size = linear.traces()
        norms = linear.values.diagonal(dim1=-2, dim2=-1)
        distances = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * linear.values).clamp_min_(0)
        if sigma is not None:
            return Grams(torch.exp(distances / (-2 * sigma**2)), None, spread, size)
        variance = bandwidth**2 * _median(distances)[:, None, None]
        values = torch.exp(distances / (-2 * variance))
        return Grams(torch.where(variance > 0, values, (distances == 0).to(values)), None, spread, size)

    return grams


def _median(distances: Tensor) -> Tensor:
    """(m,) medians of symmetric (m, n, n) with zero diagonal, from the n (n - 1) / 2 values below it."""
    n = distances.shape[-1]
    rows, columns = torch.tril_indices(n, n, -1, device=distances.device)
    below = distances.flatten(-2)[:, rows * n + columns]

    def ranked(rank: int) -> Tensor:
        # In order of size come the n zeros of the diagonal, then every other value twice.
        return below.kthvalue((rank - n + 1) // 2, dim=-1).values if rank > n else below.new_zeros(len(below))

    total = n * n
    return (ranked((total + 1) // 2) + ranked(total // 2 + 1)) / 2


def on_raw_features(function: Callable[[Tensor], Tensor]) -> Kernel:
    """A kernel from a function (n, d) -> (n, n), given the raw features in float64."""

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
    """<x, y> / (|x| |y|), and 0 where a sample is 0."""

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
    return linear_grams


KERNELS: dict[str, Callable[..., Kernel]] = {
    "linear": linear,
    "rbf": rbf,
    "cosine": cosine,
    "polynomial": polynomial,
}


def as_kernel(kernel: str | Callable[[Tensor], Tensor], bandwidth: float | None, sigma: float | None) -> Kernel:
    """The kernel that the options `kernel`, `bandwidth` and `sigma` name.

    Raises:
        OptionError: an unknown name, a bandwidth for a kernel that has none, or one that is not positive.
    """
    if kernel != "rbf" and (bandwidth is not None or sigma is not None):
        raise OptionError(f"bandwidth= and sigma= belong to kernel='rbf', and kernel is {kernel!r}")
    if callable(kernel):
        return on_raw_features(kernel)
    if kernel not in KERNELS:
        raise OptionError(
            f"kernel={kernel!r} is not known: use one of {', '.join(map(repr, KERNELS))}, "
            "or a callable (n, d) -> (n, n)"
        )
    if kernel != "rbf":
        return KERNELS[kernel]()
    if bandwidth is not None and sigma is not None:
        raise OptionError(
            "bandwidth= (a multiple of the median distance) and sigma= (in the features' units) exclude each other"
        )
    for name, value in (("bandwidth", bandwidth), ("sigma", sigma)):
        if value is not None and not value > 0:
            raise OptionError(f"{name}={value!r} must be above 0")
    return rbf(1.0 if bandwidth is None else bandwidth, sigma)
