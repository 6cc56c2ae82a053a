import dataclasses
import hashlib
import json
import math
import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_up import resnet_labels, result_of

from cka_hooks.errors import OptionError, ResultFileError
from cka_hooks.results import file as resultfile
from cka_hooks.results.diff import diff
from cka_hooks.results.result import CKAResult, Influence
from cka_hooks.views.page import page_data

WHOLE = dataclasses.replace(
    result_of({"a": ["conv1", "fc"], "b": ["fc"]}, degenerate=("b/fc",), minibatches=4, keep=True),
    skipped={"a/aux": "it never ran"},
    influence={"a/fc": Influence(0.25, 7), "b/fc": Influence(math.nan, 0)},
    settings={"kernel": "linear", "shapes": {"conv1": [8, 3]}, "tolerance": None, "seed": 2**70, "lr": 0.1},
)


def text_of(result, tmp_path):
    result.save(tmp_path / "whole.json")
    return (tmp_path / "whole.json").read_text()


def signed(document):
    """A document whose checksum fits: what an attacker, or another program, would write."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    canonical = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return {**content, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


@pytest.mark.parametrize(
    "result",
    [
        CKAResult.example(),
        WHOLE,
        WHOLE.between("a", "b"),
        result_of(resnet_labels(), degenerate=("fc",)),
        result_of(["Schicht-ß\n", '"quoted"', "\U0001f600", "</script>"]),
    ],
)
def test_load_gives_back_what_save_wrote(result, tmp_path):
    path = tmp_path / "cka.anything"
    result.save(path)
    loaded = CKAResult.load(str(path))
    assert loaded == result
    for name in ("matrix", "stderr"):
        assert getattr(loaded, name).numpy().tobytes() == getattr(result, name).numpy().tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["cka.anything"]


@given(st.lists(st.floats(allow_infinity=False, width=64), min_size=4, max_size=4))
@example([5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_digit_is_lost(tmp_path, values):
    matrix = torch.tensor(values, dtype=torch.float64).reshape(2, 2)
    result = dataclasses.replace(result_of(["a", "b"]), matrix=matrix)
    result.save(tmp_path / "cka.json")
    loaded = CKAResult.load(tmp_path / "cka.json").matrix
    assert torch.equal(loaded.isnan(), matrix.isnan())
    assert loaded.nan_to_num().numpy().tobytes() == matrix.nan_to_num().numpy().tobytes()


def test_the_file_is_plain_json_with_null_for_nan(tmp_path):
    text = text_of(WHOLE, tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    document = json.loads(text, parse_constant=refuse)
    assert document["format"] == "cka_hooks.result"
    assert document["format_version"] == 1
    assert document["matrix"][2] == [None, None, None]
    assert document["influence"]["b/fc"] == {"share": None, "sample": 0}
    assert text.isascii()
    assert len(text.splitlines()) == len(document) + 2


def test_a_reformatted_file_is_the_same_file(tmp_path):
    path = tmp_path / "pretty.json"
    path.write_text(json.dumps(json.loads(text_of(WHOLE, tmp_path)), indent=4, sort_keys=True))
    assert CKAResult.load(path) == WHOLE


def test_minibatches_can_be_left_out(tmp_path):
    WHOLE.save(tmp_path / "small.json", minibatches=False)
    assert CKAResult.load(tmp_path / "small.json") == dataclasses.replace(
        WHOLE, minibatch_hsic=None, minibatch_layers=()
    )


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cka.json"
    WHOLE.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        CKAResult.example().save(path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cka.json"]
    with pytest.raises(FileNotFoundError):
        WHOLE.save(tmp_path / "nowhere" / "cka.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_device_or_a_folder_is_not_replaced_by_a_file(tmp_path):
    """As root, ``/dev/null`` could be."""
    os.mkfifo(tmp_path / "pipe")
    for write in (WHOLE.save, WHOLE.to_csv, WHOLE.to_html):
        with pytest.raises(OSError, match="pipe' is a folder, a device or a pipe: name a file"):
            write(tmp_path / "pipe")
        with pytest.raises(OSError, match="is a folder, a device or a pipe: name a file"):
            write(tmp_path)
    assert (tmp_path / "pipe").is_fifo()


def test_what_load_would_refuse_as_too_large_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(resultfile, "MAX_NUMBERS", 40)
    with pytest.raises(OptionError, match="minibatches=False"):
        WHOLE.save(tmp_path / "cka.json")
    WHOLE.save(tmp_path / "cka.json", minibatches=False)
    monkeypatch.setattr(resultfile, "MAX_BYTES", 100)
    with pytest.raises(ResultFileError, match="not a file of at most 100 bytes"):
        CKAResult.load(tmp_path / "cka.json")


def test_a_full_matrix_of_long_numbers_stays_below_the_limit():
    assert resultfile.MAX_NUMBERS * len("-1.2345678901234567e-300,") < resultfile.MAX_BYTES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b"{}", "format"),
        (b"[]", "format"),
        (b"null", "format"),
        (b'{"format": "cka_hooks.result", "format_version": 2}', "format_version is 2"),
        (b'{"format": "cka_hooks.result", "format_version": 1}', "checksum"),
        (b'{"format": "cka_hooks.result", "format_version": 1, "samples": 1e999}', "JSON compliant"),
        (b'{"format": "cka_hooks.result", "format_version": 1, "samples": NaN}', "JSON compliant"),
        (b"[" * 200_000, "recursion"),
        (b'{"a":' * 200_000, "recursion"),
        (b"9" * 10_000, "digits"),
        (b"\x80\x04]q\x00.", "utf-8"),  # a pickle
    ],
)
def test_other_files_are_refused_with_path_and_reason(tmp_path, content, reason):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ResultFileError, match=reason) as caught:
        CKAResult.load(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ResultFileError, match="not a file"):
        CKAResult.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        CKAResult.load(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe")
    refused = []

    def read():
        try:
            CKAResult.load(tmp_path / "pipe")
        except ResultFileError as error:
            refused.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert refused


def test_every_truncation_is_refused(tmp_path):
    text = text_of(WHOLE, tmp_path)
    path = tmp_path / "cut.json"
    end = len(text.rstrip())
    for length in [*range(0, end, 37), end - 1]:
        path.write_text(text[:length])
        with pytest.raises(ResultFileError):
            CKAResult.load(path)


def test_an_edited_number_is_refused(tmp_path):
    document = json.loads(text_of(WHOLE, tmp_path))
    document["matrix"][0][1] = 0.99
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match="edited or damaged"):
        CKAResult.load(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rows", ["a/conv1", "a/conv1", "b/fc"], "more than once"),
        ("rows", ["a", 1, "b"], "must be strings"),
        ("rows", "abc", "labels need"),
        ("rows", None, "not iterable"),
        ("rows", [], "at least one row"),
        ("matrix", [[1.0]], "labels need"),
        ("matrix", [[1.0], [1.0, 2.0], [1.0]], "inhomogeneous"),
        ("matrix", None, "expected a float64 tensor"),
        ("matrix", [1.0, 2.0, 3.0], "labels need"),
        ("matrix", [[[1.0]] * 3] * 3, "labels need"),
        ("matrix", [["one"] * 3] * 3, "could not convert"),
        ("stderr", [[-1.0] * 3] * 3, "negative"),
        ("samples", 1.5, "whole number"),
        ("samples", -1, "0 or more"),
        ("samples", 10**300, "0 or more"),
        ("passes", 0, "1 or more"),
        ("degenerate", {"a": 1}, "reason"),
        ("degenerate", 3, "not iterable"),
        ("settings", [3], "settings"),
        ("influence", {"a": 1.0}, "mapping"),
        ("influence", {"a": {"share": "1", "sample": 1}}, "share"),
        ("influence", {"a": {"share": 0.5, "sample": -1}}, "sample"),
        ("influence", {"a": {"share": 0.5}}, "sample"),
        ("minibatch_hsic", [[[1.0]]], "labels need"),
        ("minibatch_hsic", [], "labels need"),
        ("models", [["a"]], "must be strings"),
        ("more", 1, "unexpected"),
    ],
)
def test_wrong_content_is_refused_even_with_a_fitting_checksum(tmp_path, key, value, reason):
    document = json.loads(text_of(WHOLE, tmp_path))
    path = tmp_path / "forged.json"
    path.write_text(json.dumps(signed({**document, key: value})))
    with pytest.raises(ResultFileError, match=reason) as caught:
        CKAResult.load(path)
    assert str(path) in str(caught.value)


def test_repeated_keys_are_refused(tmp_path):
    """The checksum is of one of the two, and another program may read the other one."""
    text, path = text_of(WHOLE, tmp_path), tmp_path / "twice.json"
    for key, once in (("samples", '"samples":'), ("share", '"share":')):
        path.write_text(text.replace(once, f"{once} 7, {once}", 1))
        with pytest.raises(ResultFileError, match=f"its key '{key}' is repeated"):
            CKAResult.load(path)


# ---- files of other versions -------------------------------------------------------------------------

OLD = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["result_plain", "result_models_sketch"])
def test_results_that_the_first_version_saved_are_read(name, tmp_path):
    """Written at commit 37b5a96: one model; and two, with minibatches, what was left out, and a sketch."""
    result = CKAResult.load(OLD / f"{name}.json")
    assert (result.samples, result.minibatches) == (96, 6)
    assert "96 samples in 6 minibatches" in result.summary()
    result.plot(tmp_path / "cka.png")
    result.plot_profile(tmp_path / "profile.png")
    result.to_html(tmp_path / "cka.html")
    result.save(tmp_path / "again.json")
    assert CKAResult.load(tmp_path / "again.json") == result
    if name == "result_plain":
        assert result["0", "1"] == pytest.approx(0.786, abs=5e-4)
        assert result.minibatch_hsic is None
    else:
        assert result.settings["sketch"] == 64
        assert (result.skipped.keys(), result.degenerate.keys()) == ({"other/aux"}, {"other/dead"})
        assert result.between("small", "other").matrix.shape == (5, 6)
        found = result.difference(("small/0", "small/1"), ("small/0", "small/2"))
        assert found.value == pytest.approx(result["small/0", "small/1"] - result["small/0", "small/2"], abs=1e-12)


def test_a_field_with_a_default_may_be_missing(tmp_path):
    document = json.loads(text_of(CKAResult.example(), tmp_path))
    for entry in dataclasses.fields(CKAResult):
        path = tmp_path / "older.json"
        path.write_text(json.dumps(signed({key: value for key, value in document.items() if key != entry.name})))
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required or entry.name == "minibatch_layers":
            with pytest.raises(ResultFileError):
                CKAResult.load(path)
        else:
            assert CKAResult.load(path).matrix.shape == (3, 3)


# ---- anything at all --------------------------------------------------------------------------------

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def only_equal_or_refused(path, original):
    try:
        loaded = CKAResult.load(path)
    except ResultFileError:
        return
    assert loaded == original


@given(st.binary(max_size=200))
@FUZZ
def test_any_bytes(tmp_path, content):
    path = tmp_path / "any"
    path.write_bytes(content)
    with pytest.raises(ResultFileError):
        CKAResult.load(path)


@given(JSON)
@FUZZ
def test_any_json(tmp_path, document):
    path = tmp_path / "any"
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError):
        CKAResult.load(path)


@given(st.data())
@FUZZ
def test_any_change_of_bytes(tmp_path, data):
    content = bytearray(text_of(WHOLE, tmp_path).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "delete", "repeat"]))
        if kind == "replace":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 40))]
        else:
            content[at:at] = content[at : at + data.draw(st.integers(1, 40))]
    path = tmp_path / "changed"
    path.write_bytes(bytes(content))
    only_equal_or_refused(path, WHOLE)


@given(st.data(), JSON)
@FUZZ
def test_any_change_of_a_value(tmp_path, data, value):
    """Anything in place of any value, with a fitting checksum: refused, or a result that can be saved again."""
    document = json.loads(text_of(WHOLE, tmp_path))
    inside, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(inside[key], (dict, list)) and inside[key] and data.draw(st.booleans()):
        inside = inside[key]
        key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
    inside[key] = value
    path = tmp_path / "changed"
    try:
        path.write_text(json.dumps(signed(document)))
    except ValueError:
        return
    try:
        loaded = CKAResult.load(path)
    except ResultFileError:
        return
    loaded.save(tmp_path / "again")
    assert CKAResult.load(tmp_path / "again") == loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numbers of 1e308
        for shown in (
            repr(loaded),
            loaded.summary(),
            loaded._repr_html_(),
            page_data(loaded),
            str(diff(loaded, WHOLE)),
        ):
            assert shown


# ---- files made to harm -----------------------------------------------------------------------------


@pytest.mark.timeout(100)
def test_repeated_labels_do_not_cost_hours(tmp_path):
    document = json.loads(text_of(CKAResult.example(), tmp_path))
    labels = [str(i) for i in range(100_000)]
    path = tmp_path / "forged.json"
    for names in ([*labels, labels[-1]], labels):
        forged = {**document, "rows": names, "columns": names, "models": names, "minibatch_layers": names}
        path.write_text(json.dumps(signed(forged)))
        with pytest.raises(ResultFileError, match=r"more than once|labels need"):
            CKAResult.load(path)


@pytest.mark.parametrize("piece", ["[],", "{},", '"ab",', "0,"])
def test_what_would_fill_the_memory_is_not_parsed(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(resultfile, "_MAX_COMMAS", 500_000)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    (tmp_path / "bomb.json").write_text(f"[{piece * 600_000}0]")
    with pytest.raises(ResultFileError, match="more than"):
        CKAResult.load(tmp_path / "bomb.json")
