"""Whether `sketch=k` is unbiased, how much it adds to the sampling error, and what it saves.

    python benchmarks/sketch.py

One pass over the same image crops feeds an exact accumulator and, for every k, one sketched accumulator per seed.
Per pair of layers the sketched values of all seeds are compared with the exact one: their mean deviation is the
bias, the root of their mean squared deviation the added error, and the exact run's standard error what sampling
already costs.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe_machine
from measure import BARE, add_clock_option, choose_clock, interleaved, table
from torch import Tensor, nn
from workload import CONFIGS, calibrate, forward, image_crops

import cka_hooks


def network() -> nn.Module:
    """ResNet-18 as torchvision has it: at 64 pixels its layers have 2 to 65536 features."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18()


def accumulated(
    model: nn.Module, batches: list[Tensor], accumulators: dict[tuple[int, int], cka_hooks.CKAAccumulator]
) -> dict[tuple[int, int], cka_hooks.CKAResult]:
    """Results of all accumulators after one pass that feeds each of them."""

    def observe(layer: str, activation: Tensor) -> None:
        for accumulator in accumulators.values():
            accumulator.observe(layer, activation)

    with torch.no_grad(), cka_hooks.LayerRecorder(model, consumer=observe):
        for number, batch in enumerate(batches):
            model(batch)
            for accumulator in accumulators.values():
                accumulator.step()
            print(f"\rbatch {number + 1} of {len(batches)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {key: accumulator.compute() for key, accumulator in accumulators.items()}


def pairs(result: cka_hooks.CKAResult, values: str = "matrix") -> Tensor:
    """The defined entries below the diagonal."""
    matrix = torch.as_tensor(getattr(result, values))
    rows, columns = torch.tril_indices(*matrix.shape, -1)
    return matrix[rows, columns]


def statistics_of(k: int, exact: cka_hooks.CKAResult, sketched: list[cka_hooks.CKAResult]) -> list[str]:
    """One row of the table."""
    errors = torch.stack([pairs(result) for result in sketched]) - pairs(exact)
    sampling = pairs(exact, "stderr")
    defined = ~(errors.isnan().any(0) | sampling.isnan())
    errors, sampling = errors[:, defined], sampling[defined]
    changed = errors.abs().amax(0) > 1e-12
    if not changed.any():
        return [str(k), "0", *["no layer is wide enough"] * 6]
    errors, sampling = errors[:, changed], sampling[changed]
    seeds = len(errors)
    bias = errors.mean(0)
    z = bias / (errors.std(0) / math.sqrt(seeds))
    per_seed = errors.mean(1)
    overall = per_seed.std() / math.sqrt(seeds)
    reported = torch.stack([pairs(result, "stderr")[defined][changed] for result in sketched]).mean(0)
    rms = errors.square().mean().sqrt()
    return [
        str(k),
        str(int(changed.sum())),
        f"{per_seed.mean():+.1e} ± {overall:.1e}",
        f"{bias.abs().max():.1e}",
        f"{(z.abs() > quantile(seeds)).double().mean():.1%}",
        f"{rms:.1e} (largest {errors.abs().max():.1e})",
        f"{sampling.square().mean().sqrt():.1e}",
        f"{reported.square().mean().sqrt():.1e}",
    ]


def quantile(seeds: int) -> float:
    """Two-sided 95 % point of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, seeds - 1))


def plot(path: Path, exact: cka_hooks.CKAResult, results: dict[int, list[cka_hooks.CKAResult]]) -> None:
    """Added error of every pair of layers against its sampling error, one panel for each k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(3.4 * len(results) + 0.6, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    sampling = pairs(exact, "stderr")
    for axis, (k, sketched) in zip(axes[0], results.items(), strict=True):
        rms = (torch.stack([pairs(result) for result in sketched]) - pairs(exact)).square().mean(0).sqrt()
        shown = rms > 1e-12
        axis.loglog(sampling[shown], rms[shown], ".", markersize=3, color="#2a6fbb", alpha=0.6)
        low, high = float(sampling[sampling > 0].nan_to_num(1).min()), float(sampling.nan_to_num(0).max())
        axis.loglog([low, high], [low, high], color="black", linewidth=0.8)
        axis.set_title(f"k = {k}", fontsize=10)
        axis.set_xlabel("standard error of the exact run")
    axes[0][0].set_ylabel(f"rms error added by the sketch\n({len(next(iter(results.values())))} seeds)")
    axes[0][0].annotate("equal", (low, low), textcoords="offset points", xytext=(10, 2), fontsize=8)
    figure.savefig(path, dpi=150)


def cost(args: argparse.Namespace) -> list[list[str]]:
    """Time relative to the bare forward pass, exact and for each k."""
    config = CONFIGS[args.config]
    model, batches = config.model(), config.batches(args.cost_batches)

    def run(**settings: int) -> Callable[[], object]:
        return lambda: cka_hooks.compare(model, batches, progress=False, **settings)  # type: ignore[arg-type]

    runs: dict[str, Callable[[], object]] = {BARE: lambda: forward(model, batches), "exact": run()}
    runs |= {f"sketch={k}": run(sketch=k, seed=0) for k in args.k}
    found = interleaved(runs, args.rounds)
    return [[config.title, name, found.spelled(name)] for name in runs if name != BARE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of the cost table")
    parser.add_argument("--cost-batches", type=int, default=2)
    parser.add_argument("--config", choices=list(CONFIGS), default="r50-small", help="network of the cost table")
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--figure", type=Path, default=None, help="where to write the scatter plot")
    add_clock_option(parser)
    args = parser.parse_args()
    if "sketch" not in inspect.signature(cka_hooks.CKAAccumulator).parameters:
        raise SystemExit("this cka_hooks has no sketch= option")
    warnings.simplefilter("ignore", cka_hooks.CKAWarning)
    print(describe_machine())
    choose_clock(args.cpu_time)
    print(
        f"ResNet-18, BatchNorm calibrated, {args.samples} image crops of {args.pixels} px, minibatches of "
        f"{args.batch}, every leaf layer, {args.seeds} seeds\n"
    )
    model = calibrate(network(), args.pixels)
    batches = list(image_crops(args.samples, args.pixels).split(args.batch))
    accumulators = {(0, 0): cka_hooks.CKAAccumulator()}
    accumulators |= {
        (k, seed): cka_hooks.CKAAccumulator(sketch=k, seed=seed) for k in args.k for seed in range(args.seeds)
    }
    found = accumulated(model, batches, accumulators)
    exact = found.pop((0, 0))
    results = {k: [found[k, seed] for seed in range(args.seeds)] for k in args.k}
    header = [
        "k",
        "pairs sketched",
        "mean bias",
        "largest bias of a pair",
        "pairs biased at 5 %",
        "rms error of one seed",
        "sampling error",
        "stderr reported with it",
    ]
    print(table(header, [statistics_of(k, exact, results[k]) for k in args.k]))
    if args.figure is not None:
        plot(args.figure, exact, results)
        print(f"\nfigure: {args.figure}")
    if not args.no_cost:
        print(f"\nCost, {args.cost_batches} batches a run, {args.rounds} interleaved rounds:\n")
        print(table(["network", "run", "time, bare forward = 1"], cost(args)))


if __name__ == "__main__":
    main()
