"""Runs that survive: resumed equal to an uninterrupted one, refused where they do not fit, never half written."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import processes
import pytest
import safetensors.torch
import torch
from broken_off import Forward, Stop, kept_after_every_batch, model, run, shuffled, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cka_hooks
from cka_hooks.run import checkpoint as files

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:.* left out")


class Augmented(torch.utils.data.Dataset):
    """Draws from all three random generators."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        return tensors()[index] + torch.randn(12) + random.random() + np.random.rand()


def stateful(**options):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(tensors(), batch_size=8, **options)


def sharded() -> DataLoader:
    sampler = torch.utils.data.DistributedSampler(tensors(), 3, 1, shuffle=True)
    return DataLoader(tensors(), batch_size=8, sampler=sampler)


LOADERS = {
    "list": lambda: list(tensors().split(8)),
    "in order": lambda: DataLoader(tensors(), batch_size=8),
    "shuffled": shuffled,
    "targets": lambda: shuffled(TensorDataset(tensors(), torch.arange(100) % 7)),
    "booleans": lambda: shuffled(TensorDataset(tensors(), tensors()[:, 0] > 0)),
    "augmented": lambda: DataLoader(Augmented(), batch_size=8),
    "generator": lambda: iter(list(tensors().split(8))),
    "stateful": lambda: stateful(),
    "stateful shuffled": lambda: stateful(shuffle=True, generator=torch.Generator().manual_seed(4)),
    "distributed sampler": sharded,
}


def equal(ours: cka_hooks.CKAResult, expected: cka_hooks.CKAResult) -> None:
    torch.testing.assert_close(ours.matrix, expected.matrix, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.stderr, expected.stderr, rtol=0, atol=0, equal_nan=True)
    for name in ("rows", "samples", "minibatches", "passes", "influence", "skipped", "degenerate"):
        assert getattr(ours, name) == getattr(expected, name), name


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("epochs", [1, 2])
def test_resumed_again_and_again_is_equal(tmp_path: Path, kind: str, epochs: int) -> None:
    make = LOADERS[kind]
    if kind == "generator" and epochs == 2:
        pytest.skip("an iterator has one pass")
    whole, forward = run(None, make(), epochs=epochs)
    total = forward.calls
    path = tmp_path / "run.ckpt"
    done = 0
    for stop_at in (1, 4, 2, 3, 5):
        if done + stop_at > total:
            break
        with pytest.raises(Stop):
            run(path, make(), epochs=epochs, stop_at=stop_at)
        done += stop_at - 1
    ours, forward = run(path, make(), epochs=epochs)
    assert forward.calls == total - done, "batches were run twice"
    equal(ours, whole)
    again, forward = run(path, make(), epochs=epochs)
    assert forward.calls == 0
    equal(again, whole)


class Stateful:
    """A loader that knows where it is, as torchdata's does."""

    def __init__(self) -> None:
        self.at, self.read = 0, 0

    def __iter__(self):
        while self.at < 12:
            self.at, self.read = self.at + 1, self.read + 1
            # Augmented: what it draws has to go on, too.
            yield tensors()[(self.at - 1) * 8 : self.at * 8] + torch.rand(())
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_loader_that_knows_where_it_is_reads_nothing_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, _ = run(None, Stateful())
    torch.manual_seed(0)
    with pytest.raises(Stop):
        run(tmp_path / "run.ckpt", Stateful(), stop_at=5)
    torch.manual_seed(7)
    loader = Stateful()
    equal(run(tmp_path / "run.ckpt", loader)[0], whole)
    assert loader.read == 8


