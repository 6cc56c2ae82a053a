"""What a comparison costs on top of the forward pass that it needs: time and peak memory.

python benchmarks/cost.py              # ResNet-18, and ResNet-50 and ViT-B/16 at reduced size: under 5 minutes
python benchmarks/cost.py --full       # the sizes of the promises in README.md
python benchmarks/cost.py --profile    # where the time goes, operator by operator
python benchmarks/cost.py --full --device cuda
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from measure import BARE, in_own_process, interleaved, parsed, parser_of, peak_mib, print_machine, table
from torch import Tensor, nn
from workload import CONFIGS, Config, forward

import cka_hooks
from cka_hooks.similarity.products import native

# Median time over the bare forward pass: what must hold, and what is hoped for.
TARGETS = {
    ("r18", "default"): "1.6, aim 1.35",
    ("r50", "default"): "1.6, aim 1.35",
    ("vit", "default"): "1.25",
    ("r18", "minibatch=32"): "1.3, aim 1.15",
    ("r50", "minibatch=32"): "1.3, aim 1.15",
    ("r18", "blocks"): "1.1",
    ("r50", "blocks"): "1.1",
    ("vit", "blocks"): "1.1",
}


def options(config: Config, only: Collection[str] | None = None) -> dict[str, dict[str, object]]:
    """Name of a run -> keyword arguments of `compare`."""
    found: dict[str, dict[str, object]] = {"default": {}}
    if config.batch > 32:
        found["minibatch=32"] = {"minibatch": 32}
    found["blocks"] = {"layers": [config.blocks]}
    return {run: settings for run, settings in found.items() if only is None or run in only}


def compare(model: nn.Module, batches: list[Tensor], **settings: object) -> cka_hooks.CKAResult:
    with warnings.catch_warnings():
        # A handful of crops of two photographs: one sample may decide a layer, and that is fine here.
        warnings.simplefilter("ignore", cka_hooks.CKAWarning)
        return cka_hooks.compare(model, batches, progress=False, **settings)  # type: ignore[arg-type]


def times(name: str, config: Config, args: argparse.Namespace) -> list[list[str]]:
    model, batches = config.on(args.device, args.batches, not args.random_init)
    runs: dict[str, Callable[[], object]] = {BARE: partial(forward, model, batches)}
    for run, settings in options(config, args.runs).items():
        runs[run] = partial(compare, model, batches, **settings)
    found = interleaved(runs, args.rounds)
    layers = {
        run: len(compare(model, batches[:1], **settings).layers)
        for run, settings in options(config, args.runs).items()
    }
    per_batch = min(found.seconds[BARE]) / args.batches
    print(f"{config.title}: bare forward pass {per_batch:.2f} s a batch")
    return [[config.title, run, str(layers[run]), found.spelled(run), TARGETS.get((name, run), "")] for run in layers]


def memory(name: str, runs: Iterable[str], args: argparse.Namespace) -> list[str]:
    """Peak memory of each run above the bare forward pass; of the default one also over many batches."""

    def above(run: str, batches: int) -> float:
        arguments = ["--peak", name, run, str(batches), "--device", args.device]
        arguments += ["--random-init"] if args.random_init else []
        return float(str(in_own_process(arguments)["mib"]))

    return [
        f"{above(run, 2):.0f}"
        + (f"; {above(run, args.many):.0f} with {args.many} batches" if run == "default" else "")
        for run in runs
    ]


def one_peak(name: str, run: str, count: int, args: argparse.Namespace) -> None:
    """In a process of its own: one run over `count` times the same batch, its peak above the forward pass as JSON."""
    config = CONFIGS[name]
    model, batches = config.on(args.device, 1, not args.random_init)
    below = peak_mib(partial(forward, model, batches * count))
    peak = peak_mib(partial(compare, model, batches * count, **options(config)[run]))
    print(json.dumps({"mib": peak - below}))


def named_in_profiles() -> None:
    """PyTorch's profiler sees operators of PyTorch, and compiled code only where it is told."""
    compiled = native.grams

    def named(*args: object) -> object:
        with torch.profiler.record_function("cka_hooks.native.grams"):
            return compiled(*args)  # type: ignore[arg-type]

    native.grams = named  # type: ignore[assignment]


def profile(config: Config, args: argparse.Namespace) -> None:
    model, batches = config.on(args.device, 1, not args.random_init)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for run, settings in {BARE: None, **options(config, args.runs)}.items():
        work = partial(forward, model, batches) if settings is None else partial(compare, model, batches, **settings)
        work()
        with torch.profiler.profile(activities=activities) as profiler:
            work()
        print(f"\n{config.title}, {run}")
        by_time = {"sort_by": "self_cpu_time_total", "row_limit": args.rows, "max_name_column_width": 40}
        print(profiler.key_averages().table(**by_time))


def main() -> None:
    parser = parser_of(__doc__, "rounds", "cpu-time", "device")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), help="which networks; default: three")
    parser.add_argument("--full", action="store_true", help="r18, r50 and vit at full size")
    parser.add_argument("--batches", type=int, default=2, help="batches in a timed run")
    parser.add_argument("--many", type=int, default=8, help="batches in the run that shows memory does not grow")
    parser.add_argument("--random-init", action="store_true", help="leave BatchNorm's statistics as they start")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler tables instead")
    parser.add_argument("--runs", nargs="+", help="only these runs, such as default")
    parser.add_argument("--rows", type=int, default=18, help="with --profile: rows of a table")
    parser.add_argument("--peak", nargs=3, metavar=("CONFIG", "RUN", "BATCHES"), help=argparse.SUPPRESS)
    args = parsed(parser)
    if args.peak:
        one_peak(args.peak[0], args.peak[1], int(args.peak[2]), args)
        return
    names = args.configs or (["r18", "r50", "vit"] if args.full else ["r18", "r50-small", "vit-small"])
    print_machine()
    weights = "random init" if args.random_init else "BatchNorm calibrated"
    print(f"{weights}, image crops, {args.batches} batches a run, {args.rounds} interleaved rounds\n")
    if args.profile:
        named_in_profiles()
        for name in names:
            profile(CONFIGS[name], args)
        return
    rows = []
    for name in names:
        found = times(name, CONFIGS[name], args)
        above = [""] * len(found) if args.no_memory else memory(name, [row[1] for row in found], args)
        rows += [[*row, mib] for row, mib in zip(found, above, strict=True)]
    print()
    header = ["network", "run", "layers", "time, bare forward = 1", "must be under", "MiB above bare forward"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
