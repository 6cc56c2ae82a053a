"""Which tensor of what a layer returned, or was given, is its activation."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import cka_hooks

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:a batch came twice")
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


class Returns(nn.Module):
    """A leaf that returns whatever the function makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function(x)


class Model(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.part = Returns(function)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.part(x)
        return self.fc(x)


@dataclasses.dataclass
class Pair:
    ids: Tensor
    states: Tensor
    more: dict[str, Any]


class Named(NamedTuple):
    first: Tensor
    second: Tensor


def recorded(
    model: nn.Module, *args: Any, layers: Any = None, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies of what one forward pass hands over, and what was left out."""
    seen: dict[str, Tensor] = {}
    recorder = cka_hooks.LayerRecorder(model, layers, lambda layer, tensor: seen.update({layer: tensor.clone()}))
    with recorder:
        model(*args, **kwargs)
    return seen, recorder.skipped


NESTED = {
    "tuple": lambda x: (x * 2, x * 3),
    "list": lambda x: [x * 2, x * 3],
    "named tuple": lambda x: Named(x * 2, x * 3),
    "dict": lambda x: {"a": x * 2, "b": x * 3},
    "dataclass": lambda x: Pair(x.long(), x * 2, {}),
    "integers first": lambda x: (x.long(), None, "text", [x.bool(), {"deep": x * 2}]),
}


@pytest.mark.parametrize("function", NESTED.values(), ids=NESTED)
def test_the_first_floating_tensor(function: Any) -> None:
    seen, skipped = recorded(Model(function), X)
    assert torch.equal(seen["part"], X * 2)
    assert not skipped


PATHS = {
    "part:1": (lambda x: (x * 2, x * 3), 3),
    "part:-1": (lambda x: (x * 2, x * 3), 3),
    "part:b": (lambda x: {"a": x * 2, "b": x * 3}, 3),
    "part:second": (lambda x: Named(x * 2, x * 3), 3),
    "part:states": (lambda x: Pair(x.long(), x * 2, {}), 2),
    "part:more:list:1": (lambda x: Pair(x, x, {"list": [x, x * 4]}), 4),
    "part:1:0": (lambda x: (x, (x * 5, x)), 5),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_part_by_path(path: str) -> None:
    function, factor = PATHS[path]
    seen, _ = recorded(Model(function), X, layers=[path, "fc"])
    assert list(seen) == [path, "fc"]
    assert torch.equal(seen[path], X * factor)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("part:2", r"no '2' \(of '2'\) in a tuple of 2"),
        ("part:0:c", r"no 'c' \(of '0:c'\) in a Tensor"),
        ("part:1:c", r"no 'c' .* in a dict with a, b"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, message: str) -> None:
    model = Model(lambda x: (x, {"a": x, "b": x}))
    with pytest.raises(cka_hooks.LayerError, match=message):
        recorded(model, X, layers=path)
    assert not model.part._forward_hooks


def test_lstm_and_attention_parts() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 4, 3, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            steps, _ = self.lstm(x)
            return self.attention(steps, steps, value=steps)[0]

    x = torch.randn(6, 7, 5)
    model = Both()
    parts = ["lstm", "lstm:0", "lstm:1:0", "lstm:1:1", "attention:0", "attention:1", "attention:input:1"]
    seen, _ = recorded(model, x, layers=[*parts, "attention:input:value", "lstm:input"])
    steps, (hidden, cell) = model.lstm(x)
    out, weights = model.attention(steps, steps, steps)
    expected = [steps, steps, hidden.transpose(0, 1), cell.transpose(0, 1), out, weights, steps, steps, x]
    for part, tensor in zip([*parts, "attention:input:value", "lstm:input"], expected, strict=True):
        torch.testing.assert_close(seen[part], tensor, msg=part)


@pytest.mark.parametrize("layers_of_states", [3, 6])
def test_hidden_states_have_the_samples_in_dimension_one(layers_of_states: int) -> None:
    model = nn.LSTM(5, 4, layers_of_states, batch_first=True)
    x = torch.randn(6, 7, 5)
    seen, _ = recorded(model, x, layers="(model):1:0")
    assert torch.equal(seen["(model):1:0"], model(x)[1][0].transpose(0, 1))


def test_attention_weights_of_sequence_first_attention() -> None:
    # As many samples as queries: the weights are (n, L, S) whatever batch_first says.
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(6, 6, 4).transpose(0, 1)
            return self.attention(x, x, x)[0]

    x = torch.randn(6, 24)
    model = Weights()
    seen, _ = recorded(model, x, layers=["attention:0", "attention:1"])
    tokens = x.reshape(6, 6, 4).transpose(0, 1)
    out, weights = model.attention(tokens, tokens, tokens)
    assert torch.equal(seen["attention:0"], out.transpose(0, 1))
    assert torch.equal(seen["attention:1"], weights)


def test_hugging_face_model_output() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 30, (6, 9))
    names = [
        "(model):last_hidden_state",
        "(model):pooler_output",
        "(model):hidden_states:1",
        "encoder:last_hidden_state",
    ]
    seen, _ = recorded(model, ids, layers=names, output_hidden_states=True)
    out = model(ids, output_hidden_states=True)
    for name, tensor in zip(
        names, [out.last_hidden_state, out.pooler_output, out.hidden_states[1], out.last_hidden_state], strict=True
    ):
        torch.testing.assert_close(seen[name], tensor)


def test_inputs_positional_and_by_keyword() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Returns(lambda x: x)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x, x * 2, scale=x * 3, nested={"deep": [x * 4]})

    names = ["fc:input", "fc:input:1", "fc:input:scale", "fc:input:nested:deep:0"]
    seen, _ = recorded(Model(), X, layers=names)
    assert [torch.equal(seen[name], X * factor) for name, factor in zip(names, (1, 2, 3, 4), strict=True)] == [
        True
    ] * 4
    with pytest.raises(cka_hooks.LayerError, match=r"no 'other' .* in a dict with 0, 1, scale, nested"):
        recorded(Model(), X, layers="fc:input:other")


def test_an_input_is_taken_before_the_layer_changes_it() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True))
    seen, _ = recorded(model, X, layers=["0", "1", "1:input"])
    assert torch.equal(seen["1:input"], seen["0"])
    assert not torch.equal(seen["1:input"], seen["1"])


def packed(x: Tensor) -> Any:
    return nn.utils.rnn.pack_padded_sequence(x[:, :, None], [5] * 6, batch_first=True)


LEFT_OUT = {
    "int64": (lambda x: x.long(), "int64"),
    "bool": (lambda x: x > 0, "bool"),
    "complex": (lambda x: torch.complex(x, x), "complex"),
    "sparse": (lambda x: x.to_sparse(), "sparse"),
    "csr": (lambda x: x.to_sparse_csr(), "sparse"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]), "nested"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
    "packed": (packed, "packed sequence: choose a layer after pad_packed_sequence"),
    "nothing": (lambda x: None, "nothing"),
    "text": (lambda x: "text", "a str"),
    "a number": (lambda x: x.sum(), "no dimension"),
    "other samples": (lambda x: x[:4], r"no dimension of \(4, 5\) has size 6, the batch size"),
    "two dimensions": (lambda x: torch.zeros(2, 6, 6), "no dimension"),
    "another tensor behind it": (lambda x: (x.sum(), x * 2), "no dimension"),
    "states behind a packed sequence": (lambda x: (packed(x), x), "packed sequence"),
    "weights behind a nested tensor": (lambda x: (torch.nested.nested_tensor([x[0], x[1, :2]]), x), "nested"),
    "windows": (lambda x: torch.zeros(12, 6), "2 windows, heads or beams"),
    "no samples": (lambda x: torch.zeros(1, 6), "the same for all samples"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize(("function", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_left_out_with_a_reason_unless_asked_for_by_name(function: Any, reason: str) -> None:
    for layers in (None, "**", "p*", nn.Module, [Returns, nn.Linear]):
        seen, skipped = recorded(Model(function), X, layers=layers)
        assert "part" not in seen
        assert re.search(reason, skipped["part"])
    with pytest.raises(cka_hooks.LayerError, match=f"layer 'part'.*cannot be recorded: .*{reason}"):
        recorded(Model(function), X, layers="part")


def test_the_result_lists_what_was_left_out() -> None:
    result = cka_hooks.compare(Model(lambda x: x.long()), [X, X], progress=False)
    assert result.layers == ("fc",)
    assert "int64" in result.skipped["part"]


def test_batch_dim_names_the_dimension() -> None:
    turned = Model(lambda x: x.repeat(2, 1)[None].transpose(0, 1).expand(12, 6, 5).contiguous())
    with pytest.raises(cka_hooks.LayerError, match="batch_dim="):
        recorded(turned, X, layers="part")
    seen: dict[str, Tensor] = {}
    recorder = cka_hooks.LayerRecorder(
        turned, "part", lambda layer, tensor: seen.update({layer: tensor}), batch_dim={"part": 1}
    )
    with recorder:
        turned(X)
    assert seen["part"].shape == (6, 12, 5)
    with (
        cka_hooks.LayerRecorder(turned, "part", print, batch_dim={"part": 2}),
        pytest.raises(cka_hooks.LayerError, match=r"batch_dim=2 of .* size 6, .*batch_dim=2 for all layers is that"),
    ):
        turned(X)
    with pytest.raises(cka_hooks.OptionError, match="matches no layer"):
        cka_hooks.LayerRecorder(turned, batch_dim={"nothing*": 1})


def test_the_one_dimension_of_that_size() -> None:
    seen, _ = recorded(Model(lambda x: x.T.contiguous()), X)
    assert torch.equal(seen["part"], X)


@pytest.mark.parametrize("first", [5, 6])
def test_a_square_batch_does_not_change_where_the_samples_are(first: int) -> None:
    model = Model(lambda x: x.T.contiguous())
    seen = []
    batches = [torch.randn(first, 5), torch.randn(11 - first, 5)]
    with cka_hooks.LayerRecorder(model, "part", lambda layer, tensor: seen.append(tensor)):
        for batch in batches:
            model(batch)
    assert all(torch.equal(tensor, batch) for tensor, batch in zip(seen, batches, strict=True))


def test_a_sequence_first_batch() -> None:
    lstm = nn.LSTM(5, 4)
    x = torch.randn(9, 6, 5)
    with pytest.raises(cka_hooks.BatchError, match=r"as 9 samples, and LSTM .*reads it as 6: pass batch_dim=1"):
        cka_hooks.compare(lstm, [x, x], layers="(model)", progress=False)
    result = cka_hooks.compare(lstm, [x, x], layers=["(model)", "(model):1:0"], batch_dim=1, progress=False)
    assert result.samples == 12
    expected = cka_hooks.cka(lstm(x)[0].transpose(0, 1), lstm(x)[1][0].transpose(0, 1))
    assert result["(model)", "(model):1:0"] == pytest.approx(expected, abs=1e-6)
