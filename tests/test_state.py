"""What a run adds up: however it is split, the state is the same, and no way of combining forgets a field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cka_hooks import CKAAccumulator, OptionError
from cka_hooks.hsic import centre
from cka_hooks.null import null_cumulants, null_numbers
from cka_hooks.options import Options
from cka_hooks.run import checkpoint
from cka_hooks.similarity import reduce
from cka_hooks.similarity.state import DECLARED, State, Step, _field, append, keep_first, sum_up

KEPT = Options(keep_minibatches=True, permutations=3)
LAYERS = ("a", "b", "c")
few = settings(max_examples=25, deadline=None)


def steps_of(batches: list[dict[str, Tensor]]) -> list[Step]:
    found = []
    for batch in batches:
        cka = CKAAccumulator(minibatch=6)
        for layer, activation in batch.items():
            cka.observe(layer, activation)
        found.append(cka.step())
    return found


@st.composite
def runs(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    """Batches of various sizes, some too small to count, in which a layer may be missing or not finite."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    batches = []
    for _ in range(draw(st.integers(1, 6))):
        samples = draw(st.integers(2, 20))
        batch = {layer: torch.randn(samples, 5, generator=generator) for layer in LAYERS}
        if draw(st.integers(0, 4)) == 0:
            batch["b"][0] = torch.nan
        if draw(st.integers(0, 4)) == 0:
            del batch["c"]
        batches.append(batch)
    return batches


def added(steps: list[Step], kind: type[State] = State) -> State:
    state = kind.blank(KEPT)
    for number, step in enumerate(steps):
        state.add(step, KEPT)
        state.merge(kind(classes={str(number % 3): step.samples}, neighbours=step.samples - 1))
    state.skipped = {"head": "did not run"} if steps else {}
    return state


def assert_same(one: State, other: State) -> None:
    assert one.layers == other.layers
    for name in DECLARED:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, list) and DECLARED[name].axes:
            count = len(one.layers)
            mine, theirs = (
                torch.cat([*them, torch.empty(0, count, count, dtype=torch.float64)]) for them in (mine, theirs)
            )
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
        else:
            assert mine == theirs, name


class Stop(Exception):
    pass


def of_ranks(states: list[State], patch: pytest.MonkeyPatch) -> State:
    """What `reduced` gives on the first rank, with the collectives of a process group in this process."""
    handed: list[Any] = []
    flat: list[Tensor] = []

    def hand_in(mine: Any, group: Any) -> list[Any]:
        handed.append(mine)
        raise Stop

    def sum_up(mine: Tensor, group: Any) -> None:
        flat.append(mine.clone())
        raise Stop

    patch.setattr(reduce, "_device_of", lambda group: torch.device("cpu"))
    patch.setattr(reduce, "exchanged", hand_in)
    for state in states:
        with pytest.raises(Stop):
            reduce.reduced(state, None)
    patch.setattr(reduce, "exchanged", lambda mine, group: handed)
    patch.setattr(torch.distributed, "all_reduce", sum_up)
    for state in states:
        with pytest.raises(Stop):
            reduce.reduced(state, None)
    patch.setattr(torch.distributed, "all_reduce", lambda mine, group: mine.copy_(sum(flat)))
    return reduce.reduced(states[0], None)


@contextmanager
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def in_turn(steps: list[Step], state: State) -> State:
    """As if the first layer were one model and all others another one, and the first model had run first."""
    parts: dict[str, list[Step]] = {"first": [], "second": []}
    for step in steps:
        for name, chosen in (("first", LAYERS[:1]), ("second", LAYERS[1:])):
            groups = []
            for group in step.groups:
                index = torch.tensor([i for i, layer in enumerate(group.layers) if layer in chosen])
                layers = tuple(layer for layer in group.layers if layer in chosen)
                groups.append(type(group)(layers, *(tensor[index] for tensor in group[1:])))
            dtypes = {layer: dtype for layer, dtype in step.dtypes.items() if layer in chosen}
            parts[name].append(step._replace(groups=groups, dtypes=dtypes))
    states = {name: added(its, type(state)) for name, its in parts.items()}
    return type(state).joined(states, parts, KEPT)


def through_a_file(state: State, path: Path) -> State:
    checkpoint.write(path, {"settings": {}, "state": state.state_dict()})
    return type(state).from_state_dict(checkpoint.read(path)["state"])


@few
@given(run=runs(), data=st.data())
def test_any_split_gives_the_same_state(run: list[dict[str, Tensor]], data: st.DataObject, tmp_path_factory) -> None:
    steps = steps_of(run)
    whole = added(steps)
    first = data.draw(st.integers(0, len(run)))
    second = data.draw(st.integers(first, len(run)))
    parts = [steps[:first], steps[first:second], steps[second:]]
    numbered = [number for number, part in enumerate(parts) for _ in part]
    assert len(numbered) == len(steps)

    def states() -> list[State]:
        found, at = [], 0
        for part in parts:
            state = State.blank(KEPT)
            for number, step in enumerate(part, at):
                state.add(step, KEPT)
                state.merge(State(classes={str(number % 3): step.samples}, neighbours=step.samples - 1))
            state.skipped = {"head": "did not run"} if part else {}
            found.append(state)
            at += len(part)
        return found

    merged = State()
    for state in states():
        merged.merge(state)
    assert_same(merged, whole)

    with patched() as patch:
        assert_same(of_ranks(states(), patch), whole)

    restored = through_a_file(states()[0], tmp_path_factory.mktemp("state") / "state.ckpt")
    for state in states()[1:]:
        restored.merge(state)
    assert_same(restored, whole)

    joined = in_turn(steps, State())
    joined = joined.at(whole.layers)
    assert_same(joined, whole)


