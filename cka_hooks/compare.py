"""`compare`: take models and a loader, return a result, by looping over a `Comparison`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cka_hooks.errors import OptionError
from cka_hooks.features import Reduction
from cka_hooks.hsic import Estimator
from cka_hooks.options import Options
from cka_hooks.recording.batches import Forward, check_loader
from cka_hooks.recording.guest import RandomStream, is_sharded
from cka_hooks.recording.layers import Layers
from cka_hooks.recording.padding import MaskOption
from cka_hooks.results.result import CKAResult
from cka_hooks.run.checkpoint import Keeper, path_of_rank
from cka_hooks.run.comparison import Comparison, named_models
from cka_hooks.run.identity import of_loader, of_model, of_option, of_rows
from cka_hooks.run.loop import Loop, added_up_in_turn
from cka_hooks.run.precomputed import Precomputed, SampleIds
from cka_hooks.run.ranks import Ranks
from cka_hooks.run.seen import finished
from cka_hooks.similarity.estimate import largest_stderr


def compare(
    model: nn.Module | Mapping[str, nn.Module | Callable[[], nn.Module] | Any],
    loader: Iterable[Any],
    *,
    layers: Layers | Mapping[str, Layers] = None,
    kernel: str | Callable[[Tensor], Tensor] = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: Estimator = "unbiased",
    minibatch: int | None = None,
    features: Reduction | str | Mapping[str, Reduction | str] = "flatten",
    batch_dim: int | Mapping[str, int] | None = None,
    channel_dim: int | Mapping[str, int] | None = None,
    mask: MaskOption = None,
    forward: Forward | Mapping[str, Forward] | None = None,
    sample_ids: SampleIds | None = None,
    join_batches: int | None = None,
    per: str = "sample",
    positions: int | None = None,
    tolerance: float | None = None,
    max_samples: int | None = None,
    epochs: int = 1,
    seed: int = 0,
    keep_minibatches: bool = False,
    permutations: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 30.0,
    distributed: bool | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> CKAResult:
    """CKA of every pair of layers of one or several models, in one pass over a loader.

    The models run in eval mode, without gradients, on the device they are on. Afterwards they and torch's random
    state are as they were, whether the run ended, raised or was interrupted.

    Args:
        model: one model, or a mapping from names to models, whose layers are then ``name/layer``. An entry may also
            be a function that builds a model (see below), or features that somebody else computed: an array of N rows
            in the order of the loader, a mapping from layer to such arrays, or :class:`Precomputed`.
        loader: yields ``(input, target)`` pairs, tensors, or dicts of keyword arguments; see
            :func:`cka_hooks.recording.batches.arguments`. Shuffle it if classes are stored in order.
        layers: which layers to compare, see :func:`cka_hooks.recording.layers.select_layers`; or a mapping from model
            name to that.
        kernel: see :class:`CKAAccumulator`, like `bandwidth`, `sigma`, `estimator`, `minibatch`, `seed`,
            `keep_minibatches` and `permutations`.
        features: see :class:`LayerRecorder`, like `batch_dim`, `channel_dim` and `mask`.
        forward: ``(model, batch) -> anything`` if the default call does not fit, or a mapping from model name to such
            a function. Two names for one model with different `forward` compare two views of the data.
        sample_ids: where to find the identifiers of the samples of a batch: a key of the batch (the position, if it
            is a tuple), or a function of the batch that returns them. With them, rows of :class:`Precomputed`
            features are found even if the loader shuffles. An entry of a mapping is not passed to models, unless you
            pass `forward`.
        join_batches: join the features of consecutive batches to minibatches of this many samples, if the loader's
            batches are small, for example because images of different sizes come one at a time. Layers must have the
            same number of features in each batch, as with ``features="mean"``. The last minibatch of a pass may be
            smaller.
        per: "sample", or "position" to compare tokens or pixels. Each position that is not padding is then a sample.
            Layers with other positions than the first one, or with none, are left out, with the reason. Each batch is
            one minibatch, so that it holds whole inputs: positions of one input depend on each other, and there are
            no p-values. A `features` callable gets the layer's output and may return any number of rows, the same for
            all layers: nodes of graphs, boxes.
        positions: with ``per="position"``, how many positions of each batch to draw at random with `seed`, the same
            for all layers. A Gram matrix of all 8192 tokens of a batch takes half a gigabyte for each layer.
        tolerance: end the run once every standard error off the diagonal is below this. The first look is after 30
            minibatches, the next ones at geometric intervals.
        max_samples: end the run after this many samples of the loader.
        epochs: number of passes over the loader. Later passes of a shuffled loader are other minibatches of the same
            samples. Standard errors stay those of one pass, and `tolerance` looks at one pass's worth.
        checkpoint: a file to keep the run in, every `checkpoint_every` seconds and when an error or Ctrl-C ends the
            run. The same call continues from there, and after the end it returns the result at once. Each rank keeps
            its own file, ``NAME.rank0-of-2`` and so on, so start as many ranks again.
        distributed: None shares the work with the initialised process group, if there is one. Every rank calls
            `compare` with its shard of the data and gets the same result. False runs this rank alone. Pass False if
            only one rank makes the call, since it would otherwise wait for the others forever.
        group: the process group to share with. Ranks that hold the same samples (tensor parallel) must not be in one
            group, or their samples count twice: pass the data-parallel group.
        progress: whether to show a progress bar on stderr.

    Functions in the mapping are called one after another. Each model goes over the whole loader alone and is freed
    before the next one is built. So twenty checkpoints of a network need the memory of one of them, plus about
    ``samples * (minibatch - 1) / 2 * 8`` bytes for each layer of each model: its centred Gram matrices. All pairs are
    compared at the end. The loader has to bring the same batches each time, which is checked. An entry of `layers`
    has to match in each of these models. `tolerance` and `checkpoint` need all models at once.

    Samples that a ``DistributedSampler`` repeats to give all ranks the same number are left out. Positions of samples
    and numbers of minibatches count rank after rank: those of rank 1 follow those of rank 0.

    Returns:
        The matrix with standard errors, and everything that was left out.

    Raises:
        LayerError: an entry of `layers` matches nothing (before any forward pass), or nothing ran in some model.
        ModelError: hooks cannot see into a model.
        OptionError: an option has an invalid value.
        BatchError: a model cannot be called with a batch.
        SampleCountError: two models, or two layers, have different numbers of samples; or precomputed features have
            another number of rows than the loader has samples, or no row for one of them.
        TooFewSamplesError: the loader is empty, or all batches have fewer than 4 samples. This is raised after the
            first one, or after 8 if the loader does not say how large its batches are.
        NonFiniteError: a layer has NaN or infinity. `.partial` has the result of all others.
        OutOfMemoryError: memory does not suffice for a layer, even in smaller pieces.
        CheckpointError: the file at `checkpoint` is damaged, or belongs to a run with another model or other options.
        RankError: another rank failed, was stopped, or does not answer.

    Example:
        >>> import torch, cka_hooks
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> loader = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=16)
        >>> result = cka_hooks.compare(model, loader, progress=False)
        >>> result.layers, result.samples, result.minibatches
        (('0', '1', '2'), 64, 4)
        >>> result["0", "1"] > result["0", "2"]
        True
    """
    arguments = locals()
    ranks = Ranks.of(distributed, group)
    started = time.perf_counter()
    with ranks, RandomStream(), torch.no_grad():
        models = named_models(model)
        check_loader(loader)
        options = Options.of(arguments)
        if options.epochs > 1 and isinstance(loader, Iterator):
            raise OptionError(f"epochs={epochs} needs a DataLoader or a list of batches, which an iterator is not")
        if all(isinstance(it, nn.Module | Precomputed) for it in models.values()):
            comparison = Comparison.of(models, options)
            comparison.seen.check(loader)
            if ranks.size > 1:
                ranks.agree({"models": comparison.types, "chosen": comparison.chosen, **options.spelled()})
            path = None if checkpoint is None else path_of_rank(checkpoint, ranks)
            identity = {} if path is None else _identity(comparison, options, loader)
            keeper = Keeper(path, checkpoint_every, loader, identity)
            state = Loop(comparison, loader, options, keeper, ranks).run(progress=progress)
            types, settings = comparison.types, comparison.settings
        elif checkpoint is not None or options.tolerance is not None:
            raise OptionError(
                "checkpoint= and tolerance= need all models at once: pass the models, not functions that build them"
            )
        else:
            state, types, settings = added_up_in_turn(models, loader, options, ranks, progress=progress)
    settings |= options.spelled("tolerance", "max_samples", "epochs")
    if options.tolerance is not None:
        settings["tolerance_reached"] = state.stopped is not None or largest_stderr(state) < options.tolerance
    if ranks.size > 1:
        settings["ranks"] = ranks.size
    settings["seconds"] = round(time.perf_counter() - started, 3)
    return finished(state, types, settings)


def _identity(comparison: Comparison, options: Options, loader: Iterable[Any]) -> dict[str, Any]:
    """What has to be the same to continue a run."""
    if any(is_sharded(model) for model in comparison.models.values()):
        raise OptionError("checkpoint= does not work with models that several ranks run together, such as FSDP")
    return {
        "models": {
            name: of_rows(it.arrays, it.sample_ids) if isinstance(it, Precomputed) else of_model(it)
            for name, it in comparison.entries.items()
        },
        "loader": of_loader(loader),
        **{field: of_option(option) for field, option in vars(options).items()},
        "minibatch": comparison.settings["minibatch"],
        "chosen": comparison.chosen,
    }
