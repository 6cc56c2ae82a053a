import dataclasses
import math

import pytest
import torch
from made_up import resnet_labels, result_of

from cka_hooks.results.result import CKAResult, Influence
from cka_hooks.results.words import summary, value_in_words


def with_values(labels, pairs, models=(), **fields):
    """A result of these labels with 0.2 everywhere but the diagonal and the given pairs."""
    count = len(labels)
    matrix = torch.full((count, count), 0.2, dtype=torch.float64).fill_diagonal_(1.0)
    for (a, b), value in pairs.items():
        i, j = labels.index(a), labels.index(b)
        matrix[i, j] = matrix[j, i] = value
    values = {
        "rows": tuple(labels),
        "columns": tuple(labels),
        "matrix": matrix,
        "stderr": torch.full_like(matrix, 0.01).fill_diagonal_(0.0),
        "samples": 320,
        "minibatches": 10,
        "degrees_of_freedom": 9,
        "models": models,
    }
    return CKAResult(**{**values, **fields})


def test_size_and_largest_error():
    assert summary(CKAResult.example()).startswith(
        "3 layers, 640 samples in 20 minibatches; largest standard error 0.020."
    )
    two = result_of({"a": ["x", "y"], "b": ["x", "y", "z"]})
    assert summary(two).startswith("5 layers of 2 models (a: 2, b: 3), 640 samples")
    assert summary(two.between("a", "b")).startswith("2 layers against 3,")
    assert "over 4 passes" in summary(dataclasses.replace(two, passes=4))
    one = dataclasses.replace(two.select("a/x"), samples=1, minibatches=1, degrees_of_freedom=0)
    assert summary(one).startswith("1 layer, 1 sample in 1 minibatch;")


def test_the_most_alike_pair_is_not_a_trivial_one():
    text = summary(
        with_values(list("abcd"), {("a", "b"): 1.0 - 1e-9, ("a", "d"): 0.8, ("c", "d"): 0.7}),
    )
    assert "Most alike: a and d, CKA 0.800 (standard error 0.010)." in text
    assert "Identical up to rotation and scale: 1 pair, such as a and b." in text


def test_a_value_just_below_1_does_not_read_as_1():
    assert "CKA 0.99995 (standard error 0.010)" in summary(with_values(["a", "b"], {("a", "b"): 0.99995}))


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.0204, "0.020"), (0.0004, "0.00040"), (0.000043, "4.3e-05"), (4.29e-7, "4.3e-07"), (0.0, "0.0")],
)
def test_an_error_has_as_many_digits_as_tell_it_from_0(error, words):
    assert value_in_words(0.5, error) == f"CKA 0.500 (standard error {words})"


def test_the_largest_change_is_named_for_each_model():
    labels = ["m/a", "m/b", "m/c", "n/a", "n/b", "n/c"]
    pairs = {("m/a", "m/b"): 0.9, ("m/b", "m/c"): 0.5, ("n/a", "n/b"): 0.4, ("n/b", "n/c"): 0.9}
    text = summary(with_values(labels, pairs, models=("m", "n")))
    changes = "a -> b of n, CKA 0.400 (standard error 0.010); b -> c of m, CKA 0.500 (standard error 0.010)"
    assert f"Changes most from one layer to the next at {changes}." in text
    assert "Most alike within one model: m/a and m/b" in text
    assert "Most alike across models: " in text


def test_an_undefined_layer_is_stepped_over():
    result = result_of(["a", "b", "c", "d"], degenerate=("b",))
    text = summary(result)
    assert "nan" not in text
    assert "Undefined: 1 layer. b (its output is the same for every sample)." in text


def test_matches_are_counted_beside_chance():
    labels = [f"{model}/{layer}" for model in "mn" for layer in "abcd"]
    pairs = {("m/a", "n/a"): 0.9, ("m/b", "n/c"): 0.9, ("m/c", "n/c"): 0.9, ("m/d", "n/a"): 0.9}
    result = with_values(labels, pairs, models=("m", "n"))
    expected = (
        "Layers most similar to one at the same or a neighbouring depth of the other model: "
        "3 of 4 of m with n (chance: 2.5)."
    )
    assert expected in summary(result)
    assert expected in summary(result.between("m", "n"))


