"""Reduce the states of all ranks of a process group to one, field by field as each declares."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cka_hooks.errors import RankError
from cka_hooks.similarity.state import DECLARED, State, sum_up


def is_shared(group: dist.ProcessGroup | None) -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def reduced(state: State, group: dist.ProcessGroup | None) -> State:
    """The state of all ranks, the same on each: the minibatches of rank 1 come after those of rank 0, and so on.

    Raises:
        RankError: a rank is gone, or did not answer within the group's timeout.
    """
    own = state.to("cpu")
    # Plain sums may be large and take one reduction. Everything else is exchanged, and merged rank after rank.
    blank = type(own)().at(own.layers)
    large = [name for name, declared in DECLARED.items() if declared.axes and declared.combine is sum_up]
    fields = {name: getattr(blank if name in large else own, name) for name in DECLARED}
    total = type(own)()
    for rank, theirs in enumerate(exchanged(type(own)(own.layers, **fields), group)):
        if not isinstance(theirs, State):
            raise RankError(f"rank {rank} failed: {theirs}")
        total.merge(theirs)
    own = own.at(total.layers)
    flat = torch.cat([getattr(own, name).flatten() for name in large]).to(_device_of(group))
    try:
        dist.all_reduce(flat, group=group)
    except RuntimeError as error:
        raise lost(error) from error
    parts = flat.cpu().split([getattr(own, name).numel() for name in large])
    for name, part in zip(large, parts, strict=True):
        setattr(total, name, part.view(getattr(own, name).shape).clone())
    return total


def exchanged(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank of the group contributed, in the order of ranks.

    Raises:
        RankError: a rank is gone, or did not answer within the group's timeout.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, mine, group)
    except RuntimeError as error:
        raise lost(error) from error
    return everyone


def lost(error: BaseException) -> RankError:
    """The error to raise if another rank is gone."""
    return RankError(
        f"another rank of the process group ended, or did not answer within the group's timeout ({error}). With "
        "checkpoint= the same call on all ranks continues from where each of them was"
    )


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """The device that the group's backend takes tensors from."""
    backend = dist.get_backend(group)
    for accelerator, type in (("nccl", "cuda"), ("xccl", "xpu"), ("hccl", "npu")):
        if accelerator in backend and "gloo" not in backend:
            return torch.device(type, torch.accelerator.current_device_index())
    return torch.device("cpu")
