"""Several ranks, one result: what each rank added up, added up across a process group.

The state of an accumulator is a sum over minibatches, so that a group needs one reduction of O(layers^2)
numbers at the end of a run (and one at each look of `tolerance`). This file knows state dicts and process
groups, nothing of models.

All ranks of a run meet in one kind of collective only. A rank that is through with its loader meets the
others until all are through; one that looks at its standard errors meets them in between; one that fails
leaves a note in the group's store, for which the others look about once a second, and meets them to say so.
So ranks with unequal numbers of batches, or none, do not wait for each other in different places.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cka_hooks.errors import CKAWarning, OptionError, RankError
from cka_hooks.similarity.sums import NEVER

if TYPE_CHECKING:
    from cka_hooks.similarity.accumulator import CKAAccumulator

# Seconds between two looks for a note of a rank that failed: each is a question to another machine.
_LISTEN_EVERY = 1.0
# Of how many runs a group has seen the start: it makes the notes of different runs different.
_runs: Counter[str] = Counter()


class Ranks:
    """The ranks that share a run, seen from one of them."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        members = dist.get_process_group_ranks(group or dist.group.WORLD)  # PyTorch 2.6 knows no None
        name = f"cka_hooks/{'-'.join(map(str, members))}"
        _runs[name] += 1
        self._note = f"{name}/{_runs[name]}"
        self._store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
        self._listen_at = time.monotonic() + _LISTEN_EVERY

    @classmethod
    def of(cls, distributed: bool | None, group: dist.ProcessGroup | None) -> Ranks | None:
        """The ranks of `group` or of the default process group, None for a run of one process alone.

        Raises:
            OptionError: there is no process group and one was asked for, or this rank is not in it.
        """
        if distributed is False:
            if group is not None:
                raise OptionError("distributed=False and group= exclude each other")
            return None
        if not dist.is_available() or not dist.is_initialized():
            if distributed or group is not None:
                raise OptionError(
                    "distributed=True needs a process group: start the script with torchrun and call "
                    "torch.distributed.init_process_group() before compare()"
                )
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
                warnings.warn(
                    "torchrun started this process, and no process group is initialised: every rank gets a result of "
                    "its own. Call torch.distributed.init_process_group() first, or say distributed=False",
                    CKAWarning,
                    stacklevel=3,
                )
            return None
        if dist.get_rank(group) < 0:
            raise OptionError("this rank is not in the process group group=: only its members may call compare()")
        return cls(group) if dist.get_world_size(group) > 1 else None

    def share(self, samples: int, *, equal: bool) -> int:
        """This rank's part of `samples`; the same for every rank, rounded up, where it has to be `equal`."""
        return -(-samples // self.size) if equal else len(range(self.rank, samples, self.size))

    def called(self) -> bool:
        """Whether a rank has failed and waits for this one; looks at most once a second.

        Raises:
            RankError: a rank was stopped and waits for nobody.
        """
        now = time.monotonic()
        if now < self._listen_at or self._store is None:
            return False
        self._listen_at = now + _LISTEN_EVERY
        try:
            note = self._store.get(self._note).decode() if self._store.check([self._note]) else ""
        except RuntimeError as error:
            raise _lost(error) from error
        if note and not note.startswith("waits"):
            raise RankError(note)
        return bool(note)

    def meet(
        self, accumulator: CKAAccumulator, *, stage: int, details: Any, error: str | None = None
    ) -> tuple[CKAAccumulator, list[Any], int]:
        """The sum over all ranks, each rank's `details`, and the lowest `stage` that a rank is at.

        Raises:
            RankError: a rank failed, or does not answer.
            OptionError: the ranks run with different options.
        """
        if error is not None:
            exchanged({"error": error}, self.group)
            return accumulator, [], stage
        state = accumulator.state_dict()
        mine = {**_described(state), "details": details, "stage": stage, "error": None}
        everyone = exchanged(mine, self.group)
        failures = [f"rank {rank} failed: {its['error']}" for rank, its in enumerate(everyone) if its["error"]]
        if failures:
            raise RankError("; ".join(failures))
        total = copy.copy(accumulator)
        total.load_state_dict(_added_up(state, everyone, self.group))
        return total, [its["details"] for its in everyone], min(its["stage"] for its in everyone)

    def fail(self, accumulator: CKAAccumulator, error: BaseException) -> None:
        """Tell the other ranks, so that they end with an error too and do not wait for this one."""
        text = f"{type(error).__name__}: {error}"
        waits = isinstance(error, Exception) and not isinstance(error, RankError)
        try:
            if self._store is not None:
                self._store.set(self._note, f"{'waits' if waits else f'rank {self.rank} was stopped'}: {text}")
            if waits:
                self.meet(accumulator, stage=0, details=None, error=text)
        except (RankError, RuntimeError):
            # The others are gone already, and what went wrong here is what the user should see.
            pass


@contextmanager
def told(ranks: Ranks | None, accumulator: CKAAccumulator) -> Iterator[None]:
    """Tell the other ranks about an error inside."""
    try:
        yield
    except BaseException as error:
        if ranks is not None:
            ranks.fail(accumulator, error)
        raise


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model needs all ranks that hold its parts: FSDP, tensor parallel."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def exchanged(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank of the group has handed in, in the order of ranks.

    Raises:
        RankError: a rank is gone, or did not answer within the group's timeout.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, mine, group)
    except RuntimeError as error:
        raise _lost(error) from error
    return everyone


def added_up(state: Mapping[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The sum of the state dicts of all ranks, the same on every rank; see `CKAAccumulator.sync`."""
    return _added_up(state, exchanged(_described(state), group), group)


def _lost(error: BaseException) -> RankError:
    return RankError(
        f"another rank of the process group ended, or did not answer within the group's timeout ({error}). With "
        "checkpoint= the same call on all ranks goes on from where each of them was"
    )


def _described(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state is small and does not simply add up."""
    sums = state["sums"] or {}
    described = {key: value for key, value in state.items() if key not in ("sums", "kept")}
    described |= {name: sums[name].tolist() if sums else [] for name in ("bad", "peak", "peak_sample")}
    described["kept"] = sum(map(len, state["kept"]))
    return described


def _added_up(
    state: Mapping[str, Any], everyone: Sequence[Mapping[str, Any]], group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """As if the minibatches of rank 1 came after those of rank 0, and so on."""
    total: dict[str, Any] = {
        "options": dict(everyone[0]["options"]),
        "largest": max(its["largest"] for its in everyone),
        "passes": max(its["passes"] for its in everyone),
        "seen": dict(sum((Counter(its["seen"]) for its in everyone), Counter())),
        "dtypes": {layer: dtype for its in reversed(everyone) for layer, dtype in its["dtypes"].items()},
        "layers": list(dict.fromkeys(layer for its in everyone for layer in its["layers"])),
        "first_pass": None,
        "sums": None,
        "kept": [],
    }
    for rank, its in enumerate(everyone):
        different = [key for key, value in its["options"].items() if value != total["options"].get(key)]
        if different:
            first, option = total["options"], different[0]
            raise OptionError(
                f"ranks run with different options: {option} is {first.get(option)!r} on rank 0 and "
                f"{its['options'][option]!r} on rank {rank}"
            )
    for count in ("minibatches", "samples", "left_out"):
        total[count] = sum(its[count] for its in everyone)
    if any(its["first_pass"] for its in everyone):
        firsts = [its["first_pass"] or (its["minibatches"], its["samples"]) for its in everyone]
        total["first_pass"] = [sum(first[0] for first in firsts), sum(first[1] for first in firsts)]
    if not total["layers"]:
        return total
    position = {layer: i for i, layer in enumerate(total["layers"])}
    total["sums"] = _reduced(state, position, group) | _earliest(everyone, position)
    total["kept"] = _gathered(state, position, [its["kept"] for its in everyone], group)
    return total


def _reduced(
    state: Mapping[str, Any], position: Mapping[str, int], group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """The sums that simply add up, in one reduction."""
    count = len(position)
    moments = torch.zeros(4, count, count, dtype=torch.float64)
    vectors = torch.zeros(2, count, dtype=torch.float64)
    if state["sums"] is not None:
        index = torch.tensor([position[layer] for layer in state["layers"]])
        sums = {name: tensor.cpu() for name, tensor in state["sums"].items()}
        moments[:, index[:, None], index] = sums["moments"]
        vectors[:, index] = torch.stack([sums["spread"], sums["size"]])
    flat = torch.cat([moments.flatten(), vectors.flatten()]).to(_device_of(group))
    try:
        dist.all_reduce(flat, group=group)
    except RuntimeError as error:
        raise _lost(error) from error
    flat = flat.cpu()
    spread, size = flat[4 * count * count :].view(2, count).clone()
    return {"moments": flat[: 4 * count * count].view(4, count, count).clone(), "spread": spread, "size": size}


def _earliest(everyone: Sequence[Mapping[str, Any]], position: Mapping[str, int]) -> dict[str, Tensor]:
    """Number of the first minibatch that was not finite and the heaviest sample, counted rank after rank."""
    bad, peak, peak_sample = [NEVER] * len(position), [0.0] * len(position), [0] * len(position)
    minibatches = samples = 0
    for its in everyone:
        for layer, its_bad, its_peak, its_sample in zip(
            its["layers"], its["bad"], its["peak"], its["peak_sample"], strict=True
        ):
            i = position[layer]
            if its_bad != NEVER:
                bad[i] = min(bad[i], its_bad + minibatches)
            if its_peak > peak[i]:
                peak[i], peak_sample[i] = its_peak, its_sample + samples
        minibatches += its["minibatches"]
        samples += its["samples"] + its["left_out"]
    return {
        "bad": torch.tensor(bad),
        "peak": torch.tensor(peak, dtype=torch.float64),
        "peak_sample": torch.tensor(peak_sample),
    }


def _gathered(
    state: Mapping[str, Any], position: Mapping[str, int], counts: Sequence[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """The values of single minibatches, of all ranks one after another."""
    if not any(counts):
        return []
    mine = torch.zeros(max(counts), len(position), len(position), dtype=torch.float64)
    row = 0
    for hsic in state["kept"]:
        index = torch.tensor([position[layer] for layer in state["layers"][: hsic.shape[-1]]])
        mine[row : row + len(hsic), index[:, None], index] = hsic.cpu()
        row += len(hsic)
    device = _device_of(group)
    all_kept = [torch.empty_like(mine, device=device) for _ in counts]
    try:
        dist.all_gather(all_kept, mine.to(device), group)
    except RuntimeError as error:
        raise _lost(error) from error
    return [kept[:count].cpu() for kept, count in zip(all_kept, counts, strict=True) if count]


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes tensors from."""
    backend = dist.get_backend(group)
    for accelerator, type in (("nccl", "cuda"), ("xccl", "xpu"), ("hccl", "npu")):
        if accelerator in backend and "gloo" not in backend:
            return torch.device(type, torch.accelerator.current_device_index())
    return torch.device("cpu")
