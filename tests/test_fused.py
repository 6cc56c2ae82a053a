"""The fused backend without a GPU: its kernels in Triton's interpreter, what is chosen, and how much is launched."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import driver_without_gpu, finished
from test_device import NoHostSync
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cka_hooks
from cka_hooks import CKAAccumulator
from cka_hooks.similarity import products
from cka_hooks.similarity.batch import Minibatches
from cka_hooks.similarity.products import fused
from cka_hooks.similarity.products.reference import Grams
from cka_hooks.similarity.state import DECLARED, State

CHECKS = Path(__file__).parent / "fused_checks.py"
pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
on_linux = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the extra `test` has Triton on Linux only"
)


@on_linux
def test_the_kernels_are_right_in_the_interpreter() -> None:
    first, second = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if first < (3, 7) and second >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 and older needs NumPy 2.3 or older")
    done = finished(str(CHECKS), env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# The largest tile is the first to find no room.
@on_linux
@pytest.mark.parametrize(("capability", "samples"), [(90, (12, 64)), (80, (100,)), (100, (100,))])
def test_the_kernels_compile_and_get_their_arguments(capability: int, samples: Sequence[int], tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    library, environment = driver_without_gpu(tmp_path)
    words = map(str, (CHECKS.with_name("launch_checks.py"), library, capability, *samples))
    done = finished(*words, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@on_linux
def test_triton_is_imported_when_a_tensor_on_a_gpu_comes() -> None:
    code = """
import sys, torch, cka_hooks
cka = cka_hooks.CKAAccumulator()
cka.update({"x": torch.randn(8, 3), "y": torch.randn(8, 5)})
assert "triton" not in sys.modules or "torch._inductor" in sys.modules, "a CPU needs no Triton"
assert "cka_hooks.similarity.products.fused_kernels" not in sys.modules
"""
    done = finished("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


class Launches:
    """Stands for `fused.launch`: counts, and makes what the kernels would, on a CPU and in float64."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.fails_at = -1

    def __call__(self, program: fused.Program, stream: int, tensors: Sequence[Tensor], *numbers: int) -> None:
        self.count[program.kernel] += 1
        if sum(self.count.values()) == self.fails_at + 1:
            raise RuntimeError("no such kernel")
        getattr(self, program.kernel)(program, tensors, *numbers)

    def partial_grams(self, program: fused.Program, tensors: Sequence[Tensor], slot: int) -> None:
        features, partial, norms, scales = tensors
        programs, minibatches, _ = program.grid
        tile, n = program.constants["N"], len(features) // minibatches
        rows = features.double().reshape(minibatches, n, -1)
        slots = slice(slot, slot + programs * minibatches)
        found = torch.zeros(minibatches, programs, tile, tile)
        found[:, 0, :n, :n] = rows @ rows.mT
        partial.view(-1, tile, tile)[slots] = found.flatten(0, 1)
        norms[slots], scales[slots] = 0, 1

    def add_partials(self, program: fused.Program, tensors: Sequence[Tensor]) -> None:
        partial, _, _, table, values, shift = tensors
        tile, (n,) = program.constants["N"], program.numbers
        for slot, slots, row in table.view(-1, 3).tolist():
            found = partial.view(-1, tile, tile)[slot : slot + slots].sum(0)[:n, :n]
            values.view(-1)[row * n * n : (row + 1) * n * n] = found.flatten()
            shift[row] = 0

    def centre_grams(self, program: fused.Program, tensors: Sequence[Tensor]) -> None:
        values, shift, parts, numbers = tensors
        (rows, _, _), (n,) = program.grid, program.numbers
        grams = values[: rows * n * n].view(rows, 1, n, n)
        made = Minibatches.of(("",) * rows, Grams(grams, shift[:rows, None]), "unbiased")
        grams.flatten(2)[..., : made.vectors.shape[-1]] = made.vectors
        numbers[:rows] = made.numbers[:, 0]
        parts[: rows * n] = made.parts.flatten()

    def add_hsic(self, program: fused.Program, tensors: Sequence[Tensor], minibatches: int, positions: int) -> None:
        hsic, numbers, parts, *sums = tensors
        hsic.copy_(hsic.tril() + hsic.tril(-1).mT)
        layers = tuple(map(str, range(len(parts))))
        names = ("moments", "null", "spread", "size", "differ", "seen", "bad", "peak")
        state = State(layers, **dict(zip(names, sums, strict=True)), minibatches=minibatches, samples=positions)
        group = Minibatches(layers, parts, numbers, parts)
        added = {name: DECLARED[name].of(group, hsic) for name in names}
        if not any(program.numbers[3:]):
            added["null"].zero_()
        state.merge(State(layers, **added))
        for name, tensor in zip(names, sums, strict=True):
            tensor.copy_(getattr(state, name))


