"""Which layer follows which, from labels in order of execution."""

import itertools

import pytest

from cka_hooks.results.order import followers


def following(*names):
    return [(names[a], names[b]) for a, b in followers(list(names))]


def test_a_chain_is_a_chain():
    names = ["conv1", "layer1.0.conv1", "layer1.0.bn1", "layer1.1.conv1", "relu", "relu#2", "fc"]
    assert following(*names) == list(itertools.pairwise(names))


def test_a_way_around_a_block_follows_nothing_and_is_passed():
    """As in torchvision's ResNets, whose downsampling runs after the third convolution and before the addition."""
    assert following("relu", "l.0.conv3", "l.0.downsample.0", "l.0.downsample.1", "l.0.relu#2", "l.1.conv1") == [
        ("relu", "l.0.conv3"),
        ("l.0.downsample.0", "l.0.downsample.1"),
        ("l.0.conv3", "l.0.relu#2"),
        ("l.0.relu#2", "l.1.conv1"),
    ]


def test_branches_of_one_block_follow_what_came_before_it():
    """As in torchvision's Inception."""
    assert following(
        "pool", "m.branch1x1.conv", "m.branch3x3_1.conv", "m.branch3x3_2a.conv", "m.branch_pool", "n"
    ) == [
        ("pool", "m.branch1x1.conv"),
        ("pool", "m.branch3x3_1.conv"),
        ("pool", "m.branch3x3_2a.conv"),
        ("pool", "m.branch_pool"),
    ]
    assert following(
        "pool", "m.branch5x5_1.conv", "m.branch5x5_1.bn", "m.branch5x5_2.conv", "m.branch_0", "m.branch_1"
    ) == [
        ("pool", "m.branch5x5_1.conv"),
        ("m.branch5x5_1.conv", "m.branch5x5_1.bn"),
        ("m.branch5x5_1.bn", "m.branch5x5_2.conv"),
        ("pool", "m.branch_0"),
        ("pool", "m.branch_1"),
    ]
    assert following("f.squeeze", "f.expand1x1", "f.expand1x1_activation", "f.expand3x3") == [
        ("f.squeeze", "f.expand1x1"),
        ("f.expand1x1", "f.expand1x1_activation"),
        ("f.squeeze", "f.expand3x3"),
    ]


@pytest.mark.parametrize(
    "names", [("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v")]
)
def test_query_key_and_value_stand_beside_one_another(names):
    q, k, v = (f"block.attn.{name}" for name in names)
    assert following("block.ln", q, k, v, "block.attn.out_proj", "block.mlp") == [
        ("block.ln", q),
        ("block.ln", k),
        ("block.ln", v),
        ("block.attn.out_proj", "block.mlp"),
    ]


def test_one_letter_of_an_alphabet_is_no_branch():
    names = list("pqrstuvw")
    assert following(*names) == list(itertools.pairwise(names))


def test_both_halves_of_a_gated_layer_have_one_input():
    assert following("ln", "mlp.gate_proj", "mlp.act_fn", "mlp.up_proj", "mlp.down_proj") == [
        ("ln", "mlp.gate_proj"),
        ("ln", "mlp.up_proj"),
        ("mlp.act_fn", "mlp.down_proj"),
    ]


def test_two_towers_do_not_follow_one_another():
    assert following("vision_model.a", "vision_model.b", "text_model.a", "text_model.b", "logits") == [
        ("vision_model.a", "vision_model.b"),
        ("text_model.a", "text_model.b"),
    ]
