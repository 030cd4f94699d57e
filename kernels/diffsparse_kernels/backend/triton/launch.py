"""Attention on NVIDIA GPUs in Triton: allocates, chooses a tile, launches. The kernels are in `triton_kernels.py`.

Inputs are [B, H, N, D] of float32, bfloat16 or float16 and any strides: [B, N, H, D] is read in place. D is at most
128. Scores, softmax and LSE are float32; weights are rounded to the inputs' dtype before they meet the values. The
error against float64 stays below twice that of plain attention in the same dtype, as the tests measure it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
import triton
from torch import Tensor

from diffsparse_kernels import trials
from diffsparse_kernels.backend.triton import kernels
from diffsparse_kernels.backend.triton.tiles import HEAD_DIMS, Copy, Tile, tiles_for
from diffsparse_kernels.case import DENSE_BLOCKS, Case
from diffsparse_kernels.errors import NoKernelError
from diffsparse_kernels.lists import BlockLists, Boxes, blocks_of
from diffsparse_kernels.masks import mask_pointers
from diffsparse_kernels.means import Means

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = 1.4426950408889634
# Triton's interpreter multiplies bfloat16 as bit patterns: there it is computed in float32.
INTERPRETED: bool = not isinstance(kernels.attend, triton.runtime.JITFunction)


def unfit(device: torch.device) -> str:
    """Why the kernels do not run on `device`; empty if they do."""
    if device.type == "cpu" and not INTERPRETED:
        return "on the CPU it runs in Triton's interpreter only: set TRITON_INTERPRET=1"
    return ""


def refuses(case: Case) -> str:
    """What the kernels can't do of a case; empty if they can do all."""
    # Of rows that are sampled from a block there may be fewer.
    q_block = max(case.q_block, BLOCKS[0]) if case.kind == "mass" else case.q_block
    if q_block not in BLOCKS or case.kv_block not in BLOCKS:
        wanted = ", ".join(map(str, BLOCKS))
        return f"it wants blocks of {wanted} tokens; got {case.q_block} and {case.kv_block}"
    if case.dtype not in DTYPES:
        return f"it wants float32, bfloat16 or float16; got {case.dtype}"
    if max(case.head_dim, case.value_dim) > HEAD_DIMS[-1]:
        return f"it wants heads of at most {HEAD_DIMS[-1]} channels; got {case.head_dim} and {case.value_dim}"
    return ""


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, copy: Copy | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse. `copy`, here and below: by tiles of this kind alone, for whoever tries them."""
    return _attend(q, k, v, scale, key_mask, *DENSE_BLOCKS, copy=copy)[:2]


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    copy: Copy | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE and the block mass, one pass."""
    return _attend(q, k, v, scale, key_mask, q_block, kv_block, cached=lse, copy=copy)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
    tile: Tile | None = None,
    copy: Copy | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks; `tile` instead of the table's is for whoever measures them."""
    blocks = lists.q_block, lists.kv_block
    return _attend(q, k, v, scale, key_mask, *blocks, lists=lists, boxes=boxes, tile=tile, copy=copy)[:2]


