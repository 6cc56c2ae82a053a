"""Features that somebody else computed: read a batch at a time, aligned by order or by identifiers, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
from broken_off import Forward, Stop
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

import cka_hooks
from cka_hooks import BatchError, OptionError, Precomputed, SampleCountError
from cka_hooks.run.precomputed import write_features

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:.* left out")

SAMPLES, SIZE = 60, 12
NAMES = [f"image{i}" for i in range(SAMPLES)]


def images() -> Tensor:
    return torch.randn(SAMPLES, 10, generator=torch.Generator().manual_seed(3))


def features(*shape: int) -> Tensor:
    noise = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(4))
    return (images()[:, :1].reshape(SAMPLES, *[1] * len(shape)) + noise).double()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(images(), batch_size=SIZE, **options)


class Named(torch.utils.data.Dataset[Any]):
    """Samples as dicts or tuples, with what identifies them."""

    def __init__(self, ids: Any = NAMES, *, listed: bool = False) -> None:
        self._ids, self._listed, self._images = ids, listed, images()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        image, identifier = self._images[index], self._ids[index]
        return (image, 0, identifier) if self._listed else {"input": image, "id": identifier}


def named(ids: Any = NAMES, *, listed: bool = False, shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(Named(ids, listed=listed), batch_size=SIZE, shuffle=shuffle, generator=generator, **options)


def compare(entries: Any, batches: Any, **options: Any) -> cka_hooks.CKAResult:
    return cka_hooks.compare({"net": net(), **entries}, batches, progress=False, **options)


def expected(order: list[int], *given: Tensor, size: int = SIZE) -> Tensor:
    """The matrix of the model's last layer and of what is given, over minibatches in that order, in float64."""
    model = net().double().eval()
    with torch.no_grad():
        layers = [model(images().double()), *given]
    grams = [
        [oracle.linear_gram(oracle.flatten(layer[order[low : low + size]])) for layer in layers]
        for low in range(0, len(order), size)
    ]
    return torch.from_numpy(oracle.cka_minibatch(grams))


def close(result: cka_hooks.CKAResult, other: Tensor) -> None:
    assert result.layers[0] == "net/2"
    torch.testing.assert_close(result.matrix, other, rtol=0, atol=1e-6)


class Spied:
    """An array that is sliced and nothing else, and remembers the largest slice."""

    def __init__(self, array: Tensor) -> None:
        self._array = array.numpy()
        self.shape = tuple(array.shape)
        self.largest = 0

    def __getitem__(self, rows: slice) -> Any:
        assert isinstance(rows, slice)
        found = self._array[rows]
        self.largest = max(self.largest, len(found))
        return found