class OnlyCounted(Launches):
    def partial_grams(self, *_: Any) -> None:
        pass

    add_partials = centre_grams = add_hsic = partial_grams


def taken_on_a_cpu(features: Tensor, minibatches: int) -> bool:
    return features.dtype in fused.PIECES and len(features) <= 128 * minibatches and not fused._failed


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    monkeypatch.setattr(fused, "launch", found)
    monkeypatch.setattr(fused, "takes", taken_on_a_cpu)
    monkeypatch.setattr(fused, "adds_up", lambda vectors: not fused._failed)
    monkeypatch.setattr(fused, "processors_of", lambda device: 4)
    monkeypatch.setattr(fused, "_failed", False)
    return found


def layers_of(samples: int) -> dict[str, Tensor]:
    x = torch.randn(samples, 4, 25)
    return {"x": x, "wide": x.double(), "y": x[:, 1:3] + torch.randn(samples, 2, 25), "half": x.bfloat16()}


def result_of(batches: Sequence[dict[str, Tensor]], **options: Any) -> cka_hooks.CKAResult:
    cka = CKAAccumulator(**options)
    for of_one in batches:
        cka.update(of_one)
    return cka.compute()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"minibatch": 8},
    {"minibatch": 10, "estimator": "biased"},
    {"kernel": "rbf"},
    {"kernel": "rbf", "sigma": 3.0, "minibatch": 8},
    {"kernel": "distance"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_result_is_that_of_pytorch_products(
    options: dict[str, Any], launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are taken and layers that are not, batches of several sizes."""
    batches = [layers_of(samples) for samples in (24, 24, 20, 150, 24)]
    found = result_of(batches, **options)
    assert (launches.count["partial_grams"] > 0) == (options.get("kernel") != "distance")
    monkeypatch.setattr(fused, "takes", lambda features, minibatches: False)
    monkeypatch.setattr(fused, "adds_up", lambda vectors: False)
    expected = result_of(batches, **options)
    assert found.layers == expected.layers == ("x", "wide", "y", "half")
    np.testing.assert_allclose(found.matrix, expected.matrix, atol=1e-6)
    np.testing.assert_allclose(found.stderr, expected.stderr, atol=1e-6)


@pytest.mark.parametrize("fails_at", [*range(6), 7, 8, 9, 14, 15])
def test_where_triton_fails_products_are_pytorchs(launches: Launches, fails_at: int) -> None:
    """With one warning, and nothing that was made before is lost."""
    layers = {str(i): torch.randn(16, 40) + i for i in range(4)}
    expected = result_of([layers] * 2)
    launches.count.clear()
    launches.fails_at = fails_at
    with pytest.warns(cka_hooks.CKAWarning, match="no such kernel.*CKA_HOOKS_FUSED=0") as warned:
        found = result_of([layers] * 2)
    assert len(warned) == 1
    np.testing.assert_allclose(found.matrix, expected.matrix, atol=1e-6)


def test_what_was_added_before_a_failure_does_not_count_twice(launches: Launches) -> None:
    """The last launch is that of the smaller group of a batch."""
    x = torch.randn(20, 40)
    batches = [{"x": x, "y": x[:, :30] + 1}] * 2
    expected = result_of(batches, minibatch=12)
    launches.fails_at = sum(launches.count.values()) - 1
    launches.count.clear()
    with pytest.warns(cka_hooks.CKAWarning, match="no such kernel"):
        found = result_of(batches, minibatch=12)
    assert (found.minibatches, found.samples) == (expected.minibatches, expected.samples) == (4, 40)
    np.testing.assert_allclose(found.stderr, expected.stderr, atol=1e-6)


def test_where_its_buffers_find_no_room_products_are_pytorchs(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "_Lane", no_room)
    x = torch.randn(16, 40)
    assert result_of([{"x": x, "2 x": 2 * x}])["x", "2 x"] == pytest.approx(1)


def test_a_batch_that_broke_off_leaves_nothing(launches: Launches) -> None:
    x, y = torch.randn(16, 40), torch.randn(16, 30)
    cka = CKAAccumulator()
    cka.observe("x", x)
    cka.discard()
    cka.update({"y": y, "x": x})
    assert cka.compute()["x", "y"] == pytest.approx(result_of([{"x": x, "y": y}])["x", "y"])


def test_a_stream_waits_for_its_table(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied on the stream on which matrices are taken, and read on those of the hooks."""
    now, log = [1], list[Any]()
    monkeypatch.setattr(fused, "current_stream", lambda device: now[0])
    monkeypatch.setattr(fused, "_stream", lambda handle, device: SimpleNamespace(wait_stream=log.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=log.append))
    shelf = fused.Shelf(torch.device("cpu"))
    for now[0] in (1, 2):
        shelf.add(torch.randn(16, 1, 40), 1)
    # More layers than in the tables so far.
    shelf.add(torch.randn(16, 1, 40), 1)
    now[0] = 1
    make = shelf._table
    monkeypatch.setattr(shelf, "_table", lambda pending: log.append("table") or make(pending))
    monkeypatch.setattr(fused, "launch", lambda *_: log.append("launch"))
    monkeypatch.setattr(shelf, "_lead", lambda: log.append("lead"))
    shelf.finish()
    assert [it for it in log if isinstance(it, str)] == ["launch", "table", "lead", "launch"]


def test_an_accumulator_can_be_pickled_and_copied(launches: Launches) -> None:
    """As on a CPU, although compiled kernels cannot."""
    batch = {"x": torch.randn(16, 40), "y": torch.randn(16, 30)}
    cka = CKAAccumulator()
    cka.update(batch)
    for group in cka._groups:
        for shelf in group._shelves.values():
            for program, _ in shelf._tables.values():
                program.compiled[0, torch.float32, True] = lambda *_: None
    restored, copied = pickle.loads(pickle.dumps(cka)), copy.deepcopy(cka)
    for one in (restored, copied, cka):
        one.update(batch)
    assert torch.equal(restored.compute().matrix, cka.compute().matrix)
    assert torch.equal(copied.compute().matrix, cka.compute().matrix)


def test_what_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is launched while a CUDA graph is captured does not run, and its buffers would be added up."""
    cka = CKAAccumulator()
    x = torch.randn(16, 40)
    cka.update({"x": x, "2 x": 2 * x})
    with monkeypatch.context() as patch:
        patch.setattr(fused, "is_captured", lambda features: True)
        with pytest.raises(cka_hooks.OptionError, match=r"layer 'x' .* CUDA graph"):
            cka.observe("x", x)
    cka.update({"x": x, "2 x": 2 * x})
    assert cka.compute().samples == 32


# On a pretended GPU


@pytest.fixture
def pretended(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnlyCounted]:
    found = OnlyCounted()
    monkeypatch.setattr(fused, "launch", found)
    monkeypatch.setattr(fused, "current_stream", lambda device: 0)
    with FakeTensorMode():
        if torch.__version__.startswith("2.6."):
            pytest.skip("PyTorch 2.6 asks the CUDA driver about a view of a pretended tensor")
        yield found


def counted(build: Callable[[], nn.Module], inputs: Tensor, **options: Any) -> tuple[Counter[str], Counter[str]]:
    """Operators of PyTorch in the hooks of a later batch, and in its `step`."""
    model = build()
    cka = CKAAccumulator(**options)
    with torch.no_grad(), cka_hooks.LayerRecorder(model, consumer=cka.observe, batch_dim=0):
        for _ in range(2):
            with NoHostSync() as hooks:
                model(inputs)
            with NoHostSync() as step:
                cka.step()
    with torch.no_grad(), NoHostSync() as bare:
        model(inputs)
    return hooks.launches - bare.launches, step.launches


def chain(layers: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(*(nn.Linear(16, 16, dtype=dtype, device="cuda") for _ in range(layers)))


@pytest.mark.parametrize("options", [{}, {"minibatch": 8}, {"kernel": "rbf", "sigma": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_launch_a_layer_and_a_step_that_does_not_grow(
    pretended: OnlyCounted, options: dict[str, Any], dtype: torch.dtype
) -> None:
    def launched(layers: int) -> tuple[int, int, int]:
        pretended.count.clear()
        inputs = torch.randn(32, 16, device="cuda", dtype=dtype)
        hooks, step = counted(lambda: chain(layers, dtype), inputs, **options)
        # The very first layer is launched once more, to see that it can be.
        return pretended.count["partial_grams"] - 1, sum(hooks.values()), sum(step.values())

    few, many = launched(10), launched(60)
    assert few[0] == 2 * 10
    assert many[0] == 2 * 60
    assert few[1] == many[1] == 0
    assert few[2] == many[2]
    # Of both batches, and of the very first layer.
    assert pretended.count["add_partials"] == 3
    assert pretended.count["add_hsic"] == 2
    if options.get("kernel") is None:
        assert pretended.count["centre_grams"] == 2
        # And one product.
        assert many[2] == 1


class Allocations(TorchDispatchMode):
    """Counts tensors whose memory is none that an operator was given."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))

        def memory(values: Any) -> set[int]:
            return {it.untyped_storage()._cdata for it in tree_leaves(values) if isinstance(it, Tensor)}

        self.count[func.overloadpacket.__name__] += len(memory(out) - memory((args, kwargs)))
        return out


@pytest.mark.parametrize("minibatch", [None, 12])
@pytest.mark.parametrize("layers", [3, 300])
def test_nothing_is_allocated_from_the_second_batch_on(
    pretended: OnlyCounted, layers: int, minibatch: int | None
) -> None:
    """One group of minibatches and two, and a batch of another size between."""
    model = chain(layers)
    cka = CKAAccumulator(minibatch=minibatch)
    counts = []
    with torch.no_grad(), cka_hooks.LayerRecorder(model, consumer=cka.observe, batch_dim=0):
        for samples in (32, 20, 32, 20, 32):
            model(torch.randn(samples, 16, device="cuda"))
            with Allocations() as allocated:
                cka.step()
            counts.append(+allocated.count)
    assert counts[0]
    assert not any(counts[2:])


def test_a_run_may_move_to_another_gpu(pretended: OnlyCounted) -> None:
    cka = CKAAccumulator()
    for number in (0, 1, 0):
        x = torch.randn(32, 40, device=f"cuda:{number}")
        cka.update({"x": x, "y": x[:, :20]})
    assert cka.state.moments.device == torch.device("cuda:0")
    assert cka.minibatches == 3


def test_padded_text_is_added_up_by_one_table(pretended: OnlyCounted) -> None:
    """The same programs for every length, so that `add_partials` is told nothing new."""
    cka = CKAAccumulator()
    for length in (40, 56, 33):
        with NoHostSync() as counted_here:
            cka.observe("x", torch.randn(32, length, 64, device="cuda"))
            cka.observe("y", torch.randn(32, length, 32, device="cuda"))
        cka.step()
    assert "_to_copy" not in counted_here.launches
    assert "stack" not in counted_here.launches


# What is taken


def test_what_a_kernel_can_read_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_runs_on", lambda index: True)
    monkeypatch.setattr(fused, "_failed", False)
    with FakeTensorMode():
        fake = torch.empty(8, 1, 4, device="cuda")
        assert not fused.takes(fake, 1)
        # As if it were there.
        monkeypatch.setattr(fused, "Tensor", type(fake))
        assert fused.takes(fake, 1)
        assert fused.takes(torch.empty(512, 1, 4, device="cuda"), 4)
        assert not fused.takes(torch.empty(129, 1, 4, device="cuda"), 1)
        assert not fused.takes(torch.empty(8, 1, 0, device="cuda"), 1)
        assert not fused.takes(fake.double(), 1)
        assert not fused.takes(torch.empty(8, 1, 4, device="cpu"), 1)
        assert not fused.takes(torch.empty(8, 1, 4, device="cuda", requires_grad=True), 1)


def test_it_is_compiled_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded text has another length in each batch, and Triton's own way takes longer than the launch."""
    compiled: list[int] = []
    launched: list[tuple[int, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *numbers, stream: launched.append(numbers)

    class Jitted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            return lambda *tensors_and_numbers, **constants: compiled.append(1) or Compiled()

    monkeypatch.setattr(fused, "_kernels", lambda: SimpleNamespace(partial_grams=Jitted(), TAKES_CONSTANTS=True))
    monkeypatch.setattr(fused, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    for length in (7, 8, 9, 7):
        x = torch.zeros(16, length, 64)
        program = fused.program_of(x.shape, x.stride(), x.dtype, 1, 132)
        fused.launch(program, 0, (x,), 5)
    assert len(compiled) == 1
    assert [numbers[:2] for numbers in launched[-1:]] == [(x.data_ptr(), 5)]
    assert launched[-1][2:] == (*program.numbers, *program.constants.values())
    assert len(launched) == 3
    # Another kernel: positions that lie apart.
    x = torch.zeros(16, 14, 64)[:, ::2]
    fused.launch(fused.program_of(x.shape, x.stride(), x.dtype, 1, 132), 0, (x,), 5)
    assert len(compiled) == 2
    # And two of one width, which reads as it is, with elements of two sizes.
    for x in (torch.zeros(16, 1, 7), torch.zeros(16, 1, 7).half()):
        fused.launch(fused.program_of(x.shape, x.stride(), x.dtype, 1, 132), 0, (x,), 5)
    assert len(compiled) == 4


def test_the_handle_0_is_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch makes a new stream of it, on which a kernel would not wait for the features."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    device = torch.device("cuda", 1)
    assert fused._stream(0, device) == ("default", device)
    assert fused._stream(77, device) == (77, device)


def test_the_variable_leaves_it_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    runs_on = fused._runs_on.__wrapped__
    assert runs_on(0)
    monkeypatch.setenv("CKA_HOOKS_FUSED", "0")
    assert not runs_on(0)


def test_a_gpu_without_products_in_bfloat16_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not fused._runs_on.__wrapped__(0)


def test_without_triton_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_failed", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setitem(sys.modules, "cka_hooks.similarity.products.fused_kernels", None)
    # Where another test has imported it.
    monkeypatch.delattr(products, "fused_kernels", raising=False)
    monkeypatch.setattr(fused, "_kernels", fused._kernels.__wrapped__)
    with pytest.warns(cka_hooks.CKAWarning, match="Triton cannot be used here"):
        assert not fused._runs_on.__wrapped__(0)
    # Warnings are errors here.
    assert not fused._runs_on.__wrapped__(1)
