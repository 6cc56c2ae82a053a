"""Which dimension holds the samples: named, known, or confirmed by a probe. Matching sizes decide nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset

import cka_hooks

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:a batch came twice")
N = 6


def by_hand(model: nn.Module, batches: Sequence[Any], take: dict[str, Callable[[Any], Tensor]], call: Any) -> Any:
    """The oracle's CKA of what `take` makes (n, ...) of the output of each module; of its last call."""
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        return lambda module, args, output: seen.update({name: take[name](output).clone()})

    modules = dict(model.named_modules())
    handles = [modules[name.split(":")[0].split("#")[0]].register_forward_hook(hook_for(name)) for name in take]
    grams = []
    with torch.no_grad():
        for batch in batches:
            call(model.eval(), batch)
            grams.append([oracle.linear_gram(oracle.flatten(seen[name])) for name in take])
    for handle in handles:
        handle.remove()
    return oracle.cka_minibatch(grams)


def check(
    model: nn.Module,
    batches: Sequence[Any],
    take: dict[str, Callable[[Any], Tensor]],
    call: Any = lambda model, batch: model(batch),
    **options: Any,
) -> cka_hooks.CKAResult:
    """The result, after all its layers, and no others, were found in `take`, with the oracle's values."""
    result = cka_hooks.compare(model, batches, progress=False, **options)
    assert set(result.layers) == set(take)
    order = [list(take).index(layer) for layer in result.layers]
    expected = by_hand(model, batches, take, call)[order][:, order]
    np.testing.assert_allclose(result.matrix.numpy(), expected, rtol=0, atol=1e-6)
    return result


