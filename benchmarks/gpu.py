"""README's table of what a comparison costs on a GPU: `python benchmarks/gpu.py`, on a machine with one.

    pip install -e ".[demo,peers]" transformers
    python benchmarks/gpu.py                       # every row: some 15 minutes on an H100
    python benchmarks/gpu.py --rows "ResNet-18*"   # some

Every leaf layer and call, batches on the device already, wall time with a synchronise at both ends, medians of
interleaved runs, bare eager forward pass = 1. pytorch-cka takes fewer layers: the leaves that run once and that it
can tell apart. Memory is the peak of PyTorch's allocator above that of the bare pass, in the same process. "First
batch" is what the very first batch of that row takes beyond a later one: kernels are compiled then, which Triton
remembers from one process to the next.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from functools import partial
from typing import Any, NamedTuple

import peers
import torch
import torchvision
from measure import BARE, chosen_device, interleaved, parsed, parser_of, peak_mib, print_machine, table, timed
from torch import Tensor, nn
from workload import Config, resnet18_cifar, vit_b_16

import cka_hooks


class Row(NamedTuple):
    """One network with its batch; `target` is what must hold, with the aim behind it."""

    title: str
    config: Config | None
    target: str
    autocast: bool = False
    peer: bool = False
    layers: str | None = None


def image(build: Callable[[], nn.Module], pixels: int, batch: int, blocks: str = "layer*.*") -> Config:
    return Config("", build, pixels, batch, blocks)


RESNET50 = torchvision.models.resnet50
R50, R18, VIT = image(RESNET50, 224, 64), image(resnet18_cifar, 32, 128), image(vit_b_16, 224, 64)
ROWS = [
    Row("ResNet-50, 224 px, 64", R50, "1.7, aim 1.4", peer=True),
    Row("ResNet-50, 224 px, 64, bf16 autocast", R50, "2.5, aim 2.0", autocast=True),
    Row("ResNet-50, 224 px, 256", image(RESNET50, 224, 256), "1.9, aim 1.5", peer=True),
    Row("ResNet-18, 32 px, 128", R18, "2.4, aim 1.9", peer=True),
    Row("ViT-B/16, 224 px, 64", VIT, "1.2, aim 1.08", peer=True),
    Row("ViT-B/16, 224 px, 64, bf16 autocast", VIT, "1.7, aim 1.4", autocast=True),
    Row("Llama of 1.1 B parameters, bf16, 32 x 512 tokens", None, "1.6, aim 1.2"),
    Row("ResNet-50, 224 px, 64, residual blocks", R50, "1.1, aim 1.03", layers="layer*.*"),
    Row("ResNet-18, 32 px, 128, residual blocks", R18, "1.5, aim 1.2", layers="layer*.*"),
]


def llama(device: torch.device) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """As TinyLlama, untrained; without a cache, as somebody would run it over a validation set."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (2, 32, 512), generator=torch.Generator().manual_seed(0))
    return model, [{"input_ids": tokens.to(device)} for tokens in ids]


def measured(row: Row, device: torch.device, rounds: int) -> list[str]:
    model: nn.Module
    batches: list[Any]
    model, batches = llama(device) if row.config is None else row.config.on(device, 2)

    def cast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if row.autocast else nullcontext()

    def bare(model: nn.Module, batches: list[Any]) -> None:
        with torch.no_grad(), cast():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)

    def compared(batches: list[Any]) -> cka_hooks.CKAResult:
        with cast():
            return cka_hooks.compare(model, batches, layers=row.layers, progress=False)

    bare(model, batches[:1])
    first = timed(partial(compared, batches[:1])) - timed(partial(compared, batches[:1]))
    runs: dict[str, Callable[[], object]] = {BARE: partial(bare, model, batches), "here": partial(compared, batches)}
    layers = str(len(compared(batches[:1]).layers))
    if row.peer and peers.installed("pytorch-cka"):
        loader: Any = [(batch, torch.zeros(len(batch))) for batch in batches]
        once = peers.layers_of(model, loader)
        runs["peer"] = partial(peers.pytorch_cka_matrix, model, loader, once)
        runs["same"] = lambda: cka_hooks.compare(model, batches, layers=once, progress=False)
    found = interleaved(runs, rounds)
    below = peak_mib(runs[BARE])
    above = {name: f"{peak_mib(run) - below:.0f}" for name, run in runs.items()}
    milliseconds = statistics.median(found.seconds[BARE]) / len(batches) * 1e3
    peer = f"{found.ratio('peer'):.2f} ({len(once)}), {above['peer']} MiB" if "peer" in runs else ""
    same = f"{found.ratio('same'):.2f}" if "same" in runs else ""
    return [
        row.title,
        f"{milliseconds:.1f}",
        f"{found.spelled('here')}",
        layers,
        row.target,
        above["here"],
        f"{first:.1f}",
        same,
        peer,
    ]


def main() -> None:
    parser = parser_of(__doc__, "rounds", "device", rounds=7, device="cuda")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs of rows")
    args = parsed(parser)
    warnings.simplefilter("ignore")
    print_machine()
    print()
    rows = []
    for row in ROWS:
        if any(fnmatch(row.title, glob) for glob in args.rows):
            rows.append(measured(row, chosen_device(), args.rounds))
            print(": ".join(rows[-1][:3]), flush=True)
    header = [
        "network, batch",
        "bare, ms",
        "cka_hooks",
        "layers",
        "must be under",
        "MiB above bare",
        "first batch, s",
    ]
    header += ["cka_hooks, layers of pytorch-cka", "pytorch-cka (layers), MiB"]
    print("\n" + table(header, rows))


if __name__ == "__main__":
    main()
