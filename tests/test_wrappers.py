"""Models inside wrappers, several recorders, hooks of the user's own, and what `stream` leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import processes
import pytest
import torch
from test_models import bert, gpt2
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset

import cka_hooks
from cka_hooks.recording.layers import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
LAYERS = ["0", "1", "2"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))


def expected() -> dict[str, Tensor]:
    model = net()
    first = model[0](X).detach()
    return {"0": first, "1": first.relu(), "2": model[2](first.relu()).detach()}


class Seen(dict[str, Tensor]):
    """A consumer that keeps copies and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, layer: str, activation: Tensor) -> None:
        self.calls += 1
        self[layer] = activation.clone()

    def check(self, calls: int = 3) -> None:
        assert list(self) == LAYERS
        assert self.calls == calls
        for layer, tensor in expected().items():
            torch.testing.assert_close(self[layer], tensor)


# Wrappers


@pytest.fixture
def single_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("single_process")
def test_distributed_data_parallel() -> None:
    wrapped = nn.parallel.DistributedDataParallel(net())
    seen = Seen()
    with cka_hooks.LayerRecorder(wrapped, consumer=seen):
        wrapped(X)
    seen.check()
    assert cka_hooks.compare(wrapped, [X], layers=["0", "2"], progress=False).layers == ("0", "2")
    wrapped(X).sum().backward()


def test_data_parallel() -> None:
    wrapped = nn.DataParallel(net())
    seen = Seen()
    with cka_hooks.LayerRecorder(wrapped, consumer=seen):
        wrapped(X)
    seen.check()
    assert cka_hooks.compare(wrapped, [X], progress=False).layers == tuple(LAYERS)


def compile_before(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="eager")


def compile_and_call(model: nn.Module) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    return compiled


