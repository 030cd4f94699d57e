"""Block-sparse attention whose products run in eight bits, on the triton backend.

Queries and keys are rounded with one scale for each block, after the mean key is taken away (SageAttention, arXiv
2410.02367, section 4.2): that shifts all scores of a row alike, so the softmax does not feel it, and the LSE is given
it back. Values have one scale for each channel (SageAttention2, arXiv 2411.10958), weights the fixed one of the
softmax's range; integer values are PAROAttention's (arXiv 2506.16054, section 4.3).

They take bfloat16 and float16, blocks of 16 to 128 queries and 32 to 128 keys and heads of 17 to 128 channels, without
boxes, on a GPU of sm_80 or later (fp8: sm_89); there they are used once they were right in a trial (`choose_rounded`).

precision -> product of queries and keys, of weights and values:
    int8        int8, the inputs' dtype
    int8-int8   int8, int8
    int8-fp8    int8, fp8 (e4m3)
    fp8         fp8, fp8

Relative error (L2) of the output against float64, normal inputs with a common offset of the keys, N = 512, D = 64, half
of the blocks: bfloat16 0.003, int8 0.012, int8-int8 0.020, int8-fp8 0.037, fp8 0.052. The LSE is off by at most 0.007
with int8 scores, and 0.033 with fp8.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from diffsparse_kernels.backend.nvidia import chip, positive
from diffsparse_kernels.backend.triton import kernels
from diffsparse_kernels.backend.triton import launch as plain
from diffsparse_kernels.backend.triton.host import INTERPRETED, launch, padded, strides
from diffsparse_kernels.case import FORMATS, INTEGERS, PRECISIONS, copyable
from diffsparse_kernels.errors import BackendError
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.measured import Tile, tiles_for

_ALIGNMENT = 16  # bytes, for the copy engine
_CHUNK = 64  # values rounded at a time
_WARPS = 8  # of the kernels that round


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks -> out of q's dtype, lse float32.

    Raises:
        BackendError: fp8 on a chip before sm_89.
    """
    reason = plain.chip_capability(q.device, precision)
    if reason is not None:
        raise BackendError(reason)
    scores_in, values_in = PRECISIONS[precision]
    q, scale = positive(q, scale)
    mean = k.mean(2, dtype=torch.float32)  # [B, H, D]
    queries, q_scale, shift = _rounded_rows(q, mean, lists.q_block, scores_in, keys=False)
    keys, k_scale, _ = _rounded_rows(k, mean, lists.kv_block, scores_in, keys=True)
    values, v_scale = (v, None) if values_in == "plain" else _rounded_values(v, values_in)
    blocks = lists.q_block, lists.kv_block
    sizes = max(q.shape[3], v.shape[3]), *blocks
    tile = tile_for(chip(q.device), *sizes, precision, copyable(queries, keys, values))
    rounded = plain.Rounded(q.dtype, values_in, q_scale, k_scale, v_scale)
    out, lse, _ = plain.attend(queries, keys, values, scale, key_mask, blocks, lists=lists, tile=tile, rounded=rounded)
    return out, lse + shift * scale


def tile_for(chip: int, head_dim: int, q_block: int, kv_block: int, precision: str, copyable: bool) -> Tile:
    """The table's tile whose warps all do the same; integer values need room for a second sum."""
    together = plain.flags_of(sparse=True, ordered=False, masked=False, boxes=None, mass=True)
    tile = next(plain.capable_tiles(tiles_for(chip, head_dim, q_block, kv_block), 1, copyable, together))
    most = 32 if precision == INTEGERS or (chip >= 120 and precision == "int8") else 64
    return tile._replace(keys=min(tile.keys, most), stages=2)


def _rounded_rows(x: Tensor, mean: Tensor, block: int, kind: str, *, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x in eight bits, its scales [B, H, nB], and for queries x . mean [B, H, N]."""
    batch, heads, length, dim = x.shape
    width = blocks_of(dim, _ALIGNMENT) * _ALIGNMENT
    rounded = x.new_empty(batch, heads, length, width, dtype=FORMATS[kind].dtype)
    scale = x.new_empty(batch, heads, blocks_of(length, block), dtype=torch.float32)
    shift = x.new_empty((0,) if keys else (batch, heads, length), dtype=torch.float32)
    _round(
        kernels.round_rows,
        scale.numel(),
        x,
        block,
        x_ptr=x,
        mean_ptr=mean,
        out_ptr=rounded,
        scale_ptr=scale,
        shift_ptr=shift,
        out_n=width,
        LIMIT=FORMATS[kind].largest,
        KEYS=keys,
        TYPE=kind,
    )
    return rounded[..., :dim], scale, shift


def _rounded_values(v: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """v in eight bits, transposed [B, H, D_V, N], and what its weighted sums are to be multiplied by [B, H, D_V]."""
    batch, heads, length, dim = v.shape
    width = blocks_of(length, _ALIGNMENT) * _ALIGNMENT
    rounded = v.new_empty(batch, heads, dim, width, dtype=FORMATS[kind].dtype)
    largest = torch.linalg.vector_norm(v, torch.inf, dim=2, dtype=torch.float32)
    scale = largest.clamp(min=1e-30) / FORMATS[kind].largest
    programs = batch * heads * blocks_of(length, _CHUNK)
    _round(kernels.round_values, programs, v, _CHUNK, v_ptr=v, scale_ptr=scale, out_ptr=rounded, out_n=width, TYPE=kind)
    return rounded[..., :length], scale / FORMATS[kind].one


def _round(kernel: triton.runtime.JITFunction, programs: int, x: Tensor, block: int, **arguments: object) -> None:
    launch(
        kernel,
        programs,
        x,
        Tile(block, _WARPS, 1),
        **arguments,
        length=x.shape[2],
        heads=x.shape[1],
        **strides(x=x),
        D=x.shape[3],
        D_PAD=padded(x.shape[3]),
        BLOCK=block,
        UPCAST=INTERPRETED,
    )
