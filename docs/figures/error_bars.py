"""Fifty runs on fifty samples of one population: how often does the 95 % interval hold the true value?"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

import cka_hooks

generator = torch.Generator().manual_seed(1)
first, second = torch.randn(2, 20, 20, generator=generator) / 20**0.5


def run(minibatches: int) -> cka_hooks.CKAResult:
    cka = cka_hooks.CKAAccumulator()
    for _ in range(minibatches):
        x = torch.randn(64, 20, generator=generator)
        cka.update({"a": (x @ first).relu(), "b": (x @ first).relu() @ second})
    return cka.compute()


truth = run(4000)["a", "b"]
runs = [run(10) for _ in range(50)]
held = 0
figure = Figure(figsize=(7, 3), layout="constrained")
axes = figure.add_subplot()
for number, result in enumerate(runs):
    low, high = (bound[0, 1].item() for bound in result.interval(0.95))
    holds = low <= truth <= high
    held += holds
    colour = "tab:blue" if holds else "tab:orange"
    axes.plot([number, number], [low, high], color=colour, lw=2)
    axes.plot(number, result["a", "b"], "o", color=colour, ms=3)
axes.axhline(truth, color="0.3", lw=1)
axes.set(title=f"{held} of 50 intervals hold the true value", xlabel="run of 10 minibatches of 64", ylabel="CKA")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