def test_depth_is_relative_where_the_networks_differ():
    short, long = resnet_labels((1, 1)), resnet_labels((4, 4))
    result = result_of({"a": short, "b": long})
    assert "depth of the other model: " in summary(result.between("a", "b"))


def test_missing_errors_are_said():
    nothing = torch.full((3, 3), math.nan, dtype=torch.float64).fill_diagonal_(0.0)
    result = dataclasses.replace(CKAResult.example(), stderr=nothing, minibatches=2, degrees_of_freedom=1)
    text = summary(result)
    assert "no standard errors, which need 3 minibatches in a pass: this run had 2." in text
    assert "Most alike: conv1 and conv2, CKA 0.900." in text


def test_what_was_left_out_is_grouped_by_reason_and_thinned():
    skipped = {f"aux.{i}": "it never ran." for i in range(9)} | {"pos": "it has no batch dimension"}
    text = summary(dataclasses.replace(CKAResult.example(), skipped=skipped))
    assert (
        "Left out: 10 layers. aux.0, aux.1, aux.2, and 6 more (it never ran); pos (it has no batch dimension)."
        in text
    )


def test_a_sample_that_decides_is_named():
    influence = {"conv1": Influence(0.2, 1), "conv2": Influence(0.7, 41), "fc": Influence(math.nan, 0)}
    text = summary(dataclasses.replace(CKAResult.example(), influence=influence))
    words = "One sample dominates: sample 41 of the run alone accounts for 70% of HSIC(layer, layer) of conv2."
    assert words in text
    assert "decides" not in summary(CKAResult.example())


@pytest.mark.parametrize("degenerate", [("a/x",), ("a/x", "a/y"), ("a/x", "a/y", "b/x", "b/y", "b/z")])
def test_every_result_can_be_read(degenerate):
    whole = result_of({"a": ["x", "y"], "b": ["x", "y", "z"]}, degenerate=degenerate)
    for result in (
        whole,
        whole.between("a", "b"),
        whole.between("b", "b"),
        whole.select(rows="a/x", columns="**"),
        whole.select("b/z"),
    ):
        assert "nan" not in summary(result)
        assert all(line.endswith(".") for line in summary(result).splitlines())


def test_ten_models_are_summed_up_in_few_lines():
    models = {f"epoch {i}": resnet_labels((1, 1)) for i in range(10)}
    text = summary(
        dataclasses.replace(result_of(models), skipped={f"epoch {i}/aux": "it never ran" for i in range(10)})
    )
    assert len(text.splitlines()) <= 8
    assert len(text) < 1500
    assert text.startswith("280 layers of 10 models (epoch 0: 28, ")
    assert "; and 42 more." in text
    assert "; and 7 more." in text


def test_the_largest_change_is_not_between_parallel_branches():
    labels = ["in", "block.conv", "block.downsample.0", "block.relu", "block2.branch1x1", "block2.branch3x3_1", "fc"]
    pairs = {
        ("in", "block.conv"): 0.8,
        ("block.conv", "block.downsample.0"): 0.01,
        ("block.downsample.0", "block.relu"): 0.02,
        ("block.conv", "block.relu"): 0.7,
        ("block.relu", "block2.branch1x1"): 0.6,
        ("block2.branch1x1", "block2.branch3x3_1"): 0.03,
        ("block.relu", "block2.branch3x3_1"): 0.5,
        ("block2.branch3x3_1", "fc"): 0.04,
    }
    text = summary(with_values(labels, pairs))
    assert "to the next at block.relu -> block2.branch3x3_1, CKA 0.500" in text


def test_blocks_are_alike_throughout_and_not_only_step_by_step():
    labels = list("abcdef")
    near = {(x, y): 0.97 for x in "abc" for y in "abc" if x < y}
    chain = {("c", "d"): 0.96, ("d", "e"): 0.96, ("e", "f"): 0.96, ("d", "f"): 0.5}
    result = with_values(labels, near | chain)
    assert "Runs of near-identical layers (CKA above 0.95 with each other): a to c (3 layers)." in summary(result)
