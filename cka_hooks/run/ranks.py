"""The ranks that share a run: they agree before it, meet during it, and hear of each other's errors.

All ranks of a run meet in one kind of collective only. A rank that is done with its loader meets the others until all
are done. One that looks at its standard errors meets them in between. One that fails leaves a note in the group's
store, which the others check about once a second, and meets them to say so. So ranks with unequal numbers of batches,
or with none, never wait for each other in different places.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from cka_hooks.errors import OptionError, RankError, warn
from cka_hooks.options import difference
from cka_hooks.similarity.reduce import exchanged, lost, reduced
from cka_hooks.similarity.state import State

# Seconds between two checks for the note of a failed rank. Each check asks another machine.
_LISTEN_EVERY = 1.0
# How many runs a group has started, which keeps the notes of different runs apart.
_runs: Counter[str] = Counter()


class Ranks:
    """The ranks that share a run, seen from one of them. A process alone is the only rank, and never waits.

    Args:
        group: their process group, None for the default one.
        size: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, size: int = 1) -> None:
        self.group, self.size, self.rank = group, size, 0
        self._store: Any = None
        if size == 1:
            return
        self.rank = dist.get_rank(group)
        members = dist.get_process_group_ranks(group or dist.group.WORLD)  # PyTorch 2.6 knows no None
        name = f"cka_hooks/{'-'.join(map(str, members))}"
        _runs[name] += 1
        self._note = f"{name}/{_runs[name]}"
        self._store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
        self._listen_at = time.monotonic() + _LISTEN_EVERY

    @classmethod
    def of(cls, distributed: bool | None, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of `group`, or of the default process group; this process alone if there is none.

        Raises:
            OptionError: a process group was asked for and there is none, or this rank is not in it.
        """
        if distributed is False:
            if group is not None:
                raise OptionError("distributed=False and group= exclude each other")
            return cls()
        if not dist.is_available() or not dist.is_initialized():
            if distributed or group is not None:
                raise OptionError("distributed=True needs torchrun and torch.distributed.init_process_group()")
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
                warn(
                    "torchrun started this process, and no process group is initialised: every rank gets a result of "
                    "its own. Call torch.distributed.init_process_group() first, or pass distributed=False"
                )
            return cls()
        if dist.get_rank(group) < 0:
            raise OptionError("this rank is not in the process group group=: only its members may call compare()")
        return cls(group, dist.get_world_size(group))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Tell the other ranks of an error inside, so that they end with one, too, and do not wait for this one."""
        if error is None or self.size == 1:
            return
        text = f"{type(error).__name__}: {error}"
        waits = isinstance(error, Exception) and not isinstance(error, RankError)
        try:
            if self._store is not None:
                self._store.set(self._note, f"{'waits' if waits else f'rank {self.rank} was stopped'}: {text}")
            if waits:
                exchanged({"error": text}, self.group)
        except (RankError, RuntimeError):
            # The others are already gone, and the user should see the error of this rank.
            pass

    def called(self) -> bool:
        """Whether a rank has failed and waits for this one. Looks at most once a second.

        Raises:
            RankError: a rank was stopped and does not wait.
        """
        if self._store is None or time.monotonic() < self._listen_at:
            return False
        self._listen_at = time.monotonic() + _LISTEN_EVERY
        try:
            note = self._store.get(self._note).decode() if self._store.check([self._note]) else ""
        except RuntimeError as error:
            raise lost(error) from error
        if note and not note.startswith("waits"):
            raise RankError(note)
        return bool(note)

    def exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank contributed, in the order of ranks.

        Raises:
            RankError: a rank failed or does not answer.
        """
        mine = {**mine, "error": None}
        everyone = exchanged(mine, self.group) if self.size > 1 else [mine]
        failures = [f"rank {rank} failed: {its['error']}" for rank, its in enumerate(everyone) if its["error"]]
        if failures:
            raise RankError("; ".join(failures))
        return everyone

    def agree(self, plan: Mapping[str, Any]) -> None:
        """Check that all ranks are about to do the same.

        Args:
            plan: what has to be the same on every rank: the settings of the run, and the identity of its models.

        Raises:
            OptionError: the plans differ. All ranks raise it.
            RankError: a rank failed or does not answer.
        """
        plans = [its["plan"] for its in self.exchange({"plan": dict(plan)})]
        for rank, theirs in enumerate(plans):
            if theirs != plans[0]:
                found = difference(plans[0], theirs, where=("on rank 0", f"on rank {rank}"))
                raise OptionError(f"ranks run with different options: {found}")

    def meet(self, state: State, *, phase: int) -> tuple[State, int]:
        """The state of all ranks together, and the lowest `phase` that any rank has reached.

        Raises:
            RankError: a rank failed or does not answer.
        """
        lowest = min(its["phase"] for its in self.exchange({"phase": phase}))
        return (reduced(state, self.group) if self.size > 1 else state), lowest
