"""``cka-hooks record``: keep the activations of a model's layers in a file to compare with later."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cka_hooks.command import numbers
from cka_hooks.command.data import DATA, identifiers, loader_of, loading_words
from cka_hooks.command.features import sample_ids_word
from cka_hooks.command.models import MODELS, SpecError, device_of, load_model
from cka_hooks.command.outputs import check_file
from cka_hooks.command.terminal import say
from cka_hooks.errors import OptionError, warn
from cka_hooks.progress import progress_bar
from cka_hooks.recording.recorder import LayerRecorder
from cka_hooks.run import feature_files
from cka_hooks.run.precomputed import Identifier, SampleIds, ids_of, without_ids

LINE = "keep a model's activations in a file, to compare with later"
DESCRIPTION = f"""\
Run data through a model once, and write the pooled activations of its layers, with identifiers of the samples, to
a safetensors file. `cka-hooks run --against FILE` and cka_hooks.Precomputed.load(FILE) read it. The activations
are held in memory until the file is written.

examples
  cka-hooks record --model torchvision:resnet18 --data photos/ --layers 'layer?' --out resnet18.safetensors
  cka-hooks run --model torchvision:resnet50 --data photos/ --layers 'layer?' --against resnet18.safetensors

{MODELS}

{DATA}"""


def words(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--model", required=True, metavar="MODEL", help="see above")
    parser.add_argument("--weights", metavar="W", help="weights; default: pretrained, or as the file has it")
    parser.add_argument("--data", required=True, metavar="DATA", help="see above")
    parser.add_argument("--layers", nargs="+", metavar="L", help="names or globs; default: every leaf that runs")
    parser.add_argument("--features", default="mean", metavar="F",
        help="mean over positions, token, token:K, last or flatten; default: %(default)s")  # fmt: skip
    sample_ids_word(parser)
    parser.add_argument("--samples", type=numbers.samples, metavar="N",
        help='number of samples, drawn at random; default: "all"')  # fmt: skip
    parser.add_argument("--seed", type=numbers.seed, default=0, metavar="N", help="default: %(default)s")
    loading_words(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Record and write. Return the exit code."""
    out: Path = arguments.out
    check_file(out, "--out")
    if out.suffix != ".safetensors":
        raise OptionError(f"--out {out}: expected a file that ends with .safetensors")
    if out.exists() and not arguments.overwrite:
        raise OptionError(f"{out} already exists: pass --overwrite to replace it, or name another file with --out")
    loaded = load_model(arguments.model, arguments.weights, seed=arguments.seed)
    model = loaded.model.to(device_of(arguments.device))
    bound, loader = arguments.samples, loader_of(arguments, loaded.transform)
    recorder = LayerRecorder(model, arguments.layers, features=arguments.features)
    known = identifiers(loader) if arguments.sample_ids is None else None
    total = bound if known is None else len(known)
    with progress_bar(loaded.name, "sample", total, shown=not arguments.quiet) as bar:
        arrays, named = _recorded(recorder, loader, arguments.sample_ids, bound, bar.update)
    ids = known or named
    feature_files.write(out, arrays, ids or None)
    how = f"identified as {ids[0]!r}, ..." if ids else "in the order of the loader, without identifiers"
    say(f"{out}  {len(arrays)} layers, {len(next(iter(arrays.values())))} samples, {how}")
    return 0


def _recorded(
    recorder: LayerRecorder,
    loader: Iterable[Any],
    key: SampleIds | None,
    bound: int | None,
    counted: Callable[[int], object],
) -> tuple[dict[str, Tensor], list[Identifier]]:
    """The activations of each layer, and the identifiers that the batches have at `key`.

    Args:
        bound: the largest number of samples.
        counted: called with the number of samples of each batch.
    """
    ids: list[Identifier] = []

    def batches() -> Iterator[Any]:
        for batch in loader:
            if key is not None:
                ids.extend(ids_of(batch, key))
            yield without_ids(batch, key)

    rows: dict[str, list[Tensor]] = defaultdict(list)
    samples = 0
    for activations in recorder.stream(batches()):
        for layer, activation in activations.items():
            rows[layer].append(activation.cpu())
        count = len(next(iter(activations.values())))
        samples += count
        counted(count)
        if bound is not None and samples >= bound:
            break
    if not rows:
        raise SpecError("the loader yielded no batch: it is empty")
    samples = min(samples, bound or samples)
    arrays = {layer: torch.cat(parts)[:bound] for layer, parts in rows.items()}
    for layer in [layer for layer, array in arrays.items() if len(array) < samples]:
        warn(f"{layer!r} did not run for every sample, and is left out")
        del arrays[layer]
    return arrays, ids[:bound]
