"""``cka-hooks layers``: what can be measured in a model."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from cka_hooks.command import numbers
from cka_hooks.command.data import first_batch, load_data
from cka_hooks.command.models import MODELS, LoadedModel, SpecError, load_model
from cka_hooks.command.terminal import say
from cka_hooks.recording.recorder import LayerRecorder

LINE = "list what can be measured in a model"
DESCRIPTION = f"""\
List what can be measured in a model, from one forward pass: name, type, shape and cost of each layer.

examples
  cka-hooks layers --model torchvision:resnet18 --weights none
  cka-hooks layers --model nets.py:net --data nets.py:test_loader

{MODELS}"""

_SAMPLES = 4


def words(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--model", required=True, metavar="MODEL", help="see above")
    parser.add_argument("--weights", default="none", metavar="W", help="weights of the model; default: none (random)")
    parser.add_argument("--data", metavar="DATA", help="take the first batch of this data instead of random images")
    parser.add_argument("--input", type=numbers.shape, metavar="C,H,W",
        help="the shape of one random input, such as 3,224,224")  # fmt: skip
    parser.add_argument("--layers", nargs="+", metavar="L", help="names or globs; default: every leaf that runs")


def run(arguments: argparse.Namespace) -> int:
    """Print the table of :meth:`LayerRecorder.describe`. Return the exit code."""
    loaded = load_model(arguments.model, arguments.weights)
    if arguments.data:
        data = load_data(arguments.data, transform=loaded.transform, batch_size=_SAMPLES, samples=_SAMPLES)
        batch, _ = first_batch(data)
    else:
        batch = _random_batch(loaded, arguments.input)
    say(LayerRecorder(loaded.model, arguments.layers).describe(batch))
    return 0


def _random_batch(loaded: LoadedModel, shape: tuple[int, ...] | None) -> Any:
    shape = shape or loaded.input_shape
    if shape is not None:
        return torch.randn(_SAMPLES, *shape)
    vocabulary = getattr(getattr(loaded.model, "config", None), "vocab_size", None)
    if isinstance(vocabulary, int):
        return {"input_ids": torch.randint(vocabulary, (_SAMPLES, 16))}
    raise SpecError(f"nothing says what input {loaded.name} takes: pass its shape with --input C,H,W, or --data")
