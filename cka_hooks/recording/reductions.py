"""What becomes of an activation before it is handed over: samples, channels and padding known, positions reduced."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cka_hooks.features import Reduction, check_reduction, feature_rows
from cka_hooks.names import PerLayer
from cka_hooks.recording.batches import Given
from cka_hooks.recording.channels import Channels, matters
from cka_hooks.recording.padding import MaskOption, Padding
from cka_hooks.recording.probe import Probe
from cka_hooks.recording.routes import Route

Features = Reduction | str | Mapping[str, Reduction | str]


class Reductions:
    """Reduces each activation as `features` says.

    Args:
        names: the model's modules.
        chosen: names of those that are layers.
        features: a reduction, or a mapping from layer pattern to one.
        channel_dim: see :class:`cka_hooks.recording.channels.Channels`.
        mask: see :class:`cka_hooks.recording.padding.Padding`.

    Attributes:
        followed: modules that have to be shown to `follow` when they run.

    Raises:
        OptionError: one of these has a value that it cannot have.
    """

    def __init__(
        self,
        names: Mapping[str, nn.Module],
        chosen: set[str],
        features: Features,
        channel_dim: int | Mapping[str, int] | None,
        mask: MaskOption,
    ) -> None:
        self._features = PerLayer(features, names, "features")
        for reduction in self._features.values:
            check_reduction(reduction)
        reductions = [self.of(name) for name in chosen]
        self._keeps = "flatten" in reductions
        self._reduces = any(isinstance(reduction, str) and reduction != "flatten" for reduction in reductions)
        self._channels = Channels(names, channel_dim)
        self._padding = Padding(names, mask)
        modules = {id(module): module for module in names.values()}.values()
        self.followed = [module for module in modules if self._reduces and matters(module)]
        self.follow = self._channels.pass_through
        self._limit: int | None = None

    def of(self, name: str) -> Reduction | str:
        """The reduction of a module's activations."""
        reduction: Reduction | str = self._features.of(name, "flatten")
        return reduction

    def begin(self, given: Given, samples: int | None, limit: int | None) -> None:
        """A batch of that many samples comes, of which `limit` count."""
        self._limit = limit
        self._padding.start(given.batch, given.form, samples)

    def restart(self) -> None:
        """A forward pass begins."""
        self._channels.restart()

    @property
    def has_routes(self) -> bool:
        """Whether an activation that is kept as it is needs no look at it."""
        return self._limit is None and not (self._keeps and self._padding.is_due)

    @property
    def needs_probe(self) -> bool:
        """Whether the batch has a mask for layers whose positions are reduced, and nothing says which these are."""
        return self._reduces and self._padding.needs_probe

    def confirm(self, probe: Probe, given: Given) -> None:
        """Find out which layers have the positions of the batch's masks."""
        if self.needs_probe:
            self._padding.confirm(probe, given.shape[0])

    def decide(self, route: Route, activation: Tensor) -> None:
        """Find out what is the same in every batch."""
        route.reduction = self.of(route.selection.name)
        if isinstance(route.reduction, str) and route.reduction != "flatten":
            route.channels = self._channels.of(route.selection.name, route.label, activation, route.axis)

    def rows(self, route: Route, activation: Tensor) -> Tensor:
        """An activation with the samples in front, as features (n, P, C) where it is reduced."""
        name, label = route.selection.name, route.label
        if self._limit is not None:
            activation = activation.narrow(route.axis, 0, min(self._limit, activation.shape[route.axis]))
        if route.reduction == "flatten":
            self._padding.keeps(label, name, tuple(activation.shape))
            return activation.movedim(route.axis, 0)
        masks = []
        if not callable(route.reduction):
            for mask, dims in self._padding.of(name, label, tuple(activation.shape)):
                masks.append((mask[: self._limit].to(activation.device, non_blocking=True), dims))
        return feature_rows(activation, route.reduction, batch_dim=route.axis, masks=masks, channels=route.channels)

    def warn(self) -> None:
        """Say at the end of a pass what was guessed, and where padding counts as data; once in all passes."""
        self._channels.warn()
        self._padding.warn(reduces=self._reduces)
