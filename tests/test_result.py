import copy
import dataclasses
import math
import pickle

import numpy as np
import pandas
import pytest
import torch
from made_up import resnet_labels, result_of
from scipy import stats

from cka_hooks.errors import LayerError, OptionError
from cka_hooks.results.diff import diff
from cka_hooks.results.result import CKAResult, Influence
from cka_hooks.results.uncertainty import Difference

TWO = {"small": ["conv1", "layer1.0", "fc"], "small/b": ["conv1", "layer1.0", "layer1.1", "fc"]}


def changed(**fields):
    return dataclasses.replace(CKAResult.example(), **fields)


# ---- construction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"rows": ("a", "b")}, r"shape \(3, 3\); its labels need \(2, 3\)"),
        ({"rows": ("a", "b", "a")}, "'a' more than once"),
        ({"rows": ("a", "b", 3)}, "contains 3"),
        ({"rows": ()}, "at least one row"),
        ({"minibatch_hsic": torch.zeros(3, 3, dtype=torch.float64)}, r"shape \(3, 3\); its labels need \(3, 3, 3\)"),
        ({"minibatch_hsic": torch.tensor(1.0, dtype=torch.float64)}, r"shape \(\)"),
        ({"matrix": torch.zeros(3, 3)}, "float32"),
        ({"matrix": [[1.0]]}, "list"),
        ({"rows": "abc"}, r"its labels need \(1, 3\)"),
        ({"samples": 2**60}, "samples is"),
        ({"matrix": torch.full((3, 3), math.inf, dtype=torch.float64)}, "infinity"),
        ({"stderr": torch.full((3, 3), -1.0, dtype=torch.float64)}, "negative"),
        ({"samples": -1}, "samples is -1"),
        ({"degrees_of_freedom": 2.0}, "degrees_of_freedom is 2.0"),
        ({"passes": 0}, "1 or more"),
        ({"minibatch_layers": ("a",)}, "minibatch_hsic has shape"),
        ({"settings": {"model": object()}}, "settings"),
        ({"settings": [1]}, "use a dict"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, found):
    with pytest.raises(OptionError, match=found):
        changed(**fields)


def test_a_result_does_not_share_its_dicts():
    skipped, settings = {"aux": "it never ran"}, {"shape": (3, 32)}
    result = changed(skipped=skipped, settings=settings)
    skipped["other"] = settings["other"] = "later"
    assert result.skipped == {"aux": "it never ran"}
    assert result.settings == {"shape": [3, 32]}  # as a file gives it back


def test_equality_is_by_value_and_nan_equals_nan():
    a = result_of(resnet_labels((1,)), degenerate=("fc",), keep=True)
    b = result_of(resnet_labels((1,)), degenerate=("fc",), keep=True)
    assert a == b
    assert a != dataclasses.replace(b, samples=1)
    assert a != dataclasses.replace(b, matrix=b.matrix + 1e-16 + b.matrix * 1e-15)
    assert changed(influence={"fc": Influence(math.nan, 0)}) == changed(influence={"fc": Influence(math.nan, 0)})
    assert a != "a"


# ---- reading values ---------------------------------------------------------------------------------


def test_a_value_is_found_by_two_labels_in_either_order():
    result = result_of(TWO)
    assert result["small/conv1", "small/b/fc"] == result.matrix[0, 6].item()
    block = result.between("small", "small/b")
    assert block["small/conv1", "small/b/fc"] == block["small/b/fc", "small/conv1"] == result.matrix[0, 6].item()


def test_an_unknown_label_is_answered_with_the_closest():
    with pytest.raises(LayerError, match=r"no layer 'conv3'.*'conv1'"):
        CKAResult.example()["conv3", "fc"]
    with pytest.raises(LayerError, match="both rows"):
        result_of(TWO).between("small", "small/b")["small/conv1", "small/fc"]
    for pair in ("conv1", ("conv1",), ("conv1", 2), ["conv1", "fc"]):
        with pytest.raises(OptionError, match="pair"):
            CKAResult.example()[pair]


def test_layers_are_the_rows_then_the_other_columns():
    result = result_of(TWO)
    assert result.layers == result.rows
    assert result.between("small", "small/b").layers == result.rows
    assert result.select(rows="small/conv1", columns=["small/conv1", "small/fc"]).layers == (
        "small/conv1",
        "small/fc",
    )