def test_a_wrapper_whose_loader_has_no_state(tmp_path: Path) -> None:
    class Wrapper:
        def __init__(self, **options):
            self.loader = DataLoader(tensors(), batch_size=8, **options)
            self.sampler = self.loader.sampler

        def __iter__(self):
            return iter(self.loader)

        def state_dict(self):
            raise AttributeError("the loader has no state")

        load_state_dict = state_dict

    with pytest.raises(Stop):
        run(tmp_path / "run.ckpt", Wrapper(), stop_at=4)
    equal(run(tmp_path / "run.ckpt", Wrapper())[0], run(None, Wrapper())[0])
    with pytest.raises(cka_hooks.OptionError, match="shuffles without a seed"):
        run(tmp_path / "other.ckpt", Wrapper(shuffle=True))


@pytest.mark.parametrize("options", [
    {"max_samples": 50}, {"max_samples": 50, "epochs": 2}, {"minibatch": 4}, {"keep_minibatches": True},
    {"permutations": 20}, {"estimator": "biased"}, {"kernel": "rbf"}, {"tolerance": 0.05}, {"layers": ["0", "2"]},
], ids=str)  # fmt: skip
def test_options_survive(tmp_path: Path, options) -> None:
    data = tensors(800)
    whole, _ = run(None, shuffled(data), **options)
    path = tmp_path / "run.ckpt"
    for stop_at in (3, 3):
        with pytest.raises(Stop):
            run(path, shuffled(data), stop_at=stop_at, **options)
    ours, _ = run(path, shuffled(data), **options)
    equal(ours, whole)
    assert ours.settings.get("stopped") == whole.settings.get("stopped")
    for name in ("minibatch_hsic", "permuted"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=0, atol=0)


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.ckpt"
    with pytest.raises(Stop) as stopped:
        run(path, shuffled(), stop_at=4)
    notes = getattr(stopped.value, "__notes__", ["the same call continues from there"])
    assert "the same call continues from there" in notes[-1]
    with pytest.raises(KeyboardInterrupt, match=r"run\.ckpt up to here: the same call continues from there"):
        run(path, shuffled(), stop_at=2, error=KeyboardInterrupt())
    run(path, shuffled(), progress=True)
    assert "has 32 samples and continues from there" in capsys.readouterr().err
    run(path, shuffled(), progress=True)
    assert "has 100 samples and is finished" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_control_c_at_any_moment_leaves_whole_minibatches(tmp_path: Path) -> None:
    """A real SIGINT, also into the middle of adding up, after some milliseconds of this process's own time."""
    whole, _ = run(None, shuffled(tensors(800)))
    path = tmp_path / "run.ckpt"
    moments = random.Random(0)
    interrupted = 0
    before = signal.signal(signal.SIGPROF, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_PROF, moments.uniform(0.001, 0.06))
                run(path, shuffled(tensors(800)))
                signal.setitimer(signal.ITIMER_PROF, 0)
                break
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert interrupted > 0
    equal(run(path, shuffled(tensors(800)))[0], whole)


@contextmanager
def saving(path: Path) -> Iterator[tuple[BaseProcess, Callable[[], int | None]]]:
    """A process that runs :func:`kept_after_every_batch`, and what waits for its next word: None where it ended."""
    ours, theirs = processes.FRESH.Pipe(duplex=False)

    def next_word() -> int | None:
        assert ours.poll(120), "the process neither goes on nor ends"
        try:
            return ours.recv()
        except EOFError:
            return None

    with processes.spawned(kept_after_every_batch, path, theirs) as process:
        theirs.close()
        yield process, next_word


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_again_and_again(tmp_path: Path, kills: int) -> None:
    """SIGKILL at random moments between two checkpoints: nothing that is in one is lost, no file is half written."""
    torch.set_num_threads(1)
    whole, _ = run(None, shuffled(tensors(4000)))
    path = tmp_path / "run.ckpt"
    moments = random.Random(0)
    killed, ended, last = 0, 0, 0
    while killed < kills:
        with saving(path) as (process, next_word):
            begun = time.monotonic()
            for _ in range(moments.randint(2, 4)):
                begun, before = time.monotonic(), begun
                told = next_word()
            if told is not None:
                time.sleep(moments.uniform(0, begun - before))
                process.kill()
            process.join(60)
            assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            # It came to the end: from the beginning again.
            equal(run(path, shuffled(tensors(4000)))[0], whole)
            path.unlink()
            ended, last = ended + 1, 0
            assert ended < kills
            continue
        killed += 1
        samples = files.read(path)["run"]["comparison"]["state"]["samples"]
        assert samples >= told > last
        last = samples
        left = {file.name for file in tmp_path.iterdir()} - {"run.ckpt", ".run.ckpt.lock"}
        assert len(left) <= 1, "what a process that is killed leaves is removed by the next one"
        assert all(name.startswith(".run.ckpt.") for name in left)
    equal(run(path, shuffled(tensors(4000)))[0], whole)


