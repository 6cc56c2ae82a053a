"""Reduce an activation before it is handed over: find samples, channels and padding, then reduce positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import BatchError, OptionError
from cka_hooks.features import Reduction, check_reduction, feature_rows, memory_order, tokens_of
from cka_hooks.names import PerLayer
from cka_hooks.recording.batches import Given
from cka_hooks.recording.channels import Channels, matters
from cka_hooks.recording.outputs import NotRecordable
from cka_hooks.recording.padding import MaskOption, Padding
from cka_hooks.recording.positions import Positions
from cka_hooks.recording.probe import Probe
from cka_hooks.recording.routes import Route

# The reduction of an activation whose positions are samples.
POSITION = "position"
Features = Reduction | str | Mapping[str, Reduction | str]


class Reductions:
    """Reduces each activation as `features` says.

    Args:
        names: the model's modules.
        chosen: names of the modules that are layers.
        features: a reduction, or a mapping from layer pattern to one.
        channel_dim: see :class:`cka_hooks.recording.channels.Channels`.
        mask: see :class:`cka_hooks.recording.padding.Padding`.
        positions: chooses the positions that are samples; None if samples are those of the batch.

    Attributes:
        followed: modules that `follow` has to see when they run.

    Raises:
        OptionError: an argument has an invalid value.
    """

    def __init__(
        self,
        names: Mapping[str, nn.Module],
        chosen: set[str],
        features: Features,
        channel_dim: int | Mapping[str, int] | None,
        mask: MaskOption,
        positions: Positions | None = None,
    ) -> None:
        self._positions = positions
        self._features = PerLayer(features, names, "features")
        for reduction in self._features.values:
            check_reduction(reduction)
            if positions is not None and not callable(reduction) and reduction != "flatten":
                raise OptionError(
                    f'per="position" and features={reduction!r} exclude each other: each position is a sample, so '
                    "there is nothing to average or choose: leave features= out"
                )
        reductions = [self.of(name) for name in chosen]
        self._keeps = "flatten" in reductions
        self._reduces = any(isinstance(reduction, str) and reduction != "flatten" for reduction in reductions)
        self._channels = Channels(names, channel_dim)
        self._padding = Padding(names, mask)
        modules = {id(module): module for module in names.values()}.values()
        self.followed = [module for module in modules if self._reduces and matters(module)]
        self.follow = self._channels.pass_through
        self._limit: int | None = None
        self._vanish: dict[str, bool] = {}
        self._samples: int | None = None

    def of(self, name: str) -> Reduction | str:
        """The reduction of a module's activations."""
        reduction: Reduction | str = self._features.of(name, "flatten")
        return POSITION if self._positions is not None and reduction == "flatten" else reduction

    def is_free(self, name: str) -> bool:
        """Whether a module's output goes as it is to a function that may make any number of samples of it."""
        return self._positions is not None and callable(self.of(name))

    def begin(self, given: Given, samples: int | None, limit: int | None) -> None:
        """Begin a batch of that many samples, of which `limit` count."""
        self._limit = limit
        self._samples = samples
        if self._positions is not None and not self._positions.is_shared:
            self._positions.start(self._positions.number + 1)
        self._padding.start(given.batch, given.form, samples)

    def restart(self) -> None:
        """Begin a forward pass."""
        self._channels.restart()

    @property
    def has_routes(self) -> bool:
        """Whether an activation that is kept as it is can skip the long way."""
        return self._limit is None and not (self._keeps and self._padding.is_due)

    @property
    def needs_probe(self) -> bool:
        """Whether the batch has a mask for layers that reduce positions, and nothing says which layers these are."""
        return self._reduces and self._padding.needs_probe

    def confirm(self, probe: Probe, given: Given) -> None:
        """Find out which layers have the positions of the batch's masks."""
        if self.needs_probe:
            self._padding.confirm(probe, given.shape[0])

    def decide(self, route: Route, activation: Tensor) -> None:
        """Set what stays the same in every batch."""
        route.reduction = self.of(route.selection.name)
        if isinstance(route.reduction, str) and route.reduction != "flatten":
            route.channels = self._channels.of(route.selection.name, route.label, activation, route.axis)

    def rows(self, route: Route, activation: Tensor) -> Tensor:
        """An activation with the samples in front; features (n, P, C) if it is reduced."""
        name, label = route.selection.name, route.label
        if self.is_free(name):
            return self._free(route, activation)
        if self._limit is not None:
            activation = activation.narrow(route.axis, 0, min(self._limit, activation.shape[route.axis]))
        if route.reduction == "flatten":
            self._padding.keeps(label, name, tuple(activation.shape))
            return activation.movedim(route.axis, 0)
        found = [] if callable(route.reduction) else self._padding.of(name, label, tuple(activation.shape))
        if self._positions is not None:
            masks = [(mask[: self._limit], dims) for mask, dims in found]
            channels = route.channels
            tokens, spoken = tokens_of(activation, batch_dim=route.axis, masks=masks, channels=channels)
            return self._positions.rows(label, tokens, spoken, frozenset(id(mask) for mask, _ in found))
        masks = [(mask[: self._limit].to(activation.device, non_blocking=True), dims) for mask, dims in found]
        options: Any = {"batch_dim": route.axis, "masks": masks, "channels": route.channels}
        rows = feature_rows(activation, route.reduction, **options)
        if label not in self._vanish and route.reduction == "mean" and activation.ndim > 2 and len(rows) > 1:
            size = feature_rows(activation.detach().abs(), "mean", **options)
            self._vanish[label] = _vanishes(rows.detach(), size, activation.detach(), route.axis)
        if self._vanish.get(label):
            raise NotRecordable(
                "its samples differ and their averages do not, but for rounding: it subtracts its averages, as an "
                "InstanceNorm does. Pass features='flatten' for it"
            )
        return rows

    def _free(self, route: Route, activation: Tensor) -> Tensor:
        """The user's function of an activation whose samples only that function knows."""
        assert callable(route.reduction)
        if self._limit is not None and (self._samples is None or self._limit < self._samples):
            raise BatchError(
                f"only {self._limit} samples of a batch of {self._samples} count, and what the features callable "
                'returns cannot be cut: with per="position", let max_samples= be a multiple of the batch size'
            )
        rows = route.reduction(activation)
        if not isinstance(rows, Tensor) or rows.ndim < 1:
            found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise BatchError(
                f"the features callable turned {tuple(activation.shape)} into {found}: it must return a tensor (m, d)"
            )
        return memory_order(rows)

    def warn(self) -> None:
        """At the end of a pass, warn about guesses and about padding that counts as data, once in all passes."""
        self._channels.warn()
        self._padding.warn()


def _vanishes(rows: Tensor, size: Tensor, activation: Tensor, axis: int) -> bool:
    """Whether averages (n, 1, C) of an activation are alike for all samples, which differ, but for rounding.

    Args:
        rows: averages.
        size: averages of absolute values.
        activation: what was averaged.
        axis: its dimension with the samples.
    """
    noise = 4 * torch.finfo(activation.dtype).eps * size
    differs = (activation - activation.narrow(axis, 0, 1)).abs().amax() > noise.amax()
    return bool(((rows - rows.mean(0)).abs() <= noise).all() & differs)
