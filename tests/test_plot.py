import itertools
import warnings

import matplotlib
import numpy as np
import processes
import pytest
from made_up import resnet_labels, result_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from cka_hooks.errors import CKAWarning, OptionError
from cka_hooks.results.result import CKAResult
from cka_hooks.views.labels import Side

RESNET18, RESNET152 = resnet_labels((2, 2, 2, 2)), resnet_labels((3, 8, 36, 3))
DENSENET = [
    "features.conv0",
    "features.norm0",
    *(
        f"features.denseblock{b}.denselayer{i}.{part}"
        for b in (1, 2, 3)
        for i in range(24)
        for part in ("norm1", "conv1")
    ),
    "classifier",
]
FLAT = [f"Conv_{i}" for i in range(397)]
ODD = ["a $x_1$ $", "b\nb", "c" * 300, "Schicht-ß", "\x00\x1b", "_hidden", "%s {} \\alpha", ""]
MANY = {f"model{i}": resnet_labels((1, 1)) for i in range(8)}

RESULTS = {
    "3": result_of(["conv1", "layer1.0.relu#2", "fc"]),
    "1": result_of(["conv1"]),
    "60 degenerate": result_of(RESNET18[:60], degenerate=("layer2.0.bn1", "layer2.0.relu", "conv1")),
    "all degenerate": result_of(["a", "b", "c"], degenerate=("a", "b", "c")),
    "400": result_of(RESNET152[:400], degenerate=("layer3.22.bn2",)),
    "flat 397": result_of(FLAT),
    "dense": result_of({"densenet121": DENSENET}),
    "two": result_of({"resnet18": RESNET18, "resnet152": RESNET152}),
    "eight": result_of(MANY),
    "odd": result_of(ODD),
    "long model name": result_of({"m" * 200: ["a", "b", "c"], "n": ["a"]}),
}
RESULTS["rectangular"] = RESULTS["two"].between("resnet18", "resnet152")
RESULTS["one row"] = RESULTS["two"].select(rows="resnet18/fc", columns="resnet152/**")
RESULTS["one column"] = RESULTS["two"].select(columns="resnet18/fc", rows="resnet152/**")

each_result = pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())


def draw(figure):
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter the font lacks
        figure.draw_without_rendering()
    return figure


def boxes(figure, axes):
    """The boxes in pixels of every text that stands outside the cells."""
    renderer = draw(figure).canvas.get_renderer()
    texts = [*model_names(axes), axes.title, axes._left_title]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        ticks = zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        texts += [label for label, place in ticks if low <= place <= high]
    texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
    legend = axes.get_legend()
    texts += legend.get_texts() if legend else []
    for child in axes.child_axes:
        texts += [*child.get_yticklabels(), child.yaxis.label]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]


def model_names(axes):
    return [*axes.get_yticklabels(minor=True), *axes.get_xticklabels(minor=True)]


def overlapping(found):
    return [
        (a, b)
        for (a, box), (b, other) in itertools.combinations(found, 2)
        if min(box.x1, other.x1) - max(box.x0, other.x0) > 0.5 and min(box.y1, other.y1) - max(box.y0, other.y0) > 0.5
    ]


@each_result
@pytest.mark.parametrize("method", ["plot", "plot_profile"])
def test_no_label_overlaps_another_or_leaves_the_picture(result, method, tmp_path):
    if method == "plot_profile" and result.rows == ("conv1",):
        pytest.skip("one layer has no profile")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure, axes = getattr(result, method)(tmp_path / "picture.png")
    found = boxes(figure, axes)
    assert overlapping(found) == []
    width, height = figure.canvas.get_width_height()
    for text, box in found:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    assert max(figure.get_size_inches()) < 14
    assert (tmp_path / "picture.png").stat().st_size > 1000


@each_result
def test_no_label_overlaps_another_in_axes_of_others(result):
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    assert result.plot(ax=axes) == (figure, axes)
    ticks = {"x": axes.get_xticklabels(), "y": axes.get_yticklabels()}
    renderer = draw(figure).canvas.get_renderer()
    for labels in ticks.values():
        assert overlapping([(label.get_text(), label.get_window_extent(renderer)) for label in labels]) == []


def image_of(axes):
    (image,) = [child for child in axes.get_children() if isinstance(child, AxesImage)]
    return image


def test_scale_map_and_origin(tmp_path):
    result = result_of(RESNET18)
    _, axes = result.plot(tmp_path / "a.png")
    image = image_of(axes)
    assert image.get_clim() == (0, 1)
    assert image.cmap.name == "viridis"
    assert image.origin == "lower"
    assert np.array_equal(image.get_array(), result.matrix.numpy())
    bottom, top = axes.get_ylim()
    assert bottom < top  # depth upwards


