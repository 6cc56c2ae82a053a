"""
A torchvision model, by layer name
==================================


Pretrained weights where they can be downloaded, random ones otherwise.

Run ``python examples/torchvision_by_name.py``. It needs ``pip install "cka-hooks[demo]"``.
"""

# sphinx_gallery_thumbnail_path = "pictures/torchvision_by_name.png"
import sys

import torch
from torch.utils.data import DataLoader
from torchvision.models import ResNet18_Weights, resnet18

import cka_hooks
from cka_hooks.command.demo import digits


def load(quick: bool) -> tuple[torch.nn.Module, str]:
    if not quick:
        try:
            return resnet18(weights=ResNet18_Weights.DEFAULT), "pretrained"
        except OSError:  # offline
            pass
    torch.manual_seed(0)
    return resnet18(), "random"


def main(quick: bool = False) -> cka_hooks.CKAResult:
    model, weights = load(quick)
    size = 32 if quick else 96
    pixels = digits()[1].tensors[0][: 32 if quick else 512]
    images = torch.nn.functional.interpolate(pixels, size, mode="bilinear").expand(-1, 3, -1, -1)

    # An exact name, a glob in which * stops at dots, a module type: in any mixture.
    layers = ["conv1", "layer*.*.conv2", torch.nn.Linear]
    loader = DataLoader(images, batch_size=16 if quick else 64)
    result = cka_hooks.compare(model, loader, layers=layers, progress=not quick)

    print(f"ResNet-18 with {weights} weights, on digits of {size} pixels")
    print(result.summary())
    if not quick:
        result.plot("torchvision_by_name.png")
        print("torchvision_by_name.png")
    return result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
