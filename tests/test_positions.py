"""Tokens and pixels as samples: the same positions of every layer, without padding, against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks import CKAAccumulator, Comparison, LayerRecorder, OptionError

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:.* left out")

WORDS, LENGTH, WIDTH = 30, 10, 8


class Language(nn.Module):
    """Embeds, and two blocks over the tokens; a classifier of the first token at the end."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)])
        self.head = nn.Linear(5, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x[:, 0])


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 7, 2, stride=2)
        self.up = nn.ConvTranspose2d(7, 5, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.first(x).relu()))


def texts(batches: int = 6, size: int = 4, *, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(batches):
        batch = {"input_ids": torch.randint(WORDS, (size, LENGTH), generator=generator)}
        if padded:
            lengths = torch.randint(4, LENGTH + 1, (size, 1), generator=generator)
            batch["attention_mask"] = (torch.arange(LENGTH) < lengths).long()
        found.append(batch)
    return found


def drawn(total: int, count: int, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(total, generator=generator)[:count].sort().values


def expected(batches: list[dict[str, Tensor]], count: int | None = None, seed: int = 0) -> Tensor:
    """The matrix of embedding and both blocks, each batch one minibatch of tokens that are no padding, in float64."""
    model = Language().double()
    grams = []
    for number, batch in enumerate(batches):
        with torch.no_grad():
            x = model.embed(batch["input_ids"])
            layers = [x, (first := model.blocks[0](x)), model.blocks[1](first.tanh())]
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows = [layer[kept] for layer in layers]
        if count is not None and count < len(rows[0]):
            rows = [layer[drawn(len(layer), count, seed, number)] for layer in rows]
        grams.append([oracle.linear_gram(oracle.flatten(layer)) for layer in rows])
    return torch.from_numpy(oracle.cka_minibatch(grams))


def compare(model: Any, batches: Any, **options: Any) -> cka_hooks.CKAResult:
    return cka_hooks.compare(model, batches, **{"per": "position", "progress": False, **options})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("count", "seed"), [(None, 0), (20, 0), (20, 3), (1000, 0)])
def test_tokens_that_are_no_padding(padded: bool, count: int | None, seed: int) -> None:
    batches = texts(padded=padded)
    result = compare(Language(), batches, positions=count, seed=seed)
    assert result.layers == ("embed", "blocks.0", "blocks.1")
    torch.testing.assert_close(result.matrix, expected(batches, count, seed), rtol=0, atol=1e-6)
    tokens = sum(int(batch.get("attention_mask", torch.ones(4, LENGTH)).sum()) for batch in batches)
    assert (result.samples, result.minibatches) == (20 * 6 if count == 20 else tokens, 6)
    assert (result.settings["per"], result.settings["positions"]) == ("position", count)


def test_a_layer_without_positions_is_left_out_with_the_reason() -> None:
    result = compare(Language(), texts(), layers=["embed", "blocks.*", "head"])
    assert "head" not in result.layers
    assert result.skipped["head"] == 'has no positions, and per="position" compares these'


def test_a_layer_with_a_mask_that_the_first_one_does_not_have_is_left_out_with_the_reason() -> None:
    mask = {"embed": None, "blocks.0": lambda batch: batch["attention_mask"]}
    result = compare(Language(), texts(padded=True), layers=["embed", "blocks.*"], mask=mask)
    assert result.layers == ("embed",)
    reason = "has a mask of padding that 'embed' does not have: mask= names it for both"
    assert result.skipped == dict.fromkeys(("blocks.0", "blocks.1"), reason)


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("count", [None, 50])
def test_pixels_at_one_resolution(channels_last: bool, count: int | None) -> None:
    model, x = Pixels(), images()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    result = compare(model, list(x.split(6)), positions=count)
    assert result.layers == ("first", "up")
    assert result.skipped["down"].startswith("has other positions than 'first', (4, 4) against (8, 8) in each sample")
    wide = Pixels().double()
    grams = []
    for number, batch in enumerate(images().double().split(6)):
        with torch.no_grad():
            first = wide.first(batch)
            layers = [y.movedim(1, -1).flatten(0, 2) for y in (first, wide.up(wide.down(first.relu())))]
        if count is not None:
            layers = [y[drawn(len(y), count, 0, number)] for y in layers]
        grams.append([oracle.linear_gram(oracle.flatten(y)) for y in layers])
    torch.testing.assert_close(result.matrix, torch.from_numpy(oracle.cka_minibatch(grams)), rtol=0, atol=1e-6)


def test_two_models_have_the_same_positions() -> None:
    """The same draw for both, and layers with other positions than those of the first model are left out."""
    batches = texts(padded=True)
    result = compare({"a": Language(), "b": Language()}, batches, positions=20)
    torch.testing.assert_close(result.between("a", "b").matrix, expected(batches, 20), rtol=0, atol=1e-6)
    turn = compare({"a": lambda: Language(), "b": Language()}, batches, positions=20)
    torch.testing.assert_close(turn.matrix, result.matrix, rtol=0, atol=1e-12)
    with pytest.raises(cka_hooks.LayerError, match=r"of the model 'b' .* has other positions than 'embed'"):
        compare({"a": Language(), "b": Shorter()}, texts(), positions=20)
    with pytest.raises(cka_hooks.SampleCountError, match="layers of the model 'b' have other positions than those"):
        compare({"a": Language(), "b": lambda: Shorter()}, texts(), positions=20)


class Shorter(Language):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids[:, 1:])


