"""Runs a compiled kernel without a GPU: the PTX of one warp, instruction by instruction.

Triton's interpreter runs the Python of a kernel; what its compiler makes of it, and the assembly
that kernels hold, only a GPU would run. This knows the instructions that selecting kernels of one
warp take, as the PTX manual defines them, and refuses every other by name. Threads go in step: a
branch on which they differ is refused, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

THREADS = 32
Values = npt.NDArray[np.uint64]
_BASE = 1 << 20
_STATEMENT = re.compile(
    r"^(?:@(?P<unless>!?)(?P<guard>[%\w]+)\s+)?(?P<opcode>[a-z][\w.:]*)(?:\s+(?P<rest>.*))?$"
)


@dataclass
class Memory:
    """Holds arrays that a kernel reads and writes, each at an address of its own."""

    data: bytearray = field(default_factory=bytearray)

    def put(self, array: npt.NDArray[np.generic]) -> int:
        """Copies an array in, and returns its address."""
        at = len(self.data)
        self.data += array.tobytes()
        self.data += bytes(-len(self.data) % 256 + 256)
        return _BASE + at

    def get(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """Returns a copy of what stands at an address."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start = address - _BASE
        return np.frombuffer(bytes(self.data[start : start + size]), dtype).reshape(shape)

    def read(self, address: int, size: int) -> int:
        """Returns the unsigned number of ``size`` bytes at an address."""
        start = address - _BASE
        assert 0 <= start <= len(self.data) - size, f"read outside of all arrays: {address:#x}"
        assert start % size == 0, f"{size} bytes read at {address:#x}"
        return int.from_bytes(self.data[start : start + size], "little")

    def write(self, address: int, size: int, value: int) -> None:
        """Writes an unsigned number."""
        start = address - _BASE
        assert 0 <= start <= len(self.data) - size, f"written outside of all arrays: {address:#x}"
        assert start % size == 0, f"{size} bytes written at {address:#x}"
        self.data[start : start + size] = value.to_bytes(size, "little")


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind.replace("bf16x2", "32").replace("bf16", "16")))


def _cut(values: npt.NDArray[np.generic], bits: int) -> Values:
    return values.astype(np.uint64) & np.uint64((1 << bits) - 1)


def _signed(values: Values, bits: int) -> npt.NDArray[np.int64]:
    shift = np.uint64(64 - bits)
    return (values << shift).view(np.int64) >> np.int64(64 - bits)


def _as(values: Values, kind: str) -> npt.NDArray[np.generic]:
    """Returns registers as numbers of a type: u32, s64, b16, f32 and the like."""
    bits = _bits(kind)
    if kind.startswith("f"):
        return values.astype(f"u{bits // 8}").view(f"f{bits // 8}")
    return _signed(values, bits) if kind.startswith("s") else _cut(values, bits)


def _float_bits(values: npt.NDArray[np.float32]) -> Values:
    return values.astype(np.float32).view(np.uint32).astype(np.uint64)


def _bf16_bits(values: npt.NDArray[np.float32]) -> Values:
    """Returns bf16 bits, rounded to nearest, ties to even; the one NaN for every NaN."""
    bits = _float_bits(values)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint64(0x7FFF), rounded)


def _larger_bf16(first: Values, second: Values) -> Values:
    def number(half: Values) -> npt.NDArray[np.float32]:
        return (half << np.uint64(16)).astype(np.uint32).view(np.float32)

    a, b = number(first), number(second)
    larger = np.where((a > b) | ((a == b) & ~np.signbit(a)), first, second)
    return np.where(np.isnan(a) | np.isnan(b), np.uint64(0x7FFF), larger)