def merge_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge what the means of the blocks outside the lists give into out and lse, in place, whoever made these."""
    means = Means.of(k, v, lists.kv_block, key_mask)
    (batch, heads, n_q, head_dim), kv_blocks = q.shape, means.key.shape[2]
    tile = means_tile(q.element_size())
    launch(
        kernels.add_means,
        batch * heads * lists.q_blocks,
        q,
        tile,
        q_ptr=q,
        key_ptr=means.key.to(q.dtype).contiguous(),
        value_ptr=means.value.to(q.dtype).contiguous(),
        bias_ptr=(means.bias(lists) * LOG2E).expand(batch, heads, -1, -1).contiguous(),
        out_ptr=out,
        lse_ptr=lse,
        scale_log2=scale * LOG2E,
        n_q=n_q,
        kv_blocks=kv_blocks,
        heads=heads,
        **strides(q=q),
        **means_constants(head_dim, v.shape[3], lists.q_block, tile),
        UPCAST=upcast(q),
    )


def means_tile(itemsize: int) -> Tile:
    """The tile of `kernels.add_means`, a small part of the whole."""
    return Tile(16, 8, 1) if itemsize > 2 else Tile(64, 8, 2)


def means_constants(head_dim: int, value_dim: int, q_block: int, tile: Tile) -> dict[str, Any]:
    """The constants of `kernels.add_means` that sizes and tile decide."""
    sizes = {"D": head_dim, "D_V": value_dim, "D_PAD": padded(head_dim), "DV_PAD": padded(value_dim)}
    return {**sizes, "Q_BLOCK": q_block, "BLOCK_N": tile.keys}


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    copy: Copy | None = None,
) -> Tensor:
    """Sum of exp(score - lse) over each tile, float32 [B, H, nQ, nK], one pass over keys."""
    case = Case.of("mass", q, k, k, (q_block, kv_block), key_mask)
    check(case)
    q, scale = positive(q, scale)
    (batch, heads, n_q, head_dim), n_kv = q.shape, k.shape[2]
    mass = q.new_empty(batch, heads, blocks_of(n_q, q_block), blocks_of(n_kv, kv_block), dtype=torch.float32)
    tile = measure_tile(chip(q.device), kv_block, q.element_size(), case.copyable)
    if tile.copy != copy and not (copy is None and trusted(tile.copy, case, q.device)):
        tile = tile._replace(copy="pointers")
    constants = measure_constants(head_dim, q_block, kv_block, tile)
    grid = batch * heads * blocks_of(n_q, constants["BLOCK_M"])
    launch(
        kernels.measure,
        grid,
        q,
        tile,
        q_ptr=q,
        k_ptr=k,
        mass_ptr=mass,
        cached_ptr=lse.float().contiguous(),
        **mask_pointers(key_mask, q),
        scale_log2=scale * LOG2E,
        n_q=n_q,
        n_kv=n_kv,
        heads=heads,
        **strides(q=q, k=k),
        **constants,
        MASKED=key_mask is not None,
        RAGGED=n_kv % kv_block != 0,
        UPCAST=upcast(q),
    )
    return mass


def attend_rounded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    tile: Tile,
    dtype: torch.dtype,
    extra: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """`eight_bits` launches by this: rounded inputs, their scales in `extra`, the output's dtype."""
    return _attend(
        q, k, v, scale, key_mask, lists.q_block, lists.kv_block, lists=lists, tile=tile, dtype=dtype, extra=extra
    )[:2]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    q_block: int,
    kv_block: int,
    *,
    lists: BlockLists | None = None,
    cached: Tensor | None = None,
    boxes: Boxes | None = None,
    tile: Tile | None = None,
    copy: Copy | None = None,
    dtype: torch.dtype | None = None,
    extra: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `kernels.attend` -> out, lse, mass (empty if there is no cached LSE)."""
    rounded_values = extra is not None and extra["VALUES"] != "plain"  # [B, H, D_V, N]
    value_dim = v.shape[2 if rounded_values else 3]
    case = Case.of("attend" if cached is None else "fused", q, k, v, (q_block, kv_block), key_mask, boxes)
    case = case._replace(dtype=q.dtype if dtype is None else dtype, value_dim=value_dim)
    check(case)
    q, scale = positive(q, scale)
    (batch, heads, n_q, head_dim), n_kv = q.shape, k.shape[2]
    q_blocks, kv_blocks = blocks_of(n_q, q_block), blocks_of(n_kv, kv_block)
    out = q.new_empty(batch, heads, n_q, value_dim, dtype=dtype)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32)
    mass = q.new_empty((0,) if cached is None else (batch, heads, q_blocks, kv_blocks), dtype=torch.float32)
    order = None if lists is None else lists.order
    flags = flags_of(lists is not None, order is not None, key_mask is not None, boxes, cached is not None)
    tile = tile or attend_tile(case, q.device, flags, copy)
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse_ptr": lse,
        "mass_ptr": mass,
        "cached_ptr": q if cached is None else cached.float().contiguous(),
        "idx_ptr": q if lists is None else lists.idx.contiguous(),
        "cnt_ptr": q if lists is None else lists.cnt.contiguous(),
        "order_ptr": q if order is None else order,
        **mask_pointers(key_mask, q),
        **dict(zip(("place_ptr", "low_ptr", "high_ptr"), _pointers(boxes, q), strict=True)),
        **dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), lse),
        "scale_log2": scale * LOG2E,
        "n_q": n_q,
        "n_kv": n_kv,
        "heads": heads,
        "listed": batch * heads * q_blocks if lists is None else lists.cnt.numel(),
        "width": 0 if lists is None else lists.idx.shape[3],
        **strides(q=q, k=k, v=v),
        **attend_constants(head_dim, value_dim, q_block, kv_block, tile),
        **flags,
        "RAGGED": n_kv % kv_block != 0,
        "UPCAST": upcast(q, v),
    }
    launch(kernels.attend, batch * heads * q_blocks, q, tile, **arguments | (extra or {}))
    return out, lse, mass


def flags_of(sparse: bool, ordered: bool, masked: bool, boxes: Boxes | None, mass: bool) -> dict[str, Any]:
    """What `kernels.attend` has to do, as its constants."""
    axes = 0 if boxes is None else boxes.place.shape[0]
    plain = {"SCALED": False, "VALUES": "plain"}
    return {"SPARSE": sparse, "ORDERED": ordered, "MASKED": masked, "AXES": axes, "MASS": mass, **plain}


def attend_tile(case: Case, device: torch.device, flags: dict[str, Any], copy: Copy | None = None) -> Tile:
    """The first tile of the table whose needs are met, and whose kind is right on this device, or is `copy`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    tiles = tiles_for(chip(device), max(case.head_dim, case.value_dim), case.q_block, case.kv_block, name)
    while True:
        tile = fitting(tiles, case.dtype.itemsize, case.copyable, flags)
        if tile.copy == copy or (copy is None and trusted(tile.copy, case, device)) or tile.copy == "pointers":
            return tile
        tiles = [other for other in tiles if other.copy != tile.copy]


