"""Which dimension of an activation has the samples, and which one its channels. Looks at shapes, never at values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from cka_hooks.errors import BatchError
from cka_hooks.features import Layout
from cka_hooks.names import PerLayer
from cka_hooks.recording.outputs import INPUT, NotRecordable, tensors_in
from cka_hooks.recording.probe import Run, Take, sample_dimensions
from cka_hooks.recording.routes import Place
from cka_hooks.recording.snapshot import Snapshot

_CHANNELS_FIRST: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_SPATIAL = tuple(kind for kind in _CHANNELS_FIRST if kind is not nn.GroupNorm)
_ELEMENTWISE = (
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Identity, nn.modules.dropout._DropoutNd),
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if name not in ("GLU", "MultiheadAttention")),
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
# Classes of torchvision and timm that permute to channels last and back, or have no base class of torch's.
_CHANNELS_FIRST_NAMES = frozenset({"LayerNorm2d", "RmsNorm2d", "SimpleNorm2d", "FrozenBatchNorm2d"})
_SELF_ATTENTIVE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


NAMED, KNOWN, PROBED = "named", "known", "confirmed by a probe"


class SampleDimension:
    """Which dimension has the samples: named, known from the kinds of all modules, or confirmed by a probe.

    Args:
        names: the model's modules.
        batch_dim: the dimension for every layer and for the batch itself, or a mapping from layer pattern to it.

    Attributes:
        samples: in the batch that is under way, None where nothing says it.
        found: label -> the dimension that a probe confirmed, None where there is none, or why it is not known.
        is_settled: whether that was found out, or needs not be.
        is_plain: whether dimension 0 has the samples everywhere by the kinds of all modules.
        evidence: label -> how the dimension was found, of layers that have one.
    """

    def __init__(self, names: Mapping[str, nn.Module], batch_dim: int | Mapping[str, int] | None) -> None:
        self._given = PerLayer(batch_dim, names, "batch_dim")
        self._everywhere = isinstance(batch_dim, int)
        self._sequence_first = {name: module for name, module in names.items() if _wants_second(module)}
        self._second = {id(part) for module in self._sequence_first.values() for part in _parts(module)}
        self.samples: int | None = None
        self.found: dict[str, int | str | None] = {}
        self.is_settled = self._everywhere
        self.is_plain = False
        self.evidence: dict[str, str] = {}

    def start(self, samples: int | None) -> None:
        """A forward pass of that many samples."""
        self.samples = None if self._everywhere else samples

    def of(self, name: str, label: str, shape: tuple[int, ...]) -> int:
        """The dimension of `shape` that has the samples.

        Raises:
            NotRecordable: there is none, or it is not known.
        """
        given = self._given.of(name, None)
        if given is not None:
            dim, how = self._checked(given, shape), NAMED
        elif self.is_plain:
            dim, how = self._confirmed(0, shape), KNOWN
        elif not self.found and not self.is_settled:
            raise NotRecordable(
                "has its samples in a dimension that nothing confirmed, since only parts of the model were called: "
                "give batch_dim=, or use compare() or Comparison, which run all of it on a part of the batch first"
            )
        else:
            found = self.found.get(label, "was not reached by the probe of the first batch")
            if isinstance(found, str):
                raise NotRecordable(f"{found} (batch_dim= names the dimension with the samples)")
            dim, how = self._confirmed(found, shape), PROBED
        self.evidence[label] = how
        return dim

    def _checked(self, given: int, shape: tuple[int, ...]) -> int:
        if -len(shape) <= given < len(shape):
            if self.samples is None:
                self.samples = shape[given]
            if shape[given] == self.samples:
                return given % len(shape)
        raise NotRecordable(
            f"batch_dim={given} of its shape {shape} does not have the {self.samples} samples of the batch"
        )

    def _confirmed(self, dim: int | None, shape: tuple[int, ...]) -> int:
        samples = self.samples
        if dim is not None and dim < len(shape) and shape[dim] == samples:
            return dim
        if not shape:
            raise NotRecordable("no dimension: it returned a single number, without a batch dimension")
        why = ""
        if samples and shape[0] > samples and shape[0] % samples == 0:
            why = f": {shape[0] // samples} windows, heads or beams of each are folded into dimension 0"
        elif shape[0] == 1:
            why = ": it is the same for all of them"
        elif dim is not None:
            why = f": they were confirmed in dimension {dim}"
        raise NotRecordable(
            f"no dimension of its shape {shape} has the {samples} samples of the batch{why} (batch_dim= names it)"
        )

    def is_second(self, module: nn.Module, place: Place) -> bool:
        """Whether PyTorch's documentation of a module puts the samples in dimension 1."""
        if place == "further output":
            # Hidden states are (layers, n, d) whatever batch_first says; attention weights are (n, ...) always.
            return isinstance(module, nn.RNNBase)
        return id(module) in self._second

    def confirm(self, run: Run, snapshot: Snapshot, batch: Any, shape: tuple[int, ...], *, always: bool) -> None:
        """Find out by a probe what nothing names; see :func:`cka_hooks.recording.probe.sample_dimensions`.

        Args:
            shape: of the batch, samples first.

        Raises:
            BatchError: a module with ``batch_first=False`` gets its samples in dimension 0: either the loader or the
                module is not what its user thinks.
        """
        inputs: dict[str, tuple[int, ...]] = {}

        def run_and_look(part: Any, take: Take) -> None:
            def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                tensor = next(tensors_in((args, kwargs)), None)
                if tensor is not None and tensor.ndim > 2 and tensor.is_floating_point():
                    inputs.setdefault(name, tuple(tensor.shape))
                    take(_input_of(name), tensor, False)

            with ExitStack() as stack:
                for name, module in self._sequence_first.items():
                    hook = module.register_forward_pre_hook(
                        lambda module, args, kwargs, name=name: look(name, args, kwargs),
                        with_kwargs=True,
                    )
                    stack.callback(hook.remove)
                run(part, take)

        self.found, problem = sample_dimensions(run_and_look, snapshot, batch, shape[0], always=always)
        # Where the model cannot run on the whole batch, the next one may do.
        self.is_settled = problem is None
        for name, seen in inputs.items():
            if self.found.get(_input_of(name)) == 0:
                kind = type(self._sequence_first[name]).__name__
                raise BatchError(
                    f"a batch of shape {shape} is taken for {shape[0]} samples, and {kind} {name!r} with "
                    f"batch_first=False takes it for {seen[1]}: give batch_dim=1 where the loader is right, else "
                    "build the module with batch_first=True"
                )


