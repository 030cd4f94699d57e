"""Attention on NVIDIA GPUs in Triton: allocates, chooses a tile, launches the kernels of `kernels.py`.

Inputs are [B, H, N, D] of float32, bfloat16 or float16 and any strides: [B, N, H, D] is read in place. D is at most
128. Scores, softmax and LSE are float32; weights are rounded to the inputs' dtype before they meet the values. The
error against float64 stays below twice that of plain attention in the same dtype, as the tests measure it.

`copy`, an argument of the functions, has tiles of this kind load the keys, for the trials of one kind; None takes the
best kind that was right in its trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from diffsparse_kernels import trials
from diffsparse_kernels.backend.nvidia import LOG2E, chip, in_base_two, mask_pointers, positive
from diffsparse_kernels.backend.triton import kernels
from diffsparse_kernels.backend.triton.fit import fit_rows as fit_rows
from diffsparse_kernels.backend.triton.host import INTERPRETED, launch, padded, strides, upcast
from diffsparse_kernels.backend.triton.rows import move_rows as move_rows
from diffsparse_kernels.backend.triton.rows import restore_rows as restore_rows
from diffsparse_kernels.backend.triton.selection import lists_of_bits as lists_of_bits
from diffsparse_kernels.backend.triton.selection import lists_of_largest as lists_of_largest
from diffsparse_kernels.case import DENSE_BLOCKS, PRECISIONS, Case
from diffsparse_kernels.errors import NoKernelError
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import Boxes, each_head, is_bias
from diffsparse_kernels.measured import HEAD_DIMS, Copy, Tile, tiles_for
from diffsparse_kernels.merge import merge_attention
from diffsparse_kernels.summaries import REACH, StandIns, Summaries, keeps_slopes, kept_dtype, parts_of

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Flags(TypedDict):
    """What `kernels.attend` has to do, as its constants."""

    SPARSE: bool
    ORDERED: bool
    MASKED: bool
    BIASED: bool
    AXES: int
    MASS: bool
    SCALED: bool
    VALUES: str
    SUMMARISED: bool
    VARIED: bool
    SLOPED: bool
    BOUNDED: bool


class Rounded(NamedTuple):
    """What `kernels.attend` needs of eight-bit inputs besides these.

    Attributes:
        dtype: of the output.
        values: number format of v, "plain", "int8" or "fp8"; v is [B, H, D_V, N] unless it is plain.
        q_scale: float32 [B, H, nQ].
        k_scale: float32 [B, H, nK].
        v_scale: float32 [B, H, D_V]; None if v is plain.
    """

    dtype: torch.dtype
    values: str
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor | None


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why the kernels don't run on `device`, or can't compute `case` there; None if they can."""
    reason = device_capability(device)
    return reason if reason is not None or case is None else case_capability(case) or _precision(device, case)


def device_capability(device: torch.device) -> str | None:
    """Why the kernels don't run on `device`; None if they do."""
    if device.type == "cpu" and not INTERPRETED:
        return "on the CPU it runs in Triton's interpreter only: set TRITON_INTERPRET=1"
    return None


def case_capability(case: Case) -> str | None:
    """What the kernels can't do of a case on any device; None if they can do all."""
    if case.kind == "selection":
        return None
    # Of rows that are sampled from a block there may be fewer.
    q_block = max(case.q_block, BLOCKS[0]) if case.kind == "mass" else case.q_block
    if q_block not in BLOCKS or case.kv_block not in BLOCKS:
        wanted = ", ".join(map(str, BLOCKS))
        return f"it wants blocks of {wanted} tokens; got {case.q_block} and {case.kv_block}"
    if case.dtype not in DTYPES:
        return f"it wants float32, bfloat16 or float16; got {case.dtype}"
    if max(case.head_dim, case.value_dim) > HEAD_DIMS[-1]:
        return f"it wants heads of at most {HEAD_DIMS[-1]} channels; got {case.head_dim} and {case.value_dim}"
    return None


def _precision(device: torch.device, case: Case) -> str | None:
    """What the kernels can't do in eight bits."""
    if case.precision is None:
        return None
    if case.kind != "attend" or case.axes:
        return "in eight bits it computes attention without boxes only"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"in eight bits it wants bfloat16 or float16; got {case.dtype}"
    if case.head_dim <= 16 or case.kv_block <= 16:  # tensor cores add up 32 products at a time
        sizes = f"{case.head_dim} and {case.kv_block}"
        return f"in eight bits it wants heads of more than 16 channels and blocks of more than 16 keys; got {sizes}"
    return chip_capability(device, case.precision)


