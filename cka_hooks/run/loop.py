"""The loop: every batch of a loader through every model, with all that can end, interrupt or resume it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from cka_hooks import schema
from cka_hooks.errors import CKAWarning, LayerError, SampleCountError, TooFewSamplesError
from cka_hooks.progress import progress_bar
from cka_hooks.recording import batches
from cka_hooks.recording.guest import runnable, untouched
from cka_hooks.recording.recorder import LayerRecorder, nothing_ran
from cka_hooks.run import replay
from cka_hooks.run.checkpoint import Keeper, undisturbed
from cka_hooks.run.class_order import ClassOrder
from cka_hooks.run.ranks import Ranks, is_sharded
from cka_hooks.similarity.accumulator import CKAAccumulator

# With `tolerance`, the first look at the standard errors is after this many minibatches (a look at the third
# one covers too little: it stops where the spread happens to be small), the next ones at this ratio.
FIRST_LOOK = 30
LOOK_RATIO = 1.25
# How far a rank is: in the first pass over its loader, through with it, through with all passes.
LOOKING, LOOKED, DONE = range(3)

# The form of a run's state in a file; the accumulator checks its own part.
_STATE: dict[str, Any] = {
    "accumulator": {str: object},
    "class_order": {"classes": {int: schema.COUNT}, "equal": schema.COUNT, "last": (None, int)},
    "report": {
        "skipped": {str: str},
        "shapes": {str: [schema.COUNT]},
        "stopped": (None, str),
        "first": (None, str),
        "repeats": (None, str),
    },
    "epoch": schema.COUNT,
    "before": schema.COUNT,
    "next_look": schema.COUNT,
}


@dataclass(frozen=True)
class Bounds:
    """What ends a run; see `compare`."""

    epochs: int = 1
    max_samples: int | None = None
    tolerance: float | None = None


@dataclass
class Report:
    """What a run tells besides its sums.

    Attributes:
        skipped: layer -> why it was not recorded.
        shapes: layer -> the shape of one sample.
        stopped: why the run ended before its loader did.
        first: fingerprint of the first batch.
        repeats: why samples may have been counted twice.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    stopped: str | None = None
    first: str | None = None
    repeats: str | None = None

    def merged(self, other: Report) -> Report:
        """Both, the words of this one where they speak of the same layer."""
        return Report(
            {**other.skipped, **self.skipped},
            {**other.shapes, **self.shapes},
            self.stopped or other.stopped,
            self.first or other.first,
            self.repeats or other.repeats,
        )


