"""After a run the model and torch's global state are as they were, however the run ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SmallNet, image_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cka_hooks

HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a run could change."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [dict(getattr(module, hooks)) for hooks in HOOKS] for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "identities": {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in before:
        if what == "bits":
            assert before[what].keys() == after[what].keys()
            for name, bits in before[what].items():
                assert torch.equal(bits.view(-1), after[what][name].view(-1)), name
        elif what == "random":
            assert torch.equal(before[what], after[what])
        else:
            assert before[what] == after[what], what


class Broken(Exception):
    """What the tests throw into a run."""


def interrupted(batches: list[Tensor], error: BaseException) -> Iterator[Tensor]:
    yield batches[0]
    raise error


def failing_forward(error: BaseException) -> Callable[[nn.Module, Tensor], None]:
    calls = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        # A probe of the first batch, which runs on fewer samples, may fail without a word.
        calls.extend([batch] * (len(batch) == 16))
        model(batch)
        if len(calls) == 2:
            raise error

    return forward


class Exploding(SmallNet):
    """Raises inside a submodule in its second forward pass, and scribbles over a buffer before."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error
        self.passes = 0
        self.register_buffer("counter", torch.zeros(2))
        self.register_buffer("replaced", torch.ones(3))
        self.register_buffer("hidden", torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        self.counter += 1
        self.replaced = self.replaced * 2
        self.hidden.data.mul_(2)
        torch.rand(3)
        self.train(not self.training)
        self.passes += 1
        if self.error is not None and self.passes == 2:
            raise self.error
        return super().forward(images)


ENDS: dict[str, Any] = {
    "well": (None, dict),
    "the model raises": (Broken, lambda: {"model": Exploding(Broken())}),
    "interrupt in the model": (KeyboardInterrupt, lambda: {"model": Exploding(KeyboardInterrupt())}),
    "buffers are changed in forward": (None, lambda: {"model": Exploding()}),
    "interrupt in the loader": (
        KeyboardInterrupt,
        lambda: {"loader": interrupted(image_batches(), KeyboardInterrupt())},
    ),
    "the loader raises": (Broken, lambda: {"loader": interrupted(image_batches(), Broken())}),
    "forward raises": (Broken, lambda: {"forward": failing_forward(Broken())}),
    "NaN in the input": (
        cka_hooks.NonFiniteError,
        lambda: {"loader": [image_batches()[0], image_batches()[1] * torch.nan]},
    ),
    "too few samples": (cka_hooks.TooFewSamplesError, lambda: {"loader": image_batches(2, samples=3)}),
    "an empty loader": (cka_hooks.TooFewSamplesError, lambda: {"loader": []}),
    "a kernel raises": (Broken, lambda: {"kernel": raising_kernel}),
    "another shape": (Exception, lambda: {"loader": [torch.randn(8, 7)]}),
}


def raising_kernel(x: Tensor) -> Tensor:
    raise Broken


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_as_it_was(end: str, grad: bool) -> None:
    expected, changed = ENDS[end]
    arguments = {"model": SmallNet(), "loader": image_batches(), **changed()}
    model = arguments["model"].train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.register_forward_hook(lambda *args: None)
    probe = image_batches(1)[0]
    outputs = SmallNet.forward(model.eval(), probe)
    model.train()
    model.bn2.eval()
    torch.rand(7)
    with torch.set_grad_enabled(grad):
        before = state(model)
        if expected is None:
            cka_hooks.compare(**arguments, progress=False)
        else:
            with pytest.raises(expected):
                cka_hooks.compare(**arguments, progress=False)
        assert_same(before, state(model))
    assert torch.equal(SmallNet.forward(model.eval(), probe), outputs)


def test_a_shuffling_loader_draws_from_a_state_that_is_put_back(net: SmallNet) -> None:
    data = TensorDataset(torch.cat(image_batches()), torch.zeros(48))
    before = torch.get_rng_state()
    cka_hooks.compare(net, DataLoader(data, 16, shuffle=True), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_buffer_that_a_graph_needs_can_still_be_differentiated(net: SmallNet) -> None:
    loss = net.eval()(image_batches(1)[0]).sum()
    cka_hooks.compare(net.train(), image_batches(), progress=False)
    loss.backward()
    assert net.bn1.weight.grad is not None


def test_the_model_trains_afterwards(net: SmallNet) -> None:
    cka_hooks.compare(net, image_batches(), progress=False)
    net(image_batches(1)[0]).sum().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if not name.startswith("unused"))


@pytest.mark.parametrize("stop", ["exhausted", "closed", "thrown into", "model"])
def test_stream(stop: str) -> None:
    model = Exploding(Broken() if stop == "model" else None)
    model.train().bn2.eval()
    before = state(model)
    stream = cka_hooks.LayerRecorder(model).stream(image_batches())
    for activations in stream:
        assert_same(before, state(model))
        assert not any(tensor.is_inference() or tensor.requires_grad for tensor in activations.values())
        if stop == "closed":
            stream.close()
            break
        if stop == "thrown into":
            with pytest.raises(Broken):
                stream.throw(Broken())
            break
        if stop == "model":
            with pytest.raises(Broken):
                next(stream)
            break
    assert_same(before, state(model))


def test_a_recorder_leaves_mode_and_gradients_to_its_user(net: SmallNet) -> None:
    before = state(net)
    with cka_hooks.LayerRecorder(net, consumer=lambda layer, activation: None):
        with pytest.warns(cka_hooks.CKAWarning, match=r"train mode, 'bn1' \(BatchNorm2d\) first.*model\.eval\(\)"):
            out = net(image_batches(1)[0])
        assert net.training
        assert out.requires_grad
    assert state(net)["hooks"] == before["hooks"]
    with pytest.raises(Broken), cka_hooks.LayerRecorder(net, consumer=print):
        raise Broken
    assert state(net)["hooks"] == before["hooks"]
