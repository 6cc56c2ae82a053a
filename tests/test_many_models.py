"""Models that are built one after another, each run over the whole loader alone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import cka_hooks

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:.* left out")


def model(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(inplace=True), nn.Linear(width, 3))


def loader(samples: int = 70, **options):
    x = torch.randn(samples, 12, generator=torch.Generator().manual_seed(5))
    return DataLoader(
        x, batch_size=16, **({"shuffle": True, "generator": torch.Generator().manual_seed(1)} | options)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": 2},
        {"minibatch": 5},
        {"estimator": "biased", "keep_minibatches": True},
        {"max_samples": 37},
        {"layers": ["0", "2"]},
        {"layers": {"a": "0", "b": ["1", "2"], "c": None}},
        {"kernel": "rbf"},
        {"permutations": 20},
    ],
    ids=str,
)
def test_equal_to_all_models_at_once(options) -> None:
    at_once = cka_hooks.compare({k: model(i) for i, k in enumerate("abc")}, loader(), progress=False, **options)
    builders = {"a": model(0), "b": lambda: model(1), "c": lambda: model(2)}
    in_turn = cka_hooks.compare(builders, loader(), progress=False, **options)
    assert in_turn.layers == at_once.layers
    assert in_turn.models == at_once.models == ("a", "b", "c")
    torch.testing.assert_close(in_turn.matrix, at_once.matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(in_turn.stderr, at_once.stderr, rtol=0, atol=1e-12)
    for name in ("samples", "minibatches", "passes", "influence", "skipped", "degrees_of_freedom"):
        assert getattr(in_turn, name) == getattr(at_once, name), name
    assert in_turn.settings["models"] == at_once.settings["models"]
    assert in_turn.settings["permutations"] == options.get("permutations", 0)
    for name in ("minibatch_hsic", "permuted"):
        torch.testing.assert_close(getattr(in_turn, name), getattr(at_once, name), rtol=0, atol=1e-12)


def test_a_model_is_gone_before_the_next_is_built() -> None:
    alive: list[weakref.ref] = []

    def build(seed: int) -> nn.Module:
        assert not any(reference() for reference in alive), "the model before is still there"
        built = model(seed)
        alive.append(weakref.ref(built))
        return built

    gc.disable()
    try:
        cka_hooks.compare({str(i): lambda i=i: build(i) for i in range(4)}, loader(), progress=False)
    finally:
        gc.enable()
    assert len(alive) == 4


def test_one_forward_pass_per_model_and_batch() -> None:
    calls = []

    def forward(module, batch):
        calls.append(len(batch))
        return module(batch)

    cka_hooks.compare({str(i): lambda i=i: model(i) for i in range(3)}, loader(), forward=forward, progress=False)
    # A probe of the first batch runs on fewer samples.
    assert sum(count > 3 for count in calls) == 3 * 5
    assert len(calls) <= 3 * (5 + 2)


def test_a_loader_with_other_batches_in_each_pass_is_refused() -> None:
    class Unstable:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            for number in range(3):
                yield torch.full((8, 12), float(number)) + torch.randn(8, 12) * (1 + self.passes)

    with pytest.raises(cka_hooks.BatchError, match=r"batch 0 .* for model 'b' differs from"):
        cka_hooks.compare({"a": lambda: model(0), "b": lambda: model(1)}, Unstable(), progress=False)


def test_random_augmentation_from_torch_is_repeated() -> None:
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.full((12,), float(index)) + torch.randn(12)

    result = cka_hooks.compare(
        {"a": lambda: model(0), "b": lambda: model(0)}, DataLoader(Augmented(), batch_size=8), progress=False
    )
    assert result["a/0", "b/0"] == pytest.approx(1, abs=1e-12)


def test_a_shorter_pass_is_noticed() -> None:
    class Shrinking:
        passes = 0

        def __iter__(self):
            self.passes += 1
            generator = torch.Generator().manual_seed(1)
            for _ in range(4 - self.passes):
                yield torch.randn(8, 12, generator=generator)

    with pytest.raises(cka_hooks.SampleCountError, match="no batch in model 'b'"):
        cka_hooks.compare({"a": lambda: model(0), "b": lambda: model(1)}, Shrinking(), progress=False)


@pytest.mark.parametrize("option", [{"tolerance": 0.1}, {"checkpoint": "x"}])
def test_options_that_need_all_models_at_once(option) -> None:
    with pytest.raises(cka_hooks.OptionError, match="need all models at once"):
        cka_hooks.compare({"a": lambda: model(0)}, loader(), progress=False, **option)


def test_what_a_function_may_return() -> None:
    with pytest.raises(cka_hooks.ModelError, match="returned a dict"):
        cka_hooks.compare({"a": lambda: {"no": "model"}}, loader(), progress=False)
    with pytest.raises(cka_hooks.ModelError, match=r"found the class dict: pass an instance"):
        cka_hooks.compare({"a": dict}, loader(), progress=False)
    with pytest.raises(cka_hooks.OptionError, match="iterated only once"):
        cka_hooks.compare({"a": lambda: model(0)}, iter(loader()), progress=False)


def test_functions_that_need_arguments_are_refused_before_anything_runs() -> None:
    def builds() -> nn.Module:
        raise AssertionError("was built")

    for wrong in (model(0).forward, lambda seed: model(seed)):
        with pytest.raises(cka_hooks.ModelError, match="model 'b' is a function that needs arguments"):
            cka_hooks.compare({"a": builds, "b": wrong}, loader(), progress=False)


def test_random_state_is_untouched() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cka_hooks.compare({"a": lambda: model(0), "b": lambda: model(1)}, loader(), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
