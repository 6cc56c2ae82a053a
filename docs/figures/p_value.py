"""The null: CKA of two layers after the samples of one were permuted, and the tail that `pvalue` takes."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

import cka_hooks

generator = torch.Generator().manual_seed(0)
hidden = torch.randn(64, 3, generator=generator)
x = torch.cat([hidden, torch.randn(64, 17, generator=generator) / 4], 1)
y = hidden @ torch.randn(3, 20, generator=generator) + torch.randn(64, 20, generator=generator) * 10


def measured(features: torch.Tensor) -> cka_hooks.CKAResult:
    cka = cka_hooks.CKAAccumulator()
    cka.update({"x": x, "y": features})
    return cka.compute()


result = measured(y)
value, p = result["x", "y"], result.pvalue()[0, 1].item()
permuted = [cka_hooks.cka(x, y[torch.randperm(64, generator=generator)]) for _ in range(4000)]
share = np.mean(np.array(permuted) >= value)
print(f"p-value {p:.4f}; {share:.4f} of 4000 permutations are as large")

figure = Figure(figsize=(7, 3), layout="constrained")
axes = figure.add_subplot()
axes.hist(permuted, 80, density=True, color="0.8", label="4000 permutations")
sd, skewness = result.null_stderr[0, 1].item(), result.null_skewness[0, 1].item()
at = np.linspace(min(permuted), max(max(permuted), value) * 1.1, 400)
axes.plot(at, stats.pearson3.pdf(at, skewness, 0, sd), label="Pearson III with the exact moments")
axes.plot(at, stats.norm.pdf(at, 0, sd), ":", color="0.4", label="normal distribution")
axes.axvline(value, color="tab:orange")
axes.text(value, axes.get_ylim()[1] * 0.55, f"  measured: {value:.3f}\n  p = {p:.3f}", color="tab:orange")
axes.set(xlabel="CKA", yticks=[])
axes.legend(frameon=False)
axes.spines[["top", "right", "left"]].set_visible(False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
