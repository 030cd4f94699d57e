"""Checks of arguments: what was wanted, what was given, and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse_kernels.case import PRECISIONS, Summary
from diffsparse_kernels.errors import BackendError, KernelInputError
from diffsparse_kernels.lists import BlockLists
from diffsparse_kernels.masks import Boxes
from diffsparse_kernels.rows import Correction
from diffsparse_kernels.summaries import SUMMARIES, Summaries

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Tensors of one dtype and device, and a key mask that belongs to them."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise KernelInputError(f"wanted q, k, v as [B, H, N, D]; got {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise KernelInputError(
            f"wanted q [B, H, N_q, D], k [B, H, N_kv, D], v [B, H, N_kv, D_v]; got {shapes}. "
            "Expand grouped key heads first"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES):
        raise KernelInputError(f"wanted one float dtype for q, k, v; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise KernelInputError(f"wanted q, k, v on one device; got {q.device}, {k.device}, {v.device}")
    if 0 in q.shape or 0 in v.shape:
        raise KernelInputError(f"wanted at least one sample, head, token and channel; got {shapes}")
    if key_mask is not None:
        _check_key_mask(k, key_mask)


def _check_key_mask(k: Tensor, key_mask: Tensor) -> None:
    batch, heads, keys = k.shape[:3]
    known = key_mask.dtype == torch.bool or key_mask.is_floating_point()
    if not known or key_mask.shape not in ((batch, keys), (batch, heads, keys)):
        raise KernelInputError(
            f"wanted key_mask bool, or float to be added to the scores, [{batch}, {keys}] or "
            f"[{batch}, {heads}, {keys}]; got {key_mask.dtype} {tuple(key_mask.shape)}"
        )


def check_lse(q: Tensor, lse: Tensor) -> None:
    """A log-sum-exp for each query."""
    if lse.shape != q.shape[:3]:
        raise KernelInputError(f"wanted lse {tuple(q.shape[:3])}; got {tuple(lse.shape)}")


def check_blocks(q_block: int, kv_block: int) -> None:
    """Edges of blocks in tokens."""
    if min(q_block, kv_block) < 1:
        raise KernelInputError(f"wanted blocks of at least 1 token; got {q_block} and {kv_block}")


def check_bits(bits: int) -> None:
    """Bits of whole numbers."""
    if bits not in range(2, 9):
        raise KernelInputError(f"wanted 2 to 8 bits; got {bits!r}")


def check_lists(q: Tensor, k: Tensor, lists: BlockLists) -> None:
    """Lists that belong to these queries and keys."""
    if (lists.q_len, lists.kv_len) != (q.shape[2], k.shape[2]):
        raise KernelInputError(
            f"the lists are for {lists.q_len} queries and {lists.kv_len} keys; got {q.shape[2]} and {k.shape[2]}. "
            "Build them again for this length"
        )
    if lists.cnt.shape[0] not in (1, q.shape[0]) or lists.cnt.shape[1] != q.shape[1]:
        raise KernelInputError(f"wanted lists [{q.shape[0]} or 1, {q.shape[1]}, nQ, W]; got {tuple(lists.idx.shape)}")
    if lists.idx.device != q.device:
        raise KernelInputError(f"the lists are on {lists.idx.device}, q on {q.device}; move one of them")


def check_precision(precision: object, boxes: Boxes | None, backend: str | None) -> None:
    """The name of one, and nothing beside it that eight bits can't do."""
    if precision not in PRECISIONS:
        raise KernelInputError(f"wanted precision as one of {', '.join(PRECISIONS)}, or None; got {precision!r:.60}")
    if boxes is not None:
        raise KernelInputError(f"precision {precision!r} takes no boxes; got some. Leave one of them away")
    if backend not in (None, "triton"):
        raise BackendError(f"precision {precision!r} wants the triton backend; got {backend!r}")


