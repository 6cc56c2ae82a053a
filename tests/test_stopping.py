"""`tolerance`, `max_samples` and `epochs` of `compare`: when a run ends, and what it says then."""

import re
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import cka_hooks
from cka_hooks import OptionError
from cka_hooks.run import loop
from cka_hooks.run.loop import FIRST_LOOK, LOOK_RATIO
from cka_hooks.similarity.state import State

pytestmark = pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")
BATCH = 8


class Rounding(nn.Module):
    """All samples are the same but for rounding: degenerate, and noise in whatever is made of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 + 1e-7 * (x > 0).float()


class Branches(nn.Module):
    """Two layers that run always, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.sometimes = nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.b(self.a(x))
        return self.sometimes(x) if self.calls % 7 == 1 else x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, BATCH, 10, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After how many minibatches somebody looked at the standard errors, which is what waits for a device."""
    seen: list[int] = []
    look = loop.largest_stderr

    def counted(state: State) -> float:
        seen.append(state.minibatches)
        return look(state)

    monkeypatch.setattr(loop, "largest_stderr", counted)
    return seen


def test_it_looks_first_after_thirty_and_then_at_geometric_intervals(model: nn.Module, looks: list[int]) -> None:
    result = cka_hooks.compare(model, batches(200), tolerance=1e-9, progress=False)
    assert (FIRST_LOOK, LOOK_RATIO) == (30, 1.25)
    assert looks == [30, 38, 48, 61, 77, 97, 122, 153, 192]
    assert result.minibatches == 200
    assert "stopped" not in result.settings


def test_it_never_looks_without_tolerance(model: nn.Module, looks: list[int]) -> None:
    cka_hooks.compare(model, batches(40), progress=False)
    assert not looks


def test_it_ends_at_the_first_look_below_and_says_after_how_many_samples(model: nn.Module, looks: list[int]) -> None:
    whole = cka_hooks.compare(model, batches(48), progress=False)
    tolerance = float(whole.stderr.max()) * 1.000001
    result = cka_hooks.compare(model, batches(200), tolerance=tolerance, progress=False)
    assert looks[-1] == result.minibatches <= 48
    assert result.samples == BATCH * result.minibatches
    assert float(result.stderr.max()) < tolerance
    assert result.settings["tolerance"] == tolerance
    assert f"after {result.samples} samples" in result.settings["stopped"]
    same = cka_hooks.compare(model, batches(result.minibatches), progress=False)
    assert torch.equal(same.matrix, result.matrix)
    assert torch.equal(same.stderr, result.stderr)


def test_however_wide_the_tolerance_thirty_minibatches_are_seen(model: nn.Module) -> None:
    assert cka_hooks.compare(model, batches(200), tolerance=100.0, progress=False).minibatches == 30


def test_minibatches_within_a_batch_count(model: nn.Module, looks: list[int]) -> None:
    wide = [torch.cat(batches(5, seed)) for seed in range(20)]
    result = cka_hooks.compare(model, wide, minibatch=BATCH, tolerance=1.0, progress=False)
    assert looks == [30]
    assert result.samples == 30 * BATCH


def test_layers_whose_cka_is_undefined_do_not_keep_it_running() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"live": nn.Sequential(nn.Linear(10, 8), nn.ReLU()), "dead": Rounding()})

    def both(module: nn.Module, batch: Tensor) -> None:
        module["live"](batch)  # type: ignore[index]
        module["dead"](batch)  # type: ignore[index]

    result = cka_hooks.compare(model, batches(120), tolerance=0.1, forward=both, progress=False)
    assert set(result.degenerate) == {"dead"}
    assert result.minibatches == 30
    only = cka_hooks.compare(model, batches(120), layers="dead", tolerance=0.1, forward=both, progress=False)
    assert only.minibatches == 30


def test_layers_that_run_now_and_then_do_not_keep_it_running() -> None:
    torch.manual_seed(0)
    result = cka_hooks.compare(Branches(), batches(120), tolerance=0.1, progress=False)
    assert set(result.skipped) == {"sometimes"}
    assert result.minibatches == 30


def test_layers_that_are_not_finite_do_not_keep_it_running() -> None:
    model = nn.ModuleDict({"live": nn.Sequential(nn.Linear(10, 8), nn.ReLU()), "bad": nn.Identity()})

    def both(module: nn.Module, batch: Tensor) -> None:
        module["live"](batch)  # type: ignore[index]
        module["bad"](batch / 0)  # type: ignore[index]

    with pytest.raises(cka_hooks.NonFiniteError) as caught:
        cka_hooks.compare(model, batches(120), tolerance=0.1, forward=both, progress=False)
    assert caught.value.partial is not None
    assert caught.value.partial.minibatches == 30


def test_the_progress_bar_shows_the_largest_error_of_the_last_look(
    model: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    result = cka_hooks.compare(model, batches(31), tolerance=1e-9)
    at_look = cka_hooks.compare(model, batches(30), progress=False)
    shown = re.findall(r"largest stderr ([0-9.e-]+)", capsys.readouterr().err)
    assert result.minibatches == 31
    assert shown[-1] == f"{float(at_look.stderr.max()):.2g}"


def test_without_a_bar_nobody_waits_for_the_lock_of_bars(model: nn.Module) -> None:
    """A process that was killed may hold it for ever."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with tqdm.get_lock():
            held.set()
            over.wait(120)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    ended = threading.Event()
    runner = threading.Thread(
        target=lambda: (cka_hooks.compare(model, batches(1), progress=False), ended.set()), daemon=True
    )
    runner.start()
    try:
        assert ended.wait(60)
    finally:
        over.set()
        holder.join(60)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(4, 60), minibatch=st.sampled_from([None, 4, 5]))
