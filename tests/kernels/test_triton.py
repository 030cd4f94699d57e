"""The Triton kernel without a GPU: right in the interpreter, and compiled ahead of time for every chip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from diffsparse_kernels import triton as backend  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# chip -> the instruction of its tensor cores, and the shared memory of one thread block
CHIPS = {
    80: ("HMMA", 163 * 1024),
    89: ("HMMA", 99 * 1024),
    90: ("HGMMA", 227 * 1024),
    100: ("UTCHMMA", 227 * 1024),
    120: ("HMMA", 99 * 1024),
}
POINTERS = {
    "*bf16": ("q_ptr", "k_ptr", "v_ptr", "out_ptr"),
    "*fp32": ("lse_ptr", "mass_ptr", "cached_ptr"),
    "*i32": ("idx_ptr", "cnt_ptr", "place_ptr", "low_ptr", "high_ptr"),
    "*u8": ("key_mask_ptr",),
    "fp32": ("scale_log2",),
}
ALIGNED = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n")
SPARSE = {"SPARSE": True, "MASKED": False, "AXES": 0, "VALUES": True, "MASS": False, "RAGGED": True}
VARIANTS = {
    "sparse": SPARSE,
    "masked": {**SPARSE, "MASKED": True},
    "boxes": {**SPARSE, "AXES": 3},
    "fused": {**SPARSE, "SPARSE": False, "MASS": True},
    "mass": {**SPARSE, "SPARSE": False, "MASS": True, "VALUES": False},
}


def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\.\.\.", done.stdout)


def compiled(chip: int, head_dim: int, block: int, flags: dict[str, Any]) -> Any:
    """The kernel for `chip` in bfloat16, with the tile that the table gives it."""
    kernel, tile = backend._attend, backend.tile_for(chip, head_dim, block, block)
    padded = backend._padded(head_dim)
    constants = {
        "D": head_dim,
        "D_V": head_dim,
        "D_PAD": padded,
        "DV_PAD": padded,
        "q_d": 1,
        "k_d": 1,
        "v_d": 1,
        "Q_BLOCK": block,
        "KV_BLOCK": block,
        "BLOCK_N": tile.block_n,
        "UPCAST": False,
        **flags,
    }
    types = {name: kind for kind, names in POINTERS.items() for name in names}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in ALIGNED]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not (TOOLS / "cuobjdump").is_file(), reason="this Triton comes without NVIDIA's tools")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("chip", CHIPS)
def test_ahead_of_time(chip: int, head_dim: int, block: int, variant: str, tmp_path: Path) -> None:
    """No spills worth the name, shared memory within the chip's, and tensor cores at work."""
    if head_dim == 72 and variant != "sparse":
        pytest.skip("padded to 128 like the others: one variant shows it")
    if chip == 100 and variant == "mass":
        pytest.skip("block_mass takes the fused kernel there")
    kernel = compiled(chip, head_dim, block, VARIANTS[variant])
    instruction, shared = CHIPS[chip]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = re.search(r"STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", str(binary)))
    assert usage is not None
    assert int(usage[1]) <= 32
    assert kernel.metadata.shared <= shared
    assert instruction in tool("nvdisasm", str(binary))