def memmap(array: Tensor, folder: Path) -> Any:
    np.save(folder / "x.npy", array.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


def hdf5(array: Tensor, folder: Path) -> Any:
    file = pytest.importorskip("h5py").File(folder / "x.h5", "w")
    return file.create_dataset("it/features", data=array.numpy())


def zarr(array: Tensor, folder: Path) -> Any:
    module = pytest.importorskip("zarr")
    created = module.open(str(folder / "x.zarr"), mode="w", shape=tuple(array.shape), chunks=(7, 5), dtype="f8")
    created[:] = array.numpy()
    return created


def frame(array: Tensor, folder: Path) -> Any:
    return pytest.importorskip("pandas").DataFrame(array.numpy(), index=NAMES)


KINDS: dict[str, Callable[[Tensor, Path], Any]] = {
    "tensor": lambda array, _: array,
    "NumPy": lambda array, _: array.numpy(),
    "read-only NumPy, backwards": lambda array, _: np.flip(np.flip(array.numpy(), 0).copy(), 0),
    "big-endian": lambda array, _: array.numpy().astype(">f8"),
    "memmap": memmap,
    "h5py": hdf5,
    "zarr": zarr,
    "pandas": frame,
    "sliced only": lambda array, _: Spied(array),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_array_in_the_order_of_the_loader_and_by_identifiers(kind: str, tmp_path: Path) -> None:
    array = features(5)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(9)).tolist()
    given = KINDS[kind](array, tmp_path)
    close(compare({"V4": given}, loader(), layers=["2"]), expected(list(range(SAMPLES)), array))
    batches = [
        {"input": images()[order[i : i + SIZE]], "id": [NAMES[j] for j in order[i : i + SIZE]]}
        for i in range(0, SAMPLES, SIZE)
    ]
    aligned = compare({"V4": Precomputed(given, sample_ids=NAMES)}, batches, layers=["2"], sample_ids="id")
    close(aligned, expected(order, array))


def test_rows_of_a_batch_are_read_from_hdf5_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, given = features(5), Precomputed(hdf5(features(5), tmp_path))
    dataset, reads = type(given.arrays[""]), []
    read = dataset.__getitem__
    monkeypatch.setattr(dataset, "__getitem__", lambda self, rows: reads.append(rows) or read(self, rows))
    for rows in ([7, 2, 59, 3], [5, 1, 5], [4], [3, 4, 5]):
        ((_, found),) = given.features(rows, "V4")
        assert torch.equal(found, array[rows])
    assert len(reads) == 4


def test_memory_is_that_of_one_batch() -> None:
    given = Spied(features(5))
    compare({"V4": given}, loader())
    assert given.largest == SIZE


@pytest.mark.parametrize("last", [{}, {"drop_last": True}])
def test_a_last_batch_that_is_shorter_and_one_that_is_dropped(last: dict[str, Any]) -> None:
    array = features(3)[:, 0]  # one number a sample
    batches = DataLoader(images(), batch_size=16, **last)
    count = 48 if last else SAMPLES
    close(compare({"V4": array}, batches, layers=["2"]), expected(list(range(count)), array, size=16))
    if last:
        close(compare({"V4": array[:48]}, batches, layers=["2"]), expected(list(range(48)), array, size=16))


IDS: dict[str, Any] = {
    "texts": NAMES,
    "numbers": list(range(100, 100 + SAMPLES)),
    "NumPy": np.arange(SAMPLES, dtype=np.int16),
    "tensors": torch.arange(SAMPLES),
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("listed", [False, True])
def test_a_shuffled_loader_is_aligned_by_identifiers(ids: str, listed: bool) -> None:
    """As keys of a dict, which the model does not get, or in a tuple; the rows of the array are in another order."""
    array, back = features(2, 3), list(reversed(range(SAMPLES)))
    own = list(reversed(IDS[ids])) if isinstance(IDS[ids], list) else IDS[ids][back]
    given = Precomputed(array[back], sample_ids=own)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1)).tolist()
    seen = [sample for batch in named(list(range(SAMPLES))) for sample in batch["id"].tolist()]
    result = compare({"V4": given}, named(IDS[ids], listed=listed), layers=["2"], sample_ids=2 if listed else "id")
    close(result, expected(seen, array))
    assert seen != sorted(order)
    by_function = compare(
        {"V4": given},
        named(IDS[ids], listed=listed),
        layers=["2"],
        sample_ids=lambda batch: batch[2] if listed else batch["id"],
        forward=lambda model, batch: model(batch[0] if listed else batch["input"]),
    )
    assert torch.equal(by_function.matrix, result.matrix)


def test_several_layers_share_identifiers_and_have_a_name_in_front() -> None:
    arrays = {"it": features(4), "v1": features(3).float()}
    result = compare({"brain": arrays}, loader(), layers=["2"])
    close(result, expected(list(range(SAMPLES)), *arrays.values()))
    assert result.layers == ("net/2", "brain/it", "brain/v1")
    assert result.between("net", "brain").columns == ("brain/it", "brain/v1")
    assert result.settings["models"] == {"net": "Sequential", "brain": "Precomputed"}
    assert result.settings["shapes"]["brain/it"] == [4]


def test_a_name_alone_is_a_model_of_one_layer() -> None:
    result = compare({"V4": features(4)}, loader())
    assert (result.model_of("V4"), result.layer_of("V4"), result.model_of("net/2")) == ("V4", "V4", "net")
    assert result.between("net", "V4").columns == ("V4",)
    assert "4 layers of 2 models" in result.summary()


def test_without_any_model() -> None:
    one, other = features(4), features(3)
    result = cka_hooks.compare({"a": one, "b": other}, loader(), progress=False)
    grams = [
        [oracle.linear_gram(oracle.flatten(x[i : i + SIZE])) for x in (one, other)] for i in range(0, SAMPLES, SIZE)
    ]
    torch.testing.assert_close(result.matrix, torch.from_numpy(oracle.cka_minibatch(grams)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, ">i4", bool, np.float16, np.longdouble])
