"""The public functions: check the arguments once, choose a backend, call one custom op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffsparse_kernels import ops
from diffsparse_kernels.case import DENSE_BLOCKS, Case
from diffsparse_kernels.errors import BackendError, KernelInputError
from diffsparse_kernels.lists import BlockLists, Boxes
from diffsparse_kernels.masks import by_head
from diffsparse_kernels.measured import density_limit, device_name
from diffsparse_kernels.registry import BACKENDS, Choice, check_known, choose

_PRECISIONS = ("int8", "int8-int8", "int8-fp8", "fp8")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention that also returns its log-sum-exp.

    Args:
        q: [B, H, N_q, D]; k: [B, H, N_kv, D]; v: [B, H, N_kv, D_v]. float32, bfloat16, float16 or float64; any strides.
        scale: of the scores, 1/sqrt(D) by default.
        key_mask: bool [B, N_kv] or [B, H, N_kv], True where a key may be attended to.
        backend: by name; chosen by the device if None.

    Returns:
        out [B, H, N_q, D_v] of q's dtype, and the natural-log LSE of the scaled scores, float32 (float64 for float64
        inputs) [B, H, N_q]. A query without any key gets 0 and -inf.

    Raises:
        KernelInputError: shapes, dtypes or devices that don't fit. BackendError: a backend that can't run here.
    """
    _check(q, k, v, key_mask)
    if key_mask is not None and key_mask.ndim == 3:
        return by_head(attention, (q, k, v), key_mask, scale=scale, backend=backend)  # type: ignore[no-any-return]
    out, lse = ops.attention(q, k, v, _scale(q, scale), key_mask, _choose(q, backend))
    return out, lse


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_cached: Tensor | None = None,
    *,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention`, and in the same pass `block_mass` against `lse_cached` -> out, lse, mass.

    Without `lse_cached` the mass is that of the call's own LSE: one pass on the CPU, elsewhere two.
    """
    _check(q, k, v, key_mask)
    if lse_cached is not None:
        _check_lse(q, lse_cached)
    _check_blocks(q_block, kv_block)
    if key_mask is not None and key_mask.ndim == 3:
        tensors = (q, k, v) if lse_cached is None else (q, k, v, lse_cached)
        blocks: dict[str, Any] = {"q_block": q_block, "kv_block": kv_block, "scale": scale, "backend": backend}
        return by_head(attention_with_mass, tensors, key_mask, **blocks)  # type: ignore[no-any-return]
    out, lse, mass = ops.attention_with_mass(
        q, k, v, lse_cached, q_block, kv_block, _scale(q, scale), key_mask, _choose(q, backend)
    )
    return out, lse, mass


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    q_block: int,
    kv_block: int,
    every: int = 1,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax weight in each tile: mass[p, q] = sum of exp(score - lse_row) over rows of p and keys of q.

    With the call's own LSE the rows of tokens sum to 1; with that of an earlier step each is scaled by its drift
    (AdaSpa, arXiv 2502.21079, Eq. 4). Rows whose lse is not finite count for nothing.

    Of each block only one row in `every` is computed, and stands for those that follow it: an estimate at that part
    of the cost. The rows that are computed are exact.

    Args:
        q: [B, H, N_q, D]; k: [B, H, N_kv, D]; lse: [B, H, N_q].
        q_block, kv_block: edges of a tile in tokens.
        every: a divisor of q_block.
        scale, key_mask, backend: as in `attention`.

    Returns:
        float32 (float64 for float64 inputs) [B, H, nQ, nK].
    """
    _check(q, k, k, key_mask)
    _check_lse(q, lse)
    _check_blocks(q_block, kv_block)
    if every < 1 or q_block % every:
        raise KernelInputError(f"wanted every as a divisor of q_block {q_block}; got {every}")
    if key_mask is not None and key_mask.ndim == 3:
        blocks: dict[str, Any] = {"q_block": q_block, "kv_block": kv_block, "every": every, "backend": backend}
        return by_head(block_mass, (q, k, lse), key_mask, scale=scale, **blocks)  # type: ignore[no-any-return]
    # Blocks begin at multiples of `every`, so a strided view holds the same rows of each.
    rows, arguments = slice(None, None, every), (kv_block, _scale(q, scale), key_mask, _choose(q, backend))
    mass: Tensor = ops.block_mass(q[:, :, rows], k, lse[:, :, rows], q_block // every, *arguments)
    return mass if every == 1 else mass * _rows_per_sample(q.shape[2], q_block, every, mass)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    boxes: Boxes | None = None,
    means: bool = False,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks only; the others count as -inf before the softmax.

    Args and returns as in `attention`, and
        boxes: hide keys within the listed blocks.
        means: let each dropped block stand in the same softmax as its mean key and mean value, weighted by its number
            of keys: n * exp(q . mean key * scale). Costs about 1 / kv_block of dense attention. Keys that boxes hide
            in listed blocks stay hidden.
        precision: None for the inputs' own, or eight bits on the triton backend: "int8" (scores), "int8-int8",
            "int8-fp8" (scores, weighted values) or "fp8"; `eight_bits` says what each costs. Without boxes and means.

    The LSE is that of all that was seen, so parts computed apart can be merged. A query that sees nothing gets 0 and
    -inf.
    """
    _check(q, k, v, key_mask)
    _check_lists(q, k, lists)
    if key_mask is not None and key_mask.ndim == 3:
        knobs: dict[str, Any] = {"boxes": boxes, "means": means, "precision": precision, "backend": backend}
        apart = lists.by_head(q.shape[0])
        return by_head(  # type: ignore[no-any-return]
            block_sparse_attention, (q, k, v), key_mask, lists=apart, scale=scale, **knobs
        )
    parts = lists.idx, lists.cnt, lists.order, lists.q_block, lists.kv_block
    if precision is not None:
        _check_precision(q, precision, boxes, means, backend)
        out, lse = ops.eight_bit_attention(q, k, v, *parts, _scale(q, scale), key_mask, precision)
        return out, lse
    if boxes is not None:
        _check_boxes(q, k, boxes)
    rest = _scale(q, scale), key_mask, *(boxes or (None,) * 3), means, _choose(q, backend)
    out, lse = ops.block_sparse_attention(q, k, v, *parts, *rest)
    return out, lse


def kernel_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists | None = None,
    *,
    key_mask: Tensor | None = None,
    boxes: Boxes | None = None,
) -> Choice:
    """The backend whose kernel computes this very call, and those that were passed over for it, with their reasons.

    Raises:
        NoKernelError: no kernel of the device can do it.
    """
    blocks = DENSE_BLOCKS if lists is None else (lists.q_block, lists.kv_block)
    return choose(Case.of("attend", q, k, v, blocks, key_mask, boxes), q.device)


def break_even(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int, tokens: int, masked: bool = False
) -> float:
    """Density above which dense attention is faster than block-sparse attention of `block` tokens.

    As `diffsparse doctor --measure` found it on this device, else a cautious default.
    """
    case = Case("attend", dtype, head_dim, head_dim, block, block, masked)
    return density_limit(choose(case, device).name, device_name(device), dtype, head_dim, block, tokens)


def default_block() -> int:
    """Edge of a block in tokens that suits this machine: 128 where there is a CUDA device, 64 where there is none.

    The fastest GPU kernels take blocks of 128 queries alone; smaller ones reload keys and values twice as often.
    """
    return 128 if torch.cuda.is_available() else 64


def _choose(q: Tensor, name: str | None) -> str:
    """A name that is known, or an empty one; whether it can do this is asked inside the op, where no compiler looks."""
    if name is None:
        return ""
    check_known(name)
    if q.device.type not in BACKENDS[name].devices:
        kinds = ", ".join(BACKENDS[name].devices)
        raise BackendError(f"backend {name!r} runs on {kinds}; got tensors on {q.device}")
    return name


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _rows_per_sample(length: int, block: int, every: int, like: Tensor) -> Tensor:
    """Rows of each block over the rows computed of it, [nQ, 1]; the last block may be ragged."""
    share = like.new_full((like.shape[2], 1), every)
    left = length - (like.shape[2] - 1) * block
    share[-1] = left / -(-left // every)
    return share


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
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
    batch, heads, keys = k.shape[:3]
    if key_mask is not None and (
        key_mask.dtype != torch.bool or key_mask.shape not in ((batch, keys), (batch, heads, keys))
    ):
        raise KernelInputError(
            f"wanted key_mask bool [{batch}, {keys}] or [{batch}, {heads}, {keys}]; "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )


def _check_lse(q: Tensor, lse: Tensor) -> None:
    if lse.shape != q.shape[:3]:
        raise KernelInputError(f"wanted lse {tuple(q.shape[:3])}; got {tuple(lse.shape)}")


def _check_blocks(q_block: int, kv_block: int) -> None:
    if min(q_block, kv_block) < 1:
        raise KernelInputError(f"wanted blocks of at least 1 token; got {q_block} and {kv_block}")


def _check_lists(q: Tensor, k: Tensor, lists: BlockLists) -> None:
    if (lists.q_len, lists.kv_len) != (q.shape[2], k.shape[2]):
        raise KernelInputError(
            f"the lists are for {lists.q_len} queries and {lists.kv_len} keys; got {q.shape[2]} and {k.shape[2]}. "
            "Build them anew for this length"
        )
    if lists.cnt.shape[0] not in (1, q.shape[0]) or lists.cnt.shape[1] != q.shape[1]:
        raise KernelInputError(f"wanted lists [{q.shape[0]} or 1, {q.shape[1]}, nQ, W]; got {tuple(lists.idx.shape)}")
    if lists.idx.device != q.device:
        raise KernelInputError(f"the lists are on {lists.idx.device}, q on {q.device}; move one of them")


def _check_precision(q: Tensor, precision: str, boxes: Boxes | None, means: bool, backend: str | None) -> None:
    if precision not in _PRECISIONS:
        raise KernelInputError(f"wanted precision as one of {', '.join(_PRECISIONS)}, or None; got {precision!r}")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise KernelInputError(f"precision {precision!r} wants bfloat16 or float16 inputs; got {q.dtype}")
    if boxes is not None or means:
        raise KernelInputError(f"precision {precision!r} takes no boxes and no means; got some. Leave one of them away")
    if backend not in (None, "triton"):
        raise BackendError(f"precision {precision!r} wants the triton backend; got {backend!r}")


def _check_boxes(q: Tensor, k: Tensor, boxes: Boxes) -> None:
    axes = boxes.place.shape[0]
    wanted = (axes, k.shape[2]), (axes, q.shape[2]), (axes, q.shape[2])
    if tuple(tuple(x.shape) for x in boxes) != wanted or any(x.dtype != torch.int32 for x in boxes):
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in boxes)
        raise KernelInputError(f"wanted boxes as int32 [A, {k.shape[2]}] and twice [A, {q.shape[2]}]; got {got}")
    if any(x.device != q.device for x in boxes):
        raise KernelInputError(f"the boxes are on {boxes.place.device}, q on {q.device}; move one of them")
