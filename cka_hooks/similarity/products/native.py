"""The compiled Gram product for float32 features on a CPU: `_native.c`, if it was built and runs here.

Everything works without it, slower: `pip install` continues without a C compiler. Set the environment variable
``CKA_HOOKS_NATIVE=0`` to leave it unused.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    from cka_hooks.similarity.products import _native
except ImportError:
    _native = None  # type: ignore[assignment]

# Instruction sets that this processor can run, by name, best first.
VARIANTS: dict[str, int] = {}
if _native is not None and os.environ.get("CKA_HOOKS_NATIVE", "1") != "0":
    VARIANTS = dict(_native.variants())

# Features whose products are added in float32 before float64 takes over: BLOCK in _native.c.
BLOCK = 1024
# With more samples to reuse a packed operand for, BLAS is as fast.
MAX_SAMPLES = 512


def takes(features: Tensor) -> bool:
    """Whether `grams` can be used for these features.

    Subclasses of tensors, and tensors under ``torch.func``, may have no memory of their own to read.
    """
    if not VARIANTS or type(features) is not Tensor or features.device.type != "cpu":
        return False
    if features.dtype is not torch.float32 or features.layout is not torch.strided or not features.numel():
        return False
    try:
        return features.data_ptr() != 0
    except RuntimeError:
        return False


def grams(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices (m, n, n) of samples minus a common vector, and (m, 8) numbers about them; float64.

    Args:
        grouped: (m, n, P, C) float32 on the CPU: a view of (m * n, P, C) of any strides.

    Returns:
        The matrices, and for each the numbers of `choose._measured`, then the norm of the vector that was subtracted.
    """
    m, n, positions, channels = grouped.shape
    group, sample, position, channel = grouped.stride()
    # A dimension of size 1 may have any stride.
    sample = group if n == 1 else sample
    if channels == 1:
        positions, channels, position, channel = 1, positions, 0, position
    values = torch.zeros(m, n, n, dtype=torch.float64, device="cpu")
    measures = torch.zeros(m, 8, dtype=torch.float64, device="cpu")
    of_features = grouped.data_ptr(), m, n, positions, channels, sample, position, channel
    how = torch.get_num_threads(), next(iter(VARIANTS.values()))
    _native.grams(*of_features, values.data_ptr(), measures.data_ptr(), *how)
    return values, measures