def test_counts_and_other_numbers_are_exact(dtype: Any) -> None:
    array = (features(6).numpy() * 20).clip(0, 90).astype(dtype)
    wide = torch.from_numpy(array.astype("f8"))
    close(compare({"V4": array}, loader(), layers=["2"]), expected(list(range(SAMPLES)), wide))


def test_models_that_are_built_in_turn() -> None:
    array = features(5)
    whole = compare({"V4": array, "b": net()}, loader())
    turn = cka_hooks.compare({"net": net, "V4": array, "b": net}, loader(), progress=False)
    assert turn.layers == (*whole.layers[:3], "V4", *whole.layers[3:-1])
    assert all(abs(turn[a, b] - whole[a, b]) < 1e-12 for a in turn.layers for b in turn.layers)
    given = Precomputed(array, sample_ids=NAMES)
    aligned = cka_hooks.compare({"net": net, "V4": given}, named(), layers=["2"], sample_ids="id", progress=False)
    seen = [sample for batch in named(list(range(SAMPLES))) for sample in batch["id"].tolist()]
    close(aligned, expected(seen, array))


@pytest.mark.parametrize("epochs", [1, 2])
def test_max_samples_and_passes(epochs: int) -> None:
    array = features(5)
    result = compare({"V4": array}, loader(), layers=["2"], max_samples=30, epochs=epochs)
    assert result.samples == 30
    order = [*range(30)]
    close(result, expected(order, array))


@pytest.mark.parametrize("by_ids", [False, True])
def test_a_run_that_broke_off_goes_on_at_its_row(tmp_path: Path, by_ids: bool) -> None:
    array = features(5)
    given: Any = Precomputed(array, sample_ids=NAMES) if by_ids else array
    options: dict[str, Any] = {"epochs": 2}
    if by_ids:
        options["sample_ids"] = "id"

    def run(path: Path | None, stop_at: int | None = None) -> cka_hooks.CKAResult:
        batches = named(shuffle=True) if by_ids else loader()
        return compare({"V4": given}, batches, forward=OfInput(stop_at), checkpoint=path, **options)

    whole = run(None)
    path = tmp_path / "run.ckpt"
    for stop_at in (3, 4):
        with pytest.raises(Stop):
            run(path, stop_at)
    assert torch.equal(run(path).matrix, whole.matrix)
    given = Precomputed(array + 1, sample_ids=NAMES) if by_ids else array + 1
    with pytest.raises(cka_hooks.CheckpointError, match="V4 values"):
        run(path)


class OfInput(Forward):
    def __call__(self, module: nn.Module, batch: Any) -> Any:
        return super().__call__(module, batch["input"] if isinstance(batch, dict) else batch)


def test_a_loop_of_ones_own_saved_and_restored() -> None:
    array = features(5)
    batches = list(loader())
    whole = compare({"V4": array}, batches)
    with cka_hooks.Comparison({"net": net(), "V4": array}) as first:
        for batch in batches[:2]:
            first.update(batch)
    second = cka_hooks.Comparison({"net": net(), "V4": array})
    second.load_state_dict(first.state_dict())
    with second:
        for batch in batches[2:]:
            second.update(batch)
    assert torch.equal(second.compute().matrix, whole.matrix)
    second.reset()
    with second:
        for batch in batches:
            second.update(batch)
    assert torch.equal(second.compute().matrix, whole.matrix)


def test_a_batch_that_breaks_off_uses_no_rows() -> None:
    array = features(5)

    def forward(model: nn.Module, batch: Tensor) -> Any:
        if len(batch) == 7:
            raise RuntimeError("out of luck")
        return model(batch)

    with cka_hooks.Comparison({"net": net(), "V4": array}, layers=["2"], forward=forward) as comparison:
        for batch in loader():
            comparison.update(batch)
            with pytest.raises(RuntimeError, match="out of luck"):
                comparison.update(torch.randn(7, 10))
    close(comparison.compute(), expected(list(range(SAMPLES)), array))


# What is refused


