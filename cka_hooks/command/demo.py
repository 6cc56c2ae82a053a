"""``cka-hooks demo``: two small ResNets from two seeds, trained on handwritten digits and compared.

Everything is real and comes with the dependencies: the images are scikit-learn's, the network is torchvision's.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cka_hooks.command.shared import check_output, output_words, say, whole, write_all
from cka_hooks.compare import compare
from cka_hooks.errors import MissingExtraError
from cka_hooks.progress import progress_bar

BLOCKS = "layer*.?"
HELD_OUT = 599
EPOCHS = 6


def demo_words(parser: argparse.ArgumentParser) -> None:
    """Train two small networks on digits and compare them.

    Trains torchvision's ResNet-18 from two seeds on scikit-learn's handwritten digits, then compares all residual
    blocks of both over the held-out images. This works offline and takes less than two minutes.
    """
    epochs = "passes over the training images; default: %(default)s"
    parser.add_argument("--epochs", type=whole(1), default=EPOCHS, metavar="N", help=epochs)
    output_words(parser, "cka-demo")
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    out, progress = arguments.out, not arguments.quiet
    check_output(arguments)
    packages = {"sklearn": "scikit-learn", "torchvision": "torchvision", "matplotlib": "matplotlib"}
    if missing := [package for module, package in packages.items() if find_spec(module) is None]:
        raise MissingExtraError(f'the demo needs {" and ".join(missing)}: pip install "cka-hooks[demo]"')
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train, held_out = digits()
    networks = {}
    for seed in (0, 1):
        network = trained(train, seed, epochs=arguments.epochs, progress=progress)
        networks[f"seed {seed}"] = network
        say(f"seed {seed}: {accuracy(network, held_out):.1%} of {len(held_out)} held-out digits right")

    shuffled = DataLoader(held_out, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    result = compare(networks, shuffled, layers=BLOCKS, progress=progress)
    write_all(result, out)
    say(f"\n{time.perf_counter() - started:.0f} seconds in all")
    return 0


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's 1797 handwritten digits, (n, 1, 8, 8) from 0 to 1, split into training and held-out images."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(classes).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out])


def small_resnet18() -> nn.Module:
    """torchvision's ResNet-18 for small images: a 3x3 stem on one channel, no max pooling."""
    from torchvision.models import resnet18

    network: nn.Module = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def trained(data: TensorDataset, seed: int, *, epochs: int = EPOCHS, progress: bool = True) -> nn.Module:
    """A network trained on `data`. The seed decides its initial weights and the order of the images."""
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
                bar.update(1)
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: TensorDataset) -> float:
    """The share of images whose largest output is their class."""
    images, classes = data.tensors
    outputs: Tensor = network(images)
    return float((outputs.argmax(1) == classes).float().mean())
