"""Turn an activation into a feature matrix: samples in front, everything else a row of features.

A feature matrix is a view ``(n, P, C)`` wherever strides allow it. Flattening in memory order copies nothing, and a
Gram matrix does not depend on the order of features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from cka_hooks.errors import BatchError, OptionError

Reduction = Literal["flatten", "mean", "token", "last"] | Callable[[Tensor], Tensor]
Layout = Literal["first", "last"]
# Masks (n, T), each with the numbers of the dimensions that it describes.
Masks = Sequence[tuple[Tensor, Sequence[int]]]
REDUCTIONS = ("flatten", "mean", "token", "last")


def check_reduction(features: object) -> int:
    """Return the position that a reduction takes, 0 if it takes none.

    Raises:
        OptionError: `features` neither names a reduction nor can be called.
    """
    if callable(features):
        return 0
    found = (
        re.fullmatch(r"flatten|mean|last|token(?::([+-]?\d{1,18}))?", features) if isinstance(features, str) else None
    )
    if found is None:
        raise OptionError(
            f"features={features!r} is not a reduction: use one of {', '.join(map(repr, REDUCTIONS))}, "
            "'token:POSITION', a callable (n, ...) -> (n, d), or a mapping from layer pattern to one of these"
        )
    return -1 if features == "last" else int(found[1] or 0)


def feature_rows(
    activation: Tensor,
    features: Reduction | str = "flatten",
    *,
    batch_dim: int = 0,
    masks: Masks = (),
    channels: Layout | int | None = None,
) -> Tensor:
    """The features of an activation as (n, P, C), P * C features per sample, a view if possible.

    Args:
        activation: any floating-point tensor with the samples in dimension `batch_dim`.
        features: "flatten" keeps every number. "mean" averages over positions (all dimensions but samples and
            channels). "token" takes position 0, "token:k" position k, "last" the last position that is not padding. A
            callable maps (n, ...) to (n, d).
        batch_dim: the dimension with the samples.
        masks: (n, T) each, nonzero where position t of a sample is data and not padding, with the numbers of the
            dimensions that it describes.
        channels: where the channels are, with more than two dimensions: "first" (n, C, ...), "last" (n, ..., C), or
            the number of a dimension. None: last for three dimensions (tokens), else first (images).

    Raises:
        OptionError: `features` needs positions that the activation does not have, or is not a reduction; or
            `channels` is the dimension with the samples, or does not exist.
        BatchError: a callable does not keep the samples.
    """
    moved = activation if batch_dim == 0 else activation.movedim(batch_dim, 0)
    if features == "flatten":
        return memory_order(moved)
    if callable(features):
        return rows_of(features, moved, moved.shape[0])
    if moved.ndim <= 2:
        return memory_order(moved)
    tokens, kept = tokens_of(activation, batch_dim, masks, channels)
    if features == "mean":
        return _mean(tokens, kept)
    positions, position = tokens.flatten(1, -2), check_reduction(features)
    if features == "last" and kept is not None:
        number = torch.arange(positions.shape[1], device=positions.device)
        last = torch.where(kept.flatten(1), number, 0).amax(1)
        return positions.take_along_dim(last[:, None, None], 1)
    if not -positions.shape[1] <= position < positions.shape[1]:
        shape = tuple(activation.shape)
        raise OptionError(f"features={features!r}: an activation of shape {shape} has {positions.shape[1]} positions")
    return positions[:, position].unsqueeze(1)


def rows_of(function: Callable[[Tensor], Tensor], activation: Tensor, samples: int | None = None) -> Tensor:
    """What the user's function makes of an activation, as (n, P, C).

    Raises:
        BatchError: this is no tensor, or one without these samples; None allows any number.
    """
    rows = function(activation)
    if not isinstance(rows, Tensor) or rows.ndim < 1 or samples not in (None, rows.shape[0]):
        found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        wanted = "(m, d)" if samples is None else f"whose dimension 0 still has the {samples} samples"
        what = f"the features callable turned {tuple(activation.shape)} into {found}"
        raise BatchError(f"{what}: it must return a tensor {wanted}")
    return memory_order(rows)


def tokens_of(
    activation: Tensor, batch_dim: int, masks: Masks, channels: Layout | int | None
) -> tuple[Tensor, Tensor | None]:
    """An activation as (n, *positions, C), a view, and which of its positions (n, *positions) are data.

    Attention scores (n, heads, T, T) have two dimensions that a mask (n, T) describes. None instead of the second if
    the activation has other positions than the masks.

    Args: see :func:`feature_rows`. With fewer than three dimensions there are no positions.
    """
    rank = activation.ndim
    if rank < 3:
        return activation if batch_dim == 0 else activation.movedim(batch_dim, 0), None
    ends = batch_dim % rank, _channel_dim(channels, activation, batch_dim)
    order = [ends[0], *(dim for dim in range(rank) if dim not in ends), ends[1]]
    tokens, kept = activation.permute(order), None
    for mask, dims in masks:
        for dim in (order.index(dim % rank) for dim in dims):
            if 0 < dim < rank - 1 and (tokens.shape[0], tokens.shape[dim]) == mask.shape:
                view = [tokens.shape[d] if d in (0, dim) else 1 for d in range(rank - 1)]
                along = (mask != 0).view(view)
                kept = along if kept is None else kept & along
    return tokens, None if kept is None else kept.expand(tokens.shape[:-1])


def _channel_dim(channels: Layout | int | None, activation: Tensor, batch_dim: int) -> int:
    """The number of the dimension with the channels."""
    rank, samples = activation.ndim, batch_dim % activation.ndim
    if isinstance(channels, int):
        if not -rank <= channels < rank or channels % rank == samples:
            shape = tuple(activation.shape)
            raise OptionError(f"channel_dim={channels}: {shape} has samples in dimension {samples}; name another one")
        return channels % rank
    others = [dim for dim in range(rank) if dim != samples]
    return others[-1 if (channels or ("last" if rank == 3 else "first")) == "last" else 0]


def _mean(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """The average over positions, in float32 for half-precision numbers."""
    wide = tokens if tokens.dtype is torch.float64 else tokens.float()
    positions = tuple(range(1, wide.ndim - 1))
    if kept is None:
        return wide.mean(positions).unsqueeze(1)
    # Padding may hold NaN, and 0 * NaN is NaN.
    summed = torch.where(kept.unsqueeze(-1), wide, 0).sum(positions)
    count = kept.flatten(1).sum(1, keepdim=True).clamp_min(1)
    return (summed / count).unsqueeze(1)


def memory_order(activation: Tensor) -> Tensor:
    """(n, ...) as (n, P, C), without a copy if strides allow it, with features in memory order.

    Channels-last images, and tokens with the batch in dimension 1, are read as they are.
    """
    if activation.ndim == 1:
        return activation[:, None, None]
    # An expanded dimension repeats its numbers. They are features all the same, and reshape copies them.
    strides_of = activation.stride()
    order = sorted(range(1, activation.ndim), key=lambda dim: -strides_of[dim])
    ordered = activation.permute(0, *order)
    sizes, strides = ordered.shape[1:], ordered.stride()[1:]
    # Innermost dimensions that follow each other in memory are one run of C numbers.
    run, start = 1, len(sizes)
    while start > 0 and (sizes[start - 1] == 1 or strides[start - 1] == run):
        start -= 1
        run *= sizes[start]
    samples = activation.shape[0]
    return ordered.reshape(samples, -1, run) if run else ordered.reshape(samples, 1, 0)
