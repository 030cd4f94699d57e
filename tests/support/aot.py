"""Kernels compiled ahead of time for chips that aren't here, and what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# chip -> instruction of its tensor cores in PTX, bytes of shared memory that one block of threads can have
CHIPS = {
    80: ("mma.sync", 163 * 1024),
    89: ("mma.sync", 99 * 1024),
    90: ("wgmma.mma_async", 227 * 1024),
    100: ("tcgen05.mma", 227 * 1024),
    120: ("mma.sync", 99 * 1024),
}
COPY_ENGINE = "cp.async.bulk.tensor"  # UTMALDG
SPECIALISED = "setmaxnreg"
TYPES = {
    "*bf16": ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "key_ptr", "value_ptr", "slope_ptr"),
    "*fp32": (
        *("lse_ptr", "mass_ptr", "cached_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr"),
        *("log_count_ptr", "variance_ptr", "reach_ptr"),
    ),
    "*i16": ("idx_ptr",),
    "*i32": ("cnt_ptr", "order_ptr", "clear_ptr", "place_ptr", "low_ptr", "high_ptr"),
    "*u8": ("key_mask_ptr", "bits_ptr"),
    "fp32": ("scale_log2",),
}
_WAITING = 3  # instructions of a loop that does nothing but wait for a barrier
ALIGNED = re.compile(r".*_ptr|[qkvx]_[bhn]")  # addresses and strides that are multiples of 16


T = TypeVar("T")


def compiles(test: T) -> T:
    """Marks a test that compiles: test_second_triton.py runs it again, with the other Triton."""
    needs_tools = pytest.mark.skipif(
        not (TOOLS / "cuobjdump").is_file(), reason="this Triton comes without NVIDIA's tools"
    )
    return pytest.mark.aot(needs_tools(test))


@dataclass(frozen=True)
class Compiled:
    """What came out.

    stack: bytes of registers spilled and of local arrays.
    spilling: how many instructions within loops use these.
    shared: bytes of shared memory.
    ptx: the assembly.
    """

    stack: int
    spilling: int
    shared: int
    ptx: str


def compiled(
    kernel: Any,
    chip: int,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    source: type[ASTSource] = ASTSource,
    **types: str,
) -> Compiled:
    """A Triton kernel for `chip`; arguments are int32 unless `TYPES` or `types` says otherwise, rows are dense."""
    known = {name: kind for kind, names in TYPES.items() for name in names} | types
    names: list[str] = kernel.arg_names
    constants = {**{name: 1 for name in names if re.fullmatch(r"[qkvx]_d", name)}, **constants}
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in names}
    made = source(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if ALIGNED.fullmatch(name)},
    )
    return inspected(made, chip, num_warps=warps, num_stages=stages)


def inspected(source: ASTSource, chip: int, **options: int) -> Compiled:
    """Compile a source, and read its use of memory from the binary."""
    kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = said("cuobjdump", "--dump-resource-usage", file.name)
        stack = re.search(r"STACK:(\d+)", usage)
        assert stack is not None
        spilling = in_loops(said("nvdisasm", "-c", file.name)) if int(stack[1]) else 0
    return Compiled(int(stack[1]), spilling, kernel.metadata.shared, kernel.asm["ptx"])


def said(tool: str, *arguments: str) -> str:
    """What one of NVIDIA's tools prints."""
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def in_loops(assembly: str) -> int:
    """Loads from and stores to the stack between a label and a jump back to it, if that depends on something.

    Loops around others don't count: they run once for a block of queries. Nor do jumps back that are always taken, from
    where a barrier is waited for, out of the way of the loop that needs it.
    """
    labels: dict[str, int] = {}
    lines: list[str] = []  # one for each instruction
    loops: set[tuple[int, int]] = set()
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found[1])
            jump = re.match(r"@\S+\s+BRA\b.*?(\.L_x_\d+)", found[1])
            if jump and jump[1] in labels:
                loops.add((labels[jump[1]], len(lines)))
    working = [(a, z) for a, z in loops if z - a > _WAITING]
    inner = [(a, z) for a, z in loops if not any(a <= b and y <= z and (b, y) != (a, z) for b, y in working)]
    return len({at for loop in inner for at in range(*loop) if re.search(r"\b(LDL|STL)\b", lines[at])})


def assert_sound(kernel: Compiled, chip: int, instruction: str | None = None) -> None:
    """No spills worth the name, none at all in loops if there are more; memory within the chip's; tensor cores at work.

    Where a kernel spills between its loops, once for each block of queries, it costs nothing.
    """
    wanted, shared = CHIPS[chip]
    assert kernel.stack <= 32 or (kernel.stack <= 160 and not kernel.spilling)
    assert kernel.shared <= shared
    assert re.search(instruction or wanted, kernel.ptx)