class Backwards(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(reversed(range(SAMPLES)))

    def __len__(self) -> int:
        return SAMPLES


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shuffle": True}, "the loader shuffles"),
        ({"sampler": torch.utils.data.SubsetRandomSampler(range(SAMPLES))}, "the loader shuffles"),
        ({"sampler": DistributedSampler(images(), 2, 0, shuffle=False)}, "each rank's loader has a part"),
        ({"sampler": DistributedSampler(images(), 1, 0, shuffle=True)}, "the loader shuffles"),
        ({"sampler": Backwards()}, "its sampler Backwards may bring them in another order"),
    ],
)
def test_another_order_is_refused_before_any_forward_pass(options: Any, why: str) -> None:
    calls = Forward()
    with pytest.raises(OptionError, match=why) as caught:
        compare({"V4": features(5)}, loader(**options), forward=calls)
    assert "Precomputed(array, sample_ids=ids), and compare(..., sample_ids='id')" in str(caught.value)
    assert "DataLoader(dataset, batch_size=64, shuffle=False)" in str(caught.value)
    assert calls.calls == 0


def test_an_order_that_is_looked_at_is_drawn_all_the_same() -> None:
    """Asking a sampler for its order changes no random state."""
    generator = torch.Generator().manual_seed(5)
    batches = DataLoader(images(), batch_size=SIZE, shuffle=True, generator=generator)
    before = generator.get_state()
    with pytest.raises(OptionError):
        compare({"V4": features(5)}, batches)
    assert torch.equal(generator.get_state(), before)
    own = torch.utils.data.BatchSampler(range(SAMPLES), SIZE, False)
    assert compare({"V4": features(5)}, DataLoader(images(), batch_sampler=own)).samples == SAMPLES


@pytest.mark.parametrize("rows", [SAMPLES - 1, SAMPLES + 1])
@pytest.mark.parametrize("listed", [False, True])
def test_a_wrong_number_of_rows_is_refused_before_any_forward_pass(rows: int, listed: bool) -> None:
    calls = Forward()
    batches = list(loader()) if listed else loader()
    with pytest.raises(SampleCountError, match=f"'V4' has {rows} rows and the loader has {SAMPLES} samples"):
        compare({"V4": torch.zeros(rows, 3)}, batches, forward=calls)
    assert calls.calls == 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(images())


@pytest.mark.parametrize(
    ("rows", "message"), [(SAMPLES - 1, "brings more samples"), (SAMPLES + 1, "brought 60 samples")]
)
def test_a_wrong_number_of_rows_of_a_loader_without_a_length(rows: int, message: str) -> None:
    with pytest.raises(SampleCountError, match=message):
        compare({"V4": torch.randn(rows, 3)}, DataLoader(Stream(), batch_size=SIZE))


def test_samples_that_a_collate_function_drops_are_noticed() -> None:
    def without_one(samples: list[Tensor]) -> Tensor:
        return torch.stack(samples[1:])

    with pytest.raises(SampleCountError, match="those of other samples"):
        compare({"V4": features(5)}, loader(collate_fn=without_one))


