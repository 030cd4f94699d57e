"""`diffsparse bench`: our kernels beside torch's dense attention, same tensors, same process, correctness first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from diffsparse.errors import BackendError, ConfigError, DiffsparseError
from diffsparse_eval.suites import SUITES, Case
from diffsparse_pipelines import options

if TYPE_CHECKING:
    import torch

    from diffsparse_eval.suites import QKV
    from diffsparse_kernels import BlockLists

Row = dict[str, Any]
Failed = Callable[..., None]  # takes an entry and its error
_FOREIGN = ("flex", "flash-attn-4")
_GPU = ("gluon", "triton", *_FOREIGN)  # what is timed by default, where it runs
_INPUTS = 2
_MOST_TOKENS = 1_000_000
_HEADINGS = (
    "dtype",
    "tokens x heads x D",
    "block",
    "backend",
    "kind",
    "density",
    "ms",
    "tflops",
    "speed-up",
    "efficiency",
)
_LEGEND = (
    "speed-up is over the fastest dense kernel of the same case; mass is the search pass without values",
    "means: dropped blocks stand as their means; raster and ordered: [B, N, H, D] in and out, without and",
    "with an order of the tokens for each head",
    "efficiency is TFLOP/s per computed block over that dense kernel's",
)


class WrongResultError(DiffsparseError, ArithmeticError):
    """A kernel's result is further from the exact one than its number format explains."""


class Entry(NamedTuple):
    """One contestant of a case; error is that of `check`."""

    backend: str
    kind: Literal["dense", "mass", "sparse", "means", "raster", "ordered"]
    density: float = 1.0
    error: float | None = None

    @property
    def foreign(self) -> bool:
        """Not ours: where it does not run it is left out."""
        return self.kind == "dense" or self.backend in _FOREIGN


def dense_backends(device: str) -> dict[str, Any]:
    """torch's dense kernels by name."""
    from torch.nn.attention import SDPBackend

    if device == "cpu":
        return {"sdpa": SDPBackend.FLASH_ATTENTION}
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {f"sdpa-{name}": getattr(SDPBackend, member) for name, member in names.items()}


@dataclass
class Troubles:
    """Who was not timed, and why: foreign kernels that don't run here; and kernels that are wrong, or ours and fail."""

    left_out: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # backend and case -> reason

    def add(self, entry: Entry, case: Case, error: Exception) -> None:
        """Note that the entry ended in `error`."""
        if entry.foreign and not isinstance(error, WrongResultError):
            self.left_out.add(f"{entry.backend}: {_short(error)}")
        else:
            self.failed.setdefault(f"{entry.backend}, {case.label}", _short(error))


def measure(case: Case, device: str, backends: list[str], rounds: int, troubles: Troubles) -> list[Row]:
    """Time one case: each dense kernel, then block-sparse attention and the mass pass of each backend.

    Contestants take turns, `rounds` times, and the median counts, so that a busy machine slows all of them alike. Two
    sets of inputs alternate, so that nobody finds its own in the cache. Kernels that don't run or are not exact enough
    have no rows, and their reasons are added to `troubles`.
    """
    import torch

    inputs = [case.tensors(device, seed) for seed in range(_INPUTS)]
    lists = {sparsity: case.lists(sparsity, device) for sparsity in case.sparsities}
    with torch.inference_mode():
        failed = partial(troubles.add, case=case)
        checked = _checked(inputs[0], lists, backends, failed)
        contestants = _contestants(case, device, inputs, lists, checked, backends, failed)
        seconds = _take_turns(contestants, rounds, device, failed)
    dense = [value for entry, value in seconds.items() if entry.kind == "dense"]
    return [_row(case, device, entry, value, min(dense)) for entry, value in seconds.items()] if dense else []


def _checked(
    inputs: QKV, lists: dict[float, BlockLists], backends: list[str], failed: Failed
) -> dict[tuple[float, str], float]:
    """The error of each backend at each sparsity, before anything is timed."""
    errors = {}
    for sparsity, name in itertools.product(lists, backends):
        try:
            errors[sparsity, name] = check(*inputs, lists[sparsity], name)
        except Exception as error:
            failed(Entry(name, "sparse"), error=error)
    return errors


