"""The package as others install it: the clone, the wheels, and which OpenMP runtime the compiled products use."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import cka_hooks
from cka_hooks.similarity.products.native import VARIANTS

ROOT = Path(__file__).parent.parent
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")

COUNTED = """
import re
def runtimes():
    with open("/proc/self/maps") as maps:
        return sorted({line.split()[-1] for line in maps if re.search(r"/lib(gomp|iomp5|omp)\\b[^/]*[.]so", line)})
import torch
before = runtimes()
import cka_hooks
from cka_hooks.similarity.products import _native
compiled, calls = _native.grams, []
_native.grams = lambda *given: (calls.append(1), compiled(*given))[1]
x = torch.randn(64, 4096)
value = cka_hooks.cka(x, 2 * x)
assert abs(value - 1) < 1e-6, value
assert calls, "the compiled products were not used"
assert len(before) == 1, before
assert runtimes() == before, runtimes()
"""

needs_compiled = pytest.mark.skipif(not VARIANTS, reason="the compiled products were not built, or cannot run here")


def run(*words, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(options.pop("env", {}))
    done = subprocess.run(
        [str(word) for word in words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=options.pop("timeout", 600),
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiled
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_compiled_products_run_on_the_one_openmp_runtime_that_torch_brings():
    folder = Path(cka_hooks.__file__).parent.parent
    run(sys.executable, "-c", COUNTED, env={"PYTHONPATH": str(folder)})


@needs_compiled
@pytest.mark.skipif(ROOT not in Path(cka_hooks.__file__).parents, reason="not this clone is installed")
def test_the_check_of_get_started_finds_the_compiled_products_in_the_clone():
    (command,) = re.findall(r"^python (-c \".*VARIANTS.*\")$", START, re.MULTILINE)
    assert run(sys.executable, *shlex.split(command), cwd=ROOT).strip() != "{}"


def test_the_version_is_in_one_place():
    for file in ("pyproject.toml", "CITATION.cff"):
        assert not re.search(r"^version\W+\d", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


# The wheels. `python -m build` and a virtual environment take a minute or two.


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel of what is in the checkout: committed, or about to be."""
    for tool in ("build", "twine"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("package")
    for name in run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source")
    return folder


def environment(folder, wheel):
    """A new virtual environment with the wheel in it; its dependencies are those of the running one.

    They are reached by a path and not installed: PyTorch would take minutes. A folder that is reached so does not
    bring the editable install that is in it, since its own .pth files are not read.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    here = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(here) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_an_sdist_and_a_wheel_for_every_version_of_python(built):
    sdist, wheel = sorted((built / "dist").iterdir(), key=lambda path: path.suffix)
    version = cka_hooks.__version__
    assert sdist.name == f"cka_hooks-{version}.tar.gz"
    assert re.fullmatch(rf"cka_hooks-{version}-cp310-abi3-linux_x86_64\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {str(path.relative_to(built / "source")) for path in (built / "source" / "cka_hooks").rglob("*.*")}
    assert tracked - names == set()
    assert [name for name in names if re.search(r"gomp|\.so", name)] == [
        "cka_hooks/similarity/products/_native.abi3.so"
    ]
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    rest = {
        path
        for folder in ("tests", "examples", "benchmarks", "docs")
        for path in (built / "source" / folder).rglob("*.*")
    }
    assert {str(path.relative_to(built / "source")) for path in rest if path.is_file()} - packed == set()


@pytest.mark.slow
def test_the_wheel_runs_its_demo_without_a_compiler_outside_the_checkout(built, tmp_path):
    (wheel,) = (built / "dist").glob("*.whl")
    python = environment(tmp_path / "env", wheel)
    alone = {"PATH": str(python.parent), "CC": str(tmp_path / "none")}
    out = run(
        python.parent / "cka-hooks", "demo", "--epochs", "1", "--quiet", "--out", "out", cwd=tmp_path, env=alone
    )
    for name in ("cka.json", "cka.png", "between.png", "cka.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert name in out
    where = run(python, "-c", "import cka_hooks; print(cka_hooks.__file__)", cwd=tmp_path, env=alone)
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
    run(python, "-c", COUNTED, cwd=tmp_path, env=alone)


@pytest.mark.slow
def test_where_nothing_can_be_compiled_the_wheel_is_for_every_platform(built, tmp_path):
    (sdist,) = (built / "dist").glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source, env={"CC": "false"})
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"cka_hooks-{cka_hooks.__version__}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]
    python = environment(tmp_path / "env", wheel)
    script = (
        "import torch, cka_hooks; from cka_hooks.similarity.products.native import VARIANTS; "
        "x = torch.randn(16, 40); print(VARIANTS, round(cka_hooks.cka(x, x), 6))"
    )
    assert run(python, "-c", script, cwd=tmp_path).strip() == "{} 1.0"