def test_identifiers_that_are_missing_or_there_twice() -> None:
    array = features(5)
    with pytest.raises(SampleCountError, match=r"'V4' has no row for .* of the 12 samples: 'image"):
        compare({"V4": Precomputed(array[:40], sample_ids=NAMES[:40])}, named(shuffle=False), sample_ids="id")
    given = Precomputed(array, sample_ids=list(map(str, range(SAMPLES))))
    with pytest.raises(SampleCountError, match=r": 0, 1, 2, 3, 4 and 7 more; its sample_ids look like '0'"):
        compare({"V4": given}, named(list(range(SAMPLES)), shuffle=False), sample_ids="id")
    with pytest.raises(OptionError, match="twice in sample_ids: 'image0', 'image1'"):
        Precomputed(array, sample_ids=[*NAMES[:58], "image0", "image1"])
    twice = [*NAMES[:30], *NAMES[:30]]
    with pytest.raises(BatchError, match=r"brought samples twice in one pass: 'image0', .* and \d+ more"):
        compare({"V4": Precomputed(array, sample_ids=NAMES)}, named(twice, shuffle=False), sample_ids="id")
    compare({"V4": Precomputed(array, sample_ids=NAMES)}, named(), sample_ids="id", epochs=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, OptionError, "say which those of a batch are, with sample_ids="),
        ({"sample_ids": "name"}, BatchError, "has no such entry; it has .'input', 'id'"),
        ({"sample_ids": 2.5}, OptionError, "expected a key of the batch, or a function"),
        ({"sample_ids": True}, OptionError, "expected a key of the batch, or a function"),
        ({"sample_ids": lambda batch: batch["id"][1:]}, BatchError, "gives 11 identifiers for 12 samples"),
        ({"sample_ids": lambda batch: batch["input"]}, OptionError, "does not identify a sample"),
        ({"sample_ids": lambda batch: None}, OptionError, "None does not identify a sample"),
    ],
)
def test_identifiers_that_cannot_be_used(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare({"V4": Precomputed(features(5), sample_ids=NAMES)}, named(), **{"forward": OfInput(), **options})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (torch.zeros(()), "shape"),
        (np.zeros((0, 5)), "shape"),
        (np.zeros((5, 0)), "shape"),
        (np.array(["a", "b"]), "cannot be taken as a tensor"),
        (np.array([{}, {}], dtype=object), "cannot be taken as a tensor"),
        (np.zeros((5, 2), dtype=complex), "expected floating-point numbers"),
        (np.ma.masked_less(np.zeros((5, 2)), 1), "masked entries"),
        (torch.eye(5).to_sparse(), "expected a dense tensor"),
        ({}, "empty"),
        ({"a": torch.zeros(5, 2), "b": torch.zeros(6, 2)}, "different numbers of rows"),
        ({3: torch.zeros(5, 2)}, "layers are text"),
        ([[1.0], [2.0]], "expected an array"),
    ],
)
def test_what_is_no_array_of_numbers(array: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Precomputed(array)
    if not isinstance(array, list):
        with pytest.raises(OptionError, match="'V4': "):
            compare({"V4": array}, loader())


def test_an_array_needs_a_name() -> None:
    with pytest.raises(OptionError, match="need a name"):
        cka_hooks.compare(features(5), loader(), progress=False)


@pytest.mark.parametrize("path", ["v4.npy", Path("v4.npy")])
def test_a_path_is_told_how_a_file_is_read(path: Any) -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"expected an nn.Module, or features, Precomputed.load\(.*v4.npy"):
        compare({"V4": path}, loader())


def test_a_row_of_nan_names_the_layer() -> None:
    array = features(5)
    array[17] = torch.nan
    with pytest.raises(cka_hooks.NonFiniteError, match="V4") as caught:
        compare({"V4": array, "V1": features(4)}, loader(), layers=["2"])
    assert caught.value.partial is not None
    assert caught.value.partial.layers == ("net/2", "V1")


# Files


def npz(path: Path, arrays: dict[str, Tensor], ids: Any) -> None:
    np.savez(
        path,
        **{name: array.numpy() for name, array in arrays.items()},
        **({} if ids is None else {"sample_ids": ids}),
    )


def h5(path: Path, arrays: dict[str, Tensor], ids: Any) -> None:
    with pytest.importorskip("h5py").File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array.numpy())
        if ids is not None:
            file.create_dataset("sample_ids", data=ids)


