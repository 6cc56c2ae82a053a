"""Run PTX, to which Triton compiles a kernel, on a CPU: compiled.py stands on it.

One program of the grid runs after the other. All threads of a program take each instruction together: a register is
an array with a number for each thread. What a GPU may do late is done as late as it may: copies to shared memory
arrive, and products of a warpgroup read and add, when they are waited for. Until then, NaN is where a copy goes.

What a GPU leaves undefined is an error here: addresses that are outside of the tensors or not aligned, warps that
touch one place without a barrier between them, programs of a launch that do so, shared memory that tensor cores read
without a fence, branches that not all threads take. Only instructions to which the fused kernels are compiled for
compute capability 8.0, 9.0 and 12.0 are known. They, the layout of matrices in registers and the descriptors of
matrices are in NVIDIA's "PTX ISA".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

TYPES = {"pred": np.dtype(bool)} | {
    f"{kind}{8 * size}": np.dtype(f"{letter}{size}")
    for kinds, letter, sizes in (("bu", "u", (1, 2, 4, 8)), ("s", "i", (1, 2, 4, 8)), ("f", "f", (2, 4, 8)))
    for kind in kinds
    for size in sizes
}
# What registers hold, by the letters of their names.
REGISTERS = {"r": TYPES["b32"], "rs": TYPES["b16"], "rd": TYPES["b64"], "p": TYPES["pred"]}
# Where a lane of a warp has its two numbers of a matrix of 8 rows.
LANE = np.arange(32)
ROW, COLUMN = LANE // 4, 2 * (LANE % 4)
# NaN in float32 and, twice, in bfloat16.
NOT_YET = 0x7FFF7FFF
SHARED = "shared memory"


class UndefinedError(AssertionError):
    """A GPU may do anything here."""


class Memory:
    """Some memory, with what touched it last.

    Args:
        data: its bytes.
        address: that of the first byte.
        name: what to call it in messages.
        unit: bytes that are always touched together.
    """

    def __init__(self, data: Numbers, address: int, name: str, unit: int) -> None:
        self.data, self.address, self.name, self.unit = data, address, name, unit
        units = -(-len(data) // unit)
        # The number of the last barrier before a write or read, the warp that wrote, and all that read, one bit each.
        self.written, self.read = np.full(units, -1), np.full(units, -1)
        self.writer, self.readers = np.zeros(units, np.int64), np.zeros(units, np.int64)
        # Programs of the grid.
        self.written_in, self.read_in = np.full(units, -1), np.full(units, -1)
        self.needs_fence = np.zeros(units, bool)

    def load(
        self, at: Numbers, dtype: np.dtype[Any], count: int, who: Threads, by_tensor_cores: bool = False
    ) -> Numbers:
        """`count` numbers that begin at each of these bytes, as (count, places)."""
        units, warps = self._units(at, dtype.itemsize * count, who)
        self._check(((self.written[units] == who.barriers) & (self.writer[units] != warps)).any(), "read too early")
        self._check(by_tensor_cores and self.needs_fence[units].any(), "read by tensor cores without a fence")
        self._check_programs(self.written_in[units], who)
        self.readers[units[self.read[units] != who.barriers]] = 0
        np.bitwise_or.at(self.readers, units, 1 << warps)
        self.read[units], self.read_in[units] = who.barriers, who.program
        return np.stack([self.data.view(dtype)[at // dtype.itemsize + i] for i in range(count)])

    def store(self, at: Numbers, values: Sequence[Numbers], who: Threads) -> None:
        """Store the numbers of each value, (values, places), from each of these bytes on."""
        size = values[0].dtype.itemsize
        units, warps = self._units(at, size * len(values), who)
        others = (self.read[units] == who.barriers) & (self.readers[units] & ~(1 << warps) != 0)
        if self.name != SHARED:
            # If there are fewer numbers than threads, all warps load them to change them, and one stores them.
            others &= self.readers[units] & (1 << warps) == 0
        others |= (self.written[units] == who.barriers) & (self.writer[units] != warps)
        self._check(others.any(), "written too early")
        self._check_programs(np.maximum(self.written_in[units], self.read_in[units]), who)
        self.written[units], self.writer[units], self.written_in[units] = who.barriers, warps, who.program
        self.needs_fence[units] = True
        for i, value in enumerate(values):
            self.data.view(value.dtype)[at // size + i] = value

    def _units(self, at: Numbers, size: int, who: Threads) -> tuple[Numbers, Numbers]:
        """The units that these many bytes begin and go through, and the warps that touch them."""
        self._check(
            at.size and (at.min() < 0 or at.max() + size > len(self.data)), f"bytes outside, of {len(self.data)}"
        )
        self._check((at % min(size, 16)).any(), f"{size} bytes are not aligned")
        units = at[:, None] // self.unit + np.arange(max(1, size // self.unit))
        return units.ravel(), np.repeat(who.warps, units.shape[1])

    def _check(self, is_wrong: Any, what: str) -> None:
        if is_wrong:
            raise UndefinedError(f"{self.name}: {what}")

    def _check_programs(self, programs: Numbers, who: Threads) -> None:
        self._check(((programs >= 0) & (programs != who.program)).any(), "touched by two programs")


class Threads:
    """Who touches memory: warps, after how many barriers, in which program of the grid."""

    def __init__(self, warps: Numbers, barriers: int, program: int) -> None:
        self.warps, self.barriers, self.program = warps, barriers, program


class Kernel:
    """PTX in parts between labels.

    Attributes:
        threads: number of threads in a program.
        parameters: names of all parameters.
        parts: label -> instructions, each with a guard ("", "%p1" or "!%p1"), the parts of its name, and operands.
    """

    def __init__(self, ptx: str) -> None:
        head, body = re.sub(r"//.*|\.loc\b.*", "", ptx).replace("::", "_").split("{", 1)
        self.threads = int(re.findall(r"\.reqntid\s+(\d+)", head)[0])
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        self.parts: dict[str, list[tuple[str, list[str], list[str]]]] = {"": []}
        label = ""
        body = body.split(".section")[0]
        for found, text in re.findall(r"(\$\w+):|([^;{}:]*(?:\{[^}]*\}[^;{}]*)*);", body):
            if found:
                label = found
                self.parts[label] = []
            elif text.split() and not text.split()[0].startswith("."):
                guard, name, rest = re.findall(r"^\s*(?:@(\S+)\s+)?(\S+)\s*(.*)$", text, re.DOTALL)[0]
                self.parts[label].append((guard, name.split("."), operands(rest)))

    def run(self, grid: Sequence[int], arguments: Sequence[int], tensors: Sequence[Memory], shared: int) -> None:
        """Run all programs of a grid, with the bits of each argument and the size of the shared memory in bytes."""
        for program in np.ndindex(*reversed(grid)):
            Program(self, grid, program[::-1], arguments, tensors, shared).run()


@cache
def kind_of(register: str) -> np.dtype[Any]:
    """What a register holds."""
    return REGISTERS[re.findall(r"%([a-z]+)", register)[0]]


@cache
def parts_of(address: str) -> tuple[str, int]:
    """[%rd1 + 4] -> its register and its number."""
    register, offset = re.findall(r"([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", address)[0]
    return register, int(offset or "0", 0)


def operands(text: str) -> list[str]:
    """What stands between commas that are not in brackets."""
    return [found.strip() for found in re.findall(r"(?:\{[^}]*\}|[^,{])+", text) if found.strip()]


def listed(text: str) -> list[str]:
    """The registers of a vector, or the only one."""
    return operands(text.strip("{}"))


def bits(value: Numbers) -> Numbers:
    return value if value.dtype.kind == "b" else value.view(f"u{value.dtype.itemsize}")


def bfloat16(value: Numbers) -> Numbers:
    """float32 numbers -> bits of the nearest bfloat16 numbers, ties to even."""
    whole = value.view(np.uint32).astype(np.uint64)
    nearest = (whole + 0x7FFF + (whole >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, nearest).astype(np.uint16)


def float32(halves: Numbers) -> Numbers:
    """Bits of bfloat16 numbers -> float32 numbers."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def quotient(a: Numbers, b: Numbers) -> Numbers:
    if a.dtype.kind == "f":
        return a / b
    return (np.sign(a) * np.sign(b) * (abs(a) // np.where(b == 0, 1, abs(b)))).astype(a.dtype)


def times_and_plus(a: Numbers, b: Numbers, c: Numbers) -> Numbers:
    # The product of two float32 is exact in float64.
    return (a.astype(np.float64) * b + c).astype(np.float32) if a.dtype == np.float32 else a * b + c


def shifted(a: Numbers, by: Numbers, left: bool) -> Numbers:
    by = np.minimum(by, 8 * a.dtype.itemsize).astype(np.int64)
    # NumPy does not shift by all bits.
    half, rest = (by // 2).astype(a.dtype), (by - by // 2).astype(a.dtype)
    return a << half << rest if left else a >> half >> rest


TWO = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "div": quotient,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


class Program:
    """One program of the grid."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        program: Sequence[int],
        arguments: Sequence[int],
        tensors: Sequence[Memory],
        shared: int,
    ) -> None:
        self.kernel = kernel
        self.arguments = dict(zip(kernel.parameters, arguments, strict=True))
        self.tensors = sorted(tensors, key=lambda memory: memory.address)
        self.addresses = np.array([memory.address for memory in self.tensors])
        self.shared = Memory(np.full(shared, 0xFF, np.uint8), 0, SHARED, 2)
        self.warps = np.arange(kernel.threads) // 32
        self.barriers, self.number = 0, int(np.ravel_multi_index(program, grid))
        named = {"%tid.x": np.arange(kernel.threads)}
        for place, at, size in zip("xyz", program, grid, strict=True):
            named |= {
                f"%ctaid.{place}": np.full(kernel.threads, at),
                f"%nctaid.{place}": np.full(kernel.threads, size),
            }
        self.registers = {name: number.astype(np.uint32) for name, number in named.items()}
        self.everywhere = np.ones(kernel.threads, bool)
        self.constants: dict[tuple[str, int], Numbers] = {}
        self.copies: list[list[Callable[[], None]]] = [[]]
        self.products: list[list[Callable[[], None]]] = [[]]

    def run(self) -> None:
        labels = list(self.kernel.parts)
        label: str | None = labels[0]
        with np.errstate(all="ignore"):
            while label is not None:
                following = dict(zip(labels, [*labels[1:], None], strict=True))[label]
                label = self.run_part(label, following)
        if any(self.products):
            raise UndefinedError("nothing waits for a product")

    def run_part(self, label: str, following: str | None) -> str | None:
        """The label where to go on."""
        for guard, name, given in self.kernel.parts[label]:
            where = self.everywhere
            if guard:
                where = self.registers[guard.strip("!")] ^ guard.startswith("!")
            if name[0] == "ret":
                return None
            if name[0] == "bra":
                if where.all():
                    return given[0]
                if where.any():
                    raise UndefinedError("a branch that not all threads take")
            else:
                try:
                    self.do(name, given, where)
                except UndefinedError as error:
                    raise UndefinedError(f"{error}: {'.'.join(name)} {', '.join(given)[:150]}") from None
        return following

    # Registers

    def get(self, text: str, dtype: np.dtype[Any]) -> Numbers:
        """The numbers of a register, or a constant."""
        found = self.registers.get(text)
        if found is None and (found := self.constants.get((text, dtype.itemsize))) is None:
            # A register may be read that never got a number, if nothing depends on it.
            text = hex(NOT_YET) if text[0] == "%" else text
            number = 0 if text == "global_smem" else int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text, 0)
            # Bits of a number that may be negative.
            whole = np.array(number & (1 << 64) - 1, np.uint64).astype(f"u{dtype.itemsize}")
            found = self.constants[text, dtype.itemsize] = np.full(self.kernel.threads, whole)
        return found.view(dtype)

    def put(self, text: str, value: Numbers, where: Numbers) -> None:
        if text == "_":
            return
        kind = kind_of(text)
        # A register may be wider than what is put there.
        value = bits(value if value.itemsize == kind.itemsize else value.astype(f"{value.dtype.kind}{kind.itemsize}"))
        if where is not self.everywhere:
            value = np.where(where, value, self.registers.get(text, np.zeros_like(value)))
        self.registers[text] = value

    def place(self, text: str) -> Numbers:
        register, offset = parts_of(text)
        return self.get(register, kind_of(register)).astype(np.int64) + offset

    # Memory

    def who(self, where: Numbers) -> Threads:
        return Threads(self.warps[where], self.barriers, self.number)

    def load(self, at: Numbers, dtype: np.dtype[Any], count: int, where: Numbers, is_shared: bool) -> Numbers:
        out = np.zeros((count, self.kernel.threads), dtype)
        for memory, some in self.memories(at, where, is_shared):
            out[:, some] = memory.load(at[some] - memory.address, dtype, count, self.who(some))
        return out

    def store(self, at: Numbers, values: Sequence[Numbers], where: Numbers, is_shared: bool) -> None:
        for memory, some in self.memories(at, where, is_shared):
            # Of threads that store to one place, any may be the one that is heard.
            places, one = np.unique(at[some], return_index=True)
            one = some[one]
            memory.store(places - memory.address, [value[one] for value in values], self.who(one))

    def memories(self, at: Numbers, where: Numbers, is_shared: bool) -> list[tuple[Memory, Numbers]]:
        """The memory that each of these threads touches."""
        if is_shared:
            return [(self.shared, np.flatnonzero(where))]
        which = np.searchsorted(self.addresses, at, "right") - 1
        if (which[where] < 0).any():
            raise UndefinedError("an address before all tensors")
        return [(self.tensors[i], np.flatnonzero(where & (which == i))) for i in np.unique(which[where])]

    # Instructions

    def do(self, name: list[str], given: list[str], where: Numbers) -> None:
        if ".".join(name[:2]) in ("cp.async", "wgmma.mma_async") or name[0] in ("ldmatrix", "stmatrix", "mma"):
            getattr(self, f"{name[0]}_")(name, given, where)
        elif name[0] in ("ld", "st"):
            self.load_or_store(name, given, where)
        elif name[0] == "bar":
            self.barriers += 1
        elif name[0] == "fence":
            self.shared.needs_fence[:] = False
        elif name[0] == "wgmma":
            self.wait(name, given, self.products)
        else:
            self.put_result(name, given, where)

    def wait(self, name: list[str], given: list[str], groups: list[list[Callable[[], None]]]) -> None:
        """End a group of what is done late, or do it until no more than so many ended groups are left."""
        if name[1].startswith("commit") or name[2].startswith("commit"):
            groups.append([])
        elif name[1].startswith("wait") or name[2].startswith("wait"):
            while len(groups) - 1 > int(given[0]):
                for late in groups.pop(0):
                    late()

    def cp_(self, name: list[str], given: list[str], where: Numbers) -> None:
        if "group" in name[2]:
            return self.wait(name, given, self.copies)
        at, count = self.place(given[0]), int(given[2], 0) // 4
        # What is left out is 0.
        taken = where & (self.get(given[3], TYPES["u32"]) > 0) if len(given) > 3 else where
        values = self.load(self.place(given[1]), TYPES["u32"], count, taken, False)
        self.store(at, np.full_like(values, NOT_YET), where, True)
        self.copies[-1].append(lambda: self.store(at, values, where, True))

    def load_or_store(self, name: list[str], given: list[str], where: Numbers) -> None:
        kind, is_shared = TYPES[name[-1]], name[1].startswith("shared")
        if name[0] == "st":
            return self.store(self.place(given[0]), [self.get(it, kind) for it in listed(given[1])], where, is_shared)
        names = listed(given[0])
        if name[1] == "param":
            passed = self.arguments[given[1].strip("[]")] & (1 << 8 * kind.itemsize) - 1
            values = np.full((1, len(where)), passed, f"u{kind.itemsize}").view(kind)
        else:
            values = self.load(self.place(given[1]), kind, len(names), where, is_shared)
        for register, value in zip(names, values, strict=True):
            self.put(register, value, where)

    def put_result(self, name: list[str], given: list[str], where: Numbers) -> None:
        if given[0][0] != "{":
            return self.put(given[0], self.result(name, given), where)
        # mov.b64 {%r1, %r2}, %rd3
        whole = TYPES[name[-1]]
        halves = self.get(given[1], whole).view(f"u{whole.itemsize // 2}").reshape(-1, 2).T
        for register, half in zip(listed(given[0]), halves, strict=True):
            self.put(register, half.copy(), where)

    def result(self, name: list[str], given: list[str]) -> Numbers:
        head, last = name[0], name[-1]
        if head == "cvt":
            return self.converted(name[-2:], given)
        if last == "f32x2":
            return self.of_pairs(head, [self.get(it, TYPES["b64"]).view(np.float32) for it in given[1:]])
        if name[-2] == "f32" and last in ("f16", "bf16"):
            return TWO[head](self.converted(["f32", last], given[:2]), self.get(given[2], TYPES["f32"]))
        kind = TYPES[last]
        if head == "selp":
            return np.where(self.get(given[3], TYPES["pred"]), self.get(given[1], kind), self.get(given[2], kind))
        if head == "mov" and given[1][0] == "{":
            halves = [self.get(it, np.dtype(f"u{kind.itemsize // 2}")) for it in listed(given[1])]
            return np.stack(halves, 1).view(kind)[:, 0]
        if head in ("shl", "shr"):
            return shifted(self.get(given[1], kind), self.get(given[2], TYPES["u32"]), head == "shl")
        if head == "bfe":
            start, count = int(given[2]), int(given[3])
            found = self.get(given[1], kind) << kind.type(8 * kind.itemsize - start - count)
            return found >> kind.type(8 * kind.itemsize - count)
        if head == "shfl":
            lanes = self.get(given[2], TYPES["u32"]) % 32
            lanes = lanes ^ np.arange(len(lanes)) % 32 if name[2] == "bfly" else lanes
            return self.get(given[1], kind)[self.warps * 32 + lanes]
        if name[:3] == ["redux", "sync", "min"]:
            return np.repeat(self.get(given[1], kind).reshape(-1, 32).min(1), 32)
        if "wide" in name:
            wide = TYPES[f"{last[0]}{16 * kind.itemsize}"]
            a, b = (self.get(it, kind).astype(wide) for it in given[1:3])
            return a * b + self.get(given[3], wide) if head == "mad" else a * b
        values = [self.get(it, kind) for it in given[1:]]
        if head == "setp":
            # No comparison with NaN is true, but those that end in u, which do not occur.
            return TWO[name[1]](*values) & (values[0] == values[0]) & (values[1] == values[1])
        if head in ("mad", "fma"):
            return times_and_plus(*values)
        one = {"mov": bits, "neg": np.negative, "sqrt": np.sqrt}
        return one[head](values[0]) if head in one else TWO[head](*values)

    def of_pairs(self, head: str, values: list[Numbers]) -> Numbers:
        """Two float32 in a register of 64 bits."""
        return (times_and_plus(*values) if head == "fma" else TWO[head](*values)).view(np.uint64)

    def converted(self, kinds: list[str], given: list[str]) -> Numbers:
        to, source = kinds
        if to == "bf16":
            return bfloat16(self.get(given[1], TYPES[source]))
        if to == "bf16x2":
            high, low = (bfloat16(self.get(it, TYPES[source])).astype(np.uint32) for it in given[1:])
            return high << 16 | low
        if source == "bf16":
            return float32(self.get(given[1], TYPES["b16"]))
        kind = TYPES[source]
        register = self.registers[given[1]]
        return register.astype(f"u{kind.itemsize}").view(kind).astype(TYPES[to])

    # Matrices: every register has two halves of a row, of 8 rows of 8 halves for each warp.

    def ldmatrix_(self, name: list[str], given: list[str], where: Numbers) -> None:
        for i, register in enumerate(listed(given[0])):
            at, who = self.rows(given[1], i)
            rows = self.shared.load(at, TYPES["b16"], 8, who).T
            self.put(register, rows.copy().view(np.uint32).ravel(), where)

    def stmatrix_(self, name: list[str], given: list[str], where: Numbers) -> None:
        for i, register in enumerate(listed(given[1])):
            at, who = self.rows(given[0], i)
            matrix = matrix_of(self.get(register, TYPES["b32"]))
            self.shared.store(at, list(matrix.reshape(-1, 8).T), who)

    def rows(self, text: str, i: int) -> tuple[Numbers, Threads]:
        """Where the rows of the i-th matrix of each warp are. Each lane says where one is."""
        lanes = self.place(text).reshape(-1, 32)[:, 8 * i : 8 * i + 8].ravel()
        return lanes, Threads(np.repeat(np.unique(self.warps), 8), self.barriers, self.number)

    def left(self, text: str) -> Numbers:
        """(warps, 16, 16) left matrices."""
        a, b, c, d = (matrix_of(self.get(it, TYPES["b32"])) for it in listed(text))
        return float32(np.block([[a, c], [b, d]]))

    def mma_(self, name: list[str], given: list[str], where: Numbers) -> None:
        if name[3:] != ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]:
            raise NotImplementedError(".".join(name))
        right = float32(np.block([matrix_of(self.get(it, TYPES["b32"])) for it in listed(given[2])]))
        before = [self.get(it, TYPES["f32"]) for it in listed(given[3])]
        self.put_sums(listed(given[0]), product(self.left(given[1]), right), before)

    def put_sums(self, registers: list[str], sums: Numbers, before: Sequence[Numbers]) -> None:
        """Add (warps, 16, columns) products."""
        for i, (register, number) in enumerate(zip(registers, before, strict=True)):
            added = sums[:, ROW + 8 * (i % 4 // 2), COLUMN + 8 * (i // 4) + i % 2].ravel()
            self.put(register, number + added, self.everywhere)

    def wgmma_(self, name: list[str], given: list[str], where: Numbers) -> None:
        columns = int(re.findall(r"m64n(\d+)k16", name[4])[0])
        # After the matrices: whether to add, signs, and whether matrices are transposed.
        if name[5:] != ["f32", "bf16", "bf16"] or [int(it) for it in given[4:]] not in ([1, 1, 0], [1, 1, 0, 0]):
            raise NotImplementedError(".".join(name))
        registers = listed(given[0])
        adds = self.get(given[3], TYPES["pred"])
        left = self.left(given[1]) if given[1][0] == "{" else self.get(given[1], TYPES["u64"])
        right = self.get(given[2], TYPES["u64"])

        def late() -> None:
            a = left.reshape(-1, 64, 16) if left.ndim > 1 else self.described(left, 64)
            sums = product(a, self.described(right, columns)).reshape(-1, 16, columns)
            before = [np.where(adds, self.get(it, TYPES["f32"]), np.float32(0)) for it in registers]
            self.put_sums(registers, sums, before)

        self.products[-1].append(late)

    def described(self, descriptors: Numbers, rows: int) -> Numbers:
        """(warpgroups, rows, 16) matrices in shared memory."""
        out = []
        for group, descriptor in enumerate(descriptors.reshape(-1, 128)):
            if (descriptor != descriptor[0]).any():
                raise UndefinedError("threads of a warpgroup describe different matrices")
            number = int(descriptor[0])
            start, across, down = ((number >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
            row, column = np.arange(rows)[:, None], np.arange(16)
            width = {0: 16, 1: 128, 2: 64, 3: 32}[number >> 62]
            at = start + row // 8 * down + row % 8 * width + 2 * column
            if width == 16:
                at = at + column // 8 * (across - 16)
            # Within 8 rows, pieces of 16 bytes change places.
            at ^= (at >> 7 & width // 16 - 1) << 4
            who = Threads(np.full(at.size, 4 * group), self.barriers, self.number)
            out.append(self.shared.load(at.ravel(), TYPES["b16"], 1, who, by_tensor_cores=True).reshape(rows, 16))
        return float32(np.stack(out))


def matrix_of(register: Numbers) -> Numbers:
    """A register -> (warps, 8, 8) halves."""
    return register.view(np.uint16).reshape(-1, 8, 8)


def product(left: Numbers, right: Numbers) -> Numbers:
    """Products as exact as float32, whose order is not known."""
    return (left.astype(np.float64) @ right.astype(np.float64).swapaxes(1, 2)).astype(np.float32)