def same(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def second(x: Any) -> Tensor:
    return same(x).transpose(0, 1)


def data(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


# Sizes that coincide


class Experts(nn.Module):
    """A mixture of experts: each gets the tokens that the router sends to it."""

    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = x.flatten(0, 1)
        to = self.router(tokens).argmax(1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            out[to == i] = expert(tokens[to == i])
        return self.head(out.view_as(x))


@pytest.mark.parametrize("length", [3, 5])
def test_experts_as_wide_as_the_batch(length: int) -> None:
    # The router sees (n * T, width), experts the tokens that are theirs.
    result = check(Experts(N), data(N, length, 4), {"embed": same, "head": same})
    assert "router" in result.skipped
    assert {f"experts.{i}" for i in range(3)} <= set(result.skipped)


def test_an_expert_that_gets_as_many_tokens_as_samples() -> None:
    """In the first batch, and one less of one sample less: the tokens are other samples' all the same."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            # The first half of the samples has two tokens each, the second half none.
            chosen = x.flatten(0, 1)[: len(x)]
            self.expert(chosen)
            return self.head(x)

    result = check(Some(), data(N, 2, 4), {"head": same})
    assert "expert" in result.skipped


def test_position_biases_of_as_many_positions_as_samples() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5EncoderModel(config).eval()
    ids = [torch.randint(1, 50, (N, N), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    batches = [{"input_ids": x} for x in ids]
    result = cka_hooks.compare(model, batches, progress=False)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert bias in result.skipped
    labels, matrix, _ = oracle.cka_of_model(model, batches)
    assert list(result.layers) == labels
    assert bias not in labels
    np.testing.assert_allclose(result.matrix.numpy(), matrix, rtol=0, atol=1e-6)


def test_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(1, 50, (16, 2), generator=generator)} for _ in range(2)]
    result = cka_hooks.compare(model, batches, progress=False)
    labels, matrix, _ = oracle.cka_of_model(model, batches)
    assert list(result.layers) == [label for label in labels if "mlp" not in label]
    some = [labels.index(layer) for layer in result.layers]
    np.testing.assert_allclose(result.matrix.numpy(), matrix[some][:, some], rtol=0, atol=1e-6)


def test_an_adapter_that_is_run_on_the_identity() -> None:
    class Weighted(nn.Module):
        """As DoRA, which has its adapter's weights by running it on the identity."""

        def __init__(self) -> None:
            super().__init__()
            self.adapter = nn.Linear(N, 3, bias=False)
            self.base = nn.Linear(N, 3)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.adapter(torch.eye(N)).norm()
            return self.base(x) + self.adapter(x) / norm

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Weighted()
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.first(x))

    result = check(Two(), data(N, N), {"first.adapter#2": same, "first.base": same, "act": same})
    assert "first.adapter" in result.skipped


class Spiking(nn.Module):
    """Multi-step spiking layers on (T, n, C, H, W), with a membrane that is kept in an attribute."""

    def __init__(self, steps: int, channels: int) -> None:
        super().__init__()
        self.steps = steps
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.fire = Fire()
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 1.5, self.steps)[:, None, None, None, None]
        steps = x[None] * weights
        spikes = self.fire(self.conv(steps.flatten(0, 1)).unflatten(0, steps.shape[:2]))
        return self.act(spikes).mean(0)


class Fire(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.membrane: Any = 0.0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        out = []
        self.calls += 1
        self.membrane = torch.zeros_like(x[0]) if isinstance(self.membrane, float) else self.membrane
        for now in x:
            self.membrane.mul_(0.5).add_(now)
            out.append(torch.sigmoid(self.membrane))
        self.membrane = 0.0
        return torch.stack(out)


@pytest.mark.parametrize(("steps", "channels"), [(4, N), (N, 4), (N, N)])
def test_steps_and_channels_as_many_as_samples(steps: int, channels: int) -> None:
    take = {"fire": second, "act": second}
    result = check(Spiking(steps, channels), data(N, 3, 5, 5), take)
    assert "windows, heads or beams" in result.skipped["conv"]


class Packed(nn.Module):
    def __init__(self, layers: int, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 5)
        self.rnn = nn.LSTM(5, 7, layers, bidirectional=True, batch_first=batch_first)
        self.head = nn.Linear(14, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        first = self.rnn.batch_first
        x = self.embed(tokens)
        packed = pack_padded_sequence(x if first else x.transpose(0, 1), lengths, first, enforce_sorted=False)
        steps, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=first)
        return self.head(steps.mean(1 if first else 0))


@pytest.mark.filterwarnings("ignore:.*looks like the lengths")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_states_are_not_the_output_of_a_recurrent_layer(layers: int, batch_first: bool) -> None:
    # 8 samples: (layers * directions, n, d) is (8, 8, 7) for 4 layers.
    model = Packed(layers, batch_first)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):
        lengths = torch.tensor([6, 5, 2, 3, 6, 4, 1, 2])
        batches.append({"tokens": torch.randint(0, 20, (8, 6), generator=generator), "lengths": lengths})
    call = lambda model, batch: model(**batch)  # noqa: E731
    result = check(model, batches, {"embed": same, "head": same}, call)
    assert "pad_packed_sequence" in result.skipped["rnn"]
    hidden = lambda x: x[1][0].transpose(0, 1)  # noqa: E731
    cell = lambda x: x[1][1].transpose(0, 1)  # noqa: E731
    some = ["rnn:1:0", "rnn:1:1", "head"]
    check(model, batches, {"rnn:1:0": hidden, "rnn:1:1": cell, "head": same}, call, layers=some)
    with pytest.raises(cka_hooks.LayerError, match="packed sequence"):
        cka_hooks.compare(model, batches, layers="rnn", progress=False)


def test_a_packed_batch() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, packed: Any) -> Tensor:
            return self.head(self.rnn(packed)[1][-1])

    generator = torch.Generator().manual_seed(0)
    batches = [
        pack_sequence([torch.randn(n, 3, generator=generator) for n in (4, 2, 5, 1, 3, 3)], enforce_sorted=False)
        for _ in range(3)
    ]
    check(Takes(), batches, {"head": same})


# Batches that are lists, objects, graphs


class Stacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.mix = nn.Linear(16, 16)
        self.act = nn.ReLU()
        self.head = nn.Linear(16, 3)

    def forward(self, items: list[dict[str, Any]]) -> Tensor:
        x = torch.stack([item["input_ids"] for item in items])
        return self.head(self.act(self.mix(self.embed(x))).mean(1))


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)])
def test_a_list_of_dicts(forward: Any) -> None:
    # 12 texts of 16 tokens, 16 wide.
    generator = torch.Generator().manual_seed(0)
    batches = [
        [{"input_ids": torch.randint(0, 9, (16,), generator=generator), "label": 1} for _ in range(12)]
        for _ in range(3)
    ]
    take = dict.fromkeys(["embed", "mix", "act", "head"], same)
    result = check(Stacks(), batches, take, forward=forward)
    assert result.samples == 36


class Graphs:
    """A batch of graphs as PyTorch Geometric makes them, as far as it matters."""

    def __init__(self, graphs: list[Tensor]) -> None:
        self.x = torch.cat(graphs)
        self.batch = torch.repeat_interleave(torch.tensor([len(graph) for graph in graphs]))
        self.num_graphs = len(graphs)
        self.moved = False

    def __getitem__(self, index: int) -> Tensor:
        return self.x[self.batch == index]

    from_data_list = classmethod(lambda cls, graphs: cls(graphs))

    def to(self, device: torch.device) -> Graphs:
        self.moved = True
        return self


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.node = nn.Linear(3, 5)
        self.pool = Pool()
        self.head = nn.Linear(5, 2)

    def forward(self, data: Graphs) -> Tensor:
        assert data.moved
        return self.head(self.pool(self.node(data.x).relu(), data.batch, data.num_graphs))


class Pool(nn.Module):
    def forward(self, x: Tensor, batch: Tensor, graphs: int) -> Tensor:
        return torch.zeros(graphs, x.shape[1]).index_add(0, batch, x)


def test_a_batch_of_graphs_is_counted_by_graphs() -> None:
    generator = torch.Generator().manual_seed(0)
    # Twice as many nodes as graphs, and in the first batch as many nodes of the first graphs as there are graphs.
    batches = [
        Graphs([torch.randn(n, 3, generator=generator) for n in sizes])
        for sizes in ([1, 1, 1, 1, 1, 7], [2, 3, 1, 2, 2, 2])
    ]
    call = lambda model, batch: model(batch.to(torch.device("cpu")))  # noqa: E731
    result = check(GraphNet(), batches, {"pool": same, "head": same}, call)
    assert result.samples == 12
    advice = 'with per="position", features=lambda rows: rows'
    assert advice in result.skipped["node"]
    advised = {"per": "position", "features": lambda rows: rows, "layers": "node", "forward": call}
    nodes = cka_hooks.compare(GraphNet(), batches, **advised, progress=False)
    assert (nodes.layers, nodes.samples) == (("node",), 24)


def test_a_batch_whose_first_tensor_has_no_samples() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(10, 4), nn.Linear(4, 3)

        def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
            return self.last(self.bag(words, offsets))

    batches = [{"words": torch.randint(10, (20,)), "offsets": torch.tensor([0, 3, 5, 9, 12, 18])} for _ in range(2)]
    with pytest.raises(cka_hooks.LayerError, match="as with offsets: batch_dim=0, and layers="):
        cka_hooks.compare(Bags(), batches, progress=False)
    result = cka_hooks.compare(Bags(), batches, batch_dim=0, progress=False)
    assert (result.layers, result.samples) == (("bag", "last"), 12)


# Not per sample, and not reachable


def test_a_batch_of_fixed_size_inside_of_the_model() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inside(x.reshape(4, -1, 3)))

    check(Fixed(), data(4, 8, 3), {"inside": same, "head": same})


def test_similarities_of_all_samples_belong_to_two_of_them() -> None:
    class Similar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(3, 4)
            self.similarity = Similarity()

        def forward(self, x: Tensor) -> Tensor:
            return self.similarity(self.project(x))

    class Similarity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.T

    result = check(Similar(), data(N, 3), {"project": same})
    assert "no dimension alone followed the samples" in result.skipped["similarity"]
    with pytest.raises(cka_hooks.LayerError, match=r"similarity.*batch_dim="):
        cka_hooks.compare(Similar(), data(N, 3), layers="similarity", progress=False)
    named = cka_hooks.compare(Similar(), data(N, 3), layers="similarity", batch_dim={"similarity": 0}, progress=False)
    assert named.layers == ("similarity",)