@dataclass
class Extended(State):
    """As if somebody had declared three more fields."""

    cubes: Tensor = _field(sum_up, of=lambda it, hsic: hsic.diagonal(dim1=-2, dim2=-1).pow(3).sum(0), axes=1)
    colours: dict[str, str] = _field(keep_first, dict, of_layers=True, items=str)
    tags: list[str] = _field(append, list)


def test_a_field_that_is_declared_goes_every_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Merging, ranks, models in turn, saving and restoring must not forget it."""
    generator = torch.Generator().manual_seed(0)
    batches = [{layer: torch.randn(12, 5, generator=generator) for layer in LAYERS} for _ in range(4)]
    steps = steps_of(batches)
    for name in ("cubes", "colours", "tags"):
        monkeypatch.setitem(DECLARED, name, Extended.__dataclass_fields__[name].metadata["is"])

    def state_of(some: list[Step], tag: str) -> Extended:
        state = added(some, Extended)
        assert isinstance(state, Extended)
        state.classes = {}
        state.neighbours = 0
        state.colours, state.tags = {"a": "red"}, [tag]
        return state

    expected = torch.stack([step.groups[0].vectors.square().sum(-1).pow(3).sum(1) for step in steps]).sum(0)
    ways: dict[str, State] = {}
    ways["merged"] = state_of(steps[:2], "first")
    ways["merged"].merge(state_of(steps[2:], "second"))
    ways["ranks"] = of_ranks([state_of(steps[:2], "first"), state_of(steps[2:], "second")], monkeypatch)
    ways["restored"] = through_a_file(state_of(steps[:2], "first"), tmp_path / "state.ckpt")
    ways["restored"].merge(state_of(steps[2:], "second"))
    for way, state in ways.items():
        assert isinstance(state, Extended), way
        torch.testing.assert_close(state.cubes, expected, rtol=1e-12, atol=0, msg=way)
        assert state.colours == {"a": "red"}, way
        assert state.tags == ["first", "second"], way
    joined = in_turn(steps, Extended())
    assert isinstance(joined, Extended)
    torch.testing.assert_close(joined.cubes, expected, rtol=1e-12, atol=0)
    for state in ways.values():
        state.tags.clear()
    states = {"first": state_of(steps, "one"), "second": Extended()}
    both = Extended.joined(states, {}, Options())
    assert (both.colours, both.tags) == ({"a": "red"}, ["one"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("minibatches", -1),
        ("samples", True),
        ("samples", 1.0),
        ("layers", ["a", "a", "b"]),
        ("layers", "abc"),
        ("moments", torch.zeros(4, 2, 2, dtype=torch.float64)),
        ("moments", torch.zeros(4, 3, 3)),
        ("spread", [0.0, 0.0, 0.0]),
        ("kept", torch.zeros(3, 3, dtype=torch.float64)),
        ("classes", {"0": "many"}),
        ("skipped", {"a": 1}),
        ("tags", []),
        ("stopped", 3),
        ("passes", 0),
    ],
)
def test_what_is_no_state_is_refused_by_field(name: str, value: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    state = added(steps_of([{layer: torch.randn(12, 5, generator=generator) for layer in LAYERS}])).state_dict()
    json.dumps({key: item for key, item in state.items() if not isinstance(item, Tensor)})
    State.from_state_dict(state)
    with pytest.raises(OptionError, match=name):
        State.from_state_dict({**state, name: value})


def test_the_null_is_that_of_the_first_pass() -> None:
    """Against the cumulants of each minibatch by itself; see test_null.py for those."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        {layer: torch.randn(n, 5, generator=generator, dtype=torch.float64) for layer in LAYERS} for n in (8, 12)
    ]
    cka = CKAAccumulator()
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for batch in batches:
        cka.update(batch)
        n = len(batch["a"])
        centred = centre(torch.stack([x @ x.mT for x in batch.values()]))
        own = centred.square().sum((-2, -1)) / n
        expected += null_cumulants(own[:, None], null_numbers(centred)[:, None], n)
    torch.testing.assert_close(cka.state.null, expected, rtol=1e-6, atol=1e-9)
    cka.start_pass()
    cka.update(batches[0])
    torch.testing.assert_close(cka.state.null, expected, rtol=1e-6, atol=1e-9)
    biased = CKAAccumulator(estimator="biased")
    biased.update(batches[0])
    assert not bool(biased.state.null[1].any())


def test_a_state_of_the_version_that_counted_layers_by_label_is_read() -> None:
    cka = CKAAccumulator()
    for batch in torch.randn(3, 2, 16, 4, generator=torch.Generator().manual_seed(0)):
        cka.update({"a": batch[0], "b": batch[1]})
    saved = cka.state_dict()
    saved["state"]["seen"] = {"a": 3, "b": 3}
    other = CKAAccumulator()
    other.load_state_dict(saved)
    assert torch.equal(other.compute().matrix, cka.compute().matrix)
