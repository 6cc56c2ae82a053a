"""The table of output formats: by suffix, and all files of a run."""

import sys

import processes
import pytest
from made_up import result_of

from cka_hooks import CKAResult, OptionError
from cka_hooks.command.shared import FILES, write_all
from cka_hooks.results.result import FORMATS

TWO = result_of({"a": ["x", "y", "z"], "b": ["x", "y"]})
MAGIC = {
    ".json": b"{\n",
    ".png": b"\x89PNG",
    ".svg": b"<?xml",
    ".pdf": b"%PDF",
    ".html": b"<!doc",
    ".csv": b"layer",
    ".npz": b"PK",
}


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_suffix_names_the_format(tmp_path, suffix):
    path = tmp_path / f"cka{suffix.upper()}"
    TWO.export(path)
    assert path.read_bytes().startswith(MAGIC[suffix])


@pytest.mark.parametrize("name", ["cka", "cka.docx", ".json"])
def test_an_unknown_suffix_is_answered_with_all_that_there_are(tmp_path, name):
    with pytest.raises(OptionError) as caught:
        TWO.export(tmp_path / name)
    assert str(caught.value).endswith(", ".join(FORMATS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", MAGIC)
def test_a_missing_folder_is_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"no folder .*nowhere.* to write 'cka{suffix}' into"):
        TWO.export(tmp_path / "nowhere" / f"cka{suffix}")


def test_a_new_format_is_one_entry(tmp_path, monkeypatch, capsys):
    def write_lines(result, path):
        path.write_text("\n".join(result.rows))

    monkeypatch.setitem(FORMATS, ".txt", write_lines)
    monkeypatch.setitem(FILES, "labels", "cka.txt")
    TWO.export(tmp_path / "cka.txt")
    assert (tmp_path / "cka.txt").read_text().splitlines() == list(TWO.rows)
    assert write_all(TWO, tmp_path)["labels"] == str(tmp_path / "cka.txt")
    assert capsys.readouterr().err == ""


def test_the_files_of_a_run(tmp_path, capsys):
    written = write_all(TWO, tmp_path)
    out, err = capsys.readouterr()
    assert err == ""
    assert written == {
        "result": str(tmp_path / "cka.json"),
        "heatmap": str(tmp_path / "cka.png"),
        "page": str(tmp_path / "cka.html"),
        "between": str(tmp_path / "between.png"),
    }
    assert TWO.summary() in out
    assert all(path in out for path in written.values())
    assert CKAResult.load(written["result"]) == TWO
    assert "between" not in write_all(CKAResult.example(), tmp_path)


def test_what_cannot_be_drawn_never_loses_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_all(TWO, tmp_path).keys() == {"result", "page"}
    heatmap, between = capsys.readouterr().err.splitlines()
    assert heatmap.startswith("cka-hooks: could not write the heatmap (cka.png): ")
    assert between.startswith("cka-hooks: could not write the between (between.png): ")
    assert all('pip install "cka-hooks[plot]"' in line for line in (heatmap, between))


def test_a_model_without_layers_loses_one_picture(tmp_path, capsys):
    part = TWO.select("a/**")
    assert part.models == ("a",)
    assert write_all(result_of({"a": ["x"], "b": []}), tmp_path).keys() == {"result", "heatmap", "page"}
    assert "could not write the between (between.png): no layer of model 'b'" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline_not_here", "no such backend"])
def test_the_backend_of_a_notebook_in_a_plain_environment(tmp_path, backend):
    code = f"""
from pathlib import Path
from cka_hooks.results.result import CKAResult
from cka_hooks.command.shared import write_all
from cka_hooks.errors import MissingExtraError
written = write_all(CKAResult.example(), Path({str(tmp_path)!r}), printed=False)
assert "result" in written and "page" in written, written
try:
    CKAResult.example().plot()
except MissingExtraError as error:
    print(error)
else:
    raise AssertionError("shown")
"""
    done = processes.finished("-c", code, env={"MPLBACKEND": backend})
    assert done.returncode == 0, done.stderr
    assert "matplotlib" in done.stdout
    assert all("matplotlib" in line for line in done.stderr.splitlines())
