"""Recorders on a model of somebody: threads, backward passes, vmap, Ctrl-C, train mode, and what is left behind."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import SmallNet, image_batches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cka_hooks
from cka_hooks.recording import guest

pytestmark = pytest.mark.filterwarnings(
    "ignore:one sample decides",
    # Reentrant checkpoints inside one another.
    "ignore:None of the inputs have requires_grad",
    # PyTorch's own, of its `torch.func.jvp`.
    "ignore:`torch.jit.script` is deprecated",
)


def ignored(layer: str, activation: Tensor) -> None:
    pass


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def inputs(count: int = 4, samples: int = 16, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, width, generator=generator) for _ in range(count)]


def against_oracle(result: cka_hooks.CKAResult, model: nn.Module, batches: list[Tensor]) -> None:
    labels, matrix, _ = oracle.cka_of_model(model, batches)
    assert list(result.layers) == labels
    torch.testing.assert_close(result.matrix, torch.as_tensor(matrix), rtol=0, atol=1e-6)


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What the work returns or raises in a thread of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="another one")
    thread.start()
    thread.join(60)
    return found[0]


# Threads


class Meanwhile(nn.Module):
    """In the middle of a forward pass another thread does something."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self.work = work
        self.found: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            self.found.append(in_a_thread(self.work))
        return x


def test_inference_in_another_thread_is_not_recorded() -> None:
    model = nn.Sequential(*net(), nn.Identity())
    expected = cka_hooks.compare(model, inputs(), progress=False)
    model[3] = Meanwhile(lambda: model(torch.randn(3, 4)))
    result = cka_hooks.compare(model, inputs(), layers=["0", "1", "2", "3"], progress=False)
    assert [tuple(found.shape) for found in model[3].found] == [(3, 3)] * 4
    assert torch.equal(result.matrix, expected.matrix)
    model[3].found.clear()
    cka = cka_hooks.CKAAccumulator()
    with cka_hooks.LayerRecorder(model, consumer=cka.observe):
        for x in inputs():
            model(x)
            cka.step()
    assert len(model[3].found) == 4
    assert torch.equal(cka.compute().matrix, expected.matrix)


def test_a_model_is_measured_in_one_thread_at_a_time() -> None:
    part = net()
    meanwhile = Meanwhile(lambda: cka_hooks.compare(part, inputs(), progress=False))
    model = nn.Sequential(part, meanwhile)
    assert part.training
    expected = cka_hooks.compare(part, inputs(), progress=False)
    result = cka_hooks.compare(model, inputs(), layers=["0.0", "0.1", "0.2"], progress=False)
    assert torch.equal(result.matrix, expected.matrix)
    assert len(meanwhile.found) == 4
    for refused in meanwhile.found:
        assert isinstance(refused, cka_hooks.ModelError)
        assert "being measured in thread 'MainThread'" in str(refused)
        assert "copy.deepcopy(model)" in str(refused)
    assert part.training
    # Afterwards, or another model, or a copy.
    assert torch.equal(in_a_thread(meanwhile.work).matrix, expected.matrix)
    with cka_hooks.LayerRecorder(part, consumer=ignored):
        assert torch.equal(
            in_a_thread(lambda: cka_hooks.compare(net(), inputs(), progress=False)).matrix, expected.matrix
        )
        for use in (
            cka_hooks.LayerRecorder(part, consumer=ignored).__enter__,
            lambda: guest.untouched(model).__enter__(),
        ):
            assert isinstance(in_a_thread(use), cka_hooks.ModelError)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_thread_that_ended_measures_nothing() -> None:
    model = net()
    recorder = cka_hooks.LayerRecorder(model, consumer=ignored)
    in_a_thread(recorder.__enter__)
    assert cka_hooks.compare(model, inputs(), progress=False).samples == 64
    recorder.__exit__(None, None, None)


def test_two_recorders_in_one_thread_and_one_inside_a_run() -> None:
    model, inner = net(), []

    def forward(model: nn.Module, batch: Tensor) -> None:
        inner.append(next(iter(cka_hooks.LayerRecorder(model, "0").stream([batch])))["0"])
        model(batch)

    result = cka_hooks.compare(model, inputs(), forward=forward, progress=False)
    # The last one, since a probe of the first batch runs on parts of it.
    assert torch.equal(inner[-1], model[0](inputs()[-1]))
    # For the one outside, every call of a module inside of its own pass is one.
    assert result.layers == ("0", "1", "2", "0#2", "1#2", "2#2")
    expected = cka_hooks.compare(model, inputs(), progress=False).matrix
    torch.testing.assert_close(result.matrix, expected.repeat(2, 2), rtol=0, atol=1e-12)


