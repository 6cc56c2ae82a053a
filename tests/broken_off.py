"""A small run that can be interrupted anywhere. Its module is imported quickly, in processes that will be killed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.run import checkpoint as files


class Stop(Exception):
    pass


def model(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(inplace=True), nn.Linear(width, 3))


class Forward:
    """Runs the model, and breaks off in one batch; two of them look the same in a run's settings."""

    def __init__(self, stop_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls = 0
        self.stop_at = stop_at
        self.error = error or Stop()

    def __call__(self, module, batch):
        # A probe of the first batch runs on fewer samples.
        self.calls += len(batch[0] if isinstance(batch, list) else batch) >= 4
        if self.calls == self.stop_at:
            raise self.error
        return module(batch[0] if isinstance(batch, list) else batch)


def tensors(samples: int = 100) -> torch.Tensor:
    return torch.randn(samples, 12, generator=torch.Generator().manual_seed(5))


def shuffled(data=None, **options) -> DataLoader:
    data = tensors() if data is None else data
    return DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1), **options)


def run(path, loader, *, net=None, stop_at=None, error=None, **options):
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    forward = Forward(stop_at, error)
    result = cka_hooks.compare(
        net or model(), loader, forward=forward, checkpoint=path, **{"progress": False, **options}
    )
    return result, forward


def kept_after_every_batch(path: Path, pipe) -> None:
    """Keeps the run after every batch, and says so after each: the number of samples in the file."""
    torch.set_num_threads(1)
    write = files.write

    def told(path, content):
        write(path, content)
        pipe.send(content["run"]["comparison"]["state"]["samples"])

    files.write = told
    run(path, shuffled(tensors(4000)), checkpoint_every=1e-9)
