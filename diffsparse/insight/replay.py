"""What methods make of recorded attention: the error of their output, the work they count, and what they miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.insight.recording import RecordedCall, Recording
from diffsparse.site.compute import DenseBackend, Site
from diffsparse.site.record import CallRecord
from diffsparse.strategies.base import Strategy, in_order
from diffsparse_kernels import edges
from diffsparse_kernels.masks import is_bias, shown

RANKS = (1, 2, 4, 8, 16)
_LEAST_BLOCKS = 8  # in a row: fewer can't show what a tenth of them gives


class Pair(NamedTuple):
    """Two calls of one layer in consecutive steps: what a method learns at the first is tried at the second.

    Attributes:
        first: the earlier call.
        second: the later one.
    """

    first: RecordedCall
    second: RecordedCall


def pairs(recording: Recording) -> list[Pair]:
    """All pairs of calls in a recording.

    Raises:
        ConfigError: there are none.
    """
    calls = {_place(call): call for call in recording.calls}
    before = ((calls.get(_place(call, earlier=1)), call) for call in recording.calls)
    found = [Pair(first, second) for first, second in before if first is not None]
    if found:
        return found
    steps = ", ".join(map(str, sorted({call.place.step for call in recording.calls})))
    raise ConfigError(
        f"a replay wants a layer recorded at two consecutive steps; got steps {steps or 'none'}. Record pairs, as "
        "`diffsparse inspect --record` does"
    )


def _place(call: RecordedCall, earlier: int = 0) -> tuple[str, str, int, int]:
    """What tells calls apart; of the same layer `earlier` steps before."""
    return call.place.model, call.place.branch, call.place.index, call.place.step - earlier


def check_blocks(pairs: Sequence[Pair], strategies: Sequence[Strategy]) -> None:
    """Raise ConfigError where tokens are too few for the strategies' blocks."""
    tokens = min(pair.second.place.layout.tokens for pair in pairs)
    block = max((max(edges(strategy.block or 1)) for strategy in strategies), default=1)
    if tokens < _LEAST_BLOCKS * block:
        raise ConfigError(
            f"{tokens} tokens are too few for blocks of {block}: a replay wants at least {_LEAST_BLOCKS} blocks in a "
            f"row; record a larger video, or take blocks of {max(tokens // _LEAST_BLOCKS, 1)} or less"
        )


def exact(call: RecordedCall, device: str | torch.device) -> Tensor:
    """Dense attention of a recorded call in float32 [1, H, N, D].

    Args:
        call: the call.
        device: where it runs, and where the result is.
    """
    q, k, v = tensors_of(call, device, torch.float32)
    return _dense(call, q, k, v)


@dataclass(frozen=True, eq=False)
class Attempt:
    """What a strategy made of a recorded call.

    Attributes:
        error: squared distance of its output from the dense one, relative to the dense one's square.
        work: what it computed in this call, in dense passes; what it learned in the step before is not in it.
        fallback: why it ran dense instead; empty if it didn't.
        spectrum: share of the residual's square, dense output less its own, that its first `RANKS` singular directions
            hold: float64 [H, ranks] on the CPU, NaN where nothing is left.
    """

    error: float
    work: float
    fallback: str
    spectrum: Tensor


@torch.no_grad()
def attempt(strategy: Strategy, pair: Pair, dense: Tensor, dtype: torch.dtype) -> Attempt:
    """Let a strategy attend at the second call of a pair; those that learn from a dense step do so at the first.

    Args:
        strategy: what is tried; it starts without a memory.
        pair: the calls.
        dense: `exact` of the second call; its device is where all of it runs.
        dtype: of the q, k, v that the strategy gets.

    Raises:
        DiffsparseError: the strategy can't do such a call.
    """
    memory: dict[str, Any] = {}
    if strategy.observes:
        site = site_of(pair.first, memory, dense.device)
        in_order(strategy, strategy.observe, tensors_of(pair.first, dense.device, dtype), site)
    site = site_of(pair.second, memory, dense.device)
    out = in_order(strategy, strategy.attend, tensors_of(pair.second, dense.device, dtype), site)
    layout, record = pair.second.place.layout, site.record
    dense, out = layout.gathered(dense), layout.gathered(out)
    residual = (dense - out.float())[0]
    error = residual.double().square().sum() / dense.double().square().sum()
    fallback = record.reason if record.kind == "dense" and not record.planned else ""
    return Attempt(float(error), record.work, fallback, spectrum(residual))


def spectrum(residual: Tensor) -> Tensor:
    """Share of the square of each matrix [H, N, D] in its first singular directions: float64 [H, ranks] on the CPU."""
    tall = residual.double()
    energies = torch.linalg.eigvalsh(tall.mT @ tall).flip(-1).clamp(min=0).cpu()
    held: Tensor = energies.cumsum(-1) / energies.sum(-1, keepdim=True)
    return held[:, [min(rank, held.shape[-1]) - 1 for rank in RANKS]]


def tensors_of(call: RecordedCall, device: str | torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, N, D] of a recorded call."""
    return call.q.to(device, dtype), call.k.to(device, dtype), call.v.to(device, dtype)


def _dense(call: RecordedCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by torch, with the scale of the call, over the keys that may be attended to."""
    if call.key_mask is not None:  # one sample: without these keys no mask is wanted, which backends may not take
        kept = shown(call.key_mask[0]).to(k.device)
        k, v = k[:, :, kept], v[:, :, kept]
        if is_bias(call.key_mask):
            bias = call.key_mask[:, None, None].to(k.device, k.dtype)[..., kept]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=call.scale)
    return F.scaled_dot_product_attention(q, k, v, scale=call.scale)


def site_of(call: RecordedCall, memory: dict[str, Any], device: torch.device) -> Site:
    """A site as the run had it. What strategies may keep is for all heads of all layers, of which few are here."""
    place = vars(call.place) | {"layers": call.place.layers * call.all_heads // len(call.heads)}
    return Site(
        **place,
        memory=memory,
        dense_backend=DenseBackend("native", lambda q, k, v: _dense(call, q, k, v)),
        record=CallRecord(call.place.layer, call.place.step, call.place.branch),
        scale=call.scale,
        key_mask=None if call.key_mask is None else call.key_mask.to(device),
    )
