"""What a user can get wrong: an exception of the package that names it, and says what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_LAYERS, SmallNet, image_batches
from torch import Tensor, nn

import cka_hooks
from cka_hooks import compare

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides")


class Counting(SmallNet):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(images)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("conv3", cka_hooks.LayerError, "'conv3'.*'conv[12]', 'conv[12]'"),
        (["fc", "Conv1"], cka_hooks.LayerError, "'Conv1'.*'conv1'"),
        ("layer*.*", cka_hooks.LayerError, "no layer matches"),
        (nn.LSTM, cka_hooks.LayerError, "LSTM.*Conv2d"),
        (lambda name, module: False, cka_hooks.LayerError, "no module matches"),
        ([], cka_hooks.LayerError, "empty"),
        (3, cka_hooks.OptionError, "expected a name, a glob"),
        ([3], cka_hooks.OptionError, "expected a name, a glob"),
        (int, cka_hooks.OptionError, "<class 'int'>: expected"),
    ],
)
def test_layers_that_match_nothing_fail_before_any_forward_pass(
    layers: Any, error: type[Exception], message: str
) -> None:
    model = Counting()

    def loader() -> Iterator[Tensor]:
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(error, match=message):
        compare(model, loader(), layers=layers, progress=False)
    assert model.passes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "rfb"}, "'rbf'"),
        ({"estimator": "debiased"}, "'unbiased' or 'biased'"),
        ({"minibatch": 3}, "at least 4"),
        ({"minibatch": 8.0}, "minibatch=8.0"),
        ({"bandwidth": 1.0}, "belongs to kernel='rbf'"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "above 0"),
        ({"kernel": "rbf", "sigma": -1.0}, "above 0"),
        ({"kernel": "rbf", "sigma": 1.0, "bandwidth": 1.0}, "exclude each other"),
        ({"features": "max"}, "'flatten'"),
        ({"features": {"nothing": "mean"}}, "'nothing', which matches no layer"),
        ({"tolerance": 0.0}, "above 0"),
        ({"max_samples": 3}, "at least 4"),
        ({"epochs": 0}, "at least 1"),
        ({"minibatch": "16"}, "minibatch='16': expected a whole number of at least 4"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], message: str) -> None:
    model = Counting()
    with pytest.raises(cka_hooks.OptionError, match=message):
        compare(model, image_batches(), progress=False, **options)
    assert model.passes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": math.inf}, "tolerance=inf"),
        ({"tolerance": "0.1"}, "tolerance='0.1'"),
        ({"tolerance": torch.ones(2)}, "tolerance="),
        ({"max_samples": math.inf}, "max_samples=inf"),
        ({"max_samples": "100"}, "max_samples='100'"),
        ({"epochs": True}, "epochs=True"),
        ({"epochs": math.nan}, "epochs=nan"),
        ({"seed": "0"}, "seed='0'"),
        ({"kernel": "rbf", "sigma": math.inf}, "sigma=inf"),
        ({"kernel": "rbf", "bandwidth": "1"}, "bandwidth='1'"),
        ({"estimator": ["unbiased"]}, "estimator="),
        ({"batch_dim": "0"}, "batch_dim='0': expected a whole number"),
        ({"batch_dim": {"fc": 0.0}}, "batch_dim of 'fc'=0.0: expected a whole number"),
        ({"channel_dim": {"**": [1]}}, "channel_dim of '**'=[1]: expected a whole number"),
        ({"channel_dim": 100}, "channel_dim=100: expected a whole number from -64 to 63"),
        (
            {"forward": "forward_features"},
            "'forward_features' cannot be called: expected a function forward(model, batch)",
        ),
        ({"features": np.ones(3)}, "is not a reduction"),
        ({"layers": torch.tensor(3)}, "expected a name, a glob"),
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused_before_the_first_batch(options: dict[str, Any], message: str) -> None:
    model = Counting()
    with pytest.raises(cka_hooks.OptionError, match=re.escape(message)):
        compare(model, image_batches(), progress=False, **options)
    assert model.passes == 0


def test_numbers_of_any_type_are_numbers_in_the_result(tmp_path) -> None:
    """NumPy's scalars and tensors of one number, in a result that can be saved."""
    options = {"max_samples": np.int64(40), "tolerance": np.float32(0.5), "epochs": torch.tensor(1)}
    options |= {"batch_dim": np.int64(0), "channel_dim": torch.tensor(1)}
    options |= {"seed": np.uint8(3), "minibatch": np.int32(8), "keep_minibatches": np.bool_(True)}
    result = compare(Counting(), image_batches(), progress=False, **options)
    assert [result.settings[name] for name in options] == [40, 0.5, 1, 0, 1, 3, 8, True]
    result.save(tmp_path / "cka.json")
    assert cka_hooks.CKAResult.load(tmp_path / "cka.json") == result


