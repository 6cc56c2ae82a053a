"""What the benchmarks run: torchvision networks with calibrated BatchNorm, and batches that look like images.

White noise through an untrained network is a special case: every sample looks like every other, and the Gram
matrices need more care than those of real data. So inputs are augmented crops of two photographs that come with
scikit-learn, and BatchNorm gets its running statistics from them; `calibrate=False` leaves it as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache

import torch
import torchvision
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def _photographs() -> list[Tensor]:
    """china.jpg and flower.jpg as (3, height, width) in [0, 1]."""
    return [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]


def image_crops(count: int, pixels: int, seed: int = 0) -> Tensor:
    """(count, 3, pixels, pixels): random crops of the photographs, flipped and recoloured, then normalised."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high, generator=generator))

    out = torch.empty(count, 3, pixels, pixels)
    for crop in out:
        photograph = _photographs()[int(uniform(0, 2))]
        _, height, width = photograph.shape
        side = height * uniform(0.15, 0.95)
        h, w = int(side), int(side * uniform(0.75, 1.33))
        w = min(w, width)
        top, left = int(uniform(0, height - h)), int(uniform(0, width - w + 1))
        part = photograph[None, :, top : top + h, left : left + w]
        part = functional.interpolate(part, size=(pixels, pixels), mode="bilinear", antialias=True)[0]
        part = part.flip(-1) if uniform(0, 1) < 0.5 else part
        part = (part - 0.5) * uniform(0.7, 1.3) + 0.5 + uniform(-0.2, 0.2)
        colour = torch.empty(3, 1, 1).uniform_(0.8, 1.2, generator=generator)
        crop.copy_((part * colour).clamp(0, 1))
    return (out - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def resnet18_cifar() -> nn.Module:
    """ResNet-18 with the stem that is usual for 32-pixel images: a 3x3 convolution and no pooling."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit_b_16(blocks: int = 12) -> nn.Module:
    """ViT-B/16 for 224 pixels, with fewer of its equal blocks where time is short."""
    model = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=blocks, num_heads=12, hidden_dim=768, mlp_dim=3072
    )
    # torchvision starts with a head of zeros, whose output is a constant.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def without_inplace(model: nn.Module) -> nn.Module:
    """The model with every `inplace=True` module switched to `inplace=False`."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return model


def calibrate(model: nn.Module, pixels: int, passes: int = 4, batch: int = 16) -> nn.Module:
    """Give BatchNorm the statistics of a few batches in train mode; the model ends in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        model.train()
        with torch.no_grad():
            for number in range(passes):
                model(image_crops(batch, pixels, seed=1000 + number))
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Config:
    """One network with the size of its inputs and batches.

    Attributes:
        title: for the table.
        build: makes the untrained network.
        pixels: height and width of its input.
        batch: samples in a batch.
        blocks: the pattern of its residual blocks.
    """

    title: str
    build: Callable[[], nn.Module]
    pixels: int
    batch: int
    blocks: str = ""

    def model(self, calibrated: bool = True, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().eval()
        return calibrate(model, self.pixels) if calibrated else model

    def batches(self, count: int) -> list[Tensor]:
        return list(image_crops(self.batch * count, self.pixels).split(self.batch))

    def on(self, device: str | torch.device, count: int, calibrated: bool = True) -> tuple[nn.Module, list[Tensor]]:
        """The model, and so many batches, on a device."""
        return self.model(calibrated).to(device), [batch.to(device) for batch in self.batches(count)]


CONFIGS = {
    "r18": Config("ResNet-18, 32 px, batch 128", resnet18_cifar, 32, 128, "layer*.*"),
    "r50": Config("ResNet-50, 224 px, batch 64", torchvision.models.resnet50, 224, 64, "layer*.*"),
    "vit": Config("ViT-B/16, 224 px, batch 32", vit_b_16, 224, 32, "encoder.layers.*"),
    # The same batches and kinds of layers at a fraction of the time.
    "r50-small": Config("ResNet-50, 112 px, batch 64", torchvision.models.resnet50, 112, 64, "layer*.*"),
    "vit-small": Config("ViT-B/16, 3 of 12 blocks, batch 32", lambda: vit_b_16(3), 224, 32, "encoder.layers.*"),
    "tiny": Config("ResNet-18, 16 px, batch 16", resnet18_cifar, 16, 16, "layer*.*"),
}


def forward(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """What every ratio is relative to: the model over the batches, without gradients."""
    with torch.no_grad():
        for batch in batches:
            model(batch)
