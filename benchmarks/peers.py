"""cka_hooks next to the three CKA packages for PyTorch on PyPI: time, memory, and how far off the values are.

    pip install -e ".[demo,peers]"
    python benchmarks/peers.py --figure peers.png            # and --device cuda

Every package gets the same model, loader and layers, and is used as its README says with its best settings: see
the functions below. Layers are the leaf modules that run exactly once in a forward pass, since only cka_hooks tells
several calls of one module apart. The reference is tests/oracle.py: activations cloned inside the hook, arithmetic in
float64. Inputs are crops of photographs; "noise" is the torch.randn of the packages' own examples.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from measure import BARE, in_own_process, interleaved, parsed, parser_of, peak_mib, print_machine, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet
from workload import Config, forward, image_crops, resnet18_cifar, vit_b_16, without_inplace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracle

OFF = 0.01
# torch-cka takes two Gram matrices for each pair of layers: hours for more of them.
TORCH_CKA_LAYERS = 60


# The packages


def cka_hooks_matrix(model: nn.Module, loader: DataLoader, layers: list[str]) -> Tensor:
    import cka_hooks

    return cka_hooks.compare(model, loader, layers=layers, progress=False).matrix


def pytorch_cka_matrix(model: nn.Module, loader: DataLoader, layers: list[str]) -> Tensor:
    """One forward pass serves both sides when they are the same object. A list alone would be one of loaders."""
    from cka import compute_cka

    return compute_cka(model, model, [loader], layers=layers, device=device_of(model), progress=False)[0].cpu()


def cka_pytorch_matrix(model: nn.Module, loader: DataLoader, layers: list[str]) -> Tensor:
    """Two models, as in its README: given one object twice it would take each Gram matrix four times, not two.

    One epoch: the default of ten gives the same average of the same minibatches. Its `epsilon` makes no difference to
    the errors on these models.
    """
    from cka_pytorch.cka import CKACalculator

    calculator = CKACalculator(model, deepcopy(model), layers, layers, batched_feature_size=256, verbose=False)
    matrix = calculator.calculate_cka_matrix(loader, num_epochs=1)
    order = [calculator.hook_manager1.module_names.index(name) for name in layers]
    calculator.reset()
    return matrix[order][:, order].cpu()


def torch_cka_matrix(model: nn.Module, loader: DataLoader, layers: list[str]) -> Tensor:
    """Without gradients, which its README leaves to the caller. It stops at a NaN, with the matrix in place."""
    from torch_cka import CKA

    copied = deepcopy(model)
    found = CKA(copied, copied, "one", "other", layers, layers, device=str(device_of(model)))
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad(), contextlib.suppress(AssertionError):
        found.compare(loader)
    return found.hsic_matrix.cpu()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class Package(NamedTuple):
    """One package.

    Attributes:
        module: what it is imported as.
        matrix: (model, loader, layers) -> CKA of every pair.
        clipped: whether it sets negative estimates to 0, so that the reference has to be clipped as well.
    """

    module: str
    matrix: Callable[[nn.Module, DataLoader, list[str]], Tensor]
    clipped: bool = False


RUNS = {
    "cka_hooks": Package("cka_hooks", cka_hooks_matrix),
    "pytorch-cka": Package("cka", pytorch_cka_matrix, clipped=True),
    "cka-pytorch": Package("cka_pytorch", cka_pytorch_matrix),
    "torch-cka": Package("torch_cka", torch_cka_matrix),
}


# The models


class OutOfPlaceBlock(BasicBlock):
    """A residual block of ResNet-18 that overwrites nothing: `out + identity` for `out += identity`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


@dataclasses.dataclass(frozen=True)
class Case(Config):
    """One model with its data."""

    calibrated: bool = True
    noise: bool = False

    def loader(self, batches: int, device: str | torch.device = "cpu") -> DataLoader:
        """Batches that are on the device already: what a loader takes to bring them there is nobody's here."""
        images = image_crops(self.batch * batches, self.pixels)
        if self.noise:
            images = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images.to(device), torch.zeros(len(images))), batch_size=self.batch)