def test_a_batch_that_cannot_be_cut() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(N, 3))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.position)

    with pytest.raises(cka_hooks.LayerError, match=r"'head'.*the model raised RuntimeError.*batch_dim="):
        cka_hooks.compare(Whole(), data(N, 3), progress=False)
    check(Whole(), data(N, 3), {"head": same}, batch_dim=0)


def test_a_layer_that_runs_later_than_the_probe() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always = nn.Linear(3, 2)
            self.later = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.always(x)
            return self.later(out) if x[0, 0] > 5 else out

    batches = data(N, 3)
    batches[1][:] += 10
    result = cka_hooks.compare(Later(), batches, progress=False)
    assert result.layers == ("always",)
    assert "not reached by the probe" in result.skipped["later"]


def test_random_numbers_leave_only_the_size() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Linear(5, 3)
            self.decode = nn.Linear(3, 5)
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            mean = self.mean(x)
            return self.act(self.decode(mean + torch.randn_like(mean)))

    result = cka_hooks.compare(Autoencoder(), data(N, 5), progress=False)
    assert result.layers == ("mean", "decode", "act")


@pytest.mark.parametrize("n", [5, N, 7, 300])
def test_a_model_that_shuffles_its_samples_inside(n: int) -> None:
    """As in momentum contrast: sizes follow, samples do not."""

    class Shuffles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 6)
            self.shuffled = nn.Linear(6, 6)
            self.last = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            order = torch.randperm(len(x))
            return self.last(self.shuffled(self.first(x)[order])[order.argsort()])

    for seed in range(8):
        torch.manual_seed(seed)
        result = cka_hooks.compare(Shuffles(), data(n, 5, count=4), progress=False)
        assert result.layers == ("first", "last")
        assert "another order than those of the batch" in result.skipped["shuffled"]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "halves": lambda x: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]]),
    "randperm": lambda x: x[torch.randperm(len(x))],
    "sort": lambda x: x[x.sum(1).argsort()],
}


