"""Hold the Gram matrices of all layers of one batch until they are added up; on a GPU, in buffers that stay."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from cka_hooks import memory
from cka_hooks.similarity.products import fused
from cka_hooks.similarity.products.grams import Grams


class Batch:
    """Gram matrices of m minibatches of n samples, layer by layer.

    Args:
        of_linear: makes the kernel's Gram matrices from linear ones; None if the kernel does not work that way.
    """

    def __init__(self, of_linear: Callable[[Grams], Grams] | None) -> None:
        self._of_linear = of_linear
        self._shelves: dict[torch.device, fused.Shelf] = {}
        # A layer's Gram matrices, or the device whose shelf has them and their place on it.
        self._grams: dict[str, Grams | tuple[torch.device, int]] = {}

    def shelve(self, layer: str, features: Tensor, minibatches: int) -> bool:
        """Give (m * n, P, C) features to the fused backend. If it cannot take them, return False and do nothing."""
        if self._of_linear is None or not fused.takes(features, minibatches):
            return False
        device = features.device
        try:
            shelf = self._shelves.get(device)
            if shelf is None:
                shelf = self._shelves[device] = fused.Shelf(device)
            shelf.add(features, minibatches)
        except torch.OutOfMemoryError:
            # There was no room for its buffers. Other ways need less.
            memory.release(device)
            return False
        except Exception as error:
            fused.fail(error)
            return False
        self._grams[layer] = device, shelf.rows - 1
        return True

    def put(self, layer: str, grams: Grams) -> None:
        """Keep Gram matrices that were made elsewhere."""
        self._grams[layer] = grams

    def grams(self, layers: Collection[str]) -> Grams | list[Grams]:
        """Gram matrices of some layers, in one stack if they are stored that way. They are valid until `release`."""
        stacks: dict[torch.device, Grams] = {}
        if self._of_linear is not None:
            stacks = {
                device: self._of_linear(shelf.finish()) for device, shelf in self._shelves.items() if shelf.rows
            }
        for stack in stacks.values():
            if len(stack.values) == len(layers) == len(self._grams):
                return stack
        places = [self._grams[layer] for layer in layers]
        return [it if isinstance(it, Grams) else stacks[it[0]].of_layer(it[1]) for it in places]

    def release(self) -> None:
        """Forget the matrices and keep the buffers."""
        self._grams.clear()
        for shelf in self._shelves.values():
            shelf.release()