def test_there_are_no_p_values_and_the_result_says_why(tmp_path: Path) -> None:
    result = compare(Language(), texts())
    assert "positions of one input depend on one another" in str(result.null_unknown)
    with pytest.warns(cka_hooks.CKAWarning, match="positions of one input depend"):
        assert result.pvalue().isnan().all()
    result.save(tmp_path / "cka.json")
    assert cka_hooks.CKAResult.load(tmp_path / "cka.json").null_unknown == result.null_unknown
    assert compare(Language(), texts(), per="sample", features="mean", layers=["blocks.*"]).null_unknown is None


def test_batches_are_whole_minibatches() -> None:
    """More than 128 positions are not split: a part of an input would be no minibatch of its own."""
    result = compare(Language(), texts(size=40), layers=["blocks.*"])
    assert (result.samples, result.minibatches) == (2400, 6)
    assert result.settings["minibatch"] is None


@pytest.mark.parametrize("epochs", [1, 2])
def test_bounds_count_what_the_loader_brings(epochs: int) -> None:
    batches = texts()
    result = compare(Language(), batches, max_samples=10, epochs=epochs)
    if epochs == 1:
        cut = [*batches[:2], {key: value[:2] for key, value in batches[2].items()}]
        torch.testing.assert_close(result.matrix, expected(cut), rtol=0, atol=1e-6)
    assert (result.samples, result.minibatches) == (10 * LENGTH, 3 * epochs)


def test_a_mask_is_cut_with_its_batch() -> None:
    batches = texts(padded=True)
    result = compare(Language(), batches, max_samples=10)
    cut = [*batches[:2], {key: value[:2] for key, value in batches[2].items()}]
    torch.testing.assert_close(result.matrix, expected(cut), rtol=0, atol=1e-6)


class Stop(Exception):
    pass


class Forward:
    def __init__(self, stop_at: int | None) -> None:
        self.left = stop_at

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        if len(batch["input_ids"]) == 4 and self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Stop
        return model(**batch)


