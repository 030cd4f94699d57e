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

from diffsparse_kernels import tiles, triton, triton_kernels
from diffsparse_kernels.case import Case
from diffsparse_kernels.tiles import Tile
from support import aot

SPARSE = triton.flags_of(sparse=True, ordered=True, masked=False, boxes=None, mass=False)
VARIANTS = {
    "sparse": SPARSE,
    "masked": {**SPARSE, "MASKED": True},
    "boxes": {**SPARSE, "AXES": 3},
    "fused": {**SPARSE, "SPARSE": False, "ORDERED": False, "MASS": True},
    "fused-masked": {**SPARSE, "SPARSE": False, "ORDERED": False, "MASS": True, "MASKED": True},
    "boxes-masked": {**SPARSE, "AXES": 3, "MASKED": True},
}
needs_tools = pytest.mark.skipif(
    not (aot.TOOLS / "cuobjdump").is_file(), reason="this Triton comes without NVIDIA's tools"
)


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
    constants |= {**flags, "RAGGED": True, "UPCAST": False}
    return aot.compiled(triton_kernels.attend, chip, constants, tile.warps, tile.stages)


def assert_copies(kernel: aot.Compiled, tile: Tile) -> None:
    """A compiler that can't do what the tile wants falls back in silence."""
    assert (aot.COPY_ENGINE in kernel.ptx) == (tile.copy != "pointers")
    assert (aot.SPECIALISED in kernel.ptx) == (tile.copy == "specialised")


@needs_tools
@pytest.mark.parametrize(("chip", "head_dim", "q_block", "tile"), rows_of_the_table(), ids=str)
def test_every_tile_of_the_table(chip: int, head_dim: int, q_block: int, tile: Tile) -> None:
    kernel = attend(chip, head_dim, q_block, 128, tile, SPARSE)
    aot.assert_sound(kernel, chip)
    assert_copies(kernel, tile)


@needs_tools
@pytest.mark.parametrize(
    ("variant", "head_dim"),
    [("sparse", 72), ("sparse", 96), *((variant, 128) for variant in VARIANTS if variant != "sparse"), ("masked", 64)],
)
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_every_variant(chip: int, variant: str, head_dim: int) -> None:
    """With the tile that it gets."""
    block = 64 if "boxes" in variant else 128
    flags = VARIANTS[variant]
    tile = triton.fitting(tiles.tiles_for(chip, head_dim, block, block), 2, True, flags)
    kernel = attend(chip, head_dim, block, block, tile, flags)
    aot.assert_sound(kernel, chip)
    assert_copies(kernel, tile)


@needs_tools
@pytest.mark.parametrize("chip", [80, 89, 120])
def test_masked_weights_stay_in_registers(chip: int) -> None:
    """A branch on the scores would have them go through shared memory, where `mma.sync` is what multiplies."""
    tile = tiles.tiles_for(chip, 128, 128, 128)[0]
    plain, masked = (attend(chip, 128, 128, 128, tile, VARIANTS[variant]) for variant in ("sparse", "masked"))
    assert masked.shared == plain.shared


@needs_tools
@pytest.mark.parametrize("q_block", [16, 128])
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_mass(chip: int, q_block: int) -> None:
    tile = triton.measure_tile(chip, 128, 2, copyable=True)
    constants = triton.measure_constants(128, q_block, 128, tile)
    constants |= {"MASKED": q_block == 16, "RAGGED": True, "UPCAST": False}
    kernel = aot.compiled(triton_kernels.measure, chip, constants, tile.warps, tile.stages)
    aot.assert_sound(kernel, chip)
    assert_copies(kernel, tile)


@needs_tools
@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_means(chip: int, head_dim: int) -> None:
    tile = triton.means_tile(2)
    constants = triton.means_constants(head_dim, head_dim, 128, tile) | {"UPCAST": False}
    types = {"key_ptr": "*bf16", "value_ptr": "*bf16", "bias_ptr": "*fp32"}
    aot.assert_sound(aot.compiled(triton_kernels.add_means, chip, constants, tile.warps, tile.stages, **types), chip)


@needs_tools
@pytest.mark.parametrize("chip", [89])
def test_float32_fits_the_smallest_memory(chip: int) -> None:
    tile = triton.fitting(tiles.tiles_for(chip, 128, 128, 128), 4, True, SPARSE)
    constants = triton.attend_constants(128, 128, 128, 128, tile) | {**SPARSE, "RAGGED": True, "UPCAST": False}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*fp32")
    kernel = aot.compiled(triton_kernels.attend, chip, constants, tile.warps, tile.stages, **types)
    assert kernel.shared <= aot.CHIPS[chip][1]


def test_a_tile_is_taken_only_where_its_needs_are_met() -> None:
    table = tiles.tiles_for(90, 128, 128, 128)
    assert [tile.copy for tile in table] == ["specialised", "tma", "pointers"]
    assert triton.fitting(table, 2, True, SPARSE) == table[0]
    assert triton.fitting(table, 2, True, VARIANTS["masked"]) == table[1]
    assert triton.fitting(table, 2, True, VARIANTS["fused"]).copy == "tma"
    assert triton.fitting(table, 2, True, VARIANTS["boxes"]).copy == "tma"
    assert triton.fitting(table, 2, False, SPARSE).copy == "pointers"
    assert triton.fitting(table, 4, True, SPARSE).copy == "pointers"
    blackwell = tiles.tiles_for(100, 128, 128, 128)
    assert triton.fitting(blackwell, 2, True, VARIANTS["masked"]) == blackwell[0]
    assert blackwell[0].copy == "specialised"


def test_tiles_that_are_wrong_on_a_device_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: set[str] = set()
    tried: list[str] = []

    def verdict(kernel: str, case: Case, device: torch.device) -> str:
        tried.append(kernel)
        return "wrong" if kernel in wrong else ""

    monkeypatch.setattr(triton.trials, "verdict", verdict)
    monkeypatch.setattr(triton, "chip", lambda device: 90)
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
