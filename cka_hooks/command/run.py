"""``cka-hooks run``: print a plan, run it, and print what it found."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from cka_hooks.command import numbers
from cka_hooks.command.data import DATA, described, first_batch, loader_of, loading_words
from cka_hooks.command.features import FEATURES, features_of, sample_ids_word
from cka_hooks.command.models import MODELS, LoadedModel, SpecError, device_of, load_model
from cka_hooks.command.outputs import check_file, check_folder, folder_words, write_all
from cka_hooks.command.terminal import say
from cka_hooks.compare import compare
from cka_hooks.errors import CKAWarning, NonFiniteError, OptionError
from cka_hooks.hsic import MIN_SAMPLES, Estimator
from cka_hooks.options import Options
from cka_hooks.recording.batches import sample_count
from cka_hooks.results.result import CKAResult
from cka_hooks.results.words import SHARE
from cka_hooks.run.feature_files import is_feature_file
from cka_hooks.run.replay import lengths
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
# The arguments of the command, for the result's file.
_PROVENANCE = ("model", "weights", "against", "against_weights", "data", "seed", "batch_size")
# A shorter trial is repeated, because the cost of a kernel's first call would drown it.
_SHORT = 2.0


def words(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    what = parser.add_argument_group("what to compare")
    what.add_argument("--model", required=True, metavar="MODEL", help="see above")
    what.add_argument("--weights", metavar="W", help="its weights; default: pretrained, or as the file has it")
    what.add_argument("--against", metavar="MODEL", help="a second model, over the same data, or a file of features")
    what.add_argument("--against-weights", metavar="W", help="its weights")
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
        help="with --per position, draw N of each batch; default: all that are not padding")  # fmt: skip
    how = parser.add_argument_group("how closely")
    how.add_argument("--samples", type=numbers.samples, default=argparse.SUPPRESS, metavar="N",
        help=f'number of samples, drawn at random, or "all"; default: {SAMPLES}; all with --tolerance')  # fmt: skip
    how.add_argument("--tolerance", type=numbers.positive, metavar="E",
        help="stop as soon as every standard error is below E, such as 0.005")  # fmt: skip
    how.add_argument("--minibatch", type=numbers.count, metavar="N",
        help=f"samples in each estimate; more of them cost more and scatter less; default: {MINIBATCH}")  # fmt: skip
    how.add_argument("--join-batches", type=numbers.count, metavar="N",
        help="join the features of consecutive batches to minibatches of N samples, for small batches")  # fmt: skip
    how.add_argument("--sketch", action=_Gone, help=argparse.SUPPRESS)
    how.add_argument("--kernel", default="linear", choices=tuple(KERNELS), help="default: %(default)s")
    how.add_argument("--estimator", default="unbiased", choices=get_args(Estimator), help="default: %(default)s")
    how.add_argument("--seed", type=numbers.seed, default=0, metavar="N",
        help="seed of the drawn samples, their order, and random weights; default: %(default)s")  # fmt: skip
    where = parser.add_argument_group("where")
    loading_words(where)
    folder_words(where, "cka")
    where.add_argument("--checkpoint", type=Path, metavar="FILE",
        help="keep the run in this file; the same command continues from it")  # fmt: skip
    where.add_argument("--json", action="store_true", help="print one JSON object, and everything else on stderr")
    where.add_argument("--quiet", action="store_true", help="print neither the plan nor the progress")


class _Gone(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(
            "--sketch is gone: --minibatch 32, the default, costs less and adds no noise; leave --sketch out"
        )


def run(arguments: argparse.Namespace) -> int:
    """Plan, compare, summarise and write. Return the exit code."""
    check_file(arguments.checkpoint, "--checkpoint")
    check_folder(arguments)
    device = device_of(arguments.device)
    if "samples" not in arguments:
        arguments.samples = SAMPLES if arguments.tolerance is None else None
    if arguments.minibatch is None and arguments.per == "sample":
        arguments.minibatch = MINIBATCH
    loaded = _models(arguments)
    models: dict[str, Any] = {one.name: one.model.to(device) for one in loaded}
    loader = loader_of(arguments, loaded[0].transform)
    brought = features_of(arguments.against, loader, arguments.sample_ids, loaded[0].name)
    batch, loader = first_batch(loader)
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = {field.name: getattr(arguments, field.name) for field in fields(Options) if field.name in arguments}

    def measured(entries: dict[str, Any], loader: Iterable[Any], **bounds: Any) -> tuple[CKAResult, str]:
        """The result of all finite layers, and the layers that are not finite."""
        torch.manual_seed(arguments.seed)
        try:
            model = entries if len(models) + len(brought) > 1 else models[loaded[0].name]
            return compare(model, loader, **options, **bounds), ""
        except NonFiniteError as error:
            if error.partial is None:
                raise
            return error.partial, str(error)

    if not arguments.quiet:
        plan = _plan(arguments, loader, batch, lambda some: measured(models, some, progress=False)[0])
        kinds = " and ".join(f"{one.name} ({type(one.model).__name__})" for one in loaded)
        say(f"models     {kinds} on {device}\n{plan}\n", file=sys.stderr if arguments.json else sys.stdout)
    result, failure = measured(
        models | brought,
        loader,
        progress=not arguments.quiet,
        max_samples=arguments.samples,
        checkpoint=arguments.checkpoint,
    )
    if failure:
        say(f"cka-hooks: {failure}", file=sys.stderr)
    asked = {name: getattr(arguments, name) for name in _PROVENANCE}
    result = replace(result, settings={**result.settings, "command": {**asked, "device": str(device)}})
    report = _report(result)
    if report["tolerance_reached"] is False:
        largest = report["largest_stderr"]
        found = "there are no standard errors" if largest is None else f"the largest standard error is {largest:.2g}"
        say(
            f"cka-hooks: warning: --tolerance {arguments.tolerance:g} was not reached before the data ended: {found}",
            file=sys.stderr,
        )
    if not arguments.json:
        say(f"\n{result.summary()}\n")
    paths = write_all(result, arguments.out)
    if arguments.json:
        files = {name: str(path) for name, path in paths.items()}
        print(json.dumps({"complete": not failure, "files": files, **report}, indent=2))
    else:
        for name, path in paths.items():
            say(f"{name:<10}{path}")
    return 1 if failure else 0


def _models(arguments: argparse.Namespace) -> list[LoadedModel]:
    """One model, or two with different names."""
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
    return [replace(one, name=f"{one.name}-{stem}") for one, stem in zip((first, second), stems, strict=True)]


def _plan(
    arguments: argparse.Namespace, loader: Iterable[Any], batch: Any, measured: Callable[[list[Any]], CKAResult]
) -> str:
    """Say what will be done and how long it will take, from a trial on one batch."""
    size = sample_count(batch) or arguments.batch_size
    trials = 1 if arguments.join_batches is None else -(-MIN_SAMPLES // size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CKAWarning)
        for _ in range(2):
            started = time.perf_counter()
            trial = measured([batch] * trials)
            seconds = time.perf_counter() - started
            if seconds > _SHORT:
                break
    each = seconds / trials / size
    there, count = max(lengths(loader) or {0}), len(trial.rows)
    total = min(there, arguments.samples or there)
    minibatches = f"minibatches of {min(arguments.minibatch or size, arguments.join_batches or size)}"
    if arguments.per == "position":
        minibatches = f"{arguments.positions or 'all'} positions of a batch"
    cost = f"{each * 1000:.3g} ms per sample; the loader does not say how many it has"
    if total:
        about = "about" if arguments.tolerance is None else "at most"
        cost = (
            f"{about} {_duration(each * total)} for {total:,} samples, estimated from one batch of {size}, "
            "without the time to read the data"
        )
    return (
        f"layers     {count}, from {trial.rows[0]} to {trial.rows[-1]}: {count * (count - 1) // 2:,} pairs\n"
        f"data       {described(arguments.data, loader)}\n"
        f"estimates  from {minibatches} in batches of {size}, {arguments.estimator}, {arguments.kernel} kernel\n"
        f"cost       {cost}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _report(result: CKAResult) -> dict[str, Any]:
    """What ``--json`` prints of a result, with the names of samples that account for much of a layer's HSIC."""
    errors = result.stderr[~result.stderr.isnan()]
    decisive = [one for one in result.influence.values() if one.share > SHARE and one.identifier is not None]
    return {
        "layers": list(result.layers),
        "samples": result.samples,
        "minibatches": result.minibatches,
        "largest_stderr": float(errors.max()) if len(errors) else None,
        "tolerance_reached": result.settings.get("tolerance_reached") and len(errors) > 0,
        "summary": result.summary().splitlines(),
        "decisive_samples": {str(one.sample): one.identifier for one in decisive},
        "skipped": result.skipped,
        "degenerate": result.degenerate,
    }