def test_none_for_a_number_is_its_default() -> None:
    assert compare(Counting(), image_batches(), epochs=None, seed=None, progress=False).settings["epochs"] == 1


def test_a_comparison_and_a_stream_refuse_what_compare_refuses() -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"an nn\.Module"):
        cka_hooks.Comparison(None)
    for loader in (torch.zeros(4, 3, 8, 8), torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8)), None):
        with pytest.raises(cka_hooks.OptionError, match="the loader is"):
            next(cka_hooks.LayerRecorder(SmallNet()).stream(loader))


def test_an_accumulator_is_no_consumer() -> None:
    with pytest.raises(cka_hooks.OptionError, match=r"cannot be called: expected a function consumer"):
        cka_hooks.LayerRecorder(Counting(), consumer=cka_hooks.CKAAccumulator())


@pytest.mark.parametrize("names", [{0: Counting(), 10: Counting()}, {"": Counting(), "b": Counting()}], ids=str)
def test_names_of_models_are_text(names) -> None:
    with pytest.raises(cka_hooks.OptionError, match="names are text"):
        compare(names, image_batches(), progress=False)


@pytest.mark.parametrize("model", ["resnet18", None, {"a": SmallNet(), "b": "resnet18"}, lambda: "resnet18"])
def test_no_module(model: Any) -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"an nn\.Module"):
        compare(model, image_batches(), progress=False)


@pytest.mark.parametrize("several", [list, tuple])
def test_several_models_without_names(several: Callable[[Any], Any]) -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"a mapping with a name for each, \{'a': a, 'b': b\}"):
        compare(several([SmallNet(), SmallNet()]), image_batches(), progress=False)


def test_an_iterator_has_one_pass() -> None:
    model = Counting()
    with pytest.raises(cka_hooks.OptionError, match=r"epochs=2 needs a DataLoader or a list of batches"):
        compare(model, iter(image_batches()), epochs=2, progress=False)
    assert model.passes == 0


def test_an_empty_mapping_of_models() -> None:
    with pytest.raises(cka_hooks.OptionError, match="at least one model"):
        compare({}, image_batches(), progress=False)


def exhausted() -> Iterator[Tensor]:
    batches = iter(image_batches())
    list(batches)
    return batches


@pytest.mark.parametrize("loader", [list, exhausted, lambda: (x for x in ())])
def test_an_empty_loader(loader: Callable[[], Any], net: SmallNet) -> None:
    with pytest.raises(cka_hooks.TooFewSamplesError, match="no batch: it is empty, or exhausted"):
        compare(net, loader(), progress=False)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_short_last_minibatch_is_left_out_and_said(samples: int, net: SmallNet) -> None:
    batches = [*image_batches(), image_batches(1, samples, seed=9)[0]]
    with pytest.warns(cka_hooks.CKAWarning, match=f"{samples} samples.*left out: fewer than 4"):
        result = compare(net, batches, progress=False)
    expected = compare(net, batches[:3], progress=False)
    assert torch.equal(result.matrix.nan_to_num(9), expected.matrix.nan_to_num(9))
    assert (result.samples, result.minibatches) == (48, 3)
    assert result.settings["samples_left_out"] == samples


@pytest.mark.parametrize("samples", [1, 3])
def test_all_minibatches_short(samples: int, net: SmallNet) -> None:
    with pytest.raises(cka_hooks.TooFewSamplesError, match=f"at least 4 samples.*had {samples}.*batch_size"):
        compare(net, image_batches(3, samples), progress=False)


