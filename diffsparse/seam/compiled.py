"""The custom ops of a compiled model: what its graph calls in place of the attention.

The ops are opaque to the compiler: grid, step, branch and memory are read in them, when the graph runs. `begun` makes
each op of a forward pass wait for the one that begins it. They stay out of CUDA graphs, where torch can say so: a CUDA
graph would replay one step's answer for ever.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import kept
from diffsparse.seam.call import Call
from diffsparse.seam.geometry import Geometry

P = ParamSpec("P")
R = TypeVar("R")
Place = tuple[Tensor, int, int | None, Tensor]  # handle of the layer, number, encoder tokens, `begun`

_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS = () if _UNSAFE is None else (_UNSAFE,)


class Receiver(Protocol):
    """What the ops call when the graph runs: a layer of an applied transformer."""

    def begin(self, geometry: Geometry) -> None:
        """A forward pass of its model begins."""

    def answer(self, call: Call, number: int, encoder_tokens: int | None) -> Tensor:
        """The attention product `number` of one processor call."""

    def note_unseen(self) -> None:
        """A processor call is over, and none of its attention was seen."""


_NUMBERS = itertools.count()
_RECEIVERS: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()


def register(receiver: Receiver) -> Tensor:
    """A handle of `receiver` for the ops.

    A tensor is an input of a compiled graph where an int would be a constant: one graph serves all layers.
    """
    number = next(_NUMBERS)
    _RECEIVERS[number] = receiver
    return scalar(number)


@kept
def scalar(number: int) -> Tensor:
    """On the CPU and no inference tensor, whatever surrounds the caller: reading it waits for no device."""
    return torch.tensor(number, device="cpu")


def untraced(method: Callable[P, R]) -> Callable[P, R]:
    """A method that torch.compile leaves out of its graphs."""
    found: Callable[P, R] = torch.compiler.disable(method)
    return found


# --- what is traced --------------------------------------------------------------------------------------------------


def begin(handle: Tensor, geometry: Geometry) -> Tensor:
    """`Receiver.begin` when the graph runs; gives `begun`."""
    facts = (geometry.sizes, geometry.tokens, geometry.places, geometry.coordinates, geometry.history)
    more = geometry.text_before, geometry.text_after, geometry.axes, geometry.channels, geometry.parts, geometry.last
    begun: Tensor = torch.ops.diffsparse.begin(handle, *facts, *more)
    return begun


def attend(call: Call, place: Place) -> Tensor:
    """`Receiver.answer` when the graph runs."""
    given = (call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal, call.scale)
    out: Tensor = torch.ops.diffsparse.attend(*given, *place)
    return out


def decline(call: Call, place: Place) -> Tensor:
    """Reports, when the graph runs, a dense product that stands in the graph because autograd records it.

    Gives 0, to be added to the product, so that the op can't be left out.
    """
    zero: Tensor = torch.ops.diffsparse.decline(call.query.detach(), call.key.detach(), *place)
    return zero


def miss(handle: Tensor, begun: Tensor) -> Tensor:
    """`Receiver.note_unseen` when the graph runs; gives 0, as `decline` does."""
    zero: Tensor = torch.ops.diffsparse.miss(handle, begun)
    return zero


# --- what runs -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("diffsparse::begin", mutates_args=(), tags=_TAGS)
def _begin(
    handle: Tensor,
    sizes: list[int],
    tokens: int | None,
    places: list[Tensor],
    coordinates: bool,
    history: int,
    text_before: int,
    text_after: int,
    axes: list[int],
    channels: list[int],
    parts: list[Tensor],
    last: bool,
) -> Tensor:
    _RECEIVERS[int(handle)].begin(
        Geometry(sizes, tokens, places, coordinates, history, text_before, text_after, axes, channels, parts, last)
    )
    return _zero()


@torch.library.custom_op("diffsparse::attend", mutates_args=(), tags=_TAGS)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    handle: Tensor,
    number: int,
    encoder_tokens: int | None,
    begun: Tensor,
) -> Tensor:
    call = Call(q, k, v, mask, dropout, causal, scale, enable_gqa=q.shape[1] != k.shape[1])
    out = _token_major(_RECEIVERS[int(handle)].answer(call, number, encoder_tokens))
    given = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    return out.clone() if out.untyped_storage().data_ptr() in given else out  # an op may not return its arguments


@torch.library.custom_op("diffsparse::decline", mutates_args=(), tags=_TAGS)
def _decline(q: Tensor, k: Tensor, handle: Tensor, number: int, encoder_tokens: int | None, begun: Tensor) -> Tensor:
    out = _RECEIVERS[int(handle)].answer(_Declined(q, k, k), number, encoder_tokens)
    if out is not q:
        raise ConfigError("head guidance of a compiled model wants torch.no_grad(): its graph computes the attention")
    return _zero()


@torch.library.custom_op("diffsparse::miss", mutates_args=(), tags=_TAGS)
def _miss(handle: Tensor, begun: Tensor) -> Tensor:
    _RECEIVERS[int(handle)].note_unseen()
    return _zero()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return _token_major(q.new_empty(*q.shape[:3], v.shape[-1]))


@_begin.register_fake
@_decline.register_fake
@_miss.register_fake
def _(*_: object) -> Tensor:
    return _zero()


class _Declined(Call):
    """A product that a compiled graph computes itself, because autograd records it: only to be reported."""

    needs_grad = True

    def dense(self, backend: object) -> Tensor:
        return self.query


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="cpu")


def _token_major(out: Tensor) -> Tensor:
    """[B, H, N, D] stored as [B, N, H, D]: processors flatten it so next, which then costs them no copy."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
