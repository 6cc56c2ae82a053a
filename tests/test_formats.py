"""The table of output formats: by suffix, and all files of a run."""

import sys

import processes
import pytest
from made_up import result_of

from cka_hooks import CKAResult, OptionError
from cka_hooks.views import formats

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
    assert str(caught.value).endswith(", ".join(formats.FORMATS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", MAGIC)
def test_a_missing_folder_is_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"no folder .*nowhere.* to write 'cka{suffix}' into"):
        TWO.export(tmp_path / "nowhere" / f"cka{suffix}")


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    def write_lines(result, path):
        path.write_text("\n".join(result.rows))

    monkeypatch.setitem(formats.FORMATS, ".txt", write_lines)
    monkeypatch.setitem(formats.FILES, "labels", "cka.txt")
    TWO.export(tmp_path / "cka.txt")
    assert (tmp_path / "cka.txt").read_text().splitlines() == list(TWO.rows)
    written, failed = formats.export_all(TWO, tmp_path)
    assert written["labels"] == tmp_path / "cka.txt"
    assert failed == {}


def test_the_files_of_a_run(tmp_path):
    written, failed = formats.export_all(TWO, tmp_path)
    assert failed == {}
    assert {name: path.name for name, path in written.items()} == {
        "result": "cka.json",
        "heatmap": "cka.png",
        "page": "cka.html",
        "between": "between.png",
    }
    assert CKAResult.load(written["result"]) == TWO
    assert "between" not in formats.export_all(CKAResult.example(), tmp_path)[0]


def test_what_cannot_be_drawn_never_loses_the_rest(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written, failed = formats.export_all(TWO, tmp_path)
    assert written.keys() == {"result", "page"}
    assert failed.keys() == {"heatmap", "between"}
    assert all('pip install "cka-hooks[plot]"' in reason for reason in failed.values())


def test_a_model_without_layers_loses_one_picture(tmp_path):
    part = TWO.select("a/**")
    assert part.models == ("a",)
    written, failed = formats.export_all(result_of({"a": ["x"], "b": []}), tmp_path)
    assert written.keys() == {"result", "heatmap", "page"}
    assert "no layer of model 'b'" in failed["between"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline_not_here", "no such backend"])
def test_the_backend_of_a_notebook_in_a_plain_environment(tmp_path, backend):
    code = f"""
from pathlib import Path
from cka_hooks.results.result import CKAResult
from cka_hooks.views.formats import export_all
from cka_hooks.errors import MissingExtraError
written, failed = export_all(CKAResult.example(), Path({str(tmp_path)!r}))
assert "result" in written and "page" in written, failed
assert all("matplotlib" in reason for reason in failed.values()), failed
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
