"""CKA as a loss: the same numbers as `cka`, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cka_hooks.arrays import Features, as_features
from cka_hooks.features import memory_order
from cka_hooks.hsic import CENTRING_NOISE, Estimator, centre, features_differ, resolution
from cka_hooks.options import Options
from cka_hooks.precision import accumulation_device
from cka_hooks.similarity.kernels import Kernel, as_kernel
from cka_hooks.similarity.tensors import check_counts


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
    options = Options(kernel=kernel, bandwidth=bandwidth, sigma=sigma, estimator=estimator)
    gram = as_kernel(kernel, bandwidth=options.bandwidth, sigma=options.sigma)
    sides = as_features(x, "x"), as_features(y, "y")
    check_counts(sides)
    (mine, defined), (theirs, also) = (_unit(side, gram, estimator) for side in sides)
    value = 1 - (mine * theirs.to(mine.device)).sum() * (defined & also.to(defined.device))
    dtypes = [side.dtype for side in sides]
    return value.to(sides[0].device, torch.float64 if torch.float64 in dtypes else torch.float32)


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
