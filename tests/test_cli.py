"""The command line: what it writes, says and exits with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import oracle
import processes
import pytest
import torch
from safetensors.torch import save_file

from cka_hooks import CKAResult
from cka_hooks.command import cli
from cka_hooks.command.cli import main

# Few random samples: one may decide much, and the command line says so on stderr.
pytestmark = pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")

USER_FILE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

def wider():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))

def of_images():
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(588, 5))

def of_pixels():
    return nn.Sequential(nn.Conv2d(3, 4, 9, 8), nn.ReLU(), nn.Flatten())

def not_a_net():
    return 3

def broken():
    raise ValueError("no such thing")

def data():
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(64, 6), batch_size=16, shuffle=True)

def dataset():
    return torch.utils.data.TensorDataset(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))

def stream():
    return (torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(4))

def drawn():
    import numpy
    return (torch.from_numpy(numpy.random.randn(16, 6).astype("f4")) for _ in range(4))

def named():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    samples = [{"input": one, "id": f"s{i}"} for i, one in enumerate(x)]
    return torch.utils.data.DataLoader(samples, batch_size=16, shuffle=True, generator=torch.Generator())

def listed():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    samples = [(one, i) for i, one in enumerate(x)]
    return torch.utils.data.DataLoader(samples, batch_size=16, shuffle=True, generator=torch.Generator())

def empty():
    return []

class Bad(nn.Module):
    def forward(self, x):
        return x / 0

def bad_net():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Bad())

def slow():
    import time
    for i in range(1000):
        time.sleep(0.05)
        yield torch.randn(16, 6)
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(USER_FILE)
    return path


def run(nets, out, *words, model="net", data="data"):
    return main(["run", "--model", f"{nets}:{model}", "--data", f"{nets}:{data}", "--out", str(out), *words])


def test_model_and_data_alone(nets, tmp_path, capsys):
    assert run(nets, tmp_path / "out") == 0
    out = capsys.readouterr().out
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert (result.layers, result.samples) == (("0", "1", "2"), 64)
    assert result.settings["command"]["data"].endswith("nets.py:data")
    for word in (
        "net on cpu, ",
        "nets.py:data, as it is",
        "3 layers, 64 samples",
        str(tmp_path / "out" / "cka.json"),
    ):
        assert word in out


def test_a_data_set_is_drawn_from_at_random_and_the_same_way_for_the_same_seed(nets, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(nets, tmp_path / name, "--samples", "48", "--seed", seed, "--quiet", data="dataset") == 0
    a, b, c = (CKAResult.load(tmp_path / name / "cka.json") for name in "abc")
    assert a.samples == 48
    assert torch.equal(a.matrix, b.matrix)
    assert not torch.equal(a.matrix, c.matrix)


@pytest.mark.parametrize("data", ["data", "stream"])
def test_the_plan_takes_no_sample_from_the_run(nets, tmp_path, data, capsys):
    assert run(nets, tmp_path / "planned", data=data) == 0
    assert ("3 layers, 0 to 2: about 00:0" in capsys.readouterr().out) == (data == "data")
    assert run(nets, tmp_path / "quiet", "--quiet", data=data) == 0
    planned, quiet = (CKAResult.load(tmp_path / name / "cka.json") for name in ("planned", "quiet"))
    assert planned.samples == quiet.samples == 64
    assert torch.equal(planned.matrix, quiet.matrix)


def test_a_stream_that_draws_from_numpy_brings_each_batch_once(nets, tmp_path, capsys):
    assert run(nets, tmp_path, data="drawn") == 0
    assert "came twice" not in capsys.readouterr().err
    assert CKAResult.load(tmp_path / "cka.json").samples == 64


def test_a_finished_checkpoint_gives_its_result_again(nets, tmp_path):
    for name in ("a", "b"):
        words = ("--checkpoint", str(tmp_path / "run.ckpt"), "--quiet")
        assert run(nets, tmp_path / name, *words, data="dataset") == 0
    a, b = (CKAResult.load(tmp_path / name / "cka.json") for name in "ab")
    assert torch.equal(a.matrix, b.matrix)


def test_sketch_gets_a_sentence(nets, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(nets, tmp_path, "--sketch", "8", "--quiet")
    assert "--sketch: it is gone: --minibatch 32, the default, costs less" in capsys.readouterr().err


def test_two_models(nets, tmp_path):
    assert run(nets, tmp_path, "--against", f"{nets}:wider", "--layers", "?") == 0
    result = CKAResult.load(tmp_path / "cka.json")
    assert result.models == ("net", "wider")
    assert result.between("net", "wider").matrix.shape == (3, 3)


def test_two_checkpoints_of_one_model(nets, tmp_path):
    for name, seed in (("first", 0), ("second", 1)):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / f"{name}.pt")
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
    words = ("--weights", str(tmp_path / "first.pt"), "--against", f"{nets}:net")
    assert run(nets, tmp_path / "x", *words, "--against-weights", str(tmp_path / "second.safetensors")) == 0
    result = CKAResult.load(tmp_path / "x" / "cka.json")
    assert result.models == ("net-first", "net-second")
    assert result["net-first/0", "net-second/0"] < 0.999
    assert run(nets, tmp_path / "y", *words, "--against-weights", str(tmp_path / "first.safetensors")) == 0
    same = CKAResult.load(tmp_path / "y" / "cka.json")
    first, second = same.models
    assert same[f"{first}/2", f"{second}/2"] == pytest.approx(1)


def test_json_is_all_that_stdout_has(nets, tmp_path, capsys):
    assert run(nets, tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"]
    assert report["samples"] == 64
    assert report["layers"] == ["0", "1", "2"]
    assert os.path.exists(report["files"]["result"])


def test_an_image_folder_with_classes(nets, tmp_path, capsys):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8).numpy()
        image.fromarray(pixels).save(folder / f"{i}.png")
    words = ["run", "--model", f"{nets}:of_images", "--data", str(tmp_path / "photos")]
    words += ["--out", str(tmp_path / "out"), "--minibatch", "8", "--batch-size", "8"]
    assert main(words) == 0
    assert "16 of 16 samples" in capsys.readouterr().out
    (tmp_path / "photos" / "a" / "broken.png").write_bytes(b"no image")
    assert main([*words, "--overwrite", "--workers", "1", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"cka-hooks: could not read .*broken.png as an image \(.*\)\n", err)


def test_a_torchvision_data_set(tmp_path, capsys):
    pytest.importorskip("torchvision")
    words = ["run", "--model", "torchvision:squeezenet1_1", "--weights", "none", "--layers", "features.*"]
    words += ["--samples", "8", "--minibatch", "8", "--batch-size", "8", "--out", str(tmp_path), "--overwrite"]
    assert main([*words, "--data", "torchvision:FakeData:"]) == 0
    assert main([*words, "--data", f"torchvision:CIFAR10:{tmp_path / 'none'}"]) == 2
    assert "; --download gets what is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "9"], "no layer matches '9'"),
        (["--weights", "gone.pt"], "could not load gone.pt into Sequential ([Errno 2] No such file"),
        (["--weights", "IMAGENET1K_V1"], "expected what torch.save(model.state_dict(), path) writes"),
        (["--against-weights", "a.pt"], "name that model with --against"),
        (["--minibatch", "2"], "at least 4"),
        (["--model", "resnet18"], "names nothing that can be loaded: expected torchvision:NAME"),
        (["--model", "gone.py:net"], "no file gone.py to find 'net' in"),
        (["--data", "gone/"], "'gone/' names nothing that can be loaded"),
        (["--features", "median"], "'median' is not a reduction"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(nets, tmp_path, capsys, words, message):
    assert run(nets, tmp_path / "out", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("cka-hooks: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("not_a_net", "data", "is of type int: expected an nn.Module"),
        ("broken", "data", "ValueError: no such thing (--debug shows where)"),
        ("nett", "data", "has no object 'nett': the closest are net, "),
        ("net", "empty", "yielded no batch"),
        ("net", "not_a_net", "pass a DataLoader or a list of batches"),
    ],
)
def test_a_file_that_does_not_give_what_was_asked(nets, tmp_path, capsys, model, data, message):
    assert run(nets, tmp_path / "out", model=model, data=data) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["run"], ["run", "--model", "a", "--data", "b", "--samples", "0"], ["nothing"], []]
)
def test_usage_errors_exit_with_2(words):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2


def test_a_checkpoint_that_would_run_code_is_refused(nets, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    assert run(nets, tmp_path / "out", "--weights", str(tmp_path / "trap.pt")) == 2
    assert "holds Python objects, which are not loaded" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_model_is_refused(nets, tmp_path, capsys):
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    assert run(nets, tmp_path / "out", "--weights", str(tmp_path / "other.pt")) == 2
    assert "into Sequential (Error(s) in loading state_dict for Sequential: Missing key" in capsys.readouterr().err


def test_what_was_finite_is_saved(nets, tmp_path, capsys):
    assert run(nets, tmp_path, model="bad_net") == 1
    assert "layer '2' has NaN or infinity" in capsys.readouterr().err
    assert CKAResult.load(tmp_path / "cka.json").layers == ("0", "1")


def test_a_folder_that_cannot_be_written(nets, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(nets, tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.usefixtures("interruptible")
def test_interrupted(nets, tmp_path):
    words = ["run", "--model", f"{nets}:net", "--data", f"{nets}:slow", "--out", str(tmp_path / "out")]
    with processes.started("-m", "cka_hooks", *words) as process:
        line = process.stdout.readline()  # the run is under way
        assert line.startswith("net on cpu")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.rstrip().endswith("cka-hooks: interrupted")
    assert "Traceback" not in err


def test_show_prints_and_redraws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "cka.json"
    CKAResult.example(models=("a", "b")).save(path)
    assert main(["show", str(path)]) == 0
    assert "6 layers" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]
    assert main(["show", str(path), "--values"]) == 2
    assert "name its file with --out" in capsys.readouterr().err
    for replaced in (False, True):
        assert main(["show", str(path), "--between", "a", "b", "--out", str(tmp_path / "x.svg"), "--values"]) == 0
        assert ("x.svg (replaced the earlier file)\n" in capsys.readouterr().out) is replaced
    assert (tmp_path / "x.svg").exists()
    assert main(["show", str(path), "--profile", "--out", str(tmp_path / "p.png")]) == 0
    assert main(["show", str(path), "--out", str(tmp_path / "x.csv"), "--html", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.csv").exists()
    assert (tmp_path / "x.html").exists()
    assert main(["show", str(path), "--out", str(path)]) == 2
    assert "would replace the result that is shown" in capsys.readouterr().err
    assert main(["show", str(path), "--out", str(tmp_path / "x.doc")]) == 2
    assert capsys.readouterr().out == ""
    assert main(["show", str(path), "--layers", "c/*"]) == 2
    assert main(["show", str(tmp_path / "none.json")]) == 2
    path.write_text("{}")
    assert main(["show", str(path)]) == 2


def test_diff(tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    CKAResult.example().save(first)
    CKAResult.example().select(["conv1", "conv2"]).save(second)
    assert main(["diff", str(first), str(second)]) == 0
    assert "only in the first: fc" in capsys.readouterr().out
    assert main(["diff", str(first), str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["only_first"] == ["fc"]
    assert main(["diff", str(first), str(first), "--exit-code"]) == 0


def test_layers(nets, capsys):
    assert main(["layers", "--model", f"{nets}:net", "--input", "6"]) == 0
    assert "Linear" in capsys.readouterr().out
    assert main(["layers", "--model", f"{nets}:net", "--data", f"{nets}:data"]) == 0
    assert main(["layers", "--model", f"{nets}:net"]) == 2
    assert "--input C,H,W, or --data" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "run", "layers", "record", "show", "diff"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 130
    assert command == "demo" or "examples\n  cka-hooks" in out


def test_a_closed_pipe_is_no_error(tmp_path):
    path = tmp_path / "cka.json"
    CKAResult.example().save(path)
    command = f"{sys.executable} -m cka_hooks show {path} --out {tmp_path / 'x.png'} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=240)
    assert "Traceback" not in done.stderr


def test_a_closed_stdout_is_no_error(tmp_path, monkeypatch):
    CKAResult.example().save(tmp_path / "cka.json")
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["show", str(tmp_path / "cka.json")]) == 0


def test_showing_warnings_is_put_back(nets, tmp_path):
    before = warnings.showwarning
    run(nets, tmp_path, "--quiet")
    assert warnings.showwarning is before


def test_a_command_is_one_function_and_one_word_in_the_table(monkeypatch, capsys):
    def greet(parser):
        """Greet somebody."""
        parser.add_argument("whom")
        parser.set_defaults(command=lambda arguments: print("hello", arguments.whom) or 0)

    monkeypatch.setitem(cli.COMMANDS, "greet", greet)
    assert main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"


def photos(folder):
    for number in range(24):
        kind = folder / ("cat" if number % 2 else "dog")
        kind.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        pytest.importorskip("PIL.Image").fromarray(pixels.numpy()).save(kind / f"{number:02}.png")
    return sorted(folder.rglob("*.png"))


def test_what_was_recorded_is_compared_with(nets, tmp_path, capsys):
    """The same numbers as from both models at once, though the samples come in another order, and fewer of them."""
    photos(tmp_path / "photos")
    data, model = str(tmp_path / "photos"), f"{nets}:of_images"
    file = tmp_path / "recorded.safetensors"
    words = ["record", "--model", model, "--data", data, "--features", "flatten", "--seed", "3", "--out", str(file)]
    assert main([*words, "--batch-size", "7"]) == 0
    assert "3 layers, 24 samples, identified as" in capsys.readouterr().out
    one = ["run", "--model", model, "--data", data, "--samples", "20", "--seed", "1", "--batch-size", "10"]
    assert main([*one, "--against", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "recorded" in capsys.readouterr().out
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert (result.models, result.samples) == (("of_images", "recorded"), 20)
    # The weights are random and those of --seed, so of another seed they are other ones.
    torch.manual_seed(3)
    assert result.rows[3:] == ("recorded/0", "recorded/1", "recorded/2")
    assert result["of_images/0", "recorded/0"] == pytest.approx(1, abs=1e-6)
    assert result["of_images/2", "recorded/2"] < 0.999
    assert main(words) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--quiet", "--samples", "8"]) == 0
    assert main([*one, "--against", str(file), "--out", str(tmp_path / "out2")]) == 2
    assert "has no row for" in capsys.readouterr().err


def test_rows_of_a_file_are_those_of_the_data_set(nets, tmp_path, capsys):
    """In its own order, though samples are drawn from it at random."""
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    words = ("--against", str(tmp_path / "x.npy"), "--layers", "0", "--samples", "64")
    assert run(nets, tmp_path / "a", *words, data="dataset") == 0
    result = CKAResult.load(tmp_path / "a" / "cka.json")
    assert result.rows == ("net/0", "x")
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:64]
    torch.manual_seed(0)
    weights = torch.nn.Linear(6, 5).weight
    with torch.no_grad():
        grams = [
            [oracle.linear_gram(oracle.flatten(y)) for y in (part @ weights.mT, part)] for part in x[order].split(32)
        ]
    assert result["net/0", "x"] == pytest.approx(oracle.cka_minibatch(grams)[0, 1], abs=1e-6)
    np.save(tmp_path / "x.npy", x.numpy()[:64])
    assert run(nets, tmp_path / "b", *words, data="dataset") == 2
    assert "has 64 rows and the data set 100 samples" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["named", "listed"])
def test_a_loader_of_ones_own_names_its_samples(nets, tmp_path, capsys, data):
    key, file = ("id", "1")[data == "listed"], tmp_path / "a.safetensors"
    words = ["record", "--model", f"{nets}:net", "--data", f"{nets}:{data}", "--out", str(file), "--samples", "40"]
    assert main([*words, "--sample-ids", key]) == 0
    assert "3 layers, 40 samples" in capsys.readouterr().out
    words = ("--against", str(file), "--samples", "40")
    assert run(nets, tmp_path / "out", *words, "--sample-ids", key, data=data) == 0
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert result["net/1", "a/1"] == pytest.approx(1, abs=1e-6)
    assert run(nets, tmp_path / "out2", *words, data=data) == 2
    assert "with --sample-ids" in capsys.readouterr().err


def test_a_loader_that_shuffles_a_part_of_a_data_set_names_no_samples(nets, tmp_path, capsys):
    """The order of the part is not that of the loader."""
    nets.write_text(
        nets.read_text()
        + """
