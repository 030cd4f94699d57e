"""The oracle: exact attention in plain torch, on any device, in strips of query rows so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import Boxes, masked
from diffsparse_kernels.strips import joined, strips
from diffsparse_kernels.summaries import MOST_BIAS, StandIns

_STRIP_BYTES = 256 * 2**20  # scores of one strip of query rows
SEES_WHOLE_ROWS = True  # so `attention_with_mass` can do without a cached LSE


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why it can't run on `device`, or compute `case` there; None, for it can all."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out [B, H, N_q, D_v] and LSE [B, H, N_q]."""
    parts = [_softmax(_scores(q[:, :, rows], k, scale, key_mask), v) for rows in _strips(q, k)]
    return joined(parts, q.dtype)


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE, and the block mass against the given LSE, or its own."""
    out, own = attention(q, k, v, scale, key_mask)
    return out, own, block_mass(q, k, own if lse is None else lse, q_block, kv_block, scale, key_mask)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Sum of exp(score - lse) over each tile, [B, H, nQ, nK]; rows whose lse is not finite count for nothing."""
    parts = []
    for rows in _strips(q, k, q_block):
        scores = _scores(q[:, :, rows], k, scale, key_mask)
        cached = lse[:, :, rows, None].to(scores.dtype)
        weights = torch.where(cached.isfinite(), (scores - cached).exp(), 0.0)
        parts.append(tile_sums(weights, q_block, kv_block))
    return torch.cat(parts, 2)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
    stand_ins: StandIns | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, and what stands for the others; a row without any key gets 0 and -inf."""
    mask = lists.to_mask()
    parts = []
    for rows in _strips(q, k, lists.q_block):
        scores = _scores(q[:, :, rows], k, scale, key_mask)
        tokens = lists.to_token_mask(rows, mask)
        tokens = tokens if boxes is None else tokens & boxes.visible(rows)
        scores = scores.masked_fill(~tokens, -torch.inf)
        if stand_ins is None:
            parts.append(_softmax(scores, v))
        else:
            blocks = slice(rows.start // lists.q_block, blocks_of(rows.stop, lists.q_block))
            by = stand_ins.rows(blocks)
            parts.append(_with_stand_ins(scores, q[:, :, rows], v, ~mask[:, :, blocks], lists.q_block, scale, by))
    return joined(parts, q.dtype)


def _with_stand_ins(
    scores: Tensor, q: Tensor, v: Tensor, dropped: Tensor, q_block: int, scale: float, by: StandIns
) -> tuple[Tensor, Tensor]:
    """Softmax over the scores of the keys [B, H, rows, N_kv] and of one more key for each dropped block.

    Args:
        dropped: bool [B|1, H, b, nK], by query block.
        by: with slope and reach of these blocks.
    """
    q, rows = q.to(scores.dtype), q.shape[2]
    theirs = q @ by.key.to(scores.dtype).mT * scale + by.log_count[:, :, None]
    if by.variance is not None:
        theirs = theirs + (q.square().sum(-1, keepdim=True) * by.variance[:, :, None] / 2).clamp(max=MOST_BIAS)
    theirs = theirs.masked_fill(~dropped.repeat_interleave(q_block, 2)[:, :, :rows], -torch.inf)
    values = torch.cat((v.to(scores.dtype), by.value.to(scores.dtype)), 2)
    out, lse = _softmax(torch.cat((scores, theirs), -1), values)
    if by.slope is None:
        return out, lse
    blocks = F.pad(q, (0, 0, 0, -rows % q_block)).unflatten(2, (-1, q_block))
    step = blocks @ by.slope.to(scores.dtype)  # [B, H, b, q_block, D_v]
    if by.reach is not None:
        reach = by.reach[..., None, None]
        length = (step.square().sum(-1, keepdim=True) + reach.square()).sqrt()
        step = step * reach / length.masked_fill(length == 0, 1)
    share = (theirs - lse[..., None]).exp().nan_to_num(0).sum(-1, keepdim=True)
    return out + share * step.flatten(2, 3)[:, :, :rows], lse


def _strips(q: Tensor, k: Tensor, multiple: int = 1) -> Iterator[slice]:
    batch, heads, length, _ = q.shape
    return strips(length, batch * heads * k.shape[2] * 8, _STRIP_BYTES, multiple)


def _scores(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * scale  # [B, H, rows, N_kv]
    return scores if key_mask is None else masked(scores, key_mask)


def _softmax(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill(lse.isneginf()[..., None], 0.0)
    return weights @ v.to(scores.dtype), lse


def tile_sums(weights: Tensor, q_block: int, kv_block: int) -> Tensor:
    """[B, H, rows, N_kv] -> [B, H, ceil(rows / q_block), ceil(N_kv / kv_block)]."""
    rows, columns = weights.shape[2:]
    padded = F.pad(weights, (0, -columns % kv_block, 0, -rows % q_block))
    tiles: Tensor = padded.unflatten(3, (-1, kv_block)).sum(-1)
    sums: Tensor = tiles.unflatten(2, (-1, q_block)).sum(3)
    return sums
