"""Two results side by side: what differs by more than chance, what only one has, which settings differ."""

import dataclasses
import json

import pytest
import torch

from cka_hooks import CKAResult
from cka_hooks.results.diff import diff


def changed(by: float, **fields) -> CKAResult:
    """The example with one entry moved by `by`."""
    result = CKAResult.example()
    matrix = result.matrix.clone()
    matrix[0, 2] += by
    matrix[2, 0] += by
    return dataclasses.replace(result, matrix=matrix, **fields)


def test_equal_results_do_not_differ():
    found = diff(CKAResult.example(), CKAResult.example())
    assert (found.compared, found.differing, found.only_first, found.settings) == (3, (), (), {})


def test_z_is_the_difference_over_the_joint_standard_error():
    found = diff(CKAResult.example(), changed(0.1))
    (entry,) = found.differing
    assert {entry.row, entry.column} == {"conv1", "fc"}
    assert entry.stderr == pytest.approx(0.02 * 2**0.5)
    assert entry.z == pytest.approx(0.1 / (0.02 * 2**0.5))


def test_a_difference_within_the_uncertainty_is_not_reported():
    found = diff(CKAResult.example(), changed(0.03))
    assert found.differing == ()
    assert found.largest.second - found.largest.first == pytest.approx(0.03)


def test_chance_alone_raises_an_alarm_about_as_often_as_the_level_says():
    generator = torch.Generator().manual_seed(0)
    base = CKAResult.example()
    alarms = 0
    for _ in range(400):
        noise = [0.02 * torch.randn(3, 3, dtype=torch.float64, generator=generator).triu(1) for _ in range(2)]
        pair = [dataclasses.replace(base, matrix=base.matrix + n + n.T) for n in noise]
        alarms += bool(diff(*pair, level=0.9).differing)
    assert 20 <= alarms <= 60


def test_layers_that_only_one_has_and_settings_that_differ():
    first = CKAResult.example().select(["conv1", "fc"])
    second = dataclasses.replace(CKAResult.example().select(["conv1", "conv2"]), settings={"kernel": "rbf"})
    found = diff(first, second)
    assert (found.only_first, found.only_second, found.compared) == (("fc",), ("conv2",), 0)
    assert found.settings == {"kernel": (None, "rbf")}
    assert "0 pairs of layers in both" in str(found)


def test_the_time_a_run_took_is_no_setting():
    first, second = (dataclasses.replace(CKAResult.example(), settings={"seconds": s}) for s in (1.0, 2.0))
    assert diff(first, second).settings == {}


def test_undefined_entries_and_missing_errors_are_not_tested():
    nan = torch.full((3, 3), torch.nan, dtype=torch.float64)
    found = diff(CKAResult.example(), changed(0.4, stderr=nan))
    assert (found.compared, found.testable, found.differing) == (3, 0, ())
    assert "3 of them without standard errors" in str(found)
    undefined = dataclasses.replace(CKAResult.example(), matrix=nan)
    assert diff(CKAResult.example(), undefined).compared == 0


def test_rectangular_cuts_pair_up_in_either_direction():
    whole = CKAResult.example(models=("a", "b"))
    found = diff(whole.between("a", "b"), whole.between("b", "a"))
    assert (found.compared, found.differing) == (9, ())


def test_json_has_no_nan():
    nan = torch.full((3, 3), torch.nan, dtype=torch.float64)
    json.dumps(diff(CKAResult.example(), changed(0.4, stderr=nan)).as_json(), allow_nan=False)
