"""One attention product as a model's processor asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from diffsparse.orders.layout import Layout

# Computed at import: some releases of torch can't trace the call.
_AUTOCAST = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


@dataclass(frozen=True)
class Call:
    """The arguments of one `scaled_dot_product_attention`: [B, H, N, D], fewer key heads if `enable_gqa`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def needs_grad(self) -> bool:
        """Whether autograd records this product."""
        watched = self.query.requires_grad or self.key.requires_grad or self.value.requires_grad
        return watched and torch.is_grad_enabled()

    @property
    def obstacle(self) -> str | None:
        """What forbids a sparse kernel, apart from the mask; None if nothing does."""
        if not self.query.dtype == self.key.dtype == self.value.dtype:
            return "queries, keys and values of different dtypes"
        if self.needs_grad:
            return "gradients are wanted"
        if self.is_causal:
            return "causal attention"
        return "dropout" if self.dropout_p else None

    def cast(self) -> Call:
        """The same product in the dtype of a surrounding `torch.autocast`, as SDPA itself would take it."""
        device = self.query.device.type
        if not autocasts(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (_cast(x, dtype) for x in (self.query, self.key, self.value))
        mask = None if self.attn_mask is None else _cast(self.attn_mask, dtype)
        return replace(self, query=query, key=key, value=value, attn_mask=mask)

    def ungrouped(self) -> Call:
        """The same product with as many key and value heads as query heads."""
        groups = self.query.shape[1] // self.key.shape[1]
        if groups == 1:
            return self
        key, value = (x.repeat_interleave(groups, 1) for x in (self.key, self.value))
        return replace(self, key=key, value=value, enable_gqa=False)

    def of_all(self, layout: Layout) -> Call | None:
        """The same product as one of all tokens with themselves, if queries are of a part of these.

        None if the mask doesn't allow it: its rows are those of the queries that are there.
        """
        mask = None if self.attn_mask is None else unexpanded(self.attn_mask)
        if mask is not None and mask.shape[2] != 1:
            return None
        rest = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Widened(**rest | {"query": layout.scattered(self.query), "attn_mask": mask}, layout=layout)

    def dense(self, backend: AttentionBackendName) -> Tensor:
        """The product on one of Diffusers' backends; NATIVE is torch's SDPA, or what the user put in its place.

        That may be a function with fewer arguments: it gets those alone that differ from their defaults.
        """
        if backend is AttentionBackendName.NATIVE:
            known: dict[str, object] = {"attn_mask": self.attn_mask, "dropout_p": self.dropout_p or None}
            known |= {"scale": self.scale, "is_causal": self.is_causal or None, "enable_gqa": self.enable_gqa or None}
            given = {name: value for name, value in known.items() if value is not None}
            product: Callable[..., Tensor] = F.scaled_dot_product_attention
            return product(self.query, self.key, self.value, **given)
        q, k, v = (x.transpose(1, 2) for x in (self.query, self.key, self.value))  # [B, N, H, D]
        rest = (self.attn_mask, self.dropout_p, self.is_causal, self.scale, self.enable_gqa)
        out: Tensor = dispatch_attention_fn(q, k, v, *rest, backend=backend)
        return out.transpose(1, 2)


@dataclass(frozen=True)
class _Widened(Call):
    """A product that has rows of zeros for the queries that are not there: dense attention leaves them out."""

    layout: Layout = field(kw_only=True)

    def dense(self, backend: AttentionBackendName) -> Tensor:
        if self.query.shape[2] != self.layout.tokens:  # of some rows
            return super().dense(backend)
        part = {field.name: getattr(self, field.name) for field in fields(Call)}
        out = Call(**part | {"query": self.layout.gathered(self.query)}).dense(backend)
        return self.layout.scattered(out)


def autocasts(device: str) -> bool:
    """Whether `torch.autocast` is on for this kind of device."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def unexpanded(mask: Tensor) -> Tensor:
    """A mask as [B|1, H|1, N|1, N]: without the repetitions that `expand` made."""
    mask = mask[(None,) * (4 - mask.ndim)]
    heads, rows = (slice(None) if mask.stride(axis) else slice(1) for axis in (1, 2))
    return mask[:, heads, rows]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast converts floating-point numbers of any precision but double."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
