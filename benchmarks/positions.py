"""Tokens as samples: what they cost, and how far bars that take them for independent would be off.

    python benchmarks/positions.py                # GPT-2 small from its config, 4 x 512 tokens, 512 of them drawn
    python benchmarks/positions.py --bars         # a small model of characters, trained here for a minute

The bars are those of one CKA value over 64 batches of 8 texts, from minibatches that hold whole texts, and from the
same tokens dealt to minibatches at random, as if each were a sample of its own. The truth is the spread of the value
over many such sets of texts.
"""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from measure import BARE, interleaved, parsed, parser_of, print_machine
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import cka_hooks

BATCHES, TEXTS, LENGTH = 64, 8, 64


def cost(batches: int, rounds: int) -> None:
    """Time of a comparison of the blocks, over that of the forward passes."""
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config()).eval()
    loader = [{"input_ids": torch.randint(50257, (4, 512))} for _ in range(batches)]

    def bare() -> None:
        with torch.no_grad():
            for batch in loader:
                model(**batch)

    runs: dict[str, Callable[[], object]] = {BARE: bare}
    for positions in (512, 2048):
        runs[f"positions={positions}"] = lambda positions=positions: cka_hooks.compare(  # type: ignore[misc]
            model, loader, layers=["h.?", "h.??"], per="position", positions=positions, progress=False
        )
    timings = interleaved(runs, rounds)
    for name in runs:
        if name != BARE:
            print(f"{name}: {timings.spelled(name)} forward passes")


def trained(text: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=3, n_head=4))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        ids = texts(text, 32)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.2f}")
    return model.transformer.eval()


def texts(text: Tensor, count: int) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (count, 1))
    return text[starts + torch.arange(LENGTH)]


def bars(sets: int, steps: int) -> None:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.tensor([min(ord(c), 127) for file in files for c in file.read_text("utf-8", "replace")])
    model = trained(text, steps)
    values, whole, dealt = [], [], []
    for _ in range(sets):
        batches = [texts(text, TEXTS) for _ in range(BATCHES)]
        with cka_hooks.Comparison(model, layers=["h.0", "h.2"], per="position") as comparison:
            for ids in batches:
                comparison.update({"input_ids": ids})
        result = comparison.compute()
        values.append(result["h.0", "h.2"])
        whole.append(float(result.stderr[0, 1]))
        tokens = {"h.0": [], "h.2": []}  # type: ignore[var-annotated]
        recorder = cka_hooks.LayerRecorder(model, layers=["h.0", "h.2"], per="position")
        for activations in recorder.stream({"input_ids": ids} for ids in batches):
            for layer, rows in activations.items():
                tokens[layer].append(rows)
        order = torch.randperm(BATCHES * TEXTS * LENGTH)
        cka = cka_hooks.CKAAccumulator(per="position")
        for chosen in order.split(TEXTS * LENGTH):
            cka.update({layer: torch.cat(rows)[chosen] for layer, rows in tokens.items()})
        dealt.append(float(cka.compute().stderr[0, 1]))
    truth = statistics.stdev(values)
    print(f"CKA of the first and the last block is {statistics.mean(values):.3f}, over {sets} sets of texts")
    print(f"it spreads by {truth:.4f}")
    for name, errors in (("minibatches of whole texts", whole), ("tokens dealt at random", dealt)):
        mean = statistics.mean(errors)
        print(f"standard error from {name}: {mean:.4f}; the truth is {truth / mean:.2f} times that")


def main() -> None:
    parser = parser_of(__doc__, "rounds", "cpu-time", rounds=3)
    parser.add_argument("--bars", action="store_true", help="measure error bars instead of time")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--sets", type=int, default=60, help="of texts")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    arguments = parsed(parser)
    print_machine()
    if arguments.bars:
        bars(arguments.sets, arguments.steps)
    else:
        cost(arguments.batches, arguments.rounds)


if __name__ == "__main__":
    main()