def trusted(copy: Copy, case: Case, device: torch.device) -> bool:
    """Whether tiles of this kind are right on this device: compilers are young where they split the work of warps."""
    return copy == "pointers" or not trials.verdict(f"triton-{copy}", case, device)


def fitting(tiles: list[Tile], itemsize: int, copyable: bool, flags: dict[str, Any]) -> Tile:
    """The first tile that these inputs allow; float32 runs everywhere, but without tensor cores nobody tunes it."""
    if itemsize > 2:
        return Tile(min(16, tiles[-1].keys), 8, 1)
    # Sums over the rows of warps that work apart, and boxes, are more than the compiler can specialise.
    together = flags["MASS"] or flags["AXES"] > 0
    fits = {"pointers": True, "tma": copyable, "specialised": copyable and not together}
    return next(tile for tile in tiles if fits[tile.copy])


def attend_constants(head_dim: int, value_dim: int, q_block: int, kv_block: int, tile: Tile) -> dict[str, Any]:
    """The constants of `kernels.attend` that sizes and tile decide."""
    return {
        "D": head_dim,
        "D_V": value_dim,
        "D_PAD": padded(head_dim),
        "DV_PAD": padded(value_dim),
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "BLOCK_N": tile.keys,
        "TMA": tile.copy != "pointers",
        "SPECIALISED": tile.copy == "specialised",
    }


def measure_tile(capability: int, kv_block: int, itemsize: int, copyable: bool) -> Tile:
    """The tile of `kernels.measure`, which has room to spare on every chip."""
    if itemsize > 2:
        return Tile(min(16, kv_block), 8, 1)
    return Tile(min(64, kv_block), 8, 3, "tma" if copyable and 90 <= capability < 120 else "pointers")


def measure_constants(head_dim: int, q_block: int, kv_block: int, tile: Tile) -> dict[str, Any]:
    """The constants of `kernels.measure` that sizes and tile decide."""
    return {
        "D": head_dim,
        "D_PAD": padded(head_dim),
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "BLOCK_M": 128,
        "BLOCK_N": tile.keys,
        "TMA": tile.copy != "pointers",
    }


def launch(kernel: Any, programs: int, q: Tensor, tile: Tile, **arguments: Any) -> None:
    """Run `programs` of a kernel on q's device."""

    def run() -> None:
        if tile.copy != "pointers":  # descriptors are made on the device, in memory that Triton asks for
            triton.set_allocator(_allocator(q.device))
        kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)

    with torch.cuda.device_of(q):
        copy_context().run(run)  # the allocator is nobody else's business


def _allocator(device: torch.device) -> Callable[[int, int, int | None], Tensor]:
    return lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Of each tensor by name, as kernels call them: `q_b`, `q_h`, `q_n`, `q_d`."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bhnd")}


def _pointers(boxes: Boxes | None, q: Tensor) -> tuple[Tensor, ...]:
    return (q, q, q) if boxes is None else tuple(x.contiguous() for x in boxes)


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take the maximum before they scale, which wants a positive scale."""
    return (-q, -scale) if scale < 0 else (q, max(scale, 1e-30))


def check(case: Case) -> None:
    """Raise NoKernelError for what the kernels can't do."""
    reason = refuses(case)
    if reason:
        raise NoKernelError(f"the triton backend can't do this: {reason}")


def padded(head_dim: int) -> int:
    """Head sizes are padded to powers of two in registers, at least the 16 that tensor cores want."""
    return int(max(16, triton.next_power_of_2(head_dim)))


def upcast(*tensors: Tensor) -> bool:
    """Whether the interpreter is to compute in float32."""
    return INTERPRETED and any(x.dtype in (torch.bfloat16, torch.float8_e4m3fn) for x in tensors)


def chip(device: torch.device) -> int:
    """Its compute capability, such as 90; the interpreter passes for the oldest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return int(10 * major + minor)