class WithPosition(nn.Module):
    """A layer whose output has no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(tokens + self.position(torch.arange(tokens.shape[1])))


def test_no_batch_dimension() -> None:
    batches = [torch.randn(8, 5, 6) for _ in range(3)]
    with pytest.raises(cka_hooks.LayerError, match=r"'position' \(Embedding\).*of \(5, 6\)"):
        compare(WithPosition(), batches, layers=["position", "fc"], progress=False)
    result = compare(WithPosition(), batches, progress=False)
    assert result.layers == ("fc",)
    assert "(5, 6)" in result.skipped["position"]


class NotFinite(SmallNet):
    """Puts one bad number into what conv2 returns, in one minibatch."""

    def __init__(self, value: float, minibatch: int) -> None:
        super().__init__()
        self.passes = 0

        def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            if self.passes % 3 == minibatch:
                output[5, 3, 2, 1] = value
            self.passes += 1
            return output

        self.conv2.register_forward_hook(spoil)

    def forward(self, images: Tensor) -> Tensor:
        # What follows conv2 does not see it.
        x = self.relu(self.bn1(self.conv1(images)))
        self.conv2(x)
        return self.fc(self.drop(self.relu(self.bn2(x))).mean((2, 3)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("minibatch", [0, 2])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_a_layer_that_is_not_finite(value: float, minibatch: int, estimator: Any, batches: list[Tensor]) -> None:
    model = NotFinite(value, minibatch)
    with pytest.raises(cka_hooks.NonFiniteError, match=f"'conv2'.*minibatch {minibatch}") as caught:
        compare(model, batches, estimator=estimator, progress=False)
    assert caught.value.layers == {"conv2": minibatch}
    partial = caught.value.partial
    others = ["conv1", "bn1", "relu", "bn2", "drop", "fc"]
    expected = compare(model, batches, layers=others, estimator=estimator, progress=False)
    assert partial.layers == expected.layers
    torch.testing.assert_close(partial.matrix, expected.matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(partial.stderr, expected.stderr, rtol=1e-6, atol=1e-7)
    assert (partial.samples, partial.minibatches) == (48, 3)
    assert "not finite" in partial.skipped["conv2"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_input_that_is_not_finite(bad: float, net: SmallNet, batches: list[Tensor]) -> None:
    batches[1][2, 0, 0, 0] = bad
    with pytest.raises(cka_hooks.NonFiniteError, match=r"'conv1'.*minibatch 1.*7 more layers") as caught:
        compare(net, batches, progress=False)
    assert set(caught.value.layers.values()) == {1}
    assert caught.value.partial is None


class Halved(SmallNet):
    """Runs on the first half of the samples only."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[: len(images) // 2])


def test_two_models_with_different_sample_counts(net: SmallNet, batches: list[Tensor]) -> None:
    with pytest.raises(cka_hooks.LayerError, match=r"of the model 'half' .* \(8, 8, 8, 8\) has size 16"):
        compare({"whole": net, "half": Halved()}, batches, progress=False)
    with pytest.raises(cka_hooks.LayerError, match=r"of the model 'half' .* \(8, 8, 8, 8\) has size 16"):
        compare(
            {"whole": net, "half": SmallNet()},
            batches,
            forward={"half": lambda model, batch: model(batch[:8])},
            progress=False,
        )


def test_integer_layers_are_left_out_by_default_and_refused_by_name() -> None:
    class Argmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    model = nn.Sequential(nn.Linear(4, 3), Argmax())
    batches = [torch.randn(8, 4) for _ in range(3)]
    assert "int64" in compare(model, batches, progress=False).skipped["1"]
    with pytest.raises(cka_hooks.LayerError, match=r"'1'.*int64"):
        compare(model, batches, layers=["0", "1"], progress=False)


def test_a_batch_the_model_cannot_be_called_with(net: SmallNet) -> None:
    with pytest.raises(cka_hooks.BatchError, match="forward=lambda"):
        compare(net, [{"pixels": image_batches(1)[0]}], progress=False)


def test_every_error_is_the_packages_own() -> None:
    errors = [getattr(cka_hooks, name) for name in cka_hooks.__all__ if name.endswith("Error")]
    assert all(issubclass(error, cka_hooks.CKAError) for error in errors)


def test_layers_of_the_small_net(net: SmallNet, batches: list[Tensor]) -> None:
    result = compare(net, batches, progress=False)
    assert result.layers == SMALL_LAYERS
    assert result.skipped == {"unused": "did not run in the forward pass"}
