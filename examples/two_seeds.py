"""
One architecture from two seeds
===============================


Do the same layers learn the same representation?

Run ``python examples/two_seeds.py``. It needs ``pip install "cka-hooks[demo]"``.
"""

import sys
from itertools import pairwise

import torch
from torch import nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.command.demo import accuracy, digits


def trained(seed: int, epochs: int, data: torch.utils.data.Dataset) -> nn.Module:
    torch.manual_seed(seed)
    widths = [64, 128, 128, 128, 128]
    layers = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, classes in DataLoader(data, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
    return model.eval()


def main(quick: bool = False) -> cka_hooks.CKAResult:
    train, held_out = digits()
    models = {f"seed {seed}": trained(seed, 2 if quick else 15, train) for seed in (0, 1)}
    for name, model in models.items():
        print(f"{name}: {accuracy(model, held_out):.1%} right")
    loader = DataLoader(held_out, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    result = cka_hooks.compare(models, loader, layers=[nn.ReLU, nn.Linear], progress=False)
    print(result.between("seed 0", "seed 1"))
    print(result.summary())
    if not quick:
        result.between("seed 0", "seed 1").plot("two_seeds.png")
        print("two_seeds.png")
    return result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
