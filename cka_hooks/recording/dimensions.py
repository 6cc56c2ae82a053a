"""Find the dimensions of an activation: that of the samples, and that of the channels.

Each is named by the user, or known from the kinds of the modules. That of the samples is otherwise confirmed by a
probe, and that of the channels is taken from the modules that just ran.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cka_hooks.errors import BatchError, warn
from cka_hooks.names import PerLayer, first_few
from cka_hooks.recording.batches import Given
from cka_hooks.recording.layers import ROOT, torch_file
from cka_hooks.recording.outputs import NotRecordable, tensors_in
from cka_hooks.recording.probe import MOVED, Probe, Take

# Modules of these files of torch.nn keep the samples where they are, and the number of dimensions. GLU may halve any.
_KEEPING = frozenset(
    {"activation", "batchnorm", "conv", "dropout", "instancenorm", "linear", "normalization", "pooling"}
)
# Kinds of modules, the dimension in which they put their channels, and the attribute with the number of channels.
# Classes of torchvision, timm and transformers without a base class in torch, or with channels elsewhere, go by name.
_DECLARED: dict[type[nn.Module] | str, tuple[int, str]] = {
    nn.modules.conv._ConvNd: (1, "out_channels"),
    nn.modules.batchnorm._NormBase: (1, "num_features"),
    nn.GroupNorm: (1, "num_channels"),
    nn.Linear: (-1, "out_features"),
    nn.Embedding: (-1, "embedding_dim"),
    nn.MultiheadAttention: (-1, "embed_dim"),
    nn.LayerNorm: (-1, "normalized_shape"),
    nn.RMSNorm: (-1, "normalized_shape"),
    "Conv1D": (-1, "nf"),
    "FrozenBatchNorm2d": (1, "weight"),
    "LayerNorm2d": (1, "normalized_shape"),
    "RmsNorm2d": (1, "normalized_shape"),
    "SimpleNorm2d": (1, "normalized_shape"),
}
# Modules of these files of torch.nn leave the channels where they are.
_TRANSPARENT = frozenset({"activation", "dropout", "padding", "pixelshuffle", "pooling", "upsampling"})


class SampleDimension:
    """Finds the dimension with the samples: named, known from the kinds of all modules, or confirmed by a probe.

    Args:
        names: the model's modules.
        batch_dim: the dimension for every layer and for the batch itself, or a mapping from layer pattern to it.

    Attributes:
        samples: number of samples in the current batch, None if nothing says it.
        found: for each label, the dimension that a probe confirmed, None if there is none, or why it is not known.
        is_settled: whether this has been found out, or need not be.
        evidence: for each label with a dimension, how that was found.
        sequence_first: modules with ``batch_first=False``, and their names.
    """

    def __init__(self, names: Mapping[str, nn.Module], batch_dim: int | Mapping[str, int] | None) -> None:
        self._given = PerLayer(batch_dim, names, "batch_dim")
        self._model, self._everywhere = names[ROOT], isinstance(batch_dim, int)
        self.sequence_first = {module: name for name, module in names.items() if _is_sequence_first(module)}
        # Parts of these may say otherwise.
        parts = (part for module in self.sequence_first for part in module.modules())
        self._second = {part for part in parts if getattr(part, "batch_first", False) is False}
        self._inputs: dict[str, int] = {}
        self.samples: int | None = None
        self.found: dict[str, int | str | None] = {}
        # That of the batch that is under way.
        self._probe: Probe | None = None
        self._ranks: dict[str, int] = {}
        self.is_settled = self._everywhere
        self._is_plain = False
        self.evidence: dict[str, str] = {}

    def start(self, given: Given) -> None:
        """Begin a batch. If the dimension is named for all layers, the first one says how many samples there are."""
        self.samples = given.shape[0] if given.shape and not self._everywhere else None
        self._probe = None
        # The kinds of all modules may say it, and no probe is needed then.
        if not self.is_settled and given.call is not None and isinstance(given.value, Tensor):
            self._is_plain = self.is_settled = _plain_rank(given.value.ndim, self._model) is not None

    def of(self, name: str, label: str, activation: Tensor) -> int:
        """The dimension of an activation that holds the samples.

        Raises:
            NotRecordable: there is none, or it is not known.
        """
        given, shape = self._given.of(name, None), tuple(activation.shape)
        if given is not None:
            is_one = -len(shape) <= given < len(shape)
            if is_one and self.samples is None:
                self.samples = shape[given]
            if not is_one or shape[given] != self.samples:
                hint = "" if self._everywhere else f"; batch_dim={given} for all layers is that of the batch, too"
                raise NotRecordable(
                    f"batch_dim={given} of {shape} does not have size {self.samples}, the batch size{hint}"
                )
            self.evidence[label] = "named"
            return int(given) % len(shape)
        if self._ranks.setdefault(label, len(shape)) != len(shape):
            raise NotRecordable(
                f"has {len(shape)} dimensions in a batch and {self._ranks[label]} in the first: keep that of the "
                "samples in a batch of one (squeeze() drops it), or pass batch_dim="
            )
        found = 0 if self._is_plain else self.found.get(label, "was not reached by the probe of the first batch")
        if not self.found and not self.is_settled:
            found = (
                "has its samples in a dimension that nothing confirmed, since only parts of the model were called "
                "(compare() and Comparison run all of it on a part of the batch first)"
            )
        elif isinstance(found, int) and self._probe and self._probe.is_elsewhere(label, activation, found):
            # In the batches that follow, too.
            found = self.found[label] = MOVED
        if isinstance(found, str):
            raise NotRecordable(f"{found}; pass batch_dim= to say which dimension holds the samples")
        dim = self._confirmed(found, shape)
        self.evidence[label] = "known" if self._is_plain else "confirmed by a probe"
        return dim

    def _confirmed(self, dim: int | None, shape: tuple[int, ...]) -> int:
        samples, first = self.samples, shape[0] if shape else 0
        if dim is not None and dim < len(shape) and shape[dim] == samples:
            return dim
        several = 'with per="position", features=lambda rows: rows, each entry of dimension 0 is a sample'
        if samples and first > samples and first % samples == 0:
            why = f": {first // samples} windows, heads or beams of each are folded into dimension 0 ({several})"
        elif first == 1:
            why = ": it is the same for all samples"
        else:
            why = (
                f". If it has several entries of each sample, such as nodes of graphs: {several}. If the first "
                "tensor of the batch has these, as with offsets: batch_dim=0, and layers= that have the samples there"
            )
        raise NotRecordable(f"no dimension of {shape} has size {samples}, the batch size{why}")

    def is_second(self, module: nn.Module, *, is_first_output: bool) -> bool:
        """Whether PyTorch's documentation of the module puts the samples in dimension 1."""
        # Hidden states are (layers, n, d) whatever batch_first says. Attention weights are always (n, ...).
        return module in self._second if is_first_output else isinstance(module, nn.RNNBase)

    def look(self, module: nn.Module, given: Any, show: Take) -> None:
        """Show a probe the input of a module with ``batch_first=False``, too."""
        tensor = next(tensors_in(given), None)
        if module in self.sequence_first and tensor is not None and tensor.ndim > 2 and tensor.is_floating_point():
            # No layer has this label.
            label = f"{type(module).__name__} {self.sequence_first[module]!r} with batch_first=False"
            self._inputs.setdefault(label, tensor.shape[1])
            show(label, tensor, False)

    def confirm(self, probe: Probe, shape: tuple[int, ...]) -> None:
        """Find out with a probe what nothing names; see :meth:`cka_hooks.recording.probe.Probe.sample_dimensions`.

        Args:
            shape: shape of the batch, samples first.

        Raises:
            BatchError: a module with ``batch_first=False`` gets its samples in dimension 0, so either the loader or
                the module is not what its user thinks.
        """
        self.found, problem = probe.sample_dimensions()
        self._probe = probe
        # If the model cannot run on the whole batch, it may run on the next one.
        self.is_settled = problem is None
        for label, second in self._inputs.items():
            if self.found.get(label) == 0:
                raise BatchError(
                    f"a batch of shape {shape} is read as {shape[0]} samples, and {label} reads it as {second}: pass "
                    "batch_dim=1 if the loader is right, or build the module with batch_first=True"
                )


