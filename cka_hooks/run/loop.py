"""The loop of `compare`: go over every batch of a loader, and end, interrupt or resume the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cka_hooks.errors import OptionError, TooFewSamplesError
from cka_hooks.hsic import MIN_SAMPLES
from cka_hooks.options import Options
from cka_hooks.progress import progress_bar
from cka_hooks.recording import batches
from cka_hooks.recording.guest import is_sharded
from cka_hooks.run import replay
from cka_hooks.run.checkpoint import Keeper, undisturbed
from cka_hooks.run.comparison import Comparison
from cka_hooks.run.ranks import Ranks
from cka_hooks.similarity.batch import Step
from cka_hooks.similarity.estimate import largest_stderr, too_few
from cka_hooks.similarity.state import State

# With `tolerance`, first look at the standard errors after this many minibatches. (After three, they cover too
# little: the run would stop where the spread happens to be small.) Then look again at this ratio.
FIRST_LOOK = 30
LOOK_RATIO = 1.25
# If a loader does not say how large its batches are, stop after this many with fewer than 4 samples.
_TRIED = 8
# How far a rank is: in the first pass over its loader, done with that pass, done with all passes.
LOOKING, LOOKED, DONE = range(3)


class Loop:
    """One run over a loader, with what it has to remember between two batches.

    Args:
        comparison: takes each batch.
        options: the options that end a run: `epochs`, `max_samples`, `tolerance`.
        keeper: keeps the run in a file.
        ranks: the ranks to share the run with, None for a single process.
        alone: whether an empty loader is an error; by default, if there are no ranks.
        on_step: called with what each batch added, and with None when another pass begins.
    """

    def __init__(
        self,
        comparison: Comparison,
        options: Options,
        keeper: Keeper,
        ranks: Ranks | None = None,
        *,
        alone: bool | None = None,
        on_step: Callable[[Step | None], None] | None = None,
    ) -> None:
        self._comparison = comparison
        self._options = options
        self._keeper = keeper
        self._ranks = ranks
        self._alone = ranks is None if alone is None else alone
        self._on_step = on_step or (lambda step: None)
        self._total: State | None = None
        self._collective = any(is_sharded(model) for model in comparison.models.values())
        self._share = options.max_samples
        self._next_look = FIRST_LOOK
        if ranks is not None:
            self._next_look = -(-FIRST_LOOK // ranks.size)
            if options.max_samples is not None:
                self._share = ranks.share(options.max_samples, equal=self._collective)
        self._before = 0
        self._tried = 0
        self._small_after: int | None = None

    @property
    def _seen(self) -> int:
        """Number of samples in this pass."""
        return self._comparison.positions - self._before

    def over(self, loader: Iterable[Any], *, progress: bool, name: str = "cka") -> State:
        """Go over every batch, until the loader or one of the bounds ends the run.

        Returns:
            The sums of all ranks together.
        """
        progress = progress and (self._ranks is None or self._ranks.rank == 0)
        sampler = replay.distributed_sampler(loader)
        shuffle = getattr(sampler, "epoch", 0)
        try:
            self._keeper.resume(self._restore, progress=progress)
            there = max(replay.lengths(loader) or {self._share or 0})
            total = min(there, self._share or there) * self._options.epochs or None
            with self._comparison, progress_bar(name, "sample", total, shown=progress) as self._bar:
                self._bar.update(self._seen)
                stopped = not self._keeper.finished and self._passes(loader, sampler, shuffle)
                self._keeper.save(self._state(), finished=True)
                if self._ranks is None:
                    self._total = self._comparison.state
                elif not stopped:
                    self._meet(DONE)
        except BaseException as error:
            # Ctrl-C may have come between a forward pass and the sums.
            self._comparison.discard()
            self._keeper.broke_off(error, self._state)
            raise
        finally:
            # Needed if Ctrl-C arrives in the first instant of entering or leaving.
            self._comparison.__exit__()
            if sampler is not None:
                sampler.set_epoch(shuffle)
            self._keeper.done()
        assert self._total is not None
        return self._total

    def _passes(self, loader: Iterable[Any], sampler: Any, shuffle: int) -> bool:
        """Make all passes over the loader. Return whether small standard errors ended them."""
        own = replay.own_samples(loader)
        self._small_after = small_after(loader) if self._alone else None
        repeats = replay.repeats_samples(loader) if self._ranks is not None else None
        if repeats is not None:
            self._comparison.state.repeats = repeats
        for epoch in range(self._comparison.state.passes - 1, self._options.epochs):
            if sampler is not None:
                sampler.set_epoch(shuffle + epoch)
            stream = self._keeper.batches()
            with undisturbed():
                self._start(epoch)
            if self._batches(stream, own, epoch):
                return True
            with undisturbed():
                rest = self._comparison.flush()
            if rest is not None:
                self._on_step(rest)
            if self._share is None or self._seen < self._share:
                self._comparison.end_pass()
            if self._alone and not epoch and not self._seen:
                raise TooFewSamplesError("the loader yielded no batch: it is empty, or exhausted already")
            looks_elsewhere = self._ranks is not None and self._options.tolerance is not None
            if looks_elsewhere and not epoch and self._options.epochs > 1 and self._meet(LOOKED):
                return True
        return False

    def _start(self, epoch: int) -> None:
        """Begin a pass, unless it continues an interrupted one."""
        if epoch >= self._comparison.state.passes:
            self._before += self._seen
            self._comparison.start_pass()
            self._on_step(None)

    def _batches(self, stream: Iterable[Any], own: int | None, epoch: int) -> bool:
        """Make one pass. Return whether small standard errors ended the run."""
        for batch in stream:
            left = self._left(own)
            # If a model's ranks work together in each forward pass, all of them have to make all of these passes.
            if left == 0 and not self._collective:
                break
            self._bar.update(self._batch(batch, left))
            self._keeper.save_if_due(self._state)
            if self._ranks is not None and self._ranks.called():
                self._ranks.meet(self._comparison.state, phase=LOOKING)
            if self._share is not None and self._seen >= self._share:
                break
            if epoch == 0 and self._look_is_due() and self._meet(LOOKING):
                return True
        return False

    def _left(self, own: int | None) -> int | None:
        """How many more samples of this pass count, None for all."""
        bounds = [bound for bound in (own, self._share) if bound is not None]
        return max(0, min(bounds) - self._seen) if bounds else None

    def _batch(self, batch: Any, limit: int | None) -> int:
        """Add one batch to the sums. Return the number of its samples."""
        seen = self._seen
        if self._comparison.passes_over(batch):
            with undisturbed():
                self._keeper.seen()
            return 0
        self._comparison.observe(batch, limit=limit, drawn=self._keeper.drawn.ids)
        if limit == 0:
            self._comparison.discard()
            return 0
        with undisturbed():
            self._on_step(self._comparison.step())
            self._keeper.seen()
        self._refuse_small()
        return self._seen - seen

    def _refuse_small(self) -> None:
        """Stop early if all batches of the loader are too small for an estimate."""
        state = self._comparison.state
        self._tried += 1
        if self._tried == self._small_after and not state.minibatches and self._options.join_batches is None:
            raise too_few(state)

    def _look_is_due(self) -> bool:
        minibatches = self._comparison.state.minibatches
        if self._options.tolerance is None or minibatches < self._next_look:
            return False
        self._next_look = int(minibatches * LOOK_RATIO) + 1
        return True

    def _meet(self, phase: int) -> bool:
        """Look at the standard errors together with all other ranks, and wait until these are as far as `phase`.

        Returns whether small standard errors end the run. All ranks see the same sums, so all return the same. This
        is the only place in the loop that waits for the device.
        """
        tolerance = self._options.tolerance
        while True:
            own, lowest = self._comparison.state, phase
            self._total = own
            if self._ranks is not None:
                self._total, lowest = self._ranks.meet(own, phase=phase)
            if tolerance is not None and lowest == LOOKING:
                largest = largest_stderr(self._total)
                self._bar.set_postfix_str(f"largest stderr {largest:.2g}")
                if largest < tolerance:
                    own.stopped = self._total.stopped = (
                        f"every standard error was below {tolerance} after {self._total.samples} samples"
                    )
                    return True
            if lowest >= phase:
                return False

    def _state(self) -> dict[str, Any]:
        return {"comparison": self._comparison.state_dict(), "before": self._before, "next_look": self._next_look}

    def _restore(self, state: dict[str, Any]) -> int:
        before, next_look = state["before"], state["next_look"]
        if type(before) is not int or type(next_look) is not int or min(before, next_look) < 0:
            raise OptionError("its numbers of samples are not numbers")
        self._comparison.load_state_dict(state["comparison"])
        self._before, self._next_look = before, next_look
        return self._comparison.state.samples


def small_after(loader: Iterable[Any]) -> int | None:
    """After how many batches it is known, or likely, that all have fewer than 4 samples; None if some have more.

    Example:
        >>> import torch
        >>> small_after(torch.utils.data.DataLoader(torch.zeros(9, 3), batch_size=3))
        1
        >>> small_after([torch.zeros(1, 3), torch.zeros(4, 3)]) is None
        True
    """
    size = getattr(loader, "batch_size", None)
    if isinstance(size, int):
        return 1 if size < MIN_SAMPLES else None
    if isinstance(loader, Sequence):
        counts = [batches.sample_count(batch) for batch in loader]
        return 1 if all(count is not None and count < MIN_SAMPLES for count in counts) else None
    return _TRIED
