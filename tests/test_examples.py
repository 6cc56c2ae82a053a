"""Every example runs on small settings, says something, and returns what it found."""

import importlib.util
from pathlib import Path

import pytest

# On so few samples, one of them may well decide much, and the warning that says so is right.
pytestmark = pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NEEDS = {
    "bert_with_masks": ("transformers",),
    "lightning_callback": ("lightning", "sklearn"),
    "own_loop": ("matplotlib",),
    "tensors": (),
}
# What an example is there to show.
SHOWS = {
    "distil_with_cka_loss": lambda found: sum(found["with the loss"]) > sum(found["without the loss"]) + 0.2,
    # The first layer changes less than the last.
    "training_run": lambda found: found["epoch00/0", "epoch02/0"] > found["epoch00/8", "epoch02/8"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_on_small_settings(path, capsys, monkeypatch, tmp_path):
    for package in NEEDS.get(path.stem, ("sklearn", "torchvision", "matplotlib")):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(quick=True)
    assert found is not None
    if path.stem in SHOWS:
        assert SHOWS[path.stem](found)
    assert len(capsys.readouterr().out.splitlines()) >= 3