def out_of_place_resnet18() -> nn.Module:
    return without_inplace(ResNet(OutOfPlaceBlock, [2, 2, 2, 2]))


CASES = {
    "noise": Case("ResNet-18, untrained, noise", torchvision.models.resnet18, 64, 64, calibrated=False, noise=True),
    "untrained": Case("ResNet-18, untrained", torchvision.models.resnet18, 64, 64, calibrated=False),
    "calibrated": Case("ResNet-18, calibrated", torchvision.models.resnet18, 64, 64),
    "out-of-place": Case("ResNet-18, calibrated, nothing in place", out_of_place_resnet18, 64, 64),
    "resnet50": Case("ResNet-50, calibrated", torchvision.models.resnet50, 64, 64),
    "cifar": Case("ResNet-18, CIFAR stem, calibrated", resnet18_cifar, 32, 128),
    "resnet50-224": Case("ResNet-50, calibrated", torchvision.models.resnet50, 224, 64),
    "vit": Case("ViT-B/16, untrained", vit_b_16, 224, 32),
    "tiny": Case("ResNet-18, CIFAR stem, calibrated", resnet18_cifar, 16, 16),
}
DEFAULT = ("noise", "untrained", "calibrated", "out-of-place", "resnet50")
FULL = (*DEFAULT, "cifar", "resnet50-224", "vit")


def layers_of(model: nn.Module, loader: DataLoader) -> list[str]:
    """Leaf modules that run once and return a tensor, in order of execution.

    Left out is also a name that is the last part of another module's name: cka-pytorch would take that one too.
    """
    calls: Counter[str] = Counter()
    tensors = set()
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None or isinstance(module, nn.MultiheadAttention):

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                calls[name] += 1
                if isinstance(output, Tensor):
                    tensors.add(name)

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(next(iter(loader))[0][:2])
    for handle in handles:
        handle.remove()
    once = [name for name, count in calls.items() if count == 1 and name in tensors]
    other = {name.split(".")[-1] for name, _ in model.named_modules() if name not in once}
    return [name for name in once if name not in other]


def bare(model: nn.Module, loader: DataLoader) -> None:
    forward(model, (images for images, _ in loader))


# What is measured


class Row(NamedTuple):
    """One package on one model."""

    case: str
    package: str
    ratio: float
    time: str
    mib: float
    error: float
    off: float
    nans: int


def installed(package: str) -> bool:
    return importlib.util.find_spec(RUNS[package].module) is not None


def run_case(name: str, packages: list[str], args: argparse.Namespace) -> list[Row]:
    case = CASES[name]
    model, loader = case.model(case.calibrated).to(args.device), case.loader(args.batches, args.device)
    layers = layers_of(model, loader)
    if len(layers) > args.torch_cka_layers:
        packages = [package for package in packages if package != "torch-cka"]
    labels, reference, _ = oracle.cka_of_model(model, list(loader), layers=layers)
    reference = reference[[[labels.index(x)] for x in layers], [labels.index(x) for x in layers]]
    runs: dict[str, Callable[[], object]] = {BARE: partial(bare, model, loader)}
    runs |= {package: partial(RUNS[package].matrix, model, loader, layers) for package in packages}
    matrices = {package: np.asarray(runs[package]()) for package in packages}
    found = interleaved(runs, args.rounds, at_most={"torch-cka": min(2, args.rounds)})
    title = f"{case.title}, {case.pixels} px, batch {case.batch}"
    print(f"{title}: {len(layers)} layers, bare forward pass {min(found.seconds[BARE]) / args.batches:.2f} s a batch")
    rows = []
    for package in packages:
        mib = math.nan
        if not args.no_memory:
            arguments = ["--child", name, package, "--batches", str(args.batches), "--device", args.device]
            mib = float(str(in_own_process(arguments)["mib"]))
        target = reference.clip(0, 1) if RUNS[package].clipped else reference
        errors = np.abs(matrices[package] - target)[~np.isnan(reference)]
        rows.append(
            Row(
                title,
                package,
                found.ratio(package),
                found.spelled(package),
                mib,
                float(np.nanmax(errors)),
                float((errors > OFF).mean()),
                int(np.isnan(errors).sum()),
            )
        )
    return rows