def test_undefined_layers_are_grey_and_hide_nothing(tmp_path):
    result = RESULTS["60 degenerate"]
    _, axes = result.plot(tmp_path / "a.png")
    image = image_of(axes)
    assert np.array_equal(image.get_array().mask, result.matrix.isnan().numpy())
    assert image.cmap(np.ma.masked)[3] == 0  # the background shows through
    assert np.allclose(axes.patch.get_facecolor(), (0.85, 0.85, 0.85, 1))
    assert axes.patch.get_hatch()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["undefined"]
    _, whole = result.select("layer1.**").plot(tmp_path / "b.png")
    assert whole.get_legend() is None


def test_standard_errors_have_a_scale_of_their_own(tmp_path):
    result = result_of(RESNET18)
    _, axes = result.plot(tmp_path / "a.png", stderr=True)
    image = image_of(axes)
    assert np.array_equal(image.get_array(), result.stderr.numpy())
    low, high = image.get_clim()
    assert low == 0
    assert result.stderr.max() <= high <= 2 * result.stderr.max()
    assert image.cmap.name != "viridis"


def test_colours_and_their_scale_can_be_chosen(tmp_path):
    result = result_of(RESNET18).select("layer1.**")
    lowest = result.matrix.min().item()
    _, axes = result.plot(tmp_path / "a.png", cmap="cividis", vmin=0.25, vmax=0.75)
    image = image_of(axes)
    assert (image.cmap.name, image.get_clim()) == ("cividis", (0.25, 0.75))
    assert image.colorbar.extend == "max"
    assert image.colorbar.ax.get_ylabel() == "CKA"
    _, axes = result.plot(tmp_path / "a.png", vmin="data", cmap=matplotlib.colormaps["magma"])
    low, high = image_of(axes).get_clim()
    assert lowest - 0.05 < low <= lowest
    assert high == 1
    assert image_of(axes).colorbar.ax.get_ylabel() == f"CKA, colours from {low:.4g} to 1"
    _, axes = result.plot(tmp_path / "a.png", stderr=True, vmin="data", vmax="data")
    low, high = image_of(axes).get_clim()
    assert low <= 0 < result.stderr.max() <= high < 2 * result.stderr.max()
    _, axes = result_of(["a"]).plot(tmp_path / "a.png", vmin="data")
    assert image_of(axes).get_clim() == (0.99, 1)
    _, axes = RESULTS["all degenerate"].plot(tmp_path / "a.png", vmin="data", vmax="data")
    assert image_of(axes).get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"cmap": "no such map"}, "cmap is 'no such map'"),
        ({"cmap": 3}, "cmap is 3"),
        ({"vmin": 1.0, "vmax": 0.5}, "vmin=1.0, vmax=0.5 would be a scale from 1.0 to 0.5"),
        ({"vmin": "low"}, '"data"'),
        ({"vmax": float("nan")}, "vmax=nan would be"),
        (
            {"vmin": 0.99, "vmax": "data", "stderr": True},
            "from 0.99 to 0.02: pass two numbers, the smaller one first",
        ),
        ({"figsize": (3,)}, "figsize is"),
        ({"figsize": (0, 3)}, "figsize is"),
        ({"figsize": 5}, "figsize is"),
        ({"figsize": (1, 1)}, "no room beside the labels: make it at least 1.* inches"),
        ({"figsize": (5, 5), "ax": Figure().add_subplot()}, "leave one of them out"),
    ],
)
def test_options_that_cannot_be_drawn_are_refused(tmp_path, options, found):
    with pytest.raises(OptionError, match=found):
        CKAResult.example().plot(tmp_path / "a.png", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("figsize", [(3.3, 3), (5, 4), (12, 9)])
@pytest.mark.parametrize("method", ["plot", "plot_profile"])
def test_a_figure_has_the_size_that_was_asked_for(tmp_path, method, figsize):
    figure, axes = getattr(result_of(RESNET18), method)(tmp_path / "a.png", figsize=figsize)
    assert figure.get_size_inches() == pytest.approx(figsize)
    found = boxes(figure, axes)
    assert overlapping(found) == []
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for _, box in found)


def test_one_layer_of_ten_models_is_labelled_by_the_models(tmp_path):
    result = result_of({f"a long name of epoch {i}": ["conv1", "layer4.1"] for i in range(10)}).select("*/layer4.1")
    _, axes = result.plot(tmp_path / "a.png")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(result.models)
    assert axes.get_title("left").replace("\n", " ") == "layer4.1 of 10 models: CKA, 640 samples"
    assert model_names(axes) == []
    mixed = result_of({"a": ["x", "y"], "b": ["x", "y"]}).select(["a/x", "b/y"])
    _, axes = mixed.plot(tmp_path / "a.png")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a/x", "b/y"]


