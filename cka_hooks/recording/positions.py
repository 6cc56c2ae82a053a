"""Use tokens and pixels as samples: choose the positions of a batch that count, the same for every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from cka_hooks.precision import moved
from cka_hooks.recording.outputs import NotRecordable


class Positions:
    """Chooses the positions of each batch, and takes them out of every activation that has them.

    The first layer with positions decides how many a sample has, and which of them are padding. Several recorders can
    share one instance, so that layers of several models use the same positions.

    Args:
        count: how many positions to draw from each batch; None for all that are not padding.
        seed: seed of the draw, which depends on nothing else but the number of the batch.

    Attributes:
        is_shared: whether somebody else starts each batch.
        number: number of the batch, counted from 0.
        digest: digest of the shapes and numbers of positions of all batches, equal if these are.
    """

    def __init__(self, count: int | None, seed: int) -> None:
        self._count = count
        self._seed = seed
        self.is_shared = False
        self.number = 0
        self.digest = 0
        self.start(0)

    def start(self, number: int) -> None:
        """Begin a batch."""
        self.number = number
        # No layer has decided yet.
        self._shape: tuple[int, ...] | None = None

    def rows(self, label: str, tokens: Tensor, kept: Tensor | None, sources: frozenset[int]) -> Tensor:
        """The chosen positions of an activation, (m, 1, C).

        Args:
            label: label of the layer.
            tokens: (n, *positions, C).
            kept: which of the positions are data, (n, *positions); None for all.
            sources: identifies the masks that say it among others.

        Raises:
            NotRecordable: the layer has other positions than the first layer of the batch.
        """
        shape = tuple(tokens.shape[:-1])
        if len(shape) < 2:
            raise NotRecordable('has no positions, and per="position" compares these')
        if self._shape is None:
            self._label, self._shape, self._sources = label, shape, sources
            self._places = self._chosen(kept, shape)
        elif shape != self._shape:
            raise NotRecordable(
                f"has other positions than {self._label!r}, {shape[1:]} against {self._shape[1:]} in each sample: "
                'per="position" compares layers with the same ones. layers= chooses these'
            )
        elif not sources <= self._sources:
            raise NotRecordable(f"has a mask of padding that {self._label!r} does not have: mask= names it for both")
        if self._places is None:
            return tokens.reshape(-1, 1, tokens.shape[-1])
        if self._places[0].device != tokens.device:
            self._places = tuple(moved(place, tokens.device) for place in self._places)
        return tokens[self._places].unsqueeze(1)

    def _chosen(self, kept: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """The indices of the chosen positions along each dimension, in order; None for all."""
        total = torch.Size(shape).numel()
        chosen = torch.arange(total) if kept is None else kept.cpu().flatten().nonzero().squeeze(1)
        self.digest = hash((self.digest, shape, len(chosen)))
        if self._count is not None and self._count < len(chosen):
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.number) % (1 << 63))
            drawn = torch.randperm(len(chosen), generator=generator)[: self._count]
            chosen = chosen[drawn.sort().values]
        return None if len(chosen) == total else torch.unravel_index(chosen, shape)
