"""Gluon for Hopper on the CPU: each partition of warps is a thread, and whatever is asynchronous there is here.

Copies arrive late, and their slot holds NaN until then. A matrix product reads its shared memory when it is issued and
again when it is waited for, and both must agree: memory that is not full yet, or given back too early, is noticed. A
copy out of shared memory reads it as late as it may, and what the warps wrote there must have been fenced. A barrier
that is never completed raises instead of hanging.
"""

from __future__ import annotations

import random
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_PATIENCE = 20.0  # seconds


class Barrier:
    """An mbarrier: completes a phase when all have arrived and all expected bytes have come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = self._missing = self._bytes = self._phases = 0

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def arrive(self, arrivals: int = 1, expected: int = 0, came: int = 0) -> None:
        _dawdle()
        with self._changed:
            self._missing -= arrivals
            self._bytes += expected - came
            assert self._missing >= 0, "more arrivals than the barrier was made for"
            if self._missing == 0 and self._bytes == 0:
                self._phases += 1
                self._missing = self._count
                self._changed.notify_all()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity is over."""
        _dawdle()
        with self._changed:
            done = self._changed.wait_for(lambda: self._phases % 2 != int(parity), _PATIENCE)
        if not done:
            raise TimeoutError("deadlock: a barrier was never completed")


class Shared:
    """A view of shared memory, or an array of barriers."""

    def __init__(self, data: Any, dtype: Any) -> None:
        self.data, self.dtype = data, dtype

    def index(self, i: Any) -> Any:
        return self.data[int(i)] if isinstance(self.data, list) else Shared(self.data[int(i)], self.dtype)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape), self.dtype)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order), self.dtype)

    def load(self, layout: Any) -> Tensor:
        assert not self.data.isnan().any(), "read before it had arrived"
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        _under_way.unfenced = True
        self.data.copy_(value)


class Pointer:
    """An address in a flat tensor."""

    def __init__(self, flat: Tensor, at: Any = 0) -> None:
        self.flat, self.at = flat, at
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at + offset)


class Descriptor:
    """What the copy engine needs to know of a tensor."""

    def __init__(self, tensor: Tensor, block: list[int]) -> None:
        size = torch.Size(block).numel() * tensor.element_size()
        self.tensor, self.dtype, self.layout, self.shape = tensor, tensor.dtype, None, tensor.shape
        self.block_type = types.SimpleNamespace(shape=block, nbytes=size)

    def tile(self, place: list[int]) -> Tensor:
        """Zeros beyond the tensor's edges."""
        tile, part = self.tensor.new_zeros(self.block_type.shape), self._inside(place)
        tile[tuple(slice(0, n) for n in part.shape)] = part
        return tile

    def write(self, place: list[int], tile: Tensor) -> None:
        """Nothing beyond the tensor's edges."""
        part = self._inside(place)
        part.copy_(tile[tuple(slice(0, n) for n in part.shape)])

    def _inside(self, place: list[int]) -> Tensor:
        sizes = zip(place, self.block_type.shape, self.tensor.shape, strict=True)
        return self.tensor[tuple(slice(int(p), min(int(p) + n, size)) for p, n, size in sizes)]


class Product:
    """A matrix product under way."""

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool) -> None:
        self._operands = a, b, acc, use_acc
        self._issued, self.result = self._compute(), None

    def _compute(self) -> Tensor:
        a, b, acc, use_acc = self._operands
        left = a.data if isinstance(a, Shared) else a
        return left.float() @ b.data.float() + (acc if use_acc else 0)

    def finish(self) -> None:
        self.result = self._compute()
        assert torch.equal(self._issued, self.result), "an operand changed, or had not arrived"


def _dawdle() -> None:
    if random.random() < 0.3:
        time.sleep(random.random() * 2e-4)


_under_way = threading.local()  # of each partition: its products, its copies out, whether it wrote without a fence