@pytest.mark.parametrize(("n", "width"), [(4, 6), (5, 6), (N, 6), (9, 6), (N, 7000), (40, 7000)])
@pytest.mark.parametrize("kind", ["flip", "roll", "halves"])
def test_samples_in_an_order_that_no_random_number_makes(kind: str, n: int, width: int) -> None:
    """As in mixing samples, or in the negatives of a contrastive loss; of wide layers, some numbers are looked at."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(5, width), nn.LayerNorm(width)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x + self.other(CHANGES[kind](x))

    result = cka_hooks.compare(Mixes(), data(n, 5, count=4), layers=["first", "*"], progress=False)
    assert result.layers == ("first",)
    assert "no dimension alone followed the samples when their order changed" in result.skipped["other"]


class Two(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, first: nn.Module, between: Callable[[nn.Module, Tensor], Tensor], other: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.other = first, between, other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.between(self.first, x))


@pytest.mark.parametrize("kind", ["flip", "roll", "randperm", "sort"])
@pytest.mark.parametrize("n", [16, 128])
def test_samples_in_another_order_under_noise(kind: str, n: int) -> None:
    def noisy(first: nn.Module, x: Tensor) -> Tensor:
        return CHANGES[kind](first(x + 0.001 * torch.randn_like(x)))

    result = cka_hooks.compare(Two(nn.Linear(64, 64), noisy, nn.Linear(64, 64)), data(n, 64), progress=False)
    assert result.layers == ("first",)
    assert "another order than those of the batch" in result.skipped["other"]


def test_sorted_samples_beside_an_unrelated_random_number() -> None:
    def sorts(first: nn.Module, x: Tensor) -> Tensor:
        torch.rand(1)
        return first(x)[x.sum(1).argsort()]

    model = Two(nn.Linear(64, 64), sorts, nn.Linear(64, 64))
    assert cka_hooks.compare(model, data(N, 64, count=2), progress=False).layers == ("first",)


@pytest.mark.parametrize("padding", [0, 1])
def test_samples_that_are_sorted_by_length_with_ties(padding: int) -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Embedding(100, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            _, order = (ids != padding).sum(1).sort(descending=True, stable=True)
            return self.last(self.embed(ids[order]).mean(1)[order.argsort()])

    for seed in range(4):
        torch.manual_seed(seed)
        lengths = torch.randint(5, 50, (24,)).clamp(max=16)
        # Where the first, the last and the middle one are tied, sorting leaves them in place.
        lengths[[0, 8, 12, 23]] = 16
        ids = torch.randint(2, 100, (24, 16)).where(torch.arange(16) < lengths[:, None], padding)
        result = cka_hooks.compare(Sorts(), [ids], features="mean", progress=False)
        assert result.layers == ("last",)
        assert "no dimension alone followed" in result.skipped["embed"]


KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "domain": lambda x: x[:, 0] > 0,
    "one": lambda x: x[:, 0] >= x[:, 0].max(),
    "loudness": lambda x: x.square().sum(1),
}


@pytest.mark.parametrize(("n", "copies"), [(16, 1), (200, 1), (40, 5)])
@pytest.mark.parametrize("kind", KEYS)
def test_a_few_samples_may_be_in_the_order_of_all(kind: str, n: int, copies: int) -> None:
    """Of a few, all may be of one domain or of one expert; or one is so loud that the others look alike beside it."""

    class Groups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.grouped, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            order = KEYS[kind](x).to(x.dtype).argsort(stable=True)
            return self.last(self.grouped(self.first(x)[order])[order.argsort()])

    batches = data(n, 12)
    batches[0][n // 4, 0] = 9
    # The last, the first and the middle one run first.
    batches[0][[n - 1, 0, n // 2], 0] = torch.tensor([-1.0, -1.0, 1.0])
    batches[0][[n - 1, 0, n // 2]] *= torch.tensor([0.02, 0.03, 5.0])[:, None] if kind == "loudness" else 1
    # Such as images with several captions.
    batches[0] = batches[0].repeat_interleave(copies, 0)
    result = cka_hooks.compare(Groups(), batches, progress=False)
    assert result.layers == ("first", "last")
    assert "another order than those of the batch" in result.skipped["grouped"]


def test_samples_that_an_expert_has_no_room_for_are_alike() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.route, self.last = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 4)
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            made, of = torch.zeros_like(x), self.route(x).argmax(1)
            for number, expert in enumerate(self.experts):
                own = (of == number).nonzero().squeeze(1)[: -(-len(x) // 4)]
                made[own] = expert(x[own])
            return self.last(nn.functional.layer_norm(made, (32,)))

    for seed in range(4):
        torch.manual_seed(seed)
        model, batch = Experts(), torch.randn(256, 16)
        skipped = cka_hooks.compare(model, [batch], layers=["first", "route", "*"], progress=False).skipped
        assert not any("another order" in why for why in skipped.values())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_sorted_images_with_a_border(value: float) -> None:
    """Each number of an image is looked at, not only those of some columns."""

    def sorts(first: nn.Module, x: Tensor) -> Tensor:
        x = first(x)
        return x[x.mean((1, 2, 3)).argsort()]

    model = Two(nn.Conv2d(3, 16, 3, padding=1), sorts, nn.Conv2d(16, 16, 3, padding=1))
    images = torch.rand(16, 3, 64, 64)
    images[..., :4] = value
    assert cka_hooks.compare(model, [images], progress=False).layers == ("first",)


def test_noise_of_a_position_is_no_other_sample() -> None:
    """Where samples are black, or a ReLU leaves zeros, a slice may be equal to that of another one."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 16, 3, padding=1)
            self.act = nn.ReLU()
            self.last = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x + 0.7 * torch.randn_like(x))
            return self.last(self.act(x - 1.5).mean((2, 3)))

    for n in (8, 64, 300):
        batches = [torch.zeros(n, 1, 32, 32) for _ in range(3)]
        for batch in batches:
            batch[:, :, 12:20, 12:20] = torch.rand(n, 1, 8, 8)
        assert cka_hooks.compare(Noisy(), batches, progress=False).layers == ("first", "act", "last")


