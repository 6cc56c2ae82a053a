"""Host time of one layer and batch: what the way from a hook to a product costs before anything is computed.

    python benchmarks/host.py

Many layers of few features, on one thread. Each module returns its input. Where the product does nothing, what is
left is Python's and PyTorch's time for hook, route and product. Where sizes change, each batch has another number of
samples, of tokens in padded text with its attention mask, or of pixels.

The time is that of a run less that of the same forward passes, over layers and batches, medians over interleaved
rounds. It counts from a forward pass with a hook that does nothing on each module: such hooks make PyTorch's own call
of a module slower, and belong to the forward pass. The last column counts from a forward pass without hooks. For
information: a function (label, activation), and `CKAAccumulator` with its product and its share of `step`. Of the
fused product, which is a GPU's, all is counted but the launch itself, on a CPU that is taken for one.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from unittest.mock import patch

import torch
from measure import BARE, Timings, interleaved, parsed, parser_of, print_machine, table
from torch import Tensor, nn

import cka_hooks
from cka_hooks.similarity.products import fused

NO_OP = "hooks that do nothing"
FEATURES = 16


class Nothing:
    """A consumer with a product for each layer that does nothing."""

    def __call__(self, layer: str, activation: Tensor) -> None:
        pass

    def slot(self, layer: str) -> Callable[[Tensor], None]:
        return ignore


def ignore(rows: Tensor) -> None:
    pass


def ignored(*numbers: int) -> None:
    pass


def takes(features: Tensor, minibatches: int) -> bool:
    """`fused.takes`, but for the device."""
    return (
        features.device.type == "cpu"
        and type(features) is Tensor
        and features.dtype in fused.PIECES
        and features.shape[0] <= min(minibatches * fused.MAX_SAMPLES, fused.MOST_ROWS)
        and features.numel() > 0
        and not features.requires_grad
    )


def launch(program: fused.Program, stream: int, tensors: Sequence[Tensor], *numbers: int) -> None:
    """What `fused.launch` does before it launches."""
    places = [tensor.data_ptr() for tensor in tensors]
    program.compiled.get((tensors[0].device.index, places[0] % 16 == 0))
    ignored(*places, *numbers, *program.tail)


class Chain(nn.Module):
    """Modules that return their input, one after another."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Identity() for _ in range(layers))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


Batches = list[dict[str, Tensor]]


def fixed(count: int) -> Batches:
    return [{"x": torch.randn(64, FEATURES)} for _ in range(count)]


def other_samples(count: int) -> Batches:
    return [{"x": torch.randn(48 + i % 32, FEATURES)} for i in range(count)]


def text(count: int) -> Batches:
    lengths = [8 + i % 24 for i in range(count)]
    return [
        {"x": torch.randn(64, length, FEATURES), "attention_mask": torch.ones(64, length, dtype=torch.long)}
        for length in lengths
    ]


def channels_last(count: int) -> Batches:
    sizes = [4 + i % 4 for i in range(count)]
    return [{"x": torch.randn(64, FEATURES, size, size).to(memory_format=torch.channels_last)} for size in sizes]


CASES = {
    "(64, 16), sizes fixed": fixed,
    "(n, 16), n changes": other_samples,
    "(64, T, 16) text, T changes": text,
    "(64, 16, H, W) channels-last, H and W change": channels_last,
}


def measured(batches: Batches, layers: int, rounds: int) -> Timings:
    model = Chain(layers).eval()

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    def with_no_op_hooks() -> None:
        handles = [part.register_forward_hook(lambda module, args, output: None) for part in model.parts]
        forward()
        for handle in handles:
            handle.remove()

    def recorded(consumer: Callable[[str, Tensor], None]) -> Callable[[], None]:
        recorder = cka_hooks.LayerRecorder(model, consumer=consumer)

        def run() -> None:
            with recorder:
                forward()

        return run

    def accumulated(as_on_a_gpu: bool) -> Callable[[], None]:
        accumulator = cka_hooks.CKAAccumulator()
        recorder = cka_hooks.LayerRecorder(model, consumer=accumulator.observe)
        stand_ins = {"launch": launch, "takes": takes, "processors_of": lambda device: 132} if as_on_a_gpu else {}
        end = accumulator.discard if as_on_a_gpu else accumulator.step
        # Of layers that it does not know, an accumulator asks whether features differ.
        with torch.no_grad(), recorder:
            model(**batches[0])
            accumulator.step()

        @torch.no_grad()
        def run() -> None:
            with recorder, patch.multiple(fused, **stand_ins) if stand_ins else nullcontext():
                for batch in batches:
                    model(**batch)
                    end()

        return run

    runs: dict[str, Callable[[], object]] = {
        BARE: forward,
        NO_OP: with_no_op_hooks,
        "a product that does nothing": recorded(Nothing()),
        "a function that does nothing": recorded(lambda layer, activation: None),
        "the fused product, launch left out": accumulated(as_on_a_gpu=True),
        "CKAAccumulator: observe and step": accumulated(as_on_a_gpu=False),
    }
    return interleaved(runs, rounds)


def main() -> None:
    parser = parser_of(__doc__, "rounds", "cpu-time", rounds=7)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--batches", type=int, default=50, help="in each run")
    args = parsed(parser)
    warnings.simplefilter("ignore", cka_hooks.CKAWarning)
    torch.set_num_threads(1)
    print_machine()
    print(f"{args.layers} layers, {args.batches} batches a run, {args.rounds} interleaved rounds, medians\n")
    rows = []
    for title, make in CASES.items():
        timings = measured(make(args.batches), args.layers, args.rounds)
        for name in timings.seconds:
            if name != BARE:
                above = [microseconds(timings, name, base, args) for base in (NO_OP, BARE)]
                rows.append([title, name, "" if name == NO_OP else above[0], above[1]])
    print(table(["activations", "consumer", "us above hooks that do nothing", "us above no hooks"], rows))


def microseconds(timings: Timings, name: str, base: str, args: argparse.Namespace) -> str:
    """What one layer and batch take beyond another run of the same round."""
    pairs = zip(timings.seconds[name], timings.seconds[base], strict=False)
    return f"{statistics.median(run - other for run, other in pairs) / args.layers / args.batches * 1e6:.1f}"


if __name__ == "__main__":
    main()