WRITERS: dict[str, Callable[[Path, dict[str, Tensor], Any], None]] = {
    ".npz": npz,
    ".safetensors": write_features,
    ".h5": h5,
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("ids", [None, NAMES, list(range(SAMPLES))])
def test_files(tmp_path: Path, suffix: str, ids: Any) -> None:
    arrays = {"it": features(4), "v1": features(3).float()}
    path = tmp_path / f"brain{suffix}"
    WRITERS[suffix](path, arrays, ids)
    found = Precomputed.load(path)
    assert found.sample_ids == ids
    assert {name: tuple(array.shape) for name, array in found.arrays.items()} == {"it": (60, 4), "v1": (60, 3)}
    assert all(torch.equal(got, arrays[name][5:9]) for name, got in found.features(range(5, 9), ""))
    assert all(torch.equal(got, arrays[name][[7, 2, 3, 59]]) for name, got in found.features([7, 2, 3, 59], ""))
    one = Precomputed.load(f"{path}::v1")
    assert (list(one.arrays), one.sample_ids) == ([""], ids)
    with pytest.raises(OptionError, match=r"no array 'V1': the closest are 'v1'"):
        Precomputed.load(f"{path}::V1")
    options = {} if ids is None else {"sample_ids": "id"}
    close(
        compare({"brain": found}, named(ids, shuffle=False) if ids else loader(), layers=["2"], **options),
        expected(list(range(SAMPLES)), *arrays.values()),
    )


def test_a_npy_file_and_one_tensor_of_a_safetensors_file(tmp_path: Path) -> None:
    np.save(tmp_path / "v4.npy", features(4).numpy())
    found = Precomputed.load(tmp_path / "v4.npy")
    assert isinstance(found.arrays[""], np.memmap)
    safetensors.torch.save_file(
        {"x": features(4).bfloat16(), "sample_ids": torch.arange(SAMPLES)}, tmp_path / "v4.safetensors"
    )
    found = Precomputed.load(tmp_path / "v4.safetensors")
    assert found.sample_ids == list(range(SAMPLES))
    ((layer, rows),) = found.features(range(3), "x")
    assert (layer, rows.dtype) == ("x", torch.bfloat16)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(OptionError, match="could not read"):
        Precomputed.load(tmp_path / name)


def test_files_that_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(OptionError, match="Python objects in dtype"):
        Precomputed.load(tmp_path / "x.npy")
    with pytest.raises(OptionError, match=r"expected \.npy, \.npz"):
        Precomputed.load(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match="no file"):
        Precomputed.load(tmp_path / "y.npy")
    np.save(tmp_path / "x.npy", np.zeros((5, 2)))
    with pytest.raises(OptionError, match="has no array 'a'"):
        Precomputed.load(f"{tmp_path / 'x.npy'}::a")


# Names of samples


@pytest.mark.parametrize("ids", [NAMES, list(range(100, 100 + SAMPLES))])
@pytest.mark.parametrize("options", [{}, {"join_batches": 20}, {"minibatch": 7}, {"epochs": 2}])
def test_influence_names_samples_by_identifier(tmp_path: Path, ids: list[Any], options: dict[str, Any]) -> None:
    array = features(5)
    array[17] *= 100
    given = Precomputed(array, sample_ids=ids)
    result = compare({"V4": given}, named(ids), layers=["2"], sample_ids="id", **options)
    assert result.influence["V4"].identifier == ids[17]
    told = repr(ids[17]) if isinstance(ids[17], str) else f"{ids[17]} in the data set"
    assert f"({told}) alone accounts" in result.summary()
    result.save(tmp_path / "cka.json")
    assert cka_hooks.CKAResult.load(tmp_path / "cka.json") == result
    # Without anything that is aligned, too.
    alone = compare({}, named(ids), sample_ids="id", **options)
    found = alone.influence["net/0"]
    assert found.identifier in ids
    assert compare({"V4": array}, loader()).influence["V4"].identifier == 17


def test_identifiers_are_kept_in_a_checkpoint_and_over_models_in_turn(tmp_path: Path) -> None:
    array = features(5)
    array[17] *= 100
    given = Precomputed(array, sample_ids=NAMES)

    def run(stop_at: int | None) -> cka_hooks.CKAResult:
        path = tmp_path / "run.ckpt"
        return compare({"V4": given}, named(), sample_ids="id", forward=OfInput(stop_at), checkpoint=path)

    with pytest.raises(Stop):
        run(5)
    assert run(None).influence["V4"].identifier == "image17"
    turn = cka_hooks.compare({"net": net, "V4": given}, named(), sample_ids="id", progress=False)
    assert turn.influence["V4"].identifier == "image17"
    with pytest.raises(BatchError, match="gives 11 identifiers for 12 samples"):
        compare({}, named(), sample_ids=lambda batch: batch["id"][1:], forward=OfInput())


def test_rows_that_end_before_the_loader_does_are_said() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    batches = (batch for batch in torch.cat([x, x, x]).split(32))
    with pytest.raises(cka_hooks.SampleCountError, match="64 rows and the loader brings more samples"):
        cka_hooks.compare({"net": torch.nn.Linear(4, 3), "V": x.numpy()}, batches, progress=False)


def test_a_group_of_a_file_is_no_array(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/A"], file["other"] = np.zeros((8, 2)), np.zeros((8, 2))
    with pytest.raises(cka_hooks.OptionError, match="no array 'group'"):
        cka_hooks.Precomputed.load(f"{tmp_path}/a.h5::group")


def test_layers_that_can_be_read_once_are_in_the_settings() -> None:
    rows = torch.randn(32, 8)
    result = cka_hooks.compare({"V4": Precomputed(rows)}, rows.split(16), layers=iter(["x"]), progress=False)
    assert result.settings["layers"] == ["x"]