def test_a_layer_whose_samples_are_all_the_same() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 3)
            self.zero = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.zero(self.first(x).relu() * 0)

    result = cka_hooks.compare(Constant(), data(N, 5), progress=False)
    assert result.layers == ("first", "zero")
    assert list(result.degenerate) == ["zero"]


def test_not_a_number_in_some_samples() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 3)
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.first(x) * 1)

    batches = data(N, 5)
    batches[0][1, 2] = torch.nan
    with pytest.raises(cka_hooks.NonFiniteError, match="minibatch 0"):
        cka_hooks.compare(Some(), batches, progress=False)


# Contradictions


@pytest.mark.parametrize(
    "make", [lambda: nn.MultiheadAttention(4, 2), lambda: nn.GRU(4, 4)], ids=["attention", "gru"]
)
def test_samples_in_front_of_a_module_that_wants_them_second(make: Callable[[], nn.Module]) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 4)
            self.inside = make()

        def forward(self, x: Tensor) -> Any:
            x = self.embed(x)
            return self.inside(x, x, x) if isinstance(self.inside, nn.MultiheadAttention) else self.inside(x)

    # As many samples as steps, too.
    for length in (N, 7):
        with pytest.raises(cka_hooks.BatchError, match=r"'inside' with batch_first=False.*pass batch_dim=1"):
            cka_hooks.compare(Inside(), data(N, length, 3), layers="embed", progress=False)
        assert cka_hooks.compare(Inside(), data(N, length, 3), batch_dim=1, progress=False).samples == 3 * length


@pytest.mark.parametrize("length", [N, 7])
def test_a_dimension_that_no_module_explains(length: int) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.first(x.transpose(0, 1)))

    check(Turned(), data(N, length, 3), {"first": second, "act": second})


# What a probe leaves behind


class Keeps(nn.Module):
    """Keeps everything that a module can keep, in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4, momentum=0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("cache", None)
        self.register_buffer("filled", torch.zeros(4))
        self.calls = 0
        self.history: list[Tensor] = []
        self.sizes: dict[str, list[int]] = {"rows": [], "columns": []}
        self.kept = torch.zeros(4)
        self.known = {0}
        self.array = np.zeros(2)
        self.generator = torch.Generator().manual_seed(0)
        self.noise: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.cache = x.mean(0)
        self.filled.data.add_(1)
        self.history.append(x)
        self.sizes["rows"].append(len(x))
        self.sizes[f"call {self.calls}"] = []
        self.kept.mul_(2).add_(1)
        self.known.add(self.calls)
        self.array += 1
        self.new = len(x)
        self.noise = torch.rand(1, generator=self.generator), torch.rand(1), random.random(), np.random.rand()
        return self.norm(self.first(x) * 1)


def test_a_probe_leaves_no_trace() -> None:
    model = Keeps().train()
    state = copy.deepcopy(model.state_dict())
    generator = model.generator.get_state().clone()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = torch.rand(1), random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    recorder = cka_hooks.LayerRecorder(model, consumer=lambda layer, activation: None)
    lists = model.history, model.sizes, model.sizes["rows"], model.known, model.kept, model.array
    with recorder:
        recorder.confirm(data(N, 3)[0])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.cache is None
    assert (model.calls, model.history, model.known, model.noise) == (0, [], {0}, None)
    assert model.sizes == {"rows": [], "columns": []}
    assert not model.kept.any()
    assert not model.array.any()
    assert not hasattr(model, "new")
    now = model.history, model.sizes, model.sizes["rows"], model.known, model.kept, model.array
    assert all(one is other for one, other in zip(lists, now, strict=True))
    assert torch.equal(model.generator.get_state(), generator)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert recorder.sample_axes == {}


def test_a_stateful_model_is_compared_as_if_there_were_no_probe() -> None:
    class Stateful(nn.Module):
        """A recurrent state of the batch's size that is carried from batch to batch."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.act = nn.Tanh()
            self.state: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            self.state = x if self.state is None else self.state * 0.5 + x
            return self.act(self.state * 1)

    probed, named = Stateful(), Stateful()
    named.load_state_dict(probed.state_dict())
    results = [
        cka_hooks.compare(model, data(N, 3), batch_dim=dim, progress=False)
        for model, dim in ((probed, None), (named, 0))
    ]
    assert torch.equal(results[0].matrix, results[1].matrix)