def test_names_of_models_turn_where_they_are_long_and_are_not_shortened(tmp_path):
    models = {f"resnet50_epoch_{i}": ["layer4.1", "fc"] for i in range(10)}
    _, axes = result_of(models).plot(tmp_path / "a.png")
    assert [text.get_text() for text in model_names(axes)] == list(models) * 2


def test_names_that_differ_in_the_middle_stay_different_when_they_are_shortened(tmp_path):
    names = [f"{'a' * 40} {i} {'b' * 60}" for i in range(3)]
    result = result_of({name: ["conv1", "fc"] for name in names})
    _, axes = result.plot(tmp_path / "a.png")
    assert len({text.get_text() for text in model_names(axes)}) == 3
    _, axes = result.between(*names[:2]).plot(tmp_path / "a.png")
    models, _, _ = axes.get_title(loc="left").partition(":")
    assert "1" in models
    assert "0" in models
    assert "…" in models
    _, axes = result_of(names).plot(tmp_path / "a.png")
    assert len({text.get_text() for text in axes.get_yticklabels()}) == 3
    cells = result_of(names)._repr_html_().split("</th>")
    assert len({cell.rpartition(">")[2] for cell in cells}) >= 3


def test_values_in_cells(tmp_path):
    result = result_of(["a", "b", "c"], degenerate=("c",))
    _, axes = result.plot(tmp_path / "a.png", values=True)
    assert {text.get_text() for text in axes.texts} == {"1.00", f"{result['a', 'b']:.2f}"}
    _, axes = result.plot(tmp_path / "a.png", values=True, stderr=True)
    assert {text.get_text() for text in axes.texts if text.get_text().startswith("1.00")} == {"1.00\n±0"}
    assert all("±" in text.get_text() for text in axes.texts)
    assert image_of(axes).get_clim() == (0, 1)


@pytest.mark.parametrize("stderr", [False, True])
def test_values_stay_inside_their_cells(tmp_path, stderr):
    figure, axes = result_of(RESNET18).select("**.conv?").plot(tmp_path / "a.png", values=True, stderr=stderr)
    assert len(axes.texts) == 24**2
    renderer = draw(figure).canvas.get_renderer()
    cell = axes.get_window_extent().width / 24
    for text in axes.texts:
        box = text.get_window_extent(renderer)
        assert box.width < cell
        assert box.height < cell


def test_values_that_cannot_be_read_are_left_out_with_a_warning(tmp_path):
    with pytest.warns(CKAWarning, match="too small to write values"):
        _, axes = result_of(RESNET18).plot(tmp_path / "a.png", values=True)
    assert len(axes.texts) == 0


def test_models_are_named_and_separated(tmp_path):
    _, axes = RESULTS["two"].plot(tmp_path / "a.png")
    assert [text.get_text() for text in model_names(axes)] == ["resnet18", "resnet152"] * 2
    strong = [line for line in axes.lines if line.get_linewidth() > 1]
    assert len(strong) == 2
    assert strong[0].get_ydata()[0] == len(RESNET18) - 0.5
    _, axes = RESULTS["rectangular"].plot(tmp_path / "a.png")
    assert [text.get_text() for text in model_names(axes)] == ["resnet18", "resnet152"]
    assert "resnet18 against resnet152" in axes.get_title("left")


def test_a_title_is_written_as_it_is(tmp_path):
    _, axes = CKAResult.example().plot(tmp_path / "a.png", title="cost $5 and $6_")
    assert axes.get_title("left") == "cost $5 and $6_"