def test_the_interval_is_student_t_and_not_clamped():
    matrix = torch.tensor([[1.0, 0.99]], dtype=torch.float64)
    result = changed(
        rows=("a",),
        columns=("a", "b"),
        matrix=matrix,
        stderr=torch.tensor([[0.0, 0.02]], dtype=torch.float64),
        degrees_of_freedom=4,
    )
    low, high = result.interval(0.9)
    half = stats.t.ppf(0.95, 4) * 0.02
    assert torch.allclose(low, matrix - torch.tensor([[0.0, half]], dtype=torch.float64), atol=1e-14)
    assert high[0, 1] > 1
    assert (low[0, 0], high[0, 0]) == (1, 1)


def test_the_interval_is_nan_where_the_error_is():
    nothing = torch.full((3, 3), math.nan, dtype=torch.float64).fill_diagonal_(0)
    low, high = changed(stderr=nothing, degrees_of_freedom=0).interval()
    assert low.diagonal().tolist() == high.diagonal().tolist() == [1, 1, 1]
    assert low[0, 1].isnan()
    assert high[0, 1].isnan()


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan, "0.95"])
def test_a_level_is_between_0_and_1(level):
    with pytest.raises(OptionError, match="level"):
        CKAResult.example().interval(level)


# ---- differences ------------------------------------------------------------------------------------


def result_from(hsic, passes=1):
    count = hsic.shape[1]
    labels = tuple("abcdef"[:count])
    total = hsic.sum(0)
    own = total.diagonal().sqrt()
    matrix = (total / own[:, None] / own[None, :]).fill_diagonal_(1.0)
    return CKAResult(
        rows=labels,
        columns=labels,
        matrix=matrix,
        stderr=torch.zeros_like(matrix),
        samples=1,
        minibatches=len(hsic),
        degrees_of_freedom=len(hsic) // passes - 1,
        minibatch_hsic=hsic,
        minibatch_layers=labels,
        passes=passes,
    )


def random_hsic(batches, generator):
    """Minibatch values that vary together, as those of layers on the same samples do."""
    features = torch.randn(batches, 4, 30, generator=generator, dtype=torch.float64)
    features = features + 1.5 * features[:, :1]
    return features @ features.mT


def test_a_difference_is_the_difference_of_the_entries():
    result = result_from(random_hsic(25, torch.Generator().manual_seed(0)))
    found = result.difference(("a", "b"), ("c", "d"))
    assert found.value == pytest.approx(result["a", "b"] - result["c", "d"], abs=1e-14)
    assert found.degrees_of_freedom == 24
    half = stats.t.ppf(0.975, 24) * found.stderr
    assert found.interval() == pytest.approx((found.value - half, found.value + half))


def test_the_error_of_a_difference_agrees_with_the_jackknife():
    hsic = random_hsic(200, torch.Generator().manual_seed(1))
    left_out = []
    for b in range(len(hsic)):
        rest = result_from(torch.cat([hsic[:b], hsic[b + 1 :]]))
        left_out.append(rest["a", "b"] - rest["a", "c"])
    jackknife = math.sqrt((len(hsic) - 1) * np.var(left_out))
    assert result_from(hsic).difference(("a", "b"), ("a", "c")).stderr == pytest.approx(jackknife, rel=0.02)


def test_the_error_of_a_difference_is_the_spread_between_runs():
    generator = torch.Generator().manual_seed(2)
    runs = [result_from(random_hsic(40, generator)).difference(("a", "b"), ("c", "d")) for _ in range(500)]
    spread = np.std([run.value for run in runs])
    assert np.sqrt(np.mean([run.stderr**2 for run in runs])) == pytest.approx(spread, rel=0.12)


def test_correlated_entries_have_a_smaller_error_than_independent_ones_would():
    hsic = random_hsic(100, torch.Generator().manual_seed(3))
    hsic[:, 2] = hsic[:, 1] * 1.01
    hsic[:, :, 2] = hsic[:, :, 1] * 1.01
    hsic[:, 2, 2] = hsic[:, 1, 1]
    hsic[:, 2, 1] = hsic[:, 1, 2] = hsic[:, 1, 1]
    result = result_from(hsic)
    own = result.difference(("a", "b"), ("b", "b")).stderr
    assert result.difference(("a", "b"), ("a", "c")).stderr < 0.1 * own


def test_passes_over_the_same_samples_do_not_make_the_error_smaller():
    hsic = random_hsic(50, torch.Generator().manual_seed(4))
    once = result_from(hsic).difference(("a", "b"), ("a", "c"))
    twice = result_from(torch.cat([hsic, hsic]), passes=2).difference(("a", "b"), ("a", "c"))
    assert twice.value == pytest.approx(once.value, abs=1e-14)
    assert twice.stderr == pytest.approx(once.stderr, rel=0.02)
    assert twice.degrees_of_freedom == 49