class Run:
    """One run over a loader: what it has to know between two batches.

    Args:
        recorders: by name of the model.
        forwards: how to call each model.
        accumulator: what the recorders hand activations to.
        bounds: what ends the run.
        keeper: keeps the run in a file.
        ranks: the ranks that it compares notes with, None for none.
        alone: whether an empty loader is an error; by default where there are no ranks.
    """

    def __init__(
        self,
        recorders: Mapping[str, LayerRecorder],
        forwards: Mapping[str, batches.Forward | None],
        accumulator: CKAAccumulator,
        bounds: Bounds,
        keeper: Keeper,
        ranks: Ranks | None = None,
        *,
        alone: bool | None = None,
    ) -> None:
        self.accumulator = accumulator
        self.total = accumulator
        self.reports: list[Report] = []
        self.class_order = ClassOrder()
        self._report = Report()
        self._bounds = bounds
        self._keeper = keeper
        self._ranks = ranks
        self._alone = ranks is None if alone is None else alone
        self._recorders = recorders
        self._calls: list[Callable[[Any, int | None], None]] = []
        for name, recorder in recorders.items():
            model = runnable(recorder.model)
            device = batches.device_of(model)
            self._calls.append(partial(self._forward, recorder, model, device, forwards[name]))
        self._collective = any(is_sharded(recorder.model) for recorder in recorders.values())
        self._share = bounds.max_samples
        self._next_look = FIRST_LOOK
        if ranks is not None:
            self._next_look = -(-FIRST_LOOK // ranks.size)
            if bounds.max_samples is not None:
                self._share = ranks.share(bounds.max_samples, equal=self._collective)
        self._ran = False
        self._epoch = 0
        self._before = 0

    @staticmethod
    def _forward(
        recorder: LayerRecorder,
        model: nn.Module,
        device: torch.device | None,
        forward: batches.Forward | None,
        batch: Any,
        limit: int | None,
    ) -> None:
        with recorder.forward_pass(batch, limit=limit):
            batches.call(model, batches.to_device(batch, device), forward)

    @property
    def _seen(self) -> int:
        """Samples of this pass."""
        return self.accumulator.samples + self.accumulator.left_out - self._before

    def over(self, loader: Iterable[Any], *, progress: bool, name: str = "cka") -> None:
        """Every batch through every model, until the loader or one of the bounds ends it.

        Then `total` and `reports` are those of all ranks together.
        """
        progress = progress and (self._ranks is None or self._ranks.rank == 0)
        if self._keeper.resume(self._restore):
            self._keeper.tell(self.accumulator.samples, progress)
        sampler = replay.distributed_sampler(loader)
        shuffle = getattr(sampler, "epoch", 0)
        try:
            with ExitStack() as stack:
                for recorder in self._recorders.values():
                    stack.enter_context(untouched(recorder.model))
                    stack.enter_context(recorder)
                total = _length(loader, self._bounds.epochs, self._share)
                bar = stack.enter_context(progress_bar(name, "sample", total, shown=progress))
                bar.update(self._seen)
                stopped = not self._keeper.finished and self._passes(loader, sampler, shuffle, bar)
                self._keeper.save(self._state(), finished=True)
                if self._ranks is None:
                    self.reports = [self._reported()]
                elif not stopped:
                    self._meet(DONE, bar)
        except BaseException as error:
            # Ctrl-C may have come between a forward pass and the sums.
            self.accumulator.discard()
            self._keeper.broke_off(error, self._state)
            raise
        finally:
            if sampler is not None:
                sampler.set_epoch(shuffle)
            self._keeper.done()

    def _passes(self, loader: Iterable[Any], sampler: Any, shuffle: int, bar: Any) -> bool:
        """All passes over the loader; whether small standard errors ended them."""
        own = replay.own_samples(loader)
        if self._ranks is not None:
            self._report.repeats = replay.repeats_samples(loader)
        for epoch in range(self._epoch, self._bounds.epochs):
            if sampler is not None:
                sampler.set_epoch(shuffle + epoch)
            stream = self._keeper.batches()
            with undisturbed(self._keeper.path is not None):
                self._start(epoch)
            for batch in stream:
                left = self._left(own)
                # Where a model's ranks work together in each forward pass, all of them have to make all of these.
                if left == 0 and not self._collective:
                    break
                bar.update(self._batch(batch, left))
                self._keeper.save_if_due(self._state)
                if self._ranks is not None and self._ranks.called():
                    self._ranks.meet(self.accumulator, stage=LOOKING, details=None)
                if self._share is not None and self._seen >= self._share:
                    break
                if epoch == 0 and self._look_is_due() and self._meet(LOOKING, bar):
                    return True
            if self._alone and not epoch and not self._seen:
                raise TooFewSamplesError("the loader yielded no batch: it is empty, or exhausted already")
            looks_elsewhere = self._ranks is not None and self._bounds.tolerance is not None
            if looks_elsewhere and not epoch and self._bounds.epochs > 1 and self._meet(LOOKED, bar):
                return True
        return False

    def _start(self, epoch: int) -> None:
        """A pass begins, unless it is one that broke off."""
        if epoch >= self.accumulator.passes:
            self.accumulator.start_pass()
            self._before += self._seen
            self._epoch = epoch

    def _left(self, own: int | None) -> int | None:
        """How many further samples of this pass count, None for all."""
        bounds = [bound for bound in (own, self._share) if bound is not None]
        return max(0, min(bounds) - self._seen) if bounds else None

    def _batch(self, batch: Any, limit: int | None) -> int:
        """One batch through every model and into the sums; the number of its samples."""
        seen = self._seen
        if self._ranks is not None and self._report.first is None:
            self._report.first = replay.fingerprint(batch)
        self.class_order.add(batches.targets(batch))
        try:
            silent = None
            for (name, recorder), forward in zip(self._recorders.items(), self._calls, strict=True):
                before = len(self.accumulator._pending)
                # Of no sample a layer has no features: a batch that does not count runs whole and is forgotten.
                forward(batch, limit or None)
                if len(self.accumulator._pending) == before:
                    silent = silent or (name, recorder)
            if silent is not None and self.accumulator.observing:
                # Else the result would compare the other models only, as if this one had not been asked for.
                raise SampleCountError(f"of the model {silent[0]!r} {nothing_ran(silent[1].skipped)}")
            if limit == 0:
                self.accumulator.discard()
                return 0
        except BaseException:
            self.accumulator.discard()
            raise
        if not self.accumulator.observing:
            raise LayerError(nothing_ran(self._skipped()))
        with undisturbed(self._keeper.path is not None):
            self.accumulator.step()
            self._keeper.seen()
        self._ran = True
        return self._seen - seen

    def _look_is_due(self) -> bool:
        if self._bounds.tolerance is None or self.accumulator.minibatches < self._next_look:
            return False
        self._next_look = int(self.accumulator.minibatches * LOOK_RATIO) + 1
        return True

    def _meet(self, stage: int, bar: Any) -> bool:
        """Look at the standard errors with all other ranks, and wait until these are as far as `stage`.

        Whether small standard errors end the run: all ranks see the same sums, so all say the same. This is the
        only place in the loop that waits for the device.
        """
        while True:
            lowest = stage
            if self._ranks is not None:
                self.total, self.reports, lowest = self._ranks.meet(
                    self.accumulator, stage=stage, details=self._reported()
                )
            if self._bounds.tolerance is not None and lowest == LOOKING:
                largest = self.total.largest_stderr()
                bar.set_postfix_str(f"largest stderr {largest:.2g}")
                if largest < self._bounds.tolerance:
                    self._report.stopped = (
                        f"every standard error was below {self._bounds.tolerance} after {self.total.samples} samples"
                    )
                    self.reports = [*self.reports, Report(stopped=self._report.stopped)]
                    return True
            if lowest >= stage:
                return False

    def _skipped(self) -> dict[str, str]:
        return self._labelled({name: recorder.skipped for name, recorder in self._recorders.items()})

    @staticmethod
    def _labelled(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What the recorder of each model says of its layers, under the layers' labels."""
        return {
            (f"{name}/" if name else "") + layer: value
            for name, layers in found.items()
            for layer, value in layers.items()
        }

    def _reported(self) -> Report:
        # A batch that broke off has not called every layer yet.
        if not self._ran:
            return self._report
        shapes = self._labelled({name: recorder.shapes for name, recorder in self._recorders.items()})
        shapes = {layer: list(shape) for layer, shape in shapes.items()}
        return replace(self._report, skipped=self._skipped(), shapes=shapes or self._report.shapes)

    def _state(self) -> dict[str, Any]:
        return {
            "accumulator": self.accumulator.state_dict(),
            "class_order": self.class_order.state_dict(),
            "report": asdict(self._reported()),
            "epoch": self._epoch,
            "before": self._before,
            "next_look": self._next_look,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        schema.check(state, _STATE, "the run")
        self.accumulator.load_state_dict(state["accumulator"])
        self.class_order.load_state_dict(state["class_order"])
        self._report = Report(**state["report"])
        self._epoch = int(state["epoch"])
        self._before = int(state["before"])
        self._next_look = int(state["next_look"])


def warn_of_repetition(reports: Sequence[Report]) -> None:
    """Warn where ranks, or one rank's loader, bring the same samples twice."""
    repeats = next((report.repeats for report in reports if report.repeats), None)
    if repeats is not None:
        warnings.warn(repeats, CKAWarning, stacklevel=4)
    firsts = Counter(report.first for report in reports if report.first is not None)
    if firsts and max(firsts.values()) > 1:
        warnings.warn(
            f"{max(firsts.values())} ranks have the same first batch, so that its samples count as often: give the "
            "loader a DistributedSampler, name the ranks with different samples by group=, or run each rank alone "
            "with distributed=False",
            CKAWarning,
            stacklevel=4,
        )


def _length(loader: Iterable[Any], epochs: int, max_samples: int | None) -> int | None:
    """How many samples a run will see, None where the loader does not say."""
    dataset = getattr(loader, "dataset", None)
    sampler = getattr(loader, "sampler", None)
    try:
        samples: int | None = len(cast(Any, sampler if sampler is not None else dataset))
    except TypeError:
        samples = None
    if isinstance(loader, Sequence):
        counts = [batches.sample_count(batch) for batch in loader]
        samples = None if None in counts else sum(cast(list[int], counts))
    if samples is None:
        return None if max_samples is None else max_samples * epochs
    return min(samples, max_samples or samples) * epochs