def test_the_probe_of_one_recorder_is_nothing_to_another() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.second = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + 1)

    model, seen = Plus(), {"one": [], "other": []}
    recorders = [
        cka_hooks.LayerRecorder(model, consumer=lambda layer, x, who=who: seen[who].append((layer, len(x))))
        for who in seen
    ]
    with recorders[0], recorders[1]:
        for batch in data(N, 3):
            model(batch)
    assert seen["one"] == seen["other"] == [("first", N), ("second", N)] * 3


# In a loop of one's own


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def test_own_loop() -> None:
    model, seen = Residual(), {}
    recorder = cka_hooks.LayerRecorder(model, consumer=lambda layer, x: seen.update({layer: x.clone()}))
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append((len(output), output.requires_grad)))
    with recorder:
        for batch in data(N, 3):
            model(batch).sum().backward()
    # A few samples, one less, and then the user's own.
    assert passes == [(3, False), (2, False), *[(N, True)] * 3]
    assert list(seen) == ["first", "second"]
    assert recorder.sample_axes == {"first": "confirmed by a probe", "second": "confirmed by a probe"}


def test_parts_of_a_model_need_a_name_for_the_dimension() -> None:
    model, seen = Residual(), {}
    consumer = lambda layer, x: seen.update({layer: x})  # noqa: E731
    batch = data(N, 3)[0]
    recorder = cka_hooks.LayerRecorder(model, consumer=consumer)
    with recorder, recorder.forward_pass(batch):
        model.first(batch)
    assert not seen
    assert "batch_dim=" in recorder.skipped["first"]
    with (
        cka_hooks.LayerRecorder(model, "first", consumer) as named,
        named.forward_pass(batch),
        pytest.raises(cka_hooks.LayerError, match=r"only parts of the model.*compare\(\).*batch_dim="),
    ):
        model.first(batch)
    recorder = cka_hooks.LayerRecorder(model, consumer=consumer, batch_dim=0)
    with recorder, recorder.forward_pass(batch):
        model.first(batch)
    assert list(seen) == ["first"]
    assert recorder.sample_axes == {"first": "named"}


def test_samples_without_a_batch_dimension_in_a_loop_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    seen = []
    recorder = cka_hooks.LayerRecorder(model, consumer=lambda layer, x: seen.append(layer))
    with recorder:
        for vector in data(16):
            model(vector)
    assert not seen
    assert set(recorder.skipped) == {"0", "1", "2"}


# What needs no probe


def test_modules_of_known_kinds_run_once_for_each_batch() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    recorder = cka_hooks.LayerRecorder(model)
    assert len(list(recorder.stream(data(N, 3, 6, 6)))) == 3
    assert passes == [N] * 3
    assert recorder.sample_axes == dict.fromkeys(map(str, range(6)), "known")


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
        nn.Sequential(nn.Flatten(0), nn.Identity()),
        nn.Sequential(nn.Linear(5, 5), nn.GLU(0)),
    ],
    ids=["one image", "flattened samples", "halves"],
)
def test_what_is_not_known(model: nn.Module) -> None:
    # (4, 5, 5) is one image of four channels to a convolution.
    with pytest.raises(cka_hooks.LayerError, match="none of the chosen layers"):
        cka_hooks.compare(model[1:] if isinstance(model[1], nn.GLU) else model, data(4, 5, 5), progress=False)


