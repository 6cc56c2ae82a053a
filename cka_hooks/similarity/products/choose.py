"""Choose the backend for the Gram matrices of given features, and a more careful product if rounding calls for it.

HSIC does not change if every sample is shifted by the same vector. In float32, the Gram matrix of samples that share
a large common component is that component plus rounding. So a common vector is subtracted before the product wherever
it matters, and partial products are added in float64.

To add a backend, write a file beside this one with a function like :func:`reference.shifted`, and choose it here. A
backend that makes the matrices of many layers together is chosen earlier, in ../batch.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cka_hooks.precision import accumulation_device, exactly
from cka_hooks.similarity.products import native, reference
from cka_hooks.similarity.products.reference import Grams

# Make a more careful product if rounding per sample may exceed this share of the U-centred norm (see `_is_precise`).
# Measured: errors in CKA of untrained torchvision models stay below this.
NOISE_TOLERANCE = 1e-6
# Mean squared norms below this are near the end of float32's range, where squares lose their digits.
TINY = 1e-30


def linear_grams(features: Tensor, minibatches: int = 1, dtype: torch.dtype | None = None) -> Grams:
    """Linear Gram matrices of `minibatches` equal groups of consecutive samples, right to 1e-6 in CKA.

    Args:
        features: (m * n, P, C) floating point, of any strides: the P * C features of each sample. A view of an
            activation is as good as a copy, since only the sum over all features counts.
        minibatches: m, the number of groups.
        dtype: torch.float64 for products in float64, right to its own rounding; None for the cheapest that are right.
    """
    if features.dtype.itemsize == 1:
        # PyTorch computes nothing in one-byte floats, and float16 holds all of their values.
        features = features.half()
    n, width = features.shape[0] // minibatches, features.shape[1:].numel()
    grouped = features.view(minibatches, n, *features.shape[1:])
    if features.requires_grad and torch.is_grad_enabled():
        return reference.differentiable(grouped)
    if dtype is not None:
        return reference.shifted(grouped.to(accumulation_device(features.device)), dtype)
    if not _can_branch(features):
        return exactly(features.device, reference.shifted, grouped, scaled=True)
    if native.takes(grouped) and n <= native.MAX_SAMPLES:
        values, measures = native.grams(grouped)
        grams, measured, chunk = Grams(values, measures[:, -1]), measures.tolist(), native.BLOCK
    else:
        grams = exactly(features.device, reference.shifted, grouped)
        if features.dtype is torch.float64:
            return grams
        measured, chunk = _measured(grams), reference.chunk_of(n)
    rounding = (4 * torch.finfo(features.dtype).eps) ** 2
    if all(_is_precise(of_one, n, width, chunk, rounding) for of_one in measured):
        return grams
    # The Gram matrix shows that rounding may matter.
    return reference.shifted(grouped, torch.float64)


def _can_branch(tensor: Tensor) -> bool:
    """Whether looking at a value is free. On an accelerator it would wait for the device."""
    return tensor.device.type == "cpu"


def _measured(grams: Grams) -> list[list[float]]:
    """Numbers that show how precise each of m Gram matrices K is, (n, n).

    Returns:
        For each matrix, both of `Grams.traces`, the sum of all K_ij^2, the sum of all K_ii^2, the sum over i of (the
        sum over j other than i of K_ij)^2, the sum of all K_ij, and the sum of all K_ii.
    """
    values = grams.values
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    sums = values.sum(-1)
    squares = (torch.linalg.vector_norm(it, dim=-1).square() for it in (values.flatten(1), diagonal, sums - diagonal))
    found = [*grams.traces(), *squares, sums.sum(-1), diagonal.sum(-1)]
    # One by one: under torch.func, PyTorch 2.6 reads single numbers only.
    return [[float(number) for number in numbers] for numbers in torch.stack(found, -1)]


def _is_precise(measured: list[float], n: int, width: int, chunk: int, rounding: float) -> bool:
    """Whether float32 rounding in a Gram matrix of `width` features is below what 1e-6 in CKA allows.

    `chunk` features at a time were added in float32. Rounding in a growing sum is relative to its size: to K_ij if
    products have one sign, and otherwise to a part of |x_i| |x_j| that falls with the number of chunks. What counts
    is the ratio to the norm of the U-centred matrix: a shared component, an outlying sample and overflow all show in
    it. Samples that differ by no more than a share `rounding` of their size are equal to within rounding, and have no
    signal that a better product could save. `measured` is one list of `_measured`, or of `native.grams`.
    """
    spread, size, whole, own, rows, total, trace = measured[:7]
    # |U-centred|^2 = |K|^2 - 2/(n-2) |K1|^2 + (1'K1)^2 / ((n-1)(n-2)), zero diagonal (Székely & Rizzo 2014).
    off_diagonal, off_total = whole - own, total - trace
    centred = off_diagonal - 2 / (n - 2) * rows + off_total * off_total / ((n - 1) * (n - 2))
    growth = math.sqrt(max(off_diagonal, 0.0)) + trace * min(1.0, chunk / max(width, 1)) ** 0.5
    eps = torch.finfo(torch.float32).eps
    is_small = (eps * growth) ** 2 <= (NOISE_TOLERANCE * n) ** 2 * centred
    return trace >= n * TINY and (is_small or spread <= rounding * size < math.inf)
