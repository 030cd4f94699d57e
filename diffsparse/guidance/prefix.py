"""Blocks ahead of the first perturbed one repeat in the extra pass what they did in the pass before: skip them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from diffsparse.seam.caches import is_cached
from diffsparse.seam.copies import hide_traces, registry_of, show_traces


class Prefix:
    """Records the blocks of one transformer in a normal pass, and skips them in the extra pass.

    Every block that ran before the first perturbed one returns, when it is called, the output of the last of its
    stack; the model's own code carries that to the first perturbed block, which gets bit for bit the same input as
    before. That holds for a plain chain: outputs that are kept for later (skip connections, hints, step caches) or
    changed in place are noticed, and the extra pass then runs whole.

    Attributes:
        blocks: of all stacks, by name.
        obstacle: why the last pass can't be replayed; empty if it can.
        skipped: names of the blocks that will be skipped.
    """

    def __init__(self, model: torch.nn.Module, layers: Iterable[str]) -> None:
        stacks = {n: x for n, x in model.named_children() if isinstance(x, torch.nn.ModuleList)}
        self.blocks = {f"{stack}.{i}": block for stack, blocks in stacks.items() for i, block in enumerate(blocks)}
        self._first = {name for name in self.blocks if any(layer.startswith(f"{name}.") for layer in layers)}
        self._model = weakref.ref(model)
        self.recording = False
        self._hooks = [hook for name, block in self.blocks.items() for hook in self._watch(name, block)]
        for block in self.blocks.values():
            hide_traces(block)
        self._forget()

    def _watch(self, name: str, block: torch.nn.Module) -> list[RemovableHandle]:
        before, after = _Hook(self, "_enter", name), _Hook(self, "_leave", name)
        return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    def unhook(self) -> None:
        """Take all hooks off."""
        self._take_hooks()
        for block in self.blocks.values():
            show_traces(block)
        self._forget()

    def _take_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _forget(self) -> None:
        self.obstacle = "no block was seen to run"
        self.skipped: list[str] = []
        self._outputs: dict[str, object] = {}
        self._versions: dict[str, list[int]] = {}
        self._passed: list[weakref.ref[Tensor]] = []

    def begin(self) -> None:
        """A pass that may be replayed begins."""
        self._forget()
        self.recording = False
        model = self._model()
        if is_cached(model):
            self.obstacle = "a step cache is on"
        elif torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            self.obstacle = "only passes under torch.no_grad can be replayed"
        elif any(block._compiled_call_impl is not None for block in self.blocks.values()):
            self.obstacle = "blocks are compiled"
            self._take_hooks()  # each would have its own graph
        elif _offloads_by_group(model):
            self.obstacle = "group offloading fetches blocks in a fixed order"
        else:
            self.recording = True

    def end(self) -> None:
        """The pass is over: keep nothing of it."""
        self.recording, self._outputs, self._passed = False, {}, []

    def _enter(self, name: str) -> None:
        """The first perturbed block is about to run: all that it depends on is known now."""
        if self.recording and name in self._first:
            self.recording = False
            self.obstacle = "" if self.skipped else "the first block is perturbed"
            kept = {id(x) for out in self._outputs.values() for x in _tensors(out)}
            alive = [x for ref in self._passed if (x := ref()) is not None and id(x) not in kept]
            if alive:
                self.obstacle = "outputs of earlier blocks are used again later"

    def _leave(self, name: str, out: object) -> None:
        if not self.recording:
            return
        stack = name.rpartition(".")[0]
        if name in self.skipped:
            self._give_up("a block runs more than once")
        elif not self._untouched(stack):
            self._give_up("outputs of blocks are changed in place")
        else:
            self._passed += [weakref.ref(x) for x in _tensors(self._outputs.get(stack))]
            self.skipped.append(name)
            self._outputs[stack] = out
            self._versions[stack] = [x._version for x in _tensors(out)]

    def _give_up(self, reason: str) -> None:
        self._forget()
        self.recording, self.obstacle = False, reason

    def _untouched(self, stack: str) -> bool:
        return [x._version for x in _tensors(self._outputs.get(stack))] == self._versions.get(stack, [])

    @contextmanager
    def replayed(self) -> Iterator[int]:
        """Within: blocks are skipped, where they can be. Gives how many of them are."""
        if not self.obstacle and not all(map(self._untouched, self._outputs)):
            self.obstacle = "outputs of blocks are changed in place"
        skipped = [] if self.obstacle else self.skipped
        with ExitStack() as stack:
            for name in skipped:
                stack.enter_context(_answering(self.blocks[name], self._outputs[name.rpartition(".")[0]]))
            yield len(skipped)


class _Hook:
    """A forward hook of one block; no closure, which would keep outputs alive."""

    def __init__(self, prefix: Prefix, method: str, name: str) -> None:
        self.prefix, self.method, self.name = prefix, method, name

    def __call__(self, block: torch.nn.Module, args: object, *out: object) -> None:
        if self.prefix.recording and not torch.compiler.is_compiling():
            getattr(self.prefix, self.method)(self.name, *out)


def _offloads_by_group(model: torch.nn.Module | None) -> bool:
    modules = () if model is None else model.modules()
    registries = map(registry_of, modules)
    return any("group_offloading" in registry.hooks for registry in registries if registry is not None)


def _tensors(out: object) -> list[Tensor]:
    parts = out if isinstance(out, tuple | list) else (out,)
    return [x for x in parts if torch.is_tensor(x)]


@contextmanager
def _answering(block: torch.nn.Module, answer: object) -> Iterator[None]:
    """Within: `block` returns `answer` whatever it is given."""
    state = block.__dict__
    own = state.get("forward")
    state["forward"] = functools.partial(_answer, answer)
    try:
        yield
    finally:
        del state["forward"]
        if own is not None:
            state["forward"] = own


def _answer(answer: object, *_: object, **__: object) -> object:
    return answer
