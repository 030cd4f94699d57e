"""Forward passes of a transformer: their outputs, the name of their guidance branch, and the state of step caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffsparse.seam.copies import registry_of

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook
    from diffusers.hooks.hooks import BaseState, CacheContext
    from diffusers.utils import BaseOutput

    Prediction: TypeAlias = Tensor | tuple[Tensor, ...] | list[Tensor]  # one tensor, or one for each sample
    Output: TypeAlias = Tensor | tuple[Prediction, ...] | BaseOutput  # what a transformer returns
    Context: TypeAlias = CacheContext | str  # a name in Diffusers 0.40, a record with a name later

PERTURBED = "+perturbed"  # appended to the branch of the pass that the extra pass repeats


class Pass(NamedTuple):
    """One forward pass: the model and what it was called with."""

    model: torch.nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def again(self) -> Output:
        """The output of the same call once more."""
        out: Output = self.model(*self.args, **self.kwargs)
        return out


def is_uncond(branch: str) -> bool:
    """Whether a pass that is not in one batch with the conditional one is unconditional: by name, or the second."""
    return branch.startswith(("uncond", "neg")) or (branch.startswith("#") and branch != "#0")


def prediction_of(out: Output) -> Tensor:
    """The prediction [B, ...] of a model's output: a tensor, a tuple's or output class's first, a list of samples."""
    if isinstance(out, Tensor):
        return out
    samples: Prediction = out[0]
    return samples if isinstance(samples, Tensor) else torch.stack(tuple(samples))


def with_prediction(out: Output, prediction: Tensor) -> Output:
    """The same output with another prediction."""
    if torch.is_tensor(out):
        return prediction
    samples: Prediction = out[0]
    value: Prediction = prediction if isinstance(samples, Tensor) else type(samples)(prediction.unbind(0))
    if isinstance(out, dict):
        return type(out)(**{**out, next(iter(out)): value})
    return (value, *out[1:])


def perturbed_name(context: Context) -> Context:
    """The context of the extra pass beside a pass in `context`."""
    if isinstance(context, str):
        return context + PERTURBED
    renamed: Context = replace(context, name=context.name + PERTURBED)
    return renamed


@contextmanager
def own_states(model: torch.nn.Module, states: dict[ModelHook, BaseState]) -> Iterator[None]:
    """Within: step caches that know no contexts (PyramidAttentionBroadcast, FasterCache) work on `states`."""
    plain = list(_plain_caches(model)) if getattr(model, "is_cache_enabled", False) else []
    kept = [hook.state for hook in plain]
    for hook in plain:
        hook.state = states.setdefault(hook, type(hook.state)())
    try:
        yield
    finally:
        for hook, state in zip(plain, kept, strict=True):
            hook.state = state


@contextmanager
def own_contexts(model: Any, contexts: dict[str, object]) -> Iterator[None]:
    """Within: cache-dit, which counts the passes of a transformer, works on `contexts`."""
    manager: Any = getattr(model, "_context_manager", None)
    if not getattr(model, "_is_cached", False) or not hasattr(manager, "_cached_context_manager"):
        yield
        return
    kept, current = manager._cached_context_manager, manager._current_context
    manager._cached_context_manager = contexts
    for name in kept.keys() - contexts.keys():
        settings = kept[name]._init_kwargs
        single = replace(settings["cache_config"], enable_separate_cfg=False)  # all extra passes are of one branch
        manager.new_context(**{**settings, "cache_config": single})
    try:
        yield
    finally:
        manager._cached_context_manager, manager._current_context = kept, current


def _plain_caches(model: torch.nn.Module) -> Iterator[ModelHook]:
    for module in model.modules():
        registry = registry_of(module)
        for hook in registry.hooks.values() if registry is not None else ():
            if hook._is_stateful and hasattr(hook, "state"):
                yield hook