def test_calls_in_other_threads_only_are_left_out_with_the_reason() -> None:
    """As `nn.DataParallel` makes them on several devices."""
    model = net()
    recorder = cka_hooks.LayerRecorder(model, ["0", "2"], ignored)
    with recorder:
        in_a_thread(lambda: model(inputs()[0]))
        model.forward = lambda x: x
        model(inputs()[0])
    assert set(recorder.skipped) == {"0", "2"}
    assert "ran in a different thread" in recorder.skipped["0"]
    assert "nn.DataParallel" in recorder.skipped["0"]


def test_inputs_in_other_threads_are_not_recorded() -> None:
    model, seen = net(), []
    with cka_hooks.LayerRecorder(model, ["2:input"], lambda label, activation: seen.append(label)):
        in_a_thread(lambda: model(inputs()[0]))
        assert not seen
        model(inputs()[0])
    assert seen == ["2:input"]


# Backward passes


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(x)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("step", ["before backward", "after backward"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_activation_checkpointing(reentrant: bool | None, step: str, whole: bool) -> None:
    """The backward pass calls modules again: no further layers, and nothing counted twice."""
    model, batches = Checkpointed(reentrant), [*inputs(3), inputs(1, samples=12)[0]]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    cka = cka_hooks.CKAAccumulator()
    recorder = cka_hooks.LayerRecorder(model, consumer=cka.observe)
    with recorder:
        for x in batches:
            x.requires_grad_()
            out = checkpoint(model, x, use_reentrant=bool(reentrant)) if whole else model(x)
            if step == "before backward":
                cka.step()
            out.square().mean().backward()
            optimiser.step()
            if step == "after backward":
                cka.step()
    assert model.blocks[0][0].weight.grad is not None
    assert not recorder.skipped
    result = cka.compute()
    assert (result.samples, result.minibatches) == (60, 4)
    against_oracle(result, Checkpointed(None).eval(), [x.detach() for x in batches])


# torch.func


class PerSample(nn.Module):
    def __init__(self, width: int, transform: Callable[..., Any] = torch.vmap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, width), nn.Linear(width, 3)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transform(lambda row: torch.tanh(self.inner(row)))(self.stem(x)))


def jvp_of_vmap(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.jvp(torch.vmap(function), (x,), (x,))[0]


def vmap_of_jvp(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.vmap(lambda row: torch.func.jvp(function, (row,), (row,))[0])


@pytest.mark.parametrize("transform", [torch.vmap, jvp_of_vmap, vmap_of_jvp])
@pytest.mark.parametrize("width", [7, 16])
def test_a_layer_under_vmap_is_left_out(width: int, transform: Callable[..., Any]) -> None:
    """Also where it is as wide as the batch: what a hook sees there is one sample."""
    model = PerSample(width, transform).eval()
    result = cka_hooks.compare(model, inputs(), progress=False)
    assert result.layers == ("stem", "head")
    assert "ran under torch.vmap" in result.skipped["inner"]
    with pytest.raises(cka_hooks.LayerError, match=r"'inner' \(Linear\) cannot be recorded: ran under torch\.vmap"):
        cka_hooks.compare(model, inputs(), layers=["stem", "inner"], progress=False)
    outside = PerSample(width, lambda function: lambda x: x.new_tensor(function(x).tolist()))
    expected = cka_hooks.compare(outside.eval(), inputs(), layers=["stem", "head"], progress=False)
    torch.testing.assert_close(result.matrix, expected.matrix, rtol=0, atol=1e-6)


def test_a_layer_under_vmap_in_a_later_batch() -> None:
    model = PerSample(6, lambda function: function).eval()
    layers = []
    recorder = cka_hooks.LayerRecorder(model, consumer=lambda layer, activation: layers.append(layer))
    with recorder:
        model(inputs()[0])
        model.transform = torch.vmap
        model(inputs()[0])
        assert "torch.vmap" in recorder.skipped["inner"]
        model.transform = lambda function: function
        model(inputs()[0])
    assert layers == ["stem", "inner", "head", "stem", "head", "stem", "inner", "head"]
    assert not recorder.skipped


def test_a_layer_under_jvp_is_recorded() -> None:
    model = PerSample(6, lambda function: lambda x: torch.func.jvp(function, (x,), (x,))[0]).eval()
    result = cka_hooks.compare(model, inputs(), progress=False)
    expected = cka_hooks.compare(PerSample(6, lambda function: function).eval(), inputs(), progress=False)
    assert result.layers == expected.layers
    torch.testing.assert_close(result.matrix, expected.matrix, rtol=0, atol=1e-6)


# Compiled code


def test_recorders_left_out_of_order_let_compiled_code_run_again() -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    model = torch.compile(net(), backend=backend)
    first, second = (cka_hooks.LayerRecorder(model, consumer=ignored) for _ in range(2))
    first.__enter__()
    second.__enter__()
    model(inputs()[0])
    first.__exit__(None, None, None)
    model(inputs()[0])
    assert not compiled, "hooks do not fire in compiled code"
    second.__exit__(None, None, None)
    model(inputs()[0])
    assert compiled
    torch._dynamo.reset()


# Ctrl-C


PACKAGE = str(Path(cka_hooks.__file__).parent)
SET_UP_AND_TEAR_DOWN = {
    "__enter__",
    "__exit__",
    "_attach",
    "_leave",
    "_listen",
    "_run",
    "_write_back",
    "attach",
    "claim",
    "detach",
    "over",
    "release",
    "remove_hooks",
}


class CtrlC:
    """Raises KeyboardInterrupt in the n-th line that is run of what comes before and after forward passes."""

    def __init__(self, number: int, functions: Collection[str]) -> None:
        self.left = number
        self.functions = functions

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_name not in self.functions or not code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self

    def interrupts(self, work: Callable[[], object]) -> bool:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def left_behind(model: nn.Module) -> list[str]:
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return hooked + [name for name, module in model.named_modules() if not module.training]


def broken_off_everywhere(model: nn.Module, work: Callable[[], object], functions: Collection[str]) -> int:
    """Break the work off at each of its lines, after none of which anything is left behind; how many there are."""
    number = 0
    while CtrlC(number, functions).interrupts(work):
        assert not left_behind(model), f"after line {number}"
        # Another thread may measure it now.
        assert in_a_thread(lambda: guest.claim(model, model)) is None
        guest.release(model)
        number += 1
    assert not left_behind(model)
    return number


@pytest.mark.parametrize("use", ["stream", "describe", "compare"])
def test_ctrl_c_at_any_line_leaves_nothing_behind(use: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    recorder = cka_hooks.LayerRecorder(model)
    (x,) = inputs(1)
    uses: dict[str, Callable[[], object]] = {
        "stream": lambda: list(recorder.stream([x])),
        "describe": lambda: recorder.describe(x),
        "compare": lambda: cka_hooks.compare(model, [x], progress=False),
    }
    functions = {"__enter__", "__exit__", "_leave", "over"} if use == "compare" else SET_UP_AND_TEAR_DOWN
    assert broken_off_everywhere(model, uses[use], functions) > 50


def test_ctrl_c_in_the_first_and_last_lines_of_a_block() -> None:
    model = net()

    def block() -> None:
        with cka_hooks.LayerRecorder(model, consumer=ignored):
            pass

    # Before the first instruction of `__exit__` there is nothing that could catch it.
    assert broken_off_everywhere(model, block, SET_UP_AND_TEAR_DOWN - {"__exit__"}) > 50


# Buffers


class Fills(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("cache", None)
        self.register_buffer("emptied", torch.ones(3))
        self.register_buffer("range", torch.empty(0))
        self.register_parameter("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        self.cache, self.emptied = x.mean(0), None
        self.scale = nn.Parameter(torch.ones(3))
        # As observers of quantisation do.
        self.range.resize_(4).copy_(x.amax(0))
        return self.fc(x)


def test_a_buffer_that_forward_fills_is_none_again() -> None:
    model = Fills()
    emptied, observed = model.emptied, model.range
    before = list(model.state_dict())
    cka_hooks.compare(model, inputs(), progress=False)
    assert model.cache is None
    assert model.scale is None
    assert model.emptied is emptied
    assert model.range is observed
    assert observed.shape == (0,)
    assert list(model.state_dict()) == before


# Train mode


class DropPath(nn.Module):
    """As timm has it."""

    def __init__(self, drop_prob: float | None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x


VARYING = [
    nn.BatchNorm1d(3),
    nn.SyncBatchNorm(3),
    nn.Dropout(0.1),
    nn.AlphaDropout(0.5),
    nn.RReLU(),
    nn.LSTM(3, 3, 2, dropout=0.1),
    nn.MultiheadAttention(3, 1, dropout=0.1),
    DropPath(0.1),
]
STEADY = [
    nn.LayerNorm(3),
    nn.GroupNorm(1, 3),
    nn.InstanceNorm1d(3),
    nn.Dropout(0.0),
    nn.LSTM(3, 3),
    nn.MultiheadAttention(3, 1),
    DropPath(None),
    nn.BatchNorm1d(3).eval(),
]


@pytest.mark.parametrize("module", VARYING, ids=lambda module: type(module).__name__)
def test_train_mode_is_warned_of_once_at_the_users_line(module: nn.Module) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 3), "varying": module})
    model.forward = model["fc"].forward
    with warnings.catch_warnings(record=True) as caught, cka_hooks.LayerRecorder(model, "fc", ignored):
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(8, 4))
    (warning,) = caught
    assert issubclass(warning.category, cka_hooks.CKAWarning)
    assert warning.filename == __file__
    assert f"1 module(s) in train mode, 'varying' ({type(module).__name__}) first" in str(warning.message)
    assert "call model.eval()" in str(warning.message)


@pytest.mark.parametrize("module", STEADY, ids=lambda module: type(module).__name__)
def test_train_mode_that_changes_nothing_is_not(module: nn.Module) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 3), "steady": module})
    model.forward = model["fc"].forward
    with cka_hooks.LayerRecorder(model, "fc", ignored):
        model(torch.randn(8, 4))


