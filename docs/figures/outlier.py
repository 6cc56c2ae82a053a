"""Samples that decide everything: unrelated features, with two samples of 256 moved away in both."""

import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure

import cka_hooks

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(2, 256, 20, generator=generator)
distances = [0, 5, 10, 15, 20, 25, 30, 35, 40, 50]
values, shares = [], []
for distance in distances:
    moved = [features.clone() for features in (x, y)]
    for features in moved:
        features[7:9, 0] += distance
    cka = cka_hooks.CKAAccumulator()
    cka.update({"x": moved[0], "y": moved[1]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cka_hooks.CKAWarning)
        result = cka.compute()
    values.append(result["x", "y"])
    shares.append(result.influence["x"].share)

figure = Figure(figsize=(7, 3), layout="constrained")
axes = figure.add_subplot()
axes.plot(distances, values, "o-", label="CKA of two unrelated layers")
axes.plot(distances, shares, "s--", label="result.influence: share of sample 7 in HSIC(x, x)")
axes.axhline(0.25, color="0.6", lw=1)
axes.text(0, 0.26, "above this you are warned", ha="left", va="bottom", color="0.35")
axes.set(xlabel="distance of two samples of 256 from the others, in standard deviations", ylim=(-0.05, 1.05))
axes.legend(frameon=False, loc="upper left")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
