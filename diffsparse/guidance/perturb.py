"""What a perturbed head does instead of attending (HeadHunter and SoftPAG, arXiv 2506.10978; SEG, arXiv 2408.00760)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from diffsparse.orders.layout import Layout
from diffsparse.seam.call import Call


def perturbed(
    out: Tensor,
    call: Call,
    heads: tuple[int, ...],
    layout: Layout,
    *,
    kind: str,
    strength: float,
    text: bool = False,
    samples: slice = slice(None),
) -> Tensor:
    """Attention whose map is pulled toward a target map: A <- (1 - u) A + u T for the chosen heads (SoftPAG, eq. 5).

    The map itself is never computed: the output is linear in it, so the head's output is pulled toward T V, whichever
    backend computed it. Rows of T are over the same keys as the rows that they replace.

    Args:
        out: the attention's output [B, H, N, D], left as it is.
        call: the product whose output it is, with as many key heads as query heads.
        heads: which heads are perturbed.
        layout: where the video is among the N tokens.
        kind: a key of `KINDS`.
        strength: u in [0, 1].
        text: perturb the rows of text too, and not only those of the video.
        samples: which samples of the batch are perturbed.

    Returns:
        a new tensor [B, H, N, D].
    """
    if not heads:  # all of them on other ranks
        return out
    first, last = (0, layout.tokens) if text else (layout.text_before, layout.text_before + layout.video)
    rows, chosen = slice(first, last), list(heads)
    mask = call.attn_mask
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]  # [B|1, H|1, N|1, N]
        mask = mask[samples] if mask.shape[0] > 1 else mask
        mask = mask[:, chosen] if mask.shape[1] > 1 else mask
    q, k, v = (x[samples][:, chosen] for x in (call.query, call.key, call.value))  # [b, h, N, D]
    part = replace(call, query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0)
    out = out.clone()
    view = out[samples, :, rows]
    view[:, chosen] = torch.lerp(view[:, chosen], KINDS[kind](part, rows, layout).to(out.dtype), strength)
    return out


def _identity(call: Call, rows: slice, layout: Layout) -> Tensor:
    """Each token attends to itself alone: T = I (PAG), T V = V."""
    return call.value[:, :, rows]


def _self(call: Call, rows: slice, layout: Layout) -> Tensor:
    """Each token attends to itself and the text, as in Diffusers' PAG pipelines of joint models."""
    n, first, last = layout.tokens, layout.text_before, layout.text_before + layout.video
    texts = torch.cat((torch.arange(first), torch.arange(last, n))).to(call.query.device)
    q, k, v = call.query[:, :, rows], call.key, call.value
    scores = torch.cat(((q * k[:, :, rows]).sum(-1, keepdim=True), q @ k[:, :, texts].mT), -1)  # [B, H, n, 1 + text]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * (call.scale or q.shape[-1] ** -0.5)
    if call.attn_mask is not None:
        mask = call.attn_mask[..., rows, :] if call.attn_mask.shape[-2] > 1 else call.attn_mask
        if not _is_bool(mask):  # what is added to its own key
            own = mask[..., rows].diagonal(dim1=-2, dim2=-1) if mask.shape[-2] > 1 else mask[..., 0, rows]
            scores[..., 0] += own
        mask = mask[..., texts]
        bias = mask.new_zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, -torch.inf) if _is_bool(mask) else mask
        scores[..., 1:] += bias
    weights = scores.softmax(-1).to(v.dtype)
    return weights[..., :1] * v[:, :, rows] + weights[..., 1:] @ v[:, :, texts]


def _is_bool(mask: Tensor) -> bool:
    return mask.dtype == torch.bool


def _uniform(call: Call, rows: slice, layout: Layout) -> Tensor:
    """All keys have the same weight (SoftUG): a query of zeros gives them equal scores."""
    return _one_row(call, torch.zeros_like(call.query[:, :, :1]), rows)


def _query_mean(call: Call, rows: slice, layout: Layout) -> Tensor:
    """All rows are that of the mean query: SEG with an infinite blur (SoftSEG)."""
    queries = call.query[:, :, rows]
    if layout.asked:  # of the rows that there are
        queries = queries[:, :, layout.asks()[rows].to(queries.device)]
    return _one_row(call, queries.mean(2, keepdim=True), rows)


def _one_row(call: Call, query: Tensor, rows: slice) -> Tensor:
    """Attention of one query [B, H, 1, D] in place of all of `rows`; once for each row if rows have masks."""
    mask = call.attn_mask
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
        query = query.expand(-1, -1, mask.shape[-2], -1)
    return replace(call, query=query, attn_mask=mask).dense(AttentionBackendName.NATIVE)


def _zero(call: Call, rows: slice, layout: Layout) -> Tensor:
    """Zero output."""
    return torch.zeros_like(call.value[:, :, rows])


KINDS: dict[str, Callable[[Call, slice, Layout], Tensor]] = {
    "identity": _identity,
    "self": _self,
    "uniform": _uniform,
    "query-mean": _query_mean,
    "zero": _zero,
}
