"""The demo: what it writes and says, and what it says where something is missing."""

import sys

import pytest

from cka_hooks import CKAResult
from cka_hooks.command import demo
from cka_hooks.command.cli import main

# One pass over the images is no training, and one sample may decide much.
pytestmark = pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")


def test_a_short_demo_writes_pictures_and_result(tmp_path, capsys, monkeypatch):
    for package in ("sklearn", "torchvision", "matplotlib"):
        pytest.importorskip(package)
    few = [demo.TensorDataset(*(tensor[:128] for tensor in data.tensors)) for data in demo.digits()]
    monkeypatch.setattr(demo, "digits", lambda: few)
    folder = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(folder), "--epochs", "1", "--quiet"]) == 0
    out = capsys.readouterr().out
    result = CKAResult.load(folder / "cka.json")
    assert len(result.rows) == 16
    assert result.models == ("seed 0", "seed 1")
    for name in ("cka.png", "between.png"):
        path = folder / name
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert str(path) in out
    assert out.count("held-out digits right") == 2
    assert "same or a neighbouring depth" in out


@pytest.mark.slow
def test_each_block_is_most_alike_to_the_same_or_a_neighbouring_one(tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 0
    across = CKAResult.load(tmp_path / "cka.json").between("seed 0", "seed 1").matrix
    places = (across.argmax(1) - demo.torch.arange(8)).abs()
    assert int((places <= 1).sum()) >= 7


def test_the_same_seed_trains_the_same_network():
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    train, _ = demo.digits()
    few = demo.TensorDataset(*(tensor[:64] for tensor in train.tensors))
    a, b, c = (demo.trained(few, seed, epochs=1, progress=False) for seed in (0, 0, 1))
    assert demo.torch.equal(a.fc.weight, b.fc.weight)
    assert not demo.torch.equal(a.fc.weight, c.fc.weight)


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert 'the demo needs scikit-learn and matplotlib: pip install "cka-hooks[demo]"' in err