def compile_in_place(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.compile(backend="eager")
    model(X)
    return model


def compile_a_part(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model[0] = torch.compile(model[0], backend="eager")
    model(X)
    return model


@pytest.mark.parametrize("wrap", [compile_before, compile_and_call, compile_in_place, compile_a_part])
def test_compiled(wrap: Callable[[nn.Module], Any]) -> None:
    compiled = wrap(net())
    assert not any("_orig_mod" in row.layer for row in cka_hooks.LayerRecorder(compiled).describe(X).rows)
    seen = Seen()
    with cka_hooks.LayerRecorder(compiled, consumer=seen):
        compiled(X)
        seen.check()
        compiled(X)
        seen.check(6)
    assert cka_hooks.compare(compiled, [X], layers=LAYERS, progress=False).layers == tuple(LAYERS)
    # Afterwards it is compiled code again, without a hook in it.
    torch.testing.assert_close(compiled(X), expected()["2"])
    assert seen.calls == 6
    torch._dynamo.reset()


def test_compiled_after_the_recorder_was_made() -> None:
    model, seen = net(), Seen()
    recorder = cka_hooks.LayerRecorder(model, consumer=seen)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    with recorder:
        compiled(X)
    seen.check()
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_inside_the_recorder() -> None:
    """In a fresh process, where entering the recorder finds no compiler loaded yet."""
    program = (
        "import sys, torch, cka_hooks; from torch import nn\n"
        "model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)); seen = []\n"
        "with cka_hooks.LayerRecorder(model, consumer=lambda layer, x: seen.append(layer)):\n"
        "    compiled = torch.compile(model, backend='eager')\n"
        "    for _ in range(2): compiled(torch.randn(8, 4))\n"
        "print(seen)"
    )
    done = processes.finished("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(LAYERS * 2)


def test_a_compiled_function_around_the_model() -> None:
    model, seen = net(), Seen()
    function = torch.compile(lambda x: model(x) * 2, backend="eager")
    function(X)
    with cka_hooks.LayerRecorder(model, consumer=seen):
        function(X)
    seen.check()
    result = cka_hooks.compare(model, [X], forward=lambda model, batch: function(batch), progress=False)
    assert result.layers == tuple(LAYERS)
    torch._dynamo.reset()


def test_names_of_nested_wrappers_are_the_users() -> None:
    inner = nn.DataParallel(torch.compile(net(), backend="eager"))
    model = nn.Sequential(inner, nn.Linear(2, 2))
    seen = Seen()
    with cka_hooks.LayerRecorder(model, ["0.0", "0.2", "1"], seen, batch_dim=0):
        model[1](inner.module._orig_mod(X))
    assert set(seen) == {"0.0", "0.2", "1"}
    with pytest.raises(cka_hooks.LayerError, match="the closest names are"):
        cka_hooks.LayerRecorder(model, "0.module._orig_mod.0")


@pytest.mark.slow
def test_lightning_module() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def validation_step(self, batch: Tensor, index: int) -> None:
            self.net(batch)

    module = Module()
    assert cka_hooks.compare(module, [X], progress=False).layers == ("net.0", "net.1", "net.2")
    step = cka_hooks.compare(
        module, [X, X], forward=lambda module, batch: module.validation_step(batch, 0), progress=False
    )
    assert step.layers == ("net.0", "net.1", "net.2")


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    base = gpt2()
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    model = peft.get_peft_model(base, config).eval()
    ids = {"input_ids": torch.randint(0, 50, (8, 6))}
    result = cka_hooks.compare(model, [ids], layers=["**.c_attn", "**.lora_A.default", "**.ln_f"], progress=False)
    attention = "base_model.model.transformer.h.0.attn.c_attn"
    assert {attention, f"{attention}.lora_A.default", "base_model.model.transformer.ln_f"} <= set(result.layers)


def test_weights_that_accelerate_brings_when_they_are_needed() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected_result = cka_hooks.compare(net(), [X], progress=False)
    model = accelerate.cpu_offload(net(), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    result = cka_hooks.compare(model, [X], progress=False)
    assert result.layers == expected_result.layers
    assert torch.equal(result.matrix, expected_result.matrix)


def test_parametrized_modules() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.orthogonal(nn.Linear(4, 4, bias=False))
    )
    result = cka_hooks.compare(model, [X], progress=False)
    assert result.layers == ("0", "1")
    assert not result.skipped
    rotated = result["0", "1"]
    assert rotated == pytest.approx(1, abs=1e-6), "an orthogonal map changes no inner product"
    with pytest.raises(cka_hooks.LayerError):
        cka_hooks.LayerRecorder(model, "0.parametrizations.weight")


def test_tied_modules() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model = Tied()
    assert cka_hooks.compare(model, [X], progress=False).layers == ("first", "first#2")
    assert cka_hooks.compare(model, [X], layers="second", progress=False).layers == ("second", "second#2")
    both = cka_hooks.compare(model, [X], layers=["first", "second"], progress=False)
    assert both.layers == ("first", "first#2")
    assert both.skipped == {"second": "is the same module as 'first'"}
    chosen = cka_hooks.compare(model, [X], layers=["first", "f*#2", "first#2"], progress=False)
    assert chosen.layers == ("first", "first#2")


@pytest.mark.filterwarnings("ignore:`?torch.jit", "ignore:.*torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_script_modules(make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"the model is a ScriptModule .*give the eager model"):
        cka_hooks.compare(make(net()), [X], progress=False)
    with pytest.raises(cka_hooks.ModelError, match="its submodule 'part' is a ScriptModule"):
        cka_hooks.LayerRecorder(nn.ModuleDict({"part": make(net())}))


def test_exported_programs() -> None:
    program = torch.export.export(net(), (X,))
    for exported in (program, program.module()):
        with pytest.raises(cka_hooks.ModelError, match=r"torch\.export\.unflatten\(program\)"):
            cka_hooks.LayerRecorder(exported)
    traced = torch.fx.symbolic_trace(net())
    assert cka_hooks.compare(traced, [X], progress=False).layers == tuple(LAYERS)
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch.export.unflatten of PyTorch 2.6 does not take a model that is a Sequential")
    seen = Seen()
    unflattened = torch.export.unflatten(program)
    with cka_hooks.LayerRecorder(unflattened, LAYERS, seen):
        unflattened(X)
    assert list(seen) == LAYERS


def test_keras_models() -> None:
    """Keras 3 on PyTorch: a model is an nn.Module, and its layers are no children of it. A layer alone is one."""

    class Model(nn.Module):
        __module__ = "keras.src.models.model"

        def __init__(self) -> None:
            super().__init__()
            self.layers = (nn.Linear(4, 3),)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    class Sequential(Model):
        pass

    for model in (Model(), Sequential()):
        with pytest.raises(cka_hooks.ModelError, match=r"Keras model \((Model|Sequential)\).*update\("):
            cka_hooks.compare(model, [torch.randn(8, 4)], progress=False)
    part = nn.Sequential(Model(), nn.Linear(3, 2))
    assert cka_hooks.compare(part, [torch.randn(8, 4)], progress=False).layers == ("0", "1")


def test_no_module() -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"expected an nn\.Module, found builtins\.function"):
        cka_hooks.LayerRecorder(lambda x: x)  # type: ignore[arg-type]


# Fast paths


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def test_a_hook_on_a_part_turns_the_fused_path_off() -> None:
    x = torch.randn(8, 5, 16)
    parts = cka_hooks.compare(encoder(), [x], progress=False)
    assert [layer for layer in parts.layers if layer.startswith("layers.0")] == [
        f"layers.0.{part}"
        for part in "self_attn dropout1 norm1 linear1 dropout linear2 dropout2 norm2".split()  # noqa: SIM905
    ]
    with torch.no_grad():
        fused = next(iter(cka_hooks.LayerRecorder(encoder(), "layers.1").stream([x])))["layers.1"]
        slow = next(iter(cka_hooks.LayerRecorder(encoder(), ["layers.1", "**.linear1"]).stream([x])))["layers.1"]
    torch.testing.assert_close(fused, slow)


def test_out_proj_is_named_as_skipped() -> None:
    x = torch.randn(8, 5, 16)
    reason = "did not run: 'layers.0.self_attn' did its work without calling it"
    for layers in (None, ["**.out_proj", "layers.0.self_attn"], ["**.out_proj", "layers.1"]):
        skipped = cka_hooks.compare(encoder(), [x], layers=layers, progress=False).skipped
        assert skipped["layers.0.self_attn.out_proj"] == reason
    with pytest.raises(cka_hooks.LayerError, match=f"none of the chosen layers.*{reason}"):
        cka_hooks.compare(encoder(), [x], layers="**.out_proj", progress=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_of_the_fused_path() -> None:
    model, x = encoder(), torch.randn(8, 5, 16)
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[0, 3:] = True

    def masked(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch, src_key_padding_mask=mask)

    # The mask is of this one batch: no part of it can be run.
    options = {"forward": masked, "batch_dim": 0, "progress": False}
    with pytest.raises(cka_hooks.LayerError, match="set use_nested_tensor = False of nn"):
        cka_hooks.compare(model, [x], **options)
    model.use_nested_tensor = False
    assert len(cka_hooks.compare(model, [x], **options).layers) == 16


# Several recorders, the user's hooks, errors


def test_two_recorders_and_one_inside_another() -> None:
    model, first, second = net(), Seen(), Seen()
    outer = cka_hooks.LayerRecorder(model, consumer=first)
    with outer, cka_hooks.LayerRecorder(model, consumer=second):
        model(X)
    first.check()
    second.check()
    with outer:
        with outer:
            model(X)
        model(X)
        copies = next(iter(cka_hooks.LayerRecorder(model, "0").stream([X])))
    torch.testing.assert_close(copies["0"], expected()["0"])
    first.check(12)
    model(X)
    first.check(12)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_raises_half_way() -> None:
    model, seen = net(), Seen()
    recorder = cka_hooks.LayerRecorder(model, consumer=seen)
    good, bad = model[1].forward, lambda x: 1 / 0
    with recorder:
        model[1].forward = bad
        with pytest.raises(ZeroDivisionError):
            model(X)
        assert list(seen) == ["0"]
        model[1].forward = good
        model(X)
    seen.check(4)
    model[1].forward = bad
    with pytest.raises(ZeroDivisionError), recorder:
        model(X)
    with pytest.raises(ZeroDivisionError):
        cka_hooks.compare(model, [X], progress=False)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("order", ["before", "after", "inside"])
def test_a_hook_of_the_users_own_that_changes_the_output(order: str) -> None:
    """What the next layer receives is recorded."""
    model, seen = net(), Seen()

    def register() -> None:
        model[0].register_forward_hook(lambda module, args, output: output * 10)
        model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    recorder = cka_hooks.LayerRecorder(model, ["0", "1", "2:input"], seen)
    if order == "before":
        register()
    with recorder:
        if order == "inside":
            register()
        model(X)
    if order == "after":
        register()
        with recorder:
            model(X)
    first = expected()["0"] * 10
    torch.testing.assert_close(seen["0"], first)
    torch.testing.assert_close(seen["1"], first.relu())
    torch.testing.assert_close(seen["2:input"], first.relu() + 1)


def test_the_output_is_the_models_own() -> None:
    model = net()
    with cka_hooks.LayerRecorder(model, consumer=lambda layer, activation: None):
        out = model(X)
        out.sum().backward()
    assert torch.equal(out, net()(X))
    assert model[0].weight.grad is not None


# stream


class Augmented(Dataset[Tensor]):
    """Random crops, so to say: each look draws from torch's random state."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(4)


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_is_a_good_guest(workers: int) -> None:
    model = net()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    loader = DataLoader(Augmented(), batch_size=8, num_workers=workers)
    torch.manual_seed(5)
    undisturbed = torch.rand(4)
    torch.manual_seed(5)
    draws, batches = [], []
    for activations in cka_hooks.LayerRecorder(model).stream(loader):
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks for module in model.modules())
        draws.append(torch.rand(1))
        batches.append(activations)
    assert torch.equal(torch.cat([*draws, torch.rand(1)]), undisturbed)
    assert len(batches) == 3
    assert not torch.equal(batches[0]["0"], batches[1]["0"])
    assert not torch.equal(batches[1]["0"], batches[2]["0"])


def test_streamed_copies_are_safe_and_ordinary() -> None:
    model = net()
    (activations,) = cka_hooks.LayerRecorder(model).stream([X])
    assert list(activations) == LAYERS
    for layer, tensor in expected().items():
        torch.testing.assert_close(activations[layer], tensor)
    assert (activations["0"] < 0).any(), "the in-place ReLU did not reach the copy"
    probe = nn.Linear(3, 1)
    activations["0"].requires_grad_()
    probe(activations["0"]).sum().backward()
    assert activations["0"].grad is not None
    activations["1"].add_(1)


def test_stream_through_a_model_that_runs_in_inference_mode() -> None:
    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    (activations,) = cka_hooks.LayerRecorder(Inference()).stream([X])
    nn.Linear(3, 1)(activations["net.0"]).sum().backward()


def test_stream_stops_early_and_resumes_with_its_own_consumer() -> None:
    model, seen = net(), Seen()
    recorder = cka_hooks.LayerRecorder(model, consumer=seen)
    stream = recorder.stream([X, X])
    next(stream)
    stream.close()
    assert not seen
    with recorder:
        model(X)
    seen.check()


def test_the_model_is_left_as_it_was() -> None:
    model = bert()
    model.train()
    before = copy.deepcopy(model.state_dict())
    cka_hooks.compare(model, [torch.randint(0, 50, (8, 6))], progress=False)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_itself_is_a_layer_by_name() -> None:
    result = cka_hooks.compare(net(), [X], layers=[ROOT, "2"], progress=False)
    assert result["2", ROOT] == pytest.approx(1)


def test_a_module_that_is_replaced_inside_its_wrapper_is_refused() -> None:
    """Hooks are on the modules that were there when the recorder was made."""
    wrapped = nn.DataParallel(nn.Sequential(nn.Linear(8, 4)))
    recorder = cka_hooks.LayerRecorder(wrapped)
    wrapped.module = nn.Sequential(nn.Linear(8, 7))
    with pytest.raises(cka_hooks.LayerError, match="none of the chosen layers"):
        recorder.describe(torch.randn(4, 8))