def test_train_mode_does_not_matter_where_the_package_runs_the_model() -> None:
    model = SmallNet().train()
    cka_hooks.LayerRecorder(model).describe(image_batches()[0])
    list(cka_hooks.LayerRecorder(model).stream(image_batches()))
    cka_hooks.compare(model, image_batches(), progress=False)
    assert all(module.training for module in model.modules())


# Consumers


def test_a_block_without_a_consumer_says_what_to_do() -> None:
    recorder = cka_hooks.LayerRecorder(net())
    with pytest.raises(cka_hooks.OptionError, match=r"pass consumer=.*CKAAccumulator\(\)\.observe.*stream\(loader\)"):
        recorder.__enter__()
    assert [list(activations) for activations in recorder.stream(inputs(1))] == [["0", "1", "2"]]
    recorder.consumer = ignored
    with recorder:
        pass


@pytest.mark.parametrize("features", ["flatten", "mean"])
def test_activations_with_their_graph(features: str) -> None:
    model, seen = nn.Sequential(nn.Conv1d(4, 5, 1), nn.Tanh(), nn.Conv1d(5, 2, 1)), {}
    x = torch.randn(6, 4, 3)
    recorder = cka_hooks.LayerRecorder(
        model, ["0", "1"], lambda layer, x: seen.update({layer: x}), features=features, detach=False
    )
    with recorder:
        for _ in range(2):
            model.zero_grad()
            model(x)
            sum(activation.square().sum() for activation in seen.values()).backward()
    found = model[0].weight.grad.clone()
    model.zero_grad()
    hidden = model[0](x)
    both = hidden, hidden.tanh()
    kept = [part.mean(2) if features == "mean" else part for part in both]
    sum(part.square().sum() for part in kept).backward()
    torch.testing.assert_close(found, model[0].weight.grad)
    assert all(
        not activation.requires_grad for activations in recorder.stream([x]) for activation in activations.values()
    )


