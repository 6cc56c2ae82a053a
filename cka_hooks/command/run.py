"""``cka-hooks run``: compare, print what was found, and write it."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from cka_hooks.command import inputs
from cka_hooks.command.shared import check_output, output_words, say, write_all
from cka_hooks.compare import compare
from cka_hooks.errors import CKAError, CKAWarning, NonFiniteError, OptionError, warn
from cka_hooks.hsic import Estimator
from cka_hooks.options import Options
from cka_hooks.recording.batches import sample_count
from cka_hooks.run.comparison import Comparison
from cka_hooks.run.precomputed import is_feature_file
from cka_hooks.run.replay import Randomness, lengths
from cka_hooks.similarity.kernels import KERNELS

SAMPLES, MINIBATCH = 2048, 32
# The arguments of the command, for the result's file.
_PROVENANCE = ("model", "weights", "against", "against_weights", "data", "seed", "batch_size", "device")


def run(parser: argparse.ArgumentParser) -> None:
    r"""Compare the layers of a model, or of two.

    Runs data through a model once, and writes the CKA of every pair of its layers: a heatmap, an interactive page,
    the result with its standard errors, and a summary in words.

    examples
      cka-hooks run --model torchvision:resnet50 --data photos/
      cka-hooks run --model torchvision:resnet18 --against torchvision:resnet34 --data photos/ --layers 'layer?.?'
      cka-hooks run --model nets.py:net --weights epoch1.pt --against nets.py:net --against-weights epoch90.pt \
          --data nets.py:test_loader --tolerance 0.005
      cka-hooks run --model timm:vit_tiny_patch16_224 --data photos/ --layers 'blocks.*' --json | jq .summary
      cka-hooks run --model torchvision:resnet50 --against brain.h5::V4 --data photos/ --samples all

    --against also takes features: a .npy, .npz, .safetensors (as cka-hooks record writes it) or .h5 file, whose
    arrays have a row for each sample; file.h5::NAME is one array in it. If the file has identifiers (an array
    sample_ids beside the others), rows are found by them: paths within an image folder, such as cat/1.jpg, or
    positions in another data set, from 0. Without identifiers, the rows are those of the whole data set, in its own
    order.
    """
    inputs.model_words(parser)
    inputs.data_words(parser, samples=f"{SAMPLES}; all with --tolerance")
    add = parser.add_argument_group("the comparison").add_argument
    add("--against", metavar="MODEL", help="a second model, over the same data, or a file of features")
    add("--against-weights", metavar="W", help="its weights")
    add("--features", default="flatten", metavar="F", help="flatten (the default), mean, token, token:K or last")
    add("--channel-dim", type=int, metavar="D", help="dimension with the channels; default: as kinds of modules say")
    add("--per", default="sample", choices=("sample", "position"), help="position compares tokens or pixels")
    add("--positions", type=int, metavar="N", help="with --per position, draw N of each batch; default: all")
    add("--tolerance", type=float, metavar="E", help="stop once every standard error is below E, such as 0.005")
    add("--minibatch", type=int, metavar="N", help=f"samples in each estimate; default: {MINIBATCH}")
    add("--join-batches", type=int, metavar="N", help="join the features of small batches to minibatches of N")
    add("--sketch", type=_gone, help=argparse.SUPPRESS)
    add("--kernel", default="linear", choices=tuple(KERNELS), help="default: %(default)s")
    add("--estimator", default="unbiased", choices=get_args(Estimator), help="default: %(default)s")
    add("--checkpoint", type=Path, metavar="FILE", help="keep the run here; the same command continues from it")
    add("--json", action="store_true", help="print one JSON object, and everything else on stderr")
    output_words(parser, "cka")
    parser.set_defaults(command=_run)


def _gone(_: str) -> None:
    raise argparse.ArgumentTypeError("it is gone: --minibatch 32, the default, costs less and adds no noise")


def _run(arguments: argparse.Namespace) -> int:
    check_output(arguments)
    vars(arguments).setdefault("samples", SAMPLES if arguments.tolerance is None else None)
    if arguments.minibatch is None and arguments.per == "sample":
        arguments.minibatch = MINIBATCH
    options = Options.of({**vars(arguments), "max_samples": arguments.samples})
    loaded = _models(arguments)
    entries: dict[str, Any] = {one.name: one.model.to(arguments.device) for one in loaded}
    loader = inputs.loader_of(arguments, loaded[0].transform)
    if arguments.against is not None and is_feature_file(arguments.against):
        entries |= inputs.features_of(arguments.against, loader, arguments.sample_ids, loaded[0].name)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.quiet:
        what = f"{' and '.join(entries)} on {arguments.device}, {inputs.described(arguments.data, loader)}"
        models = {one.name: entries[one.name] for one in loaded}
        say(what + _plan(models, loader, options), file=sys.stderr if arguments.json else sys.stdout)
    torch.manual_seed(arguments.seed)
    failure = None
    try:
        result = compare(
            entries if len(entries) > 1 else loaded[0].model,
            loader,
            **vars(options),
            checkpoint=arguments.checkpoint,
            progress=not arguments.quiet,
        )
    except NonFiniteError as error:
        if error.partial is None:
            raise
        result, failure = error.partial, error
        say(f"cka-hooks: {failure}", file=sys.stderr)
    command = {name: getattr(arguments, name) for name in _PROVENANCE}
    result = replace(result, settings={**result.settings, "command": command})
    largest = max(result.stderr[~result.stderr.isnan()].tolist(), default=None)
    reached = result.settings.get("tolerance_reached")
    if reached is False:
        found = "there is no standard error" if largest is None else f"the largest standard error is {largest:.2g}"
        warn(f"--tolerance was not reached before the data ended: {found}")
    paths = write_all(result, arguments.out, printed=not arguments.json)
    if arguments.json:
        shown = ("layers", "samples", "minibatches", "skipped", "degenerate")
        report = {name: getattr(result, name) for name in shown}
        report |= {"complete": not failure, "files": paths, "summary": result.summary().splitlines()}
        print(json.dumps({**report, "largest_stderr": largest, "tolerance_reached": reached}, indent=2))
    return 1 if failure else 0


def _plan(models: dict[str, Any], loader: Any, options: Options) -> str:
    """Which layers are compared and how long that will take, from a trial on one batch; the loader is as before."""
    if isinstance(loader, Iterator):
        return ""
    random = Randomness(loader)
    before = random.state()
    try:
        batch = next(iter(loader))
        comparison = Comparison.of(models if len(models) > 1 else {"": next(iter(models.values()))}, options)
        with warnings.catch_warnings(), comparison:
            warnings.simplefilter("ignore", CKAWarning)
            # The first batch takes longer than all others.
            for _ in range(2):
                started = time.perf_counter()
                comparison.update(batch)
                seconds = time.perf_counter() - started
            layers = comparison.compute().layers
    except (CKAError, StopIteration):
        # The run says what is wrong.
        return ""
    finally:
        random.restore(before)
    total = min(max(lengths(loader) or {0}), options.max_samples or sys.maxsize)
    about = "at most" if options.tolerance else "about"
    left = tqdm.format_interval(seconds * total / (sample_count(batch) or 1))
    cost = f"{about} {left} for {total:,} samples" if total else "the loader does not say how many samples it has"
    return f"\n{len(layers)} layers, {layers[0]} to {layers[-1]}: {cost}"


def _models(arguments: argparse.Namespace) -> list[inputs.LoadedModel]:
    """One model, or two with different names."""
    first = inputs.load_model(arguments.model, arguments.weights, seed=arguments.seed)
    if arguments.against is None or is_feature_file(arguments.against):
        if arguments.against_weights is not None:
            raise OptionError("--against-weights is for a second model: name that model with --against")
        return [first]
    second = inputs.load_model(arguments.against, arguments.against_weights, seed=arguments.seed + 1)
    if first.name != second.name:
        return [first, second]
    stems = [Path(it).stem if it else "default" for it in (arguments.weights, arguments.against_weights)]
    if stems[0] == stems[1]:
        stems = ["1", "2"]
    return [one._replace(name=f"{one.name}-{stem}") for one, stem in zip((first, second), stems, strict=True)]
