"""Facts of compiled code: registers, spills, and the instructions of its main loop.

The programs that Triton brings disassemble it. The main loop is the shortest one that has the widest loads: loops over
tiles with masks do the same work for the ends of rows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_PROGRAMS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1}
_FP32 = {"FADD", "FMUL", "FFMA"}
_SMALLEST_LOOP = 30
"""Instructions of a loop that does a row's work; smaller ones are the compiler's."""
_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Code:
    """A kernel's figures; those of a loop are of its main loop, or of all of it where there is none."""

    registers: int
    spilled_bytes: int
    """On the stack of each thread."""
    spills: int
    """Instructions of the main loop that store registers there, or load them."""
    has_loop: bool
    instructions: int
    special: int
    """Instructions for the special function unit: powers and logarithms of 2, reciprocals."""
    slow: int
    """Neither those nor sums and products in float32: half as many of them a cycle."""
    barriers: int
    narrowest: int
    """Bytes of its narrowest load of a matrix, or store to one, of a thread at a time."""
    loaded: int
    """Bytes that a thread loads in it."""


def read(code: Any, value_bytes: int) -> Code:
    """The figures of a `CompiledKernel` whose matrices have values of that size."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        usage, disassembly = _said("cuobjdump", "-res-usage", cubin), _said("nvdisasm", "-c", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"cuobjdump says no registers: {usage}"
    instructions, loops = _parsed(disassembly)
    body, has_loop = _main(instructions, loops)
    names = Counter(name.split(".")[0] for name, _ in body)
    widths = [_width(name) for name, _ in body if name.startswith(("LDG", "STG"))]
    loads = [_width(name) for name, _ in body if name.startswith("LDG")]
    special = names["MUFU"]
    return Code(
        registers=int(found[1]),
        spilled_bytes=int(found[2]) if any(name.startswith(("STL", "LDL")) for name, _ in instructions) else 0,
        spills=names["STL"] + names["LDL"],
        has_loop=has_loop,
        instructions=len(body),
        special=special,
        slow=len(body) - special - sum(names[name] for name in _FP32),
        barriers=names["BAR"],
        narrowest=min(widths, default=value_bytes),
        loaded=sum(loads),
    )


def _said(program: str, *arguments: object) -> str:
    command = [str(_PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout


_Instruction = tuple[str, str]
"""Its name with its suffixes, and its operands."""


def _parsed(disassembly: str) -> tuple[list[_Instruction], list[range]]:
    """(all instructions, the places of each loop's)."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append((found[1], found[2]))
    loops = []
    for at, (name, operands) in enumerate(instructions):
        to = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        if to and at - labels.get(to[0], at) > _SMALLEST_LOOP:
            loops.append(range(labels[to[0]], at + 1))
    return instructions, loops


def _main(instructions: list[_Instruction], loops: list[range]) -> tuple[list[_Instruction], bool]:
    bodies = [[instructions[at] for at in loop] for loop in loops]
    loading = [body for body in bodies if any(name.startswith("LDG") for name, _ in body)]
    if not loading:
        return instructions, False
    widest = max(_widest(body) for body in loading)
    return min((body for body in loading if _widest(body) == widest), key=len), True


def _widest(body: list[_Instruction]) -> int:
    return max(_width(name) for name, _ in body if name.startswith("LDG"))


def _width(name: str) -> int:
    return next((width for suffix, width in _WIDTHS.items() if suffix in name), 4)
