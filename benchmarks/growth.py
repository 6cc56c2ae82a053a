"""How the time of a comparison grows with layers, samples, minibatch size and features.

    python benchmarks/growth.py --figure growth.png          # and --device cuda

Four sweeps, in each of which one number changes. Networks are chains of cheap modules, so that the comparison and
not the forward pass is what is seen. Log-log slopes are fitted to the extra time (comparison less bare forward pass),
over all points and over the last three, where constant costs matter least. At the end 1000 layers of 256 samples:
how long the all-pairs product takes, next to the forward pass.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measure import BARE, chosen_device, interleaved, parsed, parser_of, print_machine, table, timed
from torch import Tensor, nn
from workload import forward

import cka_hooks
from cka_hooks.hsic import all_pairs, centre, pack


class Shift(nn.Module):
    """x + c: one pass over the activation, about the least that a module can do, and every layer is another one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("c", torch.randn(width) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c


class Point(NamedTuple):
    """Seconds at one place of a sweep."""

    x: int
    bare: float
    compared: float

    @property
    def extra(self) -> float:
        return max(self.compared - self.bare, 1e-9)


def chain(layers: int, width: int) -> nn.Module:
    return nn.Sequential(*(Shift(width) for _ in range(layers))).eval().to(chosen_device())


def point(x: int, model: nn.Module, batches: list[Tensor], rounds: int) -> Point:
    runs: dict[str, Callable[[], object]] = {
        BARE: lambda: forward(model, batches),
        "compared": lambda: cka_hooks.compare(model, batches, progress=False),
    }
    seconds = interleaved(runs, rounds).seconds
    return Point(x, statistics.median(seconds[BARE]), statistics.median(seconds["compared"]))


def batches_of(samples: int, minibatch: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(samples, width, generator=generator).to(chosen_device()).split(minibatch))


def by_layers(sizes: Sequence[int], rounds: int) -> list[Point]:
    batches = batches_of(64, 64, 256)
    return [point(size, chain(size, 256), batches, rounds) for size in sizes]


def by_samples(sizes: Sequence[int], rounds: int) -> list[Point]:
    model = chain(20, 4096)
    return [point(size, model, batches_of(size, 64, 4096), rounds) for size in sizes]


def by_minibatch(sizes: Sequence[int], rounds: int) -> list[Point]:
    """The same samples in larger and larger minibatches."""
    model = chain(20, 4096)
    return [point(size, model, batches_of(512, size, 4096), rounds) for size in sizes]


def by_features(sizes: Sequence[int], rounds: int) -> list[Point]:
    return [point(size, chain(10, size), batches_of(64, 64, size), rounds) for size in sizes]


def slope(points: Sequence[Point]) -> float:
    """Of the extra time over x, both in logarithms, by least squares."""
    x = torch.tensor([math.log(p.x) for p in points])
    y = torch.tensor([math.log(p.extra) for p in points])
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def many_layers(layers: int, samples: int, width: int) -> list[list[str]]:
    """What the algebra between L layers takes, next to a forward pass through L linear layers."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).eval().to(chosen_device())
    batches = batches_of(samples, samples, width)
    forward(model, batches)
    bare = min(timed(lambda: forward(model, batches)) for _ in range(3))
    run = min(timed(lambda: cka_hooks.compare(model, batches, progress=False)) for _ in range(2))
    grams = torch.randn(layers, 1, samples, samples, dtype=torch.float64, device=chosen_device())
    grams = (grams + grams.mT) / 2
    packed = pack(centre(grams))
    centring = min(timed(lambda: pack(centre(grams))) for _ in range(2))
    product = min(timed(lambda: all_pairs(packed)) for _ in range(3))
    whole = grams.flatten(1)
    plain = min(timed(lambda: whole @ whole.T) for _ in range(2))

    def row(what: str, seconds: float) -> list[str]:
        return [what, f"{seconds:.3f}", f"{seconds / bare:.2f}"]

    return [
        row(f"bare forward pass, {layers} x Linear({width}, {width}), {samples} samples", bare),
        row("the comparison, forward pass included", run),
        row("centring and packing of all Gram matrices (hsic.centre, hsic.pack)", centring),
        row("all-pairs product (hsic.all_pairs)", product),
        row("for scale: (L, n*n) times its transpose in float64, nothing left out", plain),
    ]


SWEEPS = {
    "layers": ("layers (64 samples, 256 features)", by_layers, [10, 30, 100, 300, 1000]),
    "samples": ("samples (20 layers, minibatch 64, 4096 features)", by_samples, [64, 128, 256, 512, 1024, 2048]),
    "minibatch": ("minibatch (20 layers, 512 samples, 4096 features)", by_minibatch, [16, 32, 64, 128, 256, 512]),
    "features": ("features (10 layers, 64 samples)", by_features, [256, 1024, 4096, 16384, 65536, 262144]),
}


def plot(path: Path, found: dict[str, list[Point]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axis, (name, points) in zip(axes.flat, found.items(), strict=False):
        x = [p.x for p in points]
        axis.loglog(x, [p.compared for p in points], "o-", color="#c0392b", label="compare, forward pass included")
        axis.loglog(x, [p.extra for p in points], "s--", color="#e08e79", markersize=4, label="extra time")
        axis.loglog(x, [p.bare for p in points], "o-", color="#34495e", label="bare forward pass")
        last = points[-1]
        axis.loglog(
            x, [last.compared * size / last.x for size in x], color="0.6", linewidth=0.8, label="linear growth"
        )
        axis.set_xticks(x, [str(size) for size in x])
        axis.set_xticks([], minor=True)
        axis.set_xlabel(SWEEPS[name][0])
        axis.set_ylabel("seconds")
        axis.set_title(f"slope of the extra time at the end: {slope(points[-3:]):.2f}", fontsize=10)
        axis.grid(True, which="major", color="0.92")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = parser_of(__doc__, "rounds", "figure", "cpu-time", "device")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--points", type=int, default=None, help="only the first so many points of each sweep")
    parser.add_argument("--layers", type=int, default=1000, help="of the last table; 0 leaves it out")
    parser.add_argument("--samples", type=int, default=256, help="of the last table")
    parser.add_argument("--width", type=int, default=512, help="of the last table")
    args = parsed(parser)
    warnings.simplefilter("ignore", cka_hooks.CKAWarning)
    print_machine()
    print(f"chains of x + c, one forward pass over all samples a run, {args.rounds} interleaved rounds, medians\n")
    found: dict[str, list[Point]] = {}
    rows = []
    for name in args.sweeps:
        title, sweep, sizes = SWEEPS[name]
        points = found[name] = sweep(sizes[: args.points], args.rounds)
        rows += [
            [title if p is points[0] else "", str(p.x), f"{p.bare:.4f}", f"{p.compared:.4f}", f"{p.extra:.4f}"]
            for p in points
        ]
        rows.append(["slope: all points, last three", "", "", "", f"{slope(points):.2f}, {slope(points[-3:]):.2f}"])
    print(table(["what grows", "to", "bare forward, s", "compare, s", "extra, s"], rows))
    if args.layers:
        print(f"\n{args.layers} layers, {args.samples} samples:\n")
        print(table(["part", "seconds", "forward = 1"], many_layers(args.layers, args.samples, args.width)))
    if args.figure is not None:
        plot(args.figure, found)
        print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    main()
