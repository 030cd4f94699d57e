"""Arguments, backends, custom ops, compilation."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import platformdirs
import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import (
    BackendError,
    KernelInputError,
    NoKernelError,
    machine,
    masks,
    measured,
    ops,
    registry,
    trials,
)
from diffsparse_kernels.case import Case, Kind
from diffsparse_kernels.machine import device_name
from support.cases import Size, random_boxes

SHAPE = (1, 2, 48, 16)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dk.forget_measurements()
    yield
    dk.forget_measurements()


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(SHAPE).to(dtype) for _ in range(3))  # type: ignore[return-value]


def lists() -> dk.BlockLists:
    mask = torch.rand(1, 2, 3, 3) < 0.6
    return dk.BlockLists.from_mask(mask, q_block=16, kv_block=16, q_len=48, kv_len=48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", ["not", "bool", "bias"])
def test_ops_obey_the_rules_of_custom_ops(dtype: torch.dtype, masked: str) -> None:
    q, k, v = qkv(dtype)
    keys = {"not": None, "bool": torch.rand(1, 48) < 0.8, "bias": torch.randn(1, 48)}[masked]
    lse, blocks = torch.randn(1, 2, 48), lists()
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    check(ops.attention, (q, k, v, 0.25, keys, "cpu"), test_utils=tests)
    check(ops.attention_with_mass, (q, k, v, lse, 16, 16, 0.25, keys, "cpu"), test_utils=tests)
    check(ops.block_mass, (q, k, lse, 16, 16, 0.25, keys, "cpu"), test_utils=tests)
    boxes = random_boxes(Size(q_len=48, kv_len=48)) if masked == "bool" else (None,) * 3
    arguments = (q, k, v, blocks.idx, blocks.cnt, blocks.ordered().order, blocks.packed(), 16, 16, 0.25, keys)
    made = list(dk.summarise(k, v, 16, scale=0.25, key_mask=keys))
    check(ops.first_order, (k, v, 16, 0.25, keys), test_utils=tests)
    check(ops.summary_error, (q, [*made[:-1], None], 16, 0.25), test_utils=tests)
    for always in (None, torch.rand(3, 9) < 0.2):
        check(ops.lists_of_largest, (torch.rand(1, 4, 3, 9), 0.3, always, 1, 3), test_utils=tests)
    check(ops.lists_of_bits, (blocks.packed(), 3), test_utils=tests)
    for summary in (("", []), ("means", []), ("first-order", made)):
        check(ops.block_sparse_attention, (*arguments, *boxes, *summary, "cpu"), test_utils=tests)
        check(ops.quantised_attention, (*arguments, *summary, 4), test_utils=tests)
        check(ops.eight_bit_attention, (*arguments, *summary, "int8", ""), test_utils=tests)


def test_fullgraph_compile_gives_the_eager_result() -> None:
    blocks = lists()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, lse = dk.attention(q, k, v)
        mass = dk.block_mass(q, k, lse, q_block=16, kv_block=16)
        made = dk.summarise(k, v, 16)
        largest = dk.lists_of_largest(dk.summary_error(q, made, q_block=16), 0.5, **SIZES)
        mass = mass * dk.lists_of_bits(largest.packed(), **SIZES).to_mask()
        parts = [dk.block_sparse_attention(q, k, v, blocks, summary=s)[0] for s in (None, "means", made)]
        return sum(parts) * mass.sum() * dk.summary_error(q, made, q_block=16).sum()

    inputs = qkv()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


SIZES = {"q_block": 16, "kv_block": 16, "q_len": 48, "kv_len": 48}
BAD: dict[str, tuple[Any, str]] = {
    "three axes": (lambda q, k, v: dk.attention(q[0], k[0], v[0]), r"wanted q, k, v as \[B, H, N, D\]"),
    "grouped heads": (lambda q, k, v: dk.attention(q, k[:, :1], v[:, :1]), "Expand grouped key heads"),
    "mixed formats": (lambda q, k, v: dk.attention(q, k.half(), v), "one float dtype"),
    "integers": (lambda q, k, v: dk.attention(q.int(), k.int(), v.int()), "one float dtype"),
    "zero heads": (lambda q, k, v: dk.attention(q[:, :0], k[:, :0], v[:, :0]), "at least one sample, head"),
    "key mask": (lambda q, k, v: dk.attention(q, k, v, key_mask=torch.ones(1, 47) > 0), "wanted key_mask"),
    "bias": (lambda q, k, v: dk.attention(q, k, v, key_mask=torch.ones(1, 47)), r"wanted key_mask .* torch.float32"),
    "whole numbers": (
        lambda q, k, v: dk.attention(q, k, v, key_mask=torch.ones(1, 48).long()),
        r"wanted key_mask bool, or float to be added to the scores, \[1, 48\] or \[1, 2, 48\]; got torch.int64",
    ),
    "lse": (lambda q, k, v: dk.block_mass(q, k, torch.zeros(1, 2, 47), q_block=16, kv_block=16), "wanted lse"),
    "block": (lambda q, k, v: dk.block_mass(q, k, torch.zeros(1, 2, 48), q_block=0, kv_block=16), "at least 1 token"),
    "length": (lambda q, k, v: dk.block_sparse_attention(q[:, :, 1:], k, v, lists()), "the lists are for 48"),
    "heads": (
        lambda q, k, v: dk.block_sparse_attention(*(x.repeat(1, 2, 1, 1) for x in (q, k, v)), lists=lists()),
        "wanted lists",
    ),
    "errors": (lambda q, k, v: dk.lists_of_largest(q[0], 0.5, **SIZES), r"wanted errors as float \[B, H, 3, 3\]"),
    "text": (
        lambda q, k, v: dk.lists_of_largest(q[:, :, :3, :3], 0.5, **SIZES, always=torch.ones(3, 4) > 0),
        r"always listed as bool \(3, 3\) on cpu; got torch.bool \(3, 4\)",
    ),
    "range": (
        lambda q, k, v: dk.lists_of_largest(q[:, :, :3, :3], 0.5, **SIZES, heads=(1, 3)),
        r"wanted a range of the 2 heads; got \(1, 3\)",
    ),
    "bits": (lambda q, k, v: dk.lists_of_bits(q[:, :, :3, :1], **SIZES), r"wanted bits as uint8 \[B\|1, H, 3, 1\]"),
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
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "gluon")
    with pytest.raises(BackendError, match="backend 'gluon' can't run on cpu: runs on cuda, not on cpu"):
        dk.attention(*qkv())
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "fast")
    with pytest.raises(BackendError, match="no backend is called 'fast'; known are cpu, gluon"):
        dk.attention(*qkv())


@pytest.mark.parametrize(
    ("capability", "verdict", "wanted"), [((9, 0), "", "gluon"), ((9, 0), "wrong", "triton"), ((8, 0), "", "triton")]
)
def test_a_gpu_gets_the_fastest_kernel_that_is_right_on_it(
    capability: tuple[int, int], verdict: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a chip")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(trials, "verdict", lambda kernel, *_: verdict if kernel == "gluon" else "")
    dk.forget_measurements()
    device = torch.device("cuda")
    assert dk.backend_for(device) == wanted
    case = Case("attend", torch.float16, 64, 64, 128, 64)
    assert registry.choose(case, device).module.__name__ == f"diffsparse_kernels.backend.{wanted}.launch"
    assert registry.choose(case, device).passed_over == (("gluon: wrong",) if verdict else ())
    assert (dk.backends(device)["gluon"] == "available") == (wanted == "gluon")
    if verdict:  # whoever names a kernel gets it
        assert registry.choose(case, device, "gluon").name == "gluon"
    elif wanted == "triton":
        with pytest.raises(BackendError, match="backend 'gluon' can't run on cuda: the gluon backend is for Hopper"):
            registry.choose(case, device, "gluon")


def test_what_no_kernel_can_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the reference is not a way out: dense attention is faster, and who asks can have it."""
    pytest.importorskip("triton")
    here = {"gluon": lambda device: "not here", "triton": lambda device: None}
    for name, function in here.items():
        monkeypatch.setattr(registry.load(name), "device_capability", function)
    monkeypatch.setattr(trials, "verdict", lambda kernel, *_: "hang in its trial")
    for case, reason in {
        Case("attend", torch.bfloat16, 256, 256, 128, 128): "heads of at most 128 channels; got 256",
        Case("attend", torch.bfloat16, 64, 64, 256, 256): "wants blocks of 16, 32, 64, 128 tokens; got 256",
        Case("mass", torch.float64, 64, 64, 64, 64): "wants float32, bfloat16 or float16; got torch.float64",
        Case("attend", torch.bfloat16, 64, 64, 64, 64): "triton: hang in its trial",
    }.items():
        with pytest.raises(NoKernelError, match=reason) as told:
            registry.choose(case, torch.device("cuda"))
        assert ("gluon: not here" in told.value.reason) == (case.kind == "attend")  # all it is made for
        assert "backend='reference'" in str(told.value)


