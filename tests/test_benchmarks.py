"""The benchmarks run, at tiny settings, and print what they say they print."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from benchmark_file import load

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")


def run(script: str, *arguments: str) -> str:
    """Output of one benchmark, run as its user would."""
    done = processes.finished(
        str(ROOT / "benchmarks" / script),
        *arguments,
        cwd=ROOT,
        # Threads that wait by spinning make short runs on a shared machine many times slower.
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch " in done.stdout, "versions are printed"
    return done.stdout


def rows(output: str) -> list[list[str]]:
    """Cells of every table row, headers left out."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_cost_prints_ratios_and_memory() -> None:
    found = rows(
        run("cost.py", "--configs", "tiny", "--rounds", "1", "--batches", "1", "--many", "3", "--runs", "default")
    )
    assert [row[1:3] for row in found] == [["default", "60"]], "every leaf call"
    for row in found:
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", row[3])
    # How much memory is for test_memory.py: of so small a run it is up to the allocator.
    assert re.fullmatch(r"-?\d+; -?\d+ with 3 batches", found[0][5])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cost", "peers", "growth", "gpu"])
def test_without_a_gpu_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load(name)
    monkeypatch.setattr(sys.modules["measure"], "_device", torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", [name] if name == "gpu" else [name, "--device", "cuda"])
    with pytest.raises(SystemExit, match=r"^--device cuda: PyTorch \S+ sees no NVIDIA GPU here; [^\n]*$"):
        benchmark.main()


def test_cost_prints_a_profile() -> None:
    output = run("cost.py", "--configs", "tiny", "--profile", "--runs", "blocks", "--rows", "5")
    assert "Self CPU" in output
    assert "ResNet-18, 16 px, batch 16, blocks" in output


def test_growth_prints_slopes_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "growth.png"
    settings = ["--rounds", "1", "--points", "2", "--layers", "30", "--samples", "16", "--width", "32"]
    output = run("growth.py", *settings, "--figure", str(figure))
    found = rows(output)
    slopes = [row[4] for row in found if row[0].startswith("slope")]
    assert len(slopes) == 4
    assert all(re.fullmatch(r"-?\d+\.\d\d, -?\d+\.\d\d", slope) for slope in slopes)
    assert any("all-pairs" in row[0] for row in found)
    assert figure.stat().st_size > 10_000


def test_peers_runs_with_the_packages_that_are_installed(tmp_path: Path) -> None:
    figure = tmp_path / "peers.png"
    settings = ["--cases", "tiny", "--rounds", "1", "--batches", "1"]
    found = rows(run("peers.py", *settings, "--figure", str(figure)))
    assert found[0][1] == "cka_hooks"
    assert float(found[0][4]) < 1e-6
    assert found[0][5:] == ["0.0%", "0"]
    assert figure.stat().st_size > 10_000


def test_pytorch_cka_gets_a_list_of_batches_as_one_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpu.py` has a list. Given alone, that would be several loaders."""

    def compute_cka(model: object, same: object, *loaders: object, **_: object) -> list[torch.Tensor]:
        assert loaders == ([batches],)
        return [torch.eye(2)]

    peers, batches = load("peers"), [(torch.randn(4, 3), torch.zeros(4))] * 2
    monkeypatch.setitem(sys.modules, "cka", SimpleNamespace(compute_cka=compute_cka))
    assert torch.equal(peers.pytorch_cka_matrix(torch.nn.Linear(3, 2), batches, ["0"]), torch.eye(2))


def test_host_prints_microseconds_of_a_layer() -> None:
    found = rows(run("host.py", "--layers", "5", "--batches", "2", "--rounds", "1"))
    assert len({row[0] for row in found}) == 4
    assert len(found) == 4 * 5
    assert all(re.fullmatch(r"-?\d+\.\d", row[3]) for row in found)
    assert all(re.fullmatch(r"-?\d+\.\d", row[2]) for row in found if row[1] != "hooks that do nothing")


def test_null_prints_shares_of_false_alarms_and_p_values_of_permutations() -> None:
    settings = ["--runs", "40", "--samples", "8", "--minibatches", "10", "--draws", "300"]
    found = [row for row in rows(run("null.py", *settings)) if row[0] != "layers"]
    simulated, permuted = found[:6], found[6:]
    assert [row[1:3] for row in simulated] == 6 * [["8", "10"]]
    assert all(0 <= float(share) <= 100 for row in simulated for share in row[3:])
    assert len(permuted) == 10
    # The p-value of the largest of 300 sums says little; that of the fifteenth is about 5 %.
    assert all(1 < float(row[2]) < 15 for row in permuted)
