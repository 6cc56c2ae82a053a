"""The way of an activation about which nothing is known yet: find its names, axis, reasons and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch

from cka_hooks.errors import LayerError
from cka_hooks.features import memory_order
from cka_hooks.precision import without_gradients
from cka_hooks.recording import axes, outputs
from cka_hooks.recording.reductions import Reductions
from cka_hooks.recording.routes import LONG_WAY, Consumer, Pass, Route, slots_of


class LongWay:
    """Takes a module's output to the consumer, and opens a route for the next one.

    Args:
        names: the model's modules.
        now: the forward pass.
        reductions: reduces the activations.
        batch_dim: see :class:`cka_hooks.LayerRecorder`.
        detach: whether to detach activations from their graph.

    Attributes:
        consumer: where activations are handed to.
        dimension: knows which dimension holds the samples.
        shapes: for each label, the shape of one sample when the layer was first recorded.
        recorded: for each label that was recorded, its module.
        left_out: for each label that was not, the reason.
    """

    def __init__(
        self,
        names: Mapping[str, nn.Module],
        now: Pass,
        reductions: Reductions,
        batch_dim: int | Mapping[str, int] | None,
        detach: bool,
    ) -> None:
        self.dimension = axes.SampleDimension(names, batch_dim)
        self._reductions = reductions
        self._now = now
        self._detaches = detach
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.recorded: dict[str, nn.Module] = {}
        self.left_out: dict[str, str] = {}
        self.consumer: Consumer | None = None
        self._has_routes = False

    def restart(self, samples: int | None) -> None:
        """Begin a forward pass of that many samples."""
        self.dimension.start(samples)
        self._reductions.restart()
        self._has_routes = self._reductions.has_routes
        self._let_routes()

    def _let_routes(self) -> None:
        """Let activations take routes, unless something in this pass needs a closer look."""
        self._now.samples = (self.dimension.samples or LONG_WAY) if self._has_routes else LONG_WAY

    def follow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of a module that shows where channels are."""
        if self._now.concerns():
            self._reductions.follow(module, args, output)

    def go(self, route: Route, given: Any) -> None:
        """Take a module's output, or its arguments and keyword arguments, to the consumer.

        Raises:
            LayerError: the layer was asked for by name and cannot be recorded.
        """
        selection, label = route.selection, route.label
        try:
            activation = route.activation(given)
            _refuse_vmap(activation)
            if self._now.show is not None:
                second = self.dimension.is_second(selection.module, route.place(given, activation))
                self._now.show(label, activation, second)
                return
            if self._reductions.is_free(selection.name):
                route.axis = 0
            else:
                route.axis = self.dimension.of(selection.name, label, tuple(activation.shape))
        except outputs.NotRecordable as reason:
            self._leave_out(route, str(reason))
            return
        self.left_out.pop(label, None)
        self.recorded[label] = selection.module
        self._reductions.decide(route, activation)
        slot = slots_of(self.consumer) if self._detaches else None
        route.product = None if slot is None else slot(label)
        route.open(given, activation)
        # A dimension that is given for the batch as well says how many samples there are.
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
        """Hand an activation to the consumer. The route knows its axis with the samples."""
        if self._detaches:
            activation = activation.detach()
        if route.label not in self.shapes:
            self.shapes[route.label] = tuple(activation.movedim(route.axis, 0).shape[1:])
        try:
            with without_gradients() if self._detaches else nullcontext():
                rows = self._reductions.rows(route, activation)
        except outputs.NotRecordable as reason:
            self.left_out[route.label] = str(reason)
            return
        if route.product is not None:
            route.product(memory_order(rows) if route.reduction == "flatten" else rows)
        elif self.consumer is not None:
            self.consumer(route.label, rows if route.reduction == "flatten" else rows.flatten(1))


def _refuse_vmap(activation: Tensor) -> None:
    while _functorch.is_functorch_wrapped_tensor(activation):
        if _functorch.is_batchedtensor(activation):
            raise outputs.NotRecordable(
                "ran under torch.vmap, where a call is of one sample, or of one model, at a time: choose a layer "
                "outside of it"
            )
        activation = _functorch.get_unwrapped(activation)
