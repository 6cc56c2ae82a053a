"""One activation to one row of features a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as vision
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import bert, gpt2, t5
from torch import Tensor, nn

import cka_hooks
from cka_hooks.features import feature_rows, memory_order

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:a batch came twice")
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(6, 7, 5, generator=GENERATOR)
IMAGES = torch.randn(6, 5, 3, 4, generator=GENERATOR)


def rows(activation: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    masks = [] if mask is None else [(mask, range(activation.ndim))]
    return feature_rows(activation, *args, masks=masks, **kwargs).flatten(1)


def test_each_reduction() -> None:
    torch.testing.assert_close(rows(TOKENS, "mean"), TOKENS.mean(1))
    assert torch.equal(rows(TOKENS, "token"), TOKENS[:, 0])
    assert torch.equal(rows(TOKENS, "token:3"), TOKENS[:, 3])
    assert torch.equal(rows(TOKENS, "token:-2"), TOKENS[:, -2])
    assert torch.equal(rows(TOKENS, "last"), TOKENS[:, -1])
    assert torch.equal(rows(TOKENS, lambda x: x[:, :2, 0]), TOKENS[:, :2, 0])
    assert torch.equal(rows(TOKENS, "flatten"), TOKENS.flatten(1))
    torch.testing.assert_close(rows(IMAGES, "mean"), IMAGES.mean((2, 3)))
    torch.testing.assert_close(rows(IMAGES, "mean", channels="last"), IMAGES.mean((1, 2)))
    assert torch.equal(rows(IMAGES, "token:5"), IMAGES[:, :, 1, 1])
    vectors = TOKENS[:, 0]
    for reduction in ("mean", "token", "token:3", "last"):
        assert torch.equal(rows(vectors, reduction), vectors)


def test_masked_reductions() -> None:
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[0, 4:] = 0
    mask[1, :3] = 0
    padded = torch.where(mask[..., None] == 0, torch.nan, TOKENS)
    expected = torch.stack([x[m == 1].mean(0) for x, m in zip(TOKENS, mask, strict=True)])
    torch.testing.assert_close(rows(padded, "mean", mask=mask), expected)
    last = torch.stack([x[m == 1][-1] for x, m in zip(TOKENS, mask, strict=True)])
    assert torch.equal(rows(padded, "last", mask=mask), last)
    # Attention scores (n, heads, T, T) have padding in two dimensions.
    scores = torch.randn(6, 2, 7, 7)
    both = mask[:, None, :, None] * mask[:, None, None, :]
    torch.testing.assert_close(rows(scores, "mean", mask=mask), (scores * both).sum((2, 3)) / both.sum((2, 3)))
    # A layer with other positions than the mask's has no padding that could be known.
    torch.testing.assert_close(rows(TOKENS[:, :4], "mean", mask=mask), TOKENS[:, :4].mean(1))


def test_means_of_half_precision_do_not_overflow() -> None:
    activation = torch.full((4, 100, 3), 6e4, dtype=torch.float16)
    assert torch.equal(rows(activation, "mean"), torch.full((4, 3), float(activation[0, 0, 0])))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.permutations(range(5)),
    stride=st.integers(1, 2),
)
def test_flattening_in_memory_order_keeps_gram_matrices(shape: list[int], order: list[int], stride: int) -> None:
    dims = [dim for dim in order if dim < len(shape)]
    x = torch.randn([size * stride for size in shape], dtype=torch.float64).permute(dims)
    x = x[tuple(slice(None, None, stride) for _ in dims)]
    if x.ndim == 0:
        return
    found = memory_order(x).flatten(1)
    flat = x.reshape(len(x), -1)
    torch.testing.assert_close(found @ found.T, flat @ flat.T)


def test_memory_order_is_a_view_where_it_can_be() -> None:
    for x in (IMAGES, IMAGES.contiguous(memory_format=torch.channels_last), TOKENS.transpose(0, 1), TOKENS[:, 1:]):
        assert memory_order(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("features", ["median", "token:", "token:x", 3, None, ("mean",)])
def test_no_reduction(features: Any) -> None:
    for take in (lambda f: cka_hooks.LayerRecorder(nn.Identity(), features=f), lambda f: feature_rows(TOKENS, f)):
        with pytest.raises(cka_hooks.OptionError, match="is not a reduction: use one of"):
            take(features)


def test_errors_of_single_activations() -> None:
    with pytest.raises(cka_hooks.OptionError, match=r"features=.* has 7 positions"):
        feature_rows(TOKENS, "token:7")
    with pytest.raises(cka_hooks.BatchError, match=r"turned \(6, 7, 5\) into \(5,\)"):
        feature_rows(TOKENS, lambda x: x.mean((0, 1)))
    with pytest.raises(cka_hooks.OptionError, match="'layer9', which matches no layer"):
        cka_hooks.LayerRecorder(nn.Sequential(nn.Identity()), features={"layer9": "mean"})


def test_a_mapping_from_layer_to_reduction() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    shapes: dict[str, tuple[int, ...]] = {}
    features = {"1": "token:2", "[01]": "mean"}
    consumer: Callable[[str, Tensor], None] = lambda layer, x: shapes.update({layer: tuple(x.shape)})  # noqa: E731
    with cka_hooks.LayerRecorder(model, consumer=consumer, features=features):
        model(TOKENS)
    assert shapes == {"0": (6, 4), "1": (6, 3), "2": (6, 7, 2)}


# Channels first and last


def recorded(model: nn.Module, x: Tensor, layers: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means as the recorder takes them, and whole activations."""
    means = next(iter(cka_hooks.LayerRecorder(model, layers, features="mean").stream([x])))
    whole = next(iter(cka_hooks.LayerRecorder(model, layers).stream([x])))
    return means, whole


