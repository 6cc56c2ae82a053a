"""
The CNN of a tutorial
=====================


Networks like this one are often rewritten to return their activations. Hooks make that unnecessary: name the layers
as ``print(model)`` shows them, and leave ``forward`` as it is.

Run ``python examples/small_cnn.py``. It needs ``pip install "cka-hooks[demo]"``.
"""

import sys
from itertools import pairwise

import torch
from torch import nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.command.demo import accuracy, digits


class SmallCNN(nn.Module):
    """Three 3x3 convolutions, pools, one linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.pool(self.relu(self.conv3(x)))
        return self.fc(x.flatten(1))


def main(quick: bool = False) -> cka_hooks.CKAResult:
    torch.manual_seed(0)
    train, held_out = digits()
    model = SmallCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(1 if quick else 10):
        for images, classes in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
    print(f"{accuracy(model.eval(), held_out):.1%} of the held-out digits right")

    # No layers= is every leaf module that runs; `relu` and `pool` run three times and are three layers each.
    result = cka_hooks.compare(model, DataLoader(held_out, batch_size=64, shuffle=True), progress=False)
    for before, after in pairwise(result.layers):
        value = result[before, after]
        print(f"{before:>8} -> {after:<8} {value:.3f} {'#' * round(40 * value)}")
    if not quick:
        result.plot("small_cnn.png", values=True)
        print("small_cnn.png")
    return result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