def check_summary_name(by: object) -> None:
    """A way to summarise."""
    if by not in SUMMARIES:
        raise KernelInputError(f"wanted a summary by one of {', '.join(SUMMARIES)}; got {by!r:.60}")


def check_summary(k: Tensor, v: Tensor, lists: BlockLists, summary: Summary | Summaries | None) -> None:
    """A summary of the blocks of these keys and values, or the name of one."""
    if not isinstance(summary, Summaries):
        return None if summary is None else check_summary_name(summary)
    wide, (dim, value_dim) = (*k.shape[:2], lists.kv_blocks), (k.shape[3], v.shape[3])
    _check_parts(summary, (*wide, dim), value_dim, k)
    one = (*wide[:2], 1, dim, value_dim)
    if summary.slope is not None and summary.slope.shape not in (one, (*wide, dim, value_dim)):
        raise KernelInputError(
            f"wanted a slope {(*wide, dim, value_dim)}, or {one} for all blocks; got {tuple(summary.slope.shape)}"
        )


def _check_parts(summary: Summaries, key: tuple[int, ...], value_dim: int, like: Tensor) -> None:
    """Of these shapes, on this tensor's device, in float32, or in its dtype where that is better or multiplied."""
    wide, exact = key[:3], torch.promote_types(like.dtype, torch.float32)
    counts = summary.log_count
    if counts.ndim == 3 and counts.shape[0] in (1, wide[0]) and counts.shape[1] in (1, wide[1]):
        counts = counts.expand(*wide[:2], -1)
    parts = {"key": (summary.key, key), "value": (summary.value, (*wide, value_dim)), "log_count": (counts, wide)}
    for name in ("variance", "spread", "steepness"):
        parts[name] = getattr(summary, name), wide
    for name, (part, shape) in parts.items():
        dtypes = (exact, like.dtype) if name in ("key", "value") else (exact,)
        if part is not None and ((tuple(part.shape), part.device) != (shape, like.device) or part.dtype not in dtypes):
            raise KernelInputError(
                f"wanted summaries whose {name} is {exact} {shape} on {like.device}; got {part.dtype} "
                f"{tuple(part.shape)} on {part.device}. Make them of these keys, in blocks of this length"
            )


def check_summary_error(q: Tensor, summaries: Summaries) -> None:
    """Summaries of first order that belong to these queries."""
    if any(x is None for x in (summaries.variance, summaries.spread, summaries.steepness)):
        raise KernelInputError(
            "wanted summaries with variance, spread and steepness; got none. Summarise by first-order"
        )
    key = summaries.key
    if q.ndim != 4 or q.shape[:2] != key.shape[:2] or q.shape[3] != key.shape[3]:
        raise KernelInputError(f"wanted q [B, H, N, D] for mean keys {tuple(key.shape)}; got {tuple(q.shape)}")
    _check_parts(summaries, tuple(key.shape), summaries.value.shape[-1], q)


def check_errors(error: Tensor, blocks: tuple[int, int], always: Tensor | None, heads: tuple[int, int]) -> None:
    """Errors of so many blocks, blocks that are listed anyway, and a range of heads."""
    if error.ndim != 4 or not error.is_floating_point() or tuple(error.shape[2:]) != blocks:
        raise KernelInputError(
            f"wanted errors as float [B, H, {blocks[0]}, {blocks[1]}]; got {error.dtype} {tuple(error.shape)}"
        )
    if always is not None and (always.dtype, tuple(always.shape), always.device) != (torch.bool, blocks, error.device):
        raise KernelInputError(
            f"wanted what is always listed as bool {blocks} on {error.device}; got {always.dtype} "
            f"{tuple(always.shape)} on {always.device}"
        )
    if not 0 <= heads[0] < heads[1] <= error.shape[1]:
        raise KernelInputError(f"wanted a range of the {error.shape[1]} heads; got {heads}")


