"""Our kernels beside torch's dense attention: same tensors, same process, correctness first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from diffsparse.errors import ConfigError, DiffsparseError
from diffsparse.files import first_line
from diffsparse_eval.rows import SCHEMA, SCHEMA_KEY, BenchRow
from diffsparse_eval.suites import Case, sdpa

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn.attention import SDPBackend

    from diffsparse_eval.suites import QKV
    from diffsparse_eval.timing import Call
    from diffsparse_kernels import BlockLists

INPUTS = 2  # sets of inputs that alternate
_FOREIGN = ("flex", "flash-attn-4")
DEFAULTS = {"cpu": ("cpu",), "gpu": ("gluon", "triton", *_FOREIGN)}  # backends that are timed by default
Kind = Literal[
    "dense",
    "mass",
    "dense-mass",
    "sparse",
    "means",
    "first-order",
    "raster",
    "ordered",
    "int8",
    "int8-int8",
    "int8-fp8",
    "fp8",
]


class WrongResultError(DiffsparseError, ArithmeticError):
    """A kernel's result is further from the exact one than its number format explains."""


class Entry(NamedTuple):
    """What is timed of a case.

    Attributes:
        backend: name of the kernel.
        kind: dense; mass, the search pass without values; dense-mass, with them; sparse; means and first-order, with
            such summaries of dropped blocks; raster and ordered, with [B, N, H, D] in and out, without and with an
            order of the tokens for each head; int8 and the like, in these eight bits.
        density: share of blocks computed.
        error: largest error that `check` found; None where nothing was compared.
    """

    backend: str
    kind: Kind
    density: float = 1.0
    error: float | None = None

    @property
    def foreign(self) -> bool:
        """Whether it is not ours: it is left out if it does not run."""
        return self.kind == "dense" or self.backend in _FOREIGN


def dense_backends(device: str) -> dict[str, SDPBackend]:
    """torch's dense kernels by name."""
    from torch.nn.attention import SDPBackend

    if device == "cpu":
        return {"sdpa": SDPBackend.FLASH_ATTENTION}
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {f"sdpa-{name}": getattr(SDPBackend, member) for name, member in names.items()}


Failed = Callable[[Entry, Exception], None]


@dataclass
class Troubles:
    """Kernels that were not timed.

    Attributes:
        left_out: foreign kernels that don't run here, with the reason.
        failed: kernels that are wrong, or that are ours and fail: backend and case -> reason.
    """

    left_out: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, case: Case, entry: Entry, error: Exception) -> None:
        """Note that the entry ended in `error`.

        Args:
            case: the size.
            entry: what was timed.
            error: what it raised.
        """
        if entry.foreign and not isinstance(error, WrongResultError):
            self.left_out.add(f"{entry.backend}: {_short(error)}")
        else:
            self.failed.setdefault(f"{entry.backend}, {case.label}", _short(error))


def measure(case: Case, device: str, backends: Sequence[str], rounds: int, troubles: Troubles) -> list[BenchRow]:
    """Time one case: each dense kernel, then block-sparse attention and the mass pass of each backend.

    All take turns and the median counts, so that a busy machine slows all of them alike. Two sets of inputs alternate,
    so that none finds its inputs in the cache.

    Args:
        case: the size and the block lists.
        device: "cpu" or "cuda".
        backends: names of our backends, as `diffsparse_kernels.backends` lists them.
        rounds: timed turns of each.
        troubles: takes the kernels that don't run or are not exact enough, which have no rows.

    Returns:
        The rows; none if no dense kernel runs here.
    """
    import torch

    from diffsparse_eval.timing import in_turns

    inputs = [case.tensors(device, seed) for seed in range(INPUTS)]
    lists = {sparsity: case.lists(sparsity, device) for sparsity in case.sparsities}
    with torch.inference_mode():
        failed = partial(troubles.add, case)
        kernels = {(sparsity, name): _sparse(name, device, lists[sparsity]) for sparsity in lists for name in backends}
        checked = _checked(inputs[0], lists, kernels, failed)
        calls = _calls(case, device, inputs, lists, kernels, checked, backends, failed)
        seconds = in_turns(calls, rounds, device, warm_up=1, failed=failed)
    dense = [value for entry, value in seconds.items() if entry.kind == "dense"]
    return [_row(case, device, entry, value, min(dense)) for entry, value in seconds.items()] if dense else []


