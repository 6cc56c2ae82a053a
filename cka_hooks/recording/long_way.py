"""The long way of an activation, where nothing is known yet: names, the axis with the samples, reasons, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch

from cka_hooks.errors import LayerError, warn
from cka_hooks.features import Reduction, check_reduction, feature_rows, memory_order
from cka_hooks.names import PerLayer
from cka_hooks.precision import without_gradients
from cka_hooks.recording import axes, batches, outputs
from cka_hooks.recording.routes import LONG_WAY, Consumer, Pass, Route, slots_of

Features = Reduction | str | Mapping[str, Reduction | str]


class LongWay:
    """From what a module returned to the consumer, and to an open route for the next time.

    Args:
        names: the model's modules.
        now: the forward pass.
        features: see :class:`cka_hooks.LayerRecorder`, as the others.
        batch_dim: which dimension has the samples.
        detach: whether activations lose their graph.

    Attributes:
        dimension: knows which dimension has the samples.
        followed: the modules that tell where channels are.
        shapes: label -> the shape of one sample when the layer was first recorded.
        recorded: label -> its module, of layers that were recorded.
        left_out: label -> why the layer was not recorded.
    """

    def __init__(
        self,
        names: Mapping[str, nn.Module],
        now: Pass,
        features: Features,
        batch_dim: int | Mapping[str, int] | None,
        detach: bool,
    ) -> None:
        self.dimension = axes.SampleDimension(names, batch_dim)
        self._features = PerLayer(features, names, "features")
        for reduction in self._features.values:
            check_reduction(reduction)
        pools = any(reduction != "flatten" for reduction in self._features.values)
        self.followed = [module for module in dict.fromkeys(names.values()) if pools and axes.matters(module)]
        # Whether a warning may come. A mapping may leave layers as they are.
        self._watches_padding = features == "flatten" or isinstance(features, Mapping)
        self._now = now
        self._detaches = detach
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.recorded: dict[str, nn.Module] = {}
        self.left_out: dict[str, str] = {}
        self.consumer = None
        self.begin((), None, None)

    @property
    def consumer(self) -> Consumer | None:
        """What activations are handed to."""
        return self._consumer

    @consumer.setter
    def consumer(self, consumer: Consumer | None) -> None:
        self._consumer = consumer
        self._slot = slots_of(consumer) if self._detaches else None

    def begin(self, shape: tuple[int, ...], batch: Any, limit: int | None) -> None:
        """A forward pass on a batch of that shape, of which only `limit` samples are handed over."""
        self.dimension.start(shape[0] if shape else None)
        self._limit = limit
        self._masks = batches.attention_masks(batch)
        self._channels = axes.ChannelDimension()
        masks = (self._masks("encoder"), self._masks("decoder"))
        self._padded = self._watches_padding and any(map(_has_zeros, masks))
        self._let_routes()

    def _let_routes(self) -> None:
        """Let routes be taken where nothing in this pass needs more of a look."""
        plain = self._limit is None and not self._padded
        self._now.samples = (self.dimension.samples or LONG_WAY) if plain else LONG_WAY

    def follow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook: a module ran that tells where channels are."""
        if self._now.concerns():
            self._channels.pass_through(module, output)

    def go(self, route: Route, given: Any) -> None:
        """What a module returned, or its arguments and keyword arguments, to the consumer.

        Raises:
            LayerError: the layer was asked for by name, and cannot be recorded.
        """
        selection, label = route.selection, route.label
        try:
            activation = route.activation(given)
            _refuse_vmap(activation)
            if self._now.show is not None:
                second = self.dimension.is_second(selection.module, route.place(given, activation))
                self._now.show(label, activation, second)
                return
            route.axis = self.dimension.of(selection.name, label, tuple(activation.shape))
        except outputs.NotRecordable as reason:
            self._leave_out(route, str(reason))
            return
        self.left_out.pop(label, None)
        self.recorded[label] = selection.module
        route.reduction = self._features.of(selection.name, "flatten")
        route.layout = self._channels.of(activation)
        route.product = self._slot(label) if self._slot is not None else None
        route.open(given, activation)
        # A dimension that is given for the batch, too, tells how many samples there are.
        self._let_routes()
        self.hand_over(route, activation)

    def _leave_out(self, route: Route, reason: str) -> None:
        route.close()
        if self._now.show is not None:
            return
        if route.selection.named:
            kind = type(route.selection.module).__name__
            raise LayerError(f"layer {route.label!r} ({kind}) cannot be recorded: {reason}") from None
        self.left_out.setdefault(route.label, reason)

    def hand_over(self, route: Route, activation: Tensor) -> None:
        """An activation, whose axis with the samples the route knows, to the consumer."""
        if self._detaches:
            activation = activation.detach()
        activation = activation.movedim(route.axis, 0)
        self.shapes.setdefault(route.label, tuple(activation.shape[1:]))
        mask = self._masks(route.selection.name)
        if self._limit is not None:
            activation = activation[: self._limit]
            mask = None if mask is None else mask[: self._limit]
        if route.reduction == "flatten":
            self._warn_of_padding(activation, mask)
            if route.product is not None:
                route.product(memory_order(activation))
            elif self._consumer is not None:
                self._consumer(route.label, activation)
            return
        with without_gradients() if self._detaches else nullcontext():
            if mask is not None:
                mask = mask.to(activation.device, non_blocking=True)
            rows = feature_rows(activation, route.reduction, mask=mask, channels=route.layout)
        if route.product is not None:
            route.product(rows)
        elif self._consumer is not None:
            self._consumer(route.label, rows.flatten(1))

    def _warn_of_padding(self, activation: Tensor, mask: Tensor | None) -> None:
        """Say so once where padding is taken for data."""
        if not self._padded or mask is None or not _has_zeros(mask):
            return
        if activation.ndim > 2 and mask.shape[1] in activation.shape[1:]:
            self._watches_padding = self._padded = False
            warn(
                "the batch's attention mask has zeros, and features='flatten' keeps what stands there as data: "
                "use features='mean', 'token' or 'last' to leave padding out"
            )


def _has_zeros(mask: Tensor | None) -> bool:
    """A mask on an accelerator is not looked at: that would wait."""
    return mask is not None and mask.device.type == "cpu" and not bool((mask != 0).all())


def _refuse_vmap(activation: Tensor) -> None:
    while _functorch.is_functorch_wrapped_tensor(activation):
        if _functorch.is_batchedtensor(activation):
            raise outputs.NotRecordable(
                "ran under torch.vmap, where a call is of one sample, or of one model, at a time: choose a layer "
                "outside of it"
            )
        activation = _functorch.get_unwrapped(activation)
