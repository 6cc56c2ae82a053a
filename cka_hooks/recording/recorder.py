"""`LayerRecorder`: hooks on named modules that hand over each activation, and are removed afterwards.

A hook runs before the next module does, so it hands over what the layer returned. An in-place operation further on
(the ``ReLU(inplace=True)`` after a ``bn1``) cannot have changed it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from cka_hooks.errors import LayerError, OptionError
from cka_hooks.options import Options
from cka_hooks.precision import without_gradients
from cka_hooks.recording import batches, guest
from cka_hooks.recording.batches import Given
from cka_hooks.recording.describe import Description, described, left_out
from cka_hooks.recording.layers import Layers, check_model, unwrap
from cka_hooks.recording.long_way import Features, LongWay
from cka_hooks.recording.padding import MaskOption
from cka_hooks.recording.positions import Positions
from cka_hooks.recording.routes import Consumer


class LayerRecorder:
    """Hands the activations of named layers to a consumer while the model runs.

    Inside ``with``, every forward pass of the model calls ``consumer(layer, activation)`` for each layer, in order of
    execution. The model stays as it is: its mode, its gradients and its output are not touched, and the hooks are
    removed when the block ends. :meth:`stream` runs a loader and yields copies instead. :meth:`describe` shows which
    layers there are.

    A forward pass begins when the model is called. If you call only parts of it, as Lightning does in
    ``validation_step``, say so: ``with recorder.forward_pass(batch): ...``.

    Args:
        model: any ``nn.Module``. The recorder looks through wrappers (``DistributedDataParallel``, ``DataParallel``,
            ``torch.compile``). Compiled code runs uncompiled inside the block, since hooks do not fire in it.
        layers: which layers to record, see :func:`cka_hooks.recording.layers.select_layers`. None: every leaf module
            that runs. A module counts as a leaf if none of its descendants ran.
        consumer: called as ``consumer(label, activation)`` with the samples in dimension 0. The activation is the
            layer's own tensor; copy it if you want to keep it.
        features: how to reduce each activation before it is handed over, or a mapping from layer pattern to a
            reduction; see :func:`cka_hooks.features.feature_rows`. "flatten" hands over the activation as it is.
        batch_dim: the dimension with the samples, if it is not known: one for the batch and all layers, or a mapping
            from layer pattern to dimension.
        channel_dim: the dimension with the channels in the layer's output, if a reduction needs it and it is not
            known: one for all layers, or a mapping from layer pattern to dimension.
        mask: a function of the batch that returns the mask (n, T) of its padding, bool or int, nonzero where a
            position counts; or a mapping from layer pattern to such functions. In your own loop, the batch is what
            you call the model with. None: ``attention_mask`` and ``decoder_attention_mask``.
        per: "sample", or "position" to hand over each token or pixel that is not padding as a sample, (m, C). Layers
            with other positions than the first are left out. A `features` callable then gets the layer's output and
            may return any number of rows, the same for all layers.
        positions: with ``per="position"``, how many positions of each batch to draw at random, the same for all
            layers.
        seed: seed of that draw.
        forward: ``(model, batch) -> anything``, how :meth:`stream` runs the model.
        detach: whether to detach activations from their graph. Pass False to differentiate a loss of them; a consumer
            that copies them must then keep the graph, too.

    Attributes:
        chosen: the names of the modules that `layers` chose.
        only_in_passes: whether to record nothing outside of :meth:`forward_pass`. With several recorders on one
            module, each then sees only the passes that were made for it.
        shapes: for each label, the shape of one sample when the layer was first recorded: (...) of (n, ...).
        sample_axes: for each recorded label, how the dimension with the samples is known: "named" (by `batch_dim`),
            "known" (from the kinds of all modules) or "confirmed by a probe" of the first batch.

    Raises:
        ModelError: the model is a ``ScriptModule`` or something else that hooks cannot see into.
        LayerError: an entry of `layers` matches nothing.
        OptionError: `features` is not a reduction, or ``with`` is used without a consumer.

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
        channel_dim: int | Mapping[str, int] | None = None,
        mask: MaskOption = None,
        per: str = "sample",
        positions: int | Positions | None = None,
        seed: int = 0,
        detach: bool = True,
    ) -> None:
        self.model = check_model(model)
        for name, function in {"forward(model, batch)": forward, "consumer(label, activation)": consumer}.items():
            if function is not None and not callable(function):
                raise OptionError(f"{function!r:.200} cannot be called: expected a function {name}")
        self._forward = forward
        self._by_default = layers is None
        shared = positions if isinstance(positions, Positions) else None
        options = Options.of({**locals(), "positions": None if shared else positions})
        self._way = LongWay(unwrap(model, keeps_sharded=True), shared, options, detach)
        self.chosen = [selection.name for selection in self._way.selections]
        self.consumer = consumer
        self._entered, self._managed, self._started = 0, False, False
        self._form: batches.Form | None = None
        self.only_in_passes = False
        self.shapes, self.sample_axes = self._way.shapes, self._way.dimension.evidence
        # Activations that keep their graph are for training.
        self._varying = {name: m for name, m in self._way.names.items() if detach and guest.varies_in_train_mode(m)}

    @property
    def consumer(self) -> Consumer | None:
        """Where activations are handed to."""
        return self._way.consumer

    @consumer.setter
    def consumer(self, consumer: Consumer | None) -> None:
        self._way.consumer = consumer
        for tap in self._way.taps.values():
            tap.forget()

    # Attaching

    def __enter__(self) -> LayerRecorder:
        """Put the hooks on.

        Raises:
            OptionError: there is no consumer.
            ModelError: the model is being measured in another thread.
        """
        if self.consumer is None:
            raise OptionError(
                "this LayerRecorder has nothing to hand activations to: pass consumer=, such as "
                "CKAAccumulator().observe. stream(loader) and describe(batch) need neither it nor `with`"
            )
        depth = self._entered
        try:
            guest.claim(self, self.model)
            if depth == 0:
                unwrap(self.model).register_forward_pre_hook(self._on_start, prepend=True, with_kwargs=True)
                unwrap(self.model).register_forward_hook(self._on_end)
                for module in self._way.followed:
                    module.register_forward_hook(self._way.follow, with_kwargs=True)
                for tap in self._way.taps.values():
                    tap.attach()
            self._entered = depth + 1
            self._listen()
            return self
        except BaseException:
            self._leave(depth)
            raise

    def __exit__(self, *exception: object) -> None:
        depth = self._entered - 1
        try:
            self._leave(depth)
        finally:
            self._leave(depth)
        # An accumulator keeps the reasons for its result.
        skips = getattr(getattr(self.consumer, "__self__", None), "skips", None)
        if skips is not None and self._started:
            skips(self.skipped)

    def _leave(self, depth: int) -> None:
        """Leave until entered only `depth` times. A second call is harmless: Ctrl-C may cut the first short."""
        if depth <= 0:
            guest.remove_hooks(self._way.names.values(), self, self._way, *self._way.taps.values())
            self._managed = False
            guest.release(self)
        self._entered = max(0, depth)
        self._listen()

    def _listen(self) -> None:
        """Record the calls of this thread if any are to be recorded now."""
        self._way.thread = get_ident() if self._entered and (self._managed or not self.only_in_passes) else 0

    # One forward pass

    def forward_pass(self, batch: Any, *, limit: int | None = None) -> AbstractContextManager[None]:
        """A minibatch whose samples and padding are read from the batch, not from the model's arguments.

        Inside the block, every call of a module counts towards ``name#2``, even if the model is called repeatedly.

        Args:
            batch: what the loader yielded.
            limit: how many samples to hand over, from the first one on.
        """
        return self._pass(self._given(batch, None), limit)

    def run(self, batch: Any, *, limit: int | None = None, number: int | None = None) -> Any:
        """Run the model on a minibatch: :meth:`confirm` if that is due, then a :meth:`forward_pass`.

        Args:
            batch: what the loader yielded.
            limit: how many samples to hand over, from the first one on.
            number: number of the batch, counted from 0, for messages.

        Returns:
            What the model returned.

        Raises:
            BatchError: the model cannot be called with the batch.
            LayerError: a layer that was asked for by name cannot be recorded.
        """
        with self._pass(self._given(batch, self._call), limit):
            return self._call(batch, number)

    def confirm(self, batch: Any) -> None:
        """Find out from the first batch what the kinds of modules do not say. :meth:`run` does this when it is due.

        The model runs on a few samples of the batch and on one fewer, to see which dimensions follow. If this does
        not decide it, the model runs on the whole batch as it is and in another order. If the batch has a mask, the
        model also runs on fewer positions. Afterwards the model, its attributes and all random states are as before.

        Raises:
            BatchError: a module with ``batch_first=False`` gets its samples in dimension 0.
        """
        self._way.begin(self._given(batch, self._call), None)

    def _given(self, batch: Any, call: Callable[[Any], Any] | None) -> Given:
        if self._form is None:
            self._form = batches.Form.of(batch)
        value = self._form.input_of(batch) if self._forward is None else None
        return Given(batch, batch, self._form, self._form.shape(batch), value, call)

    def _call(self, batch: Any, number: int | None = None) -> Any:
        return batches.call(unwrap(self.model, keeps_sharded=True), batch, self._forward, self._form, number)

    @contextmanager
    def _pass(self, given: Given, limit: int | None) -> Iterator[None]:
        """Whatever the model's calls are in here, they belong to one pass."""
        self._start(given, limit)
        before, self._managed = self._managed, True
        try:
            self._listen()
            yield
        finally:
            self._managed = before
            self._listen()
        self._way.warn()

    def _on_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._managed and self._way.show is None and self._way.concerns():
            self._start(Given.of_call(module, args, kwargs), None)

    def _on_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._managed and self._way.show is None and self._way.concerns():
            self._way.warn()

    def _start(self, given: Given, limit: int | None) -> None:
        self._started = True
        if self._varying and not self.only_in_passes and guest.warned_of_train_mode(self._varying):
            self._varying = {}
        self._way.begin(given, limit)
        self._way.restart()

    @property
    def skipped(self) -> dict[str, str]:
        """Layers that were chosen and not recorded, each with the reason as a sentence."""
        others = left_out(self._way.taps, by_default=self._by_default) if self._started else {}
        return {**self._way.left_out, **others}

    # Running a loader

    def stream(self, loader: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
        """Run the model over a loader and yield ``{layer: activation}``, one dict per batch, in order.

        The activations are copies on the model's device, samples in dimension 0. They are ordinary tensors, and
        nothing that happens later changes them. The model runs in eval mode and without gradients. Whenever your code
        has control, the model is as it was.

        Args:
            loader: anything that yields batches, see :func:`cka_hooks.recording.batches.arguments`.

        Raises:
            OptionError: the loader is a data set, a sampler, or one batch.
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
        batches.check_loader(loader)
        random_stream, end = guest.RandomStream(), object()
        with random_stream:
            iterator = iter(loader)
        while True:
            with random_stream:
                batch = next(iterator, end)
            if batch is end:
                return
            yield self._run(batch, _copy, random_stream)

    def describe(self, batch: Any) -> Description:
        """A table of the layers that a run over such batches would compare, to look at before a long run.

        This takes one forward pass. The model and torch's random state are as before.

        Args:
            batch: a batch from your loader.

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
            3 layers, 1.54 k features per sample, 4 samples
        """
        shapes = self._run(batch, lambda activation: tuple(activation.shape), guest.RandomStream())
        return described(shapes, self._way.recorded, self.skipped)

    def _run(self, batch: Any, keep: Callable[[Tensor], Any], random_stream: guest.RandomStream) -> dict[str, Any]:
        """Run the model on one batch, past the recorder's own consumer, and keep something of each activation."""
        kept: dict[str, Any] = {}
        before, depth, visit = self.consumer, self._entered, guest.untouched(unwrap(self.model, keeps_sharded=True))
        with_gradients = torch.is_grad_enabled()
        try:
            self.consumer = lambda layer, activation: kept.update({layer: keep(activation)})
            with random_stream, visit, self, torch.no_grad():
                self.run(batch)
        finally:
            # Needed if Ctrl-C arrives in the first instant of leaving.
            self._leave(depth)
            visit.__exit__(None, None, None)
            torch.set_grad_enabled(with_gradients)
            self.consumer = before
        if not kept:
            raise LayerError(nothing_ran(self.skipped))
        return kept


def _copy(activation: Tensor) -> Tensor:
    """A copy of an activation, which may change after the hook."""
    # A tensor made in inference mode could not be used in autograd later.
    with without_gradients():
        return activation.clone()


def nothing_ran(skipped: Mapping[str, str]) -> str:
    """The message for a forward pass that recorded no layer at all."""
    reasons = "; ".join(f"{layer!r} {reason}" for layer, reason in list(skipped.items())[:5])
    return f"none of the chosen layers was recorded: {reasons or 'the model called none of its modules'}"
