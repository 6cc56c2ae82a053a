"""The fused backend: Gram matrices on an NVIDIA GPU in one read of each activation, with fused_kernels.py.

For each layer and batch, one launch makes partial matrices. One more launch adds those of as many layers as there is
room for. The arguments of a launch are worked out once for each shape, and buffers stay from batch to batch. Nothing
waits for the device. Minibatches of more than 128 samples are left to PyTorch's products.

Triton comes with PyTorch's Linux wheels. If it is missing or fails, PyTorch's products take over, with one warning.
Set the environment variable ``CKA_HOOKS_FUSED=0`` to leave it unused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from cka_hooks.errors import warn
from cka_hooks.similarity.products.reference import Grams

# Number of bfloat16 pieces of a difference: two if the activations have few bits themselves.
PIECES = {torch.float32: 3, torch.float16: 3, torch.bfloat16: 2}
# Rounding in two pieces is right to 1e-6 if there are enough features to average out over.
FEW_FEATURES = 256
# Samples in a tile -> programs per multiprocessor, features per step, warps, stages: the fastest on an H100.
TUNED = {16: (4, 128, 4, 3), 32: (4, 64, 4, 4), 64: (2, 32, 4, 5), 128: (1, 64, 8, 3)}
MAX_SAMPLES = max(TUNED)
# Features added in float32 at a time. A program may make more than one such sum.
SUM = 4096
# Numbers in the partial matrices of one stream before they are added: 48 MiB.
ROOM = 3 << 22
# How many partial matrices one program adds at a time, and how many numbers of each.
SLOTS, PART = 16, 128
# A layer with too many minibatches for that goes to PyTorch.
MOST_ROWS = ROOM // (2 * MAX_SAMPLES)
# Layers in a side of the tile of pairs that one program adds.
LAYERS = 16
# How many numbers of each layer and minibatch come with its vector.
NUMBERS = 6
# How many sequences of layers to keep tables for.
KEPT = 1024

_failed = False


def takes(features: Tensor, minibatches: int) -> bool:
    """Whether :meth:`Shelf.add` can be used for (m * n, P, C) features."""
    # Subclasses, and tensors inside a function transform, have no memory that a kernel could read.
    return (
        features.is_cuda
        and type(features) is Tensor
        and features.dtype in PIECES
        and features.shape[0] <= min(minibatches * MAX_SAMPLES, MOST_ROWS)
        and features.numel() > 0
        and not (features.requires_grad or _failed)
        and _functorch.maybe_current_level() is None
        and _runs_on(features.device.index)
    )


def is_captured(features: Tensor) -> bool:
    """Whether products of these features would go to a CUDA graph that is being captured, and compute nothing."""
    return features.is_cuda and type(features) is Tensor and torch.cuda.is_current_stream_capturing()


@cache
def _runs_on(index: int) -> bool:
    is_off = os.environ.get("CKA_HOOKS_FUSED", "1") == "0" or torch.version.hip is not None
    # Older GPUs have no products in bfloat16.
    if is_off or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        _kernels()
    except Exception as error:
        fail(error)
        return False
    return True


def fail(error: BaseException) -> None:
    """Leave all products to PyTorch from here on."""
    global _failed
    if not _failed:
        _failed = True
        warn(
            f"Triton cannot be used here ({type(error).__name__}: {str(error).strip()[:200]}), so products on the "
            "GPU are PyTorch's, which take several times as long: install the triton that belongs to this PyTorch, "
            "or set CKA_HOOKS_FUSED=0 to go without it and without this warning"
        )


@cache
def _kernels() -> Any:
    from cka_hooks.similarity.products import fused_kernels

    return fused_kernels


class Program:
    """A kernel with everything that is the same in its launches for features of one shape.

    Args:
        kernel: its name in fused_kernels.py.
        grid: number of programs, in three dimensions.
        numbers: its last arguments.
        constants: the constants that it is compiled for.
        options: the options that it is compiled with.

    Attributes:
        kind: identifies what is compiled once for programs of all sizes.
        slots: number of programs, each of which fills a slot.
        room: number of slots in a buffer of ROOM numbers.
        compiled: launchers by (device, dtype of the first tensor, whether its address is a multiple of 16 bytes).
    """

    def __init__(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        numbers: Sequence[float],
        constants: dict[str, int],
        options: dict[str, int],
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.numbers = tuple(numbers)
        self.constants = constants
        self.options = options
        self.tail = (*numbers, *constants.values())
        self.kind = (kernel, *constants.values(), *options.values(), *(number >= 1 << 31 for number in numbers))
        self.slots = grid[0] * grid[1]
        self.room = ROOM // constants["N"] ** 2
        self.compiled: dict[tuple[int | None, torch.dtype, bool], Callable[..., None]] = {}


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(program: Program, stream: int, tensors: Sequence[Tensor], *numbers: int) -> None:
    """Launch a kernel. All launches come through here."""
    device = tensors[0].device
    places = [tensor.data_ptr() for tensor in tensors]
    key = device.index, tensors[0].dtype, places[0] % 16 == 0
    run = program.compiled.get(key)
    if run is None and (program.kind, key) in _compiled:
        run = program.compiled[key] = _compiled[program.kind, key][program.grid]
    if run is not None:
        if device.index == torch.cuda.current_device():
            run(*places, *numbers, *program.tail, stream=stream)
        else:
            with torch.cuda.device(device):
                run(*places, *numbers, *program.tail, stream=stream)
        return
    kernel = getattr(_kernels(), program.kernel)[program.grid]
    # Triton's own launch uses the current device and stream, and analyses its arguments anew each time, which takes
    # longer than the launch itself.
    with torch.cuda.stream(_stream(stream, device)) if device.type == "cuda" else nullcontext():
        given = (*tensors, *numbers, *program.numbers)
        try:
            compiled = kernel(*given, **program.constants, **program.options)
        except _kernels().OutOfResources:
            # The tensor memory of a B200 has no room for all sums of a large tile. Of more warps, it takes none.
            compiled = kernel(*given, **program.constants, **program.options | {"num_warps": 16})
    if compiled is not None and _kernels().TAKES_CONSTANTS:
        _compiled[program.kind, key] = compiled


def _stream(handle: int, device: torch.device) -> torch.cuda.Stream:
    """The stream with a handle. For the default stream, 0, the constructor would make a new one."""
    return torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream."""
    return _current_raw_stream(device.index) if device.type == "cuda" else 0


