"""Does CKA find the corresponding layer in another network? The sanity check of Kornblith et al. 2019, table 2.

    python benchmarks/layer_identification.py            # trains ten networks once, then reads them from .cache
    python benchmarks/layer_identification.py --figure benchmarks/figures/layer_identification.png

Networks of one architecture that differ in their seed learn the same thing layer by layer. So for each layer of one,
the most similar layer of another should be the one at the same depth. The images are scikit-learn's handwritten
digits, turned, moved, scaled and laid over crops of scikit-learn's two photographs (as MNIST-M, Ganin et al. 2016):
nothing is downloaded. Layers are compared on digits that were not trained on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from measure import parsed, parser_of, print_machine
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import cka_hooks

CACHE = Path(__file__).parent / ".cache" / "layer_identification"
SIDE = 16
TRAINED_ON = 1400
STRIDES = (1, 1, 2, 1, 1, 2, 1, 1, 2, 1)
# The batch normalised outputs of the ten convolutions: what the `ReLU(inplace=True)` after each overwrites.
LAYERS = [f"{3 * i + 1}" for i in range(len(STRIDES))]


class Digits:
    """Handwritten digits over photographs, (n, 3, SIDE, SIDE), as many as are asked for."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        self._images = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
        self._targets = torch.tensor(digits.target)[order]
        photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
        self._photos = torch.stack(photos)

    def draw(self, samples: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Images and classes, of digits that networks are trained on or of the others."""
        low, high = (TRAINED_ON, len(self._images)) if held_out else (0, TRAINED_ON)
        index = torch.randint(low, high, (samples,), generator=self._generator)
        return (self._backgrounds(samples, mixed=held_out) - self._moved(self._images[index])).abs(), self._targets[
            index
        ]

    def _uniform(self, low: float, high: float, samples: int) -> Tensor:
        return low + (high - low) * torch.rand(samples, generator=self._generator)

    def _moved(self, images: Tensor) -> Tensor:
        n = len(images)
        angle, scale = self._uniform(-0.35, 0.35, n), self._uniform(0.9, 1.4, n)
        right, down = self._uniform(-0.3, 0.3, n), self._uniform(-0.3, 0.3, n)
        cosine, sine = angle.cos() * scale, angle.sin() * scale
        maps = torch.stack([cosine, -sine, right, sine, cosine, down], 1).unflatten(1, (2, 3))
        grid = functional.affine_grid(maps, [n, 1, SIDE, SIDE], align_corners=False)
        return functional.grid_sample(images.unsqueeze(1), grid, align_corners=False)

    def _backgrounds(self, samples: int, mixed: bool) -> Tensor:
        """Crops of one photograph (a training step), or of both (samples that are independent of each other)."""
        shape = (samples if mixed else 1, 1, 1)
        photo = torch.randint(len(self._photos), shape, generator=self._generator)
        # Every second pixel, so that a crop of 16 shows something.
        steps = 2 * torch.arange(SIDE)
        down, right = (
            torch.randint(side - 2 * SIDE, (samples, 1), generator=self._generator) + steps
            for side in self._photos.shape[2:]
        )
        return self._photos[photo, :, down.unsqueeze(2), right.unsqueeze(1)].movedim(-1, 1)


def network(seed: int, width: int = 24) -> nn.Sequential:
    """Ten convolutions with batch normalisation and ReLU, a mean over positions, ten classes."""
    torch.manual_seed(seed)
    widths = [width] * 3 + [2 * width] * 3 + [4 * width] * 4
    modules: list[nn.Module] = []
    channels = 3
    for wider, stride in zip(widths, STRIDES, strict=True):
        convolution = nn.Conv2d(channels, wider, 3, stride, 1, bias=False)
        modules += [convolution, nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
        channels = wider
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def trained(seed: int, steps: int, width: int = 24, batch: int = 64) -> nn.Sequential:
    """A network after `steps` steps of SGD, in eval mode."""
    model = network(seed, width).to(memory_format=torch.channels_last)
    digits = Digits(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        images, targets = digits.draw(batch)
        loss = functional.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def cached(seed: int, steps: int, width: int = 24) -> nn.Sequential:
    """The trained network, from the cache where it is there."""
    path = CACHE / f"width{width}-steps{steps}-seed{seed}.pt"
    if not path.exists():
        started = time.perf_counter()
        model = trained(seed, steps, width)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        print(f"trained seed {seed} in {time.perf_counter() - started:.0f} s", flush=True)
    model = network(seed, width)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def accuracy(model: nn.Module, samples: int = 2048) -> float:
    """Share of held-out digits that are told right."""
    images, targets = Digits(2).draw(samples, held_out=True)
    with torch.no_grad():
        return float((model(images).argmax(1) == targets).float().mean())


def labels(networks: int) -> list[str]:
    """The rows of every matrix here: network by network, layer by layer."""
    return [f"{i}/{layer}" for i in range(networks) for layer in LAYERS]


def cka(models: Sequence[nn.Module], batches: Sequence[Tensor], **options: str | float) -> Tensor:
    """CKA of all layers of all networks, in one pass."""
    named = {str(i): model for i, model in enumerate(models)}
    result = cka_hooks.compare(named, batches, layers=LAYERS, progress=False, **options)  # type: ignore[arg-type]
    assert list(result.rows) == labels(len(models))
    return result.matrix


def cka_of_overwritten(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> Tensor:
    """The same from activations kept without a copy until the forward pass is over: the next ReLU changed them."""
    accumulator = cka_hooks.CKAAccumulator()
    for batch in batches:
        accumulator.update(
            {
                f"{i}/{layer}": activation
                for i, model in enumerate(models)
                for layer, activation in stored_without_copy(model, batch).items()
            }
        )
    return accumulator.compute().matrix


def stored_without_copy(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """What a plain hook that keeps each output has in hand after the forward pass."""
    stored: dict[str, Tensor] = {}

    def keep(layer: str, module: nn.Module, args: object, output: Tensor) -> None:
        stored[layer] = output

    handles = [model.get_submodule(layer).register_forward_hook(partial(keep, layer)) for layer in LAYERS]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return stored


def pooled_features(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> list[Tensor]:
    """(n, 4 C) of every layer, averaged over 2 x 2 regions, for indices that need fewer features than samples."""
    features = []
    for model in models:
        parts: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}
        for activations in cka_hooks.LayerRecorder(model, layers=LAYERS).stream(batches):
            for layer, activation in activations.items():
                parts[layer].append(functional.adaptive_avg_pool2d(activation, 2).flatten(1))
        features += [torch.cat(part) for part in parts.values()]
    return features


def regression_and_cca(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """R^2 of each layer predicted linearly from each other one, and their mean squared canonical correlation."""
    bases, sizes = [], []
    for x in features:
        centred = (x - x.mean(0)).double()
        squares, directions = torch.linalg.eigh(centred.mT @ centred)
        kept = squares > 1e-8 * squares[-1]
        sizes.append(squares[kept])
        bases.append((centred @ directions[:, kept] / squares[kept].sqrt()).float())
    r2 = torch.zeros(len(features), len(features), dtype=torch.float64)
    cca = torch.zeros_like(r2)
    for i, x in enumerate(bases):
        for j, y in enumerate(bases[: i + 1]):
            # ||Q_y' X||^2 / ||X||^2 with X = Q_x S V' and S^2 = size, and ||Q_y' Q_x||^2 / min(p_x, p_y).
            product = (y.mT @ x).square().double()
            r2[i, j] = (product.sum(0) * sizes[i]).sum() / sizes[i].sum()
            r2[j, i] = (product.sum(1) * sizes[j]).sum() / sizes[j].sum()
            cca[i, j] = cca[j, i] = product.sum() / min(product.shape)
    return r2, cca


def identified(matrix: Tensor, networks: int) -> Tensor:
    """(layers,) share of ordered pairs of networks in which a layer's most similar layer is at its own depth."""
    depth = len(LAYERS)
    blocks = matrix.unflatten(0, (networks, depth)).unflatten(2, (networks, depth)).transpose(1, 2)
    right = blocks.argmax(-1) == torch.arange(depth)
    apart = ~torch.eye(networks, dtype=torch.bool)
    return right[apart].double().mean(0)


def draw_figure(path: Path, matrix: Tensor, shares: Mapping[str, Tensor], networks: int) -> None:
    """The mean CKA between layers of different networks, and who identifies which layer."""
    from matplotlib import pyplot

    depth = len(LAYERS)
    blocks = matrix.unflatten(0, (networks, depth)).unflatten(2, (networks, depth)).transpose(1, 2)
    mean = blocks[~torch.eye(networks, dtype=torch.bool)].mean(0)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.8), layout="constrained", width_ratios=(1.2, 1.4))
    image = left.imshow(
        mean, origin="lower", cmap="magma", vmin=0, vmax=1, extent=(0.5, depth + 0.5, 0.5, depth + 0.5)
    )
    best = mean.argmax(1) + 1
    left.plot(best, range(1, depth + 1), "o", color="#1b9e77", ms=5, label="most similar layer")
    left.set(xlabel="layer of another network", ylabel="layer of one network", title="linear CKA, mean over pairs")
    left.set(xticks=range(1, depth + 1), yticks=range(1, depth + 1))
    left.legend(loc="lower right", fontsize=8)
    figure.colorbar(image, ax=left, shrink=0.8)
    for (name, share), style in zip(shares.items(), ("o-", "s--", "^-", "v-", "d:"), strict=False):
        right.plot(range(1, depth + 1), 100 * share, style, ms=5, lw=1.5, label=f"{name}: {100 * share.mean():.1f} %")
    right.set(xlabel="layer", ylabel="identified in another network, %", ylim=(-3, 103), xticks=range(1, depth + 1))
    right.set_title(f"{networks} networks, {networks * (networks - 1)} ordered pairs")
    right.spines[["top", "right"]].set_visible(False)
    right.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__, "figure")
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="of training, 64 images each")
    parser.add_argument("--samples", type=int, default=1024, help="that layers are compared on")
    options = parsed(parser)
    started = time.perf_counter()
    print_machine()
    count = options.networks
    models: list[nn.Module] = [cached(seed, options.steps) for seed in range(count)]
    untrained: list[nn.Module] = [network(seed).eval() for seed in range(count)]
    right = torch.tensor([accuracy(model) for model in models])
    print(f"{count} networks, held-out accuracy {100 * right.min():.1f} to {100 * right.max():.1f} %\n")
    batches = Digits(1).draw(options.samples, held_out=True)[0].split(256)

    print(f"| {'index':<44} | identified % | by layer 1..{len(LAYERS)}, % |")
    print(f"|{'-' * 46}|{'-' * 14}|{'-' * 24}|")
    shares: dict[str, Tensor] = {}

    def show(name: str, matrix: Tensor) -> Tensor:
        shares[name] = share = identified(matrix, count)
        layers = " ".join(f"{100 * layer:.0f}" for layer in share)
        print(f"| {name:<44} | {100 * share.mean():.1f} | {layers} |", flush=True)
        return matrix

    linear = show("linear CKA", cka(models, batches))
    show("RBF CKA, bandwidth 1", cka(models, batches, kernel="rbf"))
    show("RBF CKA, bandwidth 0.4", cka(models, batches, kernel="rbf", bandwidth=0.4))
    show("linear CKA, untrained networks", cka(untrained, batches))
    overwritten = show("linear CKA, activations overwritten in place", cka_of_overwritten(models, batches))
    features = pooled_features(models, batches)
    show("linear CKA, 2 x 2 pooled", cka_hooks.cka_matrix(features))
    r2, cca = regression_and_cca(features)
    show("linear regression (R2), 2 x 2 pooled", r2)
    show("mean CCA (R2), 2 x 2 pooled", cca)
    wrong = (overwritten - linear).abs()
    print(
        f"\nOverwritten in place: {100 * (wrong > 0.01).double().mean():.0f} % of the entries are off by more than "
        f"0.01, the largest error is {wrong.max():.2f}."
    )
    print(f"{time.perf_counter() - started:.0f} s")
    if options.figure:
        names = [name for name in shares if "0.4" not in name and "overwritten" not in name and "CKA, 2" not in name]
        draw_figure(options.figure, linear, {name: shares[name] for name in names}, count)


if __name__ == "__main__":
    main()
