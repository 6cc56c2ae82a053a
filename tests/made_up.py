"""Results with realistic labels and plausible values, made without a model."""

import math

import torch

from cka_hooks.results.result import CKAResult, Influence


def resnet_labels(blocks: tuple[int, ...] = (2, 2, 2, 2)) -> list[str]:
    """Labels as those of torchvision's ResNets with bottleneck blocks: (3, 8, 36, 3) is ResNet-152."""
    labels = ["conv1", "bn1", "relu", "maxpool"]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            parts = ["conv1", "bn1", "relu", "conv2", "bn2", "relu#2", "conv3", "bn3"]
            parts += ["downsample.0", "downsample.1"] if block == 0 else []
            labels += [f"layer{stage}.{block}.{part}" for part in [*parts, "relu#3"]]
    return [*labels, "avgpool", "fc"]


def result_of(
    models: dict[str, list[str]] | list[str],
    *,
    degenerate: tuple[str, ...] = (),
    minibatches: int = 20,
    keep: bool = False,
    seed: int = 0,
) -> CKAResult:
    """A result over these labels: neighbours alike, a seam between stages, NaN for degenerate layers."""
    named = models if isinstance(models, dict) else {"": models}
    generator = torch.Generator().manual_seed(seed)
    labels: list[str] = []
    features: list[torch.Tensor] = []
    for model, layers in named.items():
        state = torch.ones(40, dtype=torch.float64)
        for i, layer in enumerate(layers):
            seam = layer.split(".")[0] != layers[max(i - 1, 0)].split(".")[0]
            state = state / state.norm() + (0.5 if seam else 0.15) / math.sqrt(40) * torch.randn(
                40, generator=generator, dtype=torch.float64
            )
            features.append(state / state.norm())
            labels.append(f"{model}/{layer}" if model else layer)
    stacked = torch.stack(features)
    matrix = (stacked @ stacked.T) ** 2
    matrix = ((matrix + matrix.T) / 2).fill_diagonal_(1.0)
    stderr = (0.03 * (1 - matrix)).clamp(min=1e-4).fill_diagonal_(0.0)
    for label in degenerate:
        at = labels.index(label)
        for values in (matrix, stderr):
            values[at] = math.nan
            values[:, at] = math.nan
    hsic = None
    if keep:
        noise = torch.randn(minibatches, len(labels), len(labels), generator=generator, dtype=torch.float64)
        hsic = matrix.nan_to_num() / minibatches * (1 + 0.1 * (noise + noise.mT))
    return CKAResult(
        rows=tuple(labels),
        columns=tuple(labels),
        matrix=matrix,
        stderr=stderr,
        samples=32 * minibatches,
        minibatches=minibatches,
        degrees_of_freedom=minibatches - 1,
        degenerate=dict.fromkeys(degenerate, "its output is the same for every sample"),
        models=tuple(name for name in named if name),
        settings={"kernel": "linear", "seeds": [0, 1], "tolerance": None},
        influence={label: Influence(0.05, i) for i, label in enumerate(labels)},
        minibatch_hsic=hsic,
        minibatch_layers=tuple(labels) if keep else (),
    )