def child(name: str, package: str, args: argparse.Namespace) -> None:
    """Peak memory of one package above the bare forward pass, in a process that runs nothing else."""
    case = CASES[name]
    model, loader = case.model(case.calibrated).to(args.device), case.loader(args.batches, args.device)
    layers = layers_of(model, loader)
    importlib.import_module(RUNS[package].module)
    below = peak_mib(partial(bare, model, loader))
    above = peak_mib(partial(RUNS[package].matrix, model, loader, layers))
    print(json.dumps({"mib": above - below}))


COLOURS = {"cka_hooks": "#c0392b", "pytorch-cka": "#2a6fbb", "cka-pytorch": "#7fb069", "torch-cka": "#8e6fae"}


def plot(path: Path, rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows))
    packages = list(dict.fromkeys(row.package for row in rows))
    panels: list[tuple[str, Callable[[Row], float], str]] = [
        ("time, bare forward pass = 1", lambda row: row.ratio, "{:.2f}"),
        ("peak MiB above the bare forward pass", lambda row: max(row.mib, 0.5), "{:.0f}"),
        ("largest error against float64", lambda row: row.error, "{:.0e}"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.62 * len(cases) * len(packages) ** 0.5 + 1.6), sharey=True)
    height = 0.8 / len(packages)
    for axis, (title, value, spelled) in zip(axes, panels, strict=True):
        for row in rows:
            where = cases.index(row.case) + (packages.index(row.package) - (len(packages) - 1) / 2) * height
            if math.isnan(value(row)):
                continue
            axis.barh(where, value(row), height * 0.92, color=COLOURS[row.package])
            text = spelled.format(value(row)) + (f", {row.nans} NaN" if row.nans and "error" in title else "")
            axis.annotate(
                text,
                (value(row), where),
                textcoords="offset points",
                xytext=(3, 0),
                va="center",
                fontsize=7.5,
                bbox={"color": "white", "pad": 0.6},
            )
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(0.95 if axis is axes[0] else low, high * (high / low) ** 0.22)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].axvline(1e-6, color="0.4", linewidth=0.8, linestyle=":", zorder=0)
    axes[2].annotate(
        " 1e-6",
        (1e-6, 0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=7.5,
    )
    names = [case.rsplit(", ", 2) for case in cases]
    axes[0].set_yticks(range(len(cases)), [f"{name}\n{pixels}, {batch}" for name, pixels, batch in names], fontsize=9)
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[package]) for package in packages]
    figure.legend(handles, packages, loc="lower center", ncols=len(packages), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = parser_of(__doc__, "rounds", "figure", "cpu-time", "device")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=None)
    parser.add_argument("--full", action="store_true", help="all cases, ResNet-50 and ViT-B/16 at 224 pixels too")
    parser.add_argument("--packages", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--torch-cka-layers", type=int, default=TORCH_CKA_LAYERS, help="leave it out above this many")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "PACKAGE"), help=argparse.SUPPRESS)
    args = parsed(parser)
    warnings.simplefilter("ignore")
    if args.child:
        child(*args.child, args)
        return
    names = args.cases or list(FULL if args.full else DEFAULT)
    packages = [package for package in args.packages if installed(package)]
    print_machine()
    print(f"image crops, {args.batches} batches a run, {args.rounds} interleaved rounds (torch-cka: at most 2)")
    missing = [package for package in args.packages if package not in packages]
    if missing:
        print(f'not installed: {", ".join(missing)}; pip install -e ".[demo,peers]"')
    print()
    rows = [row for name in names for row in run_case(name, packages, args)]
    header = [
        "network",
        "package",
        "time, bare forward = 1",
        "MiB above it",
        "largest error",
        f"entries off by more than {OFF}",
        "NaN",
    ]
    print()
    print(
        table(
            header,
            [
                [
                    row.case,
                    row.package,
                    row.time,
                    "" if math.isnan(row.mib) else f"{row.mib:.0f}",
                    f"{row.error:.1e}",
                    f"{row.off:.1%}",
                    str(row.nans),
                ]
                for row in rows
            ],
        )
    )
    if args.figure is not None:
        plot(args.figure, rows)
        print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    main()