def test_max_samples_bounds_a_run(count: int, minibatch: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU())
    result = cka_hooks.compare(model, batches(5), max_samples=count, minibatch=minibatch, progress=False)
    seen = result.samples + int(result.settings["samples_left_out"])
    assert seen == min(count, 5 * BATCH)


def test_max_samples_and_the_loader(model: nn.Module) -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield from batches(1)

    assert cka_hooks.compare(model, endless(), max_samples=64, progress=False).samples == 64


def shuffled(samples: int) -> DataLoader[tuple[Tensor, ...]]:
    data = torch.randn(samples, 10, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(data), batch_size=BATCH, shuffle=True, generator=generator)


def test_samples_are_distinct_over_epochs(model: nn.Module) -> None:
    result = cka_hooks.compare(model, shuffled(64), epochs=5, progress=False)
    assert (result.samples, result.minibatches, result.passes, result.degrees_of_freedom) == (64, 40, 5, 7)
    bounded = cka_hooks.compare(model, shuffled(64), epochs=5, max_samples=32, progress=False)
    assert (bounded.minibatches, bounded.passes) == (20, 5)


def test_epochs_do_not_shrink_the_error_as_more_samples_would(model: nn.Module) -> None:
    once = cka_hooks.compare(model, shuffled(160), progress=False)
    often = cka_hooks.compare(model, shuffled(160), epochs=8, progress=False)
    more = cka_hooks.compare(model, shuffled(8 * 160), progress=False)
    ratio = often.stderr[0, 2] / once.stderr[0, 2]
    assert 0.7 < float(ratio) < 1.4
    assert float(more.stderr[0, 2] / once.stderr[0, 2]) < 0.6


def test_extra_passes_alone_cannot_reach_the_tolerance(model: nn.Module, looks: list[int]) -> None:
    once = cka_hooks.compare(model, shuffled(240), progress=False)
    tolerance = 0.5 * float(once.stderr.max())
    # Enough minibatches for it, if each were of new samples.
    result = cka_hooks.compare(model, shuffled(240), tolerance=tolerance, epochs=8, progress=False)
    assert result.minibatches == 8 * 30
    assert "stopped" not in result.settings
    assert looks == [30]
    enough = cka_hooks.compare(model, shuffled(8 * 240), tolerance=tolerance, progress=False)
    assert "stopped" in enough.settings


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"max_samples": 3}, "max_samples"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_options_that_cannot_be(model: nn.Module, options: dict[str, float], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        cka_hooks.compare(model, batches(1), progress=False, **options)  # type: ignore[arg-type]