def test_a_back_end_is_asked_for_what_it_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper kernel attends, with masses or without: that triton makes the rest is no failure to tell of."""
    pytest.importorskip("triton")
    for name in ("gluon", "triton"):
        monkeypatch.setattr(registry.load(name), "device_capability", lambda device: None)
    monkeypatch.setattr(trials, "verdict", lambda *_: "")
    dk.forget_measurements()
    for kind in get_args(Kind):
        case = Case(kind, torch.bfloat16, 64, 64, 128, 64)
        for named in ("", "gluon"):
            choice = registry.choose(case, torch.device("cuda"), named)
            assert choice == dk.Choice("gluon" if kind in ("attend", "fused") else "triton")


def test_what_takes_no_bias_is_passed_over_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for name in ("gluon", "triton"):
        monkeypatch.setattr(registry.load(name), "device_capability", lambda device: None)
    monkeypatch.setattr(trials, "verdict", lambda *_: "")
    dk.forget_measurements()
    case = Case("attend", torch.bfloat16, 64, 64, 128, 64, True)
    for kind in ("attend", "fused"):
        for named in ("", "gluon"):
            assert registry.choose(case._replace(kind=kind), torch.device("cuda"), named).name == "gluon"
            choice = registry.choose(case._replace(kind=kind, biased=True), torch.device("cuda"), named)
            assert choice == dk.Choice("triton", ("gluon: it takes no key mask that is added to the scores",))


def test_a_key_mask_is_known_by_its_dtype() -> None:
    q, k, v = qkv(torch.bfloat16)
    cases = [Case.of("attend", q, k, v, (16, 16), mask) for mask in (None, torch.ones(1, 48) > 0, torch.ones(1, 48))]
    assert [(case.masked, case.biased) for case in cases] == [(False, False), (True, False), (True, True)]
    kept = torch.rand(1, 2, 48) < 0.5
    for mask in (torch.rand(1, 2, 48) < 0.5, torch.randn(1, 2, 48).bfloat16()):
        hidden = masks.hide(mask, kept)
        assert hidden.dtype == mask.dtype
        assert torch.equal(masks.shown(hidden), masks.shown(mask) & kept)
        assert torch.equal(hidden[kept], mask[kept])
    lowest = masks.readable(torch.tensor([[torch.finfo(torch.bfloat16).min, -1e4, 1.0]]).bfloat16(), q)
    assert lowest is not None
    assert lowest.tolist() == [[-torch.inf, -9984.0, 1.0]]
    assert lowest.dtype == torch.float32
    assert masks.readable(kept, q) is kept


def test_no_exception_of_a_backend_leaves_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise RuntimeError(f"{name} was made for another compiler")

    monkeypatch.setattr(registry, "load", broken)
    assert dk.backends()["gluon"] == "gluon was made for another compiler"


def test_what_was_measured_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, name = torch.device("cpu"), device_name("cpu")
    default = dk.break_even(cpu, torch.float32, 64, 64, 1000)
    assert 0 < default <= 1
    row = {"device": name, "backend": "reference", "dtype": "float32", "head_dim": 64, "block": 64}
    rows = [row | {"tokens": 1024, "break_even": 0.3}, row | {"tokens": 8192, "break_even": 0.5}]
    (tmp_path / "break_even.json").write_text(json.dumps(rows))
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    dk.forget_measurements()
    assert dk.backend_for(cpu) == "reference"
    assert dk.break_even(cpu, torch.float32, 40, 32, 900) == 0.3
    assert dk.break_even(cpu, torch.float32, 64, 64, 7000) == 0.5
    assert dk.break_even(cpu, torch.float32, 64, (128, 64), 900) == 0.3  # the smaller edge, where the pair has no row
    assert dk.break_even(cpu, torch.float32, 64, (128, 128), 900) == 1.0
    rows.append(row | {"block": "128x64", "tokens": 1024, "break_even": 0.4})
    (tmp_path / "break_even.json").write_text(json.dumps(rows))
    dk.forget_measurements()
    assert dk.break_even(cpu, torch.float32, 64, (128, 64), 900) == 0.4
    assert dk.break_even(cpu, torch.float32, 64, (64, 128), 900) == 0.3
    assert dk.break_even(cpu, torch.float32, 64, 64, 900) == 0.3
    assert dk.break_even(cpu, torch.bfloat16, 64, 64, 7000) == 1.0  # the reference's default
    (tmp_path / "break_even.json").write_text("half a fi")
    dk.forget_measurements()
    with pytest.warns(UserWarning, match=r"break_even\.json is ignored"):
        assert dk.backend_for(cpu) == "cpu"


def test_tuned_tiles_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"keys": 32, "warps": 8, "stages": 4, "copy": "pointers"}
    row = {"device": "a chip", "head_dim": 128, "q_block": 128, "kv_block": 128, "tiles": [mine]}
    (tmp_path / "tiles.json").write_text(json.dumps([row]))
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    dk.forget_measurements()
    assert measured.tiles_for(90, 96, 128, 128, "a chip")[0] == measured.Tile(**mine)
    assert measured.tiles_for(90, 96, 128, 128, "another") == measured.tiles_for(90, 96, 128, 128)


FOLDERS = {
    "linux": ".cache/diffsparse",
    "darwin": "Library/Caches/diffsparse",
    "win32": "AppData/Local/diffsparse/Cache",
}


@pytest.fixture(params=FOLDERS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """platformdirs as it is on this system."""
    for name in ("DIFFSPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda name: str(Path.home() / "AppData/Local"))
    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", request.param)
        importlib.reload(platformdirs)
    yield request.param
    importlib.reload(platformdirs)


def test_the_cache_folder_is_where_the_system_has_it(system: str) -> None:
    assert "diffsparse" in str(machine.cache_folder())
    assert str(machine.cache_folder()).startswith(str(Path.home()))
    assert str(machine.cache_folder()).replace("\\", "/").endswith(FOLDERS[system])


def test_the_cache_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFSPARSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert machine.cache_folder() == tmp_path / "diffsparse"
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path / "mine"))
    assert machine.cache_folder() == tmp_path / "mine"


def test_on_the_cpu_nothing_of_triton_is_imported() -> None:
    """Triton is not even there; torch looks for it by itself."""
    code = """
import sys
sys.modules["triton"] = None
import torch, diffsparse_kernels as dk
q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
lists = dk.BlockLists.from_mask(torch.ones(1, 1, 4, 4) > 0, q_block=16, kv_block=16, q_len=64, kv_len=64)
_, lse = dk.attention(q, k, v)
dk.block_sparse_attention(q, k, v, lists)
dk.select_rows(dk.block_mass(q, k, lse, q_block=16, kv_block=16), 2)
dk.break_even(q.device, q.dtype, 16, 16, 64)
ours = {name for name in sys.modules if name.startswith("diffsparse_kernels.")}
others = ("triton.launch", "gluon.launch", "flex", "flash4")
assert not ours & {f"diffsparse_kernels.backend.{name}" for name in others}, ours
assert dk.backends()["triton"] != "available"
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_strange_name_is_told() -> None:
    with pytest.raises(AttributeError, match="No diffsparse_kernels attribute nothing"):
        dk.nothing  # noqa: B018
    assert set(dk.__all__) <= set(dir(dk))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, diffsparse_kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