Sparse = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]  # q, k, v -> out, over some blocks


def _sparse(name: str, device: str, lists: BlockLists) -> Sparse:
    """The block-sparse product of a backend."""
    if name == "flex" and device == "cpu":
        return _flex_on_cpu(lists)
    from diffsparse_kernels import block_sparse_attention

    return lambda q, k, v: block_sparse_attention(q, k, v, lists, backend=name)[0]


def _flex_on_cpu(lists: BlockLists) -> Sparse:
    """FlexAttention compiled for the CPU, where our backend runs it eager: torch compiles none that returns the LSE.

    Needs a C++ compiler, and takes a minute for each shape.
    """
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    kernel, mask = torch.compile(flex_attention, dynamic=False), lists.to_block_mask()
    return lambda q, k, v: kernel(q, k, v, block_mask=mask)


def _checked(
    inputs: QKV, lists: dict[float, BlockLists], kernels: dict[tuple[float, str], Sparse], failed: Failed
) -> dict[tuple[float, str], float]:
    """The error of each backend at each sparsity, before anything is timed."""
    errors = {}
    for (sparsity, name), kernel in kernels.items():
        try:
            errors[sparsity, name] = check(*inputs, lists[sparsity], name, kernel)
        except Exception as error:
            failed(Entry(name, "sparse"), error)
    return errors


def _calls(
    case: Case,
    device: str,
    inputs: list[QKV],
    lists: dict[float, BlockLists],
    kernels: dict[tuple[float, str], Sparse],
    checked: dict[tuple[float, str], float],
    backends: Sequence[str],
    failed: Failed,
) -> dict[Entry, Sequence[Call]]:
    """All calls that are timed, one for each set of inputs."""
    from diffsparse_kernels import PRECISIONS, attention

    found: dict[Entry, Sequence[Call]] = {
        Entry(name, "dense"): [partial(sdpa, member, *qkv) for qkv in inputs]
        for name, member in dense_backends(device).items()
    }
    for name in backends:
        if name == "flex" and device == "cpu":
            continue  # eager there
        if name in _FOREIGN:
            found[Entry(name, "dense")] = [partial(attention, *qkv, backend=name) for qkv in inputs]
        else:
            found |= _searches(case, inputs, name, failed)
    for (sparsity, name), worst in checked.items():
        entry = Entry(name, "sparse", float(lists[sparsity].density()), worst)
        found[entry] = [partial(kernels[sparsity, name], *qkv) for qkv in inputs]
        if name not in _FOREIGN:
            for kind, variant in _variants(case, lists[sparsity], name).items():
                found[entry._replace(kind=kind, error=None if kind in PRECISIONS else worst)] = [
                    partial(variant, *qkv) for qkv in inputs
                ]
    return found


def _searches(case: Case, inputs: list[QKV], backend: str, failed: Failed) -> dict[Entry, Sequence[Call]]:
    """The mass of blocks, alone and beside dense attention, on log-sum-exps that the backend has made itself."""
    from diffsparse_kernels import attention, attention_with_mass, block_mass

    mass, dense = (
        partial(op, q_block=case.q_block, kv_block=case.kv_block, backend=backend)
        for op in (block_mass, attention_with_mass)
    )
    try:
        lses = [attention(*qkv, backend=backend)[1] for qkv in inputs]
    except Exception as error:
        failed(Entry(backend, "mass"), error)
        return {}
    both = [(*qkv, lse) for qkv, lse in zip(inputs, lses, strict=True)]
    return {
        Entry(backend, "mass"): [partial(mass, q, k, lse) for q, k, _, lse in both],
        Entry(backend, "dense-mass"): [partial(dense, *each) for each in both],
    }


