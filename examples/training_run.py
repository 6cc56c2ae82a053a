"""
Checkpoints over training
=========================


How alike is each layer, at every checkpoint, to the final network and to its initialisation?

Run ``python examples/training_run.py FOLDER``. It needs ``pip install "cka-hooks[demo]"``.

The script trains a small network on scikit-learn's digits, keeps a state dict of every epoch in FOLDER, and compares
all checkpoints. They are loaded one after another: ``compare`` takes functions that build a model, so twenty
checkpoints need the memory of one. For your own checkpoints, replace ``train`` and ``network``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cka_hooks
from cka_hooks.command.demo import digits


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, 10),
    )


def train(data: TensorDataset, folder: Path, epochs: int) -> list[Path]:
    """Train, and keep what the network is before the first epoch and after each."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(1))
    paths = [folder / f"epoch{epoch:02}.pt" for epoch in range(epochs + 1)]
    torch.save(model.state_dict(), paths[0])
    for path in paths[1:]:
        for images, classes in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
        torch.save(model.state_dict(), path)
    return paths


def load(path: Path) -> nn.Module:
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def draw(result: cka_hooks.CKAResult, names: list[str], layers: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for layer in layers:
        axes.plot([result[f"{name}/{layer}", f"{names[-1]}/{layer}"] for name in names], "o-", label=f"layer {layer}")
    axes.set(xlabel="epoch", ylabel="CKA with the final network")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(path)


def main(folder: Path = Path("training_run"), epochs: int = 8, quick: bool = False) -> cka_hooks.CKAResult:
    epochs = 2 if quick else epochs
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = digits()
    paths = train(training, folder, epochs)
    # A seeded generator: every checkpoint has to see the same minibatches.
    loader = DataLoader(held_out, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(2))
    checkpoints = {path.stem: partial(load, path) for path in paths}
    result = cka_hooks.compare(checkpoints, loader, layers=[nn.Conv2d, nn.Linear])
    result.save(folder / "training_run.json")

    first, last = paths[0].stem, paths[-1].stem
    layers = [label.partition("/")[2] for label in result.layers if label.startswith(f"{first}/")]
    for title, reference in (("to the final network", last), ("to initialisation", first)):
        print(f"\nSimilarity of each layer {title}")
        print("checkpoint".ljust(12) + "".join(f"layer {layer}".rjust(10) for layer in layers))
        for name in checkpoints:
            values = (result[f"{name}/{layer}", f"{reference}/{layer}"] for layer in layers)
            print(name.ljust(12) + "".join(f"{value:10.3f}" for value in values))
    if not quick:
        draw(result, list(checkpoints), layers, folder / "training_run.png")
    return result


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if argument != "--quick"]
    main(Path(folders[0] if folders else "training_run"), quick="--quick" in sys.argv)
