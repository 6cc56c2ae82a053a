"""Compare more models than fit into memory: run one after another, and keep their centred Gram matrices."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from cka_hooks.errors import BatchError, ModelError, OptionError, SampleCountError
from cka_hooks.null import check_permutations
from cka_hooks.options import Options
from cka_hooks.recording.layers import check_model
from cka_hooks.run import replay
from cka_hooks.run.checkpoint import Keeper
from cka_hooks.run.comparison import Comparison, per_model
from cka_hooks.run.loop import DONE, Loop
from cka_hooks.run.precomputed import Precomputed
from cka_hooks.run.ranks import Ranks
from cka_hooks.similarity.batch import Step
from cka_hooks.similarity.state import State

Builder = nn.Module | Precomputed | Callable[[], nn.Module]


def added_up_in_turn(
    models: Mapping[str, Builder], loader: Iterable[Any], options: Options, ranks: Ranks | None, *, progress: bool
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
    if ranks is not None:
        ranks.agree({"models": list(models), **options.spelled()})
    layers, forwards = (per_model(getattr(options, name), models, name) for name in ("layers", "forward"))
    replayed = Replayed(loader)
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
        loop = Loop(comparison, loader, own, keeper, None, alone=ranks is None)
        states[name] = loop.run(progress=progress, name=name).to("cpu")
        places[name] = comparison.positions and comparison.positions.digest
        refuse_other_positions(places)
        types |= comparison.types
        settings = comparison.settings | options.spelled("layers", "forward", "permutations")
        # Build the next model when nothing holds this one any more.
        del model, comparison, loop
    kept = {"permutations": options.permutations, "seed": options.seed}
    state = State.joined(states, steps, keep=options.keep_minibatches, **kept)
    return state if ranks is None else ranks.meet(state, phase=DONE)[0], types, settings


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


class Replayed(replay.Drawn):
    """A loader that is iterated once for each model, and has to bring the same batches each time.

    Attributes:
        known: a fingerprint of each batch of the first pass. Later passes have to have the same.

    Raises:
        OptionError: the loader is an iterator, which can be iterated only once.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise OptionError(
                "the loader is an iterator, which can be iterated only once: pass a DataLoader or a list"
            )
        super().__init__(loader)
        self._randomness = replay.Randomness(loader)
        self._start = self._randomness.state()
        self.known: list[str] = []

    def rewind(self, model: str) -> Replayed:
        """Go back to the start, for the next model."""
        self._is_first, self._number, self._model = not self.known, 0, model
        self._randomness.restore(self._start)
        return self

    def __iter__(self) -> Iterator[Any]:
        """Make one pass over the loader.

        Raises:
            BatchError: a batch differs from the one for the first model.
        """
        for batch in super().__iter__():
            found = replay.fingerprint(batch)
            if self._is_first:
                self.known.append(found)
            elif self.known[self._number : self._number + 1] != [found]:
                raise BatchError(
                    f"batch {self._number} (counted from 0) for model {self._model!r} differs from the one for the "
                    "first model. Each needs the same batches: seed the order, DataLoader(..., shuffle=True, "
                    "generator=torch.Generator().manual_seed(0)), and any random augmentation"
                )
            self._number += 1
            yield batch