_current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


@lru_cache(maxsize=1 << 14)
def program_of(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    dtype: torch.dtype,
    minibatches: int,
    processors: int,
) -> Program:
    """The launch for (m * n, P, C) features, with this many programs for each of m minibatches."""
    rows, positions, channels = shape
    sn, sp, sc = strides
    n, width = rows // minibatches, positions * channels
    tile = tile_of(n)
    per_processor, block, warps, stages = TUNED[tile]
    most = max(1, min(per_processor * processors, ROOM // tile**2) // minibatches)
    blocks = -(-width // block)
    if channels == 1:
        channels, sc = positions, sp
    is_flat = channels == width or sp == channels * sc
    if is_flat:
        channels, sp = width, 0
    step = 16 // dtype.itemsize
    if sc != 1 or any(number % step for number in (width, channels, sn, sp)):
        step = 1
    return Program(
        "partial_grams",
        # As many for every width that has work for them, so that `add_partials` gets the same table in each batch of
        # text.
        (min(most, blocks), minibatches, 1),
        (n, width // step, channels // step, -(-blocks // most), n * sn // step, sn // step, sp // step, sc),
        {
            "N": tile,
            "BLOCK": block,
            "SUM": SUM,
            "PIECES": PIECES[dtype] if width >= FEW_FEATURES else 3,
            "STEP": step,
            "UNIT": sc == 1,
            "FLAT": is_flat,
            "EVEN": n == tile,
            "LONG": width > 1 << 30,
        },
        {"num_warps": warps, "num_stages": stages},
    )


def tile_of(n: int) -> int:
    """Samples in the tile for n of them."""
    return max(16, 1 << (n - 1).bit_length())


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Lane:
    """The partial matrices that one stream has made and not yet added.

    Attributes:
        buffers: the matrices, norms and scales, see `partial_grams`.
        pending: for each layer its first slot, its number of programs and its row, one after the other.
        used: slots taken.
    """

    def __init__(self, device: torch.device, stream: int) -> None:
        self.stream = stream
        self.used = 0
        self.pending: list[int] = []
        slots = ROOM // min(TUNED) ** 2
        self.buffers = (
            torch.empty(ROOM, dtype=torch.float32, device=device),
            torch.empty(slots, dtype=torch.float64, device=device),
            torch.empty(slots, dtype=torch.float32, device=device),
        )


class Shelf:
    """Linear Gram matrices of many layers on one device, each of m minibatches of n samples.

    The buffers stay from batch to batch. Launches go to the stream that is current when a layer is added. The
    matrices are ready on the stream that is current when they are taken.

    Args:
        device: the device of the features.

    Attributes:
        rows: number of layers that were added since `release`.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows = 0
        self._device = device
        self._m = self._n = 0
        self._lanes: dict[int, _Lane] = {}
        self._tables: dict[tuple[int, ...], tuple[Program, Tensor]] = {}
        self._values = self._shift = self._parts = self._numbers = torch.empty(0, dtype=torch.float64, device=device)
        self._processors = processors_of(device)

    def add(self, features: Tensor, minibatches: int) -> None:
        """Add the next layer's features, (m * n, P, C), see `takes`; m and n are the same for all layers."""
        if not self.rows:
            self._m, self._n = minibatches, features.shape[0] // minibatches
        program = program_of(features.shape, features.stride(), features.dtype, minibatches, self._processors)
        stream = current_stream(self._device)
        known = self._lanes.get(stream)
        if known is None:
            self._follow()
        elif known.used + program.slots > program.room:
            self._add_up(known)
        lane = known or _Lane(self._device, stream)
        launch(program, stream, (features, *lane.buffers), lane.used)
        lane.pending += (lane.used, program.grid[0], self.rows)
        lane.used += program.slots
        if known is None:
            # Once more, now that both kernels are known to run. If they do not run, the caller goes on with PyTorch's
            # products, possibly after other layers were added here.
            self._add_up(lane)
            self._lanes[stream] = lane
            self.add(features, minibatches)
        else:
            self.rows += 1

    def finish(self) -> Grams:
        """(L, m, n, n) values and (L, m) shift of the layers added since `release`, valid until then."""
        for lane in self._lanes.values():
            if lane.pending:
                self._add_up(lane)
        self._follow()
        m, n = self._m, self._n
        values = self._values[: self.rows * m * n * n].view(self.rows, m, n, n)
        return Grams(values, self._shift[: self.rows * m].view(self.rows, m))

    def centred(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Make vectors, numbers and parts of `Minibatches`, unbiased, in one launch. Return None if PyTorch has to.

        The vectors overwrite the Gram matrices.
        """
        grams = self.finish()
        rows, m, n, _ = grams.values.shape
        if len(self._parts) < rows * m * n or len(self._numbers) < rows * m:
            self._parts = self._values.new_empty(rows * m * n)
            self._numbers = self._values.new_empty(rows * m, NUMBERS)
        try:
            tensors = self._values, self._shift, self._parts, self._numbers
            launch(_centring(rows * m, n), current_stream(self._device), tensors)
        except Exception as error:
            fail(error)
            return None
        vectors = grams.values.flatten(2)[..., : n * (n - 1) // 2]
        numbers, parts = self._numbers[: rows * m], self._parts[: rows * m * n]
        return vectors, numbers.view(rows, m, NUMBERS), parts.view(rows, m, n)

    def release(self) -> None:
        """Free what was taken on this stream, and forget what was not taken."""
        self._lead()
        for lane in self._lanes.values():
            lane.pending.clear()
            lane.used = 0
        self.rows = 0

    def _other_streams(self) -> list[torch.cuda.Stream]:
        now = current_stream(self._device)
        return [_stream(stream, self._device) for stream in self._lanes if stream != now]

    def _follow(self) -> None:
        """Let the current stream wait for others."""
        for stream in self._other_streams():
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def _lead(self) -> None:
        """Let other streams wait for the current one."""
        for stream in self._other_streams():
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def _add_up(self, lane: _Lane) -> None:
        """Add the partial matrices of all layers of a lane to Gram matrices, in one launch."""
        rows = lane.pending[-1] + 1
        if rows * self._m * self._n**2 > len(self._values) or rows * self._m > len(self._shift):
            self._grow(2 * rows + 30)
        key = (self._m, self._n, *lane.pending)
        found = self._tables.get(key)
        if found is None:
            # A table is made on the current stream, perhaps in place of one that another stream still reads, and read
            # on the lane's.
            self._follow()
            if len(self._tables) >= KEPT:
                self._tables.clear()
            found = self._tables[key] = self._table(lane.pending)
            self._lead()
        program, table = found
        launch(program, lane.stream, (*lane.buffers, table, self._values, self._shift))
        lane.pending.clear()
        lane.used = 0

    def _grow(self, rows: int) -> None:
        """Make room for more layers; only needed until the layers of a batch are known."""
        self._follow()
        values, shift = self._values, self._shift
        self._values = values.new_empty(max(rows * self._m * self._n**2, len(values)))
        self._shift = shift.new_empty(max(rows * self._m, len(shift)))
        self._values[: len(values)] = values
        self._shift[: len(shift)] = shift
        self._lead()

    def _table(self, pending: list[int]) -> tuple[Program, Tensor]:
        """The table of the layers in `_Lane.pending` for `add_partials`, and its launch."""
        tile = tile_of(self._n)
        slot, programs, row = torch.tensor(pending, device="cpu").view(-1, 3, 1).unbind(1)
        minibatch = torch.arange(self._m, device="cpu")
        first = slot + minibatch * programs
        table = torch.stack([first, programs.expand_as(first), row * self._m + minibatch], -1).contiguous()
        constants = {"N": tile, "BLOCK": PART, "SLOTS": SLOTS}
        program = Program("add_partials", (first.numel(), tile**2 // PART, 1), (self._n,), constants, {})
        return program, table.to(self._device, non_blocking=True)


def adds_up(vectors: Tensor) -> bool:
    """Whether :func:`add_up` can be used for minibatches with these vectors."""
    return vectors.is_cuda and type(vectors) is Tensor and not _failed and _runs_on(vectors.device.index)


def add_up(tensors: Sequence[Tensor], weights: tuple[float, ...], minibatches: int, positions: int) -> bool:
    """Add m minibatches of n samples to the sums of a run, in one launch. Return False if PyTorch has to.

    Args:
        tensors: what `add_hsic` in fused_kernels.py takes. The first one becomes symmetric.
        weights: see :func:`cka_hooks.null.null_weights`.
        minibatches: how many came before.
        positions: how many samples came before.
    """
    hsic, _, parts = tensors[:3]
    try:
        program = _adding(*hsic.shape[:2], parts.shape[-1], weights)
        launch(program, current_stream(hsic.device), [it.contiguous() for it in tensors], minibatches, positions)
    except Exception as error:
        fail(error)
    return not _failed


@lru_cache(maxsize=256)
def _adding(m: int, layers: int, n: int, weights: tuple[float, ...]) -> Program:
    tiles = -(-layers // LAYERS)
    return Program("add_hsic", (tiles, tiles, 1), (layers, m, n, *weights), {"N": LAYERS, "BLOCK": PART}, {})


@lru_cache(maxsize=256)
def _centring(rows: int, n: int) -> Program:
    tile = tile_of(n)
    options = {"num_warps": 8, "num_stages": 1}
    return Program("centre_grams", (rows, 1, 1), (n,), {"N": tile, "BLOCK": min(32, tile)}, options)
