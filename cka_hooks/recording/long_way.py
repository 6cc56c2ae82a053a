"""The way of an activation about which nothing is known yet: find its axis, channels and padding, and reduce it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _functorch

from cka_hooks.errors import BatchError, LayerError, OptionError
from cka_hooks.features import Reduction, check_reduction, feature_rows, memory_order, rows_of, tokens_of
from cka_hooks.names import PerLayer
from cka_hooks.options import Options
from cka_hooks.precision import moved, without_gradients
from cka_hooks.recording.batches import Given
from cka_hooks.recording.dimensions import Channels, SampleDimension, matters
from cka_hooks.recording.layers import named_layers, select_layers
from cka_hooks.recording.outputs import NotRecordable, tensors_in
from cka_hooks.recording.padding import Padding
from cka_hooks.recording.positions import Positions
from cka_hooks.recording.probe import Probe, Take
from cka_hooks.recording.routes import Consumer, Route, Tap, slots_of, taps_of

Features = Reduction | str | Mapping[str, Reduction | str]

# All that there are: a probe hides itself from the others.
_ways: WeakSet[LongWay] = WeakSet()


class LongWay:
    """A forward pass, which takes a module's output to the consumer and opens a route for the next one.

    Args:
        model: the model, without wrappers but those that shard it.
        positions: chooses the positions that are samples, if this is shared with other models.
        options: the layers, how to reduce activations, and what the user says about their dimensions and padding.
        detach: whether to detach activations from their graph.

    Attributes:
        thread: the thread whose calls are recorded, 0 while none are.
        samples: number of samples in the batch that is under way, or None if no route may be taken.
        show: in a probe, which hands nothing over, sees each activation instead of the consumer.
        names: the model's modules.
        selections: those that are layers.
        taps: the hooks of each chosen module, by its id.
        consumer: where activations are handed to.
        dimension: knows which dimension holds the samples.
        followed: modules that :meth:`follow` has to see when they run.
        shapes: for each label, the shape of one sample when the layer was first recorded.
        recorded: for each label that was recorded, the hooks of its module.
        left_out: for each label that was not, the reason.

    Raises:
        LayerError: an entry of the layers matches nothing.
        OptionError: an option has an invalid value.
    """

    def __init__(self, model: nn.Module, positions: Positions | None, options: Options, detach: bool) -> None:
        self._model, self._detaches = model, detach
        is_own = positions is None and options.per == "position"
        self._positions = Positions(options.positions, options.seed) if is_own else positions
        self.names, self.selections = named_layers(model), select_layers(model, options.layers)
        names = self.names
        self._features = PerLayer(options.features, names, "features")
        for reduction in self._features.values:
            check_reduction(reduction)
            if self._positions is not None and not callable(reduction) and reduction != "flatten":
                raise OptionError(
                    f'per="position" and features={reduction!r} exclude each other: each position is a sample. Leave '
                    "features= out"
                )
        reductions = [self._reduction_of(selection.name) for selection in self.selections]
        self._keeps = "flatten" in reductions
        self._reduces = any(isinstance(reduction, str) and reduction != "flatten" for reduction in reductions)
        self.dimension = SampleDimension(names, options.batch_dim)
        self._channels = Channels(names, options.channel_dim)
        self._padding = Padding(names, options.mask)
        channelled = [module for module in names.values() if self._reduces and matters(module)]
        self.followed = {*channelled, *self.dimension.sequence_first}
        self.taps = taps_of(self.selections, self, only_leaves=options.layers is None)
        self.consumer: Consumer | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.recorded: dict[str, Tap] = {}
        self.left_out: dict[str, str] = {}
        self._vanish: dict[str, bool] = {}
        self._limit: int | None = None
        self._has_routes = False
        self.thread = 0
        self.samples: int | None = None
        self.show: Take | None = None
        _ways.add(self)

    def _reduction_of(self, name: str) -> Reduction | str:
        reduction: Reduction | str = self._features.of(name, "flatten")
        return "position" if self._positions is not None and reduction == "flatten" else reduction

    # One batch

    def begin(self, given: Given, limit: int | None) -> None:
        """Begin a batch, of which the first `limit` samples count, with a probe of it if that is due.

        Raises:
            BatchError: the batch does not fit its mask or a module with ``batch_first=False``.
        """
        self._limit = limit
        self.dimension.start(given)
        if self._positions is not None and not self._positions.is_shared:
            self._positions.start(self._positions.number + 1)
        self._padding.start(given.batch, given.form, self.dimension.samples)
        has_masks = self._reduces and self._padding.needs_probe
        if given.call is not None and given.shape and (has_masks or not self.dimension.is_settled):
            # Tensors cut out of a batch are not part of its graph.
            with torch.no_grad():
                probe = Probe(partial(self._show, given.call), self._model, given.parts, given.shape[0])
                if not self.dimension.is_settled:
                    self.dimension.confirm(probe, given.shape)
                if has_masks:
                    self._padding.confirm(probe, given.shape[0])

    def _show(self, call: Callable[[Any], Any], batch: Any, take: Take) -> None:
        """Run a pass that hands nothing over: a probe sees the layers' outputs, and other recorders see nothing."""
        own = get_ident()
        others = [other for other in _ways if other is not self and other.thread == own]
        before = self.show, self.thread
        try:
            for other in others:
                other.thread = 0
            self.show, self.thread = take, own
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.restart()
                call(batch)
        finally:
            self.show, self.thread = before
            for other in others:
                other.thread = own

    def restart(self) -> None:
        """Begin a forward pass."""
        for tap in self.taps.values():
            tap.restart()
        self._channels.restart()
        is_due = self._keeps and self._padding.is_due
        # Activations take routes unless something in this pass needs a closer look.
        self._has_routes = self.show is None and self._limit is None and not is_due
        self.samples = (self.dimension.samples or None) if self._has_routes else None

    def concerns(self) -> bool:
        """Whether the code that runs now belongs to the pass.

        Calls in other threads do not, and neither do calls in a backward pass: there, activation checkpointing calls
        modules again whose activations were already recorded.
        """
        return get_ident() == self.thread and _current_graph_task_id() == -1

    def follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook of a module that shows where channels or samples are."""
        if self.concerns():
            self._channels.pass_through(module, args, output)
            if self.show is not None:
                self.dimension.look(module, (args, kwargs), self.show)

    def warn(self) -> None:
        """At the end of a pass, warn about guesses and about padding that counts as data, once in all passes."""
        self._channels.warn()
        self._padding.warn()

    # One activation

    def go(self, route: Route, given: Any) -> None:
        """Take a module's output, or its arguments by number or keyword, to the consumer.

        Raises:
            LayerError: the layer was asked for by name and cannot be recorded.
        """
        name, label = route.selection.name, route.label
        try:
            activation = route.activation(given)
            _refuse_vmap(activation)
            if self.show is not None:
                is_first = route.is_input or activation is next(tensors_in(given), None)
                second = self.dimension.is_second(route.selection.module, is_first_output=is_first)
                self.show(label, activation, second)
                return
            reduction = self._reduction_of(name)
            is_free = self._positions is not None and callable(reduction)
            axis = 0 if is_free else self.dimension.of(name, label, activation)
        except NotRecordable as reason:
            route.dtype = None
            if self.show is None and route.selection.named:
                kind = type(route.selection.module).__name__
                raise LayerError(f"layer {label!r} ({kind}) cannot be recorded: {reason}") from None
            if self.show is None:
                self.left_out.setdefault(label, str(reason))
            return
        self.left_out.pop(label, None)
        self.recorded[label] = self.taps[id(route.selection.module)]
        self.shapes.setdefault(label, tuple(activation.movedim(axis, 0).shape[1:]))
        is_reduced = isinstance(reduction, str) and reduction != "flatten"
        channels = self._channels.of(name, label, activation, axis) if is_reduced else None
        slot = slots_of(self.consumer) if self._detaches else None
        route.open(activation, axis, reduction, channels, None if slot is None else slot(label))
        # A dimension that is given for the batch as well says how many samples there are.
        if self._has_routes:
            self.samples = self.dimension.samples or None
        self.hand_over(route, activation)

    def hand_over(self, route: Route, activation: Tensor) -> None:
        """Hand an activation to the consumer. The route knows its axis with the samples."""
        if self._detaches:
            activation = activation.detach()
        try:
            with without_gradients() if self._detaches else nullcontext():
                rows = self._rows(route, activation)
        except NotRecordable as reason:
            self.left_out[route.label] = str(reason)
            return
        if route.product is not None:
            route.product(memory_order(rows) if route.reduction == "flatten" else rows)
        elif self.consumer is not None:
            self.consumer(route.label, rows if route.reduction == "flatten" else rows.flatten(1))

    def _rows(self, route: Route, activation: Tensor) -> Tensor:
        """An activation with the samples in front; features (n, P, C) if it is reduced."""
        name, label = route.selection.name, route.label
        if self._positions is not None and callable(route.reduction):
            return self._free(route.reduction, activation)
        if self._limit is not None:
            activation = activation.narrow(route.axis, 0, min(self._limit, activation.shape[route.axis]))
        if route.reduction == "flatten":
            self._padding.keeps(name, label, tuple(activation.shape))
            return activation.movedim(route.axis, 0)
        found = [] if callable(route.reduction) else self._padding.of(name, label, tuple(activation.shape))
        masks = [(mask[: self._limit], dims) for mask, dims in found]
        if self._positions is not None:
            tokens, kept = tokens_of(activation, route.axis, masks, route.channels)
            return self._positions.rows(label, tokens, kept, frozenset(id(mask) for mask, _ in found))
        masks = [(moved(mask, activation.device), dims) for mask, dims in masks]
        options: Any = {"batch_dim": route.axis, "masks": masks, "channels": route.channels}
        rows = feature_rows(activation, route.reduction, **options)
        if label not in self._vanish and route.reduction == "mean" and activation.ndim > 2 and len(rows) > 1:
            plain = activation.detach()
            apart = (plain - plain.narrow(route.axis, 0, 1)).abs()
            size, apart = (feature_rows(it, "mean", **options) for it in (plain.abs(), apart))
            self._vanish[label] = _vanishes(rows.detach(), size, apart.amax(0), torch.finfo(plain.dtype).eps)
        if self._vanish.get(label):
            raise NotRecordable(
                "it subtracts its averages, as an InstanceNorm does, and what is left of them is rounding: pass "
                "features='flatten' for it"
            )
        return rows

    def _free(self, function: Callable[[Tensor], Tensor], activation: Tensor) -> Tensor:
        """The user's function of an activation as it is, of which it may make any number of samples."""
        samples = self.dimension.samples
        if self._limit is not None and (samples is None or self._limit < samples):
            raise BatchError(
                f"only {self._limit} of {samples} samples count, and rows of the features callable cannot be cut: "
                "let max_samples= be a multiple of the batch size"
            )
        return rows_of(function, activation)


def _vanishes(rows: Tensor, size: Tensor, apart: Tensor, eps: float) -> bool:
    """Whether averages (n, 1, C) of an activation are alike for all samples, which differ, but for rounding.

    Args:
        rows: averages.
        size: averages of absolute values.
        apart: averages of how far values are from those of one sample, for that which is farthest, (1, C).
        eps: eps of the activation's dtype.
    """
    noise = 4 * eps * size
    # A norm's own averages are as exact as its input, which may have a large offset.
    return bool(((rows - rows.mean(0)).abs() <= noise + 1e-4 * apart).all() & (apart.amax() > noise.amax()))


def _refuse_vmap(activation: Tensor) -> None:
    while _functorch.is_functorch_wrapped_tensor(activation):
        if _functorch.is_batchedtensor(activation):
            raise NotRecordable(
                "ran under torch.vmap, one sample or one model at a time: choose a layer outside of it"
            )
        activation = _functorch.get_unwrapped(activation)