def test_a_difference_without_an_answer_is_nan_or_an_error():
    with pytest.raises(OptionError, match="keep_minibatches=True"):
        result_of(["a", "b"]).difference(("a", "b"), ("a", "a"))
    result = result_from(random_hsic(2, torch.Generator().manual_seed(5)))
    assert math.isnan(result.difference(("a", "b"), ("a", "c")).stderr)
    assert not math.isnan(result.difference(("a", "b"), ("a", "c")).value)
    with pytest.raises(LayerError, match="no layer 'x'"):
        result.difference(("a", "x"), ("a", "c"))
    with pytest.raises(OptionError, match="pair"):
        result.difference("ab", ("a", "c"))
    dead = dataclasses.replace(result, degenerate={"c": "constant"})
    assert math.isnan(dead.difference(("a", "b"), ("a", "c")).value)
    assert result.difference(("a", "a"), ("b", "b")).value == pytest.approx(0, abs=1e-15)
    with pytest.raises(OptionError, match="level"):
        Difference(0.1, 0.1, 3).interval(2)


def test_a_difference_reaches_pairs_that_a_cut_removed():
    whole = result_of(TWO, keep=True)
    pairs = (("small/conv1", "small/fc"), ("small/conv1", "small/b/fc"))
    assert whole.between("small", "small/b").difference(*pairs) == whole.difference(*pairs)


# ---- cutting ----------------------------------------------------------------------------------------


def test_between_cuts_one_model_against_another():
    whole = dataclasses.replace(
        result_of(TWO, degenerate=("small/fc", "small/b/fc"), keep=True),
        skipped={"small/aux": "it never ran", "small/b/aux": "it never ran"},
    )
    block = whole.between("small", "small/b")
    assert block.rows == ("small/conv1", "small/layer1.0", "small/fc")
    assert block.columns == tuple(f"small/b/{layer}" for layer in TWO["small/b"])
    assert torch.equal(block.matrix.nan_to_num(), whole.matrix[:3, 3:].nan_to_num())
    assert torch.equal(block.stderr.nan_to_num(), whole.stderr[:3, 3:].nan_to_num())
    assert block.models == ("small", "small/b")
    assert block.minibatch_layers == whole.minibatch_layers
    own = whole.between("small", "small")
    assert own.square
    assert own.degenerate.keys() == {"small/fc"}
    assert own.skipped.keys() == {"small/aux"}
    assert own.influence.keys() == set(own.rows)
    assert own.models == ("small",)
    turned = whole.between("small/b", "small")
    assert torch.equal(turned.matrix.nan_to_num(), block.matrix.T.nan_to_num())


def test_between_names_the_models_there_are():
    with pytest.raises(LayerError, match=r"'large'.*'small', 'small/b'"):
        result_of(TWO).between("small", "large")
    with pytest.raises(LayerError, match="mapping"):
        CKAResult.example().between("a", "b")
    with pytest.raises(LayerError, match="column"):
        result_of(TWO).between("small", "small/b").between("small", "small")


def test_a_model_whose_name_begins_like_another_keeps_its_layers():
    result = result_of(TWO)
    assert result.model_of("small/b/conv1") == "small/b"
    assert result.layer_of("small/b/conv1") == "conv1"
    assert CKAResult.example().model_of("conv1") == ""
    assert CKAResult.example().layer_of("conv1") == "conv1"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("conv1", 1),
        ("layer1.*.conv1", 2),
        ("layer*.*.conv?", 24),
        ("layer1.*", 0),
        ("layer1.**", 20),
        ("layer[12].0.bn1", 2),
        ("**.relu#2", 8),
        (["fc", "conv1"], 2),
    ],
)
def test_select_by_label_and_glob(pattern, count):
    result = result_of(resnet_labels())
    if count == 0:
        with pytest.raises(LayerError, match="closest"):
            result.select(pattern)
        return
    part = result.select(pattern)
    assert len(part.rows) == count
    assert part.rows == tuple(label for label in result.rows if label in part.rows)  # order is kept
    assert part[part.rows[0], part.rows[-1]] == result[part.rows[0], part.rows[-1]]


def test_select_rows_and_columns_apart():
    result = dataclasses.replace(result_of(TWO), skipped={"small/aux": "why", "small/b/aux": "why"})
    part = result.select(rows="small/conv1", columns="small/b/**")
    assert part.matrix.shape == (1, 4)
    assert part.skipped.keys() == {"small/b/aux"}
    assert result.select("small/*", columns="small/b/fc").columns == ("small/b/fc",)
    assert result.select() == result
    for nothing in ([], [3], 3):
        with pytest.raises(OptionError):
            result.select(nothing)
    assert changed(rows=("a", "b[z-a]", "c"), columns=("x", "y", "z")).select(rows="b[z-a]").rows == ("b[z-a]",)


