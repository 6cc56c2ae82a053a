"""The kernels of the fused backend in Triton's interpreter, against float64: test_fused.py runs it.

    TRITON_INTERPRET=1 python tests/fused_checks.py

Prints one line for each check that fails, and ends with status 1 if one did.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton
import triton.language as tl
from torch import Tensor

import cka_hooks
from cka_hooks.options import Options
from cka_hooks.similarity.batch import DIFFER, TRIANGLES, Minibatches, Step
from cka_hooks.similarity.products import fused, fused_kernels
from cka_hooks.similarity.products.reference import Grams
from cka_hooks.similarity.state import DECLARED, State

CPU = torch.device("cpu")
CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


def features(*shape: int, shared: float = 3.0) -> Tensor:
    """What samples share, and what they do not."""
    return torch.randn(shape) + shared * torch.randn(shape[1:])


def made(x: Tensor, m: int = 1, processors: int = 1) -> Grams:
    fused.processors_of = lambda device: processors
    shelf = fused.Shelf(CPU)
    shelf.add(x, m)
    values, shift = shelf.finish()[:2]
    assert shift is not None
    return Grams(values[0].clone(), shift[0].clone())


def expected(x: Tensor, m: int = 1) -> tuple[Tensor, Tensor]:
    """The Gram matrices of differences from the elementwise median of three samples, and the norm of that."""
    groups = x.double().reshape(m, len(x) // m, -1)
    n = groups.shape[1]
    common = groups[:, [0, n // 2, n - 1]].median(1).values
    differences = groups - common[:, None]
    return differences @ differences.mT, common.norm(dim=1)


def compare(x: Tensor, m: int = 1, processors: int = 1, tolerance: float = 6e-7) -> None:
    grams = made(x, m, processors)
    values, norms = expected(x, m)
    # Relative to the norms of the samples: the scale of rounding in a sum of products.
    own = values.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = own[:, :, None] * own[:, None, :]
    error = ((grams.values - values).abs() / torch.where(scale > 0, scale, 1)).max()
    assert grams.shift is not None
    off = ((grams.shift - norms).abs() / norms.clamp_min(1e-300)).max()
    what = (tuple(x.shape), x.stride(), x.dtype, m)
    assert error <= tolerance, (*what, f"error {error:.1e}")
    assert off <= 1e-12, (*what, f"norm off by {off:.1e}")
    assert torch.equal(grams.values, grams.values.mT), (*what, "not symmetric")


@check
def shapes() -> None:
    for n in (4, 5, 15, 16, 17, 33, 64, 100, 128):
        compare(features(n, 1, 150))
    for width in (1, 2, 3, 31, 128, 129, 1000):
        compare(features(8, 1, width))
    # More than one sum of one program, and more than one program.
    compare(features(6, 1, 2 * fused.SUM + 40))
    compare(features(6, 3, 900), processors=2)


@check
def minibatches() -> None:
    for m, n in ((2, 4), (3, 16), (5, 7), (2, 40)):
        compare(features(m * n, 2, 75), m)


@check
def dtypes() -> None:
    for n, width in ((4, 1), (8, 5), (20, 300), (64, 700)):
        compare(features(n, 1, width).half())
        # Two pieces of bfloat16 activations, three where they are few.
        compare(features(n, 1, width).bfloat16(), tolerance=6e-7 if width < fused.FEW_FEATURES else 2e-6)


@check
def strides() -> None:
    compare(features(7, 20, 48).transpose(0, 1))
    compare(features(48, 20, 7).permute(1, 2, 0))
    compare(features(20, 48, 7).transpose(1, 2))
    compare(features(20, 7, 96)[..., ::2])
    compare(features(40, 7, 48)[::2], 2)
    compare(features(20, 9, 48)[:, 1:8, 3:])
    compare(features(20, 1, 48).expand(20, 5, 48))
    compare(features(20, 5, 1).expand(20, 5, 64))
    compare(features(20, 64, 1))
    # 16 bytes lie at multiples of 16, and do not.
    whole = features(20, 1, 260)
    compare(whole[:, :, :256])
    compare(whole.flatten()[1:-1].as_strided((19, 1, 256), (260, 256, 1)))
    compare(torch.randn(20, 6, 5, 8).to(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2))


@check
def range_of_numbers() -> None:
    x = features(12, 1, 200)
    for power in (-30, -25, -20, -15, -10, 10, 15, 20, 25, 30):
        compare(x * 10.0**power)
    compare(features(12, 1, 200, shared=1e4))
    # Both ends of the range in one layer.
    compare(torch.cat([x * 1e-25, x * 1e18], 2), processors=4)
    compare(x.bfloat16() * 1e-30)
    compare((x * 1e-5).half())


@check
def what_is_not_finite_shows() -> None:
    for n in (5, 16):
        for bad in (float("nan"), float("inf"), -float("inf")):
            for sample in range(n):
                x = features(n, 1, 40)
                x[sample, 0, 17] = bad
                assert not made(x).values.sum().isfinite(), (n, bad, sample)
    x = features(8, 1, 40)
    x[6, 0, 3] = float("nan")
    finite = made(x, 2).values.sum((1, 2)).isfinite()
    assert finite.tolist() == [True, False]


@check
def samples_that_do_not_differ() -> None:
    grams = made(torch.randn(1, 3, 50).expand(12, 3, 50))
    assert not grams.values.any()
    compare(torch.zeros(12, 1, 20))


@check
def the_same_bits_twice() -> None:
    x = features(33, 4, 500)
    first = made(x, 3, 2)
    assert torch.equal(first.values, made(x, 3, 2).values)
    shelf = fused.Shelf(CPU)
    for _ in range(2):
        shelf.add(features(33, 4, 50), 3)
        shelf.add(x, 3)
        assert torch.equal(shelf.finish().values[1], first.values)
        shelf.release()


@check
def many_layers_of_several_sizes() -> None:
    shelf = fused.Shelf(CPU)
    for m, n in ((1, 16), (2, 9), (1, 16), (6, 4)):
        layers = [features(m * n, 1, width) for width in (3, 40, 7, 90, 1)]
        for layer in layers:
            shelf.add(layer, m)
        grams = shelf.finish()
        assert grams.values.shape == (5, m, n, n)
        for got, norm, layer in zip(grams.values, grams.shift, layers, strict=True):
            values, norms = expected(layer, m)
            assert torch.allclose(got, values, rtol=1e-6, atol=1e-5 * float(values.max()))
            assert torch.allclose(norm, norms)
        shelf.release()


@check
def a_shelf_grows_and_empties_its_lane() -> None:
    room, fused.ROOM = fused.ROOM, 16 * 256
    fused.program_of.cache_clear()
    try:
        shelf = fused.Shelf(CPU)
        layers = [features(8, 1, 300 + i) for i in range(40)]
        for layer in layers:
            shelf.add(layer, 1)
        values = shelf.finish().values
        for got, layer in zip(values, layers, strict=True):
            assert torch.allclose(got, expected(layer)[0], rtol=1e-5, atol=1e-3)
    finally:
        fused.ROOM = room
        fused.program_of.cache_clear()


@check
def an_accumulator_stands_on_them() -> None:
    takes, adds_up = fused.takes, fused.adds_up
    taken: list[int] = []

    def on_a_cpu(features: Tensor, minibatches: int) -> bool:
        taken.append(features.dtype in fused.PIECES)
        return taken[-1] > 0

    for options in ({}, {"minibatch": 6}, {"kernel": "rbf"}, {"kernel": "rbf", "sigma": 5.0, "minibatch": 6}):
        results = []
        for stand_in in (takes, on_a_cpu):
            fused.takes = stand_in
            fused.adds_up = adds_up if stand_in is takes else lambda vectors: True
            torch.manual_seed(1)
            cka = cka_hooks.CKAAccumulator(**options)
            for _ in range(2):
                x = torch.randn(18, 4, 10)
                cka.update(
                    {"x": x, "y": x.flatten(1)[:, :30] + 5, "z": torch.randn(18, 9).double(), "h": x.bfloat16()}
                )
            results.append(cka.compute())
        assert results[0].layers == results[1].layers
        assert (results[0].matrix - results[1].matrix).abs().max() < 1e-6, options
    fused.takes, fused.adds_up = takes, adds_up
    assert sum(taken) > len(taken) / 2


@check
def centred_in_one_launch_as_by_pytorch() -> None:
    for layers, m, n in ((3, 1, 16), (2, 3, 5), (1, 2, 4), (2, 1, 33), (1, 1, 100)):
        shelf = fused.Shelf(CPU)
        for layer in range(layers):
            x = features(m * n, 1, 20 + layer)
            if layer == 1:
                x[n // 2, 0, 3] = float("nan")
            if layer == 2:
                x[:] = x[0]
            shelf.add(x, m)
        names = tuple(map(str, range(layers)))
        expected = Minibatches.of(names, shelf.finish(), "unbiased")[1:]
        centred = shelf.centred()
        assert centred is not None
        for field, found, other in zip(Minibatches._fields[1:], centred, expected, strict=True):
            assert found.shape == other.shape, field
            # The third moments, the last numbers, are made in float32.
            for i in range(other.shape[-1]) if field == "numbers" else [...]:
                near = 1e-6 if field == "numbers" and i >= TRIANGLES else 1e-12
                one, another = found[..., i], other[..., i]
                near *= float(another.abs().max())
                assert torch.allclose(one, another, rtol=0, atol=near), (field, i, layers, m, n)


@check
def added_up_in_one_launch_as_by_pytorch() -> None:
    adds_up = fused.adds_up
    generator = torch.Generator().manual_seed(0)
    for layers, batches in ((1, [(1, 4)]), (3, [(2, 5), (1, 16), (3, 5)]), (40, [(1, 9), (2, 140)])):
        states = []
        for in_one_launch in (False, True):
            fused.adds_up = lambda vectors, in_one_launch=in_one_launch: in_one_launch
            generator.manual_seed(layers)
            state = State()
            for number, (m, n) in enumerate(batches):
                some = [torch.randn(m, n, 3, generator=generator, dtype=torch.float64) for _ in range(layers)]
                some[layers // 2][m - 1, 2] = torch.nan if number == 1 else 30
                grams = Grams(torch.stack([x @ x.mT for x in some]), torch.zeros(layers, m).double())
                names = tuple(map(str, range(layers)))
                made = Minibatches.of(names, grams, "biased" if layers == 1 else "unbiased")
                made.numbers[0, 0, DIFFER] = 1
                state.passes = 1 + number // 2
                state.add(Step(m * n + 1, m * n, [made, made], {}), Options(keep_minibatches=True))
            states.append(state)
        for name in DECLARED:
            one, other = (getattr(state, name) for state in states)
            if isinstance(other, list) and other and isinstance(other[0], Tensor):
                one, other = torch.cat(one), torch.cat(other)
            if isinstance(other, Tensor):
                # The interpreter takes numbers in Python for float32: the weights of `null`.
                near = 1e-6 if name == "null" else 1e-12
                scale = float(other.nan_to_num(posinf=0).abs().max()) if other.numel() else 0
                assert torch.allclose(one, other, rtol=near, atol=near * scale), name
            else:
                assert one == other, name
    fused.adds_up = adds_up


@check
def constants_stand_in_the_order_of_arguments() -> None:
    """What is compiled takes them by place."""
    shelf = fused.Shelf(CPU)
    shelf.add(features(16, 1, 40), 1)
    programs = [
        fused.program_of((16, 1, 40), (40, 40, 1), torch.float32, 1, 1),
        fused._centring(1, 16),
        fused._adding(1, 3, 16, (0.0,) * 4),
        shelf._table([0, 1, 0])[0],
    ]
    for program in programs:
        names = getattr(fused_kernels, program.kernel).arg_names
        assert names[-len(program.constants) :] == list(program.constants), program.kernel


@triton.jit
def _tell(OUT, feature, channels, per_program, sp, sc, FLAT: tl.constexpr, LONG: tl.constexpr):
    program = tl.program_id(0) + 99
    tl.store(OUT, fused_kernels._first_feature(program, per_program, LONG))
    tl.store(OUT + 1, fused_kernels._place(feature, channels, sp.to(tl.int64), sc, False, FLAT))


@check
def addresses_beyond_32_bits() -> None:
    out = torch.zeros(2, dtype=torch.int64)
    _tell[(1,)](out, 5, 7, 1 << 25, 0, 1 << 30, True, True)
    assert out.tolist() == [99 << 25, 5 << 30]
    _tell[(1,)](out, 9, 4, 1 << 25, 3 << 30, 1 << 30, False, True)
    assert out.tolist() == [99 << 25, (6 << 30) + (1 << 30)]
    program = fused.program_of((4, 1, 1 << 33), (1 << 33, 1 << 33, 1), torch.float32, 1, 132)
    assert program.constants["LONG"]
    # Samples and positions that lie more than 2^31 numbers apart: pages that nobody touches take no memory.
    try:
        apart = torch.empty((7 << 30) + 64, dtype=torch.float16)
    except RuntimeError:
        print("left out: no address space for samples that lie far apart")
        return
    x = apart.as_strided((4, 2, 16), (1 << 31, 1 << 30, 1))
    x.copy_(features(4, 2, 16))
    compare(x)


def main() -> int:
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    warnings.simplefilter("ignore", RuntimeWarning)
    only = sys.argv[1:]
    failed = 0
    for function in CHECKS:
        if only and function.__name__ not in only:
            continue
        torch.manual_seed(0)
        fused.processors_of = lambda device: 1
        try:
            function()
        except Exception:
            failed += 1
            print(f"failed: {function.__name__}\n{traceback.format_exc()}")
    print(f"{len(CHECKS)} checks, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
