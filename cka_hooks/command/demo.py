"""The demo: two small ResNets trained from two seeds on handwritten digits, and how alike their blocks are.

Everything is real and comes with the dependencies: the images are scikit-learn's, the network is torchvision's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cka_hooks.compare import compare
from cka_hooks.errors import MissingExtraError
from cka_hooks.progress import progress_bar
from cka_hooks.results.result import CKAResult

BLOCKS = "layer*.?"
HELD_OUT = 599
EPOCHS = 6


def run(out: Path, *, epochs: int = EPOCHS, progress: bool = True, stream: TextIO | None = None) -> CKAResult:
    """Train both networks, compare all their residual blocks, write pictures and the result into `out`.

    Args:
        out: a folder, made where it does not exist.
        epochs: passes over the training images; fewer make a quicker demo of worse networks.
        progress: show progress bars on stderr.
        stream: where the report goes, by default stdout.

    Returns:
        The result: both networks' blocks against each other, 16 by 16.

    Raises:
        MissingExtraError: scikit-learn, torchvision or matplotlib is not installed.
        OSError: `out` cannot be written to.
    """
    stream = sys.stdout if stream is None else stream
    require("the demo")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train, held_out = digits()
    networks = {}
    for seed in (0, 1):
        network = trained(train, seed, epochs=epochs, progress=progress)
        networks[f"seed {seed}"] = network
        print(f"seed {seed}: {accuracy(network, held_out):.1%} of {len(held_out)} held-out digits right", file=stream)

    shuffled = DataLoader(held_out, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    result = compare(networks, shuffled, layers=BLOCKS, progress=progress)
    across = result.between("seed 0", "seed 1")

    print(f"\n{result.summary()}\n", file=stream)
    for name, path in _written(result, across, out).items():
        print(f"{name:<22}{path}", file=stream)
    print(f"\n{time.perf_counter() - started:.0f} seconds in all", file=stream)
    return result


def require(what: str) -> None:
    """Raise :class:`MissingExtraError` unless all that the demo needs is installed."""
    packages = {"sklearn": "scikit-learn", "torchvision": "torchvision", "matplotlib": "matplotlib"}
    missing = []
    for module, package in packages.items():
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise MissingExtraError(
            f'{what} needs {" and ".join(missing)}, not installed here: pip install "cka-hooks[demo]"'
        )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's 1797 handwritten digits, (n, 1, 8, 8) from 0 to 1: for training, and held out."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(classes).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out])


def small_resnet18() -> nn.Module:
    """torchvision's ResNet-18 for images of few pixels: a 3x3 stem on one channel, no max pooling."""
    from torchvision.models import resnet18

    network: nn.Module = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def trained(data: TensorDataset, seed: int, *, epochs: int = EPOCHS, progress: bool = True) -> nn.Module:
    """A network trained on `data`; the seed decides its first weights and the order of the images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = small_resnet18()
        order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size=64, shuffle=True, generator=order, drop_last=True)
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    network.train()
    with progress_bar(f"training seed {seed}", "step", steps, shown=progress) as bar:
        for _ in range(epochs):
            for images, classes in loader:
                loss = nn.functional.cross_entropy(network(images), classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: TensorDataset) -> float:
    """The share of images whose largest output is their class."""
    images, classes = data.tensors
    outputs: Tensor = network(images)
    return float((outputs.argmax(1) == classes).float().mean())


def _written(result: CKAResult, across: CKAResult, out: Path) -> dict[str, Path]:
    """What was written into `out`: a short name -> the path."""
    paths = {"heatmap": out / "cka.png", "seed 0 against seed 1": out / "between.png", "result": out / "cka.json"}
    across.plot(paths["seed 0 against seed 1"])
    result.plot(paths["heatmap"])
    result.save(paths["result"])
    try:
        result.to_html(out / "cka.html")
    except MissingExtraError:
        pass
    else:
        paths["page"] = out / "cka.html"
    return paths
