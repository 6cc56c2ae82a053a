"""``cka-hooks run``: a plan, the run, and what it found."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from cka_hooks.command import numbers
from cka_hooks.command.data import DATA, described, first_batch, load_data, sample_names
from cka_hooks.command.features import FEATURES, features_of, sample_ids_word
from cka_hooks.command.models import MODELS, LoadedModel, SpecError, device_of, load_model
from cka_hooks.command.outputs import check_file, check_folder, folder_words, write_all
from cka_hooks.command.terminal import say
from cka_hooks.compare import compare
from cka_hooks.errors import CKAWarning, NonFiniteError, OptionError
from cka_hooks.hsic import MIN_SAMPLES, Estimator
from cka_hooks.recording.batches import sample_count
from cka_hooks.results.result import CKAResult
from cka_hooks.results.words import SHARE
from cka_hooks.run.feature_files import is_feature_file
from cka_hooks.similarity.kernels import KERNELS

LINE = "compare the layers of a model, or of two"
DESCRIPTION = f"""\
Run data through a model once, and write the CKA of every pair of its layers: a heatmap, an interactive page,
the result with its standard errors, and a summary in words.

examples
  cka-hooks run --model torchvision:resnet50 --data photos/
  cka-hooks run --model torchvision:resnet18 --against torchvision:resnet34 --data photos/ --layers 'layer?.?'
  cka-hooks run --model nets.py:net --weights epoch1.pt --against nets.py:net --against-weights epoch90.pt \\
      --data nets.py:test_loader --tolerance 0.005
  cka-hooks run --model timm:vit_tiny_patch16_224 --data photos/ --layers 'blocks.*' --json | jq .summary
  cka-hooks run --model torchvision:resnet50 --against brain.h5::V4 --data photos/ --samples all

{MODELS}

{DATA}

