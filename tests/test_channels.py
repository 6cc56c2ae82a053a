"""Which dimension holds the channels, if positions are averaged or chosen: named, known, or warned about."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import cka_hooks

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:a batch came twice")


def images(channels: int = 3, height: int = 6, width: int = 5, count: int = 3, samples: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(samples, channels, height, width, generator=generator) for _ in range(count)]


def over(*dims: int) -> Callable[[Tensor], np.ndarray]:
    return lambda x: x.double().mean([dim for dim in dims if dim < x.ndim]).flatten(1).numpy()


def check(
    model: nn.Module,
    batches: Sequence[Any],
    layers: list[str],
    features: Callable[[Tensor], np.ndarray],
    **options: Any,
) -> cka_hooks.CKAResult:
    """The result with ``features="mean"``, found to be the oracle's CKA of these features."""
    result = cka_hooks.compare(model, batches, layers=layers, features="mean", progress=False, **options)
    labels, matrix, _ = oracle.cka_of_model(model, batches, layers=layers, features=features)
    assert list(result.layers) == labels
    np.testing.assert_allclose(result.matrix.numpy(), matrix, rtol=0, atol=1e-6)
    return result


class LastInside(nn.Module):
    """As a block of ConvNeXt: works on (n, H, W, C) inside, and returns (n, C, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, hidden)
        self.down = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(self.up(y).relu()).permute(0, 3, 1, 2)


class Blocks(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.blocks = nn.ModuleList(LastInside(channels, 9) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("width", [4, 5, 6])
def test_blocks_that_work_channels_last_inside(width: int) -> None:
    # Width 4 is the number of channels.
    model, layers = Blocks(), ["blocks.0", "blocks.1"]
    with pytest.warns(
        cka_hooks.CKAWarning, match=r"channels of 'blocks.0' \(8, 4, 6, .\), 'blocks.1'.*channel_dim="
    ) as got:
        check(model, images(width=width), layers, over(2, 3))
    assert len(got) == 1
    named: list[Any] = [1, -3, {"blocks.*": 1}]
    for channel_dim in named:
        check(model, images(width=width), layers, over(2, 3), channel_dim=channel_dim)
    check(model, images(width=width), layers, over(1, 2), channel_dim=-1)


def test_parts_of_such_a_block_are_known() -> None:
    model = Blocks()
    check(model, images(), ["stem", "blocks.0.depthwise"], over(2, 3))
    check(model, images(), ["blocks.0.norm", "blocks.0.up", "blocks.1.down"], over(1, 2))


@pytest.mark.parametrize(
    "name", ["convnext_atto", "convnextv2_atto", "edgenext_xx_small", "swin_tiny_patch4_window7_224"]
)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **(options if "swin" in name else {})).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.rand(8, 3, 64, 64, generator=generator) * torch.rand(8, 3, 1, 1, generator=generator) for _ in range(2)
    ]
    layers = [f"{'layers' if 'swin' in name else 'stages'}.{i}" for i in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing says which dimension")
        check(model, batches, layers, over(1, 2) if "swin" in name else over(2, 3))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("maxvit_rmlp_pico_rw_256", ["stages.0", "stages.1.blocks.0.conv", "stages.1.blocks.1"]),
        ("maxxvit_rmlp_nano_rw_256", ["stages.0.blocks.0", "stages.1"]),
        ("gcvit_xxtiny", ["stages.0", "stages.1"]),
    ],
)
def test_blocks_of_timm_with_windows(name: str, layers: list[str]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=64).eval()
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(8, 3, 64, 64, generator=generator) * torch.rand(8, 3, 1, 1, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing says which dimension")
        check(model, [batch], layers, over(2, 3))


def test_convnext_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(
        num_channels=3, patch_size=2, hidden_sizes=[6, 10], depths=[1, 1], num_stages=2
    )
    model = transformers.ConvNextModel(config).eval()
    layers = ["encoder.stages.0.layers.0", "encoder.stages.1.layers.0", "embeddings.layernorm"]
    with pytest.warns(cka_hooks.CKAWarning, match="nothing says which dimension"):
        check(model, images(height=16, width=16), layers, over(2, 3))


class Wrapped(nn.Module):
    """Something without a kind of its own behind a layer that has one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


@pytest.mark.parametrize(
    ("inner", "shape", "dims"),
    [
        (nn.Conv2d(3, 7, 1), (3, 6, 5), (2, 3)),
        (nn.Sequential(nn.Conv2d(3, 7, 1), nn.GELU(), nn.MaxPool2d(2)), (3, 6, 4), (2, 3)),
        (nn.Linear(5, 7), (6, 4, 5), (1, 2)),
        (nn.Conv1d(3, 7, 1), (3, 6), (2,)),
        (nn.Linear(3, 7), (6, 3), (1,)),
        (nn.Conv3d(3, 7, 1), (3, 4, 5, 6), (2, 3, 4)),
    ],
    ids=["conv", "conv and pool", "linear on images", "conv1d", "linear", "conv3d"],
)
def test_what_stands_behind_a_known_layer(inner: nn.Module, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Its channels are where there are as many as the layer declares, and not as many elsewhere."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, *shape, generator=generator) for _ in range(3)]
    check(nn.Sequential(Wrapped(inner)), batches, ["0"], over(*dims))


@pytest.mark.parametrize("width", [5, 7])
def test_as_many_columns_as_channels_is_said(width: int) -> None:
    model = nn.Sequential(Wrapped(nn.Conv2d(3, 7, 1)), nn.ReLU())
    if width == 7:
        with pytest.warns(cka_hooks.CKAWarning, match="'0'"):
            check(model, images(width=width), ["0"], over(2, 3))
    else:
        check(model, images(width=width), ["0"], over(2, 3))
    # What torch's own layers return needs no counting.
    plain = nn.Sequential(nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7), nn.ReLU(), nn.Dropout(), nn.Identity())
    check(plain, images(height=7, width=7), [str(i) for i in range(5)], over(2, 3))


