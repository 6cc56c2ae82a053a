"""Which dimension of an activation has the samples, and which one its channels. Looks at shapes, never at values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from cka_hooks.errors import BatchError, CKAWarning
from cka_hooks.features import Layout
from cka_hooks.names import PerLayer
from cka_hooks.recording.outputs import NotRecordable

Place = Literal["output", "further output", "input"]

_CHANNELS_FIRST: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
# Classes of torchvision and timm that permute to channels last and back, or have no base class of torch's.
_CHANNELS_FIRST_NAMES = frozenset({"LayerNorm2d", "RmsNorm2d", "SimpleNorm2d", "FrozenBatchNorm2d"})
_SELF_ATTENTIVE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class SampleDimension:
    """Finds the dimension with the samples: given, or known from the module's kind, or told from sizes.

    Args:
        names: the model's modules.
        batch_dim: the dimension for every layer and for the batch itself, or a mapping from layer pattern to it.
    """

    def __init__(self, names: Mapping[str, nn.Module], batch_dim: int | Mapping[str, int] | None) -> None:
        self._given = PerLayer(batch_dim, names, "batch_dim")
        self._everywhere = isinstance(batch_dim, int)
        self.sequence_first = [module for module in names.values() if _wants_second(module)]
        self._second = {id(part) for module in self.sequence_first for part in _parts(module)}
        self._decided: dict[str, int] = {}
        self._warned = False
        self.samples: int | None = None
        self._batch: tuple[int, ...] = ()

    def start(self, samples: int | None, batch: tuple[int, ...]) -> None:
        """A forward pass of that many samples; `batch` is the shape of the batch's first tensor."""
        self.samples = None if self._everywhere else samples
        self._batch = batch

    def of(self, name: str, label: str, module: nn.Module, shape: tuple[int, ...], place: Place) -> int:
        """The dimension of `shape` that has the samples.

        A layer's dimension is decided once: where two have the same size in one batch, another batch tells.

        Raises:
            NotRecordable: there is none, or it cannot be told.
        """
        given = self._given.of(name, None)
        if given is not None:
            return self._checked(given, shape)
        if self.samples is None:
            if not shape:
                raise NotRecordable("returned a single number, without a batch dimension")
            return 0
        dim = self._told(label, module, shape, place)
        before = self._decided.setdefault(label, dim)
        if before == dim:
            return dim
        if before < len(shape) and shape[before] == self.samples:
            return before
        raise NotRecordable(
            f"had its samples in dimension {before} of an earlier batch, and in this one of shape {shape} dimension "
            f"{dim} has {self.samples} of them (batch_dim= names the right one)"
        )

    def _checked(self, given: int, shape: tuple[int, ...]) -> int:
        if -len(shape) <= given < len(shape):
            if self.samples is None:
                self.samples = shape[given]
            if shape[given] == self.samples:
                return given % len(shape)
        raise NotRecordable(
            f"batch_dim={given} of its shape {shape} does not have the {self.samples} samples of the batch"
        )

    def _told(self, label: str, module: nn.Module, shape: tuple[int, ...], place: Place) -> int:
        channels = _channel_dim(module, shape) if place == "output" else None
        fitting = [dim for dim, size in enumerate(shape) if size == self.samples and dim != channels]
        if 1 in fitting and self._is_second(module, place):
            return 1
        if 0 in fitting and self._may_be_positions(module, shape):
            raise NotRecordable(
                f"may be an embedding of positions, of which the batch of shape {self._batch} has as many as samples "
                "(batch_dim= says that these are samples; so does a batch of another size)"
            )
        if 0 in fitting:
            is_known = place == "further output" and isinstance(module, nn.MultiheadAttention)
            if 1 in fitting and len(shape) > 2 and self.sequence_first and not is_known:
                self._warn_of_squares(label, shape)
            return 0
        samples = self.samples
        if len(fitting) == 1 and not self._is_folded(shape):
            return fitting[0]
        if not fitting:
            found = "no dimension"
        elif len(fitting) == 1:
            found = f"dimension {fitting[0]}, which may be so by chance,"
        else:
            found = f"dimensions {fitting}, and not dimension 0,"
        why = ""
        if shape and samples and shape[0] > samples and shape[0] % samples == 0:
            why = f": {shape[0] // samples} windows, heads or beams of each are folded into dimension 0"
        elif shape and shape[0] == 1:
            why = ": it is the same for all of them"
        raise NotRecordable(
            f"{found} of its shape {shape} has the {samples} samples of the batch{why} (batch_dim= names it)"
        )

    def _is_second(self, module: nn.Module, place: Place) -> bool:
        """Whether PyTorch's documentation of a module puts the samples in dimension 1."""
        if place == "further output":
            # Hidden states are (layers, n, d) whatever batch_first says; attention weights are (n, ...) always.
            return isinstance(module, nn.RNNBase)
        return id(module) in self._second

    def _may_be_positions(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether an embedding's (T, d) may belong to the T positions of an (n, T) batch with T = n."""
        return isinstance(module, nn.Embedding) and len(shape) == 2 and self._batch[1:2] == (self.samples,)

    def _is_folded(self, shape: tuple[int, ...]) -> bool:
        """Whether dimension 0 looks like the samples, so that a fitting size further on is most likely chance.

        It is 1 (the same for all), or a multiple of them that the batch does not show as its own length.
        """
        if shape[0] == 1:
            return True
        is_multiple = bool(self.samples) and shape[0] % (self.samples or 1) == 0
        return is_multiple and not self.sequence_first and shape[0] not in self._batch[1:]

    def _warn_of_squares(self, label: str, shape: tuple[int, ...]) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"dimensions 0 and 1 of layer {label!r}, {shape}, both have the {self.samples} samples of the batch, "
                "and the model has modules with batch_first=False: dimension 0 is taken here; batch_dim= names it",
                CKAWarning,
                stacklevel=2,
            )

    def check_input(self, module: nn.Module, tensor: Tensor | None) -> None:
        """Refuse a batch that goes with its samples in front into a module that has them in dimension 1.

        Raises:
            BatchError: then either the loader or the module is not what its user thinks.
        """
        if tensor is None or self._everywhere or tensor.ndim < 3 or len(self._batch) < 2:
            return
        length, samples = tensor.shape[:2]
        if tuple(self._batch[:2]) == (length, samples) and length != samples:
            raise BatchError(
                f"a batch of shape {self._batch} is taken for {length} samples, and {type(module).__name__} with "
                f"batch_first=False takes it for {samples}: give batch_dim=1 where the loader is right, else build "
                "the module with batch_first=True"
            )


def _wants_second(module: nn.Module) -> bool:
    if isinstance(module, _SELF_ATTENTIVE):
        return module.self_attn.batch_first is False
    return getattr(module, "batch_first", None) is False


def _parts(module: nn.Module) -> list[nn.Module]:
    """A module with the samples in dimension 1, and what is in it and does not say otherwise."""
    return [part for part in module.modules() if getattr(part, "batch_first", False) is False]


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


def _channel_dim(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """The dimension of a module's output that has its channels for certain, and so cannot have the samples."""
    layout = layout_of(module)
    if layout is None or len(shape) < 2 + (layout == "first"):
        return None
    return 1 if layout == "first" else len(shape) - 1


def matters(module: nn.Module) -> bool:
    """Whether a module tells where channels are, or moves them."""
    return layout_of(module) is not None or type(module).__name__ == "Permute"


def first_tensor(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """The first tensor among a call's arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
