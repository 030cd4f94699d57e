"""The Triton kernels without a GPU: right in the interpreter, and compiled ahead of time for every chip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from diffsparse_kernels import measured as tiles
from diffsparse_kernels.backend.triton import kernels as triton_kernels
from diffsparse_kernels.backend.triton import launch as triton
from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists
from diffsparse_kernels.measured import Tile
from diffsparse_kernels.summaries import Summaries
from support import aot

CHIPS = (80, 90, 100, 120)  # 89 has the kernels of 80 and the memory of 120
SPARSE = triton.flags_of(sparse=True, ordered=True, masked=False, boxes=None, mass=False)
DENSE = {**SPARSE, "SPARSE": False, "ORDERED": False}
FIRST_ORDER = {**SPARSE, **dict.fromkeys(("SUMMARISED", "VARIED", "SLOPED", "BOUNDED"), True)}
VARIANTS = {
    "sparse": SPARSE,
    "masked": {**SPARSE, "MASKED": True},
    "boxes": {**SPARSE, "AXES": 3},
    "masked boxes": {**SPARSE, "MASKED": True, "AXES": 1},
    "biased": {**SPARSE, "BIASED": True},
    "biased boxes": {**SPARSE, "BIASED": True, "AXES": 1},
    "dense": DENSE,
    "fused": {**DENSE, "MASS": True},
    "masked fused": {**DENSE, "MASKED": True, "MASS": True},
    "means": {**SPARSE, "SUMMARISED": True},
    "first order": FIRST_ORDER,
    "masked first order": {**FIRST_ORDER, "MASKED": True},
    "biased fused": {**DENSE, "BIASED": True, "MASS": True},
    "biased first order": {**FIRST_ORDER, "BIASED": True},
}
# variant, head size, edge of the blocks
SHOWN = [
    ("sparse", 128, 128),
    ("sparse", 72, 64),
    ("sparse", 40, 16),
    ("masked", 128, 128),
    ("masked", 64, 64),
    ("masked boxes", 128, 64),
    ("biased", 128, 128),
    ("biased", 64, 64),
    ("biased boxes", 128, 64),
    ("dense", 128, 128),
    ("fused", 128, 128),
    ("masked fused", 64, 128),
    ("means", 128, 128),
    ("first order", 128, 128),
    ("first order", 72, 64),
    ("masked first order", 128, 128),
    ("biased fused", 128, 128),
    ("biased first order", 128, 128),
]


def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\.\.\.", done.stdout)


def rows_of_the_table() -> list[tuple[int, int, int, Tile]]:
    """Each tile once for every chip, head size and query block."""
    return sorted(
        {
            (chip, head_dim, q_block, tile)
            for chip in aot.CHIPS
            for head_dim in tiles.HEAD_DIMS
            for q_block in (64, 128)
            for kv_block in (64, 128)
            for tile in tiles.tiles_for(chip, head_dim, q_block, kv_block)
        }
    )


def attend(chip: int, head_dim: int, q_block: int, kv_block: int, tile: Tile, flags: dict[str, Any]) -> aot.Compiled:
    constants = triton.attend_constants(head_dim, head_dim, q_block, kv_block, tile)
    constants |= {**flags, "RAGGED": True, "UPCAST": False, "BLOCK_S": triton.stand_ins_width(chip, 2)}
    types = {"key_mask_ptr": "*fp32"} if flags["BIASED"] else {}
    return aot.compiled(triton_kernels.attend, chip, constants, tile.warps, tile.stages, **types)


def assert_copies(kernel: aot.Compiled, tile: Tile) -> None:
    """A compiler that can't do what the tile wants falls back in silence."""
    assert (aot.COPY_ENGINE in kernel.ptx) == (tile.copy != "pointers")
    assert (aot.SPECIALISED in kernel.ptx) == (tile.copy == "specialised")


def test_spills_in_loops_are_seen() -> None:
    lines = ["/*0000*/ STL [R1], R2 ;", ".L_x_1:", "/*0010*/ LDL R2, [R1] ;", "/*0020*/ @P0 BRA `(.L_x_1) ;"]
    assert aot.in_loops("\n".join(lines)) == 1
    assert aot.in_loops("\n".join([lines[0], lines[2], lines[1], lines[3]])) == 0
    assert aot.in_loops("\n".join([*lines[:3], lines[3].replace("@P0 ", "")])) == 0
    around = [".L_x_0:", *lines, "/*0030*/ LDL R3, [R1] ;", "/*0040*/ @P1 BRA `(.L_x_0) ;"]
    assert aot.in_loops("\n".join(around)) == 3  # the one within is too small to be more than a wait
    assert aot.in_loops("\n".join([*around[:3], *["/*0015*/ HGMMA R8, R4 ;"] * 2, *around[3:]])) == 1


