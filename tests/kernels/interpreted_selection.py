"""The kernels of a selection in Triton's interpreter, on the CPU. Run by test_selection.py in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffsparse_kernels import select
from diffsparse_kernels.backend import selftest
from diffsparse_kernels.backend.triton import launch as triton
from diffsparse_kernels.backend.triton import selection
from diffsparse_kernels.case import SELECTION

pytestmark = pytest.mark.usefixtures("poisoned")


def errors_of(shape: tuple[int, ...], world: str) -> Tensor:
    errors = torch.rand(shape).mul(-20).exp2()
    if world == "equal":
        errors = torch.randint(1, 3, shape).float()
    elif world == "odd":
        for strange in (torch.nan, torch.inf, -torch.nan, -1.0, 0.0):
            errors[torch.rand(shape) < 0.1] = strange
    return errors * (world != "nothing")


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    ("world", "shape"),
    [("distinct", (2, 3, 5, 9)), ("equal", (1, 4, 7, 130)), ("odd", (2, 1, 9, 1)), ("nothing", (1, 2, 3, 4))],
)
def test_lists_of_the_largest_errors(
    world: str, shape: tuple[int, ...], share: float, text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bit by bit to those of plain torch, but as wide as they may be; a program has several rows."""
    monkeypatch.setattr(selection, "_MOST_RUNS", 6)
    error, always = errors_of(shape, world), torch.rand(shape[2:]) < 0.2 if text else None
    if always is not None:
        always[0] = True
    heads = (0, shape[1]) if share else (shape[1] // 2, shape[1] // 2 + 1)
    want, got = (made.lists_of_largest(error, share, always, heads) for made in (select, triton))
    assert_lists(got, want)
    assert_lists(triton.lists_of_bits(want[2], shape[3]), select.lists_of_bits(want[2], shape[3]))


def test_lists_of_more_columns_than_a_tile_has() -> None:
    error = errors_of((1, 1, 3, 1100), "equal")
    assert_lists(*(made.lists_of_largest(error, 0.2, None, (0, 1)) for made in (triton, select)))


def assert_lists(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one[..., : other.shape[-1]], other)
        assert not one[..., other.shape[-1] :].any()


def test_a_selection_is_six_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(selection, "_launch", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    error, text, bits = torch.rand(1, 2, 3, 4), torch.zeros(3, 4) > 0, torch.zeros(1, 2, 3, 1, dtype=torch.uint8)
    with Launches() as by_torch:
        triton.lists_of_largest(error, 0.5, text, (0, 2))
    assert by_torch.names == ["zeros"]
    assert launched == ["count_first", "count_second", "count_third", "write_lists", "order_lists"]
    launched.clear()
    with Launches() as by_torch:
        triton.lists_of_bits(bits, 4)
    assert by_torch.names == ["zeros"]
    assert launched == ["unpack_bits", "order_lists"]


class Launches(TorchDispatchMode):
    """The names of torch's operations that a device would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("empty", "split_with_sizes", "view", "detach"):
            self.names.append(name)
        return func(*args, **kwargs or {})


def test_its_trial_passes() -> None:
    for sample in selftest.samples(SELECTION, torch.device("cpu"), long=False):
        assert selftest.examine(SELECTION, triton, sample, 2).problem == ""