def part():
    subset = torch.utils.data.Subset(torch.randn(64, 6), range(40))
    return torch.utils.data.DataLoader(subset, batch_size=8, shuffle=True)
"""
    )
    words = ["record", "--model", f"{nets}:net", "--data", f"{nets}:part", "--out", str(tmp_path / "a.safetensors")]
    assert main(words) == 0
    assert "40 samples, in the order of the loader, without identifiers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.pt"], "ends with .safetensors"),
        (["--out", "nets.py/a.safetensors"], "nets.py is not a folder"),
        (["--out", "a.safetensors", "--data", "empty"], "yielded no batch"),
    ],
)
def test_what_cannot_be_recorded(nets, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    words = [f"{nets}:{word}" if word == "empty" else word for word in words]
    assert main(["record", "--model", f"{nets}:net", "--data", f"{nets}:data", *words]) == 2
    assert message in capsys.readouterr().err


def test_batches_of_one_are_joined(nets, tmp_path, capsys):
    words = ("--batch-size", "1", "--samples", "40")
    assert run(nets, tmp_path / "a", *words, data="dataset") == 2
    assert "--join-batches 32" in capsys.readouterr().err
    assert run(nets, tmp_path / "b", *words, "--join-batches", "8", data="dataset") == 0
    result = CKAResult.load(tmp_path / "b" / "cka.json")
    assert (result.samples, result.minibatches) == (40, 5)


def test_pixels_are_samples(nets, tmp_path, capsys):
    photos(tmp_path / "photos")
    words = ["run", "--model", f"{nets}:of_pixels", "--data", str(tmp_path / "photos"), "--batch-size", "6"]
    words += ["--per", "position", "--positions", "60", "--out", str(tmp_path / "out")]
    assert main([*words, "--minibatch", "8"]) == 2
    assert "--minibatch 8 exclude each other" in capsys.readouterr().err
    assert main(words) == 0
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert (result.samples, result.minibatches) == (240, 4)
    assert result.layers == ("0", "1")


def test_the_dimension_with_the_channels_is_named(nets, tmp_path):
    photos(tmp_path / "photos")
    words = ["run", "--model", f"{nets}:of_pixels", "--data", str(tmp_path / "photos"), "--batch-size", "6"]
    assert main([*words, "--features", "mean", "--channel-dim", "1", "--out", str(tmp_path / "named")]) == 0
    assert main([*words, "--features", "mean", "--channel-dim", "-1", "--out", str(tmp_path / "last")]) == 0
    named, last = (CKAResult.load(tmp_path / name / "cka.json") for name in ("named", "last"))
    assert (named.settings["channel_dim"], last.settings["channel_dim"]) == (1, -1)
    assert named["0", "1"] != last["0", "1"]