def _contestants(
    case: Case,
    device: str,
    inputs: list[QKV],
    lists: dict[float, BlockLists],
    checked: dict[tuple[float, str], float],
    backends: list[str],
    failed: Failed,
) -> dict[Entry, list[Callable[[], Any]]]:
    """Everybody's calls, one for each set of inputs."""
    from diffsparse_kernels import attention, block_mass, block_sparse_attention

    found: dict[Entry, list[Callable[[], Any]]] = {
        Entry(name, "dense"): [_sdpa(member, *qkv) for qkv in inputs] for name, member in dense_backends(device).items()
    }
    for name in backends:
        if name in _FOREIGN:
            found[Entry(name, "dense")] = [partial(attention, *qkv, backend=name) for qkv in inputs]
            continue
        mass = partial(block_mass, q_block=case.block, kv_block=case.block, backend=name)
        try:
            lses = [attention(*qkv, backend=name)[1] for qkv in inputs]
        except Exception as error:
            failed(Entry(name, "mass"), error=error)
            continue
        found[Entry(name, "mass")] = [partial(mass, q, k, lse) for (q, k, _), lse in zip(inputs, lses, strict=True)]
    for (sparsity, name), worst in checked.items():
        entry = Entry(name, "sparse", float(lists[sparsity].density()), worst)
        found[entry] = [partial(block_sparse_attention, *qkv, lists[sparsity], backend=name) for qkv in inputs]
        if name not in _FOREIGN:
            for kind, variant in _variants(case, lists[sparsity], name).items():
                found[entry._replace(kind=kind)] = [partial(variant, *qkv) for qkv in inputs]
    return found


def _variants(case: Case, lists: BlockLists, backend: str) -> dict[Any, Callable[..., Any]]:
    """The same blocks with means for the others; as models call, token by token; and so with an order for each head."""
    import torch

    from diffsparse import Layout
    from diffsparse.orders.named import AXES
    from diffsparse.orders.per_head import HeadOrders
    from diffsparse_kernels import block_sparse_attention

    kernel = partial(block_sparse_attention, lists=lists, backend=backend)
    found: dict[Any, Callable[..., Any]] = {"means": partial(kernel, means=True)}
    frames, rest = divmod(case.tokens, 256)
    if rest:
        return found
    picked = torch.arange(case.heads) % len(AXES)
    orders = HeadOrders.of(AXES, picked, Layout(frames, 16, 16), lists.idx.device)

    def raster(*qkv: torch.Tensor) -> torch.Tensor:
        return kernel(*(_token_major(x) for x in qkv))[0].transpose(1, 2).contiguous()

    def ordered(*qkv: torch.Tensor) -> torch.Tensor:
        return orders.undo(kernel(*(orders.apply(_token_major(x)) for x in qkv))[0]).transpose(1, 2).contiguous()

    return {**found, "raster": raster, "ordered": ordered}


def _token_major(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] laid out as models have it: taken for [B, N, H, D], which is as good for a clock."""
    batch, heads, tokens, dim = x.shape
    return x.view(batch, tokens, heads, dim).transpose(1, 2)


def _sdpa(member: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call() -> Any:
        with sdpa_kernel(member):
            return scaled_dot_product_attention(q, k, v)

    return call


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: BlockLists, backend: str) -> float:
    """Largest error of `backend` in some blocks of the first and the last head, against the reference in float64.

    Raises:
        WrongResultError: it is over twice the error of a plain eager computation in the same number format.
    """
    from diffsparse_kernels import block_sparse_attention
    from diffsparse_kernels.backend.selftest import Sample, spot_check

    out, _ = block_sparse_attention(q, k, v, lists, backend=backend)
    error, limit = spot_check(out, Sample("", q, k, v, lists, scale=q.shape[-1] ** -0.5))
    if not error <= limit:
        raise WrongResultError(f"backend {backend!r} is off by {error:.2e}; at most {limit:.2e} is explained")
    return error


def _take_turns(
    contestants: dict[Entry, list[Callable[[], Any]]], rounds: int, device: str, failed: Failed
) -> dict[Entry, float]:
    """Median seconds of each; one that fails is out."""
    from diffsparse_eval.timing import seconds_of

    times: dict[Entry, list[float]] = {entry: [] for entry in contestants}
    for turn, (entry, calls) in itertools.product(range(rounds + 1), contestants.items()):
        if entry not in times:
            continue
        try:
            elapsed = seconds_of(calls[turn % len(calls)], device)
        except Exception as error:
            failed(entry, error=error)
            del times[entry]
            continue
        if turn > 0:  # the first warms up
            times[entry].append(elapsed)
    return {entry: sorted(found)[len(found) // 2] for entry, found in times.items()}


def _short(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120]


def _row(case: Case, device: str, entry: Entry, seconds: float, dense: float) -> Row:
    from diffsparse_eval import environment

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
        "block": case.block,
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


def bench(
    suite: Annotated[
        str, typer.Option(help="gpu: the shapes of Wan, HunyuanVideo and Flux. Sizes below if empty.")
    ] = "",
    shrink: Annotated[
        int,
        typer.Option(
            help="Divide a suite's tokens by this, to try it without a GPU.", callback=options.whole(1, options.MOST)
        ),
    ] = 1,
    tokens: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "1024,4096",
    sparsity: Annotated[str, typer.Option(help="Shares of blocks dropped.")] = "0.5,0.8,0.9",
    head_dim: Annotated[str, typer.Option(help="Channels of a head.")] = "64,128",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    block: Annotated[str, typer.Option(help="Edges of a block in tokens.")] = "64,128",
    heads: Annotated[int, typer.Option(help="Heads.", callback=options.whole(1, options.MOST_BLOCK))] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    backend: Annotated[str, typer.Option(help="Backends, separated by commas; all that run here if empty.")] = "",
    rounds: Annotated[
        int,
        typer.Option(help="Timed turns of each contestant.", callback=options.whole(1, options.MOST_COUNT)),
    ] = 7,
    tune: Annotated[bool, typer.Option("--tune", help="Time the Triton tiles instead, and keep the best.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="A .csv or .json file for the rows; bench-SUITE.csv for one.", callback=options.file),
    ] = None,
) -> None:
    """Time the attention kernels beside torch's dense ones: same tensors, same process, results checked first."""
    from diffsparse.files import if_stopped, writable
    from diffsparse_pipelines.machine import hold, place
    from diffsparse_pipelines.progress import say, track

    device = place(device)
    if tune:
        from diffsparse_eval.tune import tune_tiles

        say(f"the best tiles are in {tune_tiles(device, rounds)}")
        return
    if shrink > 1 and not suite:
        raise ConfigError("--shrink wants --suite; other sizes are said by --tokens")
    cases = _suite(suite, shrink) if suite else _cases(tokens, sparsity, head_dim, dtype, block, heads)
    out = Path(f"bench-{suite}.csv") if suite and out is None else out
    if out is not None:
        _check_out(out)
        writable(out)
    for case in cases:
        hold(case.nbytes * _INPUTS, device, f"the tensors of {case.label}", "lower --tokens, --heads or --head-dim")
    named = _named(backend, device)
    rows: list[Row] = []
    troubles = Troubles()
    with if_stopped(lambda: f"{len(rows)} rows are in {out}" if out is not None and rows else "no row is kept"):
        for case in track(cases, "cases"):
            rows += measure(case, device, named, rounds, troubles)
            if out is not None and rows:
                _write(rows, out)  # what is measured stays, whatever comes next
    _show(rows, troubles)
    if out is not None and rows:
        say(f"{len(rows)} rows are in {out}")
    if troubles.failed:
        raise BackendError(f"wrong or broken, and not in the rows: {'; '.join(troubles.failed)}")