@aot.compiles
@pytest.mark.parametrize(("chip", "head_dim", "q_block", "tile"), rows_of_the_table(), ids=str)
def test_every_tile_of_the_table(chip: int, head_dim: int, q_block: int, tile: Tile) -> None:
    kernel = attend(chip, head_dim, q_block, 128, tile, SPARSE)
    aot.assert_sound(kernel, chip)
    assert_copies(kernel, tile)


@aot.compiles
@pytest.mark.parametrize(("variant", "head_dim", "block"), SHOWN)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_variant(chip: int, variant: str, head_dim: int, block: int) -> None:
    """With the tile that it gets; blocks of 16 rows are too small for the larger tensor cores."""
    flags = VARIANTS[variant]
    tile = first_tile(tiles.tiles_for(chip, head_dim, block, block), 2, True, flags)
    kernel = attend(chip, head_dim, block, block, tile, flags)
    aot.assert_sound(kernel, chip, "mma.sync" if block == 16 else None)
    assert_copies(kernel, tile)


@aot.compiles
@pytest.mark.parametrize("chip", [80, 89, 120])
def test_masked_weights_stay_in_registers(chip: int) -> None:
    """A branch on the scores would have them go through shared memory, where `mma.sync` is what multiplies."""
    tile = tiles.tiles_for(chip, 128, 128, 128)[0]
    plain, masked, biased = (
        attend(chip, 128, 128, 128, tile, VARIANTS[variant]).shared for variant in ("sparse", "masked", "biased")
    )
    assert masked == plain
    assert biased - plain <= 4 * tile.keys * tile.stages  # one float a key, asked for ahead, and no weights


@aot.compiles
@pytest.mark.parametrize(("q_block", "biased"), [(16, False), (128, False), (128, True)])
@pytest.mark.parametrize("chip", CHIPS)
def test_mass(chip: int, q_block: int, biased: bool) -> None:
    tile = triton.measure_tile(chip, 128, 2, copyable=True)
    constants = triton.measure_constants(128, q_block, 128, tile)
    constants |= {"MASKED": q_block == 16, "BIASED": biased, "RAGGED": True, "UPCAST": False}
    types = {"key_mask_ptr": "*fp32"} if biased else {}
    kernel = aot.compiled(triton_kernels.measure, chip, constants, tile.warps, tile.stages, **types)
    aot.assert_sound(kernel, chip)
    assert_copies(kernel, tile)


def first_order(chip: int, dtype: str, head_dim: int, kv_block: int, biased: bool = False) -> aot.Compiled:
    tile = triton.first_order_tile(4 if dtype == "fp32" else 2, head_dim)
    constants = triton.first_order_constants(head_dim, head_dim, kv_block, tile)
    constants |= {"MASKED": not biased, "BIASED": biased, "SLOPED": True, "UPCAST": False}
    types = dict.fromkeys(("k_ptr", "v_ptr", "slope_ptr"), f"*{dtype}") | {"scale": "fp32"}
    types |= {f"{name}_ptr": "*fp32" for name in Summaries._fields if name != "slope"}
    types |= {"key_mask_ptr": "*fp32"} if biased else {}
    return aot.compiled(triton_kernels.first_order, chip, constants, tile.warps, tile.stages, **types)


@aot.compiles
@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("chip", CHIPS)
def test_mixing(chip: int, head_dim: int) -> None:
    constants = triton.mix_constants(head_dim, 128) | {"BOUNDED": True, "UPCAST": False}
    types = {"weight_ptr": "*bf16", "spread_ptr": "*fp32", "reach_scale": "fp32"}
    kernel = aot.compiled(triton_kernels.mix, chip, constants, 8, 2, **types)
    aot.assert_sound(kernel, chip, "mma.sync")


@aot.compiles
@pytest.mark.parametrize(("head_dim", "kv_block"), [(128, 128), (72, 64)])
@pytest.mark.parametrize("chip", [89, *CHIPS])
def test_statistics(chip: int, head_dim: int, kv_block: int) -> None:
    aot.assert_sound(first_order(chip, "bf16", head_dim, kv_block), chip)
    aot.assert_sound(first_order(chip, "bf16", head_dim, kv_block, biased=True), chip)
    if head_dim == 128:  # float32 need not be fast, but must fit
        assert first_order(chip, "fp32", head_dim, kv_block).shared <= aot.CHIPS[chip][1]


