"""What of a pipeline is adopted: its transformers, and their attention modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch._dynamo import OptimizedModule
from torch.nn import Module

from diffsparse.errors import UnsupportedModelError
from diffsparse.seam.copies import ORIGINAL
from diffsparse.seam.models import LINEAR_ATTENTION, SPECS
from diffsparse.wrappers import class_of, plain_path, unwrapped

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_NAME = "transformer"  # of a transformer that is given without a pipeline: its name in most pipelines
_ATTENTION = (Attention, MochiAttention, AttentionModuleMixin)


def models_of(target: DiffusionPipeline | Module) -> dict[str, Module]:
    """The transformers of a pipeline that can be adopted, by name; or `target` itself, if it is a transformer.

    Wrappers (torch.compile, PEFT, DDP, FSDP) are looked through.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = {name: unwrapped(model) for name, model in entrances_of(target).items()}
    refused = sorted({name for model in found.values() for name in bound_processors(model)})
    found = {name: model for name, model in found.items() if _is_adoptable(model)}
    if not found:
        raise UnsupportedModelError(
            f"{type(target).__name__} holds no transformer whose attention can be made sparse. Wanted: a pipeline with "
            "a `transformer`, or a Diffusers transformer with scaled-dot-product self-attention (Wan, HunyuanVideo, "
            "CogVideoX, LTX, Mochi, Flux, SD3, Qwen-Image and the like); UNets and linear attention are not supported"
            + (f", nor {', '.join(refused)}, which runs on one backend only" if refused else "")
        )
    return found


def controlnets_of(target: DiffusionPipeline | Module) -> dict[str, Module]:
    """The controlnets of a pipeline that are made of transformer blocks, by name; of several each its own."""
    found = ((name, module) for name, module in _controlnets(target) if class_of(module).__name__ in SPECS)
    return {name: module for name, module in found if _is_adoptable(module)}


def entrances_of(target: DiffusionPipeline | Module) -> dict[str, Module]:
    """Where to hook the forward passes of a pipeline's transformers, by name.

    That is torch.compile's wrapper, if there is one: hooks of the model within would be part of its graph.
    """
    if isinstance(target, Module):
        found = {DEFAULT_NAME: target}
    else:
        found = {name: module for name, module in _modules(target).items() if "transformer" in name}
    return {name: x if isinstance(x, OptimizedModule) else unwrapped(x) for name, x in found.items()}


def attentions(model: Module) -> Iterator[tuple[str, Attention]]:
    """The attention modules of a transformer that `apply` adopts, by name, in the order of the model."""
    for name, module in all_attentions(model):
        if not is_bound(module.processor):
            yield plain_path(name), module


def all_attentions(model: Module) -> Iterator[tuple[str, Attention]]:
    """All attention modules of a transformer with softmax attention, by name."""
    cls = class_of(model).__name__
    if cls in LINEAR_ATTENTION or "UNet" in cls:
        return
    for name, module in model.named_modules():
        if isinstance(module, _ATTENTION) and getattr(module, "processor", None) is not None:
            yield name, module


def is_bound(processor: object) -> bool:
    """Whether the processor's class is bound to one backend, and so can't run on torch's SDPA (AnyFlow FAR: flex)."""
    cls = getattr(type(processor), ORIGINAL, type(processor))
    return getattr(cls, "_attention_backend", None) is not None


def bound_processors(model: Module) -> list[str]:
    """Names of the classes of processors that are bound to one backend."""
    processors = (module.processor for _, module in all_attentions(model))
    return sorted({type(processor).__name__ for processor in processors if is_bound(processor)})


def notes_on(target: DiffusionPipeline | Module) -> Iterator[str]:
    """What of a pipeline's attention `apply` doesn't adopt, though a user may expect it."""
    for name, module in _controlnets(target):
        if class_of(module).__name__ not in SPECS and any(all_attentions(module)):
            yield f"{name} ({class_of(module).__name__}) runs dense: the order of its tokens is not known"


def _controlnets(target: DiffusionPipeline | Module) -> Iterator[tuple[str, Module]]:
    for name, module in _modules(target).items() if not isinstance(target, Module) else ():
        if "controlnet" in name:
            module = unwrapped(module)
            nets = getattr(module, "nets", None)
            if nets is None:
                yield name, module
            else:
                yield from ((f"{name}.nets.{place}", unwrapped(net)) for place, net in enumerate(nets))


def _modules(pipe: DiffusionPipeline) -> dict[str, Module]:
    parts = getattr(pipe, "components", None)
    parts = parts if isinstance(parts, dict) else {}
    return {name: part for name, part in parts.items() if isinstance(part, Module)}


def _is_adoptable(model: Module) -> bool:
    """Whether there is anything to adopt; cross-attention beside bound processors doesn't count."""
    names = [type(module.processor).__name__ for _, module in attentions(model)]
    return any("Cross" not in name for name in names) if bound_processors(model) else bool(names)