@pytest.mark.parametrize("layers", [None, ["features.1.0.mlp.1", "features.0.0"]])
def test_swin_has_its_channels_last(layers: Any) -> None:
    model = vision.swin_t(weights=None)
    means, whole = recorded(model, torch.randn(2, 3, 64, 64, generator=GENERATOR), layers)
    torch.testing.assert_close(means["features.0.0"], whole["features.0.0"].mean((2, 3)))
    # A GELU has no channels of its own: the linear layer before it tells, chosen or not.
    torch.testing.assert_close(means["features.1.0.mlp.1"], whole["features.1.0.mlp.1"].mean((1, 2)))


def test_convnext_permutes_back_and_forth() -> None:
    model = vision.ConvNeXt([vision.convnext.CNBlockConfig(8, 16, 1), vision.convnext.CNBlockConfig(16, None, 1)])
    means, whole = recorded(model, torch.randn(2, 3, 48, 48, generator=GENERATOR))
    first = [name for name in means if name.endswith(("block.0", "features.0.0", "features.0.1", "2.0", "2.1"))]
    last = [name for name in means if name.endswith(("block.2", "block.3", "block.4", "block.5"))]
    assert len(first) >= 6
    assert len(last) == 8
    for name in first:
        torch.testing.assert_close(means[name], whole[name].mean((2, 3)))
    for name in last:
        torch.testing.assert_close(means[name], whole[name].mean((1, 2)))


def test_signals_and_tokens_of_three_dimensions() -> None:
    class Signals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 6, 3)
            self.norm = nn.BatchNorm1d(6)
            self.act = nn.ReLU()
            self.linear = nn.Linear(6, 4)
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.linear(self.act(self.norm(self.conv(x))).mT))

    means, whole = recorded(Signals(), torch.randn(5, 2, 9))
    for name in ("conv", "norm", "act"):
        torch.testing.assert_close(means[name], whole[name].mean(2))
    for name in ("linear", "drop"):
        torch.testing.assert_close(means[name], whole[name].mean(1))


