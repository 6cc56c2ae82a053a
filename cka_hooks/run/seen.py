"""The samples that a run has seen: their identifiers, classes and order, and warnings about these."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from cka_hooks.errors import BatchError, OptionError, SampleCountError, warn
from cka_hooks.names import first_few
from cka_hooks.recording import batches
from cka_hooks.results.result import CKAResult
from cka_hooks.run import replay
from cka_hooks.run.precomputed import Identifier, Precomputed, SampleIds, ids_of, repeated
from cka_hooks.similarity.estimate import result_of
from cka_hooks.similarity.state import State

# With more classes than this, they are identifiers of samples.
_MOST_CLASSES = 10_000
# How many batches of a pass to recognise.
_REMEMBERED = 256
# A shuffled loader passes this with a probability of about 1e-9.
_DEVIATIONS = 6.0
_GIVE_IDS = "give them identifiers, Precomputed(array, sample_ids=ids), and compare(..., sample_ids='id')"


class Seen:
    """Looks at each batch of a run, and finds the rows of precomputed features that belong to its samples.

    Args:
        entries: precomputed features by name.
        sample_ids: see :func:`cka_hooks.compare`.
        of_positions: whether positions are compared. Identifiers are then of something else.

    Attributes:
        batches: number of batches that were added.
        fingerprint: of the batch at hand, before the models got it, which may change it in place.
        row: number of samples of this pass that were added, or wait to be joined.

    Raises:
        OptionError: there are identifiers but no `sample_ids`, or `sample_ids` is of the wrong kind.
    """

    def __init__(self, entries: Mapping[str, Precomputed], sample_ids: SampleIds | None, of_positions: bool) -> None:
        if not (sample_ids is None or type(sample_ids) in (str, int) or callable(sample_ids)):
            raise OptionError(f"sample_ids={sample_ids!r}: expected a key of the batch, or a function of the batch")
        self._entries = entries
        self._in_order = {name: one for name, one in entries.items() if one.sample_ids is None}
        self._aligned = len(self._in_order) < len(entries)
        if self._aligned and sample_ids is None:
            raise OptionError("precomputed rows have identifiers: say which those of a batch are, with sample_ids=")
        self._of_positions = of_positions
        self._key = None if of_positions else sample_ids
        self._lengths: set[int] | None = None
        self.batches = 0
        self.fingerprint = ""
        self.start_pass()

    def start_pass(self) -> None:
        """Begin another pass over the same samples."""
        self.row = 0
        self._ids: set[Identifier] = set()
        self._fingerprints: set[str] = set()

    def check(self, loader: Iterable[Any]) -> None:
        """Refuse a loader whose order does not match precomputed features without identifiers.

        Raises:
            OptionError: the loader shuffles.
            SampleCountError: the number of its samples is not that of the rows.
        """
        if not self._in_order:
            return
        if (why := replay.out_of_order(loader)) is not None:
            raise OptionError(
                f"the rows of {next(iter(self._in_order))!r} are those of the loader in its order, and {why}: "
                f"{_GIVE_IDS}; or do not shuffle, DataLoader(dataset, batch_size=64, shuffle=False)"
            )
        self._lengths = replay.lengths(loader)
        for name, one in self._in_order.items():
            if self._lengths is not None and one.samples not in self._lengths:
                raise SampleCountError(
                    f"{name!r} has {one.samples} rows and the loader has {max(self._lengths)} samples: give a row "
                    f"for each, or {_GIVE_IDS}"
                )

    def end_pass(self) -> None:
        """End a whole pass over the loader.

        Raises:
            SampleCountError: rows are left over in precomputed features without identifiers.
        """
        for name, one in self._in_order.items():
            if self.row not in (self._lengths or {one.samples}):
                raise SampleCountError(
                    f"the loader brought {self.row} samples and {name!r} has {one.samples} rows, which are then "
                    f"those of other samples: {_GIVE_IDS}"
                )

    def look_at(self, batch: Any, state: State, limit: int | None, drawn: Sequence[Identifier] | None) -> None:
        """Look at a batch before the models get it, since they may change it in place.

        Args:
            batch: a batch of the loader.
            state: where to note what is wrong with it.
            limit: how many of its samples count, at most.
            drawn: identifiers that the loader tells.

        Raises:
            BatchError: the batch has no identifiers.
        """
        self._targets = batches.targets(batch)
        samples = batches.sample_count(batch) or 0
        self._now = samples if limit is None else min(samples, limit)
        self._ids_now = (list(drawn or ()) if self._key is None else ids_of(batch, self._key))[:limit]
        if self.fingerprint.startswith("?"):
            return
        state.first_batches = state.first_batches or [self.fingerprint]
        if self.fingerprint in self._fingerprints and state.repeats is None:
            state.repeats = (
                "a batch came twice in one pass over the data, and its samples count twice: with an IterableDataset "
                "and several workers, each worker has to yield its own part (torch.utils.data.get_worker_info())"
            )
        # If workers yield the same samples, or data start over, the first batches show it.
        if len(self._fingerprints) < _REMEMBERED:
            self._fingerprints.add(self.fingerprint)

    def features(self, samples: int) -> Iterator[tuple[str, Tensor]]:
        """The precomputed features of the batch: pairs of label and features.

        Args:
            samples: on how many of its samples models were measured, 0 if there are no models.

        Raises:
            BatchError: there are too few identifiers, or one is repeated.
            SampleCountError: a sample has no row.
        """
        if self._of_positions:
            return
        ids = self._ids_now
        samples = self._now = samples or (self._now if self._key is None else len(ids))
        if self._key is not None and len(ids) != samples:
            raise BatchError(
                f"sample_ids={self._key!r} gives {len(ids)} identifiers for {samples} samples of a batch"
            )
        if not samples:
            raise BatchError(f"nothing says how many samples a batch has: {_GIVE_IDS}")
        twice = [*repeated(ids), *(one for one in ids if one in self._ids)] if self._aligned else []
        if twice:
            some = first_few([*map(repr, twice)])
            raise BatchError(f"the loader brought samples twice in one pass: {some}; let each come once")
        rows = range(self.row, self.row + samples)
        for name, one in self._entries.items():
            if name in self._in_order and rows.stop > one.samples:
                raise SampleCountError(
                    f"{name!r} has {one.samples} rows and the loader brings more samples: {_GIVE_IDS}"
                )
            yield from one.features(rows if name in self._in_order else one.rows_of(ids, name), name)

    def step(self, state: State) -> None:
        """The batch was added: count it, its identifiers, its classes, and pairs of neighbours in one class."""
        self.batches += 1
        self.row += self._now
        if self._aligned:
            self._ids.update(self._ids_now)
        if not self._of_positions:
            state.identifiers.append(json.dumps(self._ids_now if len(self._ids_now) == self._now else self._now))
        if self._targets is not None and len(self._targets) and len(state.classes) <= _MOST_CLASSES:
            classes = self._targets.long()
            for name, count in Counter(map(str, classes.tolist())).items():
                state.classes[name] = state.classes.get(name, 0) + count
            state.neighbours += len(classes) - 1
            state.equal_neighbours += int((classes[1:] == classes[:-1]).sum())


def finished(state: State, types: Mapping[str, str], settings: Mapping[str, Any]) -> CKAResult:
    """The result of a run, with warnings about the order and repetition of samples.

    Args:
        state: the sums of the run.
        types: the class of each model by its name, "" for a single model.
        settings: further provenance, plain JSON values.
    """
    if _deviations(state) > _DEVIATIONS:
        warn(
            "the loader brings runs of samples of one class, and CKA over its minibatches is not CKA over the data "
            "set. Shuffle it: DataLoader(..., shuffle=True, generator=torch.Generator().manual_seed(0))"
        )
    if state.repeats is not None:
        warn(state.repeats)
    if state.empty:
        warn(f"{state.empty} batches without samples were skipped, as from a collate_fn that drops all of a batch")
    same = max(Counter(state.first_batches).values(), default=0)
    if same > 1:
        warn(
            f"{same} ranks have the same first batch, and its samples count that often: give the loader a "
            "DistributedSampler, name the ranks with different samples by group=, or pass distributed=False"
        )
    models = {name or "model": kind for name, kind in types.items()}
    return result_of(state, {"models": models, **settings}, tuple(name for name in types if name))


def _deviations(state: State) -> float:
    """How many standard deviations more frequent neighbours of one class are than in random order.

    The Wald-Wolfowitz test for more than two classes (Barton & David 1957), within batches.
    """
    total = sum(state.classes.values())
    if total < 20 or not 2 <= len(state.classes) <= _MOST_CLASSES:
        return 0.0
    # In a random permutation, a pair is of one class with the probability sum_c n_c (n_c - 1) / (N (N - 1)), and
    # pairs are close to independent.
    share = sum(n * (n - 1) for n in state.classes.values()) / (total * (total - 1))
    variance = state.neighbours * share * (1 - share)
    return (state.equal_neighbours - share * state.neighbours) / variance**0.5 if variance > 0 else 0.0
