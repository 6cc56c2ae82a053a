"""The command line and what others wrote: files made to harm or made by mistake, terminals, earlier results."""

import io
import json
import os
import subprocess

import processes
import pytest
import torch

from cka_hooks import CKAResult
from cka_hooks.command.cli import main, parser
from cka_hooks.command.inputs import SpecError, load_model, load_weights, loader_of
from cka_hooks.command.shared import say

pytestmark = pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")

USER_FILE = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
state = net.state_dict()
loader = torch.utils.data.DataLoader(torch.randn(64, 6), batch_size=16)
dataset = torch.utils.data.TensorDataset(torch.randn(64, 6))

def of_images():
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(588, 5))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

def same():
    return net

def fails():
    return nn.Sequential(nn.Linear(7, 2))

def leaves():
    sys.exit(0)

def odd_label():
    made = nn.Sequential(nn.Linear(6, 5))
    made.add_module("\\u5c42\\x1b[2J", nn.Linear(5, 2))
    return made

def bad():
    class Bad(nn.Module):
        def forward(self, x):
            return x / 0
    return nn.Sequential(nn.Linear(6, 5), Bad())
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(USER_FILE)
    return path


def run(nets, out, *words, model="net", data="loader"):
    return main(
        ["run", "--quiet", "--model", f"{nets}:{model}", "--data", f"{nets}:{data}", "--out", str(out), *words]
    )


# Earlier results


@pytest.mark.parametrize("file", ["cka.json", "cka.png"])
def test_run_keeps_an_earlier_result_unless_told(nets, tmp_path, capsys, file):
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_text("of the earlier run")
    assert run(nets, out, model="missing") == 2  # before anything is loaded
    assert f"already holds {file}: pass --overwrite" in capsys.readouterr().err
    assert (out / file).read_text() == "of the earlier run"
    assert run(nets, out, "--overwrite") == 0
    assert CKAResult.load(out / "cka.json").samples == 64


def test_the_demo_keeps_an_earlier_result(tmp_path, capsys):
    (tmp_path / "cka.json").write_text("of the earlier run")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "file/below"], "file is not a folder that can be written to"),
        (["--out", "full"], "full already holds cka.json: pass --overwrite"),
    ],
)
def test_a_file_that_could_not_be_written_is_named_before_the_run(
    nets, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cka.json").write_text("")
    assert run(nets, "out", *words, model="missing") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path, capsys):
    missing = str(tmp_path / "missing.json")
    assert main(["show", missing]) == 2
    assert capsys.readouterr().err == f"cka-hooks: [Errno 2] No such file or directory: '{missing}'\n"


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_show_names_a_missing_folder(tmp_path, capsys, option):
    CKAResult.example().save(tmp_path / "cka.json")
    assert main(["show", str(tmp_path / "cka.json"), option, str(tmp_path / "gone" / "x.png")]) == 2
    captured = capsys.readouterr()
    assert f"there is no folder '{tmp_path}/gone' to write 'x.png' into" in captured.err
    assert captured.out == ""


