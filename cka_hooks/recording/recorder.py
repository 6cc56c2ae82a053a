"""`LayerRecorder`: hooks on named modules, each activation handed over inside its hook, hooks off again.

A hook runs before the next module does, so what it hands over is what the layer returned: an in-place
operation further on (the ``ReLU(inplace=True)`` after a ``bn1``) cannot have changed it yet.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle

from cka_hooks.errors import CKAWarning, LayerError
from cka_hooks.features import Layout, Reduction, check_reduction, feature_rows
from cka_hooks.names import PerLayer
from cka_hooks.precision import without_gradients
from cka_hooks.recording import axes, batches, outputs
from cka_hooks.recording.describe import Description, described
from cka_hooks.recording.guest import RandomStream, runnable, untouched
from cka_hooks.recording.layers import (
    ROOT,
    Layers,
    Selection,
    check_model,
    named_layers,
    select_layers,
    unwrap,
)

Consumer = Callable[[str, Tensor], None]
Features = Reduction | str | Mapping[str, Reduction | str]


class LayerRecorder:
    """Hands what named layers of a model return to a consumer, while they run.

    Inside ``with`` every forward pass of the model calls ``consumer(layer, activation)`` for each layer, in
    order of execution. The model is not changed: its mode and gradients are its user's, its output is its
    own, and when the block ends the hooks are gone. :meth:`stream` runs a loader and yields copies instead,
    :meth:`describe` shows which layers there are.

    A forward pass begins when the model is called. Where only parts of it are called, as Lightning does in its
    ``validation_step``, say so: ``with recorder.forward_pass(batch): ...``.

    Args:
        model: any ``nn.Module``. Wrappers (``DistributedDataParallel``, ``DataParallel``, ``torch.compile``) are
            looked through; compiled code runs uncompiled inside the block, since hooks do not fire in it.
        layers: which layers, see :func:`cka_hooks.recording.layers.select_layers`. None: every leaf module that runs,
            where a module none of whose descendants ran counts as a leaf.
        consumer: called as ``consumer(label, activation)`` with the samples in dimension 0. The activation
            is the layer's own tensor: whoever keeps it must copy it.
        features: a reduction of each activation before it is handed over, or a mapping from layer pattern
            to one; see :func:`cka_hooks.features.feature_rows`. "flatten" hands over the activation as it is.
        batch_dim: the dimension with the samples where it cannot be told: for the batch and all layers, or a
            mapping from layer pattern to it.
        forward: ``(model, batch) -> anything``, how :meth:`stream` runs the model.

    Attributes:
        only_in_passes: record nothing outside of :meth:`forward_pass`, so that of several recorders on one module
            each sees the passes that were made for it.
        shapes: label -> the shape of one sample, (...) of (n, ...), when the layer was first recorded.

    Raises:
        ModelError: a ``ScriptModule`` or something else that hooks cannot see into.
        LayerError: an entry of `layers` that matches nothing.
        OptionError: `features` is no reduction.

    Example:
        >>> import torch
        >>> from cka_hooks import LayerRecorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True), torch.nn.Linear(3, 2))
        >>> shapes = {}
        >>> with LayerRecorder(model, consumer=lambda layer, activation: shapes.update({layer: activation.shape})):
        ...     _ = model(torch.randn(8, 4))
        >>> shapes["1"], list(shapes)
        (torch.Size([8, 3]), ['0', '1', '2'])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        consumer: Consumer | None = None,
        *,
        features: Features = "flatten",
        batch_dim: int | Mapping[str, int] | None = None,
        forward: batches.Forward | None = None,
    ) -> None:
        self.model = check_model(model)
        self.consumer = consumer
        self._forward = forward
        self._by_default = layers is None
        self._selections: dict[int, list[Selection]] = defaultdict(list)
        self._chosen_before: dict[tuple[int, int, bool], dict[str, Selection]] = {}
        for selection in select_layers(model, layers):
            self._selections[id(selection.module)].append(selection)
        names = named_layers(model)
        self._features = PerLayer(features, names, "features")
        for reduction in self._features.values:
            check_reduction(reduction)
        self._dimension = axes.SampleDimension(names, batch_dim)
        self._channels = axes.ChannelDimension()
        self._above: dict[int, set[int]] = defaultdict(set)
        for module in names.values():
            for child in module.modules():
                if child is not module:
                    self._above[id(child)].add(id(module))
        pools = any(reduction != "flatten" for reduction in self._features.values)
        self._channel_modules = [m for m in {id(m): m for m in names.values()}.values() if pools and axes.matters(m)]
        self._handles: list[RemovableHandle] = []
        self._entered = 0
        self._leaving = ExitStack()
        self._left_out: dict[str, str] = {}
        self._recorded: dict[str, nn.Module] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ever_ran: set[int] = set()
        self._started = False
        self.only_in_passes = False
        self._managed = False
        self._warned_of_padding = False
        self._start((), None, None)
        self._started = False

    # Attaching

    def __enter__(self) -> LayerRecorder:
        if self._entered == 0:
            self._leaving = ExitStack()
            try:
                self._attach()
            except BaseException:
                self._leaving.close()
                raise
        self._entered += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._leaving.close()

    def _attach(self) -> None:
        # Whoever compiled something has imported this module; importing it for others takes seconds.
        if "torch._dynamo" in sys.modules:
            self._leaving.enter_context(torch.compiler.set_stance("force_eager"))
        self._leaving.callback(self._detach)
        root = unwrap(self.model)
        start = root.register_forward_pre_hook(self._on_start, prepend=True, with_kwargs=True)
        self._leaving.callback(start.remove)
        for module in self._dimension.sequence_first:
            check = module.register_forward_pre_hook(self._on_sequence_first, with_kwargs=True)
            self._leaving.callback(check.remove)
        for module in self._channel_modules:
            if id(module) not in self._selections:
                follow = module.register_forward_hook(self._on_channels)
                self._leaving.callback(follow.remove)
        for selections in self._selections.values():
            module = selections[0].module
            self._handles.append(module.register_forward_hook(self._on_output, with_kwargs=True))
            if any(_is_input(selection) for selection in selections):
                self._handles.append(module.register_forward_pre_hook(self._on_input, with_kwargs=True))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # One forward pass

    @contextmanager
    def forward_pass(self, batch: Any, *, limit: int | None = None) -> Iterator[None]:
        """One minibatch, whose samples and padding are read off the batch and not off the model's arguments.

        Inside it, every call of a module counts towards ``name#2``, also if the model is called repeatedly.

        Args:
            batch: what the loader yielded.
            limit: hand over only that many samples, the first ones.
        """
        inputs = batch[:1] if isinstance(batch, tuple | list) and not batches.is_image_list(batch) else [batch]
        self._start(batches.leading_shape(*inputs, batch), batch, limit)
        self._managed = True
        try:
            yield
        finally:
            self._managed = False

    def _on_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._managed:
            self._start(batches.leading_shape(*args, kwargs), kwargs, None)

    def _on_sequence_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_ignored():
            self._dimension.check_input(module, axes.first_tensor(args, kwargs))

    def _on_channels(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._channels.pass_through(module, output)

    def _start(self, shape: tuple[int, ...], batch: Any, limit: int | None) -> None:
        self._started = True
        self._dimension.start(shape[0] if shape else None, shape)
        self._limit = limit
        self._masks = batches.attention_masks(batch)
        self._calls: Counter[int] = Counter()
        self._not_leaf: set[int] = set()
        self._channels = axes.ChannelDimension()
        # A hook that the user added after ours may change the output: run behind it, and see what the next
        # layer gets.
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            if hooks and handle.id in hooks and next(reversed(hooks)) != handle.id:
                hooks[handle.id] = hooks.pop(handle.id)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_ignored():
            return
        # Before the module runs, since it may work in place.
        call = self._calls[id(module)] + 1
        for label, selection in self._chosen(module, call, is_input=True).items():
            self._hand_over(label, selection, args, kwargs, None)

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._is_ignored():
            return
        key = id(module)
        self._ever_ran.add(key)
        self._channels.pass_through(module, output)
        if self._by_default:
            if key in self._not_leaf:
                return
            self._not_leaf |= self._above[key]
        self._calls[key] += 1
        for label, selection in self._chosen(module, self._calls[key], is_input=False).items():
            self._hand_over(label, selection, args, kwargs, output)

    def _is_ignored(self) -> bool:
        return self.only_in_passes and not self._managed

    def _chosen(self, module: nn.Module, call: int, is_input: bool) -> dict[str, Selection]:
        """The layers that one call of a module is, by label: one may be chosen twice, as `relu#2` and by `relu`."""
        key = id(module), call, is_input
        if key not in self._chosen_before:
            chosen = [
                selection
                for selection in self._selections[id(module)]
                if (selection.calls is None or call in selection.calls) and _is_input(selection) == is_input
            ]
            in_order = sorted(chosen, key=lambda selection: selection.named)
            self._chosen_before[key] = {selection.label(call): selection for selection in in_order}
        return self._chosen_before[key]

    def _hand_over(
        self, label: str, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        try:
            activation, dim = self._with_samples(label, selection, args, kwargs, output)
        except outputs.NotRecordable as reason:
            if selection.named:
                raise LayerError(
                    f"layer {label!r} ({type(selection.module).__name__}) cannot be recorded: {reason}"
                ) from None
            self._left_out.setdefault(label, str(reason))
            return
        self._left_out.pop(label, None)
        self._recorded[label] = selection.module
        activation = activation.detach()
        channels = self._channels.of(activation)
        if dim != 0:
            activation = activation.movedim(dim, 0)
        self.shapes.setdefault(label, tuple(activation.shape[1:]))
        if self._limit is not None:
            activation = activation[: self._limit]
        reduced = self._reduced(selection.name, activation, channels)
        if self.consumer is not None:
            self.consumer(label, reduced)

    def _reduced(self, name: str, activation: Tensor, channels: Layout | None) -> Tensor:
        features = self._features.of(name, "flatten")
        mask = self._masks(name)
        if mask is not None:
            mask = mask[: self._limit]
        if features == "flatten":
            self._warn_of_padding(activation, mask)
            return activation
        with without_gradients():
            if mask is not None:
                mask = mask.to(activation.device, non_blocking=True)
            return feature_rows(activation, features, mask=mask, channels=channels).flatten(1)

    def _warn_of_padding(self, activation: Tensor, mask: Tensor | None) -> None:
        """Say so once where padding is taken for data. A mask on an accelerator is not looked at: that would wait."""
        if self._warned_of_padding or mask is None or mask.device.type != "cpu":
            return
        if activation.ndim > 2 and mask.shape[1] in activation.shape[1:] and not bool((mask != 0).all()):
            self._warned_of_padding = True
            warnings.warn(
                "the batch's attention mask has zeros, and features='flatten' keeps what stands there as data: "
                "use features='mean', 'token' or 'last' to leave padding out",
                CKAWarning,
                stacklevel=2,
            )

    def _with_samples(
        self, label: str, selection: Selection, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, int]:
        """The activation and the dimension that has the samples; NotRecordable where there is none."""
        is_input = _is_input(selection)
        if is_input:
            found = iter([outputs.input_of(args, kwargs, selection.part.removeprefix(outputs.INPUT)[1:])])
        else:
            found = outputs.activations_of(output, selection.part)
        leading = next(outputs.tensors_in(output), None)
        problem = None
        for activation in found:
            place: axes.Place = "input" if is_input else "output" if activation is leading else "further output"
            try:
                shape = tuple(activation.shape)
                return activation, self._dimension.of(selection.name, label, selection.module, shape, place)
            except outputs.NotRecordable as reason:
                problem = problem or reason
        assert problem is not None
        raise problem

    # What was left out

    @property
    def skipped(self) -> dict[str, str]:
        """Layers that were chosen and not recorded, with the reason: label -> sentence."""
        skipped = dict(self._left_out)
        for selection in (s for selections in self._selections.values() for s in selections):
            for other in selection.also:
                skipped[selection.label(1, other)] = f"is the same module as {selection.name!r}"
        if not self._started:
            return skipped
        ran = {id(m): name for name, m in reversed(named_layers(self.model).items()) if id(m) in self._ever_ran}
        for key, selections in self._selections.items():
            if key in self._ever_ran:
                for selection in selections:
                    if selection.calls is not None and not selection.calls & set(range(1, self._calls[key] + 1)):
                        skipped[selection.label(min(selection.calls))] = f"was called {self._calls[key]} time(s)"
                continue
            for selection in selections:
                has_children = next(selection.module.children(), None) is not None
                if self._by_default and (has_children or selection.name == ROOT):
                    continue
                skipped[selection.label(1)] = self._why_it_did_not_run(selection, ran)
        return skipped

    def _why_it_did_not_run(self, selection: Selection, ran: Mapping[int, str]) -> str:
        above = [ran[other] for other in self._above[id(selection.module)] if ran.get(other, ROOT) != ROOT]
        silent = max(above, key=len, default=None)
        parent, _, own = selection.name.rpartition(".")
        if silent is None and own == "out_proj" and isinstance(selection.module, NonDynamicallyQuantizableLinear):
            silent = parent
        return (
            f"did not run: {silent!r} did its work without calling it"
            if silent
            else "did not run in the forward pass"
        )

    # Running a loader

    def stream(self, loader: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
        """Run the model over a loader and yield ``{layer: activation}``, one dict a batch, in order.

        The activations are copies on the model's device, samples in dimension 0: nothing that happens later
        changes them, and they are ordinary tensors. The model runs in eval mode and without gradients, and is
        as it was whenever the caller has control.

        Args:
            loader: anything that yields batches, see :func:`cka_hooks.recording.batches.arguments`.

        Raises:
            LayerError: none of the chosen layers ran.
            BatchError: the model cannot be called with a batch.

        Example:
            >>> import torch
            >>> from cka_hooks import LayerRecorder
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
            >>> loader = torch.utils.data.DataLoader(torch.randn(10, 4), batch_size=5)
            >>> [activations["0"].shape for activations in LayerRecorder(model).stream(loader)]
            [torch.Size([5, 3]), torch.Size([5, 3])]
        """
        random_stream = RandomStream()
        with random_stream:
            iterator = iter(loader)
        while True:
            with random_stream:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            copies = _Copies()
            self._run(batch, copies.take, random_stream)
            yield dict(copies)

    def describe(self, batch: Any) -> Description:
        """The table of layers that a run over such batches would compare: see it before a long run.

        One forward pass; the model, and torch's random state, are as before.

        Args:
            batch: what a loader yields.

        Raises:
            LayerError: none of the chosen layers ran.
            BatchError: the model cannot be called with the batch.

        Example:
            >>> import torch
            >>> from cka_hooks import LayerRecorder
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
            >>> print(LayerRecorder(model).describe(torch.randn(4, 3, 10, 10)))
            layer  type     calls   output  features   cost
            -----  -------  -----  -------  --------  -----
            0      Conv2d       1  4x8x8x8       512  33.3%
            1      ReLU         1  4x8x8x8       512  33.3%
            2      Flatten      1    4x512       512  33.3%
            3 layers, 1.5 k features per sample, 4 samples
        """
        shapes: dict[str, tuple[int, ...]] = {}

        def take(layer: str, activation: Tensor) -> None:
            shapes[layer] = tuple(activation.shape)

        self._run(batch, take, RandomStream())
        modules = {layer: self._recorded[layer] for layer in shapes}
        return described(
            shapes,
            {layer: type(module).__name__ for layer, module in modules.items()},
            {layer: self._calls[id(module)] for layer, module in modules.items()},
            self.skipped,
        )

    def _run(self, batch: Any, consumer: Consumer, random_stream: RandomStream) -> None:
        """One batch through the model, to another consumer than the recorder's own."""
        model = runnable(self.model)
        ran = False

        def take(layer: str, activation: Tensor) -> None:
            nonlocal ran
            ran = True
            consumer(layer, activation)

        before, self.consumer = self.consumer, take
        try:
            with random_stream, untouched(model), self, self.forward_pass(batch), torch.no_grad():
                batches.call(model, batches.to_device(batch, batches.device_of(model)), self._forward)
        finally:
            self.consumer = before
        if not ran:
            raise LayerError(nothing_ran(self.skipped))


def _is_input(selection: Selection) -> bool:
    return selection.part.split(":")[0] == outputs.INPUT


class _Copies(dict[str, Tensor]):
    """A consumer that keeps copies: what it was given may change behind the hook."""

    def take(self, layer: str, activation: Tensor) -> None:
        # A tensor made in inference mode could not be used in autograd later.
        with without_gradients():
            self[layer] = activation.clone()


def nothing_ran(skipped: Mapping[str, str]) -> str:
    """The message where a forward pass recorded no layer at all."""
    reasons = "; ".join(f"{layer!r} {reason}" for layer, reason in list(skipped.items())[:5])
    return f"none of the chosen layers was recorded: {reasons or 'the model called none of its modules'}"
