"""Cancellation in float32: an untrained ResNet-18 on noise, by the usual formula and by this package."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.models import resnet18

import cka_hooks

torch.manual_seed(0)
model = resnet18().eval()
images = torch.rand(128, 3, 64, 64)
layers = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
layers = ["conv1", "bn1", *[f"{block}.{name}" for block in layers for name in ("conv1", "bn1", "conv2", "bn2")], "fc"]
(kept,) = cka_hooks.LayerRecorder(model, layers=layers).stream([images])


def hsic(k: Tensor, el: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, as it is mostly written: three large numbers that nearly cancel."""
    n = len(k)
    product = k @ el
    inner, both, rest = product.trace(), k.sum() * el.sum() / ((n - 1) * (n - 2)), 2 * product.sum() / (n - 2)
    return (inner + both - rest) / (n * (n - 3))


rows = [activation.flatten(1) for activation in kept.values()]
grams = [(row @ row.T).fill_diagonal_(0) for row in rows]
products = torch.stack([torch.stack([hsic(k, el) for el in grams]) for k in grams])
usual_cka = products / products.diag().outer(products.diag()).sqrt()
exact = cka_hooks.cka_matrix([activation.double() for activation in kept.values()])
ours = cka_hooks.cka_matrix(list(kept.values()))
off = (usual_cka - exact).abs()
print(f"usual formula: up to {off.max():.2f}, {(off > 0.01).double().mean():.0%} off by more than 0.01")
print(f"this package: up to {(ours - exact).abs().max():.1e}")

figure = Figure(figsize=(10, 3.6), layout="constrained")
panels = figure.subplots(1, 3)
titles = "the usual formula in float32", "cka_hooks on float32", f"difference, up to {off.max():.2f}"
for axes, title, matrix, top in zip(panels, titles, (usual_cka, ours, off), (1, 1, None), strict=True):
    drawn = axes.imshow(matrix, origin="lower", vmin=0, vmax=top, cmap="magma")
    axes.set(title=title, xlabel="layer", xticks=range(0, len(layers), 8), yticks=range(0, len(layers), 8))
    figure.colorbar(drawn, ax=axes, shrink=0.8)
panels[0].set_ylabel("layer")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