def test_saved_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by a second a look: what is not in the file is less than the interval."""
    now = [0.0]
    saved = []
    write = files.write
    monkeypatch.setattr(files, "write", lambda path, content: (saved.append(now[0]), write(path, content)))

    class Clock:
        @staticmethod
        def monotonic() -> float:
            now[0] += 1
            return now[0]

    monkeypatch.setattr(files, "time", Clock)
    run(tmp_path / "run.ckpt", shuffled(tensors(800)), checkpoint_every=10.0)
    gaps = [b - a for a, b in pairwise(saved)]
    assert len(saved) >= 9
    assert max(gaps) <= 12


def test_a_failed_write_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        run(path, shuffled(), stop_at=4)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    whole, _ = run(None, shuffled())
    with pytest.warns(cka_hooks.CKAWarning, match="No space left on device.; the run goes on"):
        result, _ = run(path, shuffled(), checkpoint_every=1e-9)
    equal(result, whole)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"], "nothing unfinished is left on the full disk"


def test_links_and_modes_are_kept_and_what_is_planted_is_not_followed(tmp_path: Path) -> None:
    """Somebody's file under the name of a lock or of an unfinished file is as it was."""
    precious, elsewhere, path = tmp_path / "precious", tmp_path / "elsewhere", tmp_path / "run.ckpt"
    precious.write_text("precious")
    whole, _ = run(elsewhere, shuffled())
    elsewhere.chmod(0o640)
    path.symlink_to(elsewhere)
    (tmp_path / ".elsewhere.part").symlink_to(precious)
    equal(run(path, shuffled())[0], whole)
    elsewhere.unlink()
    equal(run(path, shuffled(), checkpoint_every=1e-9)[0], whole)
    assert path.is_symlink()
    elsewhere.unlink()
    with pytest.raises(Stop):
        run(path, shuffled(), stop_at=4)
    elsewhere.chmod(0o640)
    equal(run(path, shuffled())[0], whole)
    assert path.is_symlink()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o640
    assert precious.read_text() == "precious"


def test_two_runs_on_one_file_are_refused_with_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    with saving(path) as (process, next_word):
        assert next_word()
        with pytest.raises(cka_hooks.CheckpointError, match=f"in use by process {process.pid} on "):
            run(path, shuffled(tensors(4000)))
        process.kill()
        process.join(60)
    run(path, shuffled(tensors(4000)))


def test_a_lock_that_somebody_planted_is_not_written_to(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / ".run.ckpt.lock").symlink_to(precious)
    with pytest.raises((OSError, cka_hooks.CKAError)):
        run(tmp_path / "run.ckpt", shuffled())
    assert precious.read_text() == "precious"