def _input_of(name: str) -> str:
    # No layer has this label.
    return f"{name}:{INPUT} "


def _wants_second(module: nn.Module) -> bool:
    if isinstance(module, _SELF_ATTENTIVE):
        return module.self_attn.batch_first is False
    return getattr(module, "batch_first", None) is False


def _parts(module: nn.Module) -> list[nn.Module]:
    """A module with the samples in dimension 1, and what is in it and does not say otherwise."""
    return [part for part in module.modules() if getattr(part, "batch_first", False) is False]


def plain_rank(module: nn.Module, rank: int) -> int | None:
    """How many dimensions a module makes of an (n, ...) tensor of `rank`, None unless it surely keeps the samples.

    Known are torch's convolutions, linear layers, norms, pools, activations, dropouts and ``Flatten``, and a
    ``Sequential`` of them. In the ``forward`` of any other module anything may happen in between.
    """
    kind = type(module)
    if kind is nn.Sequential:
        after: int | None = rank
        for part in module.children():
            after = None if after is None else plain_rank(part, after)
        return after
    if not kind.__module__.startswith("torch.nn.modules.") or "forward" in vars(module) or rank < 2:
        return None
    if isinstance(module, nn.Flatten):
        return rank - (module.end_dim % rank - module.start_dim) if module.start_dim > 0 else None
    if isinstance(module, nn.Embedding):
        return rank + 1
    if isinstance(module, _SPATIAL):
        # These take one sample without a batch, too, and then dimension 0 has something else.
        spatial = int(kind.__name__[-2])
        return rank if rank == spatial + 2 or (rank == 2 and isinstance(module, nn.BatchNorm1d)) else None
    return rank if isinstance(module, _ELEMENTWISE) else None


class ChannelDimension:
    """Where the channels of activations are: known behind some modules, and as before behind all others.

    Known for each number of dimensions by itself: tokens made of images say nothing about images.
    """

    def __init__(self) -> None:
        self._layouts: dict[int, Layout] = {}

    def pass_through(self, module: nn.Module, output: object) -> None:
        """A module has run."""
        if isinstance(output, Tensor):
            layout = layout_of(module)
            if layout is not None:
                self._layouts[output.ndim] = layout
            elif type(module).__name__ == "Permute":
                self._layouts.pop(output.ndim, None)

    def of(self, activation: Tensor) -> Layout | None:
        """The layout of an activation that was just returned, None where nothing is known of it."""
        return self._layouts.get(activation.ndim)


def layout_of(module: nn.Module) -> Layout | None:
    """Where a module's output has its channels, None for modules that keep them where they are."""
    kind: type = type(module)
    return _layout_of_class(kind)


# Hooks ask this in every forward pass.
@lru_cache(maxsize=1024)
def _layout_of_class(kind: type) -> Layout | None:
    if {cls.__name__ for cls in kind.__mro__} & _CHANNELS_FIRST_NAMES or issubclass(kind, _CHANNELS_FIRST):
        return "first"
    # GPT-2's Conv1D is a linear layer.
    if issubclass(kind, _CHANNELS_LAST) or kind.__name__ == "Conv1D":
        return "last"
    return None


def matters(module: nn.Module) -> bool:
    """Whether a module tells where channels are, or moves them."""
    return layout_of(module) is not None or type(module).__name__ == "Permute"
