"""Arguments, backends, custom ops, compilation."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import BackendError, KernelInputError, ops
from support.cases import Size, random_boxes

SHAPE = (1, 2, 48, 16)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(SHAPE).to(dtype) for _ in range(3))  # type: ignore[return-value]


def lists() -> dk.BlockLists:
    mask = torch.rand(1, 2, 3, 3) < 0.6
    return dk.BlockLists.from_mask(mask, q_block=16, kv_block=16, q_len=48, kv_len=48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_ops_obey_the_rules_of_custom_ops(dtype: torch.dtype, masked: bool) -> None:
    q, k, v = qkv(dtype)
    keys = torch.rand(1, 48) < 0.8 if masked else None
    lse, blocks = torch.randn(1, 2, 48), lists()
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    check(ops.attention, (q, k, v, 0.25, keys, "cpu"), test_utils=tests)
    check(ops.attention_with_mass, (q, k, v, lse, 16, 16, 0.25, keys, "cpu"), test_utils=tests)
    check(ops.block_mass, (q, k, lse, 16, 16, 0.25, keys, "cpu"), test_utils=tests)
    boxes = random_boxes(Size(q_len=48, kv_len=48)) if masked else (None,) * 3
    arguments = (q, k, v, blocks.idx, blocks.cnt, blocks.ordered().order, 16, 16, 0.25, keys, *boxes, "cpu")
    check(ops.block_sparse_attention, arguments, test_utils=tests)


def test_fullgraph_compile_gives_the_eager_result() -> None:
    blocks = lists()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, lse = dk.attention(q, k, v)
        mass = dk.block_mass(q, k, lse, q_block=16, kv_block=16)
        return dk.block_sparse_attention(q, k, v, blocks)[0] * mass.sum()

    inputs = qkv()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


BAD: dict[str, tuple[Any, str]] = {
    "three axes": (lambda q, k, v: dk.attention(q[0], k[0], v[0]), r"wanted q, k, v as \[B, H, N, D\]"),
    "grouped heads": (lambda q, k, v: dk.attention(q, k[:, :1], v[:, :1]), "Expand grouped key heads"),
    "mixed formats": (lambda q, k, v: dk.attention(q, k.half(), v), "one float dtype"),
    "integers": (lambda q, k, v: dk.attention(q.int(), k.int(), v.int()), "one float dtype"),
    "zero heads": (lambda q, k, v: dk.attention(q[:, :0], k[:, :0], v[:, :0]), "at least one sample, head"),
    "key mask": (lambda q, k, v: dk.attention(q, k, v, key_mask=torch.ones(1, 47) > 0), "wanted key_mask"),
    "lse": (lambda q, k, v: dk.block_mass(q, k, torch.zeros(1, 2, 47), q_block=16, kv_block=16), "wanted lse"),
    "block": (lambda q, k, v: dk.block_mass(q, k, torch.zeros(1, 2, 48), q_block=0, kv_block=16), "at least 1 token"),
    "length": (lambda q, k, v: dk.block_sparse_attention(q[:, :, 1:], k, v, lists()), "the lists are for 48"),
    "heads": (
        lambda q, k, v: dk.block_sparse_attention(*(x.repeat(1, 2, 1, 1) for x in (q, k, v)), lists=lists()),
        "wanted lists",
    ),
    "device": (lambda q, k, v: dk.attention(q, k.to("meta"), v), "on one device"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(KernelInputError, match=message):
        call(*qkv())


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dk.backends()["cpu"] == dk.backends()["reference"] == "available"
    assert dk.backend_for(torch.device("cpu")) == "cpu"
    with pytest.raises(BackendError, match="no backend is called 'fast'"):
        dk.attention(*qkv(), backend="fast")
    with pytest.raises(BackendError, match="runs on cpu; got tensors on meta"):
        dk.attention(*(x.to("meta") for x in qkv()), backend="cpu")
    with pytest.raises(BackendError, match="no backend runs on 'vulkan'"):
        dk.backend_for(torch.device("vulkan"))
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "reference")
    assert dk.backend_for(torch.device("cpu")) == "reference"


def test_break_even_is_a_density() -> None:
    cpu = torch.device("cpu")
    assert 0 < dk.break_even(cpu, torch.float32, 64, 64) <= 1


def test_a_strange_name_is_told() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dk.nothing  # noqa: B018
    assert set(dk.__all__) <= set(dir(dk))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, diffsparse_kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