def chip_capability(device: torch.device, precision: str) -> str | None:
    """Why the tensor cores of a GPU don't know this precision; None if they do."""
    if "fp8" in PRECISIONS[precision] and device.type == "cuda" and chip(device) < 89:
        return f"precision {precision!r} wants sm_89 or later; got sm_{chip(device)}. Use precision='int8'"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, copy: Copy | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    return attend(q, k, v, scale, key_mask, DENSE_BLOCKS, copy=copy)[:2]


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
    return attend(q, k, v, scale, key_mask, (q_block, kv_block), cached=lse, copy=copy)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
    stand_ins: StandIns | None = None,
    tile: Tile | None = None,
    copy: Copy | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, and what stands for the others. `tile` serves to measure tiles."""
    found = attend(
        q,
        k,
        v,
        scale,
        key_mask,
        (lists.q_block, lists.kv_block),
        lists=lists,
        boxes=boxes,
        tile=tile,
        copy=copy,
        stand_ins=stand_ins,
    )
    return found[:2]


def stand_ins(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_mask: Tensor | None, summaries: Summaries
) -> StandIns:
    """What stands for the blocks outside the lists, in q's dtype. Slopes that were not kept are made again."""
    made = StandIns(summaries.key.to(q.dtype), summaries.value.to(q.dtype), summaries.log_count, summaries.variance)
    if not summaries.mixed:
        return made._replace(slope=None if summaries.slope is None else summaries.slope.to(q.dtype))
    weights, reach = _mixing(q, lists, scale, summaries, made)
    slope = q.new_empty(*q.shape[:2], lists.q_blocks, k.shape[3] * v.shape[3])
    for part in parts_of(k, lists.kv_blocks * k.shape[3] * v.shape[3] * k.element_size()):
        some = None if summaries.slope is None else summaries.slope[part]
        if some is None:
            keys = None if key_mask is None else each_head(key_mask).expand(k.shape[:3])[part]
            some = cast(Tensor, _first_order(k[part], v[part], lists.kv_block, scale, keys, True).slope)
        torch.matmul(weights[part], some.to(q.dtype).flatten(3), out=slope[part])
    return made._replace(slope=slope.unflatten(3, (k.shape[3], -1)), reach=reach)


def _mixing(
    q: Tensor, lists: BlockLists, scale: float, summaries: Summaries, made: StandIns
) -> tuple[Tensor, Tensor | None]:
    """Launch `kernels.mix` -> weights [B, H, nQ, nK] of q's dtype, reach [B, H, nQ]."""
    (batch, heads, n_q, head_dim), kv_blocks = q.shape, lists.kv_blocks
    weights = q.new_empty(batch, heads, lists.q_blocks, kv_blocks)
    reach, bits = q.new_empty(weights.shape[:3], dtype=torch.float32), lists.packed().contiguous()
    spread, constants = summaries.spread, mix_constants(head_dim, lists.q_block)
    launch(
        kernels.mix,
        batch * heads * blocks_of(lists.q_blocks, constants["BLOCKS"]),
        q,
        Tile(constants["BLOCK_N"], 8, 2),
        q_ptr=q,
        key_ptr=made.key.contiguous(),
        log_count_ptr=made.log_count.float().expand(weights.shape[0], heads, -1).contiguous(),
        spread_ptr=reach if spread is None else spread.contiguous(),
        bits_ptr=bits,
        weight_ptr=weights,
        reach_ptr=reach,
        scale_log2=scale * LOG2E,
        reach_scale=REACH,
        n_q=n_q,
        kv_blocks=kv_blocks,
        heads=heads,
        listed=bits.shape[0] * heads * lists.q_blocks,
        **strides(q=q),
        **constants,
        BOUNDED=spread is not None,
        UPCAST=upcast(q),
    )
    return weights, None if spread is None else reach


def mix_constants(head_dim: int, q_block: int) -> dict[str, int]:
    """The constants of `kernels.mix` that sizes decide."""
    return {"D": head_dim, "D_PAD": padded(head_dim), "Q_BLOCK": q_block, "BLOCKS": 16, "BLOCK_N": 64}


