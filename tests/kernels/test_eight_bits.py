"""Attention in eight bits without a GPU: right in the interpreter, on the right tensor cores of every chip."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import diffsparse_kernels as dk
from diffsparse_kernels.backend.triton import eight_bits
from diffsparse_kernels.backend.triton import kernels as triton_kernels
from diffsparse_kernels.backend.triton import launch as triton
from support import aot
from support.cases import Size, random_boxes, random_mask
from support.places import Place, gpu_obstacle, moved, repeated
from support.rounded import SIZES, assert_no_worse_than_rounding

# (chip, precision) -> instructions of the two products in PTX: IMMA, IGMMA, QMMA, QGMMA, UTCQMMA and those of bfloat16
SYNC = {"int8": r"mma\.sync\S*\.s8\.s8", "fp8": r"mma\.sync\S*e4m3", "plain": r"mma\.sync\S*bf16"}
HOPPER = {"int8": r"wgmma\S*\.s8\.s8", "fp8": r"wgmma\S*e4m3", "plain": r"wgmma\S*bf16"}
BLACKWELL = {"int8": SYNC["int8"], "fp8": r"tcgen05\.mma\S*f8f6f4", "plain": r"tcgen05\.mma\S*f16"}
INSTRUCTIONS = {80: SYNC, 89: SYNC, 90: HOPPER, 100: BLACKWELL, 120: SYNC}
TYPES = {"int8": "*i8", "fp8": "*fp8e4nv", "plain": "*bf16"}


def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_eight_bits.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("precision", eight_bits.PRECISIONS)
def test_on_the_device(precision: str) -> None:
    """The same that the interpreter is asked, and that 50 launches give the same bits."""
    if reason := gpu_obstacle("triton"):
        pytest.skip(f"triton: {reason}")
    if "fp8" in precision and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 wants sm_89 or later")
    for size, dtype, masked in itertools.product(SIZES, (torch.bfloat16, torch.float16), ("not", "bool", "bias")):
        assert_no_worse_than_rounding(Place("triton", "cuda"), size, dtype, precision, masked)
    size = SIZES[0]
    qkv, lists = moved(size.qkv(torch.bfloat16), "cuda"), moved(size.lists(random_mask(size)), "cuda")
    assert repeated(partial(dk.block_sparse_attention, *qkv, lists, precision=precision), 50)


@aot.compiles
@pytest.mark.parametrize(
    ("chip", "precision"),
    [
        (chip, precision)
        for chip in aot.CHIPS
        for precision, kinds in eight_bits.PRECISIONS.items()
        if chip >= 89 or "fp8" not in kinds
    ],
)
def test_ahead_of_time(chip: int, precision: str) -> None:
    """With a key mask where there is one precision to show it, and with one that is added where there is another."""
    scores, values = eight_bits.PRECISIONS[precision]
    tile = eight_bits.tile_for(chip, 128, 128, 128, precision, copyable=True)
    flags = triton.flags_of(sparse=True, ordered=True, masked=precision == "int8", boxes=None, mass=False)
    constants = triton.attend_constants(128, 128, 128, 128, tile) | flags
    biased = precision == "int8-int8"
    constants |= {"SCALED": True, "VALUES": values, "RAGGED": True, "UPCAST": False, "BIASED": biased}
    types = {"q_ptr": TYPES[scores], "k_ptr": TYPES[scores], "v_ptr": TYPES[values]}
    types |= {"key_mask_ptr": "*fp32"} if biased else {}
    kernel = aot.compiled(triton_kernels.attend, chip, constants, tile.warps, tile.stages, **types)
    aot.assert_sound(kernel, chip, INSTRUCTIONS[chip][scores])
    aot.assert_sound(kernel, chip, INSTRUCTIONS[chip][values])


@aot.compiles
@pytest.mark.parametrize(
    ("chip", "kind"), [(80, "int8"), (90, "int8"), (90, "fp8"), (100, "fp8"), (120, "int8"), (120, "fp8")]
)
def test_rounding_ahead_of_time(chip: int, kind: str) -> None:
    """Keys in one format, queries in the other: what they do differs by less than a compiler sees."""
    pointers = dict.fromkeys(("mean_ptr", "scale_ptr", "shift_ptr"), "*fp32")
    pointers |= {"x_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": TYPES[kind]}
    shape = {"D": 128, "D_PAD": 128, "TYPE": kind, "UPCAST": False}
    for kernel, more in (
        (triton_kernels.round_rows, {"BLOCK": 128, "LIMIT": 127.0, "KEYS": kind == "int8"}),
        (triton_kernels.round_values, {"BLOCK": 64}),
    ):
        aot.assert_sound(aot.compiled(kernel, chip, shape | more, eight_bits._WARPS, 1, **pointers), chip, "st.global")


def test_bad_arguments_are_told() -> None:
    size = Size()
    qkv, lists = size.qkv(torch.bfloat16), size.lists(random_mask(size))
    with pytest.raises(dk.KernelInputError, match="wanted precision as one of int8, int8-int8, int8-fp8, fp8, or None"):
        dk.block_sparse_attention(*qkv, lists, precision="int4")
    with pytest.raises(dk.KernelInputError, match="takes no boxes"):
        dk.block_sparse_attention(*qkv, lists, precision="int8", boxes=random_boxes(size))
    with pytest.raises(dk.BackendError, match="wants the triton backend; got 'cpu'"):
        dk.block_sparse_attention(*qkv, lists, precision="int8", backend="cpu")
    with pytest.raises(dk.BackendError, match="set TRITON_INTERPRET=1"):
        dk.block_sparse_attention(*qkv, lists, precision="int8", backend="triton")
