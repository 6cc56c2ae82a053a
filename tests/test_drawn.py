"""`result.influence` names samples by their index in the data set, or says only which of the run they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import cka_hooks

SAMPLES, OUTLIER = 50, 17

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:.* left out", "ignore:.*worker")


class Pictures(Dataset[Any]):
    """Sample 17 outweighs all others."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def __len__(self) -> int:
        return SAMPLES - self.start

    def __getitem__(self, index: int) -> Tensor:
        number = index + self.start
        picture = torch.randn(6, generator=torch.Generator().manual_seed(number))
        return picture * (100 if number == OUTLIER else 1)


class Named(Pictures):
    sample_ids = tuple(f"{number}.png" for number in range(SAMPLES))


class Several(Sampler[list[int]]):
    """Yields one list, again and again."""

    def __iter__(self) -> Any:
        batch: list[int] = []
        for index in reversed(range(SAMPLES)):
            batch.append(index)
            if len(batch) == 10:
                yield batch
                batch.clear()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([Pictures()[index] for index in range(SAMPLES)])


class Wrapped(DataLoader[Any]):
    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


def first_out(samples: list[Tensor]) -> Tensor:
    return default_collate(samples[1:])


def turned(samples: list[Tensor]) -> Tensor:
    return default_collate(samples[::-1])


def found_in(loader: Any, **options: Any) -> int | str | None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    result = cka_hooks.compare(net, loader, layers=["0"], progress=False, **options)
    one = result.influence["0"]
    assert one.share > 0.5
    return one.identifier


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Pictures(), batch_size=10),
        DataLoader(Pictures(), batch_size=10, shuffle=True),
        DataLoader(Pictures(), batch_size=25, shuffle=True, drop_last=True, generator=seeded()),
        DataLoader(Pictures(), batch_size=10, shuffle=True, num_workers=2, prefetch_factor=3),
        DataLoader(Pictures(), batch_sampler=Several()),
        DataLoader(Pictures(), batch_sampler=BatchSampler(RandomSampler(Pictures()), 9, drop_last=False)),
        DataLoader(Pictures(), batch_size=10, sampler=WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES, False)),
        DataLoader(Pictures(), batch_size=10, sampler=DistributedSampler(Pictures(), 1, 0)),
        DataLoader(Subset(Subset(Pictures(), range(10, 40)), list(range(29, -1, -1))), batch_size=10),
        DataLoader(ConcatDataset([Subset(Pictures(), range(10)), Pictures(10)]), batch_size=10, shuffle=True),
    ],
    ids=lambda loader: "",
)
@pytest.mark.parametrize("options", [{"epochs": 2}, {"join_batches": 14}, {"minibatch": 5}])
def test_a_sample_is_named_by_its_index_in_the_data_set(loader: Any, options: Any) -> None:
    for _ in range(2):
        sampler = loader.batch_sampler
        assert found_in(loader, **options) == OUTLIER
        assert loader.batch_sampler is sampler
        # The user goes on with the loader.
        assert sum(map(len, loader)) in (SAMPLES, 30)


def test_a_data_set_names_its_samples() -> None:
    assert found_in(DataLoader(Subset(Named(), range(40)), batch_size=10, shuffle=True)) == "17.png"
    assert found_in(DataLoader(Named(), batch_size=10, num_workers=1)) == "17.png"


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Pictures(), batch_size=10, collate_fn=first_out),
        DataLoader(Pictures(), batch_size=10, collate_fn=turned),
        DataLoader(Stream(), batch_size=10),
        Wrapped(Pictures(), batch_size=10),
        DataLoader(Pictures(), batch_size=10, shuffle=True, num_workers=1, persistent_workers=True),
        list(DataLoader(Pictures(), batch_size=10)),
        DataLoader(
            TensorDataset(torch.stack([Pictures()[index] for index in range(SAMPLES)])),
            batch_size=None,
            sampler=BatchSampler(range(SAMPLES), 10, False),
        ),
    ],
    ids=lambda loader: "",
)
def test_or_only_as_one_of_the_run(loader: Any) -> None:
    assert found_in(loader) is None


def test_the_end_of_a_run_that_is_cut_is_counted_well() -> None:
    loader = DataLoader(Subset(Pictures(), [*range(17), *range(18, 24), 17, 24, 25]), batch_size=13)
    assert found_in(loader, max_samples=24) == OUTLIER