def test_the_convolution_in_front_of_tokens_does_not_make_them_channels_first() -> None:
    model = vision.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    means, whole = recorded(model, torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(means["encoder.dropout"], whole["encoder.dropout"].mean(1))
    torch.testing.assert_close(means["conv_proj"], whole["conv_proj"].mean((2, 3)))


# Padding


def text(length: int, side: str = "right") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([11, 9, 8, 7, 11, 5, 6, 11, 4, 10])
    ids = torch.randint(1, 50, (10, 11), generator=generator)
    batch = {"input_ids": torch.zeros(10, length, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros(10, length, dtype=torch.long)
    for i, n in enumerate(lengths):
        where = slice(0, int(n)) if side == "right" else slice(length - int(n), length)
        batch["input_ids"][i, where] = ids[i, :n]
        batch["attention_mask"][i, where] = 1
    return batch


@pytest.mark.parametrize("features", ["mean", "last"])
# Of attention weights, which older releases of transformers drop out in a module of its own.
@pytest.mark.filterwarnings("ignore:nothing says which dimension has the channels")
@pytest.mark.parametrize("name", ["bert", "bert eager", "gpt2"])
def test_padding_further_changes_nothing(name: str, features: str) -> None:
    model = {"bert": bert, "bert eager": lambda: bert(attn_implementation="eager"), "gpt2": gpt2}[name]()
    results = [cka_hooks.compare(model, [text(length)], features=features, progress=False) for length in (11, 12, 19)]
    for result in results[1:]:
        assert result.layers == results[0].layers
        torch.testing.assert_close(result.matrix, results[0].matrix, rtol=0, atol=1e-6, equal_nan=True)
    flat = [cka_hooks.compare(model, [text(11 + i)], features={"**": "mean"}, progress=False) for i in (0, 5)]
    torch.testing.assert_close(flat[0].matrix, flat[1].matrix, rtol=0, atol=1e-6, equal_nan=True)


def test_each_side_of_an_encoder_decoder_has_its_mask() -> None:
    def batch(encoder: int, decoder: int) -> dict[str, Tensor]:
        target = text(decoder)
        return {
            **text(encoder),
            "decoder_input_ids": target["input_ids"].flip(0),
            "decoder_attention_mask": target["attention_mask"].flip(0),
        }

    model = t5()
    layers = ["**.SelfAttention.o", "**.final_layer_norm", "decoder.**.wo"]
    results = [
        cka_hooks.compare(model, [batch(*lengths)], layers=layers, features="mean", progress=False)
        for lengths in ((11, 13), (17, 13), (11, 15))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result.matrix, results[0].matrix, rtol=0, atol=1e-6)


def test_left_padding_and_the_last_token() -> None:
    model = bert()
    recorder = cka_hooks.LayerRecorder(model, "bert.embeddings.word_embeddings", features="last")
    right, left = (next(iter(recorder.stream([text(15, side)]))) for side in ("right", "left"))
    assert torch.equal(*(seen["bert.embeddings.word_embeddings"] for seen in (right, left)))


def ignored(layer: str, activation: Tensor) -> None:
    pass


def test_flatten_warns_once_of_padding() -> None:
    model = bert()
    with pytest.warns(cka_hooks.CKAWarning, match="attention mask has zeros") as caught:
        cka_hooks.compare(model, [text(11)] * 3, progress=False)
    assert len([w for w in caught if "attention mask" in str(w.message)]) == 1
    whole = {"input_ids": text(11)["input_ids"], "attention_mask": torch.ones(10, 11, dtype=torch.long)}
    cka_hooks.compare(model, [whole], progress=False)
    # Layers without tokens have no padding in them.
    cka_hooks.compare(model, [text(11)], layers=["bert.pooler.**", "classifier"], progress=False)
    with pytest.warns(cka_hooks.CKAWarning, match="attention mask"), cka_hooks.LayerRecorder(model, None, ignored):
        model(**text(11))