def _variants(case: Case, lists: BlockLists, backend: str) -> dict[Kind, Callable[..., object]]:
    """The same blocks with summaries of the others; in eight bits; token-major, as models call; in head orders."""
    import torch

    from diffsparse import Layout
    from diffsparse.orders.named import AXES
    from diffsparse.orders.per_head import HeadOrders
    from diffsparse_kernels import block_sparse_attention
    from diffsparse_kernels.summaries import SUMMARIES

    kernel = partial(block_sparse_attention, lists=lists, backend=backend)
    found: dict[Kind, Callable[..., object]] = {by: partial(kernel, summary=by) for by in SUMMARIES}
    if backend == "triton":
        found |= {name: partial(kernel, precision=name) for name in _precisions(case, lists.idx.device)}
    frames, rest = divmod(case.tokens, 256)
    if rest:
        return found
    picked = torch.arange(case.heads) % len(AXES)
    orders = HeadOrders.of(AXES, picked, Layout(frames, 16, 16), lists.idx.device)

    def raster(*qkv: Tensor) -> Tensor:
        return kernel(*(_token_major(x) for x in qkv))[0].transpose(1, 2).contiguous()

    def ordered(*qkv: Tensor) -> Tensor:
        return orders.undo(kernel(*orders.apply(*map(_token_major, qkv)))[0]).transpose(1, 2).contiguous()

    return {**found, "raster": raster, "ordered": ordered}


def _precisions(case: Case, device: torch.device) -> list[Kind]:
    """Eight bits that the triton backend has for a case."""
    import torch

    from diffsparse_kernels import PRECISIONS
    from diffsparse_kernels.case import Case as Asked
    from diffsparse_kernels.registry import capability

    sizes = case.head_dim, case.head_dim, case.q_block, case.kv_block
    asked = Asked("attend", getattr(torch, case.dtype), *sizes)
    able = (name for name in PRECISIONS if capability("triton", device, asked._replace(precision=name)) is None)
    return cast(list[Kind], list(able))


def _token_major(x: Tensor) -> Tensor:
    """The same memory taken for [B, N, H, D], as models have it: other numbers, but the same time."""
    batch, heads, tokens, dim = x.shape
    return x.view(batch, tokens, heads, dim).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, backend: str, kernel: Sparse) -> float:
    """Largest error of a backend's kernel in some blocks of the first and last head, against the reference in float64.

    Args:
        q: [B, H, N, D].
        k: [B, H, N, D].
        v: [B, H, N, D].

    Raises:
        WrongResultError: it is over twice the error of a plain eager computation in the same number format.
    """
    from diffsparse_kernels.backend.selftest import Sample, spot_check

    error, limit = spot_check(kernel(q, k, v), Sample("", q, k, v, lists, scale=q.shape[-1] ** -0.5))
    if not error <= limit:
        raise WrongResultError(f"backend {backend!r} is off by {error:.2e}; at most {limit:.2e} is explained")
    return error


def _short(error: Exception) -> str:
    return first_line(error)[:120]


def _row(case: Case, device: str, entry: Entry, seconds: float, dense: float) -> BenchRow:
    from diffsparse_eval import environment
    from diffsparse_kernels import written

    share = 0.5 if entry.kind == "mass" else entry.density  # the mass pass has one product of two
    versions = environment.versions()
    return {
        "case": case.name,
        "device": environment.device_name(device),
        "backend": entry.backend,
        "kind": entry.kind,
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "block": written(case.block),
        "pattern": case.pattern,
        "density": entry.density,
        "ms": seconds * 1e3,
        "tflops": share * case.flops / seconds / 1e12,
        "speedup": dense / seconds,
        "efficiency": share * dense / seconds,
        "max_error": entry.error,
        "torch": versions["torch"],
        "triton": versions.get("triton"),
        "commit": environment.commit(),
        "seed": 0,
    }


def check_file(out: Path) -> None:
    """Raise ConfigError unless `write` knows the format of the file."""
    if out.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out wants a .csv or .json file; got {out.name!r}")


def write(rows: list[BenchRow], out: Path) -> None:
    """Write rows as CSV or JSON, whole or not at all."""
    from diffsparse.files import write_csv, write_json

    if out.suffix == ".csv":
        return write_csv([dict(row) for row in rows], out)
    write_json({SCHEMA_KEY: SCHEMA, "rows": rows}, out)
