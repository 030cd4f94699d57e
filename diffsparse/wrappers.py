"""Transformers inside other modules, and what modules call their parts.

torch.compile's, PEFT's, DDP's and FSDP's wrappers are looked through.
"""

from __future__ import annotations

from diffusers import ModelMixin
from torch.nn import Module

_CHILDREN = ("_orig_mod", "module", "_fsdp_wrapped_module", "base_model", "model")  # what wrappers call their one
_STEPS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # within a model: of wrapped blocks
HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads")  # how attention modules call the number of theirs


def heads_of(attention: Module | None) -> int | None:
    """How many heads an attention module's queries have; None if it doesn't say."""
    counts = (getattr(attention, name, None) for name in HEADS)
    return next((count for count in counts if type(count) is int), None)


def unwrapped(module: Module) -> Module:
    """The Diffusers model that `module` wraps; `module` itself if it wraps none."""
    inner: Module | None = module
    while inner is not None and not isinstance(inner, ModelMixin):
        children = (inner._modules.get(name) for name in _CHILDREN)
        inner = next((child for child in children if child is not None), None)
    return module if inner is None else inner


def class_of(model: Module) -> type[Module]:
    """The class as it was written: `fully_shard` gives a model a subclass of its own."""
    names = ((cls, {base.__name__ for base in cls.__mro__}) for cls in type(model).__mro__)
    return next(cls for cls, bases in names if "FSDPModule" not in bases)


def plain_path(path: str) -> str:
    """The name of a submodule without the wrappers on its way, such as compiled blocks."""
    return ".".join(step for step in path.split(".") if step not in _STEPS)