def _suite(name: str, shrink: int) -> list[Case]:
    if name not in SUITES:
        raise ConfigError(f"--suite wants one of {', '.join(SUITES)}; got {name!r}")
    return SUITES[name]() if shrink == 1 else [case.shrunk(shrink) for case in SUITES[name]()]


def _cases(tokens: str, sparsity: str, head_dim: str, dtype: str, block: str, heads: int) -> list[Case]:
    from diffsparse_pipelines.families import DTYPES

    dtypes = [name.strip() for name in dtype.split(",") if name.strip()]
    if not dtypes or not set(dtypes) <= set(DTYPES) - {"auto"}:
        raise ConfigError(f"--dtype wants some of {', '.join(DTYPES[1:])}; got {dtype!r}")
    shares = options.shares(sparsity, "--sparsity")
    lengths = options.wholes(tokens, "--tokens", 1, _MOST_TOKENS)
    widths = options.wholes(head_dim, "--head-dim", 1, options.MOST_BLOCK)
    blocks = options.wholes(block, "--block", 1, options.MOST_BLOCK)
    product = itertools.product(dtypes, widths, lengths, blocks)
    return [Case(n, heads, d, name, b, shares) for name, d, n, b in product]


def _named(wanted: str, device: str) -> list[str]:
    import torch

    from diffsparse_kernels import backends

    known = backends(torch.device(device))
    if not wanted:
        kind = ("cpu",) if device == "cpu" else _GPU
        return [name for name in kind if known.get(name) == "available"]
    listed = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in listed:
        if known.get(name) != "available":
            raise BackendError(f"backend {name!r}: {known.get(name, 'unknown')}; known: {', '.join(known)}")
    return listed


def _check_out(out: Path) -> None:
    if out.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out wants a .csv or .json file; got {out.name!r}")


def _write(rows: list[Row], out: Path) -> None:
    from diffsparse.files import write_csv, write_json

    if out.suffix == ".csv":
        return write_csv(rows, out)
    write_json({"rows": rows}, out)


def _show(rows: list[Row], troubles: Troubles) -> None:
    from diffsparse_pipelines.progress import say, show_table

    if rows:
        show_table([_cells(row) for row in rows], "lllllrrrrr", _HEADINGS, rows[0]["device"])
        for line in _LEGEND:
            say(line)
    for reason in sorted(troubles.left_out):
        say(f"left out: {reason}")
    for entry, reason in troubles.failed.items():
        say(f"wrong or broken: {entry}: {reason}")


def _cells(row: Row) -> list[str]:
    size = f"{row['tokens']} x {row['heads']} x {row['head_dim']}"
    digits = {"density": 2, "ms": 2, "tflops": 3, "speedup": 2, "efficiency": 2}
    figures = [f"{row[name]:.{n}f}" for name, n in digits.items()]
    return [row["dtype"], size, str(row["block"]), row["backend"], row["kind"], *figures]