def test_resumed_with_the_same_draws(tmp_path: Path) -> None:
    def run(path: Path | None, stop_at: int | None = None) -> cka_hooks.CKAResult:
        loader = DataLoader(
            [{key: value[0] for key, value in batch.items()} for batch in texts(24, 1, padded=True)],
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        return compare(Language(), loader, positions=12, epochs=2, checkpoint=path, forward=Forward(stop_at))

    path = tmp_path / "run.ckpt"
    for stop_at in (5, 6):
        with pytest.raises(Stop):
            run(path, stop_at)
    ours, whole = run(path), run(None)
    assert torch.equal(ours.matrix, whole.matrix)
    assert (ours.samples, ours.minibatches) == (whole.samples, whole.minibatches) == (72, 12)


def test_a_loop_of_ones_own() -> None:
    batches = texts(padded=True)
    with Comparison(Language(), per="position", positions=20) as comparison:
        counts = [comparison.update(batch) for batch in batches]
    assert counts == [20] * 6
    torch.testing.assert_close(comparison.compute().matrix, expected(batches, 20), rtol=0, atol=1e-6)
    cka = CKAAccumulator(per="position")
    model = Language().eval()
    with torch.no_grad(), LayerRecorder(model, consumer=cka.observe, per="position") as recorder:
        for batch in batches:
            recorder.run(batch)
            cka.step()
    result = cka.compute()
    torch.testing.assert_close(result.matrix, expected(batches), rtol=0, atol=1e-6)
    assert result.null_unknown is not None
    assert "head" in result.skipped
    with pytest.raises(OptionError, match="options"):
        cka.merge_state(CKAAccumulator())


class Graphs(nn.Module):
    """Nodes of all graphs of a batch in one dimension, as in PyTorch Geometric."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, nodes: Tensor) -> Tensor:
        return self.second(self.first(nodes.flatten(0, 1)).relu())


def test_a_callable_may_return_another_number_of_rows() -> None:
    model, x = Graphs(), torch.randn(24, 9, 6, generator=torch.Generator().manual_seed(5))
    result = compare(model, list(x.split(6)), features=lambda nodes: nodes[::2])
    wide = Graphs().double()
    with torch.no_grad():
        firsts = [wide.first(batch.flatten(0, 1)) for batch in x.double().split(6)]
        grams = [
            [oracle.linear_gram(oracle.flatten(y[::2])) for y in (first, wide.second(first.relu()))]
            for first in firsts
        ]
    torch.testing.assert_close(result.matrix, torch.from_numpy(oracle.cka_minibatch(grams)), rtol=0, atol=1e-6)
    assert result.samples == 4 * 27
    with pytest.raises(cka_hooks.SampleCountError, match="has 53 samples and 'first' has 54"):
        compare(model, list(x.split(6)), features={"first": lambda nodes: nodes, "second": lambda nodes: nodes[1:]})
    with pytest.raises(cka_hooks.BatchError, match="cannot be cut"):
        compare(model, list(x.split(6)), features=lambda nodes: nodes, max_samples=8)
    with pytest.raises(cka_hooks.BatchError, match=r"must return a tensor \(m, d\)"):
        compare(model, list(x.split(6)), features=lambda nodes: 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "token"}, "use 'sample' or 'position'"),
        ({"per": "sample", "positions": 9}, 'needs per="position"'),
        ({"positions": 3}, "positions=3: expected a whole number of at least 4"),
        ({"minibatch": 32}, "minibatch=32 exclude each other"),
        ({"join_batches": 32}, "join_batches=32 exclude each other"),
        ({"features": "mean"}, "features='mean' exclude each other"),
    ],
)
def test_options_that_do_not_fit(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compare(Language(), texts(), **options)
    with pytest.raises(OptionError, match="has a row for each sample"):
        compare({"a": Language(), "V4": torch.randn(24, 3)}, texts())


def test_nothing_but_padding_and_few_positions() -> None:
    batches = texts(padded=True)
    batches[2]["attention_mask"] = torch.zeros_like(batches[2]["attention_mask"])
    result = compare(Language(), batches)
    torch.testing.assert_close(result.matrix, expected([*batches[:2], *batches[3:]]), rtol=0, atol=1e-6)
