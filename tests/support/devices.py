"""The CPU as if it were a GPU, to ask which kernel would run; none is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

import diffsparse_kernels as dk
from diffsparse_kernels import ops, registry, trials

aten = torch.ops.aten
_ALLOCATING = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default)


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """Only these backends are there, on a device where each runs and was tried."""
    here = {name: registry.BACKENDS[name]._replace(devices=("cpu",), default=("cpu",)) for name in names}
    monkeypatch.setattr(registry, "BACKENDS", here)
    for name in names:
        if hasattr(registry.load(name), "device_capability"):
            monkeypatch.setattr(registry.load(name), "device_capability", lambda device: None)
    dk.forget_measurements()
    yield
    monkeypatch.undo()
    dk.forget_measurements()


class OnDevice(torch.Tensor):
    """A tensor that lies in the memory of the CPU and says that it is on a CUDA device."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device="cuda:0",
        )
        made.memory = memory
        return made

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def __getitem__(self, key: Any) -> Any:
        found = self.memory[tree_map_only(OnDevice, lambda x: x.memory, key)]
        if any(isinstance(x, torch.Tensor) for x in tree_leaves(key)):
            Launches.now.names.append("index")
        return OnDevice(found)

    def contiguous(self) -> Any:
        return self if self.memory.is_contiguous() else self.clone(memory_format=torch.contiguous_format)

    def __invert__(self) -> Any:
        return self.bitwise_not()

    def float(self) -> Any:
        return self.to(torch.float32)

    def __setitem__(self, key: Any, value: Any) -> None:
        at, value = tree_map_only(OnDevice, lambda x: x.memory, (key, value))
        self.memory[at] = value
        Launches.now.names.append("copy_")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is asked of a device that is not there")


class Launches(TorchDispatchMode):
    """What a CUDA device would be asked to run in this block, which computes on the CPU: names, in order.

    Operations of torch that are neither views nor allocations, copies to and from the device, and kernels, which are
    not run: what they would write is zeros. The ops of diffsparse_kernels are entered.
    """

    now: Launches

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        Launches.now = self
        event = SimpleNamespace(record=lambda: None, query=lambda: True, synchronize=lambda: None)
        for name, stub in {
            "_lazy_init": lambda: None,
            "_exchange_device": lambda number: number,
            "_maybe_exchange_device": lambda number: number,
            "Event": lambda **_: event,
            "is_current_stream_capturing": lambda: False,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "a device that is not there",
        }.items():
            monkeypatch.setattr(torch.cuda, name, stub)
        monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: self.names.append(kernel.__name__))
        monkeypatch.setattr(trials, "verdict", lambda *_: "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "diffsparse_kernels":
            with self:
                return getattr(ops, func._opname)._init_fn(*args, **kwargs)
        there = {id(x.memory): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)}
        args, kwargs = tree_map_only(OnDevice, lambda x: x.memory, (args, kwargs))
        to = kwargs.get("device")
        if to is not None:
            kwargs["device"] = "cpu"
        out = func(*args, **kwargs)
        if not there and (to is None or torch.device(to).type == "cpu"):
            return out
        if func in _ALLOCATING:
            out.zero_()
        elif not func.is_view:
            self.names.append(func._opname)
        if to is not None and torch.device(to).type == "cpu":
            return out
        return tree_map_only(torch.Tensor, lambda x: there[id(x)] if id(x) in there else OnDevice(x), out)
