"""How an activation gets from a hook to its product: what is the same in every batch is decided once.

Each hook belongs to the :class:`Tap` of a module, which counts the module's calls. Each call has one :class:`Route`
for each layer that it stands for. The first activation takes the long way: the recorder finds the tensor, the axis
with the samples and the reduction, and this is where reasons and warnings are made. The recorder then opens the
route. Later activations that differ only in their sizes go straight on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _functorch

from cka_hooks.features import Reduction, memory_order
from cka_hooks.recording import outputs
from cka_hooks.recording.layers import Selection

if TYPE_CHECKING:
    from cka_hooks.recording.long_way import LongWay

# Takes (n, P, C) features of one layer, detached.
Product = Callable[[Tensor], None]
Consumer = Callable[[str, Tensor], None]


def slots_of(consumer: Consumer | None) -> Callable[[str], Product | None] | None:
    """How a consumer hands out a product for each label; None if it has to be called with label and activation.

    A consumer is a method of an object, or an object that can be called. That object may also have a method
    ``slot(label)``. It returns a function that takes (n, P, C) features of the layer and has the same effect as
    calling the consumer, or None if only the consumer will do. A subclass that overrides only the consumer has no
    slots.
    """
    owner = getattr(consumer, "__self__", consumer)
    name = "__call__" if owner is consumer else getattr(consumer, "__name__", "")
    kind = next((kind for kind in type(owner).__mro__ if vars(kind).keys() & {name, "slot"}), object)
    return getattr(owner, "slot", None) if vars(kind).keys() >= {name, "slot"} else None


def is_input(selection: Selection) -> bool:
    """Whether the layer is the input of its module."""
    return selection.part.split(":")[0] == "input"


class Route:
    """One layer of one call of a module, from the module's output to the product of its Gram matrix.

    Attributes:
        label: label of the layer.
        selection: the choice that it belongs to.
        is_input: whether the layer is the input of the module.
        activation: finds the layer's tensor in what the module returned, or in its arguments by number or keyword.
        axis: the dimension with the samples.
        reduction: the reduction of the activation.
        channels: the dimension in which a reduction finds the channels.
        product: see :func:`slots_of`.
        dtype: dtype of the activations that take this route; None, which no activation has, while it is closed.

    Args:
        detour: takes a route and its activation on to a consumer that has no product for it, or to its reduction.
    """

    def __init__(self, label: str, selection: Selection, detour: Callable[[Route, Tensor], None]) -> None:
        self.label = label
        self.selection = selection
        self.is_input = is_input(selection)
        self._detour = detour
        self._is_whole = not selection.part
        part = selection.part.partition(":")[2] if self.is_input else selection.part
        self.activation = partial(outputs.activation_of, part=part)
        self.dtype: torch.dtype | None = None

    def open(
        self, activation: Tensor, axis: int, reduction: Reduction | str, channels: int | None, product: Product | None
    ) -> None:
        """Let activations like this one take this route from here on."""
        self.axis, self.reduction, self.channels, self.product = axis, reduction, channels, product
        self._direct = product if reduction == "flatten" else None
        self._rank, self._device, self.dtype = activation.ndim, activation.device, activation.dtype

    def __call__(self, given: Any, wanted: int | None) -> bool:
        """Hand the activation over.

        Args:
            given: what the module returned or got.
            wanted: number of samples in the batch, or None if no route may be taken.

        Returns:
            False, having done nothing, if the activation is not like the one before.
        """
        activation = given[0] if type(given) is tuple and given else given
        if not self._is_whole or type(activation) is not Tensor:
            try:
                activation = self.activation(given)
            except outputs.NotRecordable:
                return False
        if (
            activation.dtype is not self.dtype
            or activation.device != self._device
            or type(activation) is not Tensor
            or activation.layout is not torch.strided
            or activation.is_nested
            or _functorch.maybe_current_level() is not None
        ):
            return False
        if activation.ndim != self._rank or (samples := activation.shape[self.axis]) != wanted:
            return False
        if self._direct is None:
            self._detour(self, activation)
            return True
        if activation.requires_grad:
            activation = activation.detach()
        if self.axis == 0 and (
            activation.is_contiguous()
            or (self._rank == 4 and activation.is_contiguous(memory_format=torch.channels_last))
        ):
            width = activation.numel() // samples
            rows = activation.as_strided((samples, 1, width), (width, width, 1))
        elif self._rank == 3 and self.axis == 1 and activation.is_contiguous():
            rows = activation.transpose(0, 1)
        else:
            rows = memory_order(activation.movedim(self.axis, 0))
        self._direct(rows)
        return True


class Tap:
    """The hooks of one module, and the routes of each of its calls in a forward pass.

    Args:
        module: the module.
        selections: the choices that it belongs to.
        long_way: takes the activations for which no route is open.

    Attributes:
        calls: how often the module ran in this forward pass.
        ran: whether it ever ran.
        elsewhere: whether it ran in another thread.
        below: taps of modules inside this one. If one of them ran, this module is not a layer.
    """

    def __init__(self, module: nn.Module, selections: Iterable[Selection], long_way: LongWay) -> None:
        self.module = module
        self.selections = sorted(selections, key=lambda selection: selection.named)
        self.calls = 0
        self.ran = False
        self.elsewhere = False
        self.below: list[Tap] = []
        self._long_way = long_way
        self._routes: dict[int, tuple[list[Route], list[Route]]] = {}
        self._hooks = [(module._forward_hooks, self.on_output), (module._forward_pre_hooks, self.on_input)]

    def attach(self) -> None:
        """Put the hooks on."""
        self.module.register_forward_hook(self.on_output)
        if any(map(is_input, self.selections)):
            self.module.register_forward_pre_hook(self.on_input, with_kwargs=True)

    def restart(self) -> None:
        """Begin a forward pass.

        A hook that the user added after ours may change the output. Ours move behind it, to see what the next layer
        gets.
        """
        self.calls = 0
        for hooks, ours in self._hooks:
            if hooks and next(reversed(hooks.values())) != ours:
                for number in [number for number, hook in hooks.items() if hook == ours]:
                    hooks[number] = hooks.pop(number)

    def forget(self) -> None:
        """Send everything the long way once more, because there is another consumer."""
        self._routes.clear()

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record inputs before the module runs, since it may work in place."""
        if not self._long_way.concerns():
            return
        given = {**{str(number): item for number, item in enumerate(args)}, **kwargs}
        for route in self._routes_of(self.calls + 1)[1]:
            if not route(given, self._long_way.samples):
                self._long_way.go(route, given)

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Record what the module returned."""
        way = self._long_way
        # The body of `concerns`, without the call.
        if get_ident() != way.thread or _current_graph_task_id() != -1:
            self.elsewhere = self.elsewhere or way.thread not in (0, get_ident())
            return
        self.ran = True
        for tap in self.below:
            if tap.calls:
                return
        self.calls += 1
        for route in (self._routes.get(self.calls) or self._routes_of(self.calls))[0]:
            if not route(output, way.samples):
                way.go(route, output)

    def _routes_of(self, call: int) -> tuple[list[Route], list[Route]]:
        """The layers that a call stands for, from its output and from its input.

        A layer may be chosen twice, as `relu#2` and by `relu`.
        """
        if call not in self._routes:
            chosen = {s.label(call): s for s in self.selections if s.call in (None, call)}
            routes = [Route(label, selection, self._long_way.hand_over) for label, selection in chosen.items()]
            self._routes[call] = [r for r in routes if not r.is_input], [r for r in routes if r.is_input]
        return self._routes[call]


def taps_of(selections: Iterable[Selection], long_way: LongWay, *, only_leaves: bool) -> dict[int, Tap]:
    """A tap for each chosen module, by the id of the module; see :class:`Tap`.

    Args:
        only_leaves: whether to leave a module out of a pass in which a part of it ran.
    """
    chosen: dict[int, list[Selection]] = defaultdict(list)
    for selection in selections:
        chosen[id(selection.module)].append(selection)
    taps = {key: Tap(some[0].module, some, long_way) for key, some in chosen.items()}
    for tap in taps.values() if only_leaves else ():
        parts = map(id, tap.module.modules())
        tap.below = [taps[part] for part in parts if part in taps and taps[part] is not tap]
    return taps