def check_packed(bits: Tensor, rows: int, columns: int) -> None:
    """Bits of so many rows and columns of blocks."""
    if bits.dtype != torch.uint8 or bits.ndim != 4 or tuple(bits.shape[2:]) != (rows, -(-columns // 8)):
        raise KernelInputError(
            f"wanted bits as uint8 [B|1, H, {rows}, {-(-columns // 8)}]; got {bits.dtype} {tuple(bits.shape)}"
        )


def check_boxes(q: Tensor, k: Tensor, boxes: Boxes) -> None:
    """Boxes that belong to these queries and keys."""
    axes = boxes.place.shape[0]
    wanted = (axes, k.shape[2]), (axes, q.shape[2]), (axes, q.shape[2])
    if tuple(tuple(x.shape) for x in boxes) != wanted or any(x.dtype != torch.int32 for x in boxes):
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in boxes)
        raise KernelInputError(f"wanted boxes as int32 [A, {k.shape[2]}] and twice [A, {q.shape[2]}]; got {got}")
    if any(x.device != q.device for x in boxes):
        raise KernelInputError(f"the boxes are on {boxes.place.device}, q on {q.device}; move one of them")


def check_orders(x: Tensor, orders: Tensor, picked: Tensor | None) -> None:
    """Orders of the rows of x, and which of them each head has."""
    if x.ndim != 4 or orders.ndim != 2 or picked is None or picked.ndim != 2:
        got = f"{tuple(x.shape)}, {tuple(orders.shape)} and {None if picked is None else tuple(picked.shape)}"
        raise KernelInputError(f"wanted rows [B, H, N, D], orders [orders, M] and picked [B|1, H|1]; got {got}")
    if any(mine not in (1, size) for mine, size in zip(picked.shape, x.shape[:2], strict=True)):
        raise KernelInputError(f"wanted picked [{x.shape[0]} or 1, {x.shape[1]} or 1]; got {tuple(picked.shape)}")
    if not orders.dtype == picked.dtype == torch.int64 or not x.device == orders.device == picked.device:
        got = ", ".join(f"{y.dtype} on {y.device}" for y in (x, orders, picked))
        raise KernelInputError(f"wanted orders and picked as int64 on the device of the rows; got {got}")


def check_correction(x: Tensor, correction: Correction) -> None:
    """A correction of the rows of x."""
    wide, (rows, dim) = tuple(x.shape[:2]), x.shape[2:]
    rank = 0 if correction.codes is None else correction.codes.shape[-1]
    wanted = {
        "by_output": (*wide, dim, dim),
        "constant": (*wide, 1, dim),
        "codes": (*wide, rows, rank),
        "scale": (*wide, rows, 1),
        "by_code": (*wide, rank, dim),
        "rows": (rows, 1),
    }
    for name, part in correction._asdict().items():
        if part is not None and (tuple(part.shape), part.device) != (wanted[name], x.device):
            got = f"{tuple(part.shape)} on {part.device}"
            raise KernelInputError(f"wanted {name} {wanted[name]} on {x.device} for {tuple(x.shape)}; got {got}")
    by_output, constant, codes, scale, by_code, _ = (part is None for part in correction)
    if by_output != constant or not codes == scale == by_code:
        raise KernelInputError(
            "wanted by_output with constant, and codes with scale and by_code; got only some of them"
        )


def check_fit(
    exact: Tensor, out: Tensor, probes: Tensor, codes: Tensor | None, scale: Tensor | None, basis: Tensor | None
) -> None:
    """Probe rows that belong to this output, and to what was kept."""
    wanted = *out.shape[:2], len(probes), out.shape[3]
    if tuple(exact.shape) != wanted or exact.dtype != out.dtype or probes.dtype != torch.int64 or len(probes) < 2:
        got = f"{exact.dtype} {tuple(exact.shape)} for {probes.dtype} {tuple(probes.shape)}"
        raise KernelInputError(f"wanted exact {wanted} of {out.dtype} for two int64 probes or more; got {got}")
    check_correction(out, Correction(codes=codes, scale=scale, by_code=basis))