FULL_DISK = """
import resource, sys, warnings
import broken_off
warnings.simplefilter("ignore")
path = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
result, _ = broken_off.run(path, broken_off.shuffled(), checkpoint_every=1e-9)
assert result.samples == 100
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("limit", [0, 100])
def test_a_full_disk_loses_no_result(tmp_path: Path, limit: int) -> None:
    words = ("-c", FULL_DISK, str(tmp_path / "run.ckpt"), str(limit))
    done = processes.finished(*words, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    # And that of a run which has ended before.
    run(tmp_path / "run.ckpt", shuffled())
    done = processes.finished(*words, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """As root, only something else under the name of the lock stands in the way."""
    path = tmp_path / "run.ckpt"
    expected, _ = run(path, shuffled())
    (tmp_path / ".run.ckpt.lock").mkdir()
    assert run(path, shuffled())[0].matrix.equal(expected.matrix)
    path.unlink()
    with pytest.raises(cka_hooks.OptionError, match=r"run\.ckpt' cannot be written: .*lock"):
        run(path, shuffled())


@pytest.mark.parametrize("path", ["", ".", 3, b"run.ckpt"], ids=repr)
def test_what_is_no_path(path) -> None:
    with pytest.raises(cka_hooks.OptionError, match=r"checkpoint=.*expected the path of a file"):
        run(path, shuffled())
    with pytest.raises(cka_hooks.OptionError, match=r"checkpoint=.* cannot be written: .*null"):
        run("a\0b", shuffled())


# Refused


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("models", {"net": model(1)}),
        ("parameters", {"net": model(0, width=9)}),
        ("layers", {"layers": ["0", "1"]}),
        ("minibatch", {"minibatch": 4}),
        ("estimator", {"estimator": "biased"}),
        ("kernel", {"kernel": "rbf"}),
        ("features", {"features": "mean"}),
        ("epochs", {"epochs": 2}),
        ("max_samples", {"max_samples": 20}),
        ("tolerance", {"tolerance": 0.5}),
        ("keep_minibatches", {"keep_minibatches": True}),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path: Path, named: str, change) -> None:
    path = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        run(path, shuffled(), stop_at=4)
    with pytest.raises(cka_hooks.CheckpointError, match=rf"another run: .*{named}.* here and .* there"):
        run(path, shuffled(), **change)


class Scaled(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear, self.factor, self.calls = nn.Linear(12, 6), factor, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x).relu() * self.factor


class Bent(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x).tanh() * self.factor


# As after an edit of the file.
Bent.__qualname__ = Scaled.__qualname__


def scaled(factor: float = 1.0, kind: type[Scaled] = Scaled, hook: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = kind(factor).eval()
    if hook:
        net.linear.register_forward_hook(lambda module, args, output: output * 2)
    return net


@pytest.mark.parametrize("other", [lambda: scaled(2.0), lambda: scaled(kind=Bent), lambda: scaled(hook=True)])
def test_a_model_that_computes_otherwise_is_refused(tmp_path: Path, other) -> None:
    path, net = tmp_path / "run.ckpt", scaled()
    with pytest.raises(Stop):
        run(path, shuffled(), stop_at=4, net=net)
    with pytest.raises(cka_hooks.CheckpointError, match=r"another run: models modules is"):
        run(path, shuffled(), net=other())
    # One that counts what it did is the same.
    run(path, shuffled(), net=net)


def test_other_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        run(path, shuffled(), stop_at=4)
    with pytest.raises(cka_hooks.CheckpointError, match=r"loader .* is"):
        run(path, shuffled(tensors(90)))
    with pytest.raises(cka_hooks.CheckpointError, match="the first 3 batches of the loader are not as before"):
        run(path, shuffled(tensors() + 1))
    with pytest.raises(Stop):
        run(tmp_path / "short.ckpt", iter(tensors().split(8)), stop_at=5)
    with pytest.raises(cka_hooks.CheckpointError, match="the first 4 batches of the loader are not as before"):
        run(tmp_path / "short.ckpt", iter(tensors().split(8)[:2]))


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    arrays = [x.numpy() for x in tensors().split(8)]

    def broken_off():
        yield from arrays[:4]
        raise Stop

    options = {"checkpoint": tmp_path / "run.ckpt", "progress": False}
    with pytest.raises(Stop):
        cka_hooks.compare(model(), broken_off(), **options)
    with pytest.raises(cka_hooks.CheckpointError, match="the first 4 batches of the loader are not as before"):
        cka_hooks.compare(model(), iter([x + 1 for x in arrays]), **options)


@pytest.mark.parametrize("loader", [
    lambda: DataLoader(tensors(), batch_size=8, shuffle=True),
    lambda: DataLoader(tensors(), batch_size=8, sampler=torch.utils.data.RandomSampler(range(100))),
    lambda: DataLoader(tensors(), batch_sampler=torch.utils.data.BatchSampler(
        torch.utils.data.RandomSampler(range(100)), 8, False)),
])  # fmt: skip
def test_a_loader_that_shuffles_unseeded_is_refused_before_the_run(tmp_path: Path, loader) -> None:
    forward = Forward()
    with pytest.raises(cka_hooks.OptionError, match=r"generator=torch.Generator\(\).manual_seed\(0\)"):
        cka_hooks.compare(model(), loader(), forward=forward, checkpoint=tmp_path / "run.ckpt", progress=False)
    assert forward.calls == 0


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(cka_hooks.OptionError, match="there is no folder"):
        run(tmp_path / "nowhere" / "run.ckpt", shuffled())
    with pytest.raises(cka_hooks.OptionError, match="checkpoint_every"):
        run(tmp_path / "run.ckpt", shuffled(), checkpoint_every=0)


# Files that somebody else made


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "run.ckpt"
    with pytest.raises(Stop):
        run(path, shuffled(), stop_at=4)
    return path.read_bytes()


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(cka_hooks.CheckpointError) as caught:
        run(path, shuffled())
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_damaged_files(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "run.ckpt"
    for data in (b"", good[:7], good[: len(good) // 2], good[:-1], good + b"\0", os.urandom(1000), b"\xff" * 100):
        refused(path, data)
    refused(path, (1 << 62).to_bytes(8, "little") + good[8:])
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/owned",))

    refused(path, pickle.dumps(Evil()))
    torch.save({"x": torch.ones(2)}, path)
    refused(path, path.read_bytes())
    assert not (tmp_path / "owned").exists()
    path.unlink()
    path.mkdir()
    with pytest.raises(cka_hooks.OptionError, match="a folder"):
        run(path, shuffled())


def test_an_enormous_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    with open(path, "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(cka_hooks.CheckpointError, match="larger than"):
        run(path, shuffled())


def signed(content, tensors=None, **other) -> bytes:
    """A file with a checksum that fits: what somebody makes who knows the format."""
    tensors = tensors or {}
    whole = {"format": files.FORMAT, "version": files.VERSION, "content": content}
    text = json.dumps(whole)
    text = other.get("text", text)
    return safetensors.torch.save(tensors, {"cka_hooks": text, "sha256": files._digest(text, tensors)})


def test_edited_files_and_other_versions(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "run.ckpt"
    assert "edited or damaged" in refused(path, good.replace(b'\\"samples\\": 24', b'\\"samples\\": 25'))
    text = json.dumps({"format": files.FORMAT, "version": 99, "content": {}})
    assert "another version of cka_hooks wrote it" in refused(path, signed(None, text=text))
    assert "RecursionError" in refused(path, signed(None, text="[" * 100000 + "]" * 100000))
    of_version_1 = json.dumps(["dict", ["format", files.FORMAT], ["version", 1], ["content", ["dict"]]])
    assert "another version of cka_hooks wrote it" in refused(path, signed(None, text=of_version_1))
    for text in ("", "3", "null", "{}", "[]", '{"__tensor__": "t9"}', '{"content": {}}', "1.5"):
        refused(path, signed(None, text=text))
    for content in (None, 3, [], {}, {"settings": 3}, {"settings": {}}, "settings"):
        refused(path, signed(content))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FUZZ
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path: Path, good: bytes, data) -> None:
    position = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != good[position]))
    changed = bytearray(good)
    changed[position] = value
    path = tmp_path / "run.ckpt"
    path.write_bytes(changed)
    try:
        content = files.read(path)
    except cka_hooks.CheckpointError:
        return
    # A byte of the header's padding may change nothing.
    path.write_bytes(good)
    assert repr(content) == repr(files.read(path))


@FUZZ
@given(data=st.data())
def test_a_signed_file_with_other_content_is_refused(tmp_path: Path, good: bytes, data) -> None:
    """One entry of a good file replaced by something else, with a checksum that fits."""
    path = tmp_path / "run.ckpt"
    path.write_bytes(good)
    content = files.read(path)
    where = content
    while isinstance(where, dict) and where:
        key = data.draw(st.sampled_from(sorted(where)))
        holder, where = where, where[key]
        if data.draw(st.booleans()):
            break
    holder[key] = data.draw(PLAIN)
    files.write(path, content)
    with suppress(cka_hooks.CKAError):
        run(path, shuffled())


@pytest.mark.parametrize(
    "forge",
    [
        lambda content: content.pop("place"),
        lambda content: content["place"].pop("start"),
        lambda content: content["place"].update(fingerprint=3),
        lambda content: content["settings"].update(models=torch.zeros(2)),
        # NumPy believes a position, and reads beyond its memory.
        lambda content: content["place"]["start"]["numpy"].__setitem__(2, 2**30),
        lambda content: content["place"]["start"]["numpy"].__setitem__(2, -1),
        # Counts below 0 would count samples twice.
        lambda content: content["run"]["comparison"]["state"].update(samples=-8),
        lambda content: content["run"]["comparison"]["state"].update(minibatches=-1),
        lambda content: content["run"]["comparison"].update(counted=[3, -8]),
    ],
)
def test_what_attacks_found_in_signed_files_is_refused(tmp_path: Path, good: bytes, forge) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(good)
    content = files.read(path)
    forge(content)
    files.write(path, content)
    with pytest.raises(cka_hooks.CheckpointError):
        run(path, shuffled())


@FUZZ
@given(value=PLAIN)
def test_what_is_written_is_read(tmp_path: Path, value) -> None:
    path = tmp_path / "x.ckpt"
    files.write(path, {"settings": {}, "value": value})
    assert repr(files.read(path)["value"]) == repr(value)


# The accumulator's own state


def test_state_dict_of_an_accumulator(tmp_path: Path) -> None:
    cka = cka_hooks.CKAAccumulator(keep_minibatches=True)
    other = cka_hooks.CKAAccumulator(keep_minibatches=True)
    batches = [{"x": tensors()[i : i + 8], "y": tensors()[i : i + 8].sin()} for i in range(0, 80, 8)]
    for batch in batches[:5]:
        cka.update(batch)
    torch.save(cka.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[5:]:
        cka.update(batch)
        other.update(batch)
    equal(other.compute(), cka.compute())
    torch.testing.assert_close(other.compute().minibatch_hsic, cka.compute().minibatch_hsic, rtol=0, atol=0)
    with pytest.raises(cka_hooks.OptionError, match="estimator is"):
        cka_hooks.CKAAccumulator(estimator="biased").load_state_dict(cka.state_dict())
    cka.observe("x", tensors()[:8])
    with pytest.raises(cka_hooks.LayerError, match="under way"):
        cka.state_dict()


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x + float(np.random.rand()) + torch.rand_like(x))


def test_a_model_that_draws_goes_on_where_it_was(tmp_path: Path) -> None:
    net = Noisy(*model()).eval()
    whole, _ = run(None, shuffled(), net=net)
    with pytest.raises(Stop):
        run(tmp_path / "run.ckpt", shuffled(), net=net, stop_at=4)
    equal(run(tmp_path / "run.ckpt", shuffled(), net=net)[0], whole)
    assert np.array_equal(np.random.get_state()[1], np.random.RandomState(11).get_state()[1]), "not the caller's"
