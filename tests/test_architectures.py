"""Torchvision's families, every leaf layer and call, every pair: 1e-6 from the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.models as vision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams

import cka_hooks

# Untrained networks let one image dominate now and then; whether that is said is not the matter here.
pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")


def small_vgg() -> nn.Module:
    """A VGG without its 25,088 x 4,096 classifier, which would take longer to initialise than all else here."""
    body = vision.vgg.make_layers([8, "M", 16, "M", 32, 32, "M", 64, "M", 64, "M"], batch_norm=True)
    with torch.device("meta"):
        model = vision.VGG(body, init_weights=False)
    model.classifier = nn.Sequential(
        nn.Linear(64 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Linear(32, 10)
    )
    return model


# Torchvision's own classes at a width and depth that a test run can pay for.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": partial(vision.ResNet, vision.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "resnet_bottleneck": partial(
        vision.ResNet, vision.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=16
    ),
    "densenet": partial(vision.DenseNet, 8, (2, 3, 2, 2), 16, num_classes=10),
    "efficientnet": lambda: vision.EfficientNet(
        [
            MBConvConfig(1, 3, 1, 32, 16, 1, 0.5, 1),
            MBConvConfig(6, 3, 2, 16, 24, 2, 0.5, 1),
            MBConvConfig(6, 5, 2, 24, 40, 2, 0.5, 1),
            MBConvConfig(6, 3, 2, 40, 80, 2, 0.5, 1),
        ],
        dropout=0.2,
        num_classes=10,
    ),
    "mobilenet_v2": partial(vision.mobilenet_v2, width_mult=0.35, num_classes=10),
    "mobilenet_v3": partial(vision.mobilenet_v3_small, num_classes=10),
    "shufflenet": partial(vision.shufflenet_v2_x0_5, num_classes=10),
    "squeezenet": partial(vision.squeezenet1_1, num_classes=10),
    "vgg": lambda: small_vgg(),
    "regnet": lambda: vision.RegNet(
        BlockParams.from_init_params(depth=6, w_0=16, w_a=14.0, w_m=2.2, group_width=8, se_ratio=0.25),
        num_classes=10,
        stem_width=16,
    ),
    "convnext": lambda: vision.ConvNeXt(
        [
            CNBlockConfig(24, 48, 1),
            CNBlockConfig(48, 96, 1),
            CNBlockConfig(96, 192, 2),
            CNBlockConfig(192, None, 1),
        ],
        stochastic_depth_prob=0.1,
        num_classes=10,
    ),
    "swin": partial(vision.SwinTransformer, [4, 4], 24, [1, 1, 2, 1], [1, 2, 4, 8], [7, 7], num_classes=10),
    "swin_v2": partial(
        vision.SwinTransformer,
        [4, 4],
        24,
        [1, 1],
        [1, 2],
        [8, 8],
        num_classes=10,
        block=vision.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=vision.swin_transformer.PatchMergingV2,
    ),
}
FULL = [
    "resnet18",
    "resnet50",
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "vgg11_bn",
    "regnet_y_400mf",
    "convnext_tiny",
    "swin_t",
]


def noise(samples: int = 32, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 3, 64, 64, generator=generator) for _ in range(count)]


def structured(samples: int = 32, count: int = 2) -> list[Tensor]:
    """Smooth positive images on one bright background: few of their directions carry what differs."""
    generator = torch.Generator().manual_seed(2)
    out = []
    for _ in range(count):
        coarse = torch.randn(samples, 3, 4, 4, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=64, mode="bilinear")
        out.append(3 + 0.3 * smooth + 0.01 * torch.randn(smooth.shape, generator=generator))
    return out


@pytest.mark.parametrize("name", SMALL)
def test_family(name: str, check: Callable[..., cka_hooks.CKAResult]) -> None:
    model = SMALL[name]().eval()
    batches = [noise()[0], structured()[0]]
    result = check(model, batches)
    assert len(result.layers) > 20
    assert (result.samples, result.minibatches) == (64, 2)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [noise, structured])
@pytest.mark.parametrize("name", FULL)
def test_full_size(name: str, batches: Callable[[], list[Tensor]], check: Callable[..., cka_hooks.CKAResult]) -> None:
    check(vision.get_model(name, weights=None).eval(), batches())


@pytest.mark.parametrize(
    "options",
    [
        {"minibatch": 8},
        {"estimator": "biased"},
        {"kernel": "rbf"},
        {"kernel": "rbf", "estimator": "biased", "minibatch": 16},
        {"kernel": "cosine"},
    ],
    ids=str,
)
def test_options(options: dict[str, object], check: Callable[..., cka_hooks.CKAResult]) -> None:
    check(SMALL["resnet"]().eval(), structured(), **options)


@pytest.mark.parametrize("name", ["resnet", "squeezenet", "convnext"])
def test_channels_last(name: str, check: Callable[..., cka_hooks.CKAResult]) -> None:
    model = SMALL[name]().eval().to(memory_format=torch.channels_last)
    check(model, [batch.to(memory_format=torch.channels_last) for batch in structured()])


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Tensor]]:
    """Torchvision's ResNet with a small stem, trained for two epochs on handwritten digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    images, targets = images[order], targets[order]
    model = vision.ResNet(vision.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.Identity()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for x, y in zip(images[:1024].split(64), targets[:1024].split(64), strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1024:]).argmax(1) == targets[1024:]).float().mean()
    assert accuracy > 0.8
    return model, list(images[1024:].split(32)[:4])


@pytest.mark.parametrize("options", [{}, {"minibatch": 8}, {"kernel": "rbf"}], ids=str)
def test_trained(
    options: dict[str, object],
    trained: tuple[nn.Module, list[Tensor]],
    check: Callable[..., cka_hooks.CKAResult],
) -> None:
    result = check(*trained, **options)
    assert not result.degenerate


def test_bn1_and_the_in_place_relu_after_it_are_two_layers(
    trained: tuple[nn.Module, list[Tensor]], check: Callable[..., cka_hooks.CKAResult]
) -> None:
    model, batches = trained
    assert model.relu.inplace
    result = check(model, batches, layers=["conv1", "bn1", "relu", "layer1.0.bn2", "layer1.0.relu"])
    for first, second in [("bn1", "relu"), ("layer1.0.bn2", "layer1.0.relu#2"), ("conv1", "relu")]:
        assert result[first, second] < 0.999
    # A layer whose activation was overwritten before it was read would have the values of its successor.
    other = result["bn1", "layer1.0.bn2"] - result["relu", "layer1.0.bn2"]
    assert abs(other) > 1e-4


def test_the_inplace_relu_does_not_change_what_bn1_gave(trained: tuple[nn.Module, list[Tensor]]) -> None:
    model, batches = trained
    inplace = cka_hooks.compare(model, batches, progress=False)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    try:
        outofplace = cka_hooks.compare(model, batches, layers="**bn*", progress=False)
    finally:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
    # bn2 is followed by `out += identity`, which stays in place: only the hook's timing keeps it apart.
    same = [inplace.layers.index(layer) for layer in outofplace.layers]
    np.testing.assert_allclose(inplace.matrix[same][:, same], outofplace.matrix, rtol=0, atol=1e-12)