{FEATURES}"""

SAMPLES, MINIBATCH = 2048, 32
# A trial shorter than this is repeated: what the first call of a kernel costs would drown it.
_SHORT = 2.0


def words(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    what = parser.add_argument_group("what to compare")
    what.add_argument("--model", required=True, metavar="MODEL", help="see above")
    what.add_argument("--weights", metavar="W", help="of the model; default: pretrained, or as the file has it")
    what.add_argument("--against", metavar="MODEL", help="a second model, over the same data, or a file of features")
    what.add_argument("--against-weights", metavar="W", help="of the second model")
    what.add_argument("--data", required=True, metavar="DATA", help="see above")
    what.add_argument("--layers", nargs="+", metavar="L",
        help="names or globs (* stops at dots, ** crosses them); default: every leaf module that runs")  # fmt: skip
    what.add_argument("--features", default="flatten", metavar="F",
        help="flatten, mean over positions, token, token:K or last; default: %(default)s")  # fmt: skip
    what.add_argument("--channel-dim", type=int, metavar="D",
        help="the dimension with the channels; default: as the kinds of modules say")  # fmt: skip
    sample_ids_word(what)
    what.add_argument("--per", default="sample", choices=("sample", "position"),
        help="position compares tokens or pixels, each batch a minibatch; default: %(default)s")  # fmt: skip
    what.add_argument("--positions", type=numbers.count, metavar="N",
        help="with --per position, draw N of each batch; default: all that are no padding")  # fmt: skip
    how = parser.add_argument_group("how closely")
    how.add_argument("--samples", type=numbers.samples, metavar="N",
        help=f'how many, drawn at random, or "all"; default: {SAMPLES}, or all with --tolerance')  # fmt: skip
    how.add_argument("--tolerance", type=numbers.positive, metavar="E",
        help="stop as soon as every standard error is below E, such as 0.005")  # fmt: skip
    how.add_argument("--minibatch", type=numbers.count, metavar="N",
        help=f"samples in each estimate: more cost more and scatter less; default: {MINIBATCH}")  # fmt: skip
    how.add_argument("--join-batches", type=numbers.count, metavar="N",
        help="join the features of consecutive batches to N samples, where batches are small")  # fmt: skip
    how.add_argument("--sketch", action=_Gone, help=argparse.SUPPRESS)
    how.add_argument("--kernel", default="linear", choices=tuple(KERNELS), help="default: %(default)s")
    how.add_argument("--estimator", default="unbiased", choices=get_args(Estimator), help="default: %(default)s")
    how.add_argument("--seed", type=numbers.seed, default=0, metavar="N",
        help="of the samples that are drawn, their order, and random weights; default: %(default)s")  # fmt: skip
    where = parser.add_argument_group("where")
    where.add_argument("--device", default="auto", metavar="D", help="auto (cuda if there is one), cpu, cuda:1, mps")
    where.add_argument("--batch-size", type=numbers.count, default=64, metavar="N", help="default: %(default)s")
    where.add_argument("--workers", type=numbers.count_or_none, default=0, metavar="N",
        help="processes that read images; default: %(default)s")  # fmt: skip
    where.add_argument("--download", action="store_true", help="let torchvision download the data set")
    folder_words(where, "cka")
    where.add_argument("--checkpoint", type=Path, metavar="FILE",
        help="keep the run in this file: the same command continues from there")  # fmt: skip
    where.add_argument("--json", action="store_true", help="print one JSON object, and everything else on stderr")
    where.add_argument("--quiet", action="store_true", help="print neither the plan nor the progress")


class _Gone(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(
            "--sketch is gone: --minibatch 32, the default, costs less and adds no noise; leave --sketch out"
        )


def run(arguments: argparse.Namespace) -> int:
    """Plan, compare, summarise, write; the exit code."""
    out = sys.stderr if arguments.json else sys.stdout
    check_file(arguments.checkpoint, "--checkpoint")
    check_folder(arguments)
    device = device_of(arguments.device)
    if arguments.minibatch is None and arguments.per == "sample":
        arguments.minibatch = MINIBATCH
    loaded = _models(arguments)
    models = {one.name: one.model.to(device) for one in loaded}
    loader = load_data(
        arguments.data,
        transform=loaded[0].transform,
        batch_size=arguments.batch_size,
        samples=_samples(arguments),
        seed=arguments.seed,
        workers=arguments.workers,
        download=arguments.download,
    )
    names = sample_names(loader)
    brought = features_of(arguments.against, loader, arguments.sample_ids, loaded[0].name)
    batch, loader = first_batch(loader)
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = {
        name: getattr(arguments, name)
        for name in (
            "layers",
            "features",
            "channel_dim",
            "sample_ids",
            "join_batches",
            "per",
            "positions",
            "minibatch",
            "kernel",
            "estimator",
            "seed",
        )
    }

    def measured(loader: Iterable[Any], progress: bool, features: Any, **bounds: Any) -> CKAResult:
        torch.manual_seed(arguments.seed)
        entries: Any = {**models, **features} if len(models) + len(brought) > 1 else models[loaded[0].name]
        return compare(entries, loader, progress=progress, **options, **bounds)

    if not arguments.quiet:
        say(_plan(arguments, loaded, loader, batch, device, lambda some: measured(some, False, {})), file=out)
    code = 0
    try:
        result = measured(
            loader,
            not arguments.quiet,
            brought,
            max_samples=_samples(arguments),
            tolerance=arguments.tolerance,
            checkpoint=arguments.checkpoint,
        )
    except NonFiniteError as error:
        if error.partial is None:
            raise
        say(f"cka-hooks: {error}", file=sys.stderr)
        result, code = error.partial, 1
    result = dataclasses.replace(result, settings={**result.settings, **_provenance(arguments, device)})
    if not _reached(result, arguments.tolerance):
        largest = _largest_stderr(result)
        found = "there are no standard errors" if largest is None else f"the largest standard error is {largest:.2g}"
        say(
            f"cka-hooks: warning: --tolerance {arguments.tolerance:g} was not reached before the data ended: {found}",
            file=sys.stderr,
        )
    if not arguments.json:
        say(f"\n{result.summary()}")
        for sample, name in _decisive(result, names).items():
            say(f"Sample {sample} is {name}.")
        say("")
    paths = write_all(result, arguments.out)
    if arguments.json:
        print(json.dumps(_report(result, paths, names, arguments, complete=code == 0), indent=2))
    else:
        for name, path in paths.items():
            say(f"{name:<10}{path}")
    return code


def _models(arguments: argparse.Namespace) -> list[LoadedModel]:
    """One model, or two with names that differ."""
    first = load_model(arguments.model, arguments.weights, seed=arguments.seed)
    if arguments.against is None or is_feature_file(arguments.against):
        if arguments.against_weights is not None:
            raise OptionError("--against-weights is for a second model: name that model with --against")
        return [first]
    second = load_model(arguments.against, arguments.against_weights, seed=arguments.seed + 1)
    if second.model is first.model and arguments.weights != arguments.against_weights:
        raise SpecError(
            f"{arguments.against} returned the same module twice, which holds the weights of --against-weights now: "
            "let the function make a new one each time"
        )
    if first.name != second.name:
        return [first, second]
    stems = [Path(w).stem if w else "default" for w in (arguments.weights, arguments.against_weights)]
    if stems[0] == stems[1]:
        stems = ["1", "2"]
    return [
        dataclasses.replace(one, name=f"{one.name}-{stem}") for one, stem in zip((first, second), stems, strict=True)
    ]


def _samples(arguments: argparse.Namespace) -> int | None:
    if arguments.samples == "all":
        return None
    if arguments.samples is None:
        return None if arguments.tolerance is not None else SAMPLES
    return int(arguments.samples)


def _plan(
    arguments: argparse.Namespace,
    loaded: list[LoadedModel],
    loader: Iterable[Any],
    batch: Any,
    device: torch.device,
    measured: Callable[[list[Any]], CKAResult],
) -> str:
    """What will be done and how long it will take, found out on one batch."""
    size = sample_count(batch) or arguments.batch_size
    trials = 1 if arguments.join_batches is None else -(-MIN_SAMPLES // size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CKAWarning)
        for _ in range(2):
            started = time.perf_counter()
            try:
                trial = measured([batch] * trials)
            except NonFiniteError as error:
                if error.partial is None:
                    raise
                trial = error.partial
            seconds = time.perf_counter() - started
            if seconds > _SHORT:
                break
    seconds /= trials
    total = _total(loader, _samples(arguments))
    count = len(trial.rows)
    lines = [
        f"models     {' and '.join(f'{one.name} ({type(one.model).__name__})' for one in loaded)} on {device}",
        f"layers     {count}, from {trial.rows[0]} to {trial.rows[-1]}: {count * (count - 1) // 2:,} pairs",
        f"data       {described(arguments.data, loader)}",
        f"estimates  from {_minibatches(arguments, size)} in batches of {size}, "
        f"{arguments.estimator}, {arguments.kernel} kernel",
    ]
    if total is None:
        lines.append(f"cost       {seconds / size * 1000:.3g} ms per sample; the loader does not say how many it has")
    else:
        about = "at most " if arguments.tolerance is not None else "about "
        lines.append(
            f"cost       {about}{_duration(seconds / size * total)} for {total:,} samples, estimated from one batch "
            f"of {size}, without the time to read the data"
        )
    return "\n".join([*lines, ""])


def _minibatches(arguments: argparse.Namespace, size: int) -> str:
    if arguments.per == "position":
        return f"{'all' if arguments.positions is None else arguments.positions} positions of a batch"
    return f"minibatches of {min(arguments.minibatch, arguments.join_batches or size)}"


def _total(loader: Iterable[Any], bound: int | None) -> int | None:
    """How many samples the run will see, None where the loader does not say."""
    sampler = getattr(loader, "sampler", None)
    try:
        there = len(sampler if sampler is not None else loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None
    return there if bound is None else min(there, bound)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _provenance(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the command was asked for, for the result's file."""
    names = ("model", "weights", "against", "against_weights", "data", "seed", "batch_size")
    return {"command": {**{name: getattr(arguments, name) for name in names}, "device": str(device)}}


