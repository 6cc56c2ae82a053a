"""The site: every public name has its place in it, and the scripts of its pages run."""

import dataclasses
import re
import runpy
import shutil
from pathlib import Path

import pytest

import cka_hooks
from cka_hooks.command import cli

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "howto").glob("[!i]*.md"))
NEEDS = {"language-models": "transformers", "two-networks": "matplotlib", "figures": "matplotlib"}


def script_of(page):
    """The last block of Python on a page: a whole script."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[-1]


@pytest.mark.parametrize("page", [*PAGES, DOCS / "start.md"], ids=lambda page: page.stem)
def test_the_page_is_in_a_table_of_contents(page):
    index = (page.parent / "index.md").read_text(encoding="utf-8")
    assert re.search(rf"^{page.stem}$", index, re.MULTILINE)


@pytest.mark.filterwarnings("ignore::cka_hooks.CKAWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_script_at_the_end_of_a_page_runs(page, capsys, monkeypatch, tmp_path):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(script_of(page), encoding="utf-8")
    runpy.run_path("script.py", run_name="__main__")
    assert capsys.readouterr().out


def test_the_first_script_of_get_started_runs(capsys):
    script = re.findall(r"^```python\n(.*?)^```$", (DOCS / "start.md").read_text(encoding="utf-8"), re.M | re.S)[0]
    exec(compile(script, "start.md", "exec"), {})
    assert "Most alike" in capsys.readouterr().out


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)$", reference, re.MULTILINE))
    assert documented == set(cka_hooks.__all__)


def test_every_picture_of_a_page_is_there():
    for page in DOCS.rglob("*.md"):
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+\.png)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / picture).exists(), f"{page.name}: {picture}"


def test_every_figure_has_the_script_that_makes_it():
    figures = {path.stem for path in (DOCS / "figures").glob("*.png")}
    assert figures == {path.stem for path in (DOCS / "figures").glob("*.py")}
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert [name for name in sorted(figures) if f"figures/{name}.png" not in pages] == []


def test_an_example_runs_for_the_site_or_its_picture_is_stored():
    (stored,) = re.findall(r"^STORED = \((.*?)\)$", (DOCS / "conf.py").read_text(encoding="utf-8"), re.M | re.S)
    assert set(re.findall(r"\w+", stored)) == {path.stem for path in (DOCS / "pictures").glob("*.png")}


def test_the_page_on_the_result_file_names_every_key():
    page = (DOCS / "reference" / "result-file.md").read_text(encoding="utf-8")
    named = {
        name for line in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    }
    fields = {entry.name for entry in dataclasses.fields(cka_hooks.CKAResult)}
    assert named == fields | {"format", "format_version", "sha256"}


def test_the_reference_has_every_command():
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert re.findall(r"^```{cka-help} (\w+)$", page, re.MULTILINE) == sorted(cli.COMMANDS, key=page.index)


def test_the_readme_can_be_read_in_two_minutes():
    assert len((DOCS.parent / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((DOCS / "figures").glob("*.py")), ids=lambda script: script.stem)
def test_the_script_of_a_figure_draws_it(script, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    copied = shutil.copy(script, tmp_path)
    runpy.run_path(copied, run_name="__main__")
    assert (tmp_path / script.name).with_suffix(".png").stat().st_size > 5000
