"""Real architectures against the float64 oracle: every leaf layer, every pair, 1e-6."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torchvision.models as vision
from torch import Tensor, nn

import cka_hooks

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
Call = Callable[[nn.Module, Any], Any]


def images(samples: int = 6, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, 3, size, size, generator=generator) for _ in range(2)]


def tokens(samples: int = 8, length: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 50, (samples, length), generator=generator) for _ in range(2)]


def texts() -> list[dict[str, Tensor]]:
    lengths = torch.tensor([11, 9, 8, 7, 11, 5, 6, 11])
    mask = (torch.arange(11) < lengths[:, None]).long()
    return [{"input_ids": ids * mask, "attention_mask": mask} for ids in tokens()]


def check(model: nn.Module, batches: Sequence[Any], call: Call | None = None, **options: Any) -> cka_hooks.CKAResult:
    """The result, after it was found equal to the oracle's in labels, order, values and NaN."""
    model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*attention mask")
        result = cka_hooks.compare(model, batches, forward=call, progress=False, **options)
    labels, matrix, _ = oracle.cka_of_model(model, batches, call=call)
    assert list(result.layers) == labels
    np.testing.assert_allclose(result.matrix.numpy(), matrix, rtol=0, atol=1e-6)
    return result


def test_vision_transformer() -> None:
    model = vision.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    result = check(model, images())
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert attention in result.layers
    assert result.skipped[f"{attention}.out_proj"] == f"did not run: {attention!r} did its work without calling it"


@pytest.mark.parametrize(("build", "size"), [(vision.googlenet, 64), (vision.inception_v3, 75)])
def test_torchvision(build: Callable[..., nn.Module], size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = build(weights=None, init_weights=False)
    result = check(model, images(size=size))
    assert len([name for name in result.skipped if name.startswith(("aux", "AuxLogits"))]) >= 5


@pytest.mark.filterwarnings("ignore:.*meshgrid")
def test_detector_takes_a_list_of_images() -> None:
    """Four of them, as many as a box has coordinates."""
    model = vision.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    )
    stacked = images(samples=4)
    result = check(model, stacked, lambda model, batch: model(list(batch)))
    assert "roi_heads.box_predictor.bbox_pred" in result.skipped
    assert "windows" not in result.skipped["roi_heads.box_head.fc6"]
    assert "the batch size" in result.skipped["roi_heads.box_head.fc6"]
    lists = [(list(batch), [{"boxes": None}] * len(batch)) for batch in stacked]
    again = cka_hooks.compare(model, lists, progress=False)
    assert again.layers == result.layers
    assert torch.equal(again.matrix.nan_to_num(9), result.matrix.nan_to_num(9))


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = kind(16, 12, 2, batch_first=batch_first, bidirectional=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embed(ids)
        steps, _ = self.rnn(embedded if self.rnn.batch_first else embedded.transpose(0, 1))
        steps = self.head(self.drop(steps))
        return steps.mean(1 if self.rnn.batch_first else 0)


class EncoderDecoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_is_first = batch_first
        self.embed = nn.Embedding(50, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=batch_first)
        self.head = nn.Linear(16, 7)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embed(ids)
        source = embedded if self.batch_is_first else embedded.transpose(0, 1)
        return self.head(self.transformer(source, source * 0.5))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_classifier(kind: type[nn.RNNBase]) -> None:
    assert "rnn" in check(Recurrent(True, kind), tokens()).layers


def test_transformer() -> None:
    result = check(EncoderDecoder(True), tokens())
    assert len(result.layers) == 42


@pytest.mark.parametrize("build", [Recurrent, EncoderDecoder])
@pytest.mark.parametrize("length", [7, 16])
def test_sequence_first_is_batch_first_of_the_same_weights(build: type[nn.Module], length: int) -> None:
    first, second = build(True).eval(), build(False).eval()
    second.load_state_dict(first.state_dict())
    # The layers between two modules with batch_first=False see (T, n, d).
    expected = cka_hooks.compare(first, tokens(length=length), progress=False)
    result = cka_hooks.compare(second, tokens(length=length), progress=False)
    assert result.layers == expected.layers
    torch.testing.assert_close(result.matrix, expected.matrix, rtol=0, atol=2e-6, equal_nan=True)


def test_sequence_first_with_as_many_samples_as_steps() -> None:
    first, second = EncoderDecoder(True).eval(), EncoderDecoder(False).eval()
    second.load_state_dict(first.state_dict())
    square = tokens(8, 8)
    # The layers between two modules with batch_first=False see (T, n, d), and T is n: a probe tells.
    expected = cka_hooks.compare(first, square, progress=False)
    result = cka_hooks.compare(second, square, progress=False)
    assert result.layers == expected.layers
    torch.testing.assert_close(result.matrix, expected.matrix, rtol=0, atol=2e-6, equal_nan=True)


def bert(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        **options,
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_bert() -> None:
    result = check(bert(), texts())
    assert "the same for all samples" in result.skipped["bert.embeddings.position_embeddings"]


def test_gpt2() -> None:
    result = check(gpt2(), texts())
    assert "transformer.h.0.attn.c_attn" in result.layers
    assert "the same for all samples" in result.skipped["transformer.wpe"]


def test_t5() -> None:
    def both(model: nn.Module, batch: Any) -> Any:
        return model(**batch, decoder_input_ids=batch["input_ids"].flip(1))

    result = check(t5(), texts(), both)
    # One dropout module stands at the beginning and at the end of a stack.
    assert {"encoder.dropout", "encoder.dropout#2", "decoder.dropout#2", "lm_head"} <= set(result.layers)


def test_timm_with_windows_folded_into_the_batch() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        pretrained=False,
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
    )
    result = check(model, images())
    assert "16 windows, heads or beams of each are folded" in result.skipped["layers.0.blocks.0.attn.qkv"]
    # As many samples as a window has tokens: that dimension is not the samples.
    sixteen = cka_hooks.compare(model, images(samples=16), progress=False)
    assert "folded" in sixteen.skipped["layers.0.blocks.0.attn.qkv"]
    with pytest.raises(cka_hooks.LayerError, match=r'windows.*folded.*per="position"'):
        cka_hooks.compare(model, images(), layers="layers.0.blocks.0.attn.qkv", progress=False)
    advised = {"per": "position", "features": lambda rows: rows, "layers": "layers.0.blocks.0.attn.*"}
    assert cka_hooks.compare(model, images(), **advised, progress=False).layers


def test_as_many_samples_as_positions_leaves_position_embeddings_out() -> None:
    result = cka_hooks.compare(gpt2(), tokens(11, 11), progress=False)
    assert "transformer.wpe" in result.skipped
    assert "transformer.wte" in result.layers


def test_an_embedding_of_as_many_positions_as_samples() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(50, 8)
            self.positions = nn.Embedding(32, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    for length in (8, 11):
        result = cka_hooks.compare(Positions(), tokens(8, length), progress=False)
        assert result.layers == ("tokens",)
        assert "positions" in result.skipped