def _largest_stderr(result: CKAResult) -> float | None:
    errors = result.stderr[~result.stderr.isnan()]
    return float(errors.max()) if len(errors) else None


def _reached(result: CKAResult, tolerance: float | None) -> bool:
    """Whether every standard error is as small as was asked for; standard errors that are undefined are not."""
    if tolerance is None:
        return True
    largest = _largest_stderr(result)
    return largest is not None and largest < tolerance


def _decisive(result: CKAResult, names: Sequence[str] | None) -> dict[int, str]:
    """The samples that alone account for much of some layer's HSIC -> their names, where the data has names."""
    samples = sorted({one.sample for one in result.influence.values() if one.share > SHARE})
    return {sample: names[sample] for sample in samples if sample < len(names)} if names else {}


def _report(
    result: CKAResult,
    paths: dict[str, Path],
    names: Sequence[str] | None,
    arguments: argparse.Namespace,
    *,
    complete: bool,
) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "complete": complete,
        "files": {name: str(path) for name, path in paths.items()},
        "layers": list(result.layers),
        "samples": result.samples,
        "minibatches": result.minibatches,
        "largest_stderr": _largest_stderr(result),
        "tolerance_reached": None if arguments.tolerance is None else _reached(result, arguments.tolerance),
        "summary": result.summary().splitlines(),
        "decisive_samples": {str(sample): name for sample, name in _decisive(result, names).items()},
        "skipped": result.skipped,
        "degenerate": result.degenerate,
    }