@pytest.mark.parametrize("plain", [True, False])
def test_a_later_batch_without_a_batch_dimension(plain: bool) -> None:
    """As ``squeeze`` makes it of one sample, whose 4 channels are then in dimension 0."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    if not plain:
        net.forward = lambda x: net[1](net[0](x))  # type: ignore[method-assign]
    batches = data(N, 4, 8, 8)
    expected = cka_hooks.compare(net, batches, progress=False)
    with pytest.raises(cka_hooks.LayerError, match="3 dimensions in a batch and 4 in the first:"):
        cka_hooks.compare(net, [*batches, batches[0][0]], progress=False)
    assert expected.samples == 3 * N


@pytest.mark.parametrize("samples", [1, 2])
def test_a_first_batch_of_one_or_two_samples(samples: int) -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean(2))

    batches = [data(samples, 1, 6, count=1)[0], *data(N, 1, 6)]
    streamed = list(cka_hooks.LayerRecorder(Squeezes()).stream(batches))
    assert [len(activations["head"]) for activations in streamed] == [samples, N, N, N]
    assert list(streamed[0]) == ["conv", "head"]


# Loaders that are none


def loaders() -> dict[str, tuple[Any, str]]:
    vectors = TensorDataset(torch.randn(64, 16), torch.arange(64) % 3)
    return {
        "data set": (vectors, r"TensorDataset.*DataLoader\(dataset, batch_size="),
        "subset": (Subset(vectors, range(8)), r"DataLoader\(dataset, batch_size="),
        "sampler": (RandomSampler(vectors), r"DataLoader\(dataset, sampler=sampler\)"),
        "batch sampler": (BatchSampler(RandomSampler(vectors), 4, False), r"batch_sampler=sampler\)"),
        "tensor": (torch.randn(64, 16), r"\[tensor\] for one batch"),
        "array": (np.zeros((64, 16)), r"\[tensor\] for one batch"),
        "pair": ((torch.randn(64, 16), torch.arange(64)), r"one batch: pass \[batch\]"),
        "mapping": ({"x": torch.randn(64, 16)}, r"one batch: pass \[batch\]"),
        "function": (lambda: [torch.randn(64, 16)], "not iterable"),
        "text": ("loader", "not iterable"),
    }


@pytest.mark.parametrize("kind", loaders())
def test_what_is_no_loader(kind: str) -> None:
    loader, message = loaders()[kind]
    model = Residual()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(cka_hooks.OptionError, match=message):
        cka_hooks.compare(model, loader, progress=False)


def test_two_tensors_are_two_batches() -> None:
    loader = tuple(data(N, 3, count=2))
    assert cka_hooks.compare(Residual(), loader, progress=False).minibatches == 2
    assert cka_hooks.compare(Residual(), DataLoader(torch.cat(loader), N), progress=False).minibatches == 2


def test_a_module_with_batch_first_false_is_checked_if_it_is_called_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.attention(query=x, key=x, value=x)[0]

    with pytest.raises(cka_hooks.BatchError, match="batch_first=False reads it as 10"):
        cka_hooks.compare(Net(), [torch.randn(12, 10, 5)], progress=False)


def test_a_layer_that_returns_one_number_a_sample_is_a_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.flat = nn.Linear(5, 8), nn.Linear(8, 1), nn.Flatten(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(self.b(self.a(x)))

    result = cka_hooks.compare(Net(), [torch.randn(16, 5)], progress=False)
    assert (result.layers, result.skipped) == (("a", "b", "flat"), {})


def test_a_batch_may_hold_tensors_without_numbers() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            return self.first(x) + 1

    for extra in (torch.zeros(N, 0), torch.zeros(N, 3, dtype=torch.float8_e4m3fn)):
        batch = {"x": torch.randn(N, 4), "extra": extra}
        assert cka_hooks.compare(Takes(), [batch], progress=False).layers == ("first",)