def test_pictures_that_cannot_be_drawn_lose_nothing_and_leave_the_exit_code(nets, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("no such backend")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    assert run(nets, tmp_path / "out") == 0
    assert "cka.png cannot be drawn: no such backend" in capsys.readouterr().err
    assert CKAResult.load(tmp_path / "out" / "cka.json").samples == 64
    assert (tmp_path / "out" / "cka.html").exists()
    assert run(nets, tmp_path / "bad", model="bad") == 1


def test_the_backend_of_a_notebook_is_left_out(tmp_path):
    CKAResult.example().save(tmp_path / "cka.json")
    words = ["show", str(tmp_path / "cka.json"), "--out", str(tmp_path / "x.png")]
    environment = {**os.environ, "MPLBACKEND": "module://not_installed.backend"}
    done = processes.finished("-m", "cka_hooks", *words, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


# Terminals


def test_control_characters_are_spelled_out(capsys):
    say("conv1\x1b[2J\r\x07\x9b\u202e\x7f\n層")
    assert capsys.readouterr().out == "conv1\\x1b[2J\\r\\x07\\x9b\\u202e\\x7f\n層\n"


@pytest.fixture
def hostile(tmp_path):
    path = tmp_path / "cka.json"
    example = CKAResult.example(models=("a", "b"))
    label = "a/\x1b]0;owned\x07\x9b2J層"
    labels = (label, *example.rows[1:])
    result = CKAResult(
        **{
            **{name: getattr(example, name) for name in example.__dataclass_fields__},
            "rows": labels,
            "columns": labels,
            "influence": {},
            "skipped": {"a/x": "because \x1b[31m"},
        }
    )
    result.save(path)
    return path


def test_what_a_file_holds_does_not_steer_the_terminal(hostile, tmp_path, capsys):
    CKAResult.example(models=("a", "b")).save(tmp_path / "other.json")
    assert main(["show", str(hostile)]) == 0
    assert main(["diff", str(hostile), str(tmp_path / "other.json")]) == 0
    assert main(["diff", "--json", str(hostile), str(tmp_path / "other.json")]) == 0
    assert main(["show", str(hostile), "--layers", "\x1b[2J"]) == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "\\x1b]0;owned\\x07" in text
    assert not [c for c in text if not c.isprintable() and c != "\n"]


def test_an_ascii_terminal_gets_escapes(hostile, nets, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    words = ["run", "--model", f"{nets}:odd_label", "--data", f"{nets}:loader", "--out", str(tmp_path / "out")]
    code = f"from cka_hooks.command.cli import main; assert main({['show', str(hostile)]}) == main({words}) == 0"
    done = processes.finished("-c", code, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u5c64" in done.stdout
    assert "\\u5c42\\x1b[2J" in done.stdout


def test_a_stream_without_an_encoding_is_printed_to():
    stream = io.StringIO()
    say("層", file=stream)
    assert stream.getvalue() == "層\n"


# Models and weights


def test_a_module_and_a_class_in_a_file_are_models(nets, tmp_path):
    for model in ("net", "Net"):
        assert run(nets, tmp_path / model, model=model) == 0
        assert CKAResult.load(tmp_path / model / "cka.json").layers == ("0", "1", "2")
    assert run(nets, tmp_path / "set", data="dataset") == 0


@pytest.mark.parametrize("model", ["net", "same"])
def test_two_weights_for_one_module_stay_two(nets, tmp_path, model):
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save({f"{i}.{name}": torch.randn(shape) for i, name, shape in SHAPES}, tmp_path / f"{seed}.pt")
    words = ("--weights", f"{tmp_path}/1.pt", "--against-weights", f"{tmp_path}/2.pt")
    assert run(nets, tmp_path / "out", *words, "--against", f"{nets}:{model}", model=model) == 0
    result = CKAResult.load(tmp_path / "out" / "cka.json")
    assert result.models == (f"{model}-1", f"{model}-2")
    assert result[f"{model}-1/0", f"{model}-2/0"] < 0.99


SHAPES = [(0, "weight", (5, 6)), (0, "bias", (5,)), (2, "weight", (2, 5)), (2, "bias", (2,))]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("state", "is of type OrderedDict: expected an nn.Module or a function that returns one; pass weights"),
        ("loader", "is of type DataLoader: expected an nn.Module"),
        ("leaves", "SystemExit: 0 (--debug shows where)"),
        ("fails", "--debug shows where"),
    ],
)
def test_what_is_no_model_is_said(nets, tmp_path, capsys, model, message):
    assert run(nets, tmp_path / "out", model=model) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_where_and_keeps_the_exit_code(nets, tmp_path, capsys):
    assert run(nets, tmp_path / "out", "--debug", model="fails") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_file_of_weights_is_no_model(tmp_path):
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(SpecError, match="names nothing that can be loaded"):
        load_model(str(tmp_path / "w.pt"))


def odd_files(folder):
    torch.save({1: torch.zeros(2)}, folder / "numbered.pt")
    torch.save(torch.zeros(2), folder / "tensor.pt")
    torch.save([torch.zeros(2)], folder / "list.pt")
    torch.save({}, folder / "nothing.pt")
    torch.save({"a": torch.zeros(2), "b": 3}, folder / "number.pt")
    torch.save({"state_dict": 3}, folder / "nested.pt")
    torch.save(dict.fromkeys(("0.weight", "0.bias")), folder / "none.pt")
    torch.save({"weight": torch.zeros(3, 3)}, folder / "shape.pt")
    torch.save({"weight": torch.zeros(2, 2).to_sparse(), "bias": torch.zeros(2)}, folder / "sparse.pt")
    torch.save({"weight": torch.zeros(2, 2, device="meta"), "bias": torch.zeros(2)}, folder / "meta.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.pt").write_text("weights")
    (folder / "cut.pt").write_bytes((folder / "list.pt").read_bytes()[:-30])
    (folder / "zip.pt").write_bytes(b"PK\x03\x04" + b"\0" * 60)
    (folder / "folder.pt").mkdir()
    return sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors"))


# torch's own, of TorchScript's age and of checking a sparse tensor.
@pytest.mark.filterwarnings(
    "ignore::FutureWarning:torch", "ignore::UserWarning:torch", "ignore:'torch.load' received"
)
def test_an_odd_file_of_weights_is_our_error(tmp_path):
    files = odd_files(tmp_path)
    assert len(files) == 17
    for path in files:
        with pytest.raises(SpecError, match=path.name) as error:
            load_weights(torch.nn.Linear(2, 2), path)
        assert "\n" not in str(error.value)


# Numbers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", str(2**63)], f"expected a whole number from 0 to {2**63 - 1}, got {2**63}"),
        (["--seed", "-1"], "expected a whole number from 0"),
        (["--seed", "1" * 5000], f"got {'1' * 40}\n"),
        (["--samples", "many"], "expected a whole number from 1"),
        (["--workers", "-1"], "expected a whole number from 0"),
        (["--batch-size", "2.5"], "expected a whole number from 1"),
        (["--device", "nowhere"], "nowhere cannot be used ("),
        (["--minibatch", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_number_out_of_range_is_a_usage_error(nets, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        run(nets, tmp_path, *words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--tolerance", "inf"], ["--tolerance", "nan"], ["--samples", "3"]])
def test_options_are_refused_before_anything_is_loaded(nets, tmp_path, capsys, words):
    assert run(nets, tmp_path / "out", *words, model="missing") == 2
    assert f"{words[0]} {words[1]}: expected a" in capsys.readouterr().err
    CKAResult.example().save(tmp_path / "cka.json")
    assert main(["diff", str(tmp_path / "cka.json"), str(tmp_path / "cka.json"), "--level", "95"]) == 2
    assert "expected a number between 0 and 1" in capsys.readouterr().err


def test_the_largest_numbers_work(nets, tmp_path):
    words = ["--seed", str(2**63 - 1), "--samples", str(2**63 - 1), "--minibatch", str(10**6)]
    assert run(nets, tmp_path / "out", *words, "--against", f"{nets}:Net", data="dataset") == 0


def test_input_shape_is_checked(nets, capsys):
    for shape in ("3,-1", "x", ""):
        with pytest.raises(SystemExit):
            main(["layers", "--model", f"{nets}:net", "--input", shape])
        assert "argument --input: expected a whole number from 1" in capsys.readouterr().err


# Data


def test_a_tolerance_that_was_not_reached_is_said(nets, tmp_path, capsys):
    assert run(nets, tmp_path / "a", "--tolerance", "1e-9") == 0
    assert "--tolerance was not reached before the data ended: the largest" in capsys.readouterr().err
    assert run(nets, tmp_path / "b", "--tolerance", "1e-9", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tolerance_reached"] is False
    assert run(nets, tmp_path / "c", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tolerance_reached"] is None


@pytest.fixture
def photos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        pixels = torch.randint(100, 110, (8, 8, 3), generator=generator, dtype=torch.uint8)
        if i == 5:
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return folder


def test_a_sample_that_decides_is_named_by_its_file(nets, photos, tmp_path, capsys):
    words = ["--quiet", "--data", str(photos), "--minibatch", "16", "--batch-size", "16"]
    assert main(["run", "--model", f"{nets}:of_images", *words, "--out", str(tmp_path / "out")]) == 0
    found = CKAResult.load(tmp_path / "out" / "cka.json").influence.values()
    ((sample, name),) = {(one.sample, one.identifier) for one in found}
    assert name == "05.png"
    assert f"sample {sample} of the run ('05.png') alone accounts" in " ".join(capsys.readouterr().out.split())


def loader_over(folder):
    words = ["run", "--model", "none", "--data", str(folder), "--batch-size", "4", "--samples", "all"]
    return loader_of(parser().parse_args(words), None)


def test_postscript_with_another_name_starts_no_program(photos, monkeypatch):
    (photos / "00.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")

    def started(*_, **__):
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(SpecError, match=r"00\.png as an image"):
        list(loader_over(photos))


def test_a_picture_that_would_fill_the_memory_is_our_error(photos, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(SpecError, match="DecompressionBombError"):
        next(iter(loader_over(photos)))