def test_signals_with_as_many_channels_as_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 7, generator=generator) for _ in range(3)]
    model = nn.Sequential(Wrapped(nn.Conv1d(3, 7, 1)))
    with pytest.warns(cka_hooks.CKAWarning, match=r"'0' \(8, 7, 7\).*tokens as \(n, T, C\)"):
        check(model, batches, ["0"], over(1))
    check(model, batches, ["0"], over(2), channel_dim=1)


class Patches(nn.Module):
    """Pools and patches whose input nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.unfold = nn.Unfold(2, stride=2)
        self.pool = nn.AvgPool1d(2)
        self.mix = nn.Linear(2, 4)
        self.over_features = nn.AvgPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.pool(self.unfold(x) * 2)
        return self.over_features(self.mix(patches[:, :, :2]))


def test_pools_and_patches_have_their_channels_in_front() -> None:
    check(Patches(), images(height=6, width=4), ["unfold", "pool"], over(2))
    # What is known of the input comes first.
    check(Patches(), images(height=6, width=4), ["mix", "over_features"], over(1))


class Folds(nn.Conv2d):
    """A convolution that returns (n, steps, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.stack([out, out.relu(), out * 2], 1)


def test_a_subclass_that_returns_five_dimensions_is_not_believed() -> None:
    model = nn.Sequential(Folds(3, 3, 1))
    with pytest.warns(cka_hooks.CKAWarning, match="'0'"):
        check(model, images(), ["0"], over(2, 3, 4))
    check(model, images(), ["0"], over(1, 3, 4), channel_dim={"0": 2})


def test_sequences_first() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.rnn(x.transpose(0, 1))[0] * 1)

    generator = torch.Generator().manual_seed(0)
    model, batches = First(), [torch.randn(8, 5, 3, generator=generator) for _ in range(2)]
    means = [torch.stack([model(x).mean(0) for x in batches])]
    for channel_dim in (None, 2):
        streamed = cka_hooks.LayerRecorder(model, features="mean", channel_dim=channel_dim).stream(batches)
        torch.testing.assert_close(torch.stack([seen["act"] for seen in streamed]), means[0])
    last = next(iter(cka_hooks.LayerRecorder(model, features="last", channel_dim=0).stream(batches)))["act"]
    torch.testing.assert_close(last, model(batches[0])[:, :, -1].T)


def test_dimensions_that_have_no_channels() -> None:
    for wrong in (0, 4, -5):
        with pytest.raises(cka_hooks.OptionError, match=f"channel_dim={wrong}: .* name another one"):
            cka_hooks.compare(Blocks(), images(), features="mean", channel_dim=wrong, progress=False)
    with pytest.raises(cka_hooks.OptionError, match="channel_dim= has the layer pattern 'none'"):
        cka_hooks.compare(Blocks(), images(), features="mean", channel_dim={"none": 1}, progress=False)


def test_nothing_is_said_where_channels_do_not_matter() -> None:
    layers = ["blocks.0", "blocks.1"]
    cka_hooks.compare(Blocks(), images(), layers=layers, progress=False)
    cka_hooks.compare(Blocks(), images(), layers=layers, features=lambda x: x.mean((2, 3)), progress=False)


def test_it_is_said_once_also_in_a_loop_of_ones_own() -> None:
    model, seen = Blocks().eval(), []
    recorder = cka_hooks.LayerRecorder(model, ["blocks.0"], lambda layer, x: seen.append(x.clone()), features="mean")
    with recorder, torch.no_grad():
        with pytest.warns(cka_hooks.CKAWarning, match="nothing says"):
            model(images()[0])
        # Warnings are errors in the tests.
        for x in images()[1:]:
            model(x)
    for x, found in zip(images(), seen, strict=True):
        torch.testing.assert_close(found, model.blocks[0](model.stem(x)).mean((2, 3)))


def test_a_later_pass_keeps_what_the_first_one_knew() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
    streamed = cka_hooks.LayerRecorder(model, features="mean").stream(
        [x for w in (5, 3, 5) for x in images(width=w, count=1)]
    )
    for width, seen in zip((5, 3, 5), streamed, strict=True):
        expected = model(images(width=width, count=1)[0]).mean((2, 3))
        torch.testing.assert_close(seen["1"], expected)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "offset"), [(torch.float32, 20, 3), (torch.bfloat16, 20, 3), (torch.float32, 64, 30)]
)
def test_averages_that_a_norm_subtracts_are_no_features(
    affine: bool, dtype: torch.dtype, size: int, offset: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 8, 3))
    if affine:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    batches = [torch.randn(16, 3, size, size) + offset for _ in range(2)]
    model, batches = model.to(dtype), [batch.to(dtype) for batch in batches]
    result = cka_hooks.compare(model, batches, features="mean", progress=False)
    assert result.layers == ("0", "2", "3")
    assert "it subtracts its averages, as an InstanceNorm does" in result.skipped["1"]
    assert cka_hooks.compare(model, batches, features={"1": "flatten", "**": "mean"}, progress=False).skipped == {}


def test_averages_beside_a_large_offset_are_features() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 8, 1))
    images = [torch.randn(16, 3, 64, 64) + 1000]
    result = cka_hooks.compare(model, images, features="mean", channel_dim=1, progress=False)
    assert result.layers == ("0", "1")
