"""What every rank runs in the tests of distributed runs: each check by name, under one start of torchrun."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import cka_hooks

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUIET = {"progress": False}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def data(samples: int) -> torch.Tensor:
    return torch.randn(samples, 12, generator=torch.Generator().manual_seed(5))


def batches_of(rank: int, samples: int = 40, size: int = 8) -> list[torch.Tensor]:
    x = torch.randn(samples, 12, generator=torch.Generator().manual_seed(100 + rank))
    return list(x.split(size))


def every_batch(counts: list[int]) -> list[torch.Tensor]:
    return [batch for rank, count in enumerate(counts) for batch in batches_of(rank)[:count]]


def alone(loader, **options):
    return cka_hooks.compare(model(), loader, distributed=False, **QUIET, **options)


def same(ours: cka_hooks.CKAResult, expected: cka_hooks.CKAResult) -> None:
    assert ours.layers == expected.layers
    torch.testing.assert_close(ours.matrix, expected.matrix, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(ours.stderr, expected.stderr, rtol=0, atol=1e-7, equal_nan=True)
    for name in ("samples", "minibatches", "degrees_of_freedom", "passes", "degenerate", "skipped"):
        assert getattr(ours, name) == getattr(expected, name), name
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, (ours.matrix.tolist(), ours.stderr.tolist(), ours.influence, ours.skipped))
    assert all(str(its) == str(everyone[0]) for its in everyone), "ranks got different results"


def check_equal_shards() -> None:
    same(cka_hooks.compare(model(), batches_of(RANK), **QUIET), alone(every_batch([5] * SIZE)))


def check_unequal_shards_and_a_rank_without_a_batch() -> None:
    counts = [3, 0, 5, 1][:SIZE]
    ours = cka_hooks.compare(model(), batches_of(RANK)[: counts[RANK]], **QUIET)
    expected = alone(every_batch(counts))
    same(ours, expected)
    for layer, found in expected.influence.items():
        assert ours.influence[layer].sample == found.sample
        assert ours.influence[layer].share == pytest.approx(found.share, rel=1e-9)


def check_the_first_rank_without_a_batch() -> None:
    counts = [0, 4, 2, 3][:SIZE]
    same(cka_hooks.compare(model(), batches_of(RANK)[: counts[RANK]], **QUIET), alone(every_batch(counts)))


def check_ranks_with_other_plans() -> None:
    """Other models, layers, tolerances and passes are refused on every rank, and nobody waits."""
    plans = [{"layers": ["0", "2"]}, {"tolerance": 0.1}, {"epochs": 2}, {"estimator": "biased"}]
    for plan in plans:
        with pytest.raises(cka_hooks.CKAError, match=f"{next(iter(plan))}|chosen"):
            cka_hooks.compare(model(), batches_of(RANK), **QUIET, **(plan if RANK else {}))
    other = nn.ModuleDict({"a": model()})
    with pytest.raises(cka_hooks.CKAError, match=r"different options: (models|chosen)"):
        cka_hooks.compare(other if RANK else model(), batches_of(RANK), **QUIET)
    # Refused on one rank only.
    with pytest.raises(cka_hooks.CKAError, match="minibatch"):
        cka_hooks.compare(model(), batches_of(RANK), **QUIET, minibatch=1 if RANK else None)


def check_features_that_somebody_brings() -> None:
    """Aligned by identifiers, whatever part of the samples a rank has; refused without."""
    x = data(8 * SIZE + 1)
    array = torch.randn(len(x), 5, generator=torch.Generator().manual_seed(1))
    samples = [{"input": one, "id": i} for i, one in enumerate(x)]
    sampler = DistributedSampler(samples, SIZE, RANK, shuffle=True, seed=3)
    loader = DataLoader(samples, batch_size=16, sampler=sampler)
    given = cka_hooks.Precomputed(array, sample_ids=range(len(x)))
    ours = cka_hooks.compare({"m": model(), "V4": given}, loader, sample_ids="id", **QUIET)
    mine = [i for batch in loader for i in batch["id"].tolist()][: 9 if RANK == 0 else 8]
    everyone: list = [None] * SIZE
    dist.all_gather_object(everyone, mine)
    both = [{"input": x[part], "id": part} for part in everyone]
    same(ours, cka_hooks.compare({"m": model(), "V4": given}, both, sample_ids="id", distributed=False, **QUIET))
    assert ours.samples == len(x)
    with pytest.raises(cka_hooks.CKAError, match="shuffles"):
        cka_hooks.compare({"m": model(), "V4": array}, loader, **QUIET)
    # Without a sampler each rank has its own loader, and its own rows.
    own = torch.stack([batch[:, :5] ** 2 for batch in batches_of(RANK)]).flatten(0, 1)
    ours = cka_hooks.compare({"m": model(), "V4": own}, batches_of(RANK), **QUIET)
    every = every_batch([5] * SIZE)
    rows = torch.cat([batch[:, :5] ** 2 for batch in every])
    same(ours, cka_hooks.compare({"m": model(), "V4": rows}, every, distributed=False, **QUIET))


def check_no_rank_has_a_batch() -> None:
    with pytest.raises(cka_hooks.TooFewSamplesError):
        cka_hooks.compare(model(), [], **QUIET)


def check_padding_of_the_sampler_is_left_out() -> None:
    # 8 * SIZE + 1 samples: all ranks but the first have one that is a repetition.
    x = data(8 * SIZE + 1)
    for samples in (x, x[:2]):
        sampler = DistributedSampler(samples, SIZE, RANK, shuffle=False)
        loader = DataLoader(samples, batch_size=16, sampler=sampler)
        if len(samples) < SIZE:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(cka_hooks.TooFewSamplesError):
                    cka_hooks.compare(model(), loader, **QUIET)
            continue
        if len(samples) < 8:
            continue
        ours = cka_hooks.compare(model(), loader, **QUIET)
        assert ours.samples == len(samples)
        same(ours, alone([samples[rank::SIZE] for rank in range(SIZE)]))


def check_several_passes_shuffle_differently() -> None:
    x = data(16 * SIZE)
    sampler = DistributedSampler(x, SIZE, RANK, shuffle=True, seed=1)
    ours = cka_hooks.compare(model(), DataLoader(x, batch_size=8, sampler=sampler), epochs=2, **QUIET)
    assert sampler.epoch == 0
    passes = []
    for epoch in range(2):
        parts = []
        for rank in range(SIZE):
            other = DistributedSampler(x, SIZE, rank, shuffle=True, seed=1)
            other.set_epoch(epoch)
            parts += list(x[list(other)].split(8))
        passes.append(parts)
    assert not torch.equal(passes[0][0], passes[1][0])

    class TwoPasses:
        def __iter__(self):
            return iter(passes.pop(0))

    same(ours, alone(TwoPasses(), epochs=2))


def check_max_samples_is_of_all_ranks() -> None:
    ours = cka_hooks.compare(model(), batches_of(RANK), max_samples=8 * SIZE + 4 * (SIZE - 1), **QUIET)
    assert ours.samples + ours.settings["samples_left_out"] == 8 * SIZE + 4 * (SIZE - 1)


def check_minibatches_are_kept() -> None:
    counts = [3, 0, 5, 1][:SIZE]
    ours = cka_hooks.compare(
        model(), batches_of(RANK)[: counts[RANK]], keep_minibatches=True, permutations=9, **QUIET
    )
    expected = alone(every_batch(counts), keep_minibatches=True, permutations=9)
    for name in ("minibatch_hsic", "permuted"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=0, atol=1e-12)


def check_tolerance_stops_all_ranks_together() -> None:
    counts = [60, 7, 60, 0][:SIZE]
    mine = batches_of(RANK, samples=8 * counts[RANK]) if counts[RANK] else []
    ours = cka_hooks.compare(model(), mine, tolerance=0.05, **QUIET)
    assert "stopped" in ours.settings
    assert ours.minibatches < sum(counts)
    assert float(ours.stderr.max()) < 0.05
    same(ours, ours)
    # One that is never reached: ranks that are through keep answering the looks of the others.
    ours = cka_hooks.compare(model(), mine, tolerance=1e-9, **QUIET)
    assert ours.minibatches == sum(counts)
    ours = cka_hooks.compare(model(), mine, tolerance=1e-9, epochs=2, **QUIET)
    assert ours.minibatches == 2 * sum(counts)


def check_not_finite_on_one_rank_is_raised_on_all() -> None:
    mine = batches_of(RANK)
    if RANK == SIZE - 1:
        mine[2] = torch.full_like(mine[2], float("nan"))
    with pytest.raises(cka_hooks.NonFiniteError) as caught:
        cka_hooks.compare(model(), mine, **QUIET)
    assert caught.value.layers["0"] == 5 * (SIZE - 1) + 2


def check_a_rank_that_fails_ends_the_others() -> None:
    """The others are in the middle of a long loader, and end there with its error."""
    reached = 0

    def slow():
        nonlocal reached
        for number, batch in enumerate(batches_of(RANK, samples=8 * 1000)):
            if RANK == 0 and number == 3:
                raise OSError("disk on fire")
            time.sleep(0.02)
            reached = number
            yield batch

    with pytest.raises(OSError if RANK == 0 else cka_hooks.RankError, match=r"disk on fire"):
        cka_hooks.compare(model(), slow(), **QUIET)
    assert reached < 900


def check_a_rank_with_another_model_ends_the_others() -> None:
    layers = ["0"] if RANK else ["nowhere"]
    with pytest.raises(cka_hooks.LayerError if RANK == 0 else cka_hooks.RankError):
        cka_hooks.compare(model(), batches_of(RANK), layers=layers, **QUIET)


def check_different_options_are_refused() -> None:
    with pytest.raises(cka_hooks.OptionError, match="minibatch is"):
        cka_hooks.compare(model(), batches_of(RANK), minibatch=4 + RANK, **QUIET)


def check_the_same_samples_on_all_ranks_are_noticed() -> None:
    with pytest.warns(cka_hooks.CKAWarning, match="have the same first batch"):
        cka_hooks.compare(model(), batches_of(0), **QUIET)


def check_one_rank_alone() -> None:
    if RANK == 0:
        result = cka_hooks.compare(model(), batches_of(0), distributed=False, **QUIET)
        assert result.minibatches == 5
    dist.barrier()


def check_a_hand_written_loop_with_ddp() -> None:
    wrapped = nn.parallel.DistributedDataParallel(model())
    cka = cka_hooks.CKAAccumulator()
    for rounds in (1, 2):
        with cka_hooks.LayerRecorder(wrapped, consumer=cka.observe), torch.no_grad():
            for batch in batches_of(RANK):
                wrapped(batch)
                cka.step()
        cka.sync()
        with pytest.raises(cka_hooks.OptionError, match="synchronised already"):
            cka.sync()
        assert cka.compute().minibatches == 5 * SIZE * rounds
        cka.unsync()
        assert cka.minibatches == 5 * rounds
    cka.reset()
    cka.update({"x": batches_of(RANK)[0]})
    cka.sync()
    assert cka.compute().samples == 8 * SIZE
    same(cka_hooks.compare(wrapped, batches_of(RANK), **QUIET), alone(every_batch([5] * SIZE)))


def check_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    x = data(16 * SIZE)
    prepared, loader = accelerator.prepare(model(), DataLoader(x, batch_size=8))
    ours = cka_hooks.compare(prepared, loader, **QUIET)
    assert ours.samples == 16 * SIZE
    expected = alone([x[8 * (SIZE * step + rank) :][:8] for rank in range(SIZE) for step in range(2)])
    same(ours, expected)
    cka = cka_hooks.CKAAccumulator()
    with cka_hooks.LayerRecorder(prepared, consumer=cka.observe), torch.no_grad():
        for batch in loader:
            prepared(batch)
            cka.step()
    cka.sync()
    torch.testing.assert_close(cka.compute().matrix, expected.matrix, rtol=0, atol=1e-12)
    uneven = accelerator.prepare(DataLoader(data(16 * SIZE - 3), batch_size=8))
    with pytest.warns(cka_hooks.CKAWarning, match="even_batches=False"):
        cka_hooks.compare(prepared, uneven, **QUIET)


def check_fsdp() -> None:
    if torch.__version__.startswith("2.6."):
        return  # Its fully_shard does not run on a CPU.
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer)
    fully_shard(sharded)
    # One sample more than divides evenly: ranks whose last sample does not count still have to make the pass.
    x = data(8 * SIZE + 1)
    sampler = DistributedSampler(x, SIZE, RANK, shuffle=False)
    ours = cka_hooks.compare(sharded, DataLoader(x, batch_size=8, sampler=sampler), **QUIET, max_samples=8 * SIZE)
    assert ours.samples == 8 * SIZE
    same(ours, alone([x[: 8 * SIZE][rank::SIZE] for rank in range(SIZE)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = cka_hooks.compare(sharded, DataLoader(x, batch_size=8, sampler=sampler), **QUIET)
    assert ours.samples + ours.settings["samples_left_out"] == 8 * SIZE + 1
    assert all(parameter.grad is None for parameter in sharded.parameters())
    with pytest.raises(cka_hooks.OptionError, match="checkpoint= does not work"):
        cka_hooks.compare(sharded, batches_of(RANK), checkpoint="never.ckpt", **QUIET)


def check_tensor_parallel_counts_each_sample_once() -> None:
    if SIZE < 4:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    split = parallelize_module(
        model(),
        mesh["tp"],
        # What the first layer returns stays a distributed tensor, a half of the features on each rank.
        {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()},
    )
    part = mesh.get_local_rank("dp")
    ours = cka_hooks.compare(split, batches_of(part), group=mesh.get_group("dp"), **QUIET)
    expected = alone(every_batch([5, 5]))
    assert ours.samples == expected.samples
    torch.testing.assert_close(ours.matrix, expected.matrix, rtol=0, atol=1e-6)


def check_models_built_in_turn() -> None:
    builders = {"a": lambda: model(1), "b": lambda: model(2)}
    ours = cka_hooks.compare(builders, batches_of(RANK), **QUIET)
    expected = cka_hooks.compare({"a": model(1), "b": model(2)}, every_batch([5] * SIZE), distributed=False, **QUIET)
    same(ours, expected)
    most = 8 * SIZE + 4 * (SIZE - 1)
    ours = cka_hooks.compare(builders, batches_of(RANK), max_samples=most, **QUIET)
    assert ours.samples + ours.settings["samples_left_out"] == most


def check_models_built_in_turn_on_a_rank_that_fails() -> None:
    def build() -> nn.Module:
        if RANK == 1:
            raise OSError("the weights are gone")
        return model(2)

    with pytest.raises(OSError if RANK == 1 else cka_hooks.RankError, match="the weights are gone"):
        cka_hooks.compare({"a": lambda: model(1), "b": build, "c": model(3)}, batches_of(RANK), **QUIET)


def check_checkpoints_of_ranks() -> None:
    path = Path(os.environ["RANKS_FOLDER"]) / "run.ckpt"
    mine = batches_of(RANK)

    def broken():
        yield from mine[:3]
        if RANK == 1:
            raise OSError("the disk is gone")
        yield from mine[3:]

    class Broken:
        def __iter__(self):
            return broken()

    class Whole:
        def __iter__(self):
            return iter(mine)

    with pytest.raises(OSError if RANK == 1 else cka_hooks.RankError, match="the disk is gone"):
        cka_hooks.compare(model(), Broken(), checkpoint=path, **QUIET)
    dist.barrier()
    names = sorted(file.name for file in path.parent.iterdir())
    # A rank that went on would put the temporary file of its next checkpoint there before all have looked.
    dist.barrier()
    assert names == [f"run.ckpt.rank{rank}-of-{SIZE}" for rank in range(SIZE)]
    ours = cka_hooks.compare(model(), Whole(), checkpoint=path, **QUIET)
    same(ours, alone(every_batch([5] * SIZE)))
    # Finished: nobody reads a batch.
    again = cka_hooks.compare(model(), Whole(), checkpoint=path, **QUIET)
    torch.testing.assert_close(again.matrix, ours.matrix, rtol=0, atol=0)
    with pytest.raises(cka_hooks.CheckpointError, match="another number of ranks"):
        cka_hooks.compare(model(), Whole(), checkpoint=path, distributed=False, **QUIET)


def main() -> None:
    warnings.simplefilter("error", cka_hooks.CKAWarning)
    # Of few samples one always has a large share.
    warnings.filterwarnings("ignore", "one sample decides")
    warnings.filterwarnings("ignore", ".* samples at the end of batches were left out")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, check in list(globals().items()):
        if name.startswith("check_") and (len(sys.argv) < 2 or sys.argv[1] in name):
            started = time.monotonic()
            try:
                check()
            except BaseException:
                print(f"RANK {RANK} FAILED {name}\n{traceback.format_exc()}", flush=True)
                # The ranks are no longer in step.
                sys.exit(1)
            if RANK == 0:
                print(f"{name} passed in {time.monotonic() - started:.2f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