def test_files_are_written_without_pyplot(tmp_path):
    code = f"""
import sys
from cka_hooks.results.result import CKAResult
result = CKAResult.example(("a", "b"))
for suffix in ("pdf", "png", "svg"):
    result.plot({str(tmp_path / "map")!r} + "." + suffix)
    result.plot_profile({str(tmp_path / "profile")!r} + "." + suffix)
assert "matplotlib.pyplot" not in sys.modules
"""
    # Some releases of matplotlib call what is deprecated in pyparsing.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    done = processes.finished(*warnings, "-c", code, env={"MPLBACKEND": "TkAgg", "DISPLAY": ":99"})
    assert done.returncode == 0, done.stderr
    names = [f"{name}.{suffix}" for name in ("map", "profile") for suffix in ("pdf", "png", "svg")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("name", ["cka", "cka.docx", "cka.json"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    with pytest.raises(OptionError, match=r"cannot be drawn: .*png"):
        CKAResult.example().plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_path_and_axes_a_notebook_shows_the_figure():
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = CKAResult.example().plot()
    assert figure.number in pyplot.get_fignums()
    pyplot.close(figure)


def test_axes_of_a_subfigure(tmp_path):
    figure = Figure(figsize=(8, 4))
    left, right = figure.subfigures(1, 2)
    CKAResult.example().plot(ax=left.add_subplot())
    found, _ = CKAResult.example().plot_profile(tmp_path / "both.png", ax=right.add_subplot())
    assert found is figure
    assert (tmp_path / "both.png").exists()


# ---- the profile ------------------------------------------------------------------------------------


def test_the_profile_has_each_layer_with_the_one_it_follows(tmp_path):
    result = RESULTS["two"]
    _, axes = result.plot_profile(tmp_path / "a.png")
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert drawn.keys() == {"resnet18", "resnet152"}
    # A downsampling branch follows nothing, and what comes behind it follows the last layer before it.
    around = [i for i, name in enumerate(RESNET18) if name.endswith("downsample.0")]
    expected = [
        result.matrix[i - 3 if RESNET18[i - 1].endswith("downsample.1") else i - 1, i].item()
        for i in range(1, len(RESNET18))
        if i not in around
    ]
    assert drawn["resnet18"].tolist() == expected
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["resnet18", "resnet152"]
    colours = {line.get_color() for line in axes.get_legend().get_lines()}
    assert len(colours) == 2


@pytest.mark.parametrize("count", [4, 10, 24])
def test_many_models_have_their_names_beside_the_profile(tmp_path, count):
    names = [f"resnet50_epoch_{i}" for i in range(count)]
    figure, axes = result_of({name: resnet_labels((1, 1)) for name in names}).plot_profile(tmp_path / "a.png")
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == names
    draw(figure)
    inside = axes.get_window_extent()
    assert legend.get_window_extent().x0 >= inside.x1
    assert inside.x0 < 0.6 * figure.dpi  # nothing widens the figure to the left
    assert len({line.get_color() for line in legend.get_lines()}) == count


def test_the_profile_of_a_cut_has_the_best_matches(tmp_path):
    result = result_of({"a": ["x", "y", "z"], "b": ["x", "y"]}, degenerate=("a/z",)).between("a", "b")
    _, axes = result.plot_profile(tmp_path / "a.png")
    assert axes.get_lines()[0].get_ydata()[:2].tolist() == result.matrix[:2].max(dim=1).values.tolist()
    best = result.matrix[:2].argmax(dim=1).tolist()
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        *(f"{row} → {'xy'[column]}" for row, column in zip("xy", best, strict=True)),
        "z",
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["undefined"]


def test_one_layer_has_no_profile(tmp_path):
    with pytest.raises(OptionError, match="two layers"):
        result_of(["a"]).plot_profile(tmp_path / "a.png")


# ---- choosing the labels ----------------------------------------------------------------------------


def side(labels, models=None):
    return Side(models or [""] * len(labels), labels, labels)


@pytest.mark.parametrize("labels", [RESNET18, RESNET152, DENSENET, FLAT, ODD], ids=len)
@pytest.mark.parametrize("gap", [0.4, 1.0, 1.5, 4.0, 7.3, 50.0, 1000.0])
def test_written_labels_keep_their_distance_and_name_what_they_cover(labels, gap):
    spans = side(labels).thinned(gap)
    assert spans
    assert all(b.middle - a.middle >= gap for a, b in itertools.pairwise(spans))
    for span in spans:
        covered = labels[span.start : span.stop]
        assert all(label == span.name or label.startswith(span.name + ".") for label in covered)
    if gap <= 1:
        assert [span.name for span in spans] == labels


def test_room_is_used():
    for labels in (RESNET152, DENSENET, FLAT):
        assert len(side(labels).thinned(len(labels) / 60)) >= 20


def test_a_name_never_covers_two_models():
    models = ["a"] * 40 + ["b"] * 40
    for span in side([f"layer.{i % 40}" for i in range(80)], models).thinned(10.0):
        assert span.stop <= 40 or span.start >= 40


def test_sections_are_the_large_parts():
    def around_lines(labels):
        return [labels[round(place + 0.5)] for place in side(labels).section_lines()]

    assert around_lines(RESNET18) == [
        "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1", "avgpool",
    ]  # fmt: skip
    assert around_lines(DENSENET) == [f"features.denseblock{i}.denselayer0.norm1" for i in (1, 2, 3)] + ["classifier"]
    assert around_lines(FLAT) == []


def test_lines_between_models_are_not_between_sections():
    two = Side.of(RESULTS["two"], RESULTS["two"].rows)
    assert two.model_lines() == [len(RESNET18) - 0.5]
    assert len(two.section_lines()) == 10
    assert not set(two.model_lines()) & set(two.section_lines())
