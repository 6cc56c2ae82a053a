"""``cka-hooks layers`` and ``cka-hooks record``: what can be measured in a model, and its activations as a file."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cka_hooks.command import inputs
from cka_hooks.command.shared import check_output, output_words, say, whole
from cka_hooks.errors import OptionError, warn
from cka_hooks.progress import progress_bar
from cka_hooks.recording.recorder import LayerRecorder
from cka_hooks.run.precomputed import Identifier, ids_of, without_ids, write_features

_SAMPLES = 4


def layers(parser: argparse.ArgumentParser) -> None:
    """List what can be measured in a model.

    From one forward pass: name, type, shape and cost of each layer.

    examples
      cka-hooks layers --model torchvision:resnet18
      cka-hooks layers --model nets.py:net --data nets.py:test_loader
    """
    inputs.model_words(parser, weights="none")
    add = parser.add_argument
    add("--data", metavar="DATA", help="take the first batch of this data, as for run, instead of random images")
    shape = "the shape of one random input, such as 3,224,224"
    add("--input", type=lambda text: [*map(whole(1), text.split(","))], metavar="C,H,W", help=shape)
    parser.set_defaults(command=_layers, samples=_SAMPLES, batch_size=_SAMPLES, seed=0, workers=0, download=False)


def _layers(arguments: argparse.Namespace) -> int:
    loaded = inputs.load_model(arguments.model, arguments.weights)
    if arguments.data:
        batch = next(iter(inputs.loader_of(arguments, loaded.transform)), None)
        if batch is None:
            raise inputs.SpecError(f"--data {arguments.data} yields no batch: it is empty")
    else:
        batch = _random_batch(loaded, arguments.input)
    say(LayerRecorder(loaded.model, arguments.layers).describe(batch))
    return 0


def _random_batch(loaded: inputs.LoadedModel, shape: list[int] | None) -> Any:
    if shape is None and loaded.transform is not None:
        from PIL import Image

        shape = [*loaded.transform(Image.new("RGB", (256, 256))).shape]
    if shape is not None:
        return torch.randn(_SAMPLES, *shape)
    vocabulary = getattr(getattr(loaded.model, "config", None), "vocab_size", None)
    if isinstance(vocabulary, int):
        return {"input_ids": torch.randint(vocabulary, (_SAMPLES, 16))}
    raise inputs.SpecError(
        f"nothing says what input {loaded.name} takes: pass its shape with --input C,H,W, or --data"
    )


def record(parser: argparse.ArgumentParser) -> None:
    """Keep a model's activations in a file, to compare with later.

    Runs data through a model once, and writes the pooled activations of its layers, with identifiers of the samples,
    to a safetensors file. `cka-hooks run --against FILE` and cka_hooks.Precomputed.load(FILE) read it. The
    activations are held in memory until the file is written.

    examples
      cka-hooks record --model torchvision:resnet18 --data photos/ --layers 'layer?' --out resnet18.safetensors
      cka-hooks run --model torchvision:resnet50 --data photos/ --layers 'layer?' --against resnet18.safetensors
    """
    inputs.model_words(parser)
    inputs.data_words(parser)
    kinds = "mean over positions (the default), token, token:K, last or flatten"
    parser.add_argument("--features", default="mean", metavar="F", help=kinds)
    output_words(parser, None)
    parser.set_defaults(command=_record)


def _record(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if out.suffix != ".safetensors":
        raise OptionError(f"--out {out}: expected a file that ends with .safetensors")
    check_output(arguments, out)
    bound = vars(arguments).setdefault("samples", None)
    loaded = inputs.load_model(arguments.model, arguments.weights, seed=arguments.seed)
    loader, key = inputs.loader_of(arguments, loaded.transform), arguments.sample_ids
    drawn = getattr(loader, "dataset", None)
    ids: list[Identifier] = drawn.sample_ids if key is None and isinstance(drawn, inputs.DrawnSamples) else []

    def batches() -> Iterator[Any]:
        for batch in loader:
            ids.extend([] if key is None else ids_of(batch, key))
            yield without_ids(batch, key)

    recorder = LayerRecorder(loaded.model.to(arguments.device), arguments.layers, features=arguments.features)
    rows: dict[str, list[Tensor]] = defaultdict(list)
    samples = 0
    with progress_bar(loaded.name, "sample", len(ids) or bound, shown=not arguments.quiet) as bar:
        for activations in recorder.stream(batches()):
            for layer, activation in activations.items():
                rows[layer].append(activation.cpu())
            count = len(next(iter(activations.values())))
            samples += count
            bar.update(count)
            if bound is not None and samples >= bound:
                break
    if not rows:
        raise inputs.SpecError("the loader yielded no batch: it is empty")
    arrays = {layer: torch.cat(parts)[:bound] for layer, parts in rows.items()}
    samples = min(samples, bound or samples)
    for layer in [layer for layer, array in arrays.items() if len(array) < samples]:
        warn(f"{layer!r} did not run for every sample, and is left out")
        del arrays[layer]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_features(out, arrays, ids[:bound] or None)
    how = f"identified as {ids[0]!r}, ..." if ids else "in the order of the loader, without identifiers"
    say(f"{out}  {len(arrays)} layers, {samples} samples, {how}")
    return 0
