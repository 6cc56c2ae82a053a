"""The script of the expensive attacks runs, and finds nothing in a few rounds."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).parent / "slow" / "attacks.py"


@pytest.mark.parametrize(
    "names",
    [
        ["damaged_checkpoints", "forged_checkpoints", "damaged_results", "forged_results"],
        pytest.param(["ctrl_c", "ranks", "kills"], marks=pytest.mark.slow),
    ],
    ids=["files", "processes"],
)
def test_a_few_rounds(names: list[str]) -> None:
    done = processes.finished(str(SCRIPT), *names, "--rounds", "3", seconds=1000)
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if line.endswith(": 3 rounds")] == [
        f"{it}: 3 rounds" for it in names
    ]


def test_an_attack_that_is_not_there() -> None:
    done = processes.finished(str(SCRIPT), "bribes")
    assert done.returncode == 2
    assert "no such attack: bribes" in done.stderr