# ---- showing and exporting --------------------------------------------------------------------------


def test_repr_is_short():
    assert repr(result_of(resnet_labels())) == "CKAResult(86 layers, 640 samples, 20 minibatches)"
    text = repr(result_of(TWO).between("small", "small/b"))
    assert text.startswith("CKAResult(3 x 4 layers, ")
    assert text.endswith("columns: 1 small/b/conv1, 2 small/b/layer1.0, 3 small/b/layer1.1, 4 small/b/fc")
    assert "nan" in repr(result_of(["a", "b"], degenerate=("b",)))


def test_a_dataframe_has_the_labels_and_is_a_copy():
    result = result_of(TWO, degenerate=("small/fc",))
    frame = result.between("small", "small/b").to_dataframe()
    assert frame.loc["small/conv1", "small/b/fc"] == result["small/conv1", "small/b/fc"]
    assert math.isnan(frame.loc["small/fc", "small/b/fc"])
    frame.iloc[0, 0] = 7.0
    assert result.between("small", "small/b").matrix[0, 0] != 7
    tidy = result.to_dataframe(tidy=True)
    assert list(tidy.columns) == ["row", "column", "cka", "stderr"]
    assert len(tidy) == 49
    line = tidy[(tidy.row == "small/conv1") & (tidy.column == "small/b/fc")].iloc[0]
    assert line.stderr == result.stderr[0, 6].item()


