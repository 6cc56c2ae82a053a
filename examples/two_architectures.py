"""
Two architectures
=================


Over the same images, which depth of one network is most like which depth of the other?

Run ``python examples/two_architectures.py``. It needs ``pip install "cka-hooks[demo]"``.
"""

# sphinx_gallery_thumbnail_path = "pictures/two_architectures.png"
import sys

import torch
from torch.utils.data import DataLoader
from torchvision import models

import cka_hooks
from cka_hooks.command.demo import digits


def main(quick: bool = False) -> cka_hooks.CKAResult:
    torch.manual_seed(0)
    try:
        weights = None if quick else "DEFAULT"
        nets = {name: models.get_model(name, weights=weights) for name in ("resnet18", "vgg11_bn")}
    except OSError:  # offline
        nets = {name: models.get_model(name, weights=None) for name in ("resnet18", "vgg11_bn")}
    pixels = digits()[1].tensors[0][: 64 if quick else 256]
    images = torch.nn.functional.interpolate(pixels, 32 if quick else 64, mode="bilinear").expand(-1, 3, -1, -1)

    result = cka_hooks.compare(
        nets,
        DataLoader(images, batch_size=8 if quick else 64),
        layers={"resnet18": ["conv1", "layer?.?", "avgpool"], "vgg11_bn": ["features.*", "classifier.1"]},
        minibatch=None if quick else 32,
        progress=not quick,
    )
    across = result.between("resnet18", "vgg11_bn")
    for row in across.rows:
        best = max(across.columns, key=lambda column, row=row: across[row, column])
        print(f"{row:<20} is most similar to {best:<24} {across[row, best]:.3f}")
    if not quick:
        across.plot("two_architectures.png")
        across.plot_profile("two_architectures_profile.png")
        print("two_architectures.png and two_architectures_profile.png")
    return result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