def _prmt(a: Values, b: Values, selector: Values) -> Values:
    both, result = a | (b << np.uint64(32)), np.zeros_like(a)
    for byte in range(4):
        choice = (selector >> np.uint64(4 * byte)) & np.uint64(15)
        value = (both >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(255)
        sign = np.where(value >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
        value = np.where(choice & np.uint64(8) != 0, sign, value)
        result |= value << np.uint64(8 * byte)
    return result


def _dp4a(a: Values, b: Values, c: Values) -> npt.NDArray[np.int64]:
    total = _signed(c, 32)
    for byte in range(4):
        shift = np.uint64(8 * byte)
        total = total + _signed((a >> shift) & np.uint64(255), 8) * _signed(
            (b >> shift) & np.uint64(255), 8
        )
    return total


_COMPARE: dict[str, Callable[..., npt.NDArray[np.bool_]]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "geu": lambda a, b: ~(a < b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


class Warp:
    """Runs one entry of a PTX text with the threads of one warp."""

    def __init__(self, ptx: str, memory: Memory, shared: int = 0) -> None:
        """Takes the text of a module with one entry, and bytes of shared memory."""
        self.memory = memory
        self._shared = memory.put(np.zeros(max(1, shared), np.uint8))
        body = ptx[ptx.index(".entry") :]
        head, body = body.split("{", maxsplit=1)
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        body = re.sub(r"//.*", "", body)
        body = re.sub(r"^\s*\.(loc|file|pragma|section|reg)\b.*$", "", body, flags=re.M)
        # Inline assembly stands in braces of its own, which only hold its registers together.
        body = re.sub(r"^\s*[{}]\s*$", "", body, flags=re.M)
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str | None, bool, str, list[str]]] = []
        for text in re.split(r";", body):
            statement = text.strip()
            while label := re.match(r"^([$\w]+):\s*", statement):
                self.labels[label[1]] = len(self.code)
                statement = statement[label.end() :]
            statement = re.sub(r"\s*\.reg\s.*", "", statement)
            if not statement or statement.startswith("."):
                continue
            found = _STATEMENT.match(" ".join(statement.split()))
            if found is None:
                break
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found["rest"] or "")
            self.code.append((found["guard"], found["unless"] == "!", found["opcode"], operands))

    def run(self, block: int, arguments: list[int]) -> None:
        """Runs the program of number ``block``.

        Args:
            block: the program's number in the grid.
            arguments: addresses and numbers, in the order of the entry.

        Raises:
            NotImplementedError: for an instruction that this does not know.
        """
        self._values: dict[str, Values] = {}
        lanes = np.arange(THREADS, dtype=np.uint64)
        zero = np.zeros(THREADS, np.uint64)
        self._constants = {"%tid.x": lanes, "%laneid": lanes, "%ctaid.x": zero + np.uint64(block),
                           "global_smem": zero + np.uint64(self._shared)}  # fmt: skip
        self._arguments = dict(zip(self.parameters, arguments, strict=False))
        at = steps = 0
        with np.errstate(all="ignore"):
            while at < len(self.code):
                guard, unless, opcode, operands = self.code[at]
                steps += 1
                assert steps < 10**6, "an endless loop"
                active = np.ones(THREADS, bool)
                if guard is not None:
                    active = (self._values[guard] != 0) ^ unless
                at += 1
                if opcode in ("ret", "exit"):
                    assert active.all() or not active.any()
                    if active.all():
                        return
                elif opcode.startswith("bra"):
                    assert active.all() or not active.any(), "threads part"
                    if active.all():
                        at = self.labels[operands[0]]
                else:
                    self._step(opcode, operands, active)

    def _value(self, operand: str) -> Values:
        if operand in self._values:
            return self._values[operand]
        if operand in self._constants:
            return self._constants[operand]
        if operand.startswith("0f"):
            return np.full(THREADS, int(operand[2:], 16), np.uint64)
        return np.full(THREADS, int(operand.rstrip("U"), 0) & (2**64 - 1), np.uint64)

    def _set(self, register: str, values: Values, active: npt.NDArray[np.bool_]) -> None:
        if register == "_":
            return
        before = self._values.get(register, np.zeros(THREADS, np.uint64))
        self._values[register] = np.where(active, values, before)

    def _address(self, operand: str) -> Values:
        inside = operand.strip("[] ").split("+")
        values = self._value(inside[0].strip())
        for offset in inside[1:]:
            values = values + np.uint64(int(offset) & (2**64 - 1))
        return values

    def _step(self, opcode: str, operands: list[str], active: npt.NDArray[np.bool_]) -> None:
        name, *parts = opcode.split(".")
        kind = parts[-1] if parts else ""
        if name in ("ld", "st") and parts[0] != "param":
            return self._move(name, parts, operands, active)
        if name in ("bar", "barrier"):
            return None
        result = self._result(name, parts, kind, operands)
        target, *also = operands[0].split("|")
        if also:
            self._set(also[0], np.ones(THREADS, np.uint64), active)
        if target.startswith("{"):
            first, second = (half.strip() for half in target.strip("{} ").split(","))
            half = np.uint64(_bits(kind) // 2)
            self._set(first, _cut(result, int(half)), active)
            self._set(second, result >> half, active)
            return None
        return self._set(target, result, active)

    def _move(
        self, name: str, parts: list[str], operands: list[str], active: npt.NDArray[np.bool_]
    ) -> None:
        size = _bits(parts[-1]) // 8
        registers, address = operands if name == "ld" else operands[::-1]
        places = self._address(address)
        for number, register in enumerate(registers.strip("{} ").replace(" ", "").split(",")):
            if name == "ld":
                read = np.zeros(THREADS, np.uint64)
                for lane in np.flatnonzero(active):
                    read[lane] = self.memory.read(int(places[lane]) + number * size, size)
                self._set(register, read, active)
            else:
                values = _cut(self._value(register), 8 * size)
                for lane in np.flatnonzero(active):
                    self.memory.write(int(places[lane]) + number * size, size, int(values[lane]))

    def _result(self, name: str, parts: list[str], kind: str, operands: list[str]) -> Values:
        inputs = operands[1:]
        if name == "ld":
            number = self._arguments[inputs[0].strip("[]")]
            return np.full(THREADS, number & (2**64 - 1), np.uint64)
        if name == "mov" and inputs[0].startswith("{"):
            halves = [self._value(half.strip()) for half in inputs[0].strip("{} ").split(",")]
            bits = _bits(kind) // len(halves)
            result = np.zeros(THREADS, np.uint64)
            for number, half in enumerate(halves):
                result |= _cut(half, bits) << np.uint64(bits * number)
            return result
        values = [self._value(operand) for operand in inputs]
        if kind == "pred":
            flags = [value != 0 for value in values]
            if name == "mov":
                return flags[0].astype(np.uint64)
            if name == "not":
                return (~flags[0]).astype(np.uint64)
            return _BINARY[name](*flags).astype(np.uint64)
        if name == "cvt":
            return self._converted(parts, values)
        if parts and parts[-1] == "bf16x2" and name == "max" and "NaN" in parts:
            low = [_cut(value, 16) for value in values]
            high = [_cut(value, 32) >> np.uint64(16) for value in values]
            return _larger_bf16(*low) | (_larger_bf16(*high) << np.uint64(16))
        if name == "dp4a":
            return _cut(_dp4a(*(_cut(value, 32) for value in values)).view(np.uint64), 32)
        if name == "prmt":
            return _prmt(*(_cut(value, 32) for value in values))
        if name in ("redux", "shfl"):
            return self._across(name, parts, kind, values)
        if name == "setp":
            assert len(parts) == 2, ".".join(parts)
            first, second = (_as(value, kind) for value in values)
            return _COMPARE[parts[0]](first, second).astype(np.uint64)
        if name == "selp":
            return np.where(values[2] != 0, values[0], values[1])
        return self._computed(name, parts, kind, values)

    def _computed(self, name: str, parts: list[str], kind: str, values: list[Values]) -> Values:
        bits = _bits(kind)
        numbers = [_as(value, kind) for value in values]
        if kind.startswith("f"):
            results = {
                "neg": lambda a: -a,
                "abs": np.abs,
                "div": np.divide,
                # Products of fp32 numbers are exact in fp64.
                "fma": lambda a, b, c: a.astype(np.float64) * b.astype(np.float64) + c,
                **_BINARY,
            }
            if name not in results:
                raise NotImplementedError(".".join([name, *parts]))
            return _float_bits(results[name](*numbers))
        wide = "wide" in parts
        if name in ("mul", "mad"):
            product = numbers[0] * numbers[1]
            if name == "mad":
                third = _as(values[2], kind.replace("32", "64") if wide else kind)
                product = product + third.astype(product.dtype)
            return _cut(product.view(np.uint64), 64 if wide else bits)
        if name in ("shl", "shr"):
            amount = np.minimum(_cut(values[1], 32), np.uint64(63)).astype(numbers[0].dtype)
            shifted = numbers[0] << amount if name == "shl" else numbers[0] >> amount
            past = _cut(values[1], 32) >= np.uint64(bits)
            if name == "shl" or not kind.startswith("s"):
                shifted = np.where(past, shifted.dtype.type(0), shifted)
            return _cut(shifted.view(np.uint64), bits)
        if name == "bfe":
            mask = (np.uint64(1) << _cut(values[2], 8)) - np.uint64(1)
            return (numbers[0] >> _cut(values[1], 8)) & mask
        simple = {"mov": lambda a: a, "not": np.invert, "neg": np.negative, "abs": np.abs}
        if name not in simple and name not in _BINARY:
            raise NotImplementedError(".".join([name, *parts]))
        result = (simple.get(name) or _BINARY[name])(*numbers)
        return _cut(result.view(np.uint64), bits)

    def _converted(self, parts: list[str], values: list[Values]) -> Values:
        if parts == ["rn", "bf16x2", "f32"]:
            high, low = (_bf16_bits(_as(value, "f32")) for value in values)
            return low | (high << np.uint64(16))
        to, of = parts[-2:]
        if to == "f32" and of == "bf16":
            return _cut(values[0], 16) << np.uint64(16)
        if to == "bf16" and of == "f32":
            return _bf16_bits(_as(values[0], "f32"))
        if to.startswith("f") and of[0] in "us":
            return _float_bits(_as(values[0], of).astype(np.float32))
        if to[0] in "us" and of[0] in "us":
            return _cut(_as(values[0], of).astype(np.int64).view(np.uint64), _bits(to))
        raise NotImplementedError(".".join(["cvt", *parts]))

    def _across(self, name: str, parts: list[str], kind: str, values: list[Values]) -> Values:
        if name == "redux":
            numbers = _as(values[0], kind)
            total = {"add": np.sum, "max": np.max, "min": np.min}[parts[1]](numbers)
            return _cut(np.full(THREADS, total).view(np.uint64), 32)
        lanes = np.arange(THREADS)
        by = _cut(values[1], 5).astype(int)
        clamp = int(values[2][0])
        assert clamp == (0 if parts[1] == "up" else 31), "threads shuffled in parts of a warp"
        source = {"up": lanes - by, "bfly": lanes ^ by, "idx": by}[parts[1]]
        return values[0][np.where(source < 0, lanes, source)]