def test_csv_comes_back_bit_for_bit(tmp_path):
    labels = ["with,comma", 'with "quotes"', "with\nnewline", "Schicht-ß", "conv1"]
    result = result_of(labels, degenerate=("conv1",))
    result.to_csv(tmp_path / "cka.csv")
    frame = pandas.read_csv(tmp_path / "cka.csv", index_col=0, dtype=str)
    assert list(frame.index) == list(frame.columns) == labels
    assert np.array_equal(frame.astype(float).to_numpy(), result.matrix.numpy(), equal_nan=True)
    result.to_csv(tmp_path / "tidy.csv", tidy=True)
    tidy = pandas.read_csv(tmp_path / "tidy.csv", dtype=str)
    assert np.array_equal(tidy.stderr.astype(float).to_numpy().reshape(5, 5), result.stderr.numpy(), equal_nan=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cka.csv", "tidy.csv"]


def test_npz_needs_no_pickle(tmp_path):
    result = result_of(TWO, degenerate=("small/fc",)).between("small", "small/b")
    result.to_npz(tmp_path / "cka.npz")
    with np.load(tmp_path / "cka.npz", allow_pickle=False) as file:
        assert tuple(file["rows"]) == result.rows
        assert tuple(file["columns"]) == result.columns
        assert np.array_equal(file["matrix"], result.matrix.numpy(), equal_nan=True)
        assert np.array_equal(file["stderr"], result.stderr.numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("result", "rows", "columns"),
    [
        (CKAResult.example(), 3, 3),
        (result_of(TWO).between("small", "small/b"), 3, 4),
        (result_of(resnet_labels((3, 8, 36, 3)), degenerate=("fc",)), 32, 32),
    ],
)
def test_a_notebook_shows_a_small_table(result, rows, columns):
    page = result._repr_html_()
    assert page.count("<tr") - page.count("<tr><th></th>") == rows
    assert page.count("<td") == rows * columns
    assert len(page) < 70_000
    assert "<script" not in page


def test_markup_in_labels_stays_text_in_a_notebook():
    page = result_of(['<img src=x onerror="x">', "a&b", "</td>"])._repr_html_()
    assert "<img" not in page
    assert "a&amp;b" in page
    assert page.count("</td>") == 9


@pytest.mark.parametrize(
    ("library", "call", "extra"),
    [
        ("pandas", lambda r, p: r.to_dataframe(), r"cka-hooks\[dataframe\]"),
        ("matplotlib", lambda r, p: r.plot(p / "a.png"), r"cka-hooks\[plot\]"),
        ("matplotlib", lambda r, p: r.plot_profile(p / "a.png"), r"cka-hooks\[plot\]"),
    ],
)
def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch, tmp_path, library, call, extra):
    from cka_hooks.errors import MissingExtraError

    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingExtraError, match=f'pip install "{extra}"'):
        call(CKAResult.example(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- another default device -------------------------------------------------------------------------


@pytest.fixture
def meta_by_default():
    """As in a notebook that makes everything on an accelerator, but on a device that holds no numbers at all."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


WHOLE = result_of(TWO, degenerate=("small/fc",), keep=True)


@pytest.mark.usefixtures("meta_by_default")
@pytest.mark.parametrize("result", [WHOLE, WHOLE.between("small", "small/b"), WHOLE.select("small/conv1")])
def test_a_result_does_not_care_for_the_default_device(result, tmp_path):
    result.save(tmp_path / "cka.json")
    assert CKAResult.load(tmp_path / "cka.json") == result
    assert result.select("**") == pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
    for suffix in ("csv", "npz", "html", "svg"):
        result.export(tmp_path / f"cka.{suffix}")
    result.plot(tmp_path / "values.png", values=True, stderr=True)
    for shown in (repr(result), result.summary(), result._repr_html_(), str(diff(result, result))):
        assert shown
    low, high = result.interval()
    assert low.device.type == high.device.type == "cpu"
    assert result.difference(("small/conv1", "small/b/fc"), ("small/conv1", "small/layer1.0")).stderr > 0
    assert CKAResult.example().between is not None


@pytest.mark.usefixtures("meta_by_default")
def test_the_example_is_made_on_the_cpu():
    assert CKAResult.example(("a", "b")).matrix.device.type == "cpu"


# ---- labels of others -------------------------------------------------------------------------------


def test_numpy_scalars_become_plain():
    result = changed(
        rows=tuple(np.array(["a", "b", "c"])),
        samples=np.int64(640),
        settings={"tolerance": np.float32(0.5), "seed": np.int64(3), "most": math.inf, "rate": torch.tensor(2)},
    )
    assert [type(label) for label in result.rows] == [str] * 3
    assert type(result.samples) is int
    assert result.settings == {"tolerance": 0.5, "seed": 3, "most": "Infinity", "rate": 2}


def test_a_model_without_a_name_beside_another():
    """`compare({"": a, "b": b})` makes labels of which some have no model."""
    result = dataclasses.replace(result_of({"": list("xyz"), "b": list("xyz")}), models=("b",))
    assert result.model_of("x") == ""
    assert "Most alike" in result.summary()
    assert result._repr_html_()


CONTROL = ["a\x1b[2J", "b\r\x07", "c\u202ed", "e\nf", "g\u2028h"]


@pytest.mark.parametrize("cut", [lambda r: r, lambda r: r.select(rows=r.rows[0], columns=r.rows[1:])])
def test_control_characters_are_never_printed(cut):
    result = dataclasses.replace(
        result_of(CONTROL), skipped={"s\x1b]0;x\x07": "why\x9b"}, settings={"k\x1b": "v\x1b"}, models=()
    )
    result = dataclasses.replace(
        result, degenerate={CONTROL[0]: "why\x1b"}, influence={CONTROL[0]: Influence(0.9, 1)}
    )
    result = cut(result)
    other = dataclasses.replace(result, settings={}, rows=("n\x1b", *result.rows[1:]), degenerate={})
    for text in (repr(result), result.summary(), str(diff(result, other)), str(diff(other, result))):
        assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "\\x1b[2J" in repr(result)


def test_labels_that_begin_a_formula_are_text_in_a_spreadsheet(tmp_path):
    labels = ["=1+1", "+a", "-b", "@c", "\t=d", "＝e", "\x85=f", "\ufeff=g", "conv1", "1-1", "a\r=1"]
    result = result_of(labels)
    result.to_csv(tmp_path / "cka.csv")
    frame = pandas.read_csv(tmp_path / "cka.csv", index_col=0, dtype=str)
    assert list(frame.index) == list(frame.columns) == [f"'{label}" for label in labels[:8]] + labels[8:]
    result.to_csv(tmp_path / "tidy.csv", tidy=True)
    tidy = pandas.read_csv(tmp_path / "tidy.csv", dtype=str)
    assert set(tidy.row) == set(tidy.column) == set(frame.index)


def test_the_time_a_run_took_does_not_make_results_differ():
    first, second = (changed(settings={"seconds": s, "kernel": "linear"}) for s in (1.0, 2.0))
    assert first == second
    assert first != changed(settings={"seconds": 1.0, "kernel": "rbf"})
    assert first == changed(settings={"kernel": "linear"})


def test_a_difference_of_an_undefined_layer_stays_undefined_after_a_cut():
    part = WHOLE.select("small/conv1")
    assert part.degenerate == {}
    assert math.isnan(part.difference(("small/conv1", "small/fc"), ("small/conv1", "small/b/fc")).value)
