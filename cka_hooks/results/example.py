"""A small made-up result, for examples and for trying things out."""

from __future__ import annotations

import torch

from cka_hooks.results.result import CKAResult


def example(models: tuple[str, ...] = ()) -> CKAResult:
    """Three layers, for each model if names are given; see :meth:`CKAResult.example`."""
    block = torch.tensor([[1.0, 0.9, 0.5], [0.9, 1.0, 0.6], [0.5, 0.6, 1.0]], dtype=torch.float64, device="cpu")
    names = [f"{name}/" for name in models] or [""]
    labels = tuple(f"{name}{layer}" for name in names for layer in ("conv1", "conv2", "fc"))
    matrix = torch.kron(block.new_full((len(names),) * 2, 0.95).fill_diagonal_(1.0), block)
    return CKAResult(
        rows=labels,
        columns=labels,
        matrix=matrix,
        stderr=torch.full_like(matrix, 0.02).fill_diagonal_(0.0),
        samples=640,
        minibatches=20,
        degrees_of_freedom=19,
        models=models,
        minibatch_hsic=matrix.expand(20, -1, -1) / 20,
        minibatch_layers=labels,
    )
