"""A run of 20,000 minibatches: memory stays flat, and no precision is lost."""

from __future__ import annotations

import gc
import resource
import tracemalloc

import numpy as np
import oracle
import pytest
import torch
from torch import nn

import cka_hooks

SIZE = 8


@pytest.mark.parametrize("minibatches", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_many_minibatches(minibatches: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    # A common component that makes sums of raw products lose digits, in every minibatch another one.
    generator = torch.Generator().manual_seed(1)
    values, python, resident = [], [], []

    class Loader:
        def __iter__(self):
            for number in range(minibatches):
                if number % (minibatches // 10) == minibatches // 10 - 1:
                    gc.collect()
                    python.append(tracemalloc.get_traced_memory()[0])
                    resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                yield torch.randn(SIZE, 6, generator=generator, dtype=torch.float64) + 3 * np.cos(number)

    tracemalloc.start(1)
    try:
        result = cka_hooks.compare(model, Loader(), progress=False)
    finally:
        tracemalloc.stop()
    assert result.minibatches == minibatches
    assert result.samples == minibatches * SIZE
    # Python objects: nothing grows with the number of minibatches. What levels off does: some 60 kB within the first
    # thousand, of fingerprints of 256 batches, and what tracemalloc comes to ascribe to shapes of tensors, in plain
    # PyTorch too. In the second half of 600 that is 15 kB; an object kept of each minibatch is as much again. The
    # process: neither.
    assert max(python[5:]) - python[5] < 25_000, python
    assert resident[-1] - resident[1] < 4_000, resident

    generator.manual_seed(1)
    with torch.no_grad():
        for number in range(minibatches):
            x = torch.randn(SIZE, 6, generator=generator, dtype=torch.float64) + 3 * np.cos(number)
            grams = []
            for module in model:
                x = module(x)
                grams.append(oracle.linear_gram(oracle.flatten(x)))
            values.append((SIZE - 3) * oracle.hsic_pairs(grams))
    stacked = np.stack(values)
    np.testing.assert_allclose(result.matrix.numpy(), oracle.cka_of_values(stacked), rtol=0, atol=1e-11)
    np.testing.assert_allclose(result.stderr.numpy(), oracle.stderr_minibatch(stacked), rtol=0, atol=1e-9)