def merge(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, stand_ins: StandIns, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """out and lse of any back end, and what stands for the blocks outside the lists."""
    none = replace(lists, cnt=torch.zeros_like(lists.cnt), order=None, bits=lists.packed())
    blocks = lists.q_block, lists.kv_block
    theirs, their_lse, _ = attend(q, k, v, scale, None, blocks, lists=none, stand_ins=stand_ins)
    return merge_attention(out, lse, theirs, their_lse)


def first_order(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None) -> Summaries:
    """Summaries of first order, one read of keys and values."""
    return _first_order(k, v, block, scale, key_mask, keeps_slopes(k, v, block))


def _first_order(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None, sloped: bool) -> Summaries:
    """Launch `kernels.first_order`; without slopes, unless `sloped`."""
    (batch, heads, n_kv, head_dim), value_dim = k.shape, v.shape[3]
    blocks, tile = (batch, heads, blocks_of(n_kv, block)), first_order_tile(k.element_size(), value_dim)
    empty = partial(k.new_empty, dtype=kept_dtype(k))
    slope = empty(*blocks, head_dim, value_dim) if sloped else None
    moments = (k.new_empty(blocks, dtype=torch.float32) for _ in range(4))
    made = Summaries._make((empty(*blocks, head_dim), empty(*blocks, value_dim), *moments, slope))
    mask = None if key_mask is None else _readable(each_head(key_mask)).expand(k.shape[:3])
    launch(
        kernels.first_order,
        math.prod(blocks),
        k,
        tile,
        k_ptr=k,
        v_ptr=v,
        key_mask_ptr=k if mask is None else mask,
        **{f"{name}_ptr": k if x is None else x for name, x in made._asdict().items()},
        scale=scale,
        n_kv=n_kv,
        heads=heads,
        mask_b=0 if mask is None else mask.stride(0),
        mask_h=0 if mask is None else mask.stride(1),
        **strides(k=k, v=v),
        **first_order_constants(head_dim, value_dim, block, tile),
        **mask_flags(key_mask),
        SLOPED=sloped,
        UPCAST=upcast(k),
    )
    return made


def _readable(key_mask: Tensor) -> Tensor:
    """A key mask's bytes, or its bias in base 2."""
    return in_base_two(key_mask) if is_bias(key_mask) else key_mask.contiguous().view(torch.uint8)


def mask_flags(key_mask: Tensor | None) -> dict[str, bool]:
    """How kernels read a key mask."""
    biased = is_bias(key_mask)
    return {"MASKED": key_mask is not None and not biased, "BIASED": biased}


def first_order_tile(itemsize: int, value_dim: int) -> Tile:
    """The tile of `kernels.first_order`; its `keys` are channels of the values, few of float32, which fills memory."""
    return Tile(min(padded(value_dim), 16 if itemsize > 2 else 128), 8, 1)


def first_order_constants(head_dim: int, value_dim: int, kv_block: int, tile: Tile) -> dict[str, int]:
    """The constants of `kernels.first_order` that sizes and tile decide."""
    sizes = {"D": head_dim, "D_V": value_dim, "D_PAD": padded(head_dim), "DV_PAD": padded(value_dim)}
    return {**sizes, "KV_BLOCK": kv_block, "BLOCK_V": tile.keys}


def summary_error(q: Tensor, summaries: Summaries, q_block: int, scale: float) -> Tensor:
    """Estimated error of each tile's summary, float32 [B, H, nQ, nK], two passes over the mean keys."""
    (batch, heads, n_q, head_dim), kv_blocks = q.shape, summaries.key.shape[2]
    q_blocks, tile = blocks_of(n_q, q_block), error_tile(q.element_size())
    error = q.new_empty(batch, heads, q_blocks, kv_blocks, dtype=torch.float32)
    wide = summaries.log_count.expand(batch, heads, -1)
    moments = {"steepness": summaries.steepness, "variance": summaries.variance, "spread": summaries.spread}
    launch(
        kernels.summary_error,
        batch * heads * q_blocks,
        q,
        tile,
        q_ptr=q,
        key_ptr=summaries.key.to(q.dtype).contiguous(),
        log_count_ptr=wide.contiguous(),
        **{f"{name}_ptr": x.contiguous() for name, x in moments.items() if x is not None},
        error_ptr=error,
        scale_log2=scale * LOG2E,
        n_q=n_q,
        kv_blocks=kv_blocks,
        heads=heads,
        **strides(q=q),
        **error_constants(head_dim, q_block, tile),
        UPCAST=upcast(q),
    )
    return error


def error_tile(itemsize: int) -> Tile:
    """The tile of `kernels.summary_error`."""
    return Tile(16, 8, 1) if itemsize > 2 else Tile(64, 8, 2)


def error_constants(head_dim: int, q_block: int, tile: Tile) -> dict[str, int]:
    """The constants of `kernels.summary_error` that sizes and tile decide."""
    return {"D": head_dim, "D_PAD": padded(head_dim), "Q_BLOCK": q_block, "BLOCK_N": tile.keys}


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
    if not _allowed(tile.copy, copy, case, q.device):
        tile = tile._replace(copy="pointers")
    constants = measure_constants(head_dim, q_block, kv_block, tile)
    launch(
        kernels.measure,
        batch * heads * blocks_of(n_q, constants["BLOCK_M"]),
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
        **mask_flags(key_mask),
        RAGGED=n_kv % kv_block != 0,
        UPCAST=upcast(q),
    )
    return mass


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    blocks: tuple[int, int],
    *,
    lists: BlockLists | None = None,
    cached: Tensor | None = None,
    boxes: Boxes | None = None,
    tile: Tile | None = None,
    copy: Copy | None = None,
    stand_ins: StandIns | None = None,
    rounded: Rounded | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `kernels.attend` -> out, lse, mass (empty if there is no cached LSE)."""
    case = _case_of(q, k, v, blocks, key_mask, boxes, cached, rounded)
    case = case._replace(summary=None if stand_ins is None else stand_ins.by)
    check(case)
    if scale < 0 and stand_ins is not None and stand_ins.slope is not None:
        stand_ins = stand_ins._replace(slope=-stand_ins.slope)  # as the queries
    q, scale = positive(q, scale)
    (batch, heads, n_q, _), n_kv = q.shape, k.shape[2]
    q_blocks, kv_blocks = blocks_of(n_q, case.q_block), blocks_of(n_kv, case.kv_block)
    out = q.new_empty(batch, heads, n_q, case.value_dim, dtype=case.dtype)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32)
    mass = q.new_empty((0,) if cached is None else (batch, heads, q_blocks, kv_blocks), dtype=torch.float32)
    flags = _flags(lists, key_mask, boxes, cached, rounded, stand_ins)
    tile = tile or attend_tile(case, q.device, flags, copy)
    launch(
        kernels.attend,
        batch * heads * q_blocks,
        q,
        tile,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        mass_ptr=mass,
        cached_ptr=q if cached is None else cached.float().contiguous(),
        **_list_arguments(lists, q, batch * heads * q_blocks),
        **mask_pointers(key_mask, q),
        **_box_pointers(boxes, q),
        **_scale_pointers(rounded, lse),
        **_stand_in_arguments(lists, stand_ins, lse),
        scale_log2=scale * LOG2E,
        n_q=n_q,
        n_kv=n_kv,
        heads=heads,
        **strides(q=q, k=k, v=v),
        **attend_constants(case.head_dim, case.value_dim, case.q_block, case.kv_block, tile),
        BLOCK_S=stand_ins_width(chip(q.device), case.dtype.itemsize),
        **flags,
        RAGGED=n_kv % case.kv_block != 0,
        UPCAST=upcast(q, v),
    )
    return out, lse, mass


def _case_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: tuple[int, int],
    key_mask: Tensor | None,
    boxes: Boxes | None,
    cached: Tensor | None,
    rounded: Rounded | None,
) -> Case:
    """The case; of rounded inputs, with the dtype and the channels of the output."""
    case = Case.of("attend" if cached is None else "fused", q, k, v, blocks, key_mask, boxes)
    if rounded is None:
        return case
    return case._replace(dtype=rounded.dtype, value_dim=v.shape[3 if rounded.values == "plain" else 2])


def _flags(
    lists: BlockLists | None,
    key_mask: Tensor | None,
    boxes: Boxes | None,
    cached: Tensor | None,
    rounded: Rounded | None,
    stand_ins: StandIns | None,
) -> Flags:
    ordered = lists is not None and lists.order is not None
    flags = flags_of(lists is not None, ordered, False, boxes, cached is not None)
    flags["MASKED"], flags["BIASED"] = mask_flags(key_mask).values()
    if rounded is not None:
        flags["SCALED"], flags["VALUES"] = True, rounded.values
    if stand_ins is not None:
        flags["SUMMARISED"], flags["VARIED"] = True, stand_ins.variance is not None
        flags["SLOPED"], flags["BOUNDED"] = stand_ins.slope is not None, stand_ins.reach is not None
    return flags


def flags_of(sparse: bool, ordered: bool, masked: bool, boxes: Boxes | None, mass: bool) -> Flags:
    """The flags of inputs that are not rounded, without summaries and with no bias."""
    return Flags(
        SPARSE=sparse,
        ORDERED=ordered,
        MASKED=masked,
        BIASED=False,
        AXES=0 if boxes is None else boxes.place.shape[0],
        MASS=mass,
        SCALED=False,
        VALUES="plain",
        SUMMARISED=False,
        VARIED=False,
        SLOPED=False,
        BOUNDED=False,
    )


def stand_ins_width(chip: int, itemsize: int) -> int:
    """Stand-ins that `kernels.attend` takes at a time: as many as fit beside the output."""
    if itemsize > 2:
        return 16
    return 64 if 90 <= chip < 120 else 32


def attend_tile(case: Case, device: torch.device, flags: Flags, copy: Copy | None = None) -> Tile:
    """The first tile of the table whose needs are met, and whose kind is `copy`, or was right in its trial."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    tiles = tiles_for(chip(device), max(case.head_dim, case.value_dim), case.q_block, case.kv_block, name)
    capable = capable_tiles(tiles, case.dtype.itemsize, case.copyable, flags)
    return next(tile for tile in capable if tile.copy == "pointers" or _allowed(tile.copy, copy, case, device))


def _allowed(kind: Copy, copy: Copy | None, case: Case, device: torch.device) -> bool:
    """Whether tiles of this kind may be used: asked for, or right in their trial, which "pointers" never need.

    Compilers are young where they split the work of warps.
    """
    if copy is not None:
        return kind == copy
    return kind == "pointers" or not trials.verdict(f"triton-{kind}", case, device)


def capable_tiles(tiles: list[Tile], itemsize: int, copyable: bool, flags: Flags) -> Iterator[Tile]:
    """The tiles that these inputs allow, in order; float32, which no tensor core multiplies, has one that always runs.

    Args:
        itemsize: bytes of a number of the inputs.
    """
    if itemsize > 2:
        yield Tile(min(16, tiles[-1].keys), 8, 1)
        return
    # Sums over the rows of warps that work apart, boxes and a second loop are more than the compiler can specialise.
    together = flags["MASS"] or flags["AXES"] > 0 or flags["SUMMARISED"]
    kinds = {"pointers": True, "tma": copyable, "specialised": copyable and not together}
    yield from (tile for tile in tiles if kinds[tile.copy])


def attend_constants(head_dim: int, value_dim: int, q_block: int, kv_block: int, tile: Tile) -> dict[str, int]:
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


def measure_tile(chip: int, kv_block: int, itemsize: int, copyable: bool) -> Tile:
    """The tile of `kernels.measure`, which has room to spare on every chip."""
    if itemsize > 2:
        return Tile(min(16, kv_block), 8, 1)
    return Tile(min(64, kv_block), 8, 3, "tma" if copyable and 90 <= chip < 120 else "pointers")


def measure_constants(head_dim: int, q_block: int, kv_block: int, tile: Tile) -> dict[str, int]:
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


def _list_arguments(lists: BlockLists | None, unread: Tensor, programs: int) -> dict[str, object]:
    if lists is None:
        return {**dict.fromkeys(("idx_ptr", "cnt_ptr", "order_ptr"), unread), "listed": programs, "width": 0}
    return {
        "idx_ptr": lists.idx.contiguous(),
        "cnt_ptr": lists.cnt.contiguous(),
        "order_ptr": unread if lists.order is None else lists.order,
        "listed": lists.cnt.numel(),
        "width": lists.idx.shape[3],
    }


def _box_pointers(boxes: Boxes | None, unread: Tensor) -> dict[str, Tensor]:
    pointers = (unread,) * 3 if boxes is None else tuple(x.contiguous() for x in boxes)
    return dict(zip(("place_ptr", "low_ptr", "high_ptr"), pointers, strict=True))


def _stand_in_arguments(lists: BlockLists | None, by: StandIns | None, unread: Tensor) -> dict[str, object]:
    if lists is None or by is None:
        names = ("bits", "key", "value", "log_count", "variance", "slope", "reach")
        return {**{f"{name}_ptr": unread for name in names}, "slope_n": 0}
    counts = by.log_count.float().expand(by.key.shape[:3])
    parts = {name: x.contiguous() for name, x in by._replace(log_count=counts)._asdict().items() if x is not None}
    pointers = {f"{name}_ptr": parts.get(name, unread) for name in by._fields}
    slope_n = 0 if by.slope is None or by.slope.shape[2] == 1 else by.slope.shape[3] * by.slope.shape[4]
    return {**pointers, "bits_ptr": lists.packed().contiguous(), "slope_n": slope_n}


def _scale_pointers(rounded: Rounded | None, unread: Tensor) -> dict[str, Tensor]:
    if rounded is None:
        return dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), unread)
    v_scale = unread if rounded.v_scale is None else rounded.v_scale
    return {"q_scale_ptr": rounded.q_scale, "k_scale_ptr": rounded.k_scale, "v_scale_ptr": v_scale}


def check(case: Case) -> None:
    """Raise NoKernelError for what the kernels can't do."""
    reason = case_capability(case)
    if reason is not None:
        raise NoKernelError(f"the triton backend can't do this: {reason}")