@aot.compiles
@pytest.mark.parametrize("q_block", [16, 128])
@pytest.mark.parametrize("chip", [89, *CHIPS])
def test_the_error_of_summaries(chip: int, q_block: int) -> None:
    tile = triton.error_tile(2)
    constants = triton.error_constants(72 if q_block == 16 else 128, q_block, tile) | {"UPCAST": False}
    types = dict.fromkeys(("log_count_ptr", "steepness_ptr", "variance_ptr", "spread_ptr", "error_ptr"), "*fp32")
    types["key_ptr"] = "*bf16"
    kernel = aot.compiled(triton_kernels.summary_error, chip, constants, tile.warps, tile.stages, **types)
    aot.assert_sound(kernel, chip, "mma.sync" if q_block == 16 else None)


@aot.compiles
@pytest.mark.parametrize("chip", [89])
def test_float32_fits_the_smallest_memory(chip: int) -> None:
    tile = first_tile(tiles.tiles_for(chip, 128, 128, 128), 4, True, SPARSE)
    constants = triton.attend_constants(128, 128, 128, 128, tile) | {**SPARSE, "RAGGED": True, "UPCAST": False}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*fp32")
    kernel = aot.compiled(triton_kernels.attend, chip, constants, tile.warps, tile.stages, **types)
    assert kernel.shared <= aot.CHIPS[chip][1]


def first_tile(*arguments: Any) -> Tile:
    return next(triton.capable_tiles(*arguments))


@pytest.mark.parametrize("by", [None, "first-order"])
def test_a_prompt_of_another_length_is_not_compiled_for_anew(by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for all lengths that end within a block."""
    variants = set()

    def launch(kernel: Any, programs: int, q: torch.Tensor, tile: Tile, **arguments: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        variants.add((kernel.__name__, str(bind(**arguments)[1])))

    monkeypatch.setattr(triton, "launch", launch)
    for length in (4100, 4097, 4104, 4112, 8193):
        q, k, v = (torch.zeros(1, length, 3, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        mask = torch.ones(1, 3, -(-length // 64), -(-length // 64)) > 0
        lists = BlockLists.from_mask(mask, q_block=64, kv_block=64, q_len=length, kv_len=length)
        theirs = None
        if by is not None:
            theirs = triton.stand_ins(q, k, v, lists, 0.1, None, triton.first_order(k, v, 64, 0.1, None))
        triton.block_sparse_attention(q, k, v, lists, 0.1, None, stand_ins=theirs)
    assert len(variants) == len({name for name, _ in variants})


def test_a_tile_is_taken_only_where_its_needs_are_met() -> None:
    table = tiles.tiles_for(100, 128, 128, 128)
    assert [tile.copy for tile in table] == ["specialised", "tma", "pointers"]
    assert first_tile(table, 2, True, SPARSE) == table[0]
    assert first_tile(table, 2, True, VARIANTS["masked"]) == table[0]
    assert first_tile(table, 2, True, VARIANTS["fused"]).copy == "tma"
    assert first_tile(table, 2, True, VARIANTS["boxes"]).copy == "tma"
    assert first_tile(table, 2, False, SPARSE).copy == "pointers"
    assert first_tile(table, 4, True, SPARSE).copy == "pointers"


def test_hopper_has_no_specialised_tiles() -> None:
    """Wrong there with lists, and slower than Gluon without: eval/results/gpu/h100-2026-11-26.jsonl."""
    hopper = [tile for chip, _, _, tile in rows_of_the_table() if chip == 90]
    assert {tile.copy for tile in hopper} == {"tma", "pointers"}


def test_tiles_that_are_wrong_on_a_device_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: set[str] = set()
    tried: list[str] = []

    def verdict(kernel: str, case: Case, device: torch.device) -> str:
        tried.append(kernel)
        return "wrong" if kernel in wrong else ""

    monkeypatch.setattr(triton.trials, "verdict", verdict)
    monkeypatch.setattr(triton, "chip", lambda device: 100)
    case, cpu = Case("attend", torch.bfloat16, 128, 128, 128, 128), torch.device("cpu")
    for kind in ("specialised", "tma", "pointers"):
        tried.clear()
        assert triton.attend_tile(case, cpu, SPARSE).copy == kind
        assert len(tried) == {"specialised": 1, "tma": 2, "pointers": 2}[kind]
        wrong.add(f"triton-{kind}")


def test_chips_between_those_of_the_table() -> None:
    assert tiles.tiles_for(86, 128, 128, 64) == tiles.tiles_for(80, 128, 128, 64)
    assert tiles.tiles_for(103, 64, 64, 64) == tiles.tiles_for(100, 64, 64, 64)
    assert tiles.tiles_for(121, 96, 64, 64) == tiles.tiles_for(120, 128, 64, 64)
    assert all(tile.keys <= 16 for tile in tiles.tiles_for(90, 64, 16, 16))
