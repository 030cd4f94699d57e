"""Attention processors: adopted by a subclass of their own class, and released as they were."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffsparse.seam.call import Call
from diffsparse.seam.copies import LAYER, ORIGINAL, hide_traces, show_traces
from diffsparse.seam.models import Inputs
from diffsparse.seam.run import Layer
from diffsparse.seam.sdpa import OWN, STAND_IN, replaced
from diffsparse.seam.targets import is_bound

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention, AttentionProcessor

_NATIVE = AttentionBackendName.NATIVE
_BACKEND = "_attention_backend"  # Diffusers' attribute of a processor: the backend that the user has set on it
_PINNED = "_diffsparse_backend"  # ours, while `_BACKEND` is torch's SDPA: whether it was the processor's own, and which
# What `pickle` calls to make an object: of protocol 2 and later, and of the earlier ones.
_MAKE_NEW, _RECONSTRUCT = object().__reduce_ex__(2)[0], object().__reduce_ex__(0)[0]


def adopt(module: Attention, layer: Layer) -> None:
    """Adopt the module's processor for `layer`."""
    module.__dict__[LAYER] = layer
    hide_traces(module)
    renew(module)


def renew(module: Attention) -> None:
    """Adopt the processor of an adopted module if the user has replaced it, and pin its backend to torch's SDPA."""
    processor, layer = module.processor, module.__dict__[LAYER]
    cls: Any = type(processor)
    if is_bound(processor):
        return
    if not hasattr(cls, ORIGINAL):
        processor.__class__ = _adopted_class(cls)
    if not hasattr(processor, _BACKEND):
        return
    state = processor.__dict__
    if state.get(_BACKEND) is not _NATIVE or _PINNED not in state:
        own = _BACKEND in state
        state[_PINNED] = (own, processor._attention_backend)
        state[_BACKEND] = _NATIVE
    layer.dispatches, layer.backend = True, state[_PINNED][1]


def release(module: Attention) -> None:
    """Undo `adopt`."""
    del module.__dict__[LAYER]
    show_traces(module)
    processor = module.processor
    processor.__class__ = getattr(type(processor), ORIGINAL, type(processor))
    _unpin(processor)


def _unpin(processor: AttentionProcessor) -> None:
    """Give the user's backend back."""
    pinned = processor.__dict__.pop(_PINNED, None)
    if pinned is None:
        return
    own, backend = pinned
    del processor.__dict__[_BACKEND]
    if own:
        processor.__dict__[_BACKEND] = backend


@functools.cache
def _adopted_class(cls: type) -> type:
    """A subclass of processor class `cls` that redirects the attention of a module with a layer."""
    namespace = {
        "__call__": _redirecting(cls),
        "__reduce_ex__": _reducing_to(cls),
        "__module__": cls.__module__,
        ORIGINAL: cls,
    }
    adopted = type(f"BlockSparse{cls.__name__}", (cls,), namespace)
    with contextlib.suppress(ValueError):  # step caches look processors up by class, if the class is known
        AttentionProcessorRegistry.register(adopted, AttentionProcessorRegistry.get(cls))
    return adopted


def _redirecting(cls: type) -> Callable[..., object]:
    """`__call__` of an adopted class."""
    original = cls.__call__
    names = list(inspect.signature(original).parameters)[2:]  # after the processor and the attention module

    @functools.wraps(original)  # Attention.forward drops keyword arguments that this signature lacks
    def __call__(self: object, attn: Attention, *args: object, **kwargs: object) -> object:  # noqa: N807
        layer = attn.__dict__.get(LAYER)
        if layer is None:
            return original(self, attn, *args, **kwargs)
        encoder_tokens = _encoder_tokens({**dict(zip(names, args, strict=False)), **kwargs})
        redirect = _Redirect(layer, encoder_tokens)
        out = redirect.run(original, self, attn, *args, **kwargs)
        return layer.report_unseen(out, encoder_tokens) if redirect.number < 0 else out

    return __call__


def _encoder_tokens(inputs: Inputs) -> int | None:
    """How many tokens a processor was given beside those of its queries; None: no such."""
    others = inputs.get("encoder_hidden_states")
    others = others[0] if isinstance(others, tuple) else others  # of an image too
    return None if others is None or others is inputs.get("hidden_states") else others.shape[1]


def _reducing_to(cls: type) -> Callable[..., object]:
    """`__reduce_ex__` of an adopted class: copies and pickles are of the original class, with the user's backend."""

    def __reduce_ex__(self: object, protocol: SupportsIndex) -> object:  # noqa: N807
        plain: Any = object.__new__(cls)
        plain.__dict__.update(self.__dict__)
        _unpin(plain)
        make, args, *rest = plain.__reduce_ex__(protocol)
        if make is _MAKE_NEW:  # pickle refuses it for an object of another class than that of `self`
            make, args = _RECONSTRUCT, (cls, object, None)
        return make, args, *rest

    return __reduce_ex__


class _Redirect(TorchFunctionMode):
    """Sends the attention products of one processor call to its layer. Modes are per thread, and so is this."""

    def __init__(self, layer: Layer, encoder_tokens: int | None) -> None:
        super().__init__()
        self.layer, self.encoder_tokens, self.number = layer, encoder_tokens, -1

    def run(self, processor: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Call `processor`; its attention products are seen even if torch.nn.functional has a function of the user."""
        if F.scaled_dot_product_attention is OWN:
            with self:
                return processor(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler ignores modes for a function that was replaced
            self.theirs = F.scaled_dot_product_attention
            with replaced(self._answer_traced):
                return processor(*args, **kwargs)
        with STAND_IN, self:
            return processor(*args, **kwargs)

    def _answer_traced(self, *args: Any, **kwargs: Any) -> Tensor:
        with replaced(self.theirs):
            return self._answer(*args, **kwargs)

    def _answer(self, *args: Any, **kwargs: Any) -> Tensor:
        self.number += 1
        return self.layer.intercept(Call(*args, **kwargs), self.number, self.encoder_tokens)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Inputs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is OWN or func is STAND_IN:
            return self._answer(*args, **kwargs)
        if func is torch.Tensor.unflatten:  # its super() call is what Dynamo can't inline under a mode
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)
