"""Make from the features of one batch what is added: Gram matrices of its layers, centred together.

On a GPU the fused backend collects them, in buffers that stay from batch to batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cka_hooks import memory
from cka_hooks.errors import OutOfMemoryError
from cka_hooks.hsic import Estimator, centre, pack, sample_parts
from cka_hooks.null import null_numbers
from cka_hooks.precision import moved
from cka_hooks.similarity.kernels import Kernel, OfLinear, linear
from cka_hooks.similarity.products import fused
from cka_hooks.similarity.products.reference import Grams

# How many numbers of the (layers, minibatches, n, n) stack to centre at a time: 32 MB. On a CPU 2 MB, because its
# allocator would request more from the system anew each time.
_CENTRED_AT_A_TIME = 1 << 22
# Places in `Minibatches.numbers`.
SPREAD, SIZE, FINITE, DIFFER, TRIANGLES, TRIPLES = range(fused.NUMBERS)


class Minibatches(NamedTuple):
    """All layers of m minibatches of n samples, ready to be added. Every tensor has the layers in dimension 0.

    Tensors of the fused backend are valid until the next batch.

    Attributes:
        layers: l labels.
        vectors: (l, m, p) centred Gram matrices, see :func:`cka_hooks.hsic.pack`.
        numbers: (l, m, 6) traces of the centred linear Gram matrix and of the linear one; 1 if the layer was finite;
            1 if :func:`cka_hooks.hsic.features_differ`, 0 if not, or if that was not asked; both
            :func:`cka_hooks.null.null_numbers`, 0 for the biased estimator.
        parts: (l, m, n) each sample's part of the layer's own HSIC.

    Vectors, numbers and parts are 0 where the layer was not finite.
    """

    layers: tuple[str, ...]
    vectors: Tensor
    numbers: Tensor
    parts: Tensor

    @classmethod
    def of(cls, layers: tuple[str, ...], grams: Grams | Sequence[Grams], estimator: Estimator) -> Minibatches:
        """Centre the Gram matrices of all layers of m minibatches, a bounded stack at a time.

        Args:
            layers: their labels.
            grams: one for each layer, or those of all layers stacked in a leading dimension.
            estimator: "unbiased" or "biased".
        """
        first = grams if isinstance(grams, Grams) else grams[0]
        device = first.values.device
        m, n, _ = first.values.shape[-3:]
        packed: Tensor | None = None
        rest: list[tuple[Tensor, Tensor]] = []
        step = max(1, _CENTRED_AT_A_TIME // (16 if device.type == "cpu" else 1) // (m * n * n))
        for low in range(0, len(layers), step):
            stacked = _stacked(grams, slice(low, low + step), device)
            spread, size = stacked.traces()
            finite = torch.isfinite(stacked.values.sum((-2, -1)) + size)
            bad = ~finite.unsqueeze(-1)
            centred = centre(stacked.values, estimator)
            cubes = null_numbers(centred) if estimator == "unbiased" else centred.new_zeros(*finite.shape, 2)
            numbers = torch.stack([spread, size, finite.to(size), torch.zeros_like(size), *cubes.unbind(-1)], -1)
            parts = sample_parts(centred, estimator)
            rest.append((numbers.masked_fill_(bad, 0), parts.masked_fill_(bad, 0)))
            vectors = pack(centred, estimator).masked_fill_(bad, 0)
            if packed is None:
                packed = vectors if step >= len(layers) else vectors.new_empty(len(layers), *vectors.shape[1:])
            if packed is not vectors:
                packed[low : low + step] = vectors
        assert packed is not None
        return cls(layers, packed, *map(torch.cat, zip(*rest, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[Minibatches]) -> Minibatches:
        """The same minibatches with the layers of several models."""
        layers = tuple(layer for part in parts for layer in part.layers)
        return cls(layers, *(torch.cat(tensors) for tensors in zip(*(part[1:] for part in parts), strict=True)))

    def cpu(self) -> Minibatches:
        """A copy on the CPU."""
        return Minibatches(self.layers, *(tensor.cpu() for tensor in self[1:]))


def _stacked(grams: Grams | Sequence[Grams], some: slice, device: torch.device) -> Grams:
    """The Gram matrices of some of the layers, stacked."""
    if isinstance(grams, Grams):
        return grams.of_layers(some)
    found: list[Any] = []
    for tensors in zip(*grams[some], strict=True):
        there = [moved(tensor, device) for tensor in tensors if tensor is not None]
        found.append(torch.stack(there) if there else None)
    return Grams(*found)


class Step(NamedTuple):
    """A batch of `samples`, of which `counted` are in `groups` of equal minibatches; dtypes of layers by label."""

    samples: int
    counted: int
    groups: list[Minibatches]
    dtypes: dict[str, str]


class Batch:
    """Gram matrices of m minibatches of n samples, layer by layer.

    Args:
        kernel: what makes them.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._shelves: dict[torch.device, fused.Shelf] = {}
        # A layer's Gram matrices, or the shelf that has them and their place on it.
        self._grams: dict[str, Grams | tuple[fused.Shelf, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Between batches, shelves are only room, with kernels that cannot be pickled.
        return vars(self) | ({} if self._grams else {"_shelves": {}})

    def take(self, layer: str, features: Tensor, minibatches: int) -> None:
        """Make the Gram matrices of a layer's (m * n, P, C) features.

        Raises:
            OutOfMemoryError: even in smaller pieces.
        """
        if isinstance(self._kernel, OfLinear) and fused.takes(features, minibatches):
            try:
                shelf = self._shelves.get(features.device)
                if shelf is None:
                    shelf = self._shelves[features.device] = fused.Shelf(features.device)
                shelf.add(features, minibatches)
                self._grams[layer] = shelf, shelf.rows - 1
                return
            except torch.OutOfMemoryError:
                # There was no room for its buffers. Other ways need less.
                memory.release(features.device)
            except Exception as error:
                fused.fail(error)
        self._grams[layer] = self._made(layer, features, minibatches)

    def _made(self, layer: str, features: Tensor, minibatches: int) -> Grams:
        """Gram matrices of one layer, made in smaller pieces if memory does not suffice for all of them at once."""
        try:
            return self._kernel(features, minibatches)
        except memory.EXHAUSTED as error:
            memory.raise_unless_exhausted(error)
        # Outside of the handler, whose traceback would keep the scratch buffers of the failed attempt.
        memory.release(features.device)
        try:
            with memory.smaller_pieces():
                parts = [self._kernel(part, 1) for part in features.chunk(minibatches)]
        except memory.EXHAUSTED as error:
            memory.raise_unless_exhausted(error)
            raise OutOfMemoryError(
                f"out of memory in layer {layer!r}: {len(features)} samples of {features[0].numel():,} features "
                f"({features.numel() * features.element_size() / 1e6:,.1f} MB, "
                f"{str(features.dtype).removeprefix('torch.')}) on {features.device}, even in smaller pieces: leave "
                "the layer out (layers=), average it over positions (features='mean'), take smaller minibatches "
                "(minibatch=), or use a smaller batch_size in the loader"
            ) from error
        joined: list[Any] = [None if of_one[0] is None else torch.cat(of_one) for of_one in zip(*parts, strict=True)]
        return Grams(*joined)

    def minibatches(self, layers: tuple[str, ...], estimator: Estimator) -> Minibatches:
        """Centre the layers that were taken since `release`. The result is valid until then."""
        stacks: dict[fused.Shelf, Grams] = {}
        for shelf in self._shelves.values():
            whole = shelf.rows == len(layers) == len(self._grams)
            if whole and estimator == "unbiased" and self._kernel == linear():
                centred = shelf.centred()
                if centred is not None:
                    return Minibatches(layers, *centred)
            if shelf.rows:
                assert isinstance(self._kernel, OfLinear)
                stacks[shelf] = self._kernel.of_linear(shelf.finish())
                if whole:
                    return Minibatches.of(layers, stacks[shelf], estimator)
        places = [self._grams[layer] for layer in layers]
        grams = [it if isinstance(it, Grams) else stacks[it[0]].of_layers(it[1]) for it in places]
        return Minibatches.of(layers, grams, estimator)

    def release(self) -> None:
        """Forget the matrices and keep the buffers."""
        self._grams.clear()
        for shelf in self._shelves.values():
            shelf.release()
