"""Several processes, one result. What the ranks check is in `ranks.py`, started here with torchrun."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path

import processes
import pytest
import ranks
import torch
import torch.distributed as dist

import cka_hooks
from cka_hooks.run.ranks import Ranks

CHECKS = [name for name in vars(ranks) if name.startswith("check_")]


def start(count: int, folder: Path) -> str:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"]
    done = processes.finished(
        *torchrun,
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(Path(__file__).with_name("ranks.py"))),
        env={**os.environ, "RANKS_FOLDER": str(folder), "OMP_NUM_THREADS": "1"},
    )
    return done.stdout + (done.stderr if done.returncode else "")


@pytest.fixture(scope="module", params=[2, 4])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_on_several_ranks(name: str, output: str) -> None:
    assert f"{name} passed" in output, output[-8000:]


def test_one_process_needs_no_group() -> None:
    assert Ranks.of(None, None).size == 1
    with pytest.raises(cka_hooks.OptionError, match="torchrun"):
        cka_hooks.compare(ranks.model(), ranks.batches_of(0), distributed=True, progress=False)
    accumulator = cka_hooks.CKAAccumulator()
    accumulator.update({"x": ranks.batches_of(0)[0]})
    accumulator.sync()
    accumulator.unsync()
    assert accumulator.minibatches == 1


def test_torchrun_without_a_process_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.warns(cka_hooks.CKAWarning, match="no process group is initialised"):
        assert Ranks.of(None, None).size == 1


class Dying:
    """A loader whose rank is gone, without a word, after some batches."""

    def __init__(self, rank: int, dies: bool) -> None:
        self.rank = rank
        self.dies = dies

    def __iter__(self):
        for number, batch in enumerate(ranks.batches_of(self.rank)):
            if number == 3 and self.dies:
                os._exit(9)
            yield batch


def rank_main(rank: int, folder: Path, dies: bool, answers: Queue) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store-{dies}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    try:
        loader = Dying(rank, dies and rank == 1)
        result = cka_hooks.compare(
            ranks.model(), loader, checkpoint=folder / "run.ckpt", checkpoint_every=1e-9, progress=False
        )
        answers.put((rank, result.matrix.tolist()))
    except cka_hooks.RankError as error:
        answers.put((rank, str(error)))
    answers.close()
    answers.join_thread()
    os._exit(0)


def run_two(folder: Path, dies: bool) -> list:
    """What the two ranks answer, long before the time limit of their group."""
    answers = processes.FRESH.Queue()
    with ExitStack() as stack:
        both = [stack.enter_context(processes.spawned(rank_main, rank, folder, dies, answers)) for rank in range(2)]
        found = [answers.get(timeout=120) for _ in range(1 if dies else 2)]
        for process in both:
            process.join(60)
            assert process.exitcode is not None
    return found


def test_a_rank_that_dies_ends_the_others_and_both_can_resume(tmp_path: Path) -> None:
    ((rank, message),) = run_two(tmp_path, dies=True)
    assert rank == 0
    assert "another rank of the process group ended" in message
    assert "continues from where" in message
    assert sorted(path.name for path in tmp_path.glob("run.ckpt*")) == ["run.ckpt.rank0-of-2", "run.ckpt.rank1-of-2"]
    (_, first), (_, second) = run_two(tmp_path, dies=False)
    assert first == second
    warnings.filterwarnings("ignore", "one sample decides")
    expected = cka_hooks.compare(ranks.model(), ranks.every_batch([5, 5]), progress=False)
    torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), expected.matrix, rtol=0, atol=1e-12)