class Hopper:
    """Runs a kernel of `module`, whose functions are taken from their decorators and bound to this machine.

    Stands where the kernel does: `hopper[grid](**arguments)`, with the arguments that a launcher makes.
    """

    def __init__(self, module: types.ModuleType, kernel: str) -> None:
        self._kernel, self._program, self._programs = kernel, 0, 0
        self._names: list[str] = getattr(module, kernel).arg_names
        self._world = {name: getattr(value, "value", value) for name, value in vars(module).items()}  # of constants
        self._world.update(
            gl=self._language(),
            range=_turns,
            tl=types.SimpleNamespace(range=_turns),
            mbarrier=self._barriers(),
            copy_tile=self._copy,
            store_tile=self._copy_out,
            store_wait=self._await_copies,
            warpgroup_mma=self._multiply,
            warpgroup_mma_wait=self._await_products,
            fence_async_shared=self._fence,
        )
        for name, value in vars(module).items():
            if hasattr(value, "is_gluon"):
                code = value.fn.__code__
                self._world[name] = types.FunctionType(code, self._world, name, value.fn.__defaults__)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda **arguments: self._run(grid[0], arguments)

    def _run(self, programs: int, arguments: dict[str, Any]) -> None:
        there = [_there(arguments[name]) for name in self._names]
        self._programs = programs
        for self._program in range(programs):
            self._world[self._kernel](*there)

    def _copy(self, tiles: Descriptor, place: list[int], full: Any, slot: Shared) -> None:
        slot.data.fill_(torch.nan)

        def deliver() -> None:
            time.sleep(random.random() ** 4 * 2e-2)  # some copies are late, and overtaken by others
            slot.data.copy_(tiles.tile(place))
            _barrier(full).arrive(0, came=tiles.block_type.nbytes)

        threading.Thread(target=deliver, daemon=True).start()

    def _copy_out(self, tiles: Descriptor, place: list[int], slot: Shared) -> None:
        assert not getattr(_under_way, "unfenced", False), "the copy engine may not see what was written"

        def deliver() -> None:
            time.sleep(random.random() ** 4 * 2e-2)
            tiles.write(place, slot.data)

        copy = threading.Thread(target=deliver, daemon=True)
        copy.start()
        _queue("copies").append(copy)

    def _await_copies(self, left: int) -> None:
        copies = _queue("copies")
        while len(copies) > left:
            copies.pop(0).join()

    def _fence(self) -> None:
        _under_way.unfenced = False

    def _multiply(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        product = Product(a, b, acc, use_acc)
        _queue("products").append(product)
        return product

    def _await_products(self, left: int, deps: tuple[Product]) -> Tensor:
        products = _queue("products")
        while len(products) > left:
            products.pop(0).finish()
        assert deps[0].result is not None, "read before it was waited for"
        return deps[0].result

    def _partitions(self, work: list[tuple[Callable[..., Any], tuple[Any, ...]]], *_: Any) -> None:
        errors: list[BaseException] = []

        def guarded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
                assert not _queue("copies"), "a copy out of shared memory may outlive it"
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=job, daemon=True) for job in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, TimeoutError)), errors[0])

    def _barriers(self) -> Any:
        return types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=lambda barrier, count: _barrier(barrier).init(count),
            wait=lambda barrier, parity: _barrier(barrier).wait(parity),
            expect=lambda barrier, size: _barrier(barrier).arrive(1, expected=size),
            arrive=lambda barrier, count: _barrier(barrier).arrive(count),
        )

    def _language(self) -> Any:
        return types.SimpleNamespace(
            constexpr=lambda x: x,
            int32=torch.int32,
            int64=torch.int64,
            float32=torch.float32,
            NVMMADistributedLayout=lambda *_: None,
            DotOperandLayout=lambda *_: None,
            SliceLayout=lambda *_: None,
            BlockedLayout=lambda *_: None,
            static_range=range,
            program_id=lambda axis: torch.tensor(self._program),
            num_programs=lambda axis: torch.tensor(self._programs),
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.amax(axis),
            min=lambda x, axis: x.amin(axis),
            sum=lambda x, axis: x.sum(axis),
            abs=torch.abs,
            exp2=torch.exp2,
            log2=torch.log2,
            rsqrt=torch.rsqrt,
            where=torch.where,
            convert_layout=lambda x, layout: x,
            zeros_like=torch.zeros_like,
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            arange=lambda start, end, layout: torch.arange(start, end),
            allocate_shared_memory=_allocate,
            load=_load,
            store=_store,
            warp_specialize=self._partitions,
        )


def _turns(*bounds: Any, disable_licm: bool = False) -> Iterator[Tensor]:
    """Numbers of the machine's, not of the compiler's."""
    return map(torch.tensor, range(*bounds))


def _there(value: Any) -> Any:
    """A launcher's argument as the kernel sees it."""
    if isinstance(value, TensorDescriptor):
        return Descriptor(value.base, value.block_shape)
    return Pointer(value.view(-1)) if isinstance(value, Tensor) else value


def _queue(of: str) -> list[Any]:
    """What this partition has under way."""
    queue: list[Any] = _under_way.__dict__.setdefault(of, [])
    return queue


def _barrier(place: Any) -> Barrier:
    """One barrier, whether it was allocated alone or in a ring."""
    return place if isinstance(place, Barrier) else place.data[0]  # type: ignore[no-any-return]


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    if layout == "barriers":
        return Shared([Barrier() for _ in range(shape[0])], dtype)
    return Shared(torch.full(shape, torch.nan, dtype=dtype), dtype)


def _load(pointer: Pointer, mask: Tensor | None = None, other: Any = None) -> Tensor:
    """Nothing is read where the mask is False; what is read lies within the tensor."""
    at = torch.as_tensor(pointer.at)
    read = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
    assert ((at >= 0) & (at < pointer.flat.numel()))[read].all(), "read out of bounds"
    found = torch.full(at.shape, 0 if other is None else other, dtype=pointer.flat.dtype)
    found[read] = pointer.flat[at[read]]
    return found


def _store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    at = torch.as_tensor(pointer.at).expand(value.shape)
    written = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(value.shape)
    assert ((at >= 0) & (at < pointer.flat.numel()))[written].all(), "written out of bounds"
    pointer.flat[at[written]] = value[written]