def _is_sequence_first(module: nn.Module) -> bool:
    has_attention = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return getattr(module.self_attn if has_attention else module, "batch_first", None) is False


def _plain_rank(rank: int | None, module: nn.Module) -> int | None:
    """The rank of a module's output for an (n, ...) tensor of `rank`; None unless it surely keeps the samples.

    This covers torch's convolutions, linear layers, norms, pools, activations, dropouts and ``Flatten``, and a
    ``Sequential`` of them. In the ``forward`` of any other module, anything may happen in between.
    """
    kind = type(module)
    if rank is None or rank < 2 or "forward" in vars(module):
        return None
    if kind is nn.Sequential:
        after: int | None = rank
        return reduce(_plain_rank, module.children(), after)
    if isinstance(module, nn.Flatten):
        return rank - (module.end_dim % rank - module.start_dim) if module.start_dim > 0 else None
    # What has its number of dimensions in its name also takes one sample without a batch.
    spatial = re.search(r"(\d)d$", kind.__name__)
    fits = not spatial or rank == int(spatial[1]) + 2 or (rank == 2 and kind is nn.BatchNorm1d)
    return rank if torch_file(module) in _KEEPING and fits and kind is not nn.GLU else None


class Channels:
    """Finds the dimension with the channels, for activations that are averaged or reduced to one position.

    The dimension is known for the output of a module of a known kind, if it has as many channels there as the module
    declares, and for what torch's activations, dropouts and pools make of that very tensor. What comes after such a
    module counts as known if it has as many channels in the same place, and a different number in the other.
    Everything else is taken as (n, T, C) or (n, C, ...), with one warning if it matters.

    Args:
        names: the model's modules.
        channel_dim: the dimension in the layer's output, for every layer, or a mapping from layer pattern to it.
    """

    def __init__(self, names: Mapping[str, nn.Module], channel_dim: int | Mapping[str, int] | None) -> None:
        self._given = PerLayer(channel_dim, names, "channel_dim")
        self._found: dict[tuple[str, int], int] = {}
        self._guessed: dict[str, tuple[int, ...]] = {}
        self._has_warned = False
        self.restart()

    def restart(self) -> None:
        """Begin a forward pass. What one pass has found holds for all others."""
        self._follows = not self._found
        # Keyed by number of dimensions, since tokens made of images say nothing about images. Values: dimension,
        # channels.
        self._last: dict[int, tuple[int, int]] = {}
        self._known = WeakTensorKeyDictionary()

    def pass_through(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Learn from a module that has run."""
        tensor = next(tensors_in(output), None) if self._follows else None
        if tensor is None or tensor.ndim < 3:
            return
        dim = _declared_dim(module, tensor.shape)
        if dim is None and args and isinstance(args[0], Tensor) and args[0].ndim == tensor.ndim:
            dim = _kept_dim(module, self._known.get(args[0]))
        if dim is None and _puts_second(module, tensor.ndim):
            dim = 1
        if dim is not None:
            self._known[tensor] = dim
            self._last[tensor.ndim] = dim, tensor.shape[dim]

    def of(self, name: str, label: str, activation: Tensor, batch_dim: int) -> int | None:
        """The dimension with the channels; None for (n, d), which has no other.

        Args:
            name: name of the module.
            label: label of the layer.
            activation: the module's output.
            batch_dim: the dimension with its samples.
        """
        given: int | None = self._given.of(name, None)
        if given is not None or activation.ndim < 3:
            return given if activation.ndim > 2 else None
        key = label, activation.ndim
        if key not in self._found:
            self._found[key] = self._dim_of(label, activation, batch_dim)
        return self._found[key]

    def _dim_of(self, label: str, activation: Tensor, batch_dim: int) -> int:
        shape, rank = tuple(activation.shape), activation.ndim
        known: int | None = self._known.get(activation)
        if known is not None and known != batch_dim:
            return known
        others = [dim for dim in range(rank) if dim != batch_dim]
        usual, unusual = (others[-1], others[0]) if rank == 3 else (others[0], others[-1])
        elsewhere = {usual: unusual, unusual: usual}
        last, count = self._last.get(rank, (-1, 0))
        if last in elsewhere and shape[last] == count != shape[elsewhere[last]]:
            return last
        if rank > 3 or last == unusual:
            self._guessed[label] = shape
        return usual

    def warn(self) -> None:
        """Warn once about layers whose channels were assumed to be in the usual place."""
        if self._guessed and not self._has_warned:
            self._has_warned = True
            some = first_few([f"{label!r} {shape}" for label, shape in self._guessed.items()])
            warn(
                f"nothing says which dimension has the channels of {some}: images are taken as (n, C, ...) and "
                "tokens as (n, T, C). channel_dim= names it, such as channel_dim=1 or channel_dim={'stages.*': 1}"
            )


def matters(module: nn.Module) -> bool:
    """Whether a module's output shows where the channels are."""
    is_known = _declared(module) is not None or _is_transparent(module) or isinstance(module, nn.Fold | nn.Unfold)
    return is_known or type(module).__name__ == "Permute"


def _declared(module: nn.Module) -> tuple[int, str] | None:
    keys = (key for kind in type(module).__mro__ for key in (kind.__name__, kind) if key in _DECLARED)
    return _DECLARED.get(next(keys, ""))


def _declared_dim(module: nn.Module, shape: Sequence[int]) -> int | None:
    """The dimension in which a kind of module puts its channels, if it holds as many as the module declares."""
    dim, attribute = _declared(module) or (0, "")
    count = getattr(module, attribute, None)
    if getattr(module, "data_format", None) == "channels_first":
        dim = 1
    # Numbers of channels are given as such, as (C,), or as a tensor of that shape.
    count = getattr(count, "shape", count)
    fits = not isinstance(module, nn.modules.conv._ConvNd) or len(shape) == len(module.stride) + 2
    is_there = attribute and fits and count in (shape[dim], (shape[dim],))
    return dim % len(shape) if is_there else None


def _kept_dim(module: nn.Module, dim: int | None) -> int | None:
    """Where the channels are in a module's output, if they are known in its input."""
    if dim is None or _is_transparent(module):
        return dim
    dims = getattr(module, "dims", None) if type(module).__name__ == "Permute" else None
    return list(dims).index(dim) if isinstance(dims, Sequence) and dim in dims else None


def _is_transparent(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or torch_file(module) in _TRANSPARENT


def _puts_second(module: nn.Module, rank: int) -> bool:
    """Whether the module pools over all dimensions after the second, or makes patches. Both return (n, C, ...)."""
    is_pool = torch_file(module) == "pooling" and type(module).__name__.endswith(f"{rank - 2}d")
    return is_pool or isinstance(module, nn.Fold | nn.Unfold)
