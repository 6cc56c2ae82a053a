"""Find the dimension of an activation that holds the samples: named, known, or confirmed by a probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from cka_hooks.errors import BatchError
from cka_hooks.names import PerLayer
from cka_hooks.options import dimensions
from cka_hooks.recording.batches import Given
from cka_hooks.recording.outputs import INPUT, NotRecordable, tensors_in
from cka_hooks.recording.probe import Probe, Take
from cka_hooks.recording.routes import Place

_SPATIAL: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_ELEMENTWISE = (
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Identity, nn.modules.dropout._DropoutNd),
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if name not in ("GLU", "MultiheadAttention")),
)
_SELF_ATTENTIVE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


NAMED, KNOWN, PROBED = "named", "known", "confirmed by a probe"


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
    """

    def __init__(self, names: Mapping[str, nn.Module], batch_dim: int | Mapping[str, int] | None) -> None:
        batch_dim = dimensions("batch_dim", batch_dim)
        self._given = PerLayer(batch_dim, names, "batch_dim")
        self._everywhere = isinstance(batch_dim, int)
        self._sequence_first = {name: module for name, module in names.items() if _wants_second(module)}
        self._second = {id(part) for module in self._sequence_first.values() for part in _parts(module)}
        self._inputs: dict[str, tuple[int, ...]] = {}
        self.samples: int | None = None
        self.found: dict[str, int | str | None] = {}
        self._ranks: dict[str, int] = {}
        self.is_settled = self._everywhere
        self._is_plain = False
        self.evidence: dict[str, str] = {}

    def samples_of(self, given: Given) -> int | None:
        """The number of samples in a batch; None if the first layer says it, by the dimension named for all."""
        return given.shape[0] if given.shape and not self._everywhere else None

    def start(self, samples: int | None) -> None:
        """Begin a forward pass of that many samples."""
        self.samples = samples

    def settle_plain(self, model: nn.Module, rank: int) -> None:
        """Skip the probe if the kinds of all modules already say it, for an (n, ...) batch of this rank."""
        self._is_plain = self.is_settled = plain_rank(model, rank) is not None

    def of(self, name: str, label: str, shape: tuple[int, ...]) -> int:
        """The dimension of `shape` that holds the samples.

        Raises:
            NotRecordable: there is none, or it is not known.
        """
        given = self._given.of(name, None)
        if given is None and self._ranks.setdefault(label, len(shape)) != len(shape):
            raise NotRecordable(
                f"has {len(shape)} dimensions in a batch and {self._ranks[label]} in the first: keep the dimension "
                "with the samples in a batch of one sample (squeeze() drops it), or pass batch_dim="
            )
        if given is not None:
            dim, how = self._checked(given, shape), NAMED
        elif self._is_plain:
            dim, how = self._confirmed(0, shape), KNOWN
        elif not self.found and not self.is_settled:
            raise NotRecordable(
                "has its samples in a dimension that nothing confirmed, since only parts of the model were called: "
                "pass batch_dim=, or use compare() or Comparison, which run all of it on a part of the batch first"
            )
        else:
            found = self.found.get(label, "was not reached by the probe of the first batch")
            if isinstance(found, str):
                raise NotRecordable(f"{found}; pass batch_dim= to say which dimension holds the samples")
            dim, how = self._confirmed(found, shape), PROBED
        self.evidence[label] = how
        return dim

    def _checked(self, given: int, shape: tuple[int, ...]) -> int:
        if -len(shape) <= given < len(shape):
            if self.samples is None:
                self.samples = shape[given]
            if shape[given] == self.samples:
                return given % len(shape)
        raise NotRecordable(f"batch_dim={given} of {shape} does not have size {self.samples}, the batch size")

    def _confirmed(self, dim: int | None, shape: tuple[int, ...]) -> int:
        samples = self.samples
        if dim is not None and dim < len(shape) and shape[dim] == samples:
            return dim
        if not shape:
            raise NotRecordable("no dimension: it returned a single number, without a batch dimension")
        several = (
            'such layers can be compared by themselves with per="position", features=lambda rows: rows, which makes '
            "a sample of each entry of dimension 0"
        )
        if samples and shape[0] > samples and shape[0] % samples == 0:
            why = f": {shape[0] // samples} windows, heads or beams of each are folded into dimension 0; {several}"
        elif shape[0] == 1:
            why = ": it is the same for all samples"
        elif dim is not None:
            why = f": the samples were confirmed in dimension {dim}"
        else:
            why = f". If it has several entries of each sample (nodes of graphs, boxes), {several}"
        raise NotRecordable(f"no dimension of {shape} has size {samples}, the batch size{why}")

    def is_second(self, module: nn.Module, place: Place) -> bool:
        """Whether PyTorch's documentation of the module puts the samples in dimension 1."""
        if place == "further output":
            # Hidden states are (layers, n, d) whatever batch_first says. Attention weights are always (n, ...).
            return isinstance(module, nn.RNNBase)
        return id(module) in self._second

    @contextmanager
    def watched(self, take: Take) -> Iterator[None]:
        """Show the inputs of modules with ``batch_first=False`` to a probe, too, while the block runs."""

        def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = next(tensors_in((args, kwargs)), None)
            if tensor is not None and tensor.ndim > 2 and tensor.is_floating_point():
                self._inputs.setdefault(name, tuple(tensor.shape))
                take(_input_of(name), tensor, False)

        with ExitStack() as stack:
            for name, module in self._sequence_first.items():
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True
                )
                stack.callback(hook.remove)
            yield

    def confirm(self, probe: Probe, shape: tuple[int, ...], *, always: bool) -> None:
        """Find out with a probe what nothing names; see :meth:`cka_hooks.recording.probe.Probe.sample_dimensions`.

        Args:
            shape: shape of the batch, samples first.

        Raises:
            BatchError: a module with ``batch_first=False`` gets its samples in dimension 0, so either the loader or
                the module is not what its user thinks.
        """
        self.found, problem = probe.sample_dimensions(always=always)
        # If the model cannot run on the whole batch, it may run on the next one.
        self.is_settled = problem is None
        for name, seen in self._inputs.items():
            if self.found.get(_input_of(name)) == 0:
                kind = type(self._sequence_first[name]).__name__
                raise BatchError(
                    f"a batch of shape {shape} is read as {shape[0]} samples, and {kind} {name!r} with "
                    f"batch_first=False reads it as {seen[1]}: pass batch_dim=1 if the loader is right, or "
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
    """A module with the samples in dimension 1, and the modules in it that do not say otherwise."""
    return [part for part in module.modules() if getattr(part, "batch_first", False) is False]


def plain_rank(module: nn.Module, rank: int) -> int | None:
    """The rank of a module's output for an (n, ...) tensor of `rank`; None unless it surely keeps the samples.

    This covers torch's convolutions, linear layers, norms, pools, activations, dropouts and ``Flatten``, and a
    ``Sequential`` of them. In the ``forward`` of any other module, anything may happen in between.
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
        # These also take one sample without a batch, and then dimension 0 holds something else.
        spatial = int(kind.__name__[-2])
        return rank if rank == spatial + 2 or (rank == 2 and isinstance(module, nn.BatchNorm1d)) else None
    return rank if isinstance(module, _ELEMENTWISE) else None
