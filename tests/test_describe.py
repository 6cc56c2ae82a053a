"""The table of layers before a run."""

from __future__ import annotations

import pytest
import torch
import torchvision.models as vision
from torch import nn

import cka_hooks


def test_a_table_of_hundreds_of_layers_fits_a_terminal() -> None:
    model = vision.densenet121(weights=None)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected_draw = torch.rand(3)
    torch.manual_seed(3)
    table = cka_hooks.LayerRecorder(model).describe(torch.randn(2, 3, 64, 64, generator=torch.Generator()))
    assert torch.equal(torch.rand(3), expected_draw)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(table.rows) == 366
    lines = str(table).splitlines()
    assert len(lines) == 2 + 366 + 1
    assert max(map(len, lines)) <= 80
    assert all(len(line) <= len(lines[1]) for line in lines[:-1])
    assert sum(row.cost for row in table.rows) == pytest.approx(1)
    # What is cut off is the beginning, which many layers share.
    assert len({line[: len(lines[1].split()[0])] for line in lines[2:-1]}) == 366


def test_rows_say_what_a_run_would_record() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_rather_long_name_for_a_block_of_layers = nn.ModuleDict(
                {"and_one_more_level_below_it": nn.Linear(4, 4)}
            )
            self.relu = nn.ReLU()
            self.unused = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.a_rather_long_name_for_a_block_of_layers["and_one_more_level_below_it"]
            return self.relu(layer(self.relu(layer(x))))

    table = cka_hooks.LayerRecorder(Twice()).describe((torch.randn(5, 7, 4), torch.zeros(5)))
    first = table.rows[0]
    assert first.layer == "a_rather_long_name_for_a_block_of_layers.and_one_more_level_below_it"
    assert (first.type, first.calls, first.shape, first.features, first.cost) == ("Linear", 2, (5, 7, 4), 28, 0.25)
    assert [row.layer.rsplit(".")[-1] for row in table.rows] == [
        "and_one_more_level_below_it",
        "relu",
        "and_one_more_level_below_it#2",
        "relu#2",
    ]
    assert table.features == 4 * 28
    assert table.samples == 5
    assert table.skipped == {"unused": "did not run in the forward pass"}
    text = str(table)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" in text
    assert "level_below_it#2 " in text
    assert text.endswith("1 left out, see `.skipped`")


def test_one_forward_pass_and_the_reduction_counts() -> None:
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    model.register_forward_hook(lambda *_: calls.append(1))
    recorder = cka_hooks.LayerRecorder(model, features={"0": "mean"}, consumer=lambda *_: pytest.fail("not its own"))
    table = recorder.describe(torch.randn(4, 3, 5, 5))
    assert [row.shape for row in table.rows] == [(4, 8), (4, 8, 5, 5)]
    assert [row.features for row in table.rows] == [8, 200]
    assert len(calls) == 1


def test_nothing_to_describe() -> None:
    model = nn.Sequential(nn.Flatten())
    with pytest.raises(cka_hooks.LayerError, match=r"none of the chosen layers was recorded: '0' .*int64"):
        cka_hooks.LayerRecorder(model).describe(torch.zeros(3, 2, dtype=torch.long))
