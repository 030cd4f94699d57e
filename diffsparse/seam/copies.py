"""Deep copies, pickles and `torch.save` of an adopted module are those of the module without our changes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch.nn import Module

if TYPE_CHECKING:
    from diffusers.hooks import HookRegistry

LAYER = "_diffsparse"  # attribute of an attention module: its layer
ORIGINAL = "_diffsparse_original"  # attribute of an adopted processor's class: the class before
_REDUCE = "__reduce_ex__"  # looked up on the object, by `pickle` and by `copy.deepcopy`
REGISTRY = "_diffusers_hook"
_HOOKS = {"_forward_pre_hooks": ("_with_kwargs",), "_forward_hooks": ("_with_kwargs", "_always_called")}


def registry_of(module: Module) -> HookRegistry | None:
    """The hooks that Diffusers keeps of a module; None if it has none."""
    found: HookRegistry | None = module.__dict__.get(REGISTRY)
    return found


def hide_traces(module: Module) -> None:
    """Make copies of `module` those of an untouched one."""
    module.__dict__[_REDUCE] = _Reduce(module)


def show_traces(module: Module) -> None:
    """Undo `hide_traces`."""
    module.__dict__.pop(_REDUCE, None)


class _Reduce:
    def __init__(self, module: Module) -> None:
        self._module = weakref.ref(module)  # a cycle would keep weights until the collector runs

    def __call__(self, protocol: SupportsIndex) -> object:
        module = self._module()
        reduce: Callable[..., str | tuple[Any, ...]] = type(module).__reduce_ex__
        reduced = reduce(module, protocol)
        if isinstance(reduced, str) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        return (*reduced[:2], _untouched(reduced[2]), *reduced[3:])


def _untouched(state: dict[str, Any]) -> dict[str, Any]:
    """The `__dict__` of a module without our attributes and hooks."""
    state = {name: value for name, value in state.items() if name not in (_REDUCE, LAYER)}
    for name, flags in _HOOKS.items():
        ours = [number for number, hook in state.get(name, {}).items() if _is_ours(getattr(hook, "__self__", hook))]
        for table in (name, *(name + flag for flag in flags)) if ours else ():
            state[table] = type(state[table])((n, x) for n, x in state[table].items() if n not in ours)
    registry = state.get(REGISTRY)
    if registry is not None and any(map(_is_ours, registry.hooks.values())):
        state[REGISTRY] = _theirs(registry)
        if not state[REGISTRY].hooks:
            del state[REGISTRY]
    return state


def _theirs(registry: HookRegistry) -> HookRegistry:
    """A registry with the hooks of others alone."""
    theirs = copy.copy(registry)
    kept = [i for i, name in enumerate(registry._hook_order) if not _is_ours(registry.hooks[name])]
    theirs._hook_order = [registry._hook_order[i] for i in kept]
    theirs._fn_refs = [registry._fn_refs[i] for i in kept]
    theirs.hooks = {name: registry.hooks[name] for name in theirs._hook_order}
    return theirs


def _is_ours(hook: object) -> bool:
    return type(hook).__module__.startswith("diffsparse")
