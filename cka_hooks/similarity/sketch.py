"""A random sign sketch of wide features: fewer columns, and unbiased estimates of HSIC all the same.

Feature j, with a fresh random sign, is added into one of k columns (Charikar, Chen & Farach-Colton 2002), so an
activation is read once and nothing of size d x k exists. The Gram matrix of the sketch is an unbiased
estimate of the features' own, and HSIC is bilinear in the two Gram matrices: with independent sketches for
different layers the cross terms stay unbiased, and a layer's own term does when it pairs two independent
sketches K' and K'' of that layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from cka_hooks.similarity.products import native
from cka_hooks.similarity.products.reference import Grams, linear_grams

# Up to this many times k features a layer is as cheap to take exactly.
EXACT_UP_TO = 4
_COPIES = native.COPIES
# Numbers in a product of features and signs on an accelerator, 64 MB: few launches, bounded memory.
_AT_A_TIME = 1 << 24


def sketched_grams(features: Tensor, minibatches: int, columns: int, keys: list[int]) -> Grams:
    """Linear Gram matrices from two sketches of `columns` columns each, exact ones where features are few.

    `values` is the mean (K' + K'') / 2 and `deviation` (K' - K'') / 2, so that <K', K''> is the difference of
    their squared norms.

    Args:
        features: (m * n, P, C) as for :func:`cka_hooks.similarity.products.reference.linear_grams`.
        minibatches: m.
        columns: k.
        keys: a 64-bit key for each minibatch, see :func:`sketch_key`.
    """
    width = features.shape[1] * features.shape[2]
    if width <= EXACT_UP_TO * columns:
        return linear_grams(features, minibatches)
    if native.takes(features):
        sketches = native.sketch(features, minibatches, columns, [_signed(key) for key in keys])
    else:
        grouped = features.unflatten(0, (minibatches, -1))
        sketches = torch.stack([_sketch(group, columns, key) for group, key in zip(grouped, keys, strict=True)], 1)
    both = linear_grams(sketches.flatten(0, 2).unsqueeze(1), _COPIES * minibatches)
    values = both.values.unflatten(0, (_COPIES, minibatches))
    assert both.shift is not None
    # The root of the mean of squares: traces are linear in those.
    shift = torch.linalg.vector_norm(both.shift.unflatten(0, (_COPIES, minibatches)), dim=0) / _COPIES**0.5
    return Grams(values.mean(0), shift, deviation=(values[0] - values[1]) / 2)


def sketch_key(*parts: int | str) -> int:
    """A 64-bit key from a seed and what the sketch is of: the same on every machine and after a resume."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _sketch(group: Tensor, columns: int, key: int) -> Tensor:
    """(n, P, C) features to (copies, n, k)."""
    n, positions, channels = group.shape
    dtype = group.dtype if group.dtype is torch.float64 else torch.float32
    # Each copy from the start of a word of 64 signs on.
    words = (positions * channels + 63) // 64
    signs = random_signs(_COPIES * words * 64, key, group.device, dtype).view(_COPIES, -1)
    signs = signs[:, : positions * channels].unflatten(1, (positions, channels))
    sketch = torch.zeros(_COPIES, n, columns, dtype=dtype, device=group.device)
    for blocks, signs_of in zip(_blocks(group, columns), _blocks(signs, columns), strict=True):
        count, width = blocks.shape[1], blocks.shape[2:].numel()
        own = signs_of.unsqueeze(1)
        target = sketch[..., :width].unflatten(2, blocks.shape[2:])
        # On a CPU a block at a time stays in the cache; on an accelerator a launch costs more than memory.
        step = 1 if group.device.type == "cpu" else max(1, _AT_A_TIME // (n * _COPIES * width))
        for low in range(0, count, step):
            some = blocks[:, low : low + step].to(dtype)
            if step == 1:
                target.addcmul_(some[:, 0], own[:, :, low])
            else:
                target += (some * own[:, :, low : low + step]).sum(2)
    return sketch


def _blocks(group: Tensor, columns: int) -> Iterator[Tensor]:
    """Views (n, B, q, c) of (n, P, C), q * c at most k, which cover every feature once."""
    _, positions, channels = group.shape
    if channels > columns and positions > channels // columns:
        for c in range(0, channels, columns):
            yield group[..., c : c + columns].unsqueeze(2)
        return
    if channels > columns:
        whole = channels - channels % columns
        for p in range(positions):
            yield group[:, p, :whole].unflatten(1, (-1, 1, columns))
            if whole < channels:
                yield group[:, p, None, None, whole:]
        return
    together = min(positions, columns // channels)
    whole = positions - positions % together
    yield group[:, :whole].unflatten(1, (-1, together))
    if whole < positions:
        yield group[:, whole:].unsqueeze(1)


def random_signs(count: int, key: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(count,) numbers +1 or -1, the same for a key on every device.

    SplitMix64 (Steele, Lea & Flood 2014) in integer arithmetic: a generator object would tie the signs to the
    kind of device, and filling from the host would wait for it.
    """
    words = torch.arange(1, (count + 63) // 64 + 1, dtype=torch.int64, device=device)
    state = words * _signed(0x9E3779B97F4A7C15) + _signed(key)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shifted(state, 31)
    octets = torch.arange(256, device=device)
    bits = torch.arange(8, device=device)
    table = ((octets.unsqueeze(1) >> bits) & 1).to(dtype) * 2 - 1
    return table[state.view(torch.uint8).int()].view(-1)[:count]


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's own repeats the sign bit."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