def test_activations_come_without_their_graph_by_default() -> None:
    model, seen = net(), {}
    with cka_hooks.LayerRecorder(model, consumer=lambda layer, x: seen.update({layer: x})):
        out = model(inputs()[0])
    assert out.requires_grad
    assert not any(activation.requires_grad for activation in seen.values())


def test_a_buffer_that_the_forward_pass_registers_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.built = nn.Linear(5, 8), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.built:
                self.register_buffer("shift", torch.arange(8.0))
                self.built = True
            return self.a(x) + self.shift

    net = Net()
    cka_hooks.compare(net, [torch.randn(10, 5)], progress=False)
    assert net(torch.randn(2, 5)).shape == (2, 8)
    assert len(list(cka_hooks.LayerRecorder(Net()).stream([torch.randn(10, 5)] * 2))) == 2


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_memory_that_is_only_for_reading_is_not_written_to(tmp_path: Path) -> None:
    np.arange(8, dtype="float32").tofile(tmp_path / "memory")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)
            self.memory = torch.from_numpy(np.memmap(tmp_path / "memory", dtype="float32", mode="r"))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.memory

    assert cka_hooks.compare(Net(), [torch.randn(10, 5)], layers="a", progress=False).layers == ("a",)


def test_objects_of_a_batch_are_not_changed_by_the_probe() -> None:
    class Log:
        def __init__(self) -> None:
            self.calls = 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)

        def forward(self, x: Tensor, log: Log) -> Tensor:
            log.calls += 1
            return self.a(x)

    log = Log()
    cka_hooks.compare(Net(), [{"x": torch.randn(10, 5), "log": log}], progress=False)
    assert log.calls == 1


def test_a_bank_of_many_tensors_is_as_before_the_probe() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank: dict[int, Any] = {i: i for i in range(20_000)} | {3: torch.zeros(4)}
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.bank[3].add_(1)
            return self.first(x + self.bank[3])

    model = Remembers()
    cka_hooks.compare(model, [torch.randn(8, 4)], progress=False)
    assert model.bank[3].tolist() == [1.0] * 4
