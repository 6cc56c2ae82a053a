"""The loop of `compare`: go over every batch of a loader, and end, interrupt or resume the run; models in turn."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cka_hooks.errors import ModelError, SampleCountError, TooFewSamplesError
from cka_hooks.hsic import MIN_SAMPLES
from cka_hooks.null import check_permutations
from cka_hooks.options import Options
from cka_hooks.progress import progress_bar
from cka_hooks.recording.batches import sample_count
from cka_hooks.recording.guest import is_sharded
from cka_hooks.recording.layers import check_model
from cka_hooks.run import replay
from cka_hooks.run.checkpoint import Keeper, undisturbed
from cka_hooks.run.comparison import Comparison, per_model
from cka_hooks.run.precomputed import Precomputed
from cka_hooks.run.ranks import Ranks
from cka_hooks.similarity.batch import Step
from cka_hooks.similarity.estimate import largest_stderr, too_few
from cka_hooks.similarity.state import State

Builder = nn.Module | Precomputed | Callable[[], nn.Module]

# With `tolerance`, first look at the standard errors after this many minibatches. (After three, they cover too
# little: the run would stop where the spread happens to be small.) Then look again at this ratio.
FIRST_LOOK = 30
LOOK_RATIO = 1.25
# If a loader does not say how large its batches are, stop after this many with fewer than 4 samples.
_TRIED = 8
# How far a rank is: in the first pass over its loader, done with that pass, done with all passes.
LOOKING, LOOKED, DONE = range(3)


@dataclass(eq=False)
class Loop:
    """One run over a loader, with what it has to remember between two batches.

    Args:
        comparison: takes each batch.
        loader: whose batches the keeper has.
        options: the options that end a run: `epochs`, `max_samples`, `tolerance`.
        keeper: keeps the run in a file.
        ranks: the ranks to share the run with. In a process alone, an empty loader is an error.
    """

    comparison: Comparison
    loader: Iterable[Any]
    options: Options
    keeper: Keeper
    ranks: Ranks

    def __post_init__(self) -> None:
        self._next_look = -(-FIRST_LOOK // self.ranks.size)
        collective = any(is_sharded(model) for model in self.comparison.models.values())
        share = self.options.max_samples
        if share is not None:
            of_rank = len(range(self.ranks.rank, share, self.ranks.size))
            share = -(-share // self.ranks.size) if collective else of_rank
        bounds = [bound for bound in (share, replay.own_samples(self.loader)) if bound is not None]
        # How many samples of a pass count at most, and after how many it ends. If a model's ranks work together in
        # each forward pass, all of them have to make all of these passes.
        self._most = min(bounds, default=None)
        self._end = share if collective else self._most

    @property
    def _is_full(self) -> bool:
        return self._end is not None and self.comparison.seen.row >= self._end

    def run(self, *, progress: bool, name: str = "cka") -> State:
        """Go over every batch, until the loader or one of the bounds ends the run.

        Returns:
            The sums of all ranks together.
        """
        progress = progress and self.ranks.rank == 0
        sampler = replay.distributed_sampler(self.loader)
        shuffle = getattr(sampler, "epoch", 0)
        try:
            self.keeper.resume(self._restore, progress=progress)
            there = max(replay.lengths(self.loader) or {self._most or 0})
            total = min(there, self._most or there) * self.options.epochs or None
            with self.comparison, progress_bar(name, "sample", total, shown=progress) as self._bar:
                self._bar.update(self.comparison.seen.row)
                stopped = not self.keeper.finished and self._passes(sampler, shuffle)
                self.keeper.save(self._state, finished=True)
                if not stopped:
                    self._meet(DONE)
        except BaseException as error:
            self.keeper.broke_off(error, self._state)
            raise
        finally:
            # Needed if Ctrl-C arrives in the first instant of entering or leaving.
            self.comparison.__exit__()
            if sampler is not None:
                sampler.set_epoch(shuffle)
            self.keeper.done()
        return self._total

    def _passes(self, sampler: Any, shuffle: int) -> bool:
        """Make all passes over the loader. Return whether small standard errors ended them."""
        comparison, epochs = self.comparison, self.options.epochs
        if self.ranks.size > 1:
            comparison.state.repeats = comparison.state.repeats or replay.repeats_samples(self.loader)
        for epoch in range(comparison.state.passes - 1, epochs):
            if sampler is not None:
                sampler.set_epoch(shuffle + epoch)
            stream = self.keeper.batches()
            with undisturbed():
                if epoch >= comparison.state.passes:
                    comparison.start_pass()
            if self._pass(stream, looks=epoch == 0 and self.options.tolerance is not None):
                return True
            with undisturbed():
                comparison.flush()
            if not self._is_full:
                comparison.seen.end_pass()
            if self.ranks.size == 1 and not epoch and not comparison.seen.row:
                raise TooFewSamplesError("the loader yielded no batch: it is empty, or exhausted already")
            if not epoch and epochs > 1 and self.options.tolerance is not None and self._meet(LOOKED):
                return True
        return False

    def _pass(self, stream: Iterable[Any], *, looks: bool) -> bool:
        """Make one pass. Return whether small standard errors ended the run."""
        comparison, seen = self.comparison, self.comparison.seen
        # After how many batches it is known, or likely, that all are too small for an estimate.
        tries = self.ranks.size == 1 and self.options.join_batches is None
        small_after = small_batches(self.loader) if tries else None
        for batch in () if self._is_full else stream:
            before = seen.row
            limit = None if self._most is None else max(0, self._most - before)
            something = comparison.observe(batch, limit=limit, drawn=self.keeper.drawn.ids)
            with undisturbed():
                if something:
                    comparison.step()
                self.keeper.seen(seen.fingerprint)
            self._bar.update(seen.row - before)
            if seen.batches == small_after and not comparison.state.minibatches:
                raise too_few(comparison.state)
            self.keeper.save_if_due(self._state)
            if self.ranks.called():
                self.ranks.meet(comparison.state, phase=LOOKING)
            if self._is_full:
                break
            if looks and comparison.state.minibatches >= self._next_look:
                self._next_look = int(comparison.state.minibatches * LOOK_RATIO) + 1
                if self._meet(LOOKING):
                    return True
        return False

    def _meet(self, phase: int) -> bool:
        """Look at the standard errors together with all other ranks, and wait until these are as far as `phase`.

        Returns whether small standard errors end the run. All ranks see the same sums, so all return the same. This
        is the only place in the loop that waits for the device.
        """
        tolerance = self.options.tolerance
        while True:
            self._total, lowest = self.ranks.meet(self.comparison.state, phase=phase)
            if tolerance is not None and lowest == LOOKING:
                largest = largest_stderr(self._total)
                self._bar.set_postfix_str(f"largest stderr {largest:.2g}")
                if largest < tolerance:
                    self.comparison.state.stopped = self._total.stopped = (
                        f"every standard error was below {tolerance} after {self._total.samples} samples"
                    )
                    return True
            if lowest >= phase:
                return False

    def _state(self) -> dict[str, Any]:
        return {"comparison": self.comparison.state_dict(), "next_look": self._next_look}

    def _restore(self, state: dict[str, Any]) -> int:
        self._next_look = int(state["next_look"])
        self.comparison.load_state_dict(state["comparison"])
        return self.comparison.state.samples


def small_batches(loader: Iterable[Any]) -> int | None:
    """After how many batches it is known, or likely, that all have fewer than 4 samples; None if some have more.

    Example:
        >>> import torch
        >>> small_batches(torch.utils.data.DataLoader(torch.zeros(9, 3), batch_size=3))
        1
        >>> small_batches([torch.zeros(1, 3), torch.zeros(4, 3)]) is None
        True
    """
    size = getattr(loader, "batch_size", None)
    if isinstance(loader, Sequence):
        size = max((sample_count(batch) or MIN_SAMPLES for batch in loader), default=0)
    if not isinstance(size, int):
        return _TRIED
    return 1 if size < MIN_SAMPLES else None


# Models in turn


def added_up_in_turn(
    models: Mapping[str, Builder], loader: Iterable[Any], options: Options, ranks: Ranks, *, progress: bool
) -> tuple[State, dict[str, str], dict[str, Any]]:
    """Run all batches through one model before the next one is built.

    Args:
        models: models, functions that build them, or precomputed features, by name.
        loader: iterated once for each model.
        options: options of the run.
        ranks: the ranks that share it.
        progress: whether to show a progress bar for each model.

    Returns:
        The sums as if all models had run together, the class of each model, and the settings of their runs.

    Raises:
        ModelError: an entry is neither a model nor a function, or a function did not return a model.
        OptionError: the loader is an iterator, which can be iterated only once.
        BatchError: the loader brings other batches for another model.
        SampleCountError: a batch had different numbers of samples, or other positions, in two models.
    """
    if ranks.size > 1:
        # This reads `layers`, which may be an iterator.
        ranks.agree({"models": list(models), **options.spelled()})
    layers, forwards = (per_model(getattr(options, name), models, name) for name in ("layers", "forward"))
    replayed = replay.Replayed(loader)
    steps: dict[str, list[Step | None]] = {}
    states: dict[str, State] = {}
    types: dict[str, str] = {}
    places: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, model in _built(models):
        own = replace(options, layers=layers[name], forward=forwards[name], permutations=0)
        comparison = Comparison.of({name: model}, own)
        others = sum(len(state.layers) for state in states.values())
        comparison.steps = steps[name] = _Steps(options.permutations, others)
        comparison.seen.check(loader)
        keeper = Keeper(None, 1.0, replayed.rewind(name), {})
        Loop(comparison, loader, own, keeper, ranks).run(progress=progress, name=name)
        states[name] = comparison.state.to("cpu")
        places[name] = comparison.positions and comparison.positions.digest
        refuse_other_positions(places)
        types |= comparison.types
        settings = comparison.settings | options.spelled("layers", "forward", "permutations")
        # Build the next model when nothing holds this one any more.
        del model, comparison
    state = State.joined(states, steps, options)
    return ranks.meet(state, phase=DONE)[0], types, settings


class _Steps(list[Step | None]):
    """Steps of a model, of which there must not be too many layers beside those of earlier models."""

    def __init__(self, permutations: int, others: int) -> None:
        super().__init__()
        self._permutations, self._others = permutations, others

    def append(self, step: Step | None) -> None:
        """Append a step, or raise :class:`OptionError`."""
        for group in step.groups if step else ():
            check_permutations(self._permutations, self._others + len(group.layers))
        super().append(step)


def refuse_other_positions(places: Mapping[str, int | None]) -> None:
    """Check that all models have the same positions, given the digest of those of each.

    Raises:
        SampleCountError: they do not.
    """
    first = next(iter(places))
    for name, digest in places.items():
        if digest != places[first]:
            raise SampleCountError(
                f"layers of the model {name!r} have other positions than those of {first!r}, or other padding: "
                "layers= has to choose layers with the same ones"
            )


def _built(models: Mapping[str, Builder]) -> Iterator[tuple[str, nn.Module | Precomputed]]:
    """Each model, built when it is its turn. The caller must let go of it before the next one."""
    for name, given in models.items():
        if not isinstance(given, Precomputed):
            _check(name, given)
    for name, given in models.items():
        model = given if isinstance(given, nn.Module | Precomputed) else given()
        if not isinstance(model, nn.Module | Precomputed):
            raise ModelError(f"the function for model {name!r} returned a {type(model).__name__}, not an nn.Module")
        yield name, model
        del model
        # Hooks and closures make cycles, which would keep a model alive beside the next one.
        gc.collect()


def _check(name: str, given: Any) -> None:
    if isinstance(given, nn.Module | type) or not callable(given):
        check_model(given)
        return
    # Some callables do not say what they take.
    with suppress(ValueError):
        try:
            inspect.signature(given).bind()
        except TypeError as error:
            raise ModelError(
                f"model {name!r} is a function that needs arguments ({error}): pass lambda: build(...), or the model"
            ) from None
