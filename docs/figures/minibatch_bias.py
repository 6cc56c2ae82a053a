"""Biased and unbiased estimates against the size of the minibatch, for related and for unrelated features."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

import cka_hooks

generator = torch.Generator().manual_seed(0)
x, noise = torch.randn(2, 8192, 64, generator=generator)
pairs = {"related": (x, x + noise), "unrelated": (x, noise)}
sizes = [8, 16, 32, 64, 128, 256, 512]

figure = Figure(figsize=(7, 3), layout="constrained")
for axes, (name, (first, second)) in zip(figure.subplots(1, 2, sharey=True), pairs.items(), strict=True):
    axes.axhline(cka_hooks.cka(first, second), color="0.6", lw=1, label="all 8192 samples at once")
    for estimator in ("biased", "unbiased"):
        values = []
        for size in sizes:
            cka = cka_hooks.CKAAccumulator(estimator=estimator)
            for a, b in zip(first.split(size), second.split(size), strict=True):
                cka.update({"a": a, "b": b})
            values.append(cka.compute()["a", "b"])
        axes.plot(sizes, values, "o-", label=f"{estimator} minibatches")
    axes.set_xscale("log", base=2)
    axes.set(title=f"{name} features", xlabel="samples in a minibatch", ylim=(-0.05, 1.05), xticks=sizes)
    axes.set_xticklabels(sizes)
    axes.spines[["top", "right"]].set_visible(False)
figure.axes[0].set_ylabel("CKA")
figure.axes[1].legend(frameon=False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
