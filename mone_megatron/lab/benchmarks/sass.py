"""Counts the machine instructions that a warp issues in a compiled kernel, without running it.

The disassembly (SASS, with the source line of each instruction, by the tools in Triton's wheel) is
cut into blocks; a block counts as often as the loops around it turn. How often is told by the
caller, as are the shares of rows that enter the code of a rarely entered source function. What only
a subroutine of the compiler's reaches (a division's slow path) counts nothing. Every other branch
counts as taken both ways, so that the figure is an upper bound on that side.
"""

from __future__ import annotations

import ast
import math
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import triton

import mone_megatron
from mone_megatron.helpers import HelperError, ending, starting

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_PACKAGE = Path(mone_megatron.__file__).parent
_LINE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LABEL = re.compile(r"^(?P<label>\S+):$")
_CODE = re.compile(
    r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
# Integer, logic, compare and conversion units are half as wide as the scheduler on Hopper, special
# functions an eighth (CUDA C++ Programming Guide, throughput of arithmetic instructions).
_ALU = (
    "IADD", "ISETP", "LOP", "SHF", "LEA", "SEL", "FSEL", "FSETP", "FMNMX", "IMNMX", "VIMNMX",
    "VIADD", "PRMT", "PLOP3", "P2R", "R2P", "F2FP", "IABS", "HMNMX", "HSET", "BMSK", "SGXT",
)  # fmt: skip
_SPECIAL = ("MUFU", "POPC", "F2F", "F2I", "I2F", "FCHK", "REDUX")
_ALU_CYCLES, _SPECIAL_CYCLES = 2, 8


@dataclass(frozen=True)
class Counts:
    """Holds what the warps of one program do for one row, expected values.

    Attributes:
        instructions: issue slots.
        busiest: cycles of the busiest unit, or of the scheduler when that is longer.
        barriers: times a warp waits for the others of its program.
    """

    instructions: float
    busiest: float
    barriers: float


@dataclass
class _Block:
    functions: list[str] = field(default_factory=list)
    opcodes: list[str] = field(default_factory=list)
    next: set[int] = field(default_factory=set)


def tool(name: str, arguments: Iterable[str], cubin: bytes) -> str:
    """Returns what a tool of Triton's wheel tells of a compiled kernel.

    Raises:
        HelperError: when it fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        with starting(f"Triton's {name}"):
            done = subprocess.run(
                [_TOOLS / name, *arguments, file.name], capture_output=True, text=True, check=False
            )
    if done.returncode:
        why = " ".join(done.stderr.split())
        raise HelperError(f"{_TOOLS / name} {ending(done.returncode)}: {why}")
    return done.stdout


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """Returns first and last line and name of each function of a source file.

    Triton keeps compiled kernels for all checkouts with the same source: ours is read, and of
    Triton's own files, which may be gone with the checkout, nothing is asked.
    """
    _, package, within = file.rpartition(f"/{_PACKAGE.name}/")
    path = _PACKAGE / within if package else Path(file)
    if "triton/language" in file:
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.lineno, node.end_lineno or node.lineno, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def _function(file: str, line: int) -> str:
    return next((name for start, end, name in _functions(file) if start <= line <= end), "")


def _blocks(disassembly: str) -> dict[int, _Block]:
    """Returns the blocks of the kernel, by number; 0 is the entry."""
    labels: dict[str, int] = {}
    blocks: dict[int, _Block] = {0: _Block()}
    jumps: list[tuple[int, str]] = []
    # Where the threads of a divergent part meet again.
    meeting: dict[str, str] = {}
    current, function, falls = 0, "", True
    kernel_begun = False
    for text in disassembly.splitlines():
        if label := _LABEL.match(text):
            if text.startswith(("$__internal", ".L_x_end")) and kernel_begun:
                falls = False
            new = len(blocks)
            blocks[new] = _Block()
            if falls:
                blocks[current].next.add(new)
            current, falls = new, True
            labels[label["label"]] = new
        elif line := _LINE.search(text):
            function = _function(line["file"], int(line["line"]))
        elif code := _CODE.search(text):
            kernel_begun = True
            opcode, operands = code["opcode"], code["operands"]
            guarded = code["guard"] is not None or re.match(r"\s+!?U?P\d", operands) is not None
            block = blocks[current]
            block.opcodes.append(opcode)
            block.functions.append(function)
            base, target = opcode.split(".")[0], _TARGET.search(operands)
            if base == "BSSY" and target:
                meeting[operands.split(",")[0].strip()] = target["label"]
            ends = base in ("BRA", "EXIT", "RET", "BSYNC", "CALL", "BRX")
            if base == "BRA" and target and not opcode.startswith("BRA.DIV"):
                jumps.append((current, target["label"]))
            if base == "BSYNC":
                jumps.append((current, meeting[operands.strip()]))
                guarded = False
            if base == "CALL":
                block.opcodes.append("CALLS")
                guarded = True
            if opcode.startswith("BRA.DIV"):
                guarded = True
            if ends:
                new = len(blocks)
                blocks[new] = _Block()
                if guarded:
                    block.next.add(new)
                current, falls = new, True
    for start, name in jumps:
        blocks[start].next.add(labels[name])
    return blocks


def _reached(blocks: dict[int, _Block]) -> set[int]:
    """Returns the blocks that the entry leads to; those of subroutines it does not."""
    seen, open_blocks = {0}, [0]
    while open_blocks:
        for following in blocks[open_blocks.pop()].next - seen:
            seen.add(following)
            open_blocks.append(following)
    return seen


def _loops(blocks: dict[int, _Block], reached: set[int]) -> dict[int, set[int]]:
    """Returns the blocks of each natural loop, by the block that it begins with."""
    before: dict[int, set[int]] = {number: set() for number in reached}
    for number in reached:
        for following in blocks[number].next:
            before[following].add(number)
    dominators = {number: set(reached) for number in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            new = set.intersection(*(dominators[other] for other in before[number])) | {number}
            changed |= new != dominators[number]
            dominators[number] = new
    loops: dict[int, set[int]] = {}
    for number in reached:
        for head in blocks[number].next & dominators[number]:
            body, open_blocks = {head, number}, [number]
            while open_blocks:
                block = open_blocks.pop()
                if block != head:
                    open_blocks += before[block] - body
                    body |= before[block]
            loops[head] = loops.get(head, set()) | body
    return loops


def _weights(
    blocks: dict[int, _Block],
    turns: Mapping[str, float],
    shares: Mapping[str, float],
    shares_of_turns: Mapping[str, float],
) -> Iterator[tuple[_Block, float]]:
    reached = _reached(blocks)
    loops = _loops(blocks, reached)
    times: dict[int, float] = {}
    for head, body in loops.items():
        told = {name for number in body for name in blocks[number].functions}
        # A loop belongs to the function whose lines it holds and that is called last.
        owner = next((name for name in turns if name in told), None)
        if owner is None:
            raise AssertionError(f"a loop of {sorted(told)}, and nobody told how often it turns")
        times[head] = turns[owner]
    for number in reached:
        block = blocks[number]
        around = [times[head] for head, body in loops.items() if number in body]
        entered = {**shares, **(shares_of_turns if around else {})}
        weight = math.prod(around)
        weight *= min((entered[name] for name in entered if name in block.functions), default=1.0)
        yield block, 0.0 if "CALLS" in block.opcodes else weight


def counted(
    disassembly: str,
    *,
    warps: int,
    rows: int,
    turns: Mapping[str, float],
    shares: Mapping[str, float],
    shares_of_turns: Mapping[str, float],
) -> Counts:
    """Returns what a program's warps do for a row.

    Args:
        disassembly: what ``nvdisasm -c -g`` tells of the kernel.
        warps: how many warps a program has.
        rows: how many rows it takes.
        turns: how often a loop turns, by a source function of which it holds lines; the first name
            that fits is taken, so outer functions come first.
        shares: how often the code of a source function is entered, for each time it is come by.
        shares_of_turns: the same for code within a loop only.
    """
    issued = alu = special = barriers = 0.0
    for block, weight in _weights(_blocks(disassembly), turns, shares, shares_of_turns):
        for opcode in block.opcodes:
            issued += weight
            alu += weight * _is(opcode, _ALU)
            special += weight * _is(opcode, _SPECIAL)
            barriers += weight * _is(opcode, ("BAR",))
    busiest = max(issued, alu * _ALU_CYCLES, special * _SPECIAL_CYCLES)
    return Counts(issued * warps / rows, busiest * warps / rows, barriers / rows)


def _is(opcode: str, prefixes: Collection[str]) -> bool:
    return opcode.startswith(tuple(prefixes))
